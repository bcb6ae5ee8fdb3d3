"""Flattening nested states, and putting restored leaves back."""

from __future__ import annotations

import enum
from collections import OrderedDict, namedtuple
from types import MappingProxyType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from parckpt.core.leaves import Leaf, PerRank, Shard, Spec
from parckpt.core.state import flatten
from parckpt.errors import ConfigError, ConfigTypeError, LayoutError

pytestmark = pytest.mark.fast

Pair = namedtuple("Pair", "mean variance")


class Color(enum.IntEnum):
    RED = 1


def array(*shape):
    return np.zeros(shape, "f4")


def names(state, *, writable=False):
    flat = flatten(state, writable=writable)
    return [leaf.name for leaf in flat.tensors], [leaf.name for leaf in flat.values]


def test_names_are_joined_paths_in_the_order_given():
    state = {
        "model": {"b": array(2), "a.weight": array(3), "x/ü": array()},
        "optimizer": {"state": {0: {"step": 3, "m": array(2)}, np.int64(1): {"m": array(2)}}, "lr": 1e-3},
        "list": [array(1), (array(1), 5)],
        "epochs": [1, 2, 3],
    }
    tensors, values = names(state)
    assert tensors == [
        "model.b",
        "model.a.weight",
        "model.x/ü",
        "optimizer.state.0.m",
        "optimizer.state.1.m",
        "list.0",
        "list.1.0",
    ]
    assert values == ["optimizer.state.0.step", "optimizer.lr", "list.1.1", "epochs"]


def test_a_callable_is_called_and_must_return_a_mapping():
    assert names(lambda: {"a": array(1)}) == (["a"], [])
    assert names(OrderedDict(a=array(1))) == (["a"], [])
    assert names({}) == ([], [])
    for wrong in ([array(1)], array(1), None, lambda: [1]):
        with pytest.raises(ConfigTypeError, match="mapping"):
            flatten(wrong, writable=False)


@pytest.mark.parametrize(
    "leaf",
    [
        array(),
        array(0),
        array(3, 0),
        array(*(1,) * 8),
        array(6, 4)[::2, ::-1],
        np.zeros((2, 3), order="F"),
        np.zeros(3, ">f8"),
        np.zeros(3, ml_dtypes.bfloat16),
        np.zeros(3, bool),
    ],
    ids=lambda leaf: f"{leaf.dtype}{leaf.shape}",
)
def test_any_array_is_a_whole_tensor(leaf):
    (tensor,) = flatten({"w": leaf}, writable=True).tensors
    (piece,) = tensor.pieces
    assert piece.source is leaf
    assert (tensor.global_shape, piece.shape, piece.offsets) == (leaf.shape, leaf.shape, (0,) * leaf.ndim)
    assert (tensor.split, tensor.several, tensor.per_rank) == (False, False, False)
    assert tensor.dtype.numpy == leaf.dtype.newbyteorder("<")
    assert tensor.nbytes == leaf.nbytes


def test_shards_of_one_tensor():
    one, two = Shard(array(1, 3), (4, 3), (0, 0)), Shard(array(2, 3), (4, 3), (2, 0))
    flat = flatten({"a": one, "b": [one, two], "c": (two,)}, writable=False)
    assert [(leaf.name, leaf.split, leaf.several) for leaf in flat.tensors] == [
        ("a", True, False),
        ("b", True, True),
        ("c", True, True),
    ]
    assert [piece.offsets for piece in flat.tensors[1].pieces] == [(0, 0), (2, 0)]
    assert flat.tensors[1].global_shape == (4, 3)
    assert flat.tensors[1].nbytes == 36


@pytest.mark.parametrize("other", [Shard(array(2, 3), (5, 3), (2, 0)), Shard(np.zeros((2, 3)), (4, 3), (2, 0))])
def test_shards_that_disagree_are_a_layout_error(other):
    with pytest.raises(LayoutError, match=r"'m\.w'"):
        flatten({"m": {"w": [Shard(array(2, 3), (4, 3), (0, 0)), other]}}, writable=False)


def test_a_leaf_keeps_its_callables_and_a_mixed_list_nests():
    leaf = Leaf((2,), "bfloat16", read_into=lambda out: None, write_from=lambda array: None)
    flat = flatten({"d": leaf, "s": Shard(leaf, (4,), (2,)), "m": [leaf, Shard(array(1), (1,), (0,))]}, writable=True)
    assert [leaf.name for leaf in flat.tensors] == ["d", "s", "m.0", "m.1"]
    assert flat.tensors[0].pieces[0].source is leaf
    assert flat.tensors[1].pieces[0].source is leaf


def test_per_rank_covers_all_it_holds():
    state = {"loader": PerRank({"position": 7, "rng": [array(2), 3]}, on_resize="keep"), "w": array(1), "p": PerRank(5)}
    flat = flatten(state, writable=False)
    assert [(leaf.name, leaf.per_rank, leaf.on_resize) for leaf in flat.tensors] == [
        ("loader.rng.0", True, "keep"),
        ("w", False, "error"),
    ]
    assert [(leaf.name, leaf.value, leaf.per_rank, leaf.on_resize) for leaf in flat.values] == [
        ("loader.position", 7, True, "keep"),
        ("loader.rng.1", 3, True, "keep"),
        ("p", 5, True, "error"),
    ]


@pytest.mark.parametrize(
    "inner", [PerRank(3), Shard(array(1), (2,), (0,)), [Shard(array(1), (2,), (0,))], {"x": [PerRank(3)]}]
)
def test_per_rank_holds_neither_shards_nor_itself(inner):
    with pytest.raises(ConfigError, match="'p"):
        flatten({"p": PerRank(inner)}, writable=False)


PLAIN = [0, 2**100, 1.5, float("inf"), True, None, "text", "\ud800", b"bytes", np.float32(1), np.bool_(True)]


@pytest.mark.parametrize("value", [*PLAIN, PLAIN, tuple(PLAIN), [{"a": [1, (2, b"")]}, {}], [], ()], ids=repr)
def test_plain_values_are_one_leaf(value):
    (leaf,) = flatten({"v": value}, writable=False).values
    assert leaf.value is value
    assert leaf.may_be_no_shards is (isinstance(value, (list, tuple)) and len(value) == 0)


def test_dicts_nest_to_one_value_per_key_and_lists_do_not():
    assert names({"d": {"a": 1, "b": {"c": [1, 2]}}, "e": {}, "l": [{"a": 1}]}) == ([], ["d.a", "d.b.c", "l"])


class Unit(np.ndarray):
    pass


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({1, 2}, "set"),
        (object(), "object"),
        (1 + 2j, "complex"),
        (bytearray(2), "bytearray"),
        (Color.RED, "Color"),
        (SimpleNamespace(shape=(2,)), "SimpleNamespace"),
        (np.datetime64("2020-01-01"), "datetime64"),
        (np.str_("x"), "str_"),
        (np.ma.zeros(3), "MaskedArray"),
        (array(3).view(Unit), "Unit"),
        (np.array([object()]), "object"),
        (np.array(["x"]), "<U1"),
        (np.zeros(2, [("a", "f4")]), "'a'"),
        (np.zeros(2, "M8[s]"), "datetime64"),
        (lambda: 3, "function"),
        (range(3), "range"),
    ],
    ids=str,
)
@pytest.mark.parametrize("writable", [False, True])
def test_everything_else_is_refused_by_path_and_type(value, told, writable):
    for state, path in (({"a": {"b": value}}, "'a.b'"), ({"a": [1, value]}, "'a.1'"), ({"a": PerRank(value)}, "'a'")):
        with pytest.raises(ConfigTypeError) as caught:
            flatten(state, writable=writable)
        assert path in str(caught.value)
        assert told in str(caught.value)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"a.b": 1, "a": {"b": 2}}, r"'a.b': \['a.b'\] and \['a'\]\['b'\]"),
        ({1: 1, "1": 2}, "'1'"),
        ({"a": [array(1), 2], "a.1": 3}, "'a.1'"),
        ({"": 1}, "empty"),
        ({"a": {"": array(1)}}, "'a' is empty"),
        ({"a": {"\ud800": 1}}, r"\\ud800"),
    ],
)
def test_names_that_collide_or_cannot_be_are_refused(state, told):
    with pytest.raises(ConfigError, match=told):
        flatten(state, writable=False)


@pytest.mark.parametrize("key", [None, 1.0, True, b"x", ("a",)])
def test_keys_are_str_or_int(key):
    with pytest.raises(ConfigTypeError, match="'a'"):
        flatten({"a": {key: 1}}, writable=False)


def test_a_name_of_two_hundred_characters_is_fine():
    assert names({"ä" * 200: array(1)}) == (["ä" * 200], [])


def test_a_state_that_holds_itself_is_refused_at_once():
    inner = {"w": array(1)}
    inner["children"] = [inner, inner, inner]
    plain = [1]
    plain += [plain, plain]
    for state in (inner, {"a": inner}, {"a": plain}):
        with pytest.raises(ConfigError, match="itself"):
            flatten(state, writable=False)
    shared = {"w": array(1)}
    assert names({"a": shared, "b": shared}) == (["a.w", "b.w"], [])


def test_read_only_targets_are_refused_at_restore_only():
    frozen = array(3)
    frozen.flags.writeable = False
    one_way = Leaf((2,), "f4", read_into=lambda out: None)
    for leaf in (frozen, Shard(frozen, (3,), (0,)), one_way, [one_way], PerRank(frozen)):
        flatten({"m": {"w": leaf}}, writable=False)
        with pytest.raises(ConfigError, match=r"'m\.w"):
            flatten({"m": {"w": leaf}}, writable=True)


def test_specs_are_for_restoring_only():
    state = {"w": Spec((2, 3), "f4"), "part": Spec((2,), "i8", (4,), (2,)), "parts": [Spec((1,), "i8", (4,), (0,))]}
    flat = flatten(state, writable=True)
    assert [(leaf.name, leaf.split, leaf.several, leaf.global_shape) for leaf in flat.tensors] == [
        ("w", False, False, (2, 3)),
        ("part", True, False, (4,)),
        ("parts", True, True, (4,)),
    ]
    assert {piece.source for leaf in flat.tensors for piece in leaf.pieces} == {None}
    assert flat.tensors[1].pieces[0].offsets == (2,)
    with pytest.raises(ConfigError, match="'w' is a Spec"):
        flatten(state, writable=False)


def test_restored_values_go_back_where_they_came_from():
    lists = [1, 2]
    state = {
        "lr": 0.1,
        "n": {"epochs": lists, 3: "x"},
        "mixed": [array(1), 5],
        "fixed": (array(1), 5, [6]),
        "view": MappingProxyType({"a": 1}),
        "own": PerRank(4, on_resize="keep"),
        "box": PerRank({"k": 1}),
    }
    written = {
        leaf.name: leaf.write_back([7] if isinstance(leaf.value, list) else 7)
        for leaf in flatten(state, writable=True).values
    }
    assert written == {
        "lr": True,
        "n.epochs": True,
        "n.3": True,
        "mixed.1": True,
        "fixed.1": False,
        "fixed.2": True,
        "view.a": False,
        "own": True,
        "box.k": True,
    }
    assert (state["lr"], state["n"][3], state["mixed"][1], state["fixed"][1:]) == (7, 7, 7, (5, [7]))
    assert lists == [7]
    assert state["n"]["epochs"] is lists
    assert isinstance(state["own"], PerRank)
    assert (state["own"].value, state["own"].on_resize) == (7, "keep")
    assert state["box"].value == {"k": 7}


def test_rebuild_copies_the_structure_with_new_leaves():
    kept = array(1)
    state = {
        "w": Spec((2,), "f4"),
        "kept": kept,
        "o": OrderedDict([(3, Pair(array(1), 5))]),
        "l": [array(1), [1, 2]],
        "s": [Shard(array(1), (1,), (0,))],
        "p": PerRank({"x": 1}),
        "v": [1, 2],
    }
    new = array(2)
    pieces = [array(1)]
    tree = flatten(state, writable=True).rebuild({"w": new, "o.3.0": "mean", "s": pieces}, {"p.x": 2, "v": [3]})
    assert tree["w"] is new
    assert tree["kept"] is kept
    assert tree["o"] == {3: Pair("mean", 5)}
    assert type(tree["o"][3]) is Pair
    assert tree["l"][1] == [1, 2]
    assert tree["s"] is pieces
    assert (tree["p"], tree["v"]) == ({"x": 2}, [3])
    assert tree is not state
    assert isinstance(state["w"], Spec)
