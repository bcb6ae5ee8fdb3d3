"""Ranks that are in different calls, at different steps, or gone: they meet, and nobody waits without end."""

from __future__ import annotations

from pathlib import Path

import pytest

import parckpt
from parckpt.testing.mpirun import Mpi, run

SCENES = [
    "a_rank_that_leaves_early_answers",
    "a_rank_that_leaves_misses_a_save",
    "poll_and_wait_meet_step_end",
    "steps_differ_when_a_save_is_due",
    "a_save_is_due_and_one_rank_polls",
    "restore_meets_step_end",
    "save_now_meets_step_end",
    "a_rank_leaves_by_an_exception",
    "a_rank_leaves_by_an_exception_and_the_others_are_done",
    "a_rank_closes_early",
    "the_last_step_is_saved_on_leaving",
    "a_callable_is_called_for_saves_only",
    "unchanged_tensors_are_told_once",
]


@pytest.mark.parametrize("nranks", [2, 5])
def test_scenes(mpi: Mpi, nranks: int, programs: Path, tmp_path: Path) -> None:
    args = [str(tmp_path), *SCENES]
    result = run(programs / "scenes.py", nranks, args, mpi=mpi, timeout_s=90, abort_on_error=True).check()
    assert [out.split() for out in result.stdout] == [SCENES] * nranks


def test_an_exception_under_plain_python(mpi: Mpi, programs: Path, tmp_path: Path) -> None:
    """Nobody aborts anybody: the ranks end by themselves, each with its own traceback."""
    result = run(programs / "leaving.py", 3, [str(tmp_path)], mpi=mpi, timeout_s=60)
    assert result.returncode != 0
    assert "ZeroDivisionError: the program's own" in result.stderr[1]
    # Some launchers kill the others as soon as one has failed; who got as far as an error got the right one.
    for rank in (0, 2):
        assert "RankError: rank 1 left because of an exception" in result.stderr[rank] or not result.stderr[rank]
    found = parckpt.list_checkpoints(tmp_path)
    assert [one.step for one in found] == [2]
