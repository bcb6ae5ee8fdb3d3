"""Shard, PerRank, Leaf, Spec, and the ways to make Shards."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from parckpt.core.layout import Box
from parckpt.core.leaves import Leaf, PerRank, Shard, Spec
from parckpt.core.shards import flat_shards, stack_offsets, stack_row, stacked
from parckpt.errors import ConfigError, ConfigTypeError, LayoutError, ParckptError
from parckpt.sharding import stack
from parckpt.testing.world import run_world

pytestmark = pytest.mark.fast


def leaf(shape=(2,), dtype="float32"):
    return Leaf(shape, dtype, read_into=lambda out: None)


def test_a_shard_keeps_the_array_and_plain_tuples():
    data = np.zeros((2, 3), ">f4")[:, ::-1]
    shard = Shard(data, [4, np.int64(3)], np.array([2, 0]))
    assert shard.data is data
    assert (shard.global_shape, shard.offsets, shard.shape) == ((4, 3), (2, 0), (2, 3))
    assert all(type(number) is int for number in shard.global_shape + shard.offsets)
    assert shard.dtype.name == "float32"


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,) * 8])
def test_any_shape_can_be_a_shard(shape):
    assert Shard(np.zeros(shape, ml_dtypes.bfloat16), shape, (0,) * len(shape)).shape == shape


def test_a_shard_outside_its_tensor_is_left_to_the_planning_of_all_ranks():
    assert Shard(np.zeros(3), (4,), (2,)).offsets == (2,)
    assert Shard(np.zeros(3), (4,), (-1,)).offsets == (-1,)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ((np.zeros(3), (3, 1), (0,)), ConfigError),
        ((np.zeros(3), (3,), (0, 0)), ConfigError),
        ((np.zeros(3), (-3,), (0,)), ConfigError),
        (([1, 2], (2,), (0,)), ConfigTypeError),
        ((np.ma.zeros(3), (3,), (0,)), ConfigTypeError),
        ((np.float32(1), (), ()), ConfigTypeError),
        ((np.zeros(3), 3, (0,)), ConfigTypeError),
        ((np.zeros(3), "3", (0,)), ConfigTypeError),
        ((np.zeros(3), (3.0,), (0,)), ConfigTypeError),
        ((np.zeros(3), (True,), (0,)), ConfigTypeError),
        ((np.zeros(3), (3,), None), ConfigTypeError),
    ],
)
def test_a_shard_checks_what_it_can(arguments, kind):
    with pytest.raises(kind) as caught:
        Shard(*arguments)
    assert type(caught.value) is kind


def test_leaf_and_spec_take_any_name_of_a_type():
    for dtype in ("bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16), leaf(dtype="bfloat16").dtype):
        assert leaf(dtype=dtype).dtype.name == "bfloat16"
    assert Spec((2,), "<i8").dtype.name == "int64"
    assert Spec((2,), "int4").dtype.name == "int4"
    for wrong in (None, "no such type", "U3", object, [("a", "i4")], 3.5):
        with pytest.raises(ConfigTypeError):
            Spec((2,), wrong)


def test_leaf_wants_callables():
    with pytest.raises(ConfigTypeError, match="read_into"):
        Leaf((2,), "f4", read_into=np.zeros(2))
    with pytest.raises(ConfigTypeError, match="write_from"):
        Leaf((2,), "f4", read_into=lambda out: None, write_from=3)
    with pytest.raises(ConfigError, match="negative"):
        leaf(shape=(-1,))


def test_spec_is_the_whole_tensor_or_a_box():
    whole, box = Spec((2, 3), "f4"), Spec((2, 3), "f4", (4, 3), (2, 0))
    assert (whole.global_shape, whole.offsets, whole.split) == ((2, 3), (0, 0), False)
    assert (box.global_shape, box.offsets, box.split) == ((4, 3), (2, 0), True)
    with pytest.raises(ConfigError, match="both or none"):
        Spec((2,), "f4", global_shape=(4,))
    with pytest.raises(ConfigError, match="equally many"):
        Spec((2,), "f4", (4, 3), (0, 0))


def test_per_rank_knows_what_to_do_on_resize():
    assert PerRank(3).on_resize == "error"
    assert PerRank(3, on_resize="keep").on_resize == "keep"
    assert callable(PerRank(3, on_resize=max).on_resize)
    with pytest.raises(ConfigError, match="drop"):
        PerRank(3, on_resize="drop")
    with pytest.raises(ConfigTypeError):
        PerRank(3, on_resize=None)


def assemble(shards, global_shape):
    """The tensor, and how often each element was given."""
    tensor, times = np.full(global_shape, -1.0), np.zeros(global_shape, int)
    for shard in shards:
        index = tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.shape, strict=True))
        tensor[index] = shard.data
        times[index] += 1
    return tensor, times


@pytest.mark.parametrize("cuts", [(0, 24), (0, 1, 24), (0, 5, 13, 24), (0, 11, 11, 17, 24)])
def test_flat_ranges_of_a_box_tile_it_in_order(cuts):
    box = Box((1, 0, 2), (2, 3, 4))
    flat = np.arange(24.0)
    shards = [
        shard for start, stop in pairwise(cuts) for shard in flat_shards(flat[start:stop], (4, 3, 7), box, start, stop)
    ]
    tensor, times = assemble(shards, (4, 3, 7))
    inside = np.s_[1:3, 0:3, 2:6]
    assert (tensor[inside] == flat.reshape(2, 3, 4)).all()
    assert (times[inside] == 1).all()
    assert times.sum() == 24


def test_flat_shards_are_views():
    flat = np.zeros(10)[::2]
    shards = flat_shards(flat, (2, 4), None, 2, 7)
    for shard in shards:
        assert np.shares_memory(shard.data, flat)
        shard.data[...] = 7
    assert (flat == 7).all()
    assert flat_shards(flat, (2, 4), ((0, 0), (2, 4)), 2, 7)[0].offsets == shards[0].offsets


@pytest.mark.parametrize(
    ("global_shape", "box", "position", "shapes"),
    [
        ((4, 3), None, 5, [(0, 3)]),
        ((4, 0), None, 0, [(4, 0)]),
        ((4, 3), Box((1, 1), (2, 2)), 4, [(0, 2)]),
        ((), None, 0, []),
        ((), None, 1, []),
    ],
)
def test_an_empty_flat_range_still_names_the_tensor(global_shape, box, position, shapes):
    shards = flat_shards(np.zeros(0), global_shape, box, position, position)
    assert [shard.shape for shard in shards] == shapes


def test_a_flat_range_of_a_scalar():
    (shard,) = flat_shards(np.array([3.0]), (), None, 0, 1)
    assert (shard.shape, float(shard.data)) == ((), 3.0)


@pytest.mark.parametrize(
    ("data", "start", "stop", "kind"),
    [
        (np.zeros(3), 0, 4, ConfigError),
        (np.zeros(3), 10, 13, ConfigError),
        (np.zeros(3), -1, 2, ConfigError),
        (np.zeros(0), 4, 3, ConfigError),
        (np.zeros((1, 3)), 0, 3, ConfigTypeError),
        ([1.0, 2.0], 0, 2, ConfigTypeError),
    ],
)
def test_flat_shards_refuses_what_does_not_fit(data, start, stop, kind):
    with pytest.raises(kind):
        flat_shards(data, (4, 3), None, start, stop)


def test_offsets_of_stacked_lengths():
    assert [stack_offsets([3, 0, 2], rank) for rank in range(3)] == [(0, 5), (3, 5), (3, 5)]
    with pytest.raises(LayoutError):
        stack_offsets([3, -1], 0)


@pytest.mark.parametrize("axis", [1, -1])
def test_pieces_stack_along_an_axis(axis):
    pieces = [np.zeros((2, length), "f4") for length in (3, 0, 4)]
    rows = np.stack([stack_row(piece, axis) for piece in pieces])
    shards = [stacked(piece, rows, rank) for rank, piece in enumerate(pieces)]
    assert [shard.offsets for shard in shards] == [(0, 0), (0, 3), (0, 3)]
    assert {shard.global_shape for shard in shards} == {(2, 7)}
    assert shards[2].data is pieces[2]


@pytest.mark.parametrize(
    ("other", "axis", "told"),
    [
        (np.zeros((4, 3), "f4"), 0, r"rank 0 has float32 of shape \(2, 2\).*rank 1 has float32 of shape \(4, 3\)"),
        (np.zeros((2, 2), "f8"), 0, "float64"),
        (np.zeros((2, 2), "f4"), 1, "axis 1"),
        (np.zeros((2, 2, 1), "f4"), 0, r"\(2, 2, 1\)"),
    ],
)
def test_pieces_that_differ_do_not_stack_on_any_rank(other, axis, told):
    pieces = [np.zeros((2, 2), "f4"), other]
    rows = np.stack([stack_row(pieces[0], 0), stack_row(other, axis)])
    for rank, piece in enumerate(pieces):
        with pytest.raises(LayoutError, match=told):
            stacked(piece, rows, rank)


def test_shard_stack_over_four_ranks():
    def rank_main(comm, rank):
        return Shard.stack(np.full((rank, 2), float(rank)), comm)

    shards = run_world(4, rank_main)
    tensor, times = assemble(shards, (6, 2))
    assert {shard.global_shape for shard in shards} == {(6, 2)}
    assert (times == 1).all()
    assert tensor[:, 0].tolist() == [1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([np.zeros((2, 3)), np.zeros((2, 4))], LayoutError),
        ([np.zeros((2, 3)), [1, 2]], ConfigTypeError),
        ([np.zeros(3), np.zeros(())], ConfigError),
    ],
)
def test_shard_stack_raises_the_same_on_all_ranks(pieces, kind):
    def rank_main(comm, rank):
        try:
            stack(pieces[rank], comm)
        except ParckptError as error:
            return type(error), str(error)
        return None

    first, second = run_world(2, rank_main)
    assert first == second
    assert first[0] is kind
