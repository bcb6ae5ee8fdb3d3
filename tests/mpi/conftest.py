"""Fixtures of the tests that start real ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from parckpt.testing.mpirun import MPIS, Mpi, MpiMissingError, python_of
from parckpt.testing.processes import sweep


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here as `mpi`. The hook sees all tests, so it looks where each one lives."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.mpi)


@pytest.fixture(params=MPIS)
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """Each MPI in turn. A missing one is a failure where the suite must be complete (PARCKPT_TEST_REQUIRE=1)."""
    name: Mpi = request.param
    try:
        python_of(name)
    except MpiMissingError as error:
        if os.environ.get("PARCKPT_TEST_REQUIRE") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))
    return name


@pytest.fixture(scope="session")
def programs() -> Path:
    """Directory of the programs that the ranks run."""
    return Path(__file__).parent / "programs"


@pytest.fixture(scope="session", autouse=True)
def _swept() -> Iterator[None]:
    started = time.time()
    yield
    sweep(started)
