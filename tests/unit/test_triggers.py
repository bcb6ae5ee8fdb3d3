"""Triggers beside MindSpore's two numbers, ephemeral saves, jumps; and all of it as plain values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core import triggers
from parckpt.core.config import CheckpointConfig
from parckpt.core.policy import Decision, History, SavePolicy
from parckpt.core.retention import RetentionPolicy
from parckpt.core.triggers import AtSteps, EveryEpochs, EverySeconds, EverySteps
from parckpt.errors import ConfigError, ConfigTypeError, FormatError

pytestmark = pytest.mark.fast


def saved_steps(policy: SavePolicy, steps: Any, **options: Any) -> list[int]:
    history, saved = History(), []
    for step in steps:
        decision = policy.decide(step, 0.0, history, **options)
        if decision.is_ephemeral:
            history = History(history.last_step, history.last_s, step)
        elif decision.save:
            history = History(step, 0.0)
        if decision.save:
            saved.append(step)
    return saved


@pytest.mark.parametrize(
    ("trigger", "steps", "saved"),
    [
        (EverySteps(4), range(1, 14), [4, 8, 12]),
        (EverySteps(4, offset=1), range(1, 14), [1, 5, 9, 13]),
        (EverySteps(4, offset=6), range(1, 16), [6, 10, 14]),
        (EverySteps(4), [3, 6, 9, 12, 15, 18], [6, 9, 12, 18]),  # 4, 8 and 12, 16 are jumped over or met
        (EverySteps(10), [7, 35, 36, 41], [35, 41]),  # one save for what was jumped over
        (EveryEpochs(2), range(1, 20), [6, 12, 18]),
        (AtSteps([9, 2, 2, 5]), range(1, 14), [2, 5, 9]),
        (AtSteps(range(3, 6)), [4, 8, 12], [4, 8]),
    ],
    ids=str,
)
def test_steps_of_a_trigger(trigger: Any, steps: Any, saved: list[int]) -> None:
    policy = SavePolicy(None, None, (trigger,))
    assert saved_steps(policy, steps, steps_per_epoch=3) == saved


@given(st.integers(1, 50), st.integers(0, 50), st.lists(st.integers(1, 9), max_size=40))
def test_each_step_that_is_named_is_saved_at_it_or_at_the_next_that_comes(
    n: int, offset: int, jumps: list[int]
) -> None:
    steps = [sum(jumps[: k + 1]) for k in range(len(jumps))]
    named = [step for step in range(1, (steps[-1] if steps else 0) + 1) if step >= offset and (step - offset) % n == 0]
    expected = sorted({next(step for step in steps if step >= name) for name in named})
    assert saved_steps(SavePolicy(None, None, (EverySteps(n, offset),)), steps) == expected


def test_several_at_once_and_each_has_its_reason() -> None:
    policy = SavePolicy(10, None, (EverySteps(7), AtSteps([3]), EverySeconds(60), EveryEpochs(1)))
    past = History(last_step=4, last_s=100.0)

    def reason(step: int, now: float, **more: Any) -> Decision:
        return policy.decide(step, now, past, steps_per_epoch=9, **more)

    assert reason(7, 100.0) == Decision(True, "every steps")
    assert reason(9, 100.0).reason == "every steps"  # 7 was not saved
    assert reason(6, 160.0) == Decision(False, "not due")
    assert reason(6, 160.1) == Decision(True, "every seconds")
    assert reason(6, 160.1).is_timed
    assert reason(14, 100.0) == Decision(True, "steps")
    assert reason(6, 100.0, ending=True) == Decision(True, "end")
    assert policy.decide(3, 0.0, History(), steps_per_epoch=9) == Decision(True, "at steps")
    epochs = SavePolicy(None, None, (EveryEpochs(1),))
    decision = epochs.decide(9, 0.0, History(5), steps_per_epoch=9)
    assert decision == Decision(True, "every epochs")
    assert decision.detail == "EveryEpochs(1): step 9, the last save was at step 5"
    assert epochs.decide(8, 0.0, History(5), steps_per_epoch=9).detail == "the next is due at step 9 (EveryEpochs(1))"


def test_epochs_need_their_length() -> None:
    with pytest.raises(ConfigError, match="steps_per_epoch"):
        SavePolicy(1, None, (EveryEpochs(1),)).decide(1, 0.0, History())


def test_a_trigger_alone_saves_at_the_end() -> None:
    policy = SavePolicy(None, 0, (AtSteps([50]),))
    assert policy.decide(7, 0.0, History(), ending=True) == Decision(True, "end")
    assert SavePolicy(None, 0, (AtSteps([5]),)).decide(7, 0.0, History(6)).detail


def test_ephemeral_saves_leave_the_schedule_as_it_is() -> None:
    assert saved_steps(SavePolicy(10, None, (), 3), range(1, 25)) == [3, 6, 9, 10, 13, 16, 19, 20, 23]
    policy = SavePolicy(10, None, (), 3)
    past = History(10, 0.0, 16)
    assert policy.decide(19, 0.0, past) == Decision(True, "ephemeral")
    assert not policy.decide(19, 0.0, past, ending=True).is_ephemeral
    # What is saved for a while only is saved for good at the end.
    assert policy.decide(16, 0.0, past, ending=True) == Decision(True, "end")
    assert policy.decide(16, 0.0, past) == Decision(False, "not due")


@pytest.mark.parametrize(
    ("jump", "rule"),
    [(1, None), (2, None), (3, "save_checkpoint_steps=4"), (4, "EverySteps(6)"), (8, "save_checkpoint_steps=4")],
)
def test_what_a_jump_does_not_divide(jump: int, rule: str | None) -> None:
    policy = SavePolicy(4, None, (EverySteps(6), AtSteps([5])))
    assert policy.uneven(jump) == rule
    assert SavePolicy(1).uneven(jump) is None
    assert SavePolicy(None, 60).uneven(jump) is None
    assert SavePolicy(None, None, (EveryEpochs(1),)).uneven(jump, 4) == (None if 4 % jump == 0 else "EveryEpochs(1)")
    assert SavePolicy(None, None, (), 4).uneven(jump) == (None if 4 % jump == 0 else "ephemeral_steps=4")


@pytest.mark.parametrize(
    "make",
    [
        lambda: EverySteps(0),
        lambda: EverySteps(True),
        lambda: EverySteps(2, -1),
        lambda: EveryEpochs(0),
        lambda: EverySeconds(0),
        lambda: EverySeconds(float("nan")),
        lambda: EverySeconds("1"),  # type: ignore[arg-type]
        lambda: AtSteps([]),
        lambda: AtSteps([0]),
        lambda: AtSteps("12"),  # type: ignore[arg-type]
        lambda: AtSteps(3),  # type: ignore[arg-type]
        lambda: CheckpointConfig(triggers=EverySteps(3)),  # type: ignore[arg-type]
        lambda: CheckpointConfig(triggers=[3]),  # type: ignore[list-item]
        lambda: CheckpointConfig(triggers="x"),  # type: ignore[arg-type]
        lambda: CheckpointConfig(ephemeral_steps=0),
        lambda: CheckpointConfig(keep_every_n_steps=-1),
        lambda: CheckpointConfig(keep_best=1),
        lambda: CheckpointConfig(keep_best=-1, best_metric="loss"),
        lambda: CheckpointConfig(best_metric=3),  # type: ignore[arg-type]
        lambda: CheckpointConfig(best_mode="most"),
        lambda: CheckpointConfig(time_to_live_s=0),
    ],
)
def test_impossible_ones(make: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.parameter


def test_what_has_no_effect_is_said() -> None:
    def said(**options: Any) -> str:
        return " ".join(CheckpointConfig(**options).warnings)

    assert "ephemeral_steps=5 has no effect" in said(save_checkpoint_steps=5, ephemeral_steps=5)
    assert said(save_checkpoint_steps=5, ephemeral_steps=4) == ""
    assert "best_metric='loss' has no effect" in said(best_metric="loss")
    assert "best_mode" in said(best_mode="max")
    assert "nothing is saved" in said(save_checkpoint_steps=0)
    assert said(save_checkpoint_steps=0, triggers=[EverySteps(3)]) == ""
    assert said(save_checkpoint_steps=0, ephemeral_steps=3) == ""


CONFIG = CheckpointConfig(
    save_checkpoint_steps=0,
    save_checkpoint_seconds=90,
    keep_checkpoint_max=3,
    triggers=[EverySteps(10, offset=5), EverySeconds(1.5), EveryEpochs(2), AtSteps((4, 2))],
    ephemeral_steps=7,
    keep_every_n_steps=20,
    keep_best=2,
    best_metric="loss",
    best_mode="max",
    time_to_live_s=3600,
)


def test_policies_survive_json() -> None:
    for policy in (CONFIG.save_policy, SavePolicy()):
        assert SavePolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
    for keep in (CONFIG.retention_policy, RetentionPolicy()):
        assert RetentionPolicy.from_json(json.loads(json.dumps(keep.to_json()))) == keep
    assert SavePolicy.from_json({"steps": 3, "of a newer version": 1}) == SavePolicy(3)
    assert RetentionPolicy.from_json({"of a newer version": 1}) == RetentionPolicy()
    assert CONFIG.describe()["triggers"] == [repr(trigger) for trigger in CONFIG.triggers]
    assert "AtSteps(steps=(2, 4))" in repr(CONFIG)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {"steps": "3"},
        {"seconds": -1},
        {"triggers": 3},
        {"triggers": [{"kind": "of a newer version"}]},
        {"triggers": [{"kind": "every_steps"}]},
        {"triggers": [{"kind": "every_steps", "steps": 0}]},
        {"triggers": [{"kind": "every_seconds", "seconds": 10**400}]},
        {"triggers": [{"kind": ["every_steps"], "steps": 1}]},
    ],
    ids=str,
)
def test_a_stored_save_policy_is_checked(data: Any) -> None:
    with pytest.raises(FormatError):
        SavePolicy.from_json(data)


@pytest.mark.parametrize(
    "data",
    [
        None,
        {"count": 1.5},
        {"minutes": 10**400},
        {"breakpoints": None},
        {"best": "1"},
        {"best_metric": 1},
        {"best_mode": "most"},
        {"time_to_live_s": -1},
        {"time_to_live_s": 10**400},
    ],
    ids=str,
)
def test_a_stored_retention_policy_is_checked(data: Any) -> None:
    with pytest.raises(FormatError):
        RetentionPolicy.from_json(data)


def test_triggers_are_checked_as_a_sequence() -> None:
    assert triggers.checked([EverySteps(3)]) == (EverySteps(3),)
    with pytest.raises(ConfigTypeError, match=r"triggers must be a sequence: \[EverySteps\(3\)\]"):
        triggers.checked(EverySteps(3))
