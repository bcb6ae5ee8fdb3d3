"""Appended info: what a save stores beside its tensors, exactly, whatever the file format narrows it to."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core.appended import decode, encode, settle
from parckpt.core.dtypes import _TABLE
from parckpt.core.leaves import Leaf
from parckpt.errors import FormatError
from parckpt.testing.checkpoints import random_array
from parckpt.testing.strategies import shapes

pytestmark = pytest.mark.fast


def through_json(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value))))


def test_counters_are_added_to_and_the_rest_stays() -> None:
    array = np.arange(3)
    given = {"epoch_num": 5, "step_num": -1.5, "epoch": 7, "a": array}
    assert settle(given, 2, 40) == {"epoch_num": 7, "step_num": 38.5, "epoch": 7, "a": array}
    assert given["epoch_num"] == 5
    assert settle(None, 2, 40) == {}
    assert settle({}, 2, 40) == {}


def test_leaves_are_read_at_each_save() -> None:
    live = np.arange(4.0)
    leaf = Leaf((4,), "f8", lambda out: np.copyto(out, live))
    first = settle({"a": leaf}, 1, 1)["a"]
    live += 1
    second = settle({"a": leaf}, 1, 2)["a"]
    assert (first.tolist(), second.tolist()) == ([0, 1, 2, 3], [1, 2, 3, 4])


@pytest.mark.parametrize("value", [0.1, 1e300, -0.0, float("inf"), 2**64 - 1, True, "ü", np.float64(1 / 3)])
def test_values_are_exact(value: Any) -> None:
    found = through_json(value)
    assert type(found) is type(value)
    assert found == value
    assert math.copysign(1, found) == math.copysign(1, value) if isinstance(value, float) else True


@given(st.data())
def test_arrays_are_exact(data: st.DataObject) -> None:
    row = data.draw(st.sampled_from([row for row in _TABLE if row.name != "int4"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    array = random_array(rng, row, data.draw(shapes(max_ndim=3)))
    found = through_json(array)
    assert (found.shape, found.dtype) == (array.shape, row.numpy)
    assert found.tobytes() == array.tobytes()
    assert found.flags.writeable


def test_arrays_of_any_memory() -> None:
    array = np.arange(12.0).reshape(3, 4)
    for odd in (array.T, array[:, ::2], array.astype(">f8"), array[::-1]):
        assert np.array_equal(through_json(odd), odd)


@pytest.mark.parametrize(
    "data",
    [
        {"array": None},
        {"array": []},
        {"array": ["f8", [1]]},
        {"array": ["float64", [1], "AAAAAAAAAAA=", 1]},
        {"array": ["nonsense", [1], "AAAAAAAAAAA="]},
        {"array": [["float64"], [1], "AAAAAAAAAAA="]},
        {"array": ["float64", [2], "AAAAAAAAAAA="]},
        {"array": ["float64", [-1, -1], "AAAAAAAAAAA="]},
        {"array": ["float64", [True], "AAAAAAAAAAA="]},
        {"array": ["float64", [1.0], "AAAAAAAAAAA="]},
        {"array": ["float64", "1", "AAAAAAAAAAA="]},
        {"array": ["float64", 1, "AAAAAAAAAAA="]},
        {"array": ["float64", [1], "AAAAAAAAAAA"]},
        {"array": ["float64", [1], "!!!"]},
        {"array": ["float64", [1], "ü"]},
        {"array": ["float64", [1], 5]},
        {"array": ["float64", [0, 2**62], ""]},
        {"array": ["float64", [1] * 65, "AAAAAAAAAAA="]},
        {"array": ["bool", [1], "Ag=="]},
        {"unknown": 1},
        {"array": ["float64", [1], "AAAAAAAAAAA="], "more": 1},
    ],
)
def test_what_encode_cannot_have_made_is_refused(data: Any) -> None:
    with pytest.raises(FormatError):
        decode(data)
