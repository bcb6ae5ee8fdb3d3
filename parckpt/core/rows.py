"""The descriptions of all ranks put one behind the other: ranks with equal descriptions count once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.describe import PER_RANK, Description
from parckpt.core.layout import Box
from parckpt.core.tensors import TensorTable, expand

__all__ = ["Groups", "Rows", "number_tensors"]

Ints = npt.NDArray[np.int64]


class Groups:
    """Ranks with equal descriptions, numbered by their lowest rank.

    Attributes
    ----------
    of_rank : int64 array
        Group of each rank.
    lowest, description : int64 array
        Lowest rank of each group, and the index of its description.
    ranks, start : int64 array
        Ranks of group g: ``ranks[start[g]:start[g + 1]]``, ascending.
    """

    def __init__(self, rank_description: Ints) -> None:
        _, lowest, of_rank = np.unique(rank_description, return_index=True, return_inverse=True)
        order = np.argsort(lowest)
        number = np.empty(len(order), dtype=np.int64)
        number[order] = np.arange(len(order))
        self.of_rank: Ints = number[of_rank.reshape(-1)]
        self.lowest: Ints = lowest[order].astype(np.int64)
        self.description: Ints = rank_description[self.lowest]
        self.ranks: Ints = np.argsort(self.of_rank, kind="stable").astype(np.int64)
        counts = np.bincount(self.of_rank, minlength=len(order))
        self.start: Ints = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


class Rows:
    """All rows of all groups, group after group, each in the state order of its ranks.

    Attributes
    ----------
    group, place : int64 array
        Group of each row, and its place in that group's description.
    names : tuple of str
        Distinct tensor names.
    name : int64 array
        Index into `names` of each row.
    dtype, flags, ndim : uint8 array
        As in `Description`.
    width : int
        The widest `ndim`.
    """

    def __init__(self, descriptions: Sequence[Description]) -> None:
        counts = np.array([d.nrows for d in descriptions], dtype=np.int64)
        starts = np.cumsum(counts) - counts
        self.group: Ints = np.repeat(np.arange(len(descriptions)), counts)
        self.place: Ints = np.arange(int(counts.sum())) - np.repeat(starts, counts)
        self.names, self.name = _merge_names(descriptions)
        self.dtype: npt.NDArray[np.uint8] = _concatenate([d.dtype for d in descriptions], np.uint8)
        self.flags: npt.NDArray[np.uint8] = _concatenate([d.flags for d in descriptions], np.uint8)
        self.ndim: npt.NDArray[np.uint8] = _concatenate([d.ndim for d in descriptions], np.uint8)
        self._dims: Ints = _concatenate([d.dims for d in descriptions], np.int64)
        length = 3 * self.ndim.astype(np.int64)
        self._start: Ints = np.cumsum(length) - length
        self.width = int(self.ndim.max(initial=0))

    def __len__(self) -> int:
        return len(self.group)

    def column(self, part: int, axis: int, fill: int, rows: Ints | None = None) -> Ints:
        """Global shape (part 0), offset (1) or extent (2) of rows along an axis; `fill` where there is no such axis."""
        start, ndim = (self._start, self.ndim) if rows is None else (self._start[rows], self.ndim[rows])
        at = start + part * ndim.astype(np.int64) + axis
        inside = ndim > axis
        if inside.all():
            return np.take(self._dims, at)
        found = np.full(len(at), fill, dtype=np.int64)
        found[inside] = self._dims[at[inside]]
        return found

    def padded(self, part: int, fill: int, rows: Ints) -> Ints:
        """`column` of all axes, as an array of shape (rows, width)."""
        found = np.empty((len(rows), self.width), dtype=np.int64)
        for axis in range(self.width):
            found[:, axis] = self.column(part, axis, fill, rows)
        return found

    def global_shape(self, row: int) -> tuple[int, ...]:
        """Shape that a row states for its tensor."""
        start = int(self._start[row])
        return tuple(self._dims[start : start + int(self.ndim[row])].tolist())

    def box(self, row: int) -> Box:
        """Box of a row."""
        ndim, start = int(self.ndim[row]), int(self._start[row])
        dims = self._dims[start + ndim : start + 3 * ndim].tolist()
        return Box(tuple(dims[:ndim]), tuple(dims[ndim:]))


def _concatenate(parts: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *parts]).astype(dtype, copy=False)


def _merge_names(descriptions: Sequence[Description]) -> tuple[tuple[str, ...], Ints]:
    index: dict[str, int] = {}
    # Ranks mostly differ in boxes only: their names are then one tuple, and looking that up costs a hash.
    numbers: dict[tuple[str, ...], Ints] = {}
    parts = []
    for description in descriptions:
        found = numbers.get(description.names)
        if found is None:
            found = np.array([index.setdefault(name, len(index)) for name in description.names], dtype=np.int64)
            numbers[description.names] = found
        parts.append(found[description.row_name])
    return tuple(index), _concatenate(parts, np.int64)


def number_tensors(rows: Rows, groups: Groups) -> tuple[TensorTable, Ints, Ints]:
    """Number the tensors by first appearance over ranks 0, 1, 2, ...

    Returns
    -------
    table : TensorTable
        Dtypes and shapes as the first row of each tensor states them.
    tensor : int64 array
        Tensor of each row. A per-rank row stands for one tensor of each rank of its group; then the lowest rank's.
    first : int64 array
        First row of each tensor.
    """
    per_rank = (rows.flags & PER_RANK) != 0
    shared_rows, own_rows = np.flatnonzero(~per_rank), np.flatnonzero(per_rank)
    by_name = np.full(len(rows.names), -1, dtype=np.int64)
    by_name[rows.name[shared_rows[::-1]]] = shared_rows[::-1]
    shared = by_name[by_name >= 0]
    group = rows.group[own_rows]
    own = np.repeat(own_rows, np.diff(groups.start)[group])
    own_ranks = groups.ranks[expand(groups.start[group], groups.start[group + 1])]

    first = np.concatenate([shared, own])
    appears = np.concatenate([groups.lowest[rows.group[shared]], own_ranks])
    belongs = np.concatenate([np.full(len(shared), -1, dtype=np.int64), own_ranks])
    order = np.lexsort((rows.place[first], appears))
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))

    tensor = np.empty(len(rows), dtype=np.int64)
    by_name[rows.name[shared]] = number[: len(shared)]
    tensor[shared_rows] = by_name[rows.name[shared_rows]]
    tensor[own[::-1]] = number[len(shared) :][::-1]  # written backwards: the lowest rank's stays
    first = first[order]
    table = TensorTable(
        rows.names, rows.name[first], rows.dtype[first], rows.ndim[first], rows.padded(0, 1, first), belongs[order]
    )
    return table, tensor, first
