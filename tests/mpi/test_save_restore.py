"""Saved on four ranks, restored on one to eight, bit for bit, in every layout and format."""

from __future__ import annotations

from pathlib import Path

import pytest

from parckpt.testing.jobs import CASES
from parckpt.testing.mpirun import MPIS, Mpi, run


@pytest.fixture(scope="module")
def saved(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Mpi, Path]:
    """Directories by the MPI that saved, filled when asked for."""
    return {mpi: tmp_path_factory.mktemp(mpi) for mpi in MPIS}


@pytest.mark.parametrize("nranks", [1, 2, 3, 5, 8])
def test_saved_on_four(mpi: Mpi, nranks: int, programs: Path, saved: dict[Mpi, Path]) -> None:
    program, directory = programs / "save_restore.py", saved[mpi]
    if not any(directory.iterdir()):
        done = run(program, 4, ["save", str(directory), "4"], mpi=mpi, timeout_s=120, abort_on_error=True).check()
        assert done.stdout == (f"{len(CASES)} cases\n",) * 4
    args = ["restore", str(directory), "4"]
    done = run(program, nranks, args, mpi=mpi, timeout_s=120, abort_on_error=True).check()
    assert done.stdout == (f"{len(CASES)} cases\n",) * nranks
