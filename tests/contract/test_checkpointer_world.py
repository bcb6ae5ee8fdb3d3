"""ModelCheckpoint and save_checkpoint on ranks in threads: what `tests/mpi` shows under mpiexec, on more ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from parckpt.testing.jobs import restore_cases, save_cases
from parckpt.testing.scenarios import SCENES
from parckpt.testing.world import run_world


@pytest.mark.filterwarnings("ignore:no tensor has changed:parckpt.StateWarning")
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("name", SCENES)
def test_scene(name: str, size: int, tmp_path: Path) -> None:
    run_world(size, lambda comm, rank: SCENES[name](comm, str(tmp_path)))


@pytest.mark.parametrize(("saved_size", "sizes"), [(1, (2, 5)), (2, (3, 1)), (3, (5, 2)), (5, (3, 1, 5))])
def test_saved_on_any_number_of_ranks(saved_size: int, sizes: tuple[int, ...], tmp_path: Path) -> None:
    directory = str(tmp_path)
    run_world(saved_size, lambda comm, rank: save_cases(comm, directory, large=False))
    for size in sizes:
        run_world(size, lambda comm, rank: restore_cases(comm, directory, saved_size=saved_size, large=False))
