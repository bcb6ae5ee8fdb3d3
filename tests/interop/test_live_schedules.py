"""Random schedules: what MindSpore's own ModelCheckpoint saves and keeps on a clock of ours, and what this one does."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore.train.callback._checkpoint as theirs
import numpy as np
import pytest
from mindspore import nn, train

import parckpt
from parckpt.testing.clock import ManualClock
from parckpt.testing.filesystem import MemoryFileSystem

SCHEDULES = 150
START = 1.7e9


@dataclass(frozen=True)
class Schedule:
    """One run: its config, and when each step ends. Times are multiples of 1/4 s, so that sums are exact."""

    config: dict[str, Any]
    steps_per_epoch: int
    ends: list[tuple[int, float]]


def drawn(rng: random.Random) -> Schedule:
    config: dict[str, Any] = {}
    if rng.random() < 0.8:
        config["save_checkpoint_steps"] = rng.choice([None, 0, 1, 2, 3, 5, 7, 30])
    if rng.random() < 0.6:
        config["save_checkpoint_seconds"] = rng.choice([None, 0, 1, 5, 10, 60])
    if rng.random() < 0.8:
        config["keep_checkpoint_max"] = rng.choice([None, 0, 1, 2, 3, 5])
    if rng.random() < 0.7:
        config["keep_checkpoint_per_n_minutes"] = rng.choice([None, 0, 1, 2, 5])
    if not any({"save_checkpoint_steps": 1, "keep_checkpoint_max": 5, **config}.values()):
        config["keep_checkpoint_max"] = 1
    pace = rng.choice([1, 2, 4, 40, 80, 200, 240])  # quarters of a second
    jump = rng.choice([1, 1, 1, 2, 4])
    step, now = 0, 0
    ends = []
    for _ in range(rng.randint(1, 25)):
        step += jump if rng.random() < 0.9 else rng.randint(1, 6)
        now += pace if rng.random() < 0.7 else rng.choice([1, 4, 20, 240, 241, 480, 1000])
        ends.append((step, now / 4))
    return Schedule(config, rng.randint(1, 6), ends)


class Time:
    """Stands for the module ``time`` in theirs."""

    def __init__(self) -> None:
        self.now = START

    def time(self) -> float:
        return self.now


def run_theirs(schedule: Schedule, directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    clock = Time()

    def save(network: Any, path: str, *rest: Any, **options: Any) -> None:
        Path(path).touch()
        os.utime(path, (clock.now, clock.now))

    monkeypatch.setattr(theirs, "time", clock)
    monkeypatch.setattr(theirs, "save_checkpoint", save)
    network = nn.Dense(1, 1)
    callback = train.ModelCheckpoint("P", str(directory), train.CheckpointConfig(**schedule.config))
    told = SimpleNamespace(batch_num=schedule.steps_per_epoch, train_network=network)
    context = SimpleNamespace(original_args=lambda: told)
    seen = []
    for step, now in schedule.ends:
        clock.now = START + now
        told.cur_step_num, told.cur_epoch_num = step, (step - 1) // schedule.steps_per_epoch + 1
        callback.step_end(context)
        seen.append((os.path.basename(callback.latest_ckpt_file_name), sorted(os.listdir(directory))))
    callback.end(context)
    seen.append((os.path.basename(callback.latest_ckpt_file_name), sorted(os.listdir(directory))))
    return seen


def run_ours(schedule: Schedule) -> list[tuple[str, list[str]]]:
    fs, clock = MemoryFileSystem(), ManualClock(START)
    ckpt = parckpt.ModelCheckpoint(
        "P",
        "/ckpts",
        parckpt.CheckpointConfig(**schedule.config),
        comm=parckpt.SELF,
        steps_per_epoch=schedule.steps_per_epoch,
        clock=clock,
        filesystem=fs,
    )
    seen = []

    def look() -> None:
        ckpt._run.keeper.flush()
        files = sorted(name for name in fs.listdir("/ckpts") if name.endswith(".ckpt"))
        seen.append((os.path.basename(ckpt.latest_ckpt_file_name), files))

    passed = 0.0
    for step, now in schedule.ends:
        clock.advance(now - passed)
        passed = now
        ckpt.step_end({"w": np.full(1, float(step))}, step)
        look()
    ckpt.end()
    look()
    ckpt.close()
    return seen


@pytest.mark.filterwarnings("ignore::parckpt.ConfigWarning", "ignore:steps come:parckpt.StateWarning")
def test_the_same_saves_and_the_same_files_at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(int(os.environ.get("PARCKPT_TEST_SEED", "20")))
    for number in range(int(os.environ.get("PARCKPT_TEST_SCHEDULES", SCHEDULES))):
        schedule = drawn(rng)
        directory = tmp_path / str(number)
        expected = run_theirs(schedule, directory, monkeypatch)
        assert run_ours(schedule) == expected, schedule
