"""The save plan: fixed cases and every sentence of a `LayoutError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from parckpt.core.describe import Held, pack, unpack
from parckpt.core.dtypes import by_name
from parckpt.core.layout import Box
from parckpt.core.plan import SavePlan, plan_save
from parckpt.errors import LayoutError

pytestmark = pytest.mark.fast

F32, F64 = by_name("float32"), by_name("float64")
OWNERS = {"integrated": False, "remove_redundancy": True, "split_replicas": True}
EVERYTHING = {"integrated": False, "remove_redundancy": False, "split_replicas": True}
INTEGRATED = {"integrated": True, "remove_redundancy": False, "split_replicas": True}
Values = Mapping[int, Sequence[tuple[str, bool]]]


def shard(name: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]) -> Held:
    return Held(name, F32, global_shape, offsets, shape, split=True)


def array(name: str, *shape: int, dtype: Any = F32, per_rank: bool = False) -> Held:
    return Held(name, dtype, shape, (0,) * len(shape), shape, per_rank=per_rank)


def plan(*ranks: Sequence[Held], values: Values | None = None, **options: Any) -> SavePlan:
    packed = [pack(rows, (values or {}).get(rank, ())) for rank, rows in enumerate(ranks)]
    distinct = list(dict.fromkeys(packed))
    which = [distinct.index(data) for data in packed]
    return plan_save([unpack(data) for data in distinct], which, [0] * len(ranks), **(OWNERS | options))


def message(*ranks: Sequence[Held], **options: Any) -> str:
    with pytest.raises(LayoutError) as caught:
        plan(*ranks, **options)
    return str(caught.value)


W0, W1 = shard("w", (8, 4), (0, 0), (4, 4)), shard("w", (8, 4), (4, 0), (4, 4))
BIAS = array("b", 3)


def test_owners_by_name() -> None:
    # All ranks hold a to e; of w, ranks 0 and 2 the upper half, 1 and 3 the lower one, and likewise of v.
    halves = [[shard(n, (8, 4), (4 * (r % 2), 0), (4, 4)) for n in ("w", "v")] for r in range(4)]
    rest = [array(n, 3) for n in ("c", "a", "e", "d", "b")]
    made = plan(*([*rest, *own] for own in halves), ownership="mindspore")
    names = [[made.tensors[t].name for t, _ in made.boxes_of(rank)] for rank in range(4)]
    assert names == [["a", "e", "v"], ["b", "v"], ["c", "w"], ["d", "w"]]
    assert not made.split_replicas


def test_owners() -> None:
    made = plan([W0, BIAS], [W1, BIAS])
    assert [row.name for row in made.tensors] == ["w", "b"]
    assert made.boxes_of(0) == [(0, W0.box), (1, Box((0,), (3,)))]
    assert made.boxes_of(1) == [(0, W1.box)]
    assert made.load().tolist() == [76, 64]
    assert made.pieces_of(0) == [(0, W0.box), (1, W1.box)]
    assert [(r.tensor, made.holders(r).tolist()) for r in made.replicas()] == [(1, [0, 1])]
    assert made.world_size == 2


def test_everything() -> None:
    made = plan([W0, BIAS], [BIAS, W1], **EVERYTHING)
    assert made.boxes_of(1) == [(1, Box((0,), (3,))), (0, W1.box)]
    assert made.box_tensor.tolist() == [0, 1, 1, 0]
    assert made.box_rank.tolist() == [0, 0, 1, 1]
    assert made.pieces_of(1) == [(0, Box((0,), (3,))), (1, Box((0,), (3,)))]


def test_large_replicas_are_cut_only_with_permission() -> None:
    big = array("big", 1024, 8192)
    made = plan([big], [big])
    assert made.boxes_of(0) == [(0, Box((0, 0), (512, 8192)))]
    assert made.boxes_of(1) == [(0, Box((512, 0), (512, 8192)))]
    assert made.split_replicas
    for options in (INTEGRATED, OWNERS | {"split_replicas": False}):
        made = plan([big], [big], **options)
        assert made.boxes_of(0) == [(0, big.box)]
        assert made.boxes_of(1) == []
        assert not made.split_replicas


def test_an_exact_cut_within_a_row_gives_several_boxes_of_one_rank() -> None:
    big = array("big", 3, 1 << 25)
    made = plan([big], [big])
    half = 1 << 24
    assert made.boxes_of(0) == [(0, Box((0, 0), (1, 1 << 25))), (0, Box((1, 0), (1, half)))]
    assert made.boxes_of(1) == [(0, Box((1, half), (1, half))), (0, Box((2, 0), (1, 1 << 25)))]


def test_per_rank_tensors_are_one_tensor_for_each_rank() -> None:
    own = array("own", 2, per_rank=True)
    made = plan([own, BIAS], [own, BIAS], **INTEGRATED)
    assert [(row.file_name, row.per_rank) for row in made.tensors] == [("own@rank_0", 0), ("b", -1), ("own@rank_1", 1)]
    assert made.boxes_of(1) == [(2, Box((0,), (2,)))]
    assert next(made.replicas()).tensor == 1
    other = plan([array("own", 2, per_rank=True)], [array("own", 5, dtype=F64, per_rank=True)])
    assert [row.global_shape for row in other.tensors] == [(2,), (5,)]  # they need not be alike


def test_scalars_and_empty_tensors_have_one_owner() -> None:
    made = plan(*[[array("s"), array("e", 0, 4)]] * 3)
    assert [row for rank in range(3) for row in made.boxes_of(rank)] == [(0, Box((), ())), (1, Box((0, 0), (0, 4)))]
    assert made.load().tolist() == [4, 0, 0]


def test_empty_shards_of_a_tensor_with_elements_are_dropped() -> None:
    made = plan([shard("w", (4,), (0,), (4,))], [shard("w", (4,), (4,), (0,))], **EVERYTHING)
    assert made.boxes_of(1) == []


def test_nothing_at_all() -> None:
    for options in (OWNERS, EVERYTHING, INTEGRATED):
        made = plan([], [], **options)
        assert made.boxes_of(1) == []
        assert made.load().tolist() == [0, 0]
        assert len(made.hash) == 32


def test_values_belong_to_the_lowest_rank_that_has_them() -> None:
    values: Values = {0: [("position", True)], 1: [("lr", False)], 2: [("lr", False), ("k", False), ("position", True)]}
    assert plan([], [], [], values=values).value_owner == {"lr": 1, "k": 2}


def test_the_hash_tells_plans_apart() -> None:
    hashes = {
        plan([W0, BIAS], [W1, BIAS]).hash,
        plan([W0, BIAS], [W1, BIAS], **INTEGRATED).hash,
        plan([W0, BIAS], [W1, BIAS], **EVERYTHING).hash,
        plan([BIAS, W0], [W1, BIAS]).hash,
        plan([W1, BIAS], [W0, BIAS]).hash,
        plan([W0, array("c", 3)], [W1, array("c", 3)]).hash,
        plan([W0, array("b", 4)], [W1, array("b", 4)]).hash,
        plan([W0, array("b", 3, dtype=F64)], [W1, array("b", 3, dtype=F64)]).hash,
        plan([W0, BIAS], [W1, BIAS], []).hash,
        plan([W0, BIAS], [W1, BIAS], values={0: [("lr", False)]}).hash,
        plan([W0, BIAS], [W1, BIAS], values={1: [("lr", False)]}).hash,
    }
    assert len(hashes) == 11
    # Who else holds a box makes no difference to what is written.
    assert plan([W0, BIAS], [W1]).hash == plan([W0, BIAS], [W1, BIAS]).hash


def test_overlaps_name_both_boxes_and_ranks() -> None:
    with pytest.raises(LayoutError) as caught:
        plan([shard("w", (8, 4), (2, 0), (4, 4))], [shard("w", (8, 4), (4, 0), (4, 4))])
    assert str(caught.value) == (
        "tensor 'w' of global shape (8, 4): the box at offsets (4, 0) of shape (4, 4) on rank 1 "
        "overlaps the box at offsets (2, 0) of shape (4, 4) on rank 0"
    )
    assert caught.value.facts == {
        "tensor": "w",
        "ranks": [1, 0],
        "boxes": [[[4, 0], [4, 4]], [[2, 0], [4, 4]]],
        "others": 0,
    }


def test_boxes_with_one_corner_overlap_too() -> None:
    assert message([W0], [W1], [shard("w", (8, 4), (0, 0), (8, 2))]) == (
        "tensor 'w' of global shape (8, 4): the box at offsets (0, 0) of shape (8, 2) on rank 2 "
        "overlaps the box at offsets (0, 0) of shape (4, 4) on rank 0"
    )


def test_gaps_name_what_is_missing() -> None:
    expected = "tensor 'w' of global shape (8, 4): no rank holds the box at (4, 0) of shape (4, 4)"
    assert message([W0], [W0]) == expected
    assert message([W0], [shard("w", (8, 4), (8, 0), (0, 4))]) == expected
    assert message([shard("w", (8, 4), (0, 0), (0, 4))]).endswith("no rank holds the box at (0, 0) of shape (8, 4)")


def test_out_of_range() -> None:
    assert message([W0], [shard("w", (8, 4), (5, 0), (4, 4))]) == (
        "tensor 'w' of global shape (8, 4): the box at offsets (5, 0) of shape (4, 4) on rank 1 is out of range"
    )
    assert "is out of range" in message([shard("w", (8, 4), (-1, 0), (4, 4))])
    assert "is out of range" in message([W0, W1], [shard("w", (8, 4), (9, 0), (0, 4))])


def test_disagreements_name_both_ranks() -> None:
    w = array("w", 8, 4)
    assert message([w], [w], [array("w", 8, 4, dtype=F64)]) == (
        "tensor 'w': dtype differs: float32 on rank 0, float64 on rank 2"
    )
    assert message([W0], [shard("w", (6, 4), (4, 0), (2, 4))]) == (
        "tensor 'w': global shape differs: (8, 4) on rank 0, (6, 4) on rank 1"
    )
    assert message([W0], [shard("w", (8,), (4,), (4,))]).endswith("(8, 4) on rank 0, (8,) on rank 1")
    assert message([w], [array("w", 7, 4)]) == (
        "tensor 'w': global shape differs: (8, 4) on rank 0, (7, 4) on rank 1; "
        "if these are pieces of one tensor, wrap them in Shard; if each rank has its own, in PerRank"
    )


def test_array_on_one_rank_and_shard_on_another_even_if_the_box_agrees() -> None:
    assert message([array("w", 8, 4)], [shard("w", (8, 4), (0, 0), (8, 4))]) == (
        "tensor 'w': kind differs: array on rank 0, Shard on rank 1"
    )


def test_per_rank_on_one_rank_only() -> None:
    assert message([array("w", 2, per_rank=True)], [array("w", 2)]) == (
        "tensor 'w' is PerRank on rank 0 and not on rank 1"
    )
    own = array("w", 2, per_rank=True)
    assert message([BIAS], [own, own]) == "tensor 'w' is PerRank twice on rank 1"


def test_one_rank_may_not_hold_a_box_twice() -> None:
    assert message([W0, W1, W0]) == (
        "tensor 'w' of global shape (8, 4): the box at offsets (0, 0) of shape (4, 4) on rank 0 is there twice"
    )
    assert "overlaps" in message([shard("w", (4,), (0,), (3,)), shard("w", (4,), (2,), (2,))])


def test_the_first_wrong_tensor_is_named_and_the_others_counted() -> None:
    a, c = array("a", 2), array("c", 2)
    one = message([BIAS, W0, a], [BIAS, W0, array("a", 3)])
    assert one.startswith("tensor 'w'")
    assert one.endswith("; 1 other tensor has a wrong layout too")
    two = message([BIAS, W0, a, c], [BIAS, W0, array("a", 3), array("c", 3)])
    assert two.endswith("; 2 other tensors have a wrong layout too")


def test_values_that_are_tensors_elsewhere() -> None:
    assert message([BIAS], [], values={1: [("b", False)]}) == "'b' is a tensor on rank 0 and a plain value on rank 1"
    assert message([], [], values={0: [("x", True)], 1: [("x", False)]}) == (
        "'x' is PerRank on rank 0 and a plain value on rank 1"
    )
    own = [array("x", 2, per_rank=True)]
    assert plan(own, [], values={1: [("x", True)]}).value_owner == {}  # each rank has its own, of whatever kind


def test_names_that_collide_in_the_common_file() -> None:
    ranks = [array("w", 2, per_rank=True), array("w@rank_0", 3)]
    assert message(ranks, **INTEGRATED) == (
        "tensor 'w@rank_0' has the name of the PerRank tensor 'w' of rank 0 in the file"
    )
    with pytest.raises(LayoutError, match="w@rank_0"):  # nor in files of their own: both are opened by that name
        plan(ranks)


def test_many_tensors_cut_alike_are_each_checked() -> None:
    """Equal layouts are judged once; a tensor that lacks a column block is still found among its likes."""
    ranks: list[list[Held]] = [[], []]
    for number in range(50):
        for rank in range(2):
            ranks[rank].append(shard(f"w{number}", (4, 6), (0, 3 * rank), (4, 3)))
    assert len(plan(*ranks).tensors) == 50
    del ranks[1][37]
    assert message(*ranks) == "tensor 'w37' of global shape (4, 6): no rank holds the box at (0, 3) of shape (4, 3)"
