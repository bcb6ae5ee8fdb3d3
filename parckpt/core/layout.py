"""Half-open boxes of tensors: cutting them, comparing them, and proving that they tile a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from parckpt.errors import LayoutError

__all__ = [
    "Box",
    "TilingProblem",
    "byte_box",
    "contains",
    "cut_box",
    "intersect",
    "range_boxes",
    "shift",
    "slices",
    "tiling_problem",
    "whole",
]

Ints = npt.NDArray[np.int64]

# Pairs of boxes compared at once while looking for overlaps: 1 Mi pairs keep the temporaries near 20 MB.
_PAIRS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Box:
    """A half-open box of elements.

    Attributes
    ----------
    offsets, shape : tuple of int
        First element and extent in every dimension, in elements.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements; 1 for a 0-d box."""
        return math.prod(self.shape)

    @property
    def stop(self) -> tuple[int, ...]:
        """First element behind the box in every dimension."""
        return tuple(o + s for o, s in zip(self.offsets, self.shape, strict=True))

    @property
    def is_empty(self) -> bool:
        """True if some extent is 0."""
        return 0 in self.shape

    def __str__(self) -> str:
        return f"the box at offsets {self.offsets} of shape {self.shape}"


@dataclass(frozen=True)
class TilingProblem:
    """Why some boxes do not tile a tensor.

    Attributes
    ----------
    kind : str
        ``"out_of_range"``, ``"overlap"`` or ``"gap"``.
    box : Box or None
        A box that no given box covers (for a gap).
    first, second : int or None
        Indices of the offending boxes: one that is out of range, or two that overlap.
    """

    kind: Literal["out_of_range", "overlap", "gap"]
    box: Box | None = None
    first: int | None = None
    second: int | None = None


def whole(shape: Sequence[int]) -> Box:
    """Return the box of a complete tensor."""
    return Box((0,) * len(shape), tuple(shape))


def intersect(a: Box, b: Box) -> Box | None:
    """Return the elements in both boxes, or None if there are none. 0-d boxes intersect to themselves."""
    offsets = tuple(map(max, a.offsets, b.offsets))
    stop = tuple(map(min, a.stop, b.stop))
    if any(first >= last for first, last in zip(offsets, stop, strict=True)):
        return None
    return Box(offsets, tuple(last - first for first, last in zip(offsets, stop, strict=True)))


def contains(outer: Box, inner: Box) -> bool:
    """Whether `inner` lies within `outer`, judged by its bounds even where it is empty."""
    starts_inside = all(o <= i for o, i in zip(outer.offsets, inner.offsets, strict=True))
    return starts_inside and all(i <= o for o, i in zip(outer.stop, inner.stop, strict=True))


def shift(box: Box, by: Sequence[int]) -> Box:
    """Return `box` in the coordinates of an array whose first element is at `by`."""
    return Box(tuple(o - b for o, b in zip(box.offsets, by, strict=True)), box.shape)


def slices(box: Box, origin: Sequence[int]) -> tuple[slice, ...]:
    """Return the index of `box` in an array whose first element is at `origin`."""
    local = shift(box, origin)
    return tuple(slice(first, last) for first, last in zip(local.offsets, local.stop, strict=True))


def range_boxes(shape: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
    """Cover a range of an array's C-order element numbers with boxes.

    Parameters
    ----------
    shape : sequence of int
        Shape of the array.
    start, stop : int
        Half-open range of linear element numbers.

    Returns
    -------
    tuple of Box
        Non-empty boxes in C order, each contiguous in that order, at most ``2 * ndim - 1`` (one for 0-d).

    Raises
    ------
    LayoutError
        If the range does not lie within the array.
    """
    if not 0 <= start <= stop <= math.prod(shape):
        raise LayoutError(f"elements [{start}, {stop}) do not lie within an array of shape {tuple(shape)}")
    return tuple(_range_boxes((), tuple(shape), start, stop))


def _range_boxes(index: tuple[int, ...], shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Boxes of the range in the sub-array `array[index]`, whose shape is `shape`."""
    if start == stop:
        return []
    ones = (1,) * len(index)
    if not shape:
        return [Box(index, ones)]
    inner = shape[1:]
    row_size = math.prod(inner)
    row, last_row = start // row_size, (stop - 1) // row_size
    if row == last_row and stop - start < row_size:
        return _range_boxes((*index, row), inner, start - row * row_size, stop - row * row_size)
    boxes: list[Box] = []
    if start % row_size:
        boxes += _range_boxes((*index, row), inner, start % row_size, row_size)
        row += 1
    full_stop, tail = divmod(stop, row_size)
    if full_stop > row:
        boxes.append(Box((*index, row, *(0,) * len(inner)), (*ones, full_stop - row, *inner)))
    if tail:
        boxes += _range_boxes((*index, full_stop), inner, 0, tail)
    return boxes


def cut_box(box: Box, nelements: int) -> tuple[tuple[Box, ...], tuple[Box, ...]]:
    """Cut a box behind its first `nelements` elements in (its own) C order.

    Returns
    -------
    head, rest : tuple of Box
        Boxes in C order; together they tile `box`.

    Raises
    ------
    LayoutError
        If the box has fewer elements.
    """
    back = tuple(-o for o in box.offsets)
    head = range_boxes(box.shape, 0, nelements)
    rest = range_boxes(box.shape, nelements, box.size)
    return tuple(shift(b, back) for b in head), tuple(shift(b, back) for b in rest)


def byte_box(box: Box, itemsize: int) -> Box:
    """Append a dimension that counts the bytes of one element, so that linear ranges become byte ranges."""
    return Box((*box.offsets, 0), (*box.shape, itemsize))


def tiling_problem(
    global_shape: Sequence[int], offsets: npt.NDArray[Any], shapes: npt.NDArray[Any]
) -> TilingProblem | None:
    """Find out why boxes do not tile a tensor.

    Parameters
    ----------
    global_shape : sequence of int
        Shape of the tensor.
    offsets, shapes : int64 array of shape (n, ndim)
        The boxes, all different. Empty ones only have to be in range.

    Returns
    -------
    TilingProblem or None
        The first problem, in the order out of range, overlap, gap; None if every element is in exactly one box.
    """
    bounds = np.asarray(global_shape, dtype=np.int64)
    begins = np.asarray(offsets, dtype=np.int64)
    ends = begins + np.asarray(shapes, dtype=np.int64)
    outside = ((begins < 0) | (ends < begins) | (ends > bounds)).any(axis=1)
    if outside.any():
        return TilingProblem("out_of_range", first=int(outside.argmax()))
    kept = np.flatnonzero((ends > begins).all(axis=1))
    if len(kept) < len(begins):
        begins, ends = begins[kept], ends[kept]
    if _is_grid(bounds, begins, ends):
        return None
    pair = _overlap(begins, ends)
    if pair is not None:
        return TilingProblem("overlap", first=int(kept[pair[0]]), second=int(kept[pair[1]]))
    # Without overlaps and within range the sizes add up to at most the tensor's, so the sum cannot overflow.
    if int((ends - begins).prod(axis=1).sum()) == int(bounds.prod()):
        return None
    return TilingProblem("gap", box=_gap(bounds, begins, ends))


def _is_grid(bounds: Ints, begins: Ints, ends: Ints) -> bool:
    """Whether the boxes are all cells of one rectilinear grid over the tensor: the common case, proved by sorting."""
    count = len(begins)
    if count == 0:
        return bool((bounds == 0).any())
    cell = np.zeros(count, dtype=np.int64)
    ncells = 1
    for axis in range(len(bounds)):
        firsts, index = np.unique(begins[:, axis], return_inverse=True)
        index = index.reshape(count)  # numpy 2.0 alone returns the input's shape for some arguments
        lasts = np.append(firsts[1:], bounds[axis])
        ncells *= len(firsts)
        if firsts[0] != 0 or ncells > count or (ends[:, axis] != lasts[index]).any():
            return False
        cell = cell * len(firsts) + index
    return ncells == count and bool((np.bincount(cell, minlength=count) == 1).all())


def _overlap(begins: Ints, ends: Ints) -> tuple[int, int] | None:
    """Two non-empty boxes with a common element, lower index first, or None."""
    count, ndim = begins.shape
    if count < 2:
        return None
    if ndim == 0:
        return 0, 1
    order, partners = min((_sweep(begins[:, k], ends[:, k]) for k in range(ndim)), key=lambda found: found[1].sum())
    begins, ends = begins[order], ends[order]
    before = np.concatenate([[0], np.cumsum(partners)])
    first = 0
    while first < count:
        last = max(first + 1, int(np.searchsorted(before, before[first] + _PAIRS_AT_ONCE, side="right")) - 1)
        left = np.repeat(np.arange(first, last), partners[first:last])
        right = left + 1 + np.arange(len(left)) - np.repeat(before[first:last] - before[first], partners[first:last])
        for axis in range(ndim):  # one at a time: each leaves only a fraction of the pairs to the next
            low, high = begins[:, axis], ends[:, axis]
            meet = (low[left] < high[right]) & (low[right] < high[left])
            left, right = left[meet], right[meet]
        if len(left):
            a, b = sorted((int(order[left[0]]), int(order[right[0]])))
            return a, b
        first = last
    return None


def _sweep(begins: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Sort boxes by their beginning along one axis and count, for each, the later ones that begin before it ends.

    Only those can meet it. For n cubes in 3-d, any axis leaves about ``n ** (5 / 3)`` pairs of the ``n ** 2``.
    """
    order = np.argsort(begins, kind="stable").astype(np.int64)
    reach = np.searchsorted(begins[order], ends[order]).astype(np.int64)
    return order, reach - np.arange(1, len(begins) + 1)


def _gap(bounds: Ints, begins: Ints, ends: Ints) -> Box:
    """Return an uncovered box, given that boxes do not overlap and do not fill the tensor.

    Along each axis in turn: in the first slab whose cross section is not full, look for the gap among the boxes that
    cross that slab.
    """
    ndim = len(bounds)
    gap_begin = np.zeros(ndim, dtype=np.int64)
    gap_end = bounds.copy()
    inside = np.arange(len(begins))
    for axis in range(ndim):
        firsts, lasts = begins[inside, axis], ends[inside, axis]
        cuts = np.unique(np.concatenate([firsts, lasts, [0, bounds[axis]]]))
        section = (ends[inside, axis + 1 :] - begins[inside, axis + 1 :]).prod(axis=1)
        change = np.zeros(len(cuts), dtype=np.int64)
        np.add.at(change, np.searchsorted(cuts, firsts), section)
        np.subtract.at(change, np.searchsorted(cuts, lasts), section)
        slab = int(np.argmax(np.cumsum(change)[:-1] < bounds[axis + 1 :].prod()))
        gap_begin[axis], gap_end[axis] = cuts[slab], cuts[slab + 1]
        inside = inside[(firsts <= cuts[slab]) & (lasts > cuts[slab])]
    for axis in range(ndim):  # grow it, so that a missing shard is named whole and not in slices
        others = [k for k in range(ndim) if k != axis]
        beside = ((begins[:, others] < gap_end[others]) & (ends[:, others] > gap_begin[others])).all(axis=1)
        below = ends[beside & (ends[:, axis] <= gap_begin[axis]), axis]
        above = begins[beside & (begins[:, axis] >= gap_end[axis]), axis]
        gap_begin[axis] = below.max(initial=0)
        gap_end[axis] = above.min(initial=bounds[axis])
    return Box(tuple(gap_begin.tolist()), tuple((gap_end - gap_begin).tolist()))
