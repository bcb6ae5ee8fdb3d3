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
    ),
    max_size=12,
    unique_by=lambda one: one.sequence,
)


@given(candidates, st.none() | st.integers(0, 4), st.none() | st.integers(0, 100), st.integers(0, 3))
def test_invariants(published, count, minutes, breakpoints):
    policy = RetentionPolicy(count, minutes, breakpoints)
    surplus = policy.surplus(published)
    assert [one.sequence for one in surplus] == sorted({one.sequence for one in surplus})
    assert all(one in published and not one.is_pinned and not one.is_set_aside for one in surplus)
    remaining = [one for one in published if one not in surplus]
    usable = [one for one in published if one.is_consistent and not one.is_set_aside]
    assert not usable or any(one in remaining for one in usable)
    newest = max((one for one in usable if not one.is_breakpoint), key=lambda one: one.sequence, default=None)
    free = [one for one in published if not (one.is_breakpoint or one.is_pinned or one.is_set_aside)]
    if newest is not None and newest == max(free, key=lambda one: one.sequence, default=None):
        assert newest in remaining
    assert policy.surplus(remaining) == [] or minutes
