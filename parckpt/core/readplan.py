"""Who reads which stored chunk at a restore, and who gets which part of it.

Every chunk that anyone needs has exactly one reader in the whole job: it is verified once and passed on. Every wanted
element comes from exactly one stored box, also where several files hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from parckpt.core.chunkbytes import bytes_by_chunk
from parckpt.core.contents import Contents, StoredBox, chunk_count
from parckpt.core.cover import Cover
from parckpt.core.layout import Box

__all__ = ["ChunkRead", "Delivery", "ReadPlan", "Segment", "Want", "plan_reads"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Want:
    """One box that one rank wants: index of the tensor in the contents, and the box in global coordinates."""

    tensor: int
    box: Box


@dataclass(frozen=True)
class Segment:
    """``part`` (global coordinates) of a rank's want number ``want`` comes from the stored box ``stored``."""

    want: int
    stored: StoredBox
    part: Box


@dataclass(frozen=True)
class Delivery:
    """What one chunk gives to one rank: the segments in a fixed order, ``nbytes`` of them in this chunk."""

    rank: int
    segments: tuple[Segment, ...]
    nbytes: int


@dataclass(frozen=True)
class ChunkRead:
    """One chunk of one file, its reader, and what it gives to whom, by ascending rank."""

    file: int
    chunk: int
    reader: int
    deliveries: tuple[Delivery, ...]


@dataclass(frozen=True, eq=False)
class ReadPlan:
    """Equal on all ranks for equal arguments of `plan_reads`.

    Attributes
    ----------
    wants : sequence of sequence of Want
        As given, by rank.
    file, chunk, reader : int64 array
        For each chunk that is needed, ascending by file and chunk.
    """

    wants: Sequence[Sequence[Want]]
    file: Ints
    chunk: Ints
    reader: Ints
    _starts: Ints  # of each chunk's uses; the uses of one chunk are ascending by rank
    _use_part: Ints
    _use_nbytes: Ints
    _part_rank: Ints
    _segments: tuple[Segment, ...]

    def reads_of(self, rank: int) -> list[ChunkRead]:
        """What a rank reads, in the order in which it reads and sends."""
        return [self.read(row) for row in np.flatnonzero(self.reader == rank).tolist()]

    def receipts_of(self, rank: int) -> dict[int, list[ChunkRead]]:
        """What a rank gets from each other rank, in the order in which that one sends; with its own delivery alone."""
        found: dict[int, list[ChunkRead]] = {}
        mine = np.unique(self._use_chunk[self._part_rank[self._use_part] == rank])
        for row in mine[self.reader[mine] != rank].tolist():
            own = tuple(delivery for delivery in self._deliveries(row) if delivery.rank == rank)
            found.setdefault(int(self.reader[row]), []).append(replace(self.read(row), deliveries=own))
        return found

    def read(self, row: int) -> ChunkRead:
        """One chunk."""
        where = int(self.file[row]), int(self.chunk[row]), int(self.reader[row])
        return ChunkRead(*where, tuple(self._deliveries(row)))

    @cached_property
    def _use_chunk(self) -> Ints:
        return np.repeat(np.arange(len(self.file)), np.diff(self._starts))

    def _deliveries(self, row: int) -> Iterator[Delivery]:
        first, last = int(self._starts[row]), int(self._starts[row + 1])
        parts, sizes = self._use_part[first:last].tolist(), self._use_nbytes[first:last].tolist()
        ranks = self._part_rank[self._use_part[first:last]].tolist()
        begin = 0
        for end in range(1, len(parts) + 1):
            if end == len(parts) or ranks[end] != ranks[begin]:
                segments = tuple(self._segments[part] for part in parts[begin:end])
                yield Delivery(ranks[begin], segments, sum(sizes[begin:end]))
                begin = end


def plan_reads(
    contents: Contents, wants: Sequence[Sequence[Want]], *, local_files: Mapping[int, int] | None = None
) -> ReadPlan:
    """Plan a restore. Not collective; pure: equal on all ranks for equal arguments.

    Parameters
    ----------
    contents : Contents
        What the files hold.
    wants : sequence of sequence of Want
        By rank. Empty boxes need nothing.
    local_files : mapping, optional
        File index to the rank that prefers it. By default file r is rank r's where the job wrote several files.

    Raises
    ------
    IntegrityError
        If a wanted box is not stored completely. Facts: ``tensor``, ``offsets``, ``shape`` of an uncovered box.

    Notes
    -----
    Of equal stored boxes a rank takes the one in its own file, else the one in the lowest. Of ranks that need a chunk,
    the one whose file it is reads it, if none needs more of it; the others go to the least loaded rank.
    """
    nfiles, nranks = len(contents.files), len(wants)
    if local_files is None:
        local_files = {file: file for file in range(min(nfiles, nranks))} if nfiles > 1 else {}
        # With another number of ranks own files would leave some ranks without work.
        first_readers: Mapping[int, int] = local_files if nfiles == nranks else {}
    else:
        first_readers = local_files
    segments, ranks = _segments(contents, wants, local_files)
    use_id, use_part, use_nbytes = _uses(contents, segments)
    part_rank = np.array(ranks, np.int64)
    order = np.lexsort((use_part, part_rank[use_part], use_id))
    use_id, use_part, use_nbytes = use_id[order], use_part[order], use_nbytes[order]
    ids, starts = np.unique(use_id, return_index=True)
    base = _chunk_base(contents)
    file = np.searchsorted(base, ids, side="right") - 1
    chunk = ids - base[file]
    bounds = np.append(starts, len(use_id)).astype(np.int64)
    lengths = [f.nbytes for f in contents.files]
    nbytes = [
        min(contents.chunk_nbytes, lengths[f] - c * contents.chunk_nbytes)
        for f, c in zip(file.tolist(), chunk.tolist(), strict=True)
    ]
    needs = _needs(bounds, part_rank[use_part], use_nbytes)
    readers = _choose_readers([first_readers.get(f, -1) for f in file.tolist()], needs, nbytes, nranks)
    return ReadPlan(
        wants, file, chunk, np.array(readers, np.int64), bounds, use_part, use_nbytes, part_rank, tuple(segments)
    )


def _segments(
    contents: Contents, wants: Sequence[Sequence[Want]], local_files: Mapping[int, int]
) -> tuple[list[Segment], list[int]]:
    """Every segment of every rank, and the rank of each."""
    asked: dict[int, list[tuple[int, int, Box]]] = {}
    for rank, row in enumerate(wants):
        for number, want in enumerate(row):
            if not want.box.is_empty:
                asked.setdefault(want.tensor, []).append((rank, number, want.box))
    segments: list[Segment] = []
    ranks: list[int] = []
    for tensor, row_of in asked.items():
        cover = Cover(contents, tensor, local_files)
        for rank, number, box in row_of:
            for found, part in cover.parts(rank, box):
                segments.append(Segment(number, found, part))
                ranks.append(rank)
    return segments, ranks


def _chunk_base(contents: Contents) -> Ints:
    """Number of chunks before each file: chunk ids count through all files."""
    counts = [chunk_count(f.nbytes, contents.chunk_nbytes) for f in contents.files]
    base: Ints = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    # Empty files share their base with the next one, so the search from the right finds the file that has the chunk.
    return base[:-1]


def _uses(contents: Contents, segments: Sequence[Segment]) -> tuple[Ints, Ints, Ints]:
    """Which chunks each segment takes bytes from: (chunk id, segment, bytes), each pair once."""
    base = _chunk_base(contents).tolist()
    # Ranks that hold replicas want equal parts: those are counted once.
    number: dict[tuple[int, Box], int] = {}
    distinct: list[tuple[StoredBox, Box, int]] = []
    for segment in segments:
        key = segment.stored.index, segment.part
        if key not in number:
            number[key] = len(distinct)
            distinct.append((segment.stored, segment.part, contents.tensors[segment.stored.tensor].dtype.itemsize))
    by_chunk = bytes_by_chunk(distinct, contents.chunk_nbytes)
    ids: list[int] = []
    counts: list[int] = []
    sizes: list[int] = []
    for segment in segments:
        found = by_chunk[number[segment.stored.index, segment.part]]
        first = base[segment.stored.file]
        ids += [first + chunk for chunk in found]
        sizes += found.values()
        counts.append(len(found))
    parts = np.repeat(np.arange(len(segments)), counts) if segments else np.zeros(0)
    return np.array(ids, np.int64), parts.astype(np.int64), np.array(sizes, np.int64)


def _needs(bounds: Ints, ranks: Ints, nbytes: Ints) -> list[dict[int, int]]:
    """For each chunk the bytes that each rank needs of it."""
    rank_list, size_list = ranks.tolist(), nbytes.tolist()
    needs: list[dict[int, int]] = []
    limits = bounds.tolist()
    for first, last in pairwise(limits):
        need: dict[int, int] = {}
        for position in range(first, last):
            need[rank_list[position]] = need.get(rank_list[position], 0) + size_list[position]
        needs.append(need)
    return needs


def _choose_readers(
    owners: Sequence[int], needs: Sequence[Mapping[int, int]], nbytes: Sequence[int], nranks: int
) -> list[int]:
    """One of the ranks that need it, for each chunk."""
    load = [0] * nranks
    readers = [-1] * len(needs)
    for row, (owner, need) in enumerate(zip(owners, needs, strict=True)):
        if len(need) == 1:
            readers[row] = next(iter(need))
        elif need.get(owner, -1) == max(need.values()):
            readers[row] = owner
        if readers[row] >= 0:
            load[readers[row]] += nbytes[row]
    # Those that are settled first: so the others even out what they leave uneven.
    for row, need in enumerate(needs):
        if readers[row] < 0:
            readers[row] = min(need, key=lambda rank: (load[rank], -need[rank], rank))
            load[readers[row]] += nbytes[row]
    return readers
