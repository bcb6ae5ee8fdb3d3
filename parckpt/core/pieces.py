"""From who holds and who owns what to the boxes that each rank writes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from parckpt.core.holdings import Holdings
from parckpt.core.layout import range_boxes, shift
from parckpt.core.ownership import Replicas, Shares
from parckpt.core.tensors import expand

__all__ = ["Pieces", "all_pieces", "owned_pieces", "replica_sets"]

Ints = npt.NDArray[np.int64]


class Pieces(NamedTuple):
    """Distinct boxes that are written, and by whom; see `SavePlan` for the columns."""

    tensor: Ints
    offsets: Ints
    shapes: Ints
    row_start: Ints
    row_piece: Ints


def replica_sets(holdings: Holdings) -> Replicas:
    """Number the distinct sets of ranks that hold boxes."""
    counts = holdings.holder_counts()
    lone = np.flatnonzero(counts == 1)
    firsts = holdings.holder_group[holdings.holder_start[lone]]
    ranks = np.where(
        holdings.box_rank[lone] >= 0, holdings.box_rank[lone], holdings.group_ranks[holdings.group_start[firsts]]
    )
    which = np.empty(len(counts), dtype=np.int64)
    which[lone] = ranks
    sets = list(np.arange(holdings.world_size).reshape(-1, 1))
    # Groups as one byte string: its slices are the keys of the dictionary, without making arrays.
    groups = holdings.holder_group.tobytes()
    index: dict[bytes, int] = {}
    starts, stops = (8 * holdings.holder_start[:-1]).tolist(), (8 * holdings.holder_start[1:]).tolist()
    for box in np.flatnonzero(counts > 1).tolist():
        key = groups[starts[box] : stops[box]]
        number = index.get(key)
        if number is None:
            number = index[key] = len(sets)
            sets.append(holdings.holders(box))
        which[box] = number
    return Replicas(holdings.box_shapes, holdings.tensors.itemsize[holdings.box_tensor], which, sets)


def owned_pieces(holdings: Holdings, shares: Shares) -> Pieces:
    """Each share as one or more boxes of its writer."""
    sizes = holdings.box_shapes.prod(axis=1)
    cut = np.flatnonzero(shares.stop - shares.start < sizes[shares.box])
    counts = np.ones(len(shares.box), dtype=np.int64)
    cut_offsets, cut_shapes = [], []
    for at in cut.tolist():
        box = int(shares.box[at])
        shape, origin = holdings.box_shapes[box].tolist(), (-holdings.box_offsets[box]).tolist()
        boxes = [shift(b, origin) for b in range_boxes(shape, int(shares.start[at]), int(shares.stop[at]))]
        counts[at] = len(boxes)
        cut_offsets += [b.offsets for b in boxes]
        cut_shapes += [b.shape for b in boxes]
    share = np.repeat(np.arange(len(counts)), counts)
    box_of = shares.box[share]
    offsets, shapes = holdings.box_offsets[box_of], holdings.box_shapes[box_of]
    if cut_offsets:
        ends = np.cumsum(counts)
        replaced = expand((ends - counts)[cut], ends[cut])
        offsets[replaced], shapes[replaced] = np.array(cut_offsets), np.array(cut_shapes)
    place = holdings.places(box_of, shares.rank[share])
    rows = _by_rank(shares.rank[share], place, np.arange(len(share)), holdings.world_size)
    return Pieces(holdings.box_tensor[box_of], offsets, shapes, *rows)


def all_pieces(holdings: Holdings) -> Pieces:
    """Every box, written by all who hold it."""
    held_box = np.repeat(np.arange(len(holdings.box_tensor)), np.diff(holdings.holder_start))
    own = holdings.box_rank[held_box]
    first = np.where(own >= 0, 0, holdings.group_start[holdings.holder_group])
    counts = np.where(own >= 0, 1, np.diff(holdings.group_start)[holdings.holder_group])
    row = np.repeat(np.arange(len(held_box)), counts)
    rank = np.where(own[row] >= 0, own[row], holdings.group_ranks[expand(first, first + counts)])
    rows = _by_rank(rank, holdings.holder_row[row], held_box[row], holdings.world_size)
    return Pieces(holdings.box_tensor, holdings.box_offsets, holdings.box_shapes, *rows)


def _by_rank(rank: Ints, place: Ints, piece: Ints, world_size: int) -> tuple[Ints, Ints]:
    """Sort pieces by rank and place in its state; what has the same place keeps its order."""
    order = np.argsort(rank * (int(place.max(initial=0)) + 1) + place, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(rank, minlength=world_size))]).astype(np.int64)
    return start, piece[order]
