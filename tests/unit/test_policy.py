"""When to save, against timelines recorded from MindSpore's callback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parckpt.core.config import CheckpointConfig
from parckpt.core.naming import Stem, epoch_and_step
from parckpt.core.policy import Decision, History, SavePolicy
from parckpt.core.retention import Candidate

pytestmark = pytest.mark.fast

TIMELINES = json.loads((Path(__file__).parents[1] / "data" / "vectors" / "policy_vectors.json").read_text())


@pytest.mark.parametrize("timeline", TIMELINES, ids=lambda timeline: timeline["name"])
def test_saves_and_files_at_rest_as_recorded(timeline):
    config = CheckpointConfig(**timeline["config"])
    history, files = History(), []
    for event in timeline["events"]:
        ending = event["at"] == "end"
        step = step if ending else event["at"]  # noqa: F821  # the first event is never the end
        decision = config.save_policy.decide(step, event["clock"], history, ending=ending)
        saved = None
        if decision.save:
            history = History(step, event["clock"])
            saved = f"{Stem('P', *epoch_and_step(step, timeline['steps_per_epoch']))}.ckpt"
            # Published first, deleted afterwards.
            files.append(Candidate(saved, sequence=step, created_s=event["clock"]))
            surplus = config.retention_policy.surplus(files)
            files = [file for file in files if file not in surplus]
        assert saved == event["saved"], (event["at"], decision)
        assert sorted(file.name for file in files) == event["files"], event["at"]


def test_steps_that_jump_shift_the_schedule():
    policy, history, saved = SavePolicy(steps=3), History(), []
    for step in (2, 5, 7, 8, 20, 21, 22, 23):
        if policy.decide(step, 0.0, history).save:
            saved.append(step)
            history = History(step, 0.0)
    assert saved == [5, 8, 20, 23]


def test_after_a_restore_the_schedule_counts_from_the_restored_step():
    policy, history = SavePolicy(steps=10), History(last_step=95)
    assert policy.decide(100, 0.0, history) == Decision(False, "not due")
    assert policy.decide(105, 0.0, history) == Decision(True, "steps")
    assert policy.decide(95, 0.0, history, ending=True) == Decision(False, "already saved")


def test_every_reason():
    steps, seconds, none = SavePolicy(steps=3), SavePolicy(steps=0, seconds=10), SavePolicy(steps=None, seconds=0)
    past = History(last_step=6, last_s=100.0)
    assert steps.decide(9, 100.0, past) == Decision(True, "steps")
    assert steps.decide(7, 999.0, past) == Decision(False, "not due")
    assert steps.decide(7, 100.0, past, ending=True) == Decision(True, "end")
    assert seconds.decide(7, 110.0, past) == Decision(False, "not due")
    assert seconds.decide(7, 110.001, past) == Decision(True, "seconds")
    assert seconds.decide(6, 999.0, past, ending=True) == Decision(False, "already saved")
    assert none.decide(7, 999.0, past, ending=True) == Decision(False, "no trigger")


def test_a_clock_that_jumps_back_delays_and_does_not_fail():
    assert not SavePolicy(steps=0, seconds=10).decide(7, -1e9, History(6, 100.0)).save
