"""One error for all ranks, made of what each reports (the exchange itself: tests/contract/test_communicators.py)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.comm.base import Communicator
from parckpt.comm.outcome import MAX_FACTS_NBYTES, agree
from parckpt.comm.wait import Waiter
from parckpt.errors import (
    ChecksumError,
    LayoutError,
    ParckptError,
    RankError,
    StateMismatchError,
    StorageError,
    TimeoutExpiredError,
    classes_by_code,
)
from parckpt.testing.world import run_world

pytestmark = pytest.mark.fast


def _agreed(*errors: Exception | None) -> list[ParckptError | None]:
    """What each rank raises when they bring these errors."""

    def fn(comm: Communicator, rank: int) -> ParckptError | None:
        try:
            agree(comm, errors[rank], Waiter(30))
        except ParckptError as raised:
            return raised
        return None

    return run_world(len(errors), fn)


def _same(raised: list[ParckptError | None]) -> ParckptError:
    first = raised[0]
    assert first is not None
    for other in raised:
        assert other is not None
        assert (type(other), str(other), other.failures) == (type(first), str(first), first.failures)
        assert repr(other.facts) == repr(first.facts)
    return first


def test_no_error() -> None:
    assert _agreed(None, None, None) == [None, None, None]


@pytest.mark.parametrize("code", sorted(set(classes_by_code()) - {"timeout"}))
def test_every_class_crosses(code: str) -> None:
    cls = classes_by_code()[code]
    error = _same(_agreed(None, cls("what happened", path="/a", count=3)))
    assert type(error) is cls
    assert str(error) == "what happened (rank 1)"
    assert (error.path, error.count) == ("/a", 3)
    assert error.failures == {1: "what happened"}


def test_special_facts_keep_their_place() -> None:
    error = _same(_agreed(StateMismatchError("x", missing=["a"], mismatched=["b: shape"]), None))
    assert (error.missing, error.unexpected, error.mismatched) == (["a"], [], ["b: shape"])
    error = _same(_agreed(None, StorageError("denied", errno=13, operation="open")))
    assert isinstance(error, OSError)
    assert (error.errno, error.operation) == (13, "open")


def test_the_lowest_rank_wins_and_all_are_told() -> None:
    error = _same(_agreed(None, ChecksumError("chunk 3"), LayoutError("overlap"), ValueError("bad")))
    assert type(error) is ChecksumError
    assert str(error) == "chunk 3 (rank 1, and 2 more failed)"
    assert error.failures == {1: "chunk 3", 2: "overlap", 3: "ValueError: bad"}


def test_an_error_of_all_is_not_blamed_on_one() -> None:
    assert str(_same(_agreed(LayoutError("gap"), LayoutError("gap")))) == "gap"


def test_foreign_errors_name_their_type_and_rank() -> None:
    errors = (None, MemoryError("no more"))
    raised = _agreed(*errors)
    error = _same(raised)
    assert isinstance(error, RankError)
    assert (error.rank, error.type) == (1, "MemoryError")
    assert [own.__cause__ for own in raised if own is not None] == list(errors)


def test_odd_facts_arrive_readable() -> None:
    facts: dict[str, Any] = {
        "count": np.int64(7),
        "names": {"b", "a"},
        "what": ValueError("x"),
        "ratio": math.inf,
        "name": "lone \ud800 surrogate",
    }
    error = _same(_agreed(LayoutError("odd", **facts), None))
    assert error.facts == facts | {"names": ["a", "b"], "what": "x"}


def test_huge_facts_stay_at_home() -> None:
    names = [f"tensor.{n}" for n in range(MAX_FACTS_NBYTES)]
    error = _same(_agreed(StateMismatchError("many", missing=names), None))
    assert type(error) is StateMismatchError
    assert error.missing == []


@given(
    message=st.text(), facts=st.dictionaries(st.from_regex("[a-z]{1,8}_", fullmatch=True), st.integers() | st.text())
)
def test_any_text_crosses(message: str, facts: dict[str, Any]) -> None:
    error = _same(_agreed(LayoutError(message, **facts), LayoutError(message, **facts)))
    assert str(error) == message
    assert error.facts == facts


def test_a_broken_communicator_does_not_hide_the_first_error() -> None:
    def fn(comm: Communicator, rank: int) -> tuple[str, Exception | None]:
        with pytest.raises(TimeoutExpiredError):
            Waiter(0.0).wait(comm.irecv(bytearray(1), 1 - rank, 1), "a message")
        own = LayoutError("mine")
        with pytest.raises(TimeoutExpiredError) as caught:
            agree(comm, own, Waiter(30))
        assert caught.value.__cause__ is own
        return str(caught.value), None

    assert run_world(2, fn)[0] == ("a message did not complete within 0 s: rank 1 did not answer", None)
