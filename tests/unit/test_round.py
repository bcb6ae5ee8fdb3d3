"""The one agreement: packing and merging, and what follows from what the ranks said."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core.round import Action, Agreement, Call, Voice, merge, pack

pytestmark = pytest.mark.fast

voices = st.builds(
    Voice,
    call=st.sampled_from(Call),
    step=st.integers(0, 2**62),
    due=st.booleans(),
    due_at_end=st.booleans(),
    severity=st.integers(0, 9),
    milliseconds_left=st.none() | st.integers(0, 2**62),
    busy=st.booleans(),
    written_up_to=st.integers(0, 2**62),
    failed=st.booleans(),
    left_by_error=st.booleans(),
    plan_changed=st.booleans(),
    unprepared=st.booleans(),
)


def agree(*said: Voice) -> Agreement:
    return merge(np.max([pack(voice) for voice in said], axis=0))


@given(st.lists(voices, min_size=1, max_size=6))
def test_merged_is_what_was_said(said: list[Voice]) -> None:
    agreed = agree(*said)
    assert agreed.calls == {voice.call for voice in said}
    assert (agreed.first_step, agreed.last_step) == (min(v.step for v in said), max(v.step for v in said))
    assert agreed.severity == max(voice.severity for voice in said)
    left = [voice.milliseconds_left for voice in said if voice.milliseconds_left is not None]
    assert agreed.milliseconds_left == (min(left) if left else None)
    assert agreed.written_up_to == min(voice.written_up_to for voice in said)
    for flag in ("due", "due_at_end", "busy", "failed", "left_by_error", "plan_changed", "unprepared"):
        assert getattr(agreed, flag) is any(getattr(voice, flag) for voice in said), flag


@given(voices)
def test_the_vector_has_one_length(voice: Voice) -> None:
    vector = pack(voice)
    assert vector.dtype == np.int64
    assert vector.shape == pack(Voice(Call.STEP, 0)).shape


@given(st.lists(voices, min_size=1, max_size=5))
def test_neither_order_nor_grouping_matters(said: list[Voice]) -> None:
    vectors = [pack(voice) for voice in said]
    pairwise = list(itertools.accumulate(reversed(vectors), np.maximum))[-1]
    assert merge(pairwise) == agree(*said)


@given(st.lists(voices, min_size=1, max_size=5))
def test_what_follows(said: list[Voice]) -> None:
    """The rule once more, in the order of its precedence."""
    agreed = agree(*said)
    calls = {voice.call for voice in said}
    same_step = len({voice.step for voice in said}) == 1
    if any(voice.failed for voice in said):
        expected = Action.FAIL
    elif calls == {Call.LEAVE}:
        expected = Action.END
    elif any(voice.left_by_error for voice in said):
        expected = Action.PEER_LEFT
    elif Call.RESTORE in calls:
        expected = Action.RESTORE if calls == {Call.RESTORE} else Action.MISMATCH
    elif Call.SAVE in calls:
        expected = Action.SAVE if calls == {Call.SAVE} and same_step else Action.MISMATCH
    elif any(voice.due for voice in said):
        expected = Action.SAVE if calls == {Call.STEP} and same_step else Action.MISMATCH
    else:
        expected = Action.NOTHING
    assert agreed.action is expected


CASES = {
    "nothing is due": ([(Call.STEP, 3, {}), (Call.STEP, 3, {})], Action.NOTHING),
    "steps may differ while nothing is due": ([(Call.STEP, 3, {}), (Call.STEP, 5, {})], Action.NOTHING),
    "root finds a save due": ([(Call.STEP, 3, {"due": True}), (Call.STEP, 3, {})], Action.SAVE),
    "due, at different steps": ([(Call.STEP, 3, {"due": True}), (Call.STEP, 4, {})], Action.MISMATCH),
    "due, and one polls": ([(Call.STEP, 3, {"due": True}), (Call.POLL, 3, {})], Action.MISMATCH),
    "due, and one leaves": ([(Call.STEP, 3, {"due": True}), (Call.LEAVE, 3, {})], Action.MISMATCH),
    "one leaves with something unsaved": ([(Call.STEP, 3, {}), (Call.LEAVE, 2, {"due_at_end": True})], Action.NOTHING),
    "all leave": ([(Call.LEAVE, 3, {"due_at_end": True}), (Call.LEAVE, 3, {})], Action.END),
    "all leave, one by an exception": ([(Call.LEAVE, 3, {"left_by_error": True}), (Call.LEAVE, 3, {})], Action.END),
    "one leaves by an exception": ([(Call.LEAVE, 3, {"left_by_error": True}), (Call.POLL, 3, {})], Action.PEER_LEFT),
    "a failure comes first": (
        [(Call.LEAVE, 3, {"left_by_error": True}), (Call.STEP, 4, {"failed": True, "due": True})],
        Action.FAIL,
    ),
    "poll meets wait": ([(Call.POLL, 3, {}), (Call.WAIT, 4, {})], Action.NOTHING),
    "all restore, from anywhere": ([(Call.RESTORE, 3, {}), (Call.RESTORE, 9, {})], Action.RESTORE),
    "one restores": ([(Call.RESTORE, 3, {}), (Call.STEP, 3, {})], Action.MISMATCH),
    "all save now": ([(Call.SAVE, 3, {}), (Call.SAVE, 3, {})], Action.SAVE),
    "all save now, at different steps": ([(Call.SAVE, 3, {}), (Call.SAVE, 4, {})], Action.MISMATCH),
    "one saves now": ([(Call.SAVE, 3, {}), (Call.STEP, 3, {"due": True})], Action.MISMATCH),
}


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    said, action = CASES[case]
    for order in (said, said[::-1]):
        assert agree(*(Voice(call, step, **flags) for call, step, flags in order)).action is action
