"""The save plan: which rank writes which boxes. Made from descriptions alone, equal on every rank."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from parckpt.core.describe import EMPTY, PER_RANK, Description
from parckpt.core.holdings import Holdings, merge
from parckpt.core.layout import Box
from parckpt.core.ownership import CHUNK_NBYTES, Shares, assign_by_name, assign_owners
from parckpt.core.pieces import all_pieces, owned_pieces, replica_sets
from parckpt.core.tensors import TensorRow, TensorTable
from parckpt.errors import LayoutError

__all__ = ["Replica", "SavePlan", "TensorRow", "TensorTable", "plan_save"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Replica:
    """A box that several ranks hold.

    Attributes
    ----------
    index : int
        Number of the box among all distinct boxes of the job; see `SavePlan.holders`.
    tensor : int
    box : Box
    """

    index: int
    tensor: int
    box: Box


@dataclass(frozen=True, eq=False)
class SavePlan:
    """What a whole checkpoint contains and who writes it.

    Attributes
    ----------
    holdings : Holdings
        Who holds what.
    integrated, remove_redundancy, split_replicas : bool
        The options it was made with.
    piece_tensor : int64 array
    piece_offsets, piece_shapes : int64 array of shape (pieces, widest ndim)
        Distinct boxes that are written, padded with 0 and 1.
    row_start, row_piece : int64 array
        Rank r writes the pieces ``row_piece[row_start[r]:row_start[r + 1]]``, in the order of its state.
    value_owner : mapping of str to int
        Lowest rank that has each plain value of the job; values that belong to one rank are not in it.
    """

    holdings: Holdings
    integrated: bool
    remove_redundancy: bool
    split_replicas: bool
    piece_tensor: Ints
    piece_offsets: Ints
    piece_shapes: Ints
    row_start: Ints
    row_piece: Ints
    value_owner: Mapping[str, int]

    @property
    def tensors(self) -> TensorTable:
        """The tensors, in order of first appearance over ranks 0, 1, 2, ..."""
        return self.holdings.tensors

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.holdings.world_size

    @property
    def box_tensor(self) -> Ints:
        """Tensor of each written box; rank after rank, in the order of its state."""
        return self.piece_tensor[self.row_piece]

    @property
    def box_rank(self) -> Ints:
        """Rank that writes each of the boxes of `box_tensor`."""
        return np.repeat(np.arange(self.world_size), np.diff(self.row_start))

    def piece(self, piece: int) -> Box:
        """One written box."""
        tensor = int(self.piece_tensor[piece])
        return self.tensors.box(tensor, self.piece_offsets[piece], self.piece_shapes[piece])

    def boxes_of(self, rank: int) -> list[tuple[int, Box]]:
        """Return tensor and box of all that a rank writes, in the order of its state."""
        pieces = self.row_piece[self.row_start[rank] : self.row_start[rank + 1]].tolist()
        return [(int(self.piece_tensor[p]), self.piece(p)) for p in pieces]

    def pieces_of(self, tensor: int) -> list[tuple[int, Box]]:
        """Return rank and box of everything that is written of a tensor, in C order of the boxes' first elements."""
        order, start = self._by_tensor
        rows = order[start[tensor] : start[tensor + 1]]
        ranks = (np.searchsorted(self.row_start, rows, side="right") - 1).tolist()
        return [(rank, self.piece(int(self.row_piece[row]))) for rank, row in zip(ranks, rows.tolist(), strict=True)]

    def load(self) -> Ints:
        """Return the bytes of tensors that each rank writes."""
        nbytes = self.piece_shapes.prod(axis=1) * self.tensors.itemsize[self.piece_tensor]
        sums = np.concatenate([[0], np.cumsum(nbytes[self.row_piece])])
        found: Ints = np.diff(sums[self.row_start])
        return found

    def replicas(self) -> Iterator[Replica]:
        """Iterate over the boxes that more than one rank holds, in order of tensors."""
        return (self._replica(box) for box in np.flatnonzero(self._replicated).tolist())

    def replicas_of(self, rank: int) -> list[Replica]:
        """Return those of `replicas` that a rank holds, in the order of `replicas`."""
        held = self._replicated & (self.holdings.box_rank < 0)
        group = self.holdings.rank_group[rank]
        boxes = np.repeat(np.arange(len(held)), np.diff(self.holdings.holder_start))
        mine = boxes[(self.holdings.holder_group == group) & held[boxes]]
        return [self._replica(box) for box in mine.tolist()]

    def holders(self, replica: Replica) -> Ints:
        """Return the ranks that hold a replicated box, ascending."""
        return self.holdings.holders(replica.index)

    @cached_property
    def hash(self) -> bytes:
        """SHA-256 over everything that decides what is written where: equal plans, equal hashes."""
        table = self.tensors
        sha = hashlib.sha256(struct.pack("<4Q", self.world_size, self.integrated, self.remove_redundancy, len(table)))
        for name in (*table.names, *self.value_owner):
            sha.update(struct.pack("<Q", len(name.encode())) + name.encode())
        owners = np.array(list(self.value_owner.values()), dtype=np.int64)
        columns = (table.name, table.dtype, table.ndim, table.shapes, table.per_rank, owners)
        pieces = (self.piece_tensor, self.piece_offsets, self.piece_shapes, self.row_start, self.row_piece)
        for column in (*columns, *pieces):
            sha.update(struct.pack("<Q", column.size))
            sha.update(np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<")).data)
        return sha.digest()

    @cached_property
    def _by_tensor(self) -> tuple[Ints, Ints]:
        # Pieces are numbered by tensor and place, so sorting rows by piece sorts them by both.
        order = np.argsort(self.row_piece, kind="stable").astype(np.int64)
        tensors = self.piece_tensor[self.row_piece[order]]
        return order, np.searchsorted(tensors, np.arange(len(self.tensors) + 1)).astype(np.int64)

    @cached_property
    def _replicated(self) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = self.holdings.holder_counts() > 1
        return found

    def _replica(self, box: int) -> Replica:
        held = self.holdings
        tensor = int(held.box_tensor[box])
        return Replica(box, tensor, self.tensors.box(tensor, held.box_offsets[box], held.box_shapes[box]))


def plan_save(
    descriptions: Sequence[Description],
    rank_description: npt.ArrayLike,
    nodes: npt.ArrayLike,
    *,
    integrated: bool,
    remove_redundancy: bool,
    split_replicas: bool,
    ownership: str = "parckpt",
    chunk_nbytes: int = CHUNK_NBYTES,
) -> SavePlan:
    """Decide who writes what.

    Not collective. Pure: equal input gives equal output on every rank.

    Parameters
    ----------
    descriptions : sequence of Description
        What ranks hold; equal ones once.
    rank_description : sequence of int
        For each rank, which of them is its own.
    nodes : sequence of int
        For each rank, its node, numbered from 0.
    integrated : bool
        One file: each distinct box has one writer.
    remove_redundancy : bool
        Else: if True each box is written once, if False by every rank that holds it.
    split_replicas : bool
        With `remove_redundancy`: boxes may be cut among their holders.
    ownership : {"parckpt", "mindspore"}
        With `remove_redundancy`: who writes a box, by bytes or by MindSpore's rule, which cuts none.
    chunk_nbytes : int
        How much more than the optimum a rank may write for the sake of uncut boxes.

    Raises
    ------
    LayoutError
        If the descriptions do not make a layout; names the first tensor that is wrong, and counts the others.
    """
    holdings = merge(descriptions, rank_description)
    value_owner = _own_values(descriptions, np.asarray(rank_description, dtype=np.int64), holdings)
    split = split_replicas and remove_redundancy and not integrated and ownership != "mindspore"
    _check_file_names(holdings.tensors)
    if integrated or remove_redundancy:
        replicas = replica_sets(holdings)
        shares: Shares
        if ownership == "mindspore" and not integrated:
            shares = assign_by_name(replicas, holdings.tensors.names, holdings.tensors.name[holdings.box_tensor])
        else:
            shares = assign_owners(replicas, nodes, split=split, chunk_nbytes=chunk_nbytes)
        pieces = owned_pieces(holdings, shares)
    else:
        pieces = all_pieces(holdings)
    return SavePlan(holdings, integrated, remove_redundancy, split, *pieces, value_owner=value_owner)


def _own_values(descriptions: Sequence[Description], rank_description: Ints, holdings: Holdings) -> Mapping[str, int]:
    """Give each plain value of the job to the lowest rank that has it.

    Raises
    ------
    LayoutError
        If a name is a value here and a tensor there, or belongs to one rank here and to the job there.
    """
    owner: dict[str, int] = {}
    tensors = set(holdings.tensors.names)
    kinds: dict[str, tuple[str, int]] = {}
    seen: set[tuple[tuple[str, ...], bytes]] = set()
    for rank in holdings.group_ranks[holdings.group_start[:-1]].tolist():
        description = descriptions[int(rank_description[rank])]
        key = description.value_names, description.value_flags.tobytes()
        if key in seen:  # ranks mostly have the same values
            continue
        seen.add(key)
        for name, flags in zip(description.value_names, description.value_flags.tolist(), strict=True):
            if flags & EMPTY and name in tensors:
                continue  # no value: this rank holds no Shard of that tensor
            kind = "PerRank" if flags & PER_RANK else "a plain value"
            if kinds.setdefault(name, (kind, rank))[0] != kind:
                raise _name_error(name, kinds[name], (kind, rank))
            if not flags & PER_RANK:
                owner.setdefault(name, rank)
    _check_tensor_names(kinds, holdings.tensors, holdings)
    return owner


def _check_tensor_names(kinds: Mapping[str, tuple[str, int]], table: TensorTable, holdings: Holdings) -> None:
    """Refuse names that are a value on one rank and a tensor on another, unless both belong to their ranks alone."""
    for name in sorted(kinds.keys() & set(table.names)):
        tensor = int(np.flatnonzero(table.name == table.names.index(name))[0])
        owner = int(table.per_rank[tensor])
        if owner >= 0 and kinds[name][0] == "PerRank":
            continue
        box = int(np.searchsorted(holdings.box_tensor, tensor))
        raise _name_error(name, ("a tensor", int(holdings.holders(box)[0])), kinds[name])


def _name_error(name: str, first: tuple[str, int], second: tuple[str, int]) -> LayoutError:
    said = f"{name!r} is {first[0]} on rank {first[1]} and {second[0]} on rank {second[1]}"
    return LayoutError(said, tensor=name, ranks=[first[1], second[1]], boxes=[])


def _check_file_names(table: TensorTable) -> None:
    """Refuse a tensor that has the name by which another rank's is opened, and stored in a common file."""
    own = {table[t].file_name: t for t in np.flatnonzero(table.per_rank >= 0).tolist()}
    taken = [name for name in table.names if name in own] if own else []
    if taken:
        row = table[own[taken[0]]]
        raise LayoutError(
            f"tensor {taken[0]!r} has the name of the PerRank tensor {row.name!r} of rank {row.per_rank} in the file",
            tensor=taken[0],
            ranks=[row.per_rank],
            boxes=[],
        )
