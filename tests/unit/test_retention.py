"""What is deleted after a publish; the recorded timelines are in test_policy.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core.retention import Candidate, RetentionPolicy

pytestmark = pytest.mark.fast


def regular(sequence, **facts):
    return Candidate(f"r{sequence}", sequence, 20.0 * sequence, **facts)


def breakpoint_at(sequence, **facts):
    return Candidate(f"b{sequence}", sequence, 20.0 * sequence, is_breakpoint=True, **facts)


def names(candidates):
    return [one.name for one in candidates]


def test_count_keeps_the_newest_by_sequence_not_by_order_or_time():
    published = [replace(regular(sequence), created_s=-float(sequence)) for sequence in (3, 9, 1, 7)]
    assert names(RetentionPolicy(count=2).surplus(published)) == ["r1", "r3"]
    assert RetentionPolicy(count=4).surplus(published) == []


def test_breakpoints_are_counted_apart():
    published = [breakpoint_at(1), regular(2), breakpoint_at(3), regular(4), breakpoint_at(5)]
    assert names(RetentionPolicy(count=2, breakpoints=2).surplus(published)) == ["b1"]
    assert names(RetentionPolicy(count=1, breakpoints=0).surplus(published)) == ["b1", "r2", "b3", "b5"]


def test_what_is_set_aside_or_pinned_is_neither_counted_nor_deleted():
    published = [
        regular(1, is_pinned=True),
        regular(2, is_set_aside=True),
        regular(3),
        regular(4),
        breakpoint_at(5, is_pinned=True),
        breakpoint_at(6),
    ]
    assert names(RetentionPolicy(count=1, breakpoints=1).surplus(published)) == ["r3"]


def test_the_last_one_a_restore_would_take_stays():
    assert RetentionPolicy(count=1, breakpoints=0).surplus([breakpoint_at(1)]) == []
    inconsistent = breakpoint_at(9, is_consistent=False)
    assert names(RetentionPolicy(breakpoints=0).surplus([breakpoint_at(1), breakpoint_at(2), inconsistent])) == [
        "b1",
        "b9",
    ]
    broken = [regular(3, is_set_aside=True), regular(4, is_set_aside=True)]
    assert RetentionPolicy(count=1, breakpoints=0).surplus([breakpoint_at(2), *broken]) == []


def test_minutes_thin_out_and_leave_slow_savers_alone():
    policy = RetentionPolicy(count=None, minutes=1)
    assert names(policy.surplus([regular(1), regular(2), regular(3)])) == ["r2"]
    assert policy.surplus([regular(1), regular(2), regular(6)]) == []
    assert policy.surplus([regular(1)]) == []
    # A minute old to the second is outside the window.
    assert names(policy.surplus([regular(1), regular(2), regular(3), regular(4)])) == ["r3"]


def test_every_verdict_has_a_reason_and_they_come_oldest_first():
    published = [regular(3), regular(1), regular(2, is_pinned=True), breakpoint_at(4), regular(5, is_set_aside=True)]
    verdicts = RetentionPolicy(count=1).judge(published)
    assert [(v.candidate.name, v.keep) for v in verdicts] == [
        ("r1", False),
        ("r2", True),
        ("r3", True),
        ("b4", True),
        ("r5", True),
    ]
    assert [v.reason for v in verdicts] == [
        "one newer is there (keep_checkpoint_max=1)",
        "pinned: neither counted nor deleted",
        "number 1 of the newest 1 (keep_checkpoint_max=1)",
        "among the newest breakpoints (keep_breakpoints=2)",
        "set aside: neither counted nor deleted",
    ]
    assert RetentionPolicy().judge([]) == []


def at_steps(*steps, **facts):
    return [replace(regular(number), name=f"s{step}", step=step, **facts) for number, step in enumerate(steps, 1)]


def test_the_first_at_or_after_each_multiple_stays():
    policy = RetentionPolicy(count=1, every_steps=100)
    assert names(policy.surplus(at_steps(30, 60, 90, 120, 150, 199, 200, 230, 420, 430))) == [
        "s30",
        "s60",
        "s90",
        "s150",
        "s199",
        "s230",
    ]
    damaged, *others = at_steps(100, 110, 120, 130)
    assert names(policy.surplus([replace(damaged, is_set_aside=True), *others])) == ["s120"]


def rated(*losses):
    return [
        replace(regular(number), metrics={} if loss is None else {"loss": loss}, name=f"{number}:{loss}")
        for number, loss in enumerate(losses, 1)
    ]


def test_the_best_stay_beside_the_newest():
    published = rated(0.5, 0.2, None, 0.2, float("nan"), 0.9, 0.8)
    least = RetentionPolicy(count=1, best=2, best_metric="loss")
    assert names(least.surplus(published)) == ["1:0.5", "3:None", "5:nan", "6:0.9"]
    one = RetentionPolicy(count=1, best=1, best_metric="loss")
    assert names(one.surplus(published)) == ["1:0.5", "2:0.2", "3:None", "5:nan", "6:0.9"]  # the newer of equal ones
    most = RetentionPolicy(count=1, best=1, best_metric="loss", best_mode="max")
    assert names(most.surplus(published)) == ["1:0.5", "2:0.2", "3:None", "4:0.2", "5:nan"]
    other = RetentionPolicy(count=1, best=3, best_metric="accuracy")
    assert len(other.surplus(published)) == 6
    infinite = rated(float("inf"), float("-inf"), 0.0)
    assert names(one.surplus(infinite)) == ["1:inf"]


def test_what_is_too_old_goes_but_never_the_newest_usable():
    policy = RetentionPolicy(count=5, time_to_live_s=40.0)
    published = [regular(1), breakpoint_at(2), regular(3), regular(4), regular(5)]
    assert names(policy.surplus(published)) == ["r1", "b2"]  # 40 s are not more than 40 s
    assert names(policy.surplus(published, now_s=1e9)) == ["r1", "b2", "r3", "r4"]
    best = RetentionPolicy(count=5, time_to_live_s=40.0, best=1, best_metric="loss", every_steps=100)
    kept = [replace(regular(1), metrics={"loss": 0.0}), replace(regular(2), step=100), regular(3), regular(4)]
    assert names(best.surplus(kept, now_s=1e9)) == ["r3"]
    pinned = [regular(1, is_pinned=True), regular(2)]
    assert policy.surplus(pinned, now_s=1e9) == []


def test_an_ephemeral_one_lives_until_something_newer_can_be_restored():
    policy = RetentionPolicy(count=2)
    fleeting = regular(3, is_ephemeral=True)
    assert policy.surplus([regular(1), regular(2), fleeting]) == []
    assert names(policy.surplus([regular(1), regular(2), fleeting, regular(4)])) == ["r1", "r3"]
    assert names(policy.surplus([regular(1), regular(2), fleeting, regular(4, is_ephemeral=True)])) == ["r3"]
    assert policy.surplus([regular(1), fleeting, breakpoint_at(4, is_consistent=False)]) == []
    assert policy.surplus([regular(1), fleeting, regular(4, is_set_aside=True)]) == []
    assert names(policy.surplus([regular(1), fleeting, breakpoint_at(4)])) == ["r3"]
    assert policy.surplus([replace(fleeting, is_pinned=True), regular(4)]) == []


candidates = st.lists(
    st.builds(
        Candidate,
        st.just("x"),
        st.integers(0, 10**6),
        st.floats(0, 1e6),
        is_breakpoint=st.booleans(),
        is_consistent=st.booleans(),
        is_set_aside=st.booleans(),
        is_pinned=st.booleans(),
        is_ephemeral=st.booleans(),
        step=st.integers(0, 100),
        metrics=st.dictionaries(st.just("loss"), st.floats()),
    ),
    max_size=12,
    unique_by=lambda one: one.sequence,
)


policies = st.builds(
    RetentionPolicy,
    st.none() | st.integers(0, 4),
    st.none() | st.integers(0, 100),
    st.integers(0, 3),
    every_steps=st.none() | st.integers(1, 30),
    best=st.integers(0, 3),
    best_metric=st.none() | st.just("loss"),
    best_mode=st.sampled_from(["min", "max"]),
    time_to_live_s=st.none() | st.floats(1.0, 1e6),
)


@given(candidates, policies)
def test_invariants(published, policy):
    surplus = policy.surplus(published, 1e6)
    assert [one.sequence for one in surplus] == sorted({one.sequence for one in surplus})
    assert all(one in published and not one.is_pinned and not one.is_set_aside for one in surplus)
    gone = {one.sequence for one in surplus}
    remaining = [one for one in published if one.sequence not in gone]
    usable = [one for one in published if one.is_consistent and not one.is_set_aside]
    assert not usable or any(one.sequence not in gone for one in usable)
    newest = max(usable, key=lambda one: one.sequence, default=None)
    if newest is not None and (newest.is_ephemeral or not newest.is_breakpoint) and policy.count:
        free = [one for one in published if not (one.is_breakpoint or one.is_pinned or one.is_set_aside)]
        later = [one for one in free if one.sequence > newest.sequence]  # inconsistent: only counted
        assert newest.sequence not in gone or later or newest.is_breakpoint
    # What stays would stay again, except that the minutes thin out further.
    assert policy.surplus(remaining, 1e6) == [] or policy.minutes
    verdicts = policy.judge(published, 1e6)
    assert all(verdict.reason for verdict in verdicts)
    assert [verdict.candidate.sequence for verdict in verdicts] == sorted(one.sequence for one in published)
