"""The example's training, killed and continued on other numbers of ranks, ends as if nobody had touched it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np

import parckpt
from parckpt.testing.mpirun import Mpi, MpiResult, run

PROGRAM = Path(__file__).parent / "programs" / "killed_training.py"
STEPS, SAVE_EVERY = 20, 4


def train(mpi: Mpi, directory: Path, nranks: int, *, kill_at: int = 0) -> MpiResult:
    args = [kill_at, "--directory", directory, "--steps", STEPS, "--save-every", SAVE_EVERY]
    result = run(PROGRAM, nranks, [str(arg) for arg in args], mpi=mpi, timeout_s=90, abort_on_error=True)
    return result if kill_at else result.check()


def contents(directory: Path) -> dict[str, object]:
    """Every full tensor as its type, shape and bytes, and every plain value, of the newest checkpoint.

    What belongs to single ranks is left out: other numbers of ranks have other such entries.
    """
    path = parckpt.latest_checkpoint(directory)
    assert path is not None
    return {
        name: (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value
        for name, value in parckpt.load_checkpoint(path).items()
        if "@rank_" not in name
    }


def differing(one: dict[str, object], two: dict[str, object]) -> list[str]:
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def test_killed_and_continued_on_other_ranks_equals_undisturbed(mpi: Mpi, tmp_path: Path) -> None:
    train(mpi, tmp_path / "undisturbed", 1)
    killed = tmp_path / "killed"
    for nranks, kill_at, starts_after in ((4, 6, 0), (2, 15, 4), (3, 0, 12)):
        result = train(mpi, killed, nranks, kill_at=kill_at)
        assert f"starting after step {starts_after}\n" in result.stdout[0], result.report()
        assert (result.returncode == 0) == (kill_at == 0), result.report()
        saved = parckpt.inspect(parckpt.latest_checkpoint(killed) or "")
        assert (saved.step, saved.world_size) == (kill_at // SAVE_EVERY * SAVE_EVERY or STEPS, nranks)

    assert differing(contents(killed), contents(tmp_path / "undisturbed")) == []
    # Every rank's own count travelled too: together they are what was computed, without what the kills lost.
    assert re.search(r"done: .* 720 blocks computed", result.stdout[0]), result.report()


def test_the_comparison_notices_a_step_that_is_missing(tmp_path: Path) -> None:
    train("mpich", tmp_path / "one", 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(parckpt.latest_checkpoint(tmp_path / "two") or "")
    names = differing(contents(tmp_path / "one"), contents(tmp_path / "two"))
    assert {"model.w1", "model.b2", "adam.mean.w2", "loader.position"} <= set(names)
