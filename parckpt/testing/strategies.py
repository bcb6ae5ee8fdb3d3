"""Hypothesis strategies: tensors cut into boxes, jobs that hold them, and replicas as pure numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from parckpt.core.describe import Held
from parckpt.core.dtypes import by_name
from parckpt.core.layout import Box, whole
from parckpt.core.ownership import Replicas

__all__ = ["job_layouts", "replica_numbers", "shapes", "splits"]

_DTYPES = [by_name(name) for name in ("bool", "int8", "float16", "float32", "float64", "complex128")]


def shapes(max_ndim: int = 4, max_extent: int = 6, min_extent: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes from 0-d on; with a 0 among the extents unless `min_extent` forbids it."""
    return st.lists(st.integers(min_extent, max_extent), max_size=max_ndim).map(tuple)


@st.composite
def splits(draw: st.DrawFn, shape: tuple[int, ...], max_cuts: int = 6) -> list[Box]:
    """Boxes that tile a tensor: it is cut in two, then one of the parts, and so on."""
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, max_cuts))):
        at = draw(st.integers(0, len(boxes) - 1))
        axes = [axis for axis, extent in enumerate(boxes[at].shape) if extent > 1]
        if not axes:
            continue
        axis = draw(st.sampled_from(axes))
        boxes[at : at + 1] = _halves(boxes[at], axis, draw(st.integers(1, boxes[at].shape[axis] - 1)))
    return draw(st.permutations(boxes))


def _halves(box: Box, axis: int, length: int) -> tuple[Box, Box]:
    first, rest, offsets = list(box.shape), list(box.shape), list(box.offsets)
    first[axis] = length
    rest[axis] -= length
    offsets[axis] += length
    return Box(box.offsets, tuple(first)), Box(tuple(offsets), tuple(rest))


def _holders(nranks: int) -> st.SearchStrategy[set[int]]:
    return st.sets(st.integers(0, nranks - 1), min_size=1)


@st.composite
def job_layouts(draw: st.DrawFn, max_ranks: int = 5, max_tensors: int = 5) -> list[list[Held]]:
    """What each rank of a job holds, in its own order: replicated, cut, per-rank and empty tensors."""
    nranks = draw(st.integers(1, max_ranks))
    ranks: list[list[Held]] = [[] for _ in range(nranks)]
    for number in range(draw(st.integers(0, max_tensors))):
        shape = draw(shapes(max_ndim=3, max_extent=5))
        name, dtype = f"t{number}", draw(st.sampled_from(_DTYPES))
        kind = draw(st.sampled_from(["array", "cut", "cut", "per_rank"]))
        held = Held(name, dtype, shape, (0,) * len(shape), shape, per_rank=kind == "per_rank", split=kind == "cut")
        for box in draw(splits(shape)) if kind == "cut" else [whole(shape)]:
            for rank in draw(_holders(nranks)):
                ranks[rank].append(replace(held, offsets=box.offsets, shape=box.shape))
        if kind == "cut" and shape and 0 not in shape and draw(st.booleans()):
            # A rank with nothing of the tensor may say so with an empty box anywhere.
            ranks[draw(st.integers(0, nranks - 1))].append(replace(held, offsets=shape, shape=(0,) * len(shape)))
    return [draw(st.permutations(rows)) for rows in ranks]


@st.composite
def replica_numbers(
    draw: st.DrawFn, max_ranks: int = 6, max_boxes: int = 12, max_nbytes: int = 100 << 20
) -> tuple[Replicas, npt.NDArray[np.int64]]:
    """Boxes of any sizes with any holders, and the node of each rank. Only numbers: no memory behind them."""
    nranks = draw(st.integers(1, max_ranks))
    sets = draw(st.lists(_holders(nranks), min_size=1, max_size=max_boxes, unique_by=tuple))
    rows = []
    for _ in range(draw(st.integers(0, max_boxes))):
        itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
        nelements = draw(st.integers(0, 6).flatmap(lambda k: st.integers(0, 10**k * 100))) % (max_nbytes // itemsize)
        columns = draw(st.sampled_from([1, 3, 1000, 1 << 20]))
        shape = (nelements // columns, columns) if nelements >= columns else (nelements, 1)
        rows.append((*shape, itemsize, draw(st.integers(0, len(sets) - 1))))
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    ordered = [np.array(sorted(ranks), dtype=np.int64) for ranks in sets]
    nodes = np.array(draw(st.lists(st.integers(0, 2), min_size=nranks, max_size=nranks)), dtype=np.int64)
    return Replicas(table[:, :2], table[:, 2], table[:, 3], ordered), nodes
