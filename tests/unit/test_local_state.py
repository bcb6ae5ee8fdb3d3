"""One rank's state for the others: equal descriptions for equal layouts, and every planned box found again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parckpt.core.describe import EMPTY, PER_RANK, unpack
from parckpt.core.layout import Box
from parckpt.core.leaves import Leaf, PerRank, Shard
from parckpt.core.state import flatten
from parckpt.engine.local import LocalState, as_state
from parckpt.errors import ConfigTypeError, InternalError, LayoutError

pytestmark = pytest.mark.fast


def local(state: Any) -> LocalState:
    return LocalState.of(flatten(state, writable=False))


STATE: dict[str, Any] = {
    "w": Shard(np.zeros((2, 3)), (8, 3), (4, 0)),
    "b": np.zeros(5, "f4"),
    "blocks": [Shard(np.ones((1, 4)), (6, 4), (0, 0)), Shard(np.ones((2, 4)), (6, 4), (3, 0))],
    "rng": PerRank(np.zeros(7)),
    "lr": 0.1,
    "at": PerRank(3),
    "none": [],
}


def test_the_description_says_everything_that_a_plan_needs() -> None:
    found = unpack(local(STATE).description)
    assert found.names == ("w", "b", "blocks", "rng")
    assert found.row_name.tolist() == [0, 1, 2, 2, 3]
    assert found.value_names == ("lr", "at", "none")
    assert found.value_flags.tolist() == [0, PER_RANK, EMPTY]


@pytest.mark.parametrize(
    ("change", "is_seen"),
    [
        ({"lr": 0.2}, False),
        ({"b": np.ones(5, "f4")}, False),
        ({"b": np.zeros(10, "f4")[::2]}, False),
        ({"b": np.zeros(5, ">f4")}, False),
        ({"b": Leaf((5,), "f4", lambda out: None)}, False),
        ({"b": np.zeros(5, "f8")}, True),
        ({"b": np.zeros(6, "f4")}, True),
        ({"b": Shard(np.zeros(5, "f4"), (5,), (0,))}, True),
        ({"b": PerRank(np.zeros(5, "f4"))}, True),
        ({"w": Shard(np.zeros((2, 3)), (8, 3), (2, 0))}, True),
        ({"more": 1}, True),
        ({"lr": PerRank(0.1)}, True),
        ({"none": [1]}, True),
    ],
)
def test_the_digest_changes_with_the_layout_and_with_nothing_else(change: dict[str, Any], is_seen: bool) -> None:
    before, after = local(STATE), local({**STATE, **change})
    assert (before.digest != after.digest) == is_seen
    assert (before.description != after.description) == is_seen
    assert len(before.digest) == 32


def test_a_box_that_cannot_be_is_refused() -> None:
    with pytest.raises(LayoutError, match="2\\*\\*62"):
        local({"w": Shard(np.zeros(1), (2**62,), (0,))})


def test_sources_are_found_by_box() -> None:
    state = local(STATE)
    assert state.source("w", Box((4, 0), (2, 3))).box == Box((4, 0), (2, 3))
    assert state.source("w", Box((5, 1), (1, 1))).box == Box((4, 0), (2, 3))
    assert state.source("blocks", Box((4, 0), (1, 4))).box == Box((3, 0), (2, 4))
    for name, box in (("w", Box((3, 0), (2, 3))), ("blocks", Box((0, 0), (4, 4))), ("other", Box((), ()))):
        with pytest.raises(InternalError, match="does not hold"):
            state.source(name, box)


def test_values_are_encoded_apart() -> None:
    state = local(STATE)
    assert state.shared_values() == {"lr": 0.1, "none": []}
    assert state.own_values() == {"at": 3}


class WithStateDict:
    """As a framework's module."""

    def state_dict(self) -> dict[str, Any]:
        return {"w": 1}


def test_forms_of_a_state() -> None:
    mapping = {"a": 1}
    assert as_state(mapping) is mapping
    assert as_state([{"name": "a", "data": 1}, {"name": "b", "data": 2, "more": 3}]) == {"a": 1, "b": 2}
    assert as_state([]) == {}
    assert as_state(WithStateDict()) == {"w": 1}
    made = as_state(lambda: mapping)
    assert callable(made)
    assert made() is mapping


@pytest.mark.parametrize("bad", [None, 5, "x", (1, 2), [1], [{"name": "a"}], [{"data": 1}], [{"name": 1, "data": 1}]])
def test_what_is_no_state(bad: Any) -> None:
    with pytest.raises(ConfigTypeError):
        as_state(bad)
