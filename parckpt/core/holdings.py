"""Who holds what: the descriptions of all ranks merged into tensors, distinct boxes and their holders.

Everything is columns, since 4,096 ranks with 1,000 tensors each are four million rows. Boxes are told apart by the
linear number of their first element, so one sort of integers finds all exact replicas; two different boxes that begin
at one element overlap anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parckpt.core.agreement import Problems, check_agreement, check_range, check_tilings, note_overlap
from parckpt.core.describe import PER_RANK, Description
from parckpt.core.rows import Groups, Rows, number_tensors
from parckpt.core.tensors import TensorTable, expand
from parckpt.errors import LayoutError

__all__ = ["Holdings", "merge"]

Ints = npt.NDArray[np.int64]

_MAX_ELEMENTS = 1 << 62  # of all tensors together: one int64 address space numbers them


@dataclass(frozen=True, eq=False)
class Holdings:
    """What the whole job holds.

    Attributes
    ----------
    tensors : TensorTable
    rank_group : int64 array
        Group of each rank: ranks with equal descriptions, numbered by their lowest rank.
    group_start, group_ranks : int64 array
        Ranks of group g: ``group_ranks[group_start[g]:group_start[g + 1]]``, ascending.
    box_tensor : int64 array
        Tensor of each distinct box; ascending, boxes of one tensor in C order of their first element.
    box_offsets, box_shapes : int64 array of shape (boxes, widest ndim)
        Padded with 0 and 1.
    box_nbytes : int64 array
    box_rank : int64 array
        The rank that a box's tensor belongs to, or -1: then all ranks of its holder groups hold the box.
    holder_start, holder_group, holder_row : int64 array
        For box b, ``slice(holder_start[b], holder_start[b + 1])`` of the groups that hold it, ascending, and of the
        place of the box in their state order.
    """

    tensors: TensorTable
    rank_group: Ints
    group_start: Ints
    group_ranks: Ints
    box_tensor: Ints
    box_offsets: Ints
    box_shapes: Ints
    box_nbytes: Ints
    box_rank: Ints
    holder_start: Ints
    holder_group: Ints
    holder_row: Ints

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.rank_group)

    def ranks_of(self, groups: Ints) -> Ints:
        """Return the ranks in some groups, ascending."""
        found = self.group_ranks[expand(self.group_start[groups], self.group_start[groups + 1])]
        return found if len(groups) == 1 else np.sort(found)

    def holders(self, box: int) -> Ints:
        """Return the ranks that hold a box, ascending."""
        if self.box_rank[box] >= 0:
            return self.box_rank[box : box + 1]
        return self.ranks_of(self.holder_group[self.holder_start[box] : self.holder_start[box + 1]])

    def holder_counts(self) -> Ints:
        """Return the number of ranks that hold each box."""
        nranks = np.diff(self.group_start)[self.holder_group]
        sums = np.concatenate([[0], np.cumsum(nranks)])
        counts = sums[self.holder_start[1:]] - sums[self.holder_start[:-1]]
        return np.where(self.box_rank >= 0, 1, counts).astype(np.int64)

    def places(self, boxes: Ints, ranks: Ints) -> Ints:
        """Return the place of each box in the state order of a rank that holds it."""
        ngroups = len(self.group_start) - 1
        box_of = np.repeat(np.arange(len(self.box_tensor)), np.diff(self.holder_start))
        at = np.searchsorted(box_of * ngroups + self.holder_group, boxes * ngroups + self.rank_group[ranks])
        return self.holder_row[at]


def merge(descriptions: Sequence[Description], rank_description: npt.ArrayLike) -> Holdings:
    """Merge what all ranks hold, and prove that it is a layout.

    Parameters
    ----------
    descriptions : sequence of Description
        The distinct ones.
    rank_description : sequence of int
        For each rank, which of them is its own.

    Returns
    -------
    Holdings
        Empty boxes are dropped, except that an empty tensor keeps the first one described.

    Raises
    ------
    LayoutError
        If ranks disagree about a tensor, or boxes are out of range, overlap without being equal, or leave a gap.
    """
    groups = Groups(np.asarray(rank_description, dtype=np.int64))
    rows = Rows([descriptions[d] for d in groups.description.tolist()])
    table, tensor, first = number_tensors(rows, groups)
    problems = Problems(table)
    check_agreement(rows, tensor, first, groups, problems)
    check_range(rows, tensor, groups, problems)
    if float(table.shapes.astype(np.float64).prod(axis=1).sum()) >= _MAX_ELEMENTS:
        raise LayoutError("the tensors have more than 2**62 elements in all", tensor=None, ranks=[], boxes=[])
    index, starts, linear = _group_boxes(rows, tensor, groups, problems)
    lead = index[starts[:-1]]
    box_tensor, offsets, shapes = tensor[lead], rows.padded(1, 0, lead), rows.padded(2, 1, lead)
    check_tilings(
        problems,
        np.searchsorted(box_tensor, np.arange(len(table) + 1)),
        linear,
        offsets,
        shapes,
        lambda t, a, b: note_overlap(rows, groups, problems, t, int(lead[a]), int(lead[b])),
    )
    problems.raise_first()

    own = np.flatnonzero(table.per_rank >= 0)
    order = np.argsort(np.concatenate([box_tensor, own]), kind="stable")
    holder_row = np.concatenate([index, first[own]])
    holder_start = np.concatenate([starts, starts[-1] + 1 + np.arange(len(own))])
    counts = np.diff(holder_start)[order]
    holder_row = holder_row[expand(holder_start[:-1][order], holder_start[1:][order])]
    box_tensor = np.concatenate([box_tensor, own])[order]
    shapes = np.concatenate([shapes, table.shapes[own]])[order]
    return Holdings(
        tensors=table,
        rank_group=groups.of_rank,
        group_start=groups.start,
        group_ranks=groups.ranks,
        box_tensor=box_tensor,
        box_offsets=np.concatenate([offsets, np.zeros_like(table.shapes[own])])[order],
        box_shapes=shapes,
        box_nbytes=shapes.prod(axis=1) * table.itemsize[box_tensor],
        box_rank=table.per_rank[box_tensor],
        holder_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        holder_group=rows.group[holder_row],
        holder_row=rows.place[holder_row],
    )


def _group_boxes(rows: Rows, tensor: Ints, groups: Groups, problems: Problems) -> tuple[Ints, Ints, Ints]:
    """Sort the shared rows by tensor and box, and note boxes that share their first element without being equal.

    Returns
    -------
    index : int64 array
        Rows, those of one box together and ascending.
    starts : int64 array
        Where each box begins in `index`, and the end.
    linear : int64 array
        Linear number of each box's first element.
    """
    sizes = problems.table.sizes
    index = np.flatnonzero(((rows.flags & PER_RANK) == 0) & ~problems.bad[tensor])
    linear = np.zeros(len(index), dtype=np.int64)
    empty = np.zeros(len(index), dtype=np.bool_)
    for axis in range(rows.width):
        linear = linear * problems.table.shapes[tensor[index], axis] + rows.column(1, axis, 0, index)
        empty |= rows.column(2, axis, 1, index) == 0
    nothing = sizes[tensor[index]] == 0
    linear[nothing] = 0
    room = np.maximum(sizes, 1)
    key = (np.cumsum(room) - room)[tensor[index]] + linear
    kept = ~empty | nothing
    index, key, linear, nothing = index[kept], key[kept], linear[kept], nothing[kept]
    order = np.argsort(key, kind="stable")
    index, key, linear, nothing = index[order], key[order], linear[order], nothing[order]

    differs, twice = _compare(rows, index, key)
    # Of an empty tensor only the first box stays. `twice` looks at neighbours: the others have to go before.
    for which in (0, 1):
        dropped = (differs, twice)[which] & nothing
        if dropped.any():
            index, key, linear, nothing = (column[~dropped] for column in (index, key, linear, nothing))
            differs, twice = _compare(rows, index, key)
    begins = _begins(key)
    lead = index[np.flatnonzero(begins)]
    box = np.cumsum(begins) - 1
    for at in np.flatnonzero(differs | twice).tolist():
        other = index[at - 1] if twice[at] else lead[box[at]]
        note_overlap(rows, groups, problems, int(tensor[index[at]]), int(other), int(index[at]))
    starts = np.append(np.flatnonzero(begins), len(index)).astype(np.int64)
    return index, starts, linear[starts[:-1]]


def _begins(key: Ints) -> npt.NDArray[np.bool_]:
    """Whether each entry differs from the one before it."""
    begins = np.ones(len(key), dtype=np.bool_)
    np.not_equal(key[1:], key[:-1], out=begins[1:])
    return begins


def _compare(rows: Rows, index: Ints, key: Ints) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Whether each row's box differs from the first with its key, and whether it comes from one rank twice."""
    begins = _begins(key)
    box = np.cumsum(begins) - 1
    differs = np.zeros(len(index), dtype=np.bool_)
    for part in (1, 2):
        for axis in range(rows.width):
            column = rows.column(part, axis, 0, index)
            differs |= column != column[begins][box]
    twice = ~begins & ~differs & ~_begins(rows.group[index])
    return differs, twice
