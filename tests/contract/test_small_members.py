"""The small members of ModelCheckpoint: need_checkpoint asks root without saving, updating brackets a change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import parckpt
from parckpt.comm.base import Communicator
from parckpt.testing.clock import ManualClock
from parckpt.testing.world import run_world

pytestmark = pytest.mark.fast


def test_steps_are_counted_from_the_last_save(tmp_path: Path) -> None:
    def rank_main(comm: Communicator, rank: int) -> list[bool]:
        config = parckpt.CheckpointConfig(save_checkpoint_steps=3)
        weights = np.zeros(4)
        answers = []
        with parckpt.ModelCheckpoint("net", tmp_path, config, comm=comm) as ckpt:
            for step in range(1, 7):
                answers.append(ckpt.need_checkpoint())
                weights += 1
                ckpt.step_end({"w": weights}, step)
            assert ckpt.need_checkpoint(step=9)
            assert not ckpt.need_checkpoint(step=8)
        return answers

    for answers in run_world(3, rank_main):
        assert answers == [False, False, True] * 2
    assert [info.step for info in parckpt.list_checkpoints(tmp_path)] == [6, 3]


def test_only_roots_clock_counts(tmp_path: Path) -> None:
    def rank_main(comm: Communicator, rank: int) -> tuple[bool, bool]:
        clock = ManualClock()
        config = parckpt.CheckpointConfig(save_checkpoint_steps=0, save_checkpoint_seconds=60)
        with parckpt.ModelCheckpoint("net", tmp_path, config, comm=comm, clock=clock) as ckpt:
            clock.advance(100.0 if rank == 1 else 0.0)
            before = ckpt.need_checkpoint()
            clock.advance(61.0 if rank == 0 else 0.0)
            return before, ckpt.need_checkpoint()

    assert run_world(2, rank_main) == [(False, True)] * 2


def test_a_save_amid_an_update_is_refused_on_all_ranks(tmp_path: Path) -> None:
    def rank_main(comm: Communicator, rank: int) -> int:
        weights = np.zeros(4)
        with parckpt.ModelCheckpoint("net", tmp_path, comm=comm) as ckpt:
            with ckpt.updating(1):
                weights += 1
                with pytest.raises(parckpt.ConfigError, match=r"inside updating\(1\)"):
                    ckpt.step_end({"w": weights}, 1)
            ckpt.step_end({"w": weights}, 1)
            return len(parckpt.list_checkpoints(tmp_path))

    assert run_world(2, rank_main) == [1, 1]


def test_the_mark_of_a_damaged_checkpoint_can_be_read_by_whoever_reads_the_checkpoint(tmp_path: Path) -> None:
    config = parckpt.CheckpointConfig(file_mode=0o640, dir_mode=0o750, integrated_save=False)
    with parckpt.ModelCheckpoint("net", tmp_path, config, comm=parckpt.SELF) as ckpt:
        for step in (1, 2):
            ckpt.step_end({"w": np.full(4, float(step))}, step)
    with open(tmp_path / "net-1_2" / "rank_0" / "net-1_2.ckpt", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    weights = np.zeros(4)
    with parckpt.ModelCheckpoint("net", tmp_path, config, comm=parckpt.SELF) as ckpt:
        progress = ckpt.restore({"w": weights})
    assert (progress.step, weights[0]) == (1, 1.0)
    (mark,) = tmp_path.glob(".net-1_2.bad-*")
    assert mark.stat().st_mode & 0o777 == 0o640
