"""Ranks killed at chosen points of a save: what any rank reported as published comes back, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parckpt.testing.mpirun import Mpi, MpiResult, run

# Which rank dies, at which of its calls to the file system. A save of root's has about seventy, of others about thirty.
POINTS = {
    "split-ckpt": [("0", 1), ("0", 9), ("1", 1), ("1", 14), ("0", 24), ("all", 18), ("0", 32), ("0", 37), ("0", 46)],
    "integrated-safetensors": [("0", 5), ("0", 21), ("0", 27), ("0", 31), ("all", 35), ("0", 40)],
}


def _numbers(result: MpiResult, word: str) -> list[list[int]]:
    return [[int(line.split()[1]) for line in out.splitlines() if line.startswith(word)] for out in result.stdout]


@pytest.mark.parametrize("case", POINTS)
def test_each_start_finds_what_was_published(mpi: Mpi, case: str, programs: Path, tmp_path: Path) -> None:
    """Every run restores what the one before left, on another number of ranks, and dies at the next point."""
    published = attempted = 0
    sizes = (3, 2, 4)
    points = POINTS[case] if mpi == "mpich" else POINTS[case][1::3]  # starts take three times as long there
    for number, (who, count) in enumerate([*points, ("0", 0)]):
        size = sizes[number % len(sizes)]
        args = [str(tmp_path), case, who, str(count)]
        result = run(programs / "dying.py", size, args, mpi=mpi, timeout_s=60)
        died = sum("dies at" in out for out in result.stdout)
        assert (result.returncode == 0) == (count == 0), result.report()
        assert died == 0 if count == 0 else died >= 1, result.report()
        restored = _numbers(result, "restored")
        # Nobody waited for the dead job's lock, and all ranks got the same step.
        assert len({tuple(steps) for steps in restored}) == 1, result.report()
        step = restored[0][0]
        assert published <= step <= attempted, result.report()
        published = max((max(steps) for steps in _numbers(result, "published") if steps), default=step)
        assert published >= step + 2, result.report()
        attempted = step + 3
    left = [name for name in os.listdir(tmp_path) if "staging" in name or "trash" in name or "lock" in name]
    assert left == []
