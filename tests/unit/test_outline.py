"""States described by people, and planning with them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from parckpt.core.layout import Box
from parckpt.core.outline import Outline
from parckpt.core.outlinefile import parse_outline
from parckpt.core.strategy import Strategy, TensorStrategy
from parckpt.engine.outlook import WAYS, Speed, look_ahead
from parckpt.errors import ConfigError, LayoutError

pytestmark = pytest.mark.fast


def _parse(**content: Any) -> Outline:
    return parse_outline(json.dumps(content).encode(), "state.json")


def test_members() -> None:
    found = _parse(
        mesh_shape=[2, 2],
        mesh_axes=["data", "model"],
        dtype="bfloat16",
        tensors={
            "w": {"shape": [6, 4], "tensor_map": [None, "model"]},
            "l{}.b": {"shape": [4], "dtype": "float64", "repeat": 3},
            "bare": [5],
            "m": {"shape": [8], "mesh_shape": [4], "mesh_axes": ["all"], "tensor_map": ["all"]},
            "own": {"shape": [2], "per_rank": True},
        },
    )
    assert (found.nranks, found.job_nranks) == (4, 4)
    assert [one.name for one in found.tensors] == ["w", "l0.b", "l1.b", "l2.b", "bare", "m", "own"]
    assert {one.name: one.dtype.name for one in found.tensors}["l1.b"] == "float64"
    assert found.nbytes == 2 * (24 + 5 + 8 + 2) + 3 * 4 * 8
    held = {one.name: one for one in found.held(3)}
    assert held["w"].box == Box((0, 2), (6, 2))
    assert held["m"].box == Box((6,), (2,))
    assert held["bare"].box == Box((0,), (5,))
    assert (held["own"].per_rank, held["own"].split) == (True, False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "the description: expected an object with a member tensors"),
        ({}, "tensors is missing"),
        ({"tensors": {}}, "at least one"),
        ({"tensors": []}, "tensors: expected an object"),
        ({"tensors": {"w": {}}}, "tensors['w'] has no shape"),
        ({"tensors": {"w": {"shape": 3}}}, "tensors['w'].shape: expected a list of integers"),
        ({"tensors": {"w": [True]}}, "expected an integer of at least 0, not True"),
        ({"tensors": {"w": [-1]}}, "of at least 0"),
        ({"tensors": {"w": {"shape": [1], "dtype": "float33"}}}, "did you mean float32?"),
        ({"tensors": {"w": {"shape": [1], "dtype": []}}}, "unknown dtype []"),
        ({"tensors": {"w": {"shape": [1], "tensormap": []}}}, "did you mean tensor_map?"),
        ({"tensors": {"w": {"shape": [1], "tensor_map": [0]}}}, "is cut, but there is no mesh_shape"),
        ({"tensors": {"w": {"shape": [1], "repeat": 2}}}, "belong together"),
        ({"tensors": {"w{}": {"shape": [1]}}}, "belong together"),
        ({"tensors": {"w{}": {"shape": [1], "repeat": 1 << 40}}}, "at most"),
        ({"tensors": {"w{}": {"shape": [1], "repeat": 2}, "w1": [1]}}, "different names"),
        ({"tensors": {"w": {"shape": [1], "per_rank": 1}}}, "true or false"),
        ({"tensors": {"w": [1]}, "ranks": 0}, "ranks: expected an integer of at least 1"),
        ({"tensors": {"w": [1]}, "ranks": 1 << 30}, "ranks: expected at most"),
        ({"tensors": {"w": {"shape": [1], "mesh_shape": "x", "tensor_map": []}}}, "tensors['w']: mesh_shape"),
        ({"tensors": {"w": {"shape": [2], "mesh_shape": [2], "tensor_map": ["x"]}}}, "no mesh_axes"),
    ],
)
def test_mistakes_are_named(content: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_outline(json.dumps(content).encode(), "state.json")
    assert said in caught.value.message
    assert "state.json" in caught.value.message


def test_what_is_no_json() -> None:
    for data in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(ConfigError, match="is no JSON"):
            parse_outline(data, "x")


def test_layouts_that_do_not_fit() -> None:
    with pytest.raises(LayoutError, match="'w'"):
        _parse(mesh_shape=[2], tensors={"w": {"shape": [], "tensor_map": [0]}})
    with pytest.raises(LayoutError, match="no multiple of the 4"):
        _parse(mesh_shape=[4], ranks=6, tensors={"w": {"shape": [8], "tensor_map": [0]}})
    found = _parse(mesh_shape=[4], tensors={"w": {"shape": [8], "tensor_map": [0]}})
    with pytest.raises(LayoutError, match="no multiple"):
        found.describe(6)


def test_a_larger_job_repeats_the_layout() -> None:
    found = _parse(mesh_shape=[2], tensors={"w": {"shape": [8], "tensor_map": [0]}})
    descriptions, index = found.describe(6)
    assert (len(descriptions), index.tolist()) == (2, [0, 1, 0, 1, 0, 1])
    look = look_ahead(descriptions, index, 2, WAYS[1])
    assert look.rank_nbytes.tolist() == [16] * 6
    once = look_ahead(descriptions, index, 2, WAYS[2])
    assert (once.nbytes, once.nfiles) == (32, 6)


def test_strategies_and_even_cuts() -> None:
    found = _parse(tensors={"w": [8, 4], "b": [3]})
    cut = found.with_strategy(Strategy({"w": TensorStrategy((2, 2), (1, 0))}))
    assert cut.nranks == 4
    assert [one.box for one in cut.held(3)] == [Box((4, 2), (4, 2)), Box((0,), (3,))]
    with pytest.raises(LayoutError, match="names none of the tensors"):
        found.with_strategy(Strategy({"x": TensorStrategy((2,), (0,))}))
    with pytest.raises(LayoutError, match="'b'"):
        found.with_strategy(Strategy({"b": TensorStrategy((2, 2), (1, 0))}))
    even = found.cut_evenly(4)
    assert [one.shape for one in even.held(3)] == [(2, 4), (0,)]
    assert look_ahead(*even.describe(4), 4, WAYS[0]).nbytes == (32 + 3) * 4


def test_seconds() -> None:
    assert Speed().seconds(10, 20) is None
    assert Speed(node=5.0).seconds(10, 20) == 2
    assert Speed(total=5.0).seconds(10, 20) == 4
    assert Speed(node=1.0, total=5.0).seconds(10, 20) == 10


def test_written_by_node() -> None:
    found = _parse(mesh_shape=[4], tensors={"w": {"shape": [10], "tensor_map": [0], "dtype": "int8"}})
    look = look_ahead(*found.describe(4), 3, WAYS[1])
    assert (look.rank_nbytes.tolist(), look.written_by_node.tolist()) == ([3, 3, 2, 2], [8, 2])
    whole = look_ahead(*found.describe(4), 3, WAYS[0])
    assert (whole.written_by_node.tolist(), whole.fullest_rank, whole.fullest_node) == ([10, 0], 10, 10)
    assert np.array_equal(whole.rank_nbytes, [3, 3, 2, 2])
