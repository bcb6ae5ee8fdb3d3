"""Boxes from any split tile the tensor; linear ranges and cuts are what numpy says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

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
)
from parckpt.testing.strategies import shapes, splits


def numbers(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(math.prod(shape)).reshape(shape)


def problem(shape: tuple[int, ...], boxes: list[Box]) -> TilingProblem | None:
    offsets = np.array([b.offsets for b in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    lengths = np.array([b.shape for b in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    return tiling_problem(shape, offsets, lengths)


def cover_counts(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray[Any, np.dtype[np.int64]]:
    counts = np.zeros(shape, dtype=np.int64)
    for box in boxes:
        counts[slices(box, (0,) * len(shape))] += 1
    return counts


def boxes_within(shape: tuple[int, ...]) -> st.SearchStrategy[Box]:
    pairs = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    return st.tuples(*pairs).map(lambda ends: Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends)))


@settings(deadline=None)
@given(st.data(), shapes())
def test_any_split_tiles(data: st.DataObject, shape: tuple[int, ...]) -> None:
    assert problem(shape, data.draw(splits(shape))) is None


@settings(deadline=None)
@given(st.data(), shapes(min_extent=1))
def test_what_is_removed_from_a_split_is_found_missing(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(splits(shape))
    removed = boxes.pop()
    found = problem(shape, boxes)
    assert found is not None
    assert found.kind == "gap"
    assert found.box == removed  # the only gap, and it is named whole


@settings(deadline=None, max_examples=300)
@given(st.data(), shapes(max_ndim=3))
def test_any_boxes_are_judged_as_counting_elements_does(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(splits(shape))
    boxes = list(dict.fromkeys(boxes + data.draw(st.lists(boxes_within(shape), max_size=2))))
    boxes = boxes[data.draw(st.integers(0, 1)) :]
    counts = cover_counts(shape, boxes)
    found = problem(shape, boxes)
    if (counts == 1).all():
        assert found is None
    elif (counts > 1).any():
        assert found is not None
        assert found.kind == "overlap"
        assert found.first is not None
        assert found.second is not None
        assert intersect(boxes[found.first], boxes[found.second]) is not None
    else:
        assert found is not None
        assert found.kind == "gap"
        assert found.box is not None
        assert not found.box.is_empty
        assert not counts[slices(found.box, (0,) * len(shape))].any()


@settings(deadline=None)
@given(st.data(), shapes())
def test_range_boxes_are_the_linear_range(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    start, stop = sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))
    boxes = range_boxes(shape, start, stop)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(not box.is_empty for box in boxes)
    flat = [numbers(shape)[slices(box, (0,) * len(shape))].reshape(-1) for box in boxes]
    # One behind the other and each contiguous: the concatenation is the range itself.
    assert np.concatenate([np.empty(0, dtype=np.int64), *flat]).tolist() == list(range(start, stop))


@settings(deadline=None)
@given(st.data(), shapes(min_extent=1))
def test_cuts_are_ranges_of_the_box_itself(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box = data.draw(st.sampled_from(data.draw(splits(shape))))
    nelements = data.draw(st.integers(0, box.size))
    values = numbers(shape)
    origin = (0,) * len(shape)
    head, rest = ([values[slices(b, origin)].reshape(-1) for b in part] for part in cut_box(box, nelements))
    expected = values[slices(box, origin)].reshape(-1)
    empty = np.empty(0, dtype=np.int64)
    assert np.concatenate([empty, *head]).tolist() == expected[:nelements].tolist()
    assert np.concatenate([empty, *rest]).tolist() == expected[nelements:].tolist()


@settings(deadline=None)
@given(st.data(), shapes(max_ndim=3))
def test_intersection_is_the_common_elements(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(boxes_within(shape)), data.draw(boxes_within(shape))
    both = cover_counts(shape, [a]) * cover_counts(shape, [b])
    found = intersect(a, b)
    assert found == intersect(b, a)
    if found is None:
        assert not both.any()
    else:
        assert (cover_counts(shape, [found]) == both).all()
        assert contains(a, found)
        assert contains(b, found)
        local = numbers(shape)[slices(a, (0,) * len(shape))]
        expected = numbers(shape)[slices(found, (0,) * len(shape))]
        assert (local[slices(found, a.offsets)] == expected).all()
        assert shift(found, a.offsets).shape == found.shape


@settings(deadline=None)
@given(st.data(), shapes(max_ndim=3, min_extent=1), st.sampled_from([1, 2, 4, 8]))
def test_byte_boxes_count_bytes(data: st.DataObject, shape: tuple[int, ...], itemsize: int) -> None:
    box = data.draw(boxes_within(shape))
    raw = numbers(shape).astype(f"u{itemsize}").reshape(*shape, 1).view(np.uint8)
    whole_bytes = raw[slices(byte_box(box, itemsize), (0,) * (len(shape) + 1))]
    direct = np.ascontiguousarray(numbers(shape)[slices(box, (0,) * len(shape))].astype(f"u{itemsize}"))
    assert whole_bytes.tobytes() == direct.tobytes()
