"""Boxes: fixed cases."""

from __future__ import annotations

import numpy as np
import pytest

from parckpt.core.layout import (
    Box,
    TilingProblem,
    byte_box,
    contains,
    cut_box,
    intersect,
    range_boxes,
    shift,
    slices,
    tiling_problem,
    whole,
)
from parckpt.errors import LayoutError

pytestmark = pytest.mark.fast


def problem(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> TilingProblem | None:
    offsets = np.array([b[0] for b in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    shapes = np.array([b[1] for b in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    return tiling_problem(shape, offsets, shapes)


def test_box_facts() -> None:
    box = Box((2, 0), (3, 4))
    assert (box.size, box.stop, box.is_empty) == (12, (5, 4), False)
    assert Box((), ()).size == 1
    assert not Box((), ()).is_empty
    assert Box((1,), (0,)).is_empty
    assert whole((3, 2)) == Box((0, 0), (3, 2))
    assert str(box) == "the box at offsets (2, 0) of shape (3, 4)"


def test_intersect() -> None:
    assert intersect(Box((0, 0), (4, 4)), Box((2, 3), (4, 4))) == Box((2, 3), (2, 1))
    assert intersect(Box((0,), (4,)), Box((4,), (4,))) is None
    assert intersect(Box((0,), (4,)), Box((2,), (0,))) is None
    assert intersect(Box((), ()), Box((), ())) == Box((), ())


def test_contains() -> None:
    assert contains(Box((0, 0), (4, 4)), Box((1, 0), (3, 4)))
    assert not contains(Box((0, 0), (4, 4)), Box((1, 0), (4, 4)))
    assert not contains(Box((1,), (4,)), Box((0,), (2,)))
    assert contains(Box((), ()), Box((), ()))


def test_local_coordinates() -> None:
    box = Box((5, 7), (2, 3))
    assert shift(box, (4, 7)) == Box((1, 0), (2, 3))
    assert slices(box, (4, 7)) == (slice(1, 3), slice(0, 3))
    assert byte_box(box, 8) == Box((5, 7, 0), (2, 3, 8))


def test_range_of_a_matrix_is_head_middle_tail() -> None:
    assert range_boxes((4, 5), 3, 17) == (Box((0, 3), (1, 2)), Box((1, 0), (2, 5)), Box((3, 0), (1, 2)))
    assert range_boxes((4, 5), 5, 15) == (Box((1, 0), (2, 5)),)
    assert range_boxes((4, 5), 6, 8) == (Box((1, 1), (1, 2)),)


def test_range_of_0d_and_empty_arrays() -> None:
    assert range_boxes((), 0, 1) == (Box((), ()),)
    assert range_boxes((), 0, 0) == ()
    assert range_boxes((3, 0), 0, 0) == ()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 21)])
def test_range_outside_the_array_is_refused(start: int, stop: int) -> None:
    with pytest.raises(LayoutError, match="shape"):
        range_boxes((4, 5), start, stop)


def test_cut_keeps_the_place_in_the_tensor() -> None:
    head, rest = cut_box(Box((10, 20), (2, 3)), 4)
    assert head == (Box((10, 20), (1, 3)), Box((11, 20), (1, 1)))
    assert rest == (Box((11, 21), (1, 2)),)


def test_tilings_without_a_problem() -> None:
    assert problem((8, 4), ((0, 0), (4, 4)), ((4, 0), (4, 4))) is None
    assert problem((), ((), ())) is None
    assert problem((0, 4)) is None
    assert problem((0, 4), ((0, 0), (0, 4))) is None
    assert problem((4,), ((2,), (0,)), ((0,), (4,)), ((4,), (0,))) is None


def test_a_pinwheel_is_a_tiling_though_not_a_grid() -> None:
    assert (
        problem(
            (3, 3),
            ((0, 0), (1, 2)),
            ((0, 2), (2, 1)),
            ((2, 1), (1, 2)),
            ((1, 0), (2, 1)),
            ((1, 1), (1, 1)),
        )
        is None
    )


def test_a_hole_in_a_pinwheel_is_found() -> None:
    found = problem((3, 3), ((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)))
    assert found == TilingProblem("gap", box=Box((1, 1), (1, 1)))


def test_overlap_names_both_boxes() -> None:
    assert problem((8, 4), ((4, 0), (4, 4)), ((2, 0), (4, 4))) == TilingProblem("overlap", first=0, second=1)
    # Same corner, same volume as the tensor in all, and an empty box before them that must not shift the indices.
    found = problem((4, 4), ((0, 0), (0, 4)), ((0, 0), (2, 4)), ((0, 0), (4, 2)))
    assert found == TilingProblem("overlap", first=1, second=2)


def test_gap_names_the_missing_shard_whole() -> None:
    assert problem((8, 4), ((0, 0), (4, 4))) == TilingProblem("gap", box=Box((4, 0), (4, 4)))
    assert problem((4, 4), ((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 2), (2, 2))) == TilingProblem(
        "gap", box=Box((2, 0), (2, 2))
    )
    assert problem((3,)) == TilingProblem("gap", box=Box((0,), (3,)))
    assert problem(()) == TilingProblem("gap", box=Box((), ()))


def test_out_of_range_comes_first_and_counts_for_empty_boxes() -> None:
    assert problem((4,), ((0,), (4,)), ((0,), (4,)), ((2,), (3,))) == TilingProblem("out_of_range", first=2)
    assert problem((4,), ((0,), (4,)), ((5,), (0,))) == TilingProblem("out_of_range", first=1)
    assert problem((4,), ((-1,), (5,))) == TilingProblem("out_of_range", first=0)
    assert problem((4,), ((3,), (-1,))) == TilingProblem("out_of_range", first=0)


def test_many_irregular_boxes() -> None:
    """4,096 cells whose borders differ from row to row: neither a grid nor a list of row ranges."""
    offsets, shapes = [], []
    for row in range(64):
        cuts = np.concatenate([[0], np.sort(np.random.default_rng(row).choice(4095, 63, replace=False) + 1), [4096]])
        offsets += [(row, c) for c in cuts[:-1]]
        shapes += [(1, s) for s in np.diff(cuts)]
    full = tiling_problem((64, 4096), np.array(offsets), np.array(shapes))
    assert full is None
    holed = tiling_problem((64, 4096), np.array(offsets[:100] + offsets[101:]), np.array(shapes[:100] + shapes[101:]))
    assert holed == TilingProblem("gap", box=Box(tuple(map(int, offsets[100])), tuple(map(int, shapes[100]))))
