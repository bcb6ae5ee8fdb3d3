"""Which stored boxes a wanted box is put together from, each element from exactly one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np

from parckpt.core.contents import Contents, StoredBox
from parckpt.core.layout import Box, intersect, tiling_problem
from parckpt.errors import IntegrityError

__all__ = ["Cover"]


class Cover:
    """The stored boxes of one tensor, equal ones merged.

    Parameters
    ----------
    tensor : int
        Index of the tensor in ``contents``.
    local_files : mapping
        File index to the rank that takes equal boxes from it.
    """

    def __init__(self, contents: Contents, tensor: int, local_files: Mapping[int, int]) -> None:
        self._contents, self._tensor, self._local = contents, contents.tensors[tensor], local_files
        rows, offsets, shapes = contents.geometry(tensor)
        self._copies: dict[tuple[int, ...], list[int]] = {}  # rows of each distinct box, ascending
        for row, key in zip(rows.tolist(), np.concatenate([offsets, shapes], axis=1).tolist(), strict=True):
            self._copies.setdefault(tuple(key), []).append(row)
        ndim = len(self._tensor.global_shape)
        self._distinct = [key for key in self._copies if 0 not in key[ndim:]]
        table = np.array(self._distinct, np.int64).reshape(len(self._distinct), 2 * ndim)
        self._offsets, self._shapes = table[:, :ndim], table[:, ndim:]
        self._boxes: dict[int, StoredBox] = {}
        self._cuts: dict[Box, list[tuple[tuple[int, ...], Box]]] = {}

    def parts(self, rank: int, box: Box) -> Iterator[tuple[StoredBox, Box]]:
        """Disjoint parts that make up a wanted box, each with the stored box it comes from.

        Raises
        ------
        IntegrityError
            If something of it is not stored. Facts: ``tensor``, ``offsets``, ``shape`` of an uncovered box.
        """
        if box not in self._cuts:
            key = (*box.offsets, *box.shape)
            self._cuts[box] = [(key, box)] if key in self._copies else self._cut(box)
        for key, part in self._cuts[box]:
            yield self._choose(rank, self._copies[key]), part

    def _choose(self, rank: int, rows: list[int]) -> StoredBox:
        chosen = rows[0]
        if len(rows) > 1:
            files = self._contents.boxes.file[rows].tolist()
            own = (row for row, file in zip(rows, files, strict=True) if self._local.get(file) == rank)
            chosen = next(own, min(zip(files, rows, strict=True))[1])
        if chosen not in self._boxes:
            self._boxes[chosen] = self._contents.box(chosen)
        return self._boxes[chosen]

    def _cut(self, box: Box) -> list[tuple[tuple[int, ...], Box]]:
        low = np.maximum(self._offsets, box.offsets)
        high = np.minimum(self._offsets + self._shapes, box.stop)
        hits = np.flatnonzero((low < high).all(axis=1))
        meetings = [
            (self._distinct[hit], Box(tuple(first), tuple(size)))
            for hit, first, size in zip(hits.tolist(), low[hits].tolist(), (high - low)[hits].tolist(), strict=True)
        ]
        if self._disjoint and sum(part.size for _, part in meetings) == box.size:
            return meetings
        return self._peel(box, meetings)

    def _peel(self, box: Box, meetings: list[tuple[tuple[int, ...], Box]]) -> list[tuple[tuple[int, ...], Box]]:
        """Take from each stored box what none before it gave."""
        found: list[tuple[tuple[int, ...], Box]] = []
        left = [box]
        # The largest first: fewer, larger pieces. The sort is stable, so the lowest first among equals.
        for key, meeting in sorted(meetings, key=lambda item: -item[1].size):
            rest: list[Box] = []
            for piece in left:
                part = intersect(piece, meeting)
                if part is None:
                    rest.append(piece)
                else:
                    found.append((key, part))
                    rest.extend(_without(piece, part))
            left = rest
        if left:
            raise IntegrityError(
                f"the checkpoint does not hold {left[0]} of {self._tensor.name!r}",
                tensor=self._tensor.name,
                offsets=list(left[0].offsets),
                shape=list(left[0].shape),
            )
        return found

    @cached_property
    def _disjoint(self) -> bool:
        if len(self._distinct) < 2:
            return True
        problem = tiling_problem(self._tensor.global_shape, self._offsets, self._shapes)
        return problem is None or problem.kind == "gap"


def _without(box: Box, hole: Box) -> list[Box]:
    """Boxes that tile ``box`` without ``hole``, which lies within it."""
    found: list[Box] = []
    offsets, stop = list(box.offsets), list(box.stop)
    for axis, (first, last) in enumerate(zip(hole.offsets, hole.stop, strict=True)):
        for begin, end in ((offsets[axis], first), (last, stop[axis])):
            if begin < end:
                piece_stop = [*stop[:axis], end, *stop[axis + 1 :]]
                piece = (*offsets[:axis], begin, *offsets[axis + 1 :])
                found.append(Box(piece, tuple(b - a for a, b in zip(piece, piece_stop, strict=True))))
        offsets[axis], stop[axis] = first, last
    return found
