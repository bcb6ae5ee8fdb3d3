"""A real `ModelCheckpoint` on a manual clock, step by step, against timelines recorded from MindSpore's callback."""

from __future__ import annotations

import json
import posixpath
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.engine.catalog import scan
from parckpt.errors import StorageError
from parckpt.storage.atomic import write_file
from parckpt.storage.filesystem import FileSystem
from parckpt.testing.clock import ManualClock
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem

pytestmark = pytest.mark.fast

VECTORS = Path(__file__).parents[1] / "data" / "vectors"
TIMELINES = json.loads((VECTORS / "policy_vectors.json").read_text())
PREFIXES = json.loads((VECTORS / "prefix_vectors.json").read_text())
PLACE = "/ckpts"


def made(fs: FileSystem, clock: ManualClock, prefix: str = "P", **options: Any) -> parckpt.ModelCheckpoint:
    per_epoch = options.pop("steps_per_epoch", None)
    config = parckpt.CheckpointConfig(**options)
    return parckpt.ModelCheckpoint(
        prefix, PLACE, config, comm=parckpt.SELF, steps_per_epoch=per_epoch, clock=clock, filesystem=fs
    )


def state(step: int) -> dict[str, Any]:
    return {"w": np.full(3, float(step))}


def data_files(fs: FileSystem) -> list[str]:
    return sorted(name for name in fs.listdir(PLACE) if name.endswith(".ckpt"))


@pytest.mark.parametrize("timeline", TIMELINES, ids=lambda timeline: timeline["name"])
@pytest.mark.filterwarnings("ignore::parckpt.ConfigWarning")
def test_the_recorded_timeline(timeline: dict[str, Any]) -> None:
    fs, clock = MemoryFileSystem(), ManualClock()
    ckpt = made(fs, clock, steps_per_epoch=timeline["steps_per_epoch"], **timeline["config"])
    passed, before = 0.0, ""
    for event in timeline["events"]:
        clock.advance(event["clock"] - passed)
        passed = event["clock"]
        if event["at"] == "end":
            ckpt.end()
        else:
            ckpt.step_end(state(event["at"]), event["at"])
        ckpt._run.keeper.flush()
        latest = ckpt.latest_ckpt_file_name
        saved = posixpath.basename(latest) if latest != before else None
        before = latest
        assert saved == event["saved"], event["at"]
        assert data_files(fs) == event["files"], event["at"]
        decision = ckpt.last_decision
        assert decision is not None
        assert decision.save == (saved is not None) or event["at"] == "end"
        assert decision.detail
    ckpt.close()


@pytest.mark.parametrize("case", [case for case in PREFIXES["dedupe"] if not case["breakpoint"]], ids=str)
def test_the_recorded_prefix(case: dict[str, Any]) -> None:
    fs = MemoryFileSystem()
    fs.mkdir(PLACE, 0o700)
    for name in case["existing"]:
        write_file(fs, f"{PLACE}/{name}", b"")
    with made(fs, ManualClock(), case["prefix"]) as ckpt:
        ckpt.step_end(state(1))
    assert posixpath.basename(ckpt.latest_ckpt_file_name) == f"{case['result']}-1_1.ckpt"
    assert set(fs.listdir(PLACE)) >= set(case["existing"])


@pytest.mark.parametrize("case", PREFIXES["managed"], ids=lambda case: case["format"])
def test_files_of_others_that_mindspore_would_delete_stay(case: dict[str, Any]) -> None:
    fs = MemoryFileSystem()
    with made(fs, ManualClock(), case["prefix"], keep_checkpoint_max=1, format=case["format"]) as ckpt:
        ckpt.step_end(state(5), 5)
        for name in case["existing"]:
            write_file(fs, f"{PLACE}/{name}", b"")
        for step in (6, 7):
            ckpt.step_end(state(step), step)
    assert {*case["existing"]} - {*fs.listdir(PLACE)} == set()
    assert [found.facts.step for found in scan(fs, PLACE) if found.facts] == [7]


def test_counters_of_appended_info_start_where_they_were_told() -> None:
    fs = MemoryFileSystem()
    info = [{"epoch_num": 10, "step_num": 400, "lr": 0.5}]
    with made(fs, ManualClock(), append_info=info, steps_per_epoch=4, save_checkpoint_steps=4) as ckpt:
        for step in range(1, 9):
            ckpt.step_end(state(step))
    assert [parckpt.open_checkpoint(f"{PLACE}/P-{epoch}_4.ckpt", filesystem=fs).append_dict for epoch in (1, 2)] == [
        {"epoch_num": 11, "step_num": 404, "lr": 0.5},
        {"epoch_num": 12, "step_num": 408, "lr": 0.5},
    ]


# What MindSpore loses.


def test_a_write_that_fails_leaves_the_one_before_and_is_tried_again_at_the_next_step() -> None:
    base = MemoryFileSystem()
    system = FaultyFileSystem(base)
    options = {"keep_checkpoint_max": 1, "save_checkpoint_steps": 2, "on_save_error": "warn"}
    with made(system, ManualClock(), **options) as ckpt:  # type: ignore[arg-type]
        for step in (1, 2, 3):
            ckpt.step_end(state(step))
        system.arm(fail_after=12)
        ckpt.step_end(state(4))
        assert system.failed is not None
        system.arm()
        assert data_files(base) == ["P-1_2.ckpt"]
        assert ckpt.latest_ckpt_file_name.endswith("P-1_2.ckpt")
        ckpt.step_end(state(5))
        ckpt._run.keeper.flush()
        assert data_files(base) == ["P-1_5.ckpt"]
        assert ckpt.last_decision is not None
        assert "due at 4" in ckpt.last_decision.detail
        ckpt.step_end(state(6))
        assert ckpt.last_decision.save is False


def test_a_failed_save_can_be_tried_again_at_the_same_step() -> None:
    base = MemoryFileSystem()
    system = FaultyFileSystem(base)
    with made(system, ManualClock(), keep_checkpoint_max=1) as ckpt:  # type: ignore[arg-type]
        ckpt.step_end(state(1))
        system.arm(fail_after=12)
        with pytest.raises(StorageError):
            ckpt.step_end(state(2), 2)
        system.arm()
        assert data_files(base) == ["P-1_1.ckpt"]
        ckpt.step_end(state(2), 2)
    assert data_files(base) == ["P-1_2.ckpt"]


def test_no_save_at_any_time_leaves_fewer_than_one_checkpoint() -> None:
    class Watched(MemoryFileSystem):
        least: int | None = None

        def rename(self, source: str, target: str) -> None:
            super().rename(source, target)
            names = [name for name in self.listdir(PLACE) if name.endswith(".ckpt")]
            if names or self.least is not None:
                self.least = min(len(names), self.least if self.least is not None else len(names))

    fs = Watched()
    with made(fs, ManualClock(), keep_checkpoint_max=1) as ckpt:
        for step in range(1, 5):
            ckpt.step_end(state(step))
    assert fs.least == 1
