"""The MPI communicator passes the checks that every communicator must, on both MPIs."""

from __future__ import annotations

from pathlib import Path

import pytest

from parckpt.comm.base import MAX_NBYTES
from parckpt.testing.communicators import CHECKS, TIMEOUT_CHECKS
from parckpt.testing.mpirun import Mpi, run


@pytest.mark.parametrize("nranks", [1, 2, 3, 4])
def test_checks(mpi: Mpi, nranks: int, programs: Path) -> None:
    args = ["lasting", str(MAX_NBYTES)]
    result = run(programs / "communicator_checks.py", nranks, args, mpi=mpi, timeout_s=120, abort_on_error=True).check()
    assert [out.split() for out in result.stdout] == [list(CHECKS)] * nranks


def test_small_pieces(mpi: Mpi, programs: Path) -> None:
    names = ["long_data_is_cut", "ragged_bytes_are_gathered", "equal_bytes_travel_once"]
    args = ["lasting", "20001", *names]
    result = run(programs / "communicator_checks.py", 3, args, mpi=mpi, abort_on_error=True).check()
    assert [out.split() for out in result.stdout] == [names] * 3


@pytest.mark.parametrize("nranks", [3])
def test_time_outs(mpi: Mpi, nranks: int, programs: Path) -> None:
    """The ranks that are left name who is missing, and MPI still ends in order."""
    args = ["breaking", str(MAX_NBYTES)]
    result = run(programs / "communicator_checks.py", nranks, args, mpi=mpi, timeout_s=120, abort_on_error=True).check()
    assert [out.split() for out in result.stdout] == [list(TIMEOUT_CHECKS)] * nranks


def test_abandoned_requests(mpi: Mpi, programs: Path) -> None:
    result = run(programs / "abandoned_requests.py", 2, mpi=mpi, abort_on_error=True).check()
    assert [out.split() for out in result.stdout] == [["done"]] * 2


def test_resolve(mpi: Mpi, programs: Path) -> None:
    result = run(programs / "resolving.py", 4, mpi=mpi, abort_on_error=True).check()
    assert all("intracommunicator" in out for out in result.stdout)
