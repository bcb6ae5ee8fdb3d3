"""Comparing a state with a checkpoint: what is to be read, and every way in which the two do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parckpt.core.contents import Contents
from parckpt.core.dtypes import from_numpy
from parckpt.core.layout import Box, whole
from parckpt.core.leaves import Leaf, PerRank, Shard, Spec
from parckpt.core.state import flatten
from parckpt.core.target import Matched, Selection, match, unexpected
from parckpt.core.tensors import TensorRow
from parckpt.errors import ConfigError, ConfigTypeError, StateMismatchError
from parckpt.testing.checkpoints import store
from parckpt.testing.filesystem import MemoryFileSystem

pytestmark = pytest.mark.fast

F8, I4 = from_numpy(np.dtype("f8")), from_numpy(np.dtype("i4"))
ROWS = [
    TensorRow("w", F8, (8, 3)),
    TensorRow("net.b", I4, (5,)),
    TensorRow("own", F8, (2,), 0),
    TensorRow("own", F8, (3,), 1),
]
VALUES = {"lr": 0.5, "none": [], "net.n": 3}
OWN_VALUES = {"at": {"0": 10, "1": 20}}


@pytest.fixture(scope="module")
def contents() -> Contents:
    tensors = [(row, np.zeros(row.global_shape, row.dtype.numpy)) for row in ROWS]
    return store(MemoryFileSystem(), "/c", tensors, [[(i, whole(row.global_shape)) for i, row in enumerate(ROWS)]])


def fit(contents: Contents, state: Any, *, rank: int = 0, size: int = 2, **selection: Any) -> Matched:
    return match(
        flatten(state, writable=True),
        contents,
        VALUES,
        OWN_VALUES,
        saved_world_size=2,
        rank=rank,
        world_size=size,
        selection=Selection(**selection),
    )


def boxes(matched: Matched) -> list[tuple[str, int, Box]]:
    return [(slot.leaf.name, slot.tensor, slot.box) for slot in matched.slots]


def test_each_piece_gets_its_box(contents: Contents) -> None:
    parts = [Shard(np.zeros((1, 3)), (8, 3), (0, 0)), Shard(np.zeros((2, 2)), (8, 3), (6, 1))]
    state = {"w": parts, "net": {"b": np.zeros(5, "i4"), "n": 0}, "own": PerRank(np.zeros(3)), "at": PerRank(0)}
    found = fit(contents, state, rank=1)
    assert boxes(found) == [
        ("w", 0, Box((0, 0), (1, 3))),
        ("w", 0, Box((6, 1), (2, 2))),
        ("net.b", 1, whole((5,))),
        ("own", 3, whole((3,))),
    ]
    assert found.values == {"net.n": 3, "at": 20}
    assert (found.missing, found.mismatched, found.resizes) == ((), (), ())
    assert sorted(found.named) == [0, 1, 2, 3]
    assert found.error("/c", True) is None


@pytest.mark.parametrize("leaf", [np.zeros((8, 3)), Spec((8, 3), "f8"), Leaf((8, 3), "f8", print, print)])
def test_whole_leaves(contents: Contents, leaf: Any) -> None:
    assert boxes(fit(contents, {"w": leaf})) == [("w", 0, whole((8, 3)))]


def test_boxes_at_and_beyond_the_edges(contents: Contents) -> None:
    inside = [Shard(np.zeros((0, 3)), (8, 3), (8, 0)), Shard(np.zeros((1, 1)), (8, 3), (7, 2))]
    assert fit(contents, {"w": inside}).mismatched == ()
    for shape, offsets in (((1, 3), (8, 0)), ((1, 3), (-1, 0)), ((1, 3), (0, 1)), ((9, 3), (0, 0))):
        (said,) = fit(contents, {"w": Shard(np.zeros(shape), (8, 3), offsets)}).mismatched
        assert "out of range" in said


@pytest.mark.parametrize(
    ("state", "missing", "mismatched"),
    [
        ({"new": np.zeros(2)}, ["new"], []),
        ({"new": 5}, ["new"], []),
        ({"new": PerRank(5)}, ["new"], []),
        ({"new": PerRank(np.zeros(1))}, ["new"], []),
        ({"new": []}, ["new"], []),
        ({"w": np.zeros((3, 8))}, [], ["w has shape (3, 8), the checkpoint's (8, 3)"]),
        ({"w": np.zeros((8, 3), "f4")}, [], ["w is float32, the checkpoint's float64 (cast=True converts)"]),
        ({"w": PerRank(np.zeros((8, 3)))}, [], ["w is PerRank in the state and shared in the checkpoint"]),
        ({"own": np.zeros(2)}, [], ["own is shared in the state and PerRank in the checkpoint"]),
        ({"own": PerRank(np.zeros(3))}, [], ["own has shape (3,), the checkpoint's (2,)"]),
        ({"lr": PerRank(1)}, [], ["lr is PerRank in the state and shared in the checkpoint"]),
        ({"at": 1}, [], ["at is shared in the state and PerRank in the checkpoint"]),
        ({"w": 5}, [], ["w is a plain value in the state and an array in the checkpoint"]),
        ({"own": PerRank(5)}, [], ["own is a plain value in the state and an array in the checkpoint"]),
        ({"lr": np.zeros(1)}, [], ["lr is an array in the state and a plain value in the checkpoint"]),
        ({"at": PerRank(np.zeros(1))}, [], ["at is an array in the state and a plain value in the checkpoint"]),
        ({"none": np.zeros(1)}, ["none"], []),  # an empty list may have been "no shards here"
        ({"w": []}, [], []),
        ({"w": ()}, [], []),
        ({"none": [1]}, [], []),
    ],
)
def test_what_does_not_fit(contents: Contents, state: Any, missing: list[str], mismatched: list[str]) -> None:
    found = fit(contents, state)
    assert (list(found.missing), list(found.mismatched)) == (missing, mismatched)
    error = found.error("/c", True)
    assert (error is None) == (not missing and not mismatched)
    loose = found.error("/c", False)
    assert (loose is None) == (not mismatched)
    if error is not None:
        assert isinstance(error, StateMismatchError)
        assert (error.missing, error.unexpected, error.mismatched) == (missing, [], mismatched)
        assert "/c" in str(error)


def test_a_rank_that_had_nothing(contents: Contents) -> None:
    found = fit(contents, {"own": PerRank(np.zeros(2)), "at": PerRank(0)}, rank=0, size=2)
    assert found.missing == ()
    alone = match(
        flatten({"own": PerRank(np.zeros(2)), "at": PerRank(0)}, writable=True),
        contents,
        VALUES,
        {"at": {"1": 20}},
        saved_world_size=3,
        rank=2,
        world_size=3,
        selection=Selection(),
    )
    assert alone.missing == ("own of rank 2", "at of rank 2")


def test_resizing(contents: Contents) -> None:
    def make(on_resize: Any) -> dict[str, Any]:
        return {"own": PerRank(np.zeros(2), on_resize), "at": PerRank(0, on_resize)}

    refused = fit(contents, make("error"), size=3)
    assert len(refused.mismatched) == 2
    assert all("saved by 2 ranks, restored by 3" in said for said in refused.mismatched)
    kept = fit(contents, make("keep"), size=3)
    assert (kept.slots, dict(kept.values), kept.resizes, kept.mismatched) == ((), {}, (), ())
    assert sorted(kept.named) == [2, 3]  # named, so not unexpected
    called = fit(contents, make(lambda old, rank, size: old[0]), size=3)
    assert [(r.leaf.name, r.stored_name, r.tensors) for r in called.resizes] == [
        ("own", "own", (2, 3)),
        ("at", "at", ()),
    ]
    assert fit(contents, make("error"), size=2).resizes == ()


@pytest.mark.parametrize(
    ("only", "exclude", "taken"),
    [
        (None, None, {"w", "net.b", "net.n", "lr"}),
        (["net"], None, {"net.b", "net.n"}),
        (["net."], None, set()),
        (["ne"], None, set()),
        (["ne*"], None, {"net.b", "net.n"}),
        (["*"], ["net.b"], {"w", "net.n", "lr"}),
        (None, ["?"], {"net.b", "net.n", "lr"}),
        (["w"], ["w"], set()),
        (["[nw]*"], None, {"w", "net.b", "net.n"}),
        (("lr",), (), {"lr"}),
    ],
)
def test_selection(only: Any, exclude: Any, taken: set[str]) -> None:
    selection = Selection(only, exclude)
    assert {name for name in ("w", "net.b", "net.n", "lr") if selection.takes(name)} == taken


def test_selected_names_only_are_compared(contents: Contents) -> None:
    state = {"w": np.zeros((8, 3)), "net": {"b": np.zeros(9), "n": 0}, "new": 1}
    found = fit(contents, state, only=["w"])
    assert (found.missing, found.mismatched, boxes(found)) == ((), (), [("w", 0, whole((8, 3)))])
    assert fit(contents, state, choose=lambda name: name == "net.n").values == {"net.n": 3}


@pytest.mark.parametrize(
    "arguments",
    [{"only": "w"}, {"only": [1]}, {"exclude": "w"}, {"exclude": [None]}, {"name_map": ["w"]}, {"name_map": "w"}],
)
def test_wrong_selections(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigTypeError):
        Selection(**arguments)


@pytest.mark.parametrize("name_map", [{"w": "x.w", "lr": "rate", "at": "place"}, lambda n: f"x.{n}" if n == "w" else n])
def test_name_map(contents: Contents, name_map: Any) -> None:
    found = fit(contents, {"x": {"w": np.zeros((8, 3))}}, name_map=name_map)
    assert boxes(found) == [("x.w", 0, whole((8, 3)))]
    assert found.named == (0,)
    assert unexpected(contents, found.named, Selection(name_map=name_map)) == ("net.b", "own@rank_0", "own@rank_1")
    if isinstance(name_map, dict):
        assert fit(contents, {"rate": 0, "place": PerRank(0)}, name_map=name_map).values == {"rate": 0.5, "place": 10}


@pytest.mark.parametrize("name_map", [{"w": "net.b"}, {"lr": "net.n"}, {"lr": "w"}, {"at": "lr"}, lambda name: "x"])
def test_a_name_map_that_merges(contents: Contents, name_map: Any) -> None:
    with pytest.raises(ConfigError, match="one name"):
        fit(contents, {}, name_map=name_map)


def test_a_name_map_that_gives_no_name(contents: Contents) -> None:
    with pytest.raises(ConfigTypeError, match="NoneType"):
        fit(contents, {}, name_map=lambda name: None)


def test_unexpected(contents: Contents) -> None:
    assert unexpected(contents, [], Selection()) == ("w", "net.b", "own@rank_0", "own@rank_1")
    assert unexpected(contents, [0, 2, 3], Selection()) == ("net.b",)
    assert unexpected(contents, [], Selection(only=["net", "lr"])) == ("net.b",)
    assert unexpected(contents, [], Selection(exclude=["own", "w"])) == ("net.b",)


def test_long_lists_are_cut_in_the_message_only(contents: Contents) -> None:
    found = fit(contents, {"new": {str(i): np.zeros(1) for i in range(20)}})
    error = found.error("/c", True)
    assert error is not None
    assert len(error.missing) == 20
    assert "new.7 and 12 more" in str(error)
