"""Layouts: which box of a tensor each rank holds, in MindSpore's and in JAX's words."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from parckpt import Layout
from parckpt.core.layout import Box, tiling_problem
from parckpt.errors import ConfigError, ConfigTypeError, LayoutError

pytestmark = pytest.mark.fast


def test_a_table_of_boxes() -> None:
    layout = Layout((2, 4), ("data", "model"), (None, "model"))
    assert layout.nranks == 8
    assert layout.box((10, 8), 0) == Box((0, 0), (10, 2))
    assert layout.box((10, 8), 5) == Box((0, 2), (10, 2))
    assert layout.local_shape((10, 8), 7) == (10, 2)
    assert layout.global_shape((10, 2)) == (10, 8)
    assert layout.groups() == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((1, 0), ("x", "y")),
        ((-1, 0), (None, "y")),
        ((0,), ("y",)),
        ((0, -1), ("y", None)),
        (((1, 0),), (("x", "y"),)),
        (((0, 1), -1), (("y", "x"), None)),
        ((-1, (0,)), (None, ("y",))),
        ((-1, ()), ()),
    ],
)
def test_numbers_and_names_mean_the_same(numbers: Any, words: Any) -> None:
    named = Layout((2, 3), ("x", "y"), words)
    assert named == Layout((2, 3), ("x", "y"), numbers)
    again = Layout((2, 3), None, named.tensor_map)
    assert [again.box((12, 12), rank) for rank in range(6)] == [named.box((12, 12), rank) for rank in range(6)]


def test_several_axes_cut_one_dimension_the_first_is_major() -> None:
    layout = Layout((2, 3), ("x", "y"), (("y", "x"),))
    # Rank 1 is (x=0, y=1): part 1 * 2 + 0 of six.
    assert layout.box((12,), 1) == Box((4,), (2,))
    assert [layout.box((12,), rank).offsets[0] // 2 for rank in range(6)] == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("length", [0, 1, 2, 5, 6, 7, 13])
def test_uneven_lengths_are_cut_as_by_numpy(length: int) -> None:
    layout = Layout((3,), None, (0,))
    parts = np.array_split(np.arange(length), 3)
    for rank, part in enumerate(parts):
        box = layout.box((length, 4), rank)
        assert box.shape == (len(part), 4)
        assert box.offsets == (sum(map(len, parts[:rank])), 0)


def test_optimizer_sharding_cuts_dimension_0_of_each_slice() -> None:
    # Ranks 0 and 2 hold the upper half, 1 and 3 the lower one.
    layout = Layout((2, 2), None, (0, -1), shard_step=2, shard_size=2)
    assert [layout.box((8, 4), rank).offsets[0] for rank in range(4)] == [0, 4, 2, 6]
    assert layout.local_shape((8, 4), 3) == (2, 4)
    assert layout.global_shape((2, 4)) == (8, 4)
    assert layout.groups() == ((0,), (2,), (1,), (3,))
    assert layout.holder_stride == 2


@pytest.mark.parametrize(
    ("step", "size", "parts"), [(1, -1, 4), (0, -1, 4), (2, -1, 4), (1, 2, 2), (1, 3, 1), (1, 0, 1), (1, 8, 1)]
)
def test_how_many_optimizer_parts(step: int, size: int, parts: int) -> None:
    layout = Layout((4,), None, (-1,), shard_step=step, shard_size=size)
    assert layout.optimizer_parts == parts
    assert len(layout.groups()) == parts
    assert {layout.local_shape((8,), rank) for rank in range(4)} == {(8 // parts,)}


def test_scalars_are_never_cut() -> None:
    layout = Layout((4,), shard_size=2)
    assert layout.box((), 3) == Box((), ())
    assert layout.global_shape(()) == ()


def test_a_stage_begins_at_its_first_rank() -> None:
    layout = Layout((2,), None, (0,), first_rank=6)
    assert list(layout.ranks) == [6, 7]
    assert layout.box((4,), 7) == Box((2,), (2,))
    assert layout.groups() == ((6,), (7,))
    for rank in (5, 8, -1):
        with pytest.raises(LayoutError, match=rf"rank {rank} is not one of the 2 ranks from 6"):
            layout.box((4,), rank)


def _meshes() -> list[Layout]:
    found = []
    for mesh in [(4,), (2, 3), (2, 2, 2), (3, 1, 2)]:
        axes = [-1, *range(len(mesh))]
        for entries in itertools.product(axes, repeat=2):
            used = [entry for entry in entries if entry >= 0]
            if len(set(used)) == len(used):
                found += [Layout(mesh, None, entries, shard_size=size) for size in (0, 2, -1)]
    return found


@pytest.mark.parametrize("shape", [(12, 12), (5, 3), (1, 0)])
def test_the_groups_boxes_tile_the_tensor(shape: tuple[int, int]) -> None:
    for layout in _meshes():
        groups = layout.groups()
        assert sorted(rank for group in groups for rank in group) == list(range(layout.nranks))
        for group in groups:
            assert list(group) == sorted(group)
            assert len({layout.box(shape, rank) for rank in group}) == 1
        boxes = [layout.box(shape, group[0]) for group in groups]
        distinct = list({box for box in boxes if not box.is_empty} or {boxes[0]})
        offsets = np.array([box.offsets for box in distinct])
        assert tiling_problem(shape, offsets, np.array([box.shape for box in distinct])) is None


def test_shards_and_specs() -> None:
    layout = Layout((2, 2), ("x", "y"), ("x", "y"))
    data = np.zeros((3, 4), "f4")
    shard = layout.shard(data, (6, 8), 3)
    assert shard.data is data
    assert (shard.global_shape, shard.offsets) == ((6, 8), (3, 4))
    spec = layout.spec((6, 8), "f4", 2)
    assert (spec.shape, spec.global_shape, spec.offsets) == ((3, 4), (6, 8), (3, 0))
    with pytest.raises(LayoutError, match=r"rank 1 holds a piece of shape \(3, 4\) .* has shape \(4, 3\)"):
        layout.shard(data.T, (6, 8), 1)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (((2, 2), None, (0, 0)), LayoutError, "axis twice"),
        (((2, 2), None, (2,)), LayoutError, "axis 2 from the right does not exist"),
        (((2, 2), None, (-2,)), ConfigError, "-2 is less than -1"),
        (((2, 2), None, (1.0,)), ConfigTypeError, "1.0 is not an integer"),
        (((2, 2), None, (True,)), ConfigTypeError, "not an integer"),
        (((2, 2), None, ("x",)), ConfigError, "there are no mesh_axes"),
        (((2, 2), ("data", "model"), ("modle",)), LayoutError, "did you mean 'model'"),
        (((2, 2), ("data",), ()), ConfigError, "2 different names"),
        (((2, 2), ("data", "data"), ()), ConfigError, "2 different names"),
        (((2, 2), ("data", 1), ()), ConfigTypeError, "must hold str"),
        (((2, 2), None, ((0, (1,)),)), ConfigTypeError, "a tuple holds names or numbers"),
        (((2, 2), None, "x"), ConfigTypeError, "must be a sequence, not str"),
        (((2, 0), None, ()), ConfigError, "0 is less than 1"),
        ((4, None, ()), ConfigTypeError, "must be a sequence of integers, not int"),
        (((1 << 13, 1 << 13), None, ()), LayoutError, "ranks is more than"),
    ],
)
def test_impossible_layouts_are_refused(arguments: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        Layout(*arguments)
    assert type(caught.value) is error


def test_a_tensor_with_too_few_dimensions_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"has 1 dimensions, but the layout cuts 2"):
        Layout((2,), None, (-1, 0)).box((4,), 0)
    assert Layout((2,), None, (0, -1)).box((4,), 1) == Box((2,), (2,))
