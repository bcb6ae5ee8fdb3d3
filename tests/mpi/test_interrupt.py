"""SIGINT on one rank in the midst of a collective call: it is held back until the call's end."""

from __future__ import annotations

from pathlib import Path

from parckpt.testing.mpirun import Mpi, run


def test_an_interrupt_waits_for_the_end_of_a_call(mpi: Mpi, programs: Path, tmp_path: Path) -> None:
    result = run(programs / "interrupted.py", 3, [str(tmp_path)], mpi=mpi, timeout_s=60, abort_on_error=True).check()
    assert [len(out.splitlines()) for out in result.stdout] == [7] * 3
