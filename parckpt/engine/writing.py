"""Producing one data file: from this rank's own arrays, or gathered from all ranks on root."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from parckpt.comm.base import Request
from parckpt.core.contents import Extent as StoredExtent
from parckpt.core.contents import chunk_count
from parckpt.core.layout import Box, whole
from parckpt.core.manifest import CHUNK_NBYTES
from parckpt.core.tensors import TensorRow
from parckpt.core.transfer import Copy, copies, insert
from parckpt.engine.arrays import Source
from parckpt.engine.chunks import ChunkWriter
from parckpt.engine.fileplan import FilePlan
from parckpt.engine.group import TAG_GATHER, Group
from parckpt.formats.base import Extent, Format, Literal

__all__ = ["GatherPlan", "Sink", "finish", "stream_gathered", "stream_local"]

Bytes = npt.NDArray[np.uint8]

# Messages under way per rank: enough to hide a round trip and a write, 16 MiB of memory.
LOOKAHEAD = 4


def stream_local(plan: FilePlan, form: Format, boxes: Sequence[tuple[Source, Box]], writer: ChunkWriter) -> None:
    """Write a file that holds this rank's boxes. Not collective.

    Parameters
    ----------
    boxes : sequence of (Source, Box)
        For each of the plan's boxes the held box it is part of, and the part itself in global coordinates.
    """
    entry, reader = -1, _Reader(iter(()))
    for part in plan.layout.parts:
        if isinstance(part, Literal):
            writer.append(part.data)
        elif part.entry >= plan.nboxes:
            content = plan.contents[part.entry - plan.nboxes]
            writer.append(content[part.start : part.start + part.nbytes])
        else:
            source, box = boxes[part.entry]
            if part.entry != entry:
                entry, reader = part.entry, _Reader(source.blocks(box, CHUNK_NBYTES))
            for block in reader.take(part.nbytes):
                writer.append(block)
            if part.start + part.nbytes == plan.entries[entry].nbytes:
                source.release()
    finish(plan, form, writer)


class _Reader:
    """Cuts a stream of blocks into pieces of the lengths asked for."""

    def __init__(self, blocks: Iterator[Bytes]) -> None:
        self._blocks = blocks
        self._rest = np.zeros(0, np.uint8)

    def take(self, nbytes: int) -> Iterator[Bytes]:
        """Yield blocks of ``nbytes`` in all."""
        while nbytes:
            if not self._rest.size:
                self._rest = next(self._blocks)
            block, self._rest = self._rest[:nbytes], self._rest[nbytes:]
            nbytes -= block.size
            yield block


def finish(plan: FilePlan, form: Format, writer: ChunkWriter) -> None:
    """Add the trailer, if the file has one, and wait until everything is written."""
    if plan.layout.trailer_nbytes:
        writer.append(form.trailer(writer.crc_so_far()))
    writer.finish()


@dataclass(frozen=True)
class GatherPlan:
    """Who holds what of one integrated file. Equal on all ranks.

    Attributes
    ----------
    owners : for each of the file's boxes (whole tensors), the (rank, box) pairs that together make it up.
    """

    file: FilePlan
    tensors: tuple[TensorRow, ...]
    owners: tuple[tuple[tuple[int, Box], ...], ...]

    @property
    def body_nbytes(self) -> int:
        """File bytes without the trailer."""
        return self.file.nbytes - self.file.layout.trailer_nbytes

    @cached_property
    def _starts(self) -> list[int]:
        return [part.byte_offset for part in self.file.layout.parts]

    def windows(self) -> Iterator[tuple[int, int]]:
        """Byte range of each chunk."""
        for index in range(chunk_count(self.body_nbytes, CHUNK_NBYTES)):
            yield index * CHUNK_NBYTES, min((index + 1) * CHUNK_NBYTES, self.body_nbytes)

    def parts(self, window: tuple[int, int]) -> Iterator[Literal | Extent]:
        """Parts of the file that touch a window, in order."""
        parts = self.file.layout.parts
        first = max(0, bisect_right(self._starts, window[0]) - 1)
        for part in parts[first:]:
            if part.byte_offset >= window[1]:
                return
            yield part

    def pieces(self, window: tuple[int, int]) -> dict[int, list[tuple[int, Box, Copy]]]:
        """For each rank with bytes in a window: (tensor, held box, rectangle), in file order."""
        found: dict[int, list[tuple[int, Box, Copy]]] = {}
        for part in self.parts(window):
            if isinstance(part, Literal) or part.entry >= self.file.nboxes or not part.nbytes:
                continue
            tensor = self.tensors[part.entry]
            extent = (StoredExtent(part.start, part.byte_offset, part.nbytes),)
            stored = whole(tensor.global_shape)
            for rank, box in self.owners[part.entry]:
                for copy in copies(stored, extent, tensor.dtype.itemsize, window, box, flat=False):
                    found.setdefault(rank, []).append((part.entry, box, copy))
        return found


class Sink(Protocol):
    """Where root puts the file's bytes, window after window."""

    def fill(self, count: int, fill: Callable[[Bytes], Any]) -> None:
        """Let ``fill`` write the next ``count`` bytes."""
        ...


def stream_gathered(
    group: Group, plan: GatherPlan, held: Mapping[tuple[int, Box], Source], sink: Sink | None
) -> Exception | None:
    """Bring all pieces to root, which puts them in file order (without the trailer). Collective.

    Root receives ahead while earlier chunks are checksummed and written. An error on any rank does not stop the
    messages, so nobody is left waiting; it is returned, to be agreed on.

    Parameters
    ----------
    held : mapping
        This rank's source for each (tensor, box) it owns.
    sink : Sink or None
        On root; None where root could not open the file: then everything is received and dropped.
    """
    if group.is_root:
        return _Receiver(group, plan, held, sink).run()
    return _send(group, plan, held)


def _send(group: Group, plan: GatherPlan, held: Mapping[tuple[int, Box], Source]) -> Exception | None:
    error: Exception | None = None
    under_way: deque[Request] = deque()
    for window in plan.windows():
        mine = plan.pieces(window).get(group.rank)
        if not mine:
            continue
        packed = np.empty(sum(copy.nbytes for _, _, copy in mine), np.uint8)
        position = 0
        for tensor, box, copy in mine:
            if error is None:
                error = _try(partial(_pack, held[tensor, box], copy, packed[position : position + copy.nbytes]))
            position += copy.nbytes
        under_way.append(group.comm.isend(packed, 0, TAG_GATHER))
        while len(under_way) >= LOOKAHEAD:
            group.wait(under_way.popleft(), "rank 0 taking a piece of the file")
    for request in under_way:
        group.wait(request, "rank 0 taking a piece of the file")
    for source in held.values():
        source.release()
    return error


def _pack(source: Source, copy: Copy, packed: Bytes) -> None:
    source.port().load(copy, packed)


def _try(step: Callable[[], None]) -> Exception | None:
    """Run user code or I/O between two messages; its error must wait for the agreement."""
    try:
        step()
    except Exception as error:
        return error
    return None


@dataclass
class _Expected:
    """One chunk whose pieces are on their way."""

    window: tuple[int, int]
    pieces: dict[int, list[tuple[int, Box, Copy]]]
    messages: dict[int, tuple[Request, Bytes]]


class _Receiver:
    """Root's side of `stream_gathered`."""

    def __init__(
        self,
        group: Group,
        plan: GatherPlan,
        held: Mapping[tuple[int, Box], Source],
        sink: Sink | None,
    ) -> None:
        self.group, self.plan, self.held, self.sink = group, plan, held, sink
        self.error: Exception | None = None
        self.ahead: deque[_Expected] = deque()

    def run(self) -> Exception | None:
        for window in self.plan.windows():
            self.ahead.append(self._expect(window))
            if len(self.ahead) >= LOOKAHEAD:
                self._take(self.ahead.popleft())
        while self.ahead:
            self._take(self.ahead.popleft())
        for source in self.held.values():
            source.release()
        return self.error

    def _expect(self, window: tuple[int, int]) -> _Expected:
        pieces = self.plan.pieces(window)
        messages: dict[int, tuple[Request, Bytes]] = {}
        for rank in sorted(pieces):
            if rank != 0:
                buffer = np.empty(sum(copy.nbytes for _, _, copy in pieces[rank]), np.uint8)
                messages[rank] = (self.group.comm.irecv(buffer, rank, TAG_GATHER), buffer)
        return _Expected(window, pieces, messages)

    def _take(self, chunk: _Expected) -> None:
        for rank, (request, _) in chunk.messages.items():
            self.group.wait(request, f"rank {rank} sending its pieces of the file")
        if self.sink is not None and self.error is None:
            nbytes = chunk.window[1] - chunk.window[0]
            self.error = _try(partial(self.sink.fill, nbytes, partial(self._assemble, chunk)))

    def _assemble(self, chunk: _Expected, window: Bytes) -> None:
        for part in self.plan.parts(chunk.window):
            if isinstance(part, Literal):
                _place(part.byte_offset, part.data, chunk.window, window)
            elif part.entry >= self.plan.file.nboxes:
                content = self.plan.file.contents[part.entry - self.plan.file.nboxes]
                _place(part.byte_offset, content[part.start : part.start + part.nbytes], chunk.window, window)
        for tensor, box, copy in chunk.pieces.get(0, ()):
            self.held[tensor, box].port().push(copy, window)
        for rank, (_, buffer) in chunk.messages.items():
            position = 0
            for _, _, copy in chunk.pieces[rank]:
                insert(copy, window, buffer[position : position + copy.nbytes])
                position += copy.nbytes


def _place(byte_offset: int, data: bytes, window: tuple[int, int], target: Bytes) -> None:
    first, last = max(byte_offset, window[0]), min(byte_offset + len(data), window[1])
    if first < last:
        target[first - window[0] : last - window[0]] = np.frombuffer(data, np.uint8)[
            first - byte_offset : last - byte_offset
        ]
