"""Which holder of a replicated box writes it: balanced by bytes, or by MindSpore's rule; the same on every rank.

Only integers decide, and every tie has a rule, so ranks and platforms agree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parckpt.core.balance import level_loads

__all__ = ["CHUNK_NBYTES", "Replicas", "Shares", "assign_by_name", "assign_owners"]

Ints = npt.NDArray[np.int64]

CHUNK_NBYTES = 4 << 20


@dataclass(frozen=True, eq=False)
class Replicas:
    """Distinct boxes and who holds them.

    Attributes
    ----------
    shapes : int64 array of shape (boxes, ndim)
        Extents in elements, padded with 1.
    itemsize : int64 array
        Bytes per element of each box.
    holder_set : int64 array
        Index into `sets` of each box.
    sets : sequence of int64 array
        Sets of ranks, each ascending and not empty.
    """

    shapes: Ints
    itemsize: Ints
    holder_set: Ints
    sets: Sequence[Ints]


@dataclass(frozen=True, eq=False)
class Shares:
    """Who writes what: element ranges, in the boxes' own C order, that cover each box exactly.

    Attributes
    ----------
    box, rank, start, stop : int64 array
        One row for each range; ascending by box and start.
    """

    box: Ints
    rank: Ints
    start: Ints
    stop: Ints


def assign_owners(replicas: Replicas, nodes: npt.ArrayLike, *, split: bool, chunk_nbytes: int = CHUNK_NBYTES) -> Shares:
    """Choose who writes each box.

    Not collective. Pure: equal input gives equal output on every rank.

    Parameters
    ----------
    replicas : Replicas
    nodes : sequence of int
        Node of each rank; nodes are numbered from 0.
    split : bool
        Boxes may be cut among their holders.
    chunk_nbytes : int
        How much more than the optimum a rank may get for the sake of uncut boxes.

    Returns
    -------
    Shares
        Writers are always holders.

    Notes
    -----
    Without `split`: largest first onto the least loaded holder, ties to the less loaded node, then to the lowest rank.
    Where all ranks hold all boxes, no load exceeds the mean by more than the largest box (list-scheduling bound).

    With `split`: no load exceeds the best that arbitrary cuts could reach by more than one chunk.
    """
    return _Assignment(replicas, np.asarray(nodes, dtype=np.int64), chunk_nbytes).run(split)


def assign_by_name(replicas: Replicas, names: Sequence[str], name: Ints) -> Shares:
    """Choose who writes each box by MindSpore's rule, which goes by names and not by bytes.

    Not collective. Pure: equal input gives equal output on every rank.

    Parameters
    ----------
    replicas : Replicas
    names : sequence of str
        Distinct names.
    name : int64 array
        For each box, which of them its tensor has.

    Returns
    -------
    Shares
        Boxes are never cut. Of the boxes with one holder set, the j-th name in sorted order goes to its j-th rank,
        beginning again with the first rank when all have had one. Boxes of one tensor and holder set stay together.
    """
    place = np.empty(len(names), dtype=np.int64)
    place[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    # Distinct pairs of holder set and name, sorted by both: a pair's number within its set is what MindSpore counts.
    key = replicas.holder_set * max(len(names), 1) + place[name]
    pairs, pair = np.unique(key, return_inverse=True)
    sets = pairs // max(len(names), 1)
    number = np.arange(len(pairs)) - np.searchsorted(sets, sets)
    lengths = np.array([len(ranks) for ranks in replicas.sets], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    ranks = np.concatenate([np.zeros(0, dtype=np.int64), *replicas.sets])
    owner = ranks[starts[sets] + number % lengths[sets]].reshape(-1)[pair.reshape(-1)]
    box = np.arange(len(replicas.holder_set))
    return Shares(box, owner, np.zeros_like(box), replicas.shapes.prod(axis=1))


class _Assignment:
    """The loads so far and the shares given out."""

    def __init__(self, replicas: Replicas, nodes: Ints, chunk_nbytes: int) -> None:
        self._replicas = replicas
        self._chunk_nbytes = chunk_nbytes
        self._nodes: list[int] = nodes.tolist()
        self._sizes: Ints = replicas.shapes.prod(axis=1)
        self._nbytes: Ints = self._sizes * replicas.itemsize
        lengths = np.array([len(ranks) for ranks in replicas.sets], dtype=np.int64)
        lone = lengths[replicas.holder_set] == 1
        self._lone = np.flatnonzero(lone)
        firsts = np.array([ranks[0] for ranks in replicas.sets], dtype=np.int64)
        self._lone_rank: Ints = firsts[replicas.holder_set[self._lone]]
        self._base = np.zeros(len(nodes), dtype=np.int64)
        np.add.at(self._base, self._lone_rank, self._nbytes[self._lone])
        # Largest first, then in order of the boxes.
        shared = np.flatnonzero(~lone)
        self._shared: Ints = shared[np.argsort(-self._nbytes[shared], kind="stable")]
        self._loads: list[int] = self._base.tolist()
        self._node_loads = [0] * (max(self._nodes, default=0) + 1)
        for node, load in zip(self._nodes, self._loads, strict=True):
            self._node_loads[node] += load
        self._rows: list[tuple[int, int, int, int]] = []

    def run(self, split: bool) -> Shares:
        if split:
            self._cut_boxes()
        else:
            self._whole_boxes()
        given = np.array(self._rows, dtype=np.int64).reshape(-1, 4)
        alone = np.stack([self._lone, self._lone_rank, np.zeros_like(self._lone), self._sizes[self._lone]], axis=1)
        rows = np.concatenate([alone, given])
        rows = rows[np.lexsort((rows[:, 2], rows[:, 0]))]
        return Shares(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3])

    def _give(self, box: int, rank: int, start: int, stop: int, nbytes: int) -> None:
        self._rows.append((box, rank, start, stop))
        self._loads[rank] += nbytes
        self._node_loads[self._nodes[rank]] += nbytes

    def _key(self, rank: int) -> tuple[int, int, int]:
        return self._loads[rank], self._node_loads[self._nodes[rank]], rank

    def _whole_boxes(self) -> None:
        heaps: dict[int, list[tuple[int, int, int]]] = {}
        shared = self._shared
        columns = (shared, self._replicas.holder_set[shared], self._sizes[shared], self._nbytes[shared])
        for box, which, size, nbytes in zip(*(c.tolist() for c in columns), strict=True):
            heap = heaps.get(which)
            if heap is None:
                heap = heaps[which] = [self._key(rank) for rank in self._replicas.sets[which].tolist()]
                heapq.heapify(heap)
            # Loads only grow, also through other sets: an entry that is still true is the least of all.
            rank = heap[0][2]
            while heap[0] != (key := self._key(rank)):
                heapq.heapreplace(heap, key)
                rank = heap[0][2]
            self._give(box, rank, 0, size, nbytes)

    def _cut_boxes(self) -> None:
        """Fill the quotas of a fractional optimum, cutting boxes only where a rank's slack would run out."""
        replicas = self._replicas
        which = replicas.holder_set[self._shared]
        used = np.unique(which)
        by_set = self._shared[np.argsort(which, kind="stable")]
        ends = np.cumsum(np.bincount(which, minlength=len(replicas.sets)))[used].tolist()
        parts = [by_set[first:last] for first, last in zip([0, *ends], ends, strict=False)]
        amounts = [int(self._nbytes[part].sum()) for part in parts]
        sets = [replicas.sets[s] for s in used.tolist()]
        # An eighth of a chunk for the quotas, three quarters for uncut boxes, the rest for whole elements.
        quotas = level_loads(amounts, sets, self._base, self._chunk_nbytes // 8)
        slack = [self._chunk_nbytes * 3 // 4] * len(self._loads)
        for part, ranks, quota in zip(parts, sets, quotas, strict=True):
            self._fill(part, dict(zip(ranks.tolist(), quota.tolist(), strict=True)), slack)

    def _fill(self, boxes: Ints, quota: dict[int, int], slack: list[int]) -> None:
        """Give out the boxes of one holder set; `slack` is what each rank may still get beyond its quotas."""
        heap = [(-left, self._node_loads[self._nodes[rank]], rank) for rank, left in quota.items()]
        heapq.heapify(heap)
        sizes, itemsizes = self._sizes[boxes].tolist(), self._replicas.itemsize[boxes].tolist()
        for box, size, itemsize in zip(boxes.tolist(), sizes, itemsizes, strict=True):
            start = 0
            while start < size or start == 0:
                minus, _, rank = heap[0]
                stop = size
                if (size - start) * itemsize > slack[rank] - minus:
                    shape = self._replicas.shapes[box].tolist()
                    stop = _cut(shape, itemsize, start, -minus, slack[rank], self._chunk_nbytes // 16)
                nbytes = (stop - start) * itemsize
                self._give(box, rank, start, min(stop, size), nbytes)
                heapq.heapreplace(heap, (minus + nbytes, self._node_loads[self._nodes[rank]], rank))
                start = max(stop, 1)
        for minus, _, rank in heap:
            slack[rank] -= minus


def _cut(shape: Sequence[int], itemsize: int, start: int, quota: int, slack: int, coarse_nbytes: int) -> int:
    """Element before which to cut a box, given its first free element and the bytes a rank should take.

    Cuts fall between whole rows (planes, ...) of up to `coarse_nbytes` where the slack allows, so that the parts are
    single boxes, and else exactly where the quota ends, rounded up to an element.
    """
    exact = start + max(1, -(-quota // itemsize))
    row = 1
    for extent in reversed(shape[1:]):
        if row * extent * itemsize > coarse_nbytes:
            break
        row *= extent
    behind = -(-exact // row) * row
    if (behind - start) * itemsize <= quota + slack:
        return behind
    before = exact // row * row
    return before if before > start else exact
