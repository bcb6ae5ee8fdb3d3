"""Layout files: what a person writes, and what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from parckpt.core.layoutfile import LayoutFile, parse_layout_file
from parckpt.core.mesh import Layout
from parckpt.errors import ConfigError

pytestmark = pytest.mark.fast

TOP = {"mesh_shape": [2, 4], "mesh_axes": ["data", "model"]}


def parse(tensors: Any, **top: Any) -> LayoutFile:
    return parse_layout_file(json.dumps({**TOP, **top, "tensors": tensors}).encode(), "cut.json")


def test_names_go_before_patterns_and_the_first_pattern_counts() -> None:
    cut = {"tensor_map": ["model"]}
    found = parse({"*.w": cut, "a.*": {"tensor_map": [None, "data"]}, "a.w": {"tensor_map": [["data", "model"]]}})
    assert found.of(["a.w", "b.w", "a.b", "c"]) == {
        "a.w": (Layout((2, 4), ("data", "model"), (("data", "model"),)),),
        "b.w": (Layout((2, 4), ("data", "model"), ("model",)),),
        "a.b": (Layout((2, 4), ("data", "model"), (None, "data")),),
    }
    assert found.nranks == 8
    assert found.unused(["b.w", "c"]) == ["a.*", "a.w"]


def test_a_tensor_may_have_a_mesh_of_its_own() -> None:
    found = parse({"w": {"mesh_shape": [3], "tensor_map": [0], "first_rank": 8}})
    assert found.of(["w"]) == {"w": (Layout((3,), None, (0,), first_rank=8),)}
    assert found.nranks == 11


def test_the_description_of_a_state_is_one() -> None:
    found = parse(
        {
            "l.{}.w": {"shape": [8, 8], "dtype": "float32", "tensor_map": ["model"], "repeat": 2},
            "n": [8],
            "rng": {"shape": [3], "per_rank": True},
        },
        dtype="float16",
        ranks=16,
    )
    assert list(found.layouts) == ["l.0.w", "l.1.w", "n", "rng"]
    assert list(found.of(["l.0.w", "l.1.w", "l.2.w", "n", "rng"])) == ["l.0.w", "l.1.w"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "expected an object with an object 'tensors'"),
        (b'{"tensors": []}', "expected an object with an object 'tensors'"),
        (b'{"tensors": {}, "mash_shape": [2]}', "unknown member 'mash_shape'"),
        (b'{"tensors": {"w": {"tensormap": [0]}}}', "unknown member 'tensormap'"),
        (b'{"tensors": {"w": {"tensor_map": [0]}}}', "is cut, but there is no mesh_shape"),
        (b'{"tensors": {"w": ["model"]}, "mesh_shape": [2]}', "expected an object, such as"),
        (b'{"tensors": {"w": [-1, 0]}, "mesh_shape": [2]}', "expected an object, such as"),
        (b'{"tensors": {"w": {"tensor_map": [1]}}, "mesh_shape": [2]}', "does not exist"),
        (b'{"tensors": {"w": {"tensor_map": ["x"]}}, "mesh_shape": [2]}', "no mesh_axes"),
        (b'{"tensors": {"w": {"tensor_map": 3}}, "mesh_shape": [2]}', "must be a sequence"),
        (b'{"tensors": {"w": {"tensor_map": [0], "shard_size": 1.5}}, "mesh_shape": [2]}', "not an integer"),
    ],
)
def test_what_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_layout_file(content, "cut.json")
    assert "cut.json" in caught.value.message
    assert said in caught.value.message
