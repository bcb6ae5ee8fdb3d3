"""Is it a layout? Everything that can be wrong between the descriptions of several ranks, each named exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parckpt.core.describe import PER_RANK, SPLIT
from parckpt.core.dtypes import by_code
from parckpt.core.layout import Box, TilingProblem, tiling_problem
from parckpt.core.rows import Groups, Rows
from parckpt.core.tensors import TensorTable
from parckpt.errors import LayoutError

__all__ = ["Problems", "check_agreement", "check_range", "check_tilings"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Problem:
    text: str
    ranks: tuple[int, ...]
    boxes: tuple[Box, ...] = ()


class Problems:
    """The first problem of each tensor. Sentences are only made for the one that is raised."""

    def __init__(self, table: TensorTable) -> None:
        self.table = table
        self.bad: npt.NDArray[np.bool_] = np.zeros(len(table), dtype=np.bool_)
        self._found: dict[int, Callable[[], _Problem]] = {}

    def note(self, tensor: int, make: Callable[[], _Problem]) -> None:
        """Remember a problem of a tensor unless it has one."""
        self.bad[tensor] = True
        self._found.setdefault(tensor, make)

    def raise_first(self) -> None:
        """Raise the problem of the first tensor that has one, and say how many others have."""
        if not self._found:
            return
        tensor = min(self._found)
        problem = self._found[tensor]()
        name = self.table.names[int(self.table.name[tensor])]
        message = f"tensor {name!r}{problem.text}"
        others = len(self._found) - 1
        if others:
            message += f"; {others} other tensor{'s have' if others > 1 else ' has'} a wrong layout too"
        boxes = [[list(box.offsets), list(box.shape)] for box in problem.boxes]
        raise LayoutError(message, tensor=name, ranks=list(problem.ranks), boxes=boxes, others=others)


def check_agreement(rows: Rows, tensor: Ints, first: Ints, groups: Groups, problems: Problems) -> None:
    """Note each tensor that ranks describe differently.

    Parameters
    ----------
    rows, tensor, first, groups
        The rows, the tensor of each, the first row of each tensor, and the groups of ranks.
    """
    _check_belonging(rows, tensor, groups, problems)
    reference = first[tensor]
    shape_differs = rows.ndim != rows.ndim[reference]
    for axis in range(rows.width):
        shape_differs |= rows.column(0, axis, 1) != problems.table.shapes[tensor, axis]
    checks: tuple[tuple[npt.NDArray[np.bool_], Callable[[int], str], str], ...] = (
        (rows.dtype != rows.dtype[reference], lambda row: by_code(int(rows.dtype[row])).name, "dtype"),
        ((rows.flags ^ rows.flags[reference]) & SPLIT != 0, lambda row: _kind(rows, row), "kind"),
        (shape_differs, lambda row: str(rows.global_shape(row)), "global shape"),
    )
    for differs, say, what in checks:
        for row in np.flatnonzero(differs).tolist():
            problems.note(int(tensor[row]), _disagreement(rows, groups, int(reference[row]), row, what, say))


def _kind(rows: Rows, row: int) -> str:
    return "Shard" if rows.flags[row] & SPLIT else "array"


def _disagreement(
    rows: Rows, groups: Groups, reference: int, row: int, what: str, say: Callable[[int], str]
) -> Callable[[], _Problem]:
    def make() -> _Problem:
        ranks = (int(groups.lowest[rows.group[reference]]), int(groups.lowest[rows.group[row]]))
        text = f": {what} differs: {say(reference)} on rank {ranks[0]}, {say(row)} on rank {ranks[1]}"
        if what == "global shape" and not rows.flags[row] & SPLIT:
            text += "; if these are pieces of one tensor, wrap them in Shard; if each rank has its own, in PerRank"
        return _Problem(text, ranks, (rows.box(reference), rows.box(row)))

    return make


def _check_belonging(rows: Rows, tensor: Ints, groups: Groups, problems: Problems) -> None:
    """Note names that are per-rank on one rank and shared on another, or per-rank twice on one rank."""
    own = (rows.flags & PER_RANK) != 0
    if not own.any():
        return
    own_rows = np.flatnonzero(own)
    first_own = np.full(len(rows.names), -1, dtype=np.int64)
    first_own[rows.name[own_rows[::-1]]] = own_rows[::-1]
    seen: set[int] = set()
    for row in np.flatnonzero(~own & (first_own[rows.name] >= 0)).tolist():
        if int(tensor[row]) not in seen:
            seen.add(int(tensor[row]))
            problems.note(int(tensor[row]), _mixed(rows, groups, int(first_own[rows.name[row]]), row))
    key = rows.group[own_rows] * len(rows.names) + rows.name[own_rows]
    _, first = np.unique(key, return_index=True)
    for row in np.delete(own_rows, first).tolist():
        problems.note(int(tensor[row]), _twice(rows, groups, row))


def _mixed(rows: Rows, groups: Groups, own: int, shared: int) -> Callable[[], _Problem]:
    def make() -> _Problem:
        ranks = (int(groups.lowest[rows.group[own]]), int(groups.lowest[rows.group[shared]]))
        return _Problem(f" is PerRank on rank {ranks[0]} and not on rank {ranks[1]}", ranks)

    return make


def _twice(rows: Rows, groups: Groups, row: int) -> Callable[[], _Problem]:
    def make() -> _Problem:
        rank = int(groups.lowest[rows.group[row]])
        return _Problem(f" is PerRank twice on rank {rank}", (rank,))

    return make


def check_range(rows: Rows, tensor: Ints, groups: Groups, problems: Problems) -> None:
    """Note each tensor of which some box does not lie within it."""
    outside = np.zeros(len(rows), dtype=np.bool_)
    for axis in range(rows.width):
        offset, extent = rows.column(1, axis, 0), rows.column(2, axis, 1)
        outside |= (offset < 0) | (extent < 0) | (offset + extent > problems.table.shapes[tensor, axis])
    for row in np.flatnonzero(outside).tolist():
        problems.note(int(tensor[row]), _placed(rows, groups, "{0} is out of range", row))


def _placed(rows: Rows, groups: Groups, text: str, *held: int) -> Callable[[], _Problem]:
    """A problem of boxes in their tensor; `text` has a place for each, filled with box and rank."""

    def make() -> _Problem:
        ranks = [int(groups.lowest[rows.group[row]]) for row in held]
        said = [f"{rows.box(row)} on rank {rank}" for row, rank in zip(held, ranks, strict=True)]
        shape = rows.global_shape(held[0])
        boxes = tuple(rows.box(row) for row in held)
        return _Problem(f" of global shape {shape}: {text.format(*said)}", tuple(ranks), boxes)

    return make


def note_overlap(rows: Rows, groups: Groups, problems: Problems, tensor: int, a: int, b: int) -> None:
    """Note that two rows of a tensor have elements in common."""
    low, high = sorted((a, b))
    if rows.box(low) == rows.box(high) and rows.group[low] == rows.group[high]:
        problems.note(tensor, _placed(rows, groups, "{0} is there twice", low, high))
    else:
        problems.note(tensor, _placed(rows, groups, "{0} overlaps {1}", high, low))


def check_tilings(
    problems: Problems,
    start: Ints,
    linear: Ints,
    offsets: Ints,
    shapes: Ints,
    overlap: Callable[[int, int, int], None],
) -> None:
    """Note each tensor that its boxes do not tile.

    Parameters
    ----------
    problems : Problems
        Tensors that already have one, and those of one rank, are left out.
    start : int64 array
        Boxes of tensor t: ``slice(start[t], start[t + 1])``.
    linear : int64 array
        Linear number of the first element of each box in its tensor; ascending within a tensor.
    offsets, shapes : int64 array
        Padded columns of the boxes.
    overlap : callable
        Called with a tensor and two of its boxes that overlap.
    """
    table = problems.table
    memory: dict[bytes, TilingProblem | None] = {}
    for tensor in np.flatnonzero(~_are_ranges(table, start, linear, shapes, offsets)).tolist():
        if problems.bad[tensor] or table.per_rank[tensor] >= 0:
            continue
        first, last, ndim = int(start[tensor]), int(start[tensor + 1]), int(table.ndim[tensor])
        layout = (table.global_shape(tensor), offsets[first:last, :ndim], shapes[first:last, :ndim])
        # Tensors of one model are mostly cut in a few ways.
        key = hashlib.blake2b(b"".join([str(layout[0]).encode(), layout[1].tobytes(), layout[2].tobytes()])).digest()
        if key not in memory:
            memory[key] = tiling_problem(*layout)
        found = memory[key]
        if found is None:
            continue
        if found.kind == "overlap" and found.first is not None and found.second is not None:
            overlap(tensor, first + found.first, first + found.second)
        elif found.box is not None:
            problems.note(tensor, _gap(layout[0], found.box))


def _gap(global_shape: Sequence[int], box: Box) -> Callable[[], _Problem]:
    def make() -> _Problem:
        return _Problem(
            f" of global shape {tuple(global_shape)}: no rank holds the box at {box.offsets} of shape {box.shape}",
            (),
            (box,),
        )

    return make


def _are_ranges(table: TensorTable, start: Ints, linear: Ints, shapes: Ints, offsets: Ints) -> npt.NDArray[np.bool_]:
    """Whether each tensor's boxes are linear ranges, one behind the other from its first element to its last.

    True of whole tensors, row blocks and flat ranges; proved for all tensors at once.
    """
    tensor = np.repeat(np.arange(len(table)), np.diff(start))
    total = table.sizes
    end = np.zeros(len(linear), dtype=np.int64)
    for axis in range(table.shapes.shape[1]):
        end = end * table.shapes[tensor, axis] + offsets[:, axis] + shapes[:, axis] - 1
    end += 1
    follows = np.append(linear[1:], 0)
    follows[start[1:][np.diff(start) > 0] - 1] = total[np.diff(start) > 0]
    good = (end - linear == shapes.prod(axis=1)) & (end == follows)
    nonempty = np.diff(start) > 0
    begins = np.zeros(len(table), dtype=np.bool_)
    begins[nonempty] = linear[start[:-1][nonempty]] == 0
    ngood = np.bincount(tensor[good], minlength=len(table))
    found: npt.NDArray[np.bool_] = (begins & (ngood == np.diff(start))) | (total == 0)
    return found
