"""One file from the arrays of all ranks: pieces travel to root in bounded messages, root puts them in file order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

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
from parckpt.engine.fileplan import FilePlan
from parckpt.engine.group import TAG_GATHER, Group
from parckpt.formats.base import Extent, Literal

__all__ = ["GatherPlan", "Owners", "Sink", "stream_gathered"]

Bytes = npt.NDArray[np.uint8]
Window = tuple[int, int]

# Messages under way per rank: enough to hide a round trip and a write, 16 MiB of memory.
LOOKAHEAD = 4


class Span(NamedTuple):
    """One owned box, and where its first and last byte lie in the tensor's C order; ``is_run``: all between is its."""

    first: int
    last: int
    rank: int
    box: Box
    is_run: bool


class Piece(NamedTuple):
    """What one box has in common with one window: a rectangle, or a run (flat in file and array)."""

    part: Extent
    box: Box
    copy: Copy
    is_run: bool


class Owners:
    """Who owns which boxes of each tensor, to be asked by byte range. Kept while the save plan is.

    Parameters
    ----------
    tensors : sequence of TensorRow
    pairs : callable
        For the index of a tensor its (rank, box) pairs: all of them on root, a sender's own elsewhere.
    """

    def __init__(self, tensors: Sequence[TensorRow], pairs: Callable[[int], Sequence[tuple[int, Box]]]) -> None:
        self.tensors = tensors
        self._spans: list[list[Span]] = []
        self._firsts: list[list[int]] = []
        self._reach: list[list[int]] = []
        for index, tensor in enumerate(tensors):
            spans = sorted(_span(tensor, rank, box) for rank, box in pairs(index))
            self._spans.append(spans)
            self._firsts.append([span.first for span in spans])
            # How far the spans up to each one reach: spans of boxes cut by columns lie within each other.
            self._reach.append(list(accumulate((span.last for span in spans), max)))

    def within(self, tensor: int, start: int, stop: int) -> Sequence[Span]:
        """Boxes that may have bytes in a range of the tensor's C order, in the same order for everybody."""
        spans = self._spans[tensor]
        if len(spans) < 2:
            return spans
        return spans[bisect_right(self._reach[tensor], start) : bisect_left(self._firsts[tensor], stop)]


def _span(tensor: TensorRow, rank: int, box: Box) -> Span:
    shape = tensor.global_shape
    if box.shape == shape:
        return Span(0, box.size * tensor.dtype.itemsize, rank, box, True)
    first = last = 0
    for offset, length, extent in zip(box.offsets, box.shape, shape, strict=True):
        first = first * extent + offset
        last = last * extent + offset + length - 1
    nbytes = tensor.dtype.itemsize
    return Span(first * nbytes, (last + 1) * nbytes, rank, box, last + 1 - first == box.size)


@dataclass(frozen=True)
class GatherPlan:
    """Who holds what of one integrated file: all of it on root, a rank's own part elsewhere."""

    file: FilePlan
    owners: Owners

    @property
    def body_nbytes(self) -> int:
        """File bytes without the trailer."""
        return self.file.nbytes - self.file.layout.trailer_nbytes

    @cached_property
    def _starts(self) -> list[int]:
        return [part.byte_offset for part in self.file.layout.parts]

    def windows(self) -> Iterator[Window]:
        """Byte range of each chunk."""
        for index in range(chunk_count(self.body_nbytes, CHUNK_NBYTES)):
            yield index * CHUNK_NBYTES, min((index + 1) * CHUNK_NBYTES, self.body_nbytes)

    def parts(self, window: Window) -> Sequence[Literal | Extent]:
        """Parts of the file that touch a window, in order."""
        first = max(0, bisect_right(self._starts, window[0]) - 1)
        return self.file.layout.parts[first : bisect_left(self._starts, window[1])]

    def pieces(self, window: Window) -> dict[int, list[Piece]]:
        """For each rank what it has in a window; the same order on root and on that rank."""
        found: dict[int, list[Piece]] = {}
        for part in self.parts(window):
            if isinstance(part, Literal) or part.entry >= self.file.nboxes or not part.nbytes:
                continue
            move = part.byte_offset - part.start
            start, stop = max(window[0] - move, part.start), min(window[1] - move, part.start + part.nbytes)
            for span in self.owners.within(part.entry, start, stop):
                if span.is_run:
                    first, last = max(start, span.first), min(stop, span.last)
                    if first < last:
                        copy = _run(first + move - window[0], first - span.first, last - first)
                        found.setdefault(span.rank, []).append(Piece(part, span.box, copy, True))
                else:
                    for copy in self.rectangles(part, span.box, window):
                        found.setdefault(span.rank, []).append(Piece(part, span.box, copy, False))
        return found

    def rectangles(self, part: Extent, box: Box, window: Window) -> list[Copy]:
        """What a box has in a window, for an array in any memory order."""
        tensor = self.owners.tensors[part.entry]
        extent = (StoredExtent(part.start, part.byte_offset, part.nbytes),)
        return copies(whole(tensor.global_shape), extent, tensor.dtype.itemsize, window, box, flat=False)


def _run(position: int, start: int, nbytes: int) -> Copy:
    return Copy(position, (nbytes,), (slice(0, nbytes),), (slice(start, start + nbytes),), nbytes)


class Sink(Protocol):
    """Where root puts the file's bytes, window after window."""

    def fill(self, count: int, fill: Callable[[Bytes], Any]) -> None:
        """Let ``fill`` write the next ``count`` bytes."""
        ...


Held = Mapping[tuple[int, Box], Source]


def stream_gathered(group: Group, plan: GatherPlan, held: Held, sink: Sink | None) -> Exception | None:
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
    end = _Receiver(group, plan, held, sink) if group.is_root else _Sender(group, plan, held)
    try:
        return end.run()
    finally:
        for source in held.values():
            source.release()


class _End:
    """One rank's side."""

    def __init__(self, group: Group, plan: GatherPlan, held: Held) -> None:
        self.group, self.plan, self.held = group, plan, held
        self.error: Exception | None = None
        # Reused: touching fresh memory for each message costs more than the message.
        self._buffers: list[Bytes] = []
        self._left = {key: key[1].size * source.dtype.itemsize for key, source in held.items()}

    def guard(self, step: Callable[[], None]) -> None:
        """Run user code or I/O between two messages, unless one failed; its error must wait for the agreement."""
        if self.error is None:
            try:
                step()
            except Exception as error:
                self.error = error

    def take_buffer(self) -> Bytes:
        """Room for one chunk."""
        return self._buffers.pop() if self._buffers else np.empty(min(CHUNK_NBYTES, self.plan.body_nbytes), np.uint8)

    def give_back(self, buffer: Bytes) -> None:
        """Reuse a buffer that no message uses any more."""
        self._buffers.append(buffer)

    def copies(self, piece: Piece, source: Source, window: Window) -> Sequence[Copy]:
        """The piece as the rank's own array needs it; in the message the bytes are the same."""
        if piece.is_run and not source.port().flat:
            return self.plan.rectangles(piece.part, piece.box, window)
        return (piece.copy,)

    def count(self, piece: Piece) -> None:
        """Let a Leaf go once all of it is in place or on its way."""
        key = piece.part.entry, piece.box
        self._left[key] -= piece.copy.nbytes
        if not self._left[key]:
            self.held[key].release()


class _Sender(_End):
    """A rank's side: packs what it has in each chunk into one message."""

    def __init__(self, group: Group, plan: GatherPlan, held: Held) -> None:
        super().__init__(group, plan, held)
        self._under_way: deque[tuple[Request, Bytes | None]] = deque()

    def run(self) -> Exception | None:
        for window in self.plan.windows():
            if mine := self.plan.pieces(window).get(self.group.rank):
                self._send(mine, window)
        while self._under_way:
            self._settle()
        return self.error

    def _send(self, mine: list[Piece], window: Window) -> None:
        while len(self._under_way) >= LOOKAHEAD:
            self._settle()
        message, buffer = self._as_it_lies(mine), None
        if message is None:
            buffer = self.take_buffer()
            message = buffer[: sum(piece.copy.nbytes for piece in mine)]
            self.guard(partial(self._pack, mine, window, message))
        self._under_way.append((self.group.isend(message, 0, TAG_GATHER), buffer))
        for piece in mine:
            self.count(piece)

    def _settle(self) -> None:
        request, buffer = self._under_way.popleft()
        self.group.wait(request, "rank 0 taking a piece of the file")
        if buffer is not None:
            self.give_back(buffer)

    def _as_it_lies(self, mine: list[Piece]) -> Bytes | None:
        """The message without packing: one run of plain memory. The request keeps the memory alive."""
        if len(mine) != 1 or not mine[0].is_run:
            return None
        found: list[Bytes] = []

        def view() -> None:
            port = self.held[mine[0].part.entry, mine[0].box].port()
            if port.flat:
                found.append(port.array.reshape(-1).view(np.uint8)[mine[0].copy.array_index[0]])

        self.guard(view)
        return found[0] if found else None

    def _pack(self, mine: list[Piece], window: Window, message: Bytes) -> None:
        position = 0
        for piece in mine:
            source = self.held[piece.part.entry, piece.box]
            for copy in self.copies(piece, source, window):
                source.port().load(copy, message[position : position + copy.nbytes])
                position += copy.nbytes


@dataclass
class _Expected:
    """One chunk whose pieces are on their way."""

    window: Window
    pieces: dict[int, list[Piece]]
    messages: dict[int, tuple[Request, Bytes]]
    buffer: Bytes | None


class _Receiver(_End):
    """Root's side."""

    def __init__(self, group: Group, plan: GatherPlan, held: Held, sink: Sink | None) -> None:
        super().__init__(group, plan, held)
        self.sink = sink
        self.ahead: deque[_Expected] = deque()

    def run(self) -> Exception | None:
        for window in self.plan.windows():
            self.ahead.append(self._expect(window))
            if len(self.ahead) >= LOOKAHEAD:
                self._take(self.ahead.popleft())
        while self.ahead:
            self._take(self.ahead.popleft())
        return self.error

    def _expect(self, window: Window) -> _Expected:
        pieces = self.plan.pieces(window)
        messages: dict[int, tuple[Request, Bytes]] = {}
        ranks = [rank for rank in sorted(pieces) if rank != 0]
        buffer = self.take_buffer() if ranks else None
        position = 0
        for rank in ranks:
            assert buffer is not None
            nbytes = sum(piece.copy.nbytes for piece in pieces[rank])
            message = buffer[position : position + nbytes]
            position += nbytes
            messages[rank] = (self.group.irecv(message, rank, TAG_GATHER), message)
        return _Expected(window, pieces, messages, buffer)

    def _take(self, chunk: _Expected) -> None:
        for rank, (request, _) in chunk.messages.items():
            self.group.wait(request, f"rank {rank} sending its pieces of the file")
        if self.sink is not None:
            nbytes = chunk.window[1] - chunk.window[0]
            self.guard(partial(self.sink.fill, nbytes, partial(self._assemble, chunk)))
        for piece in chunk.pieces.get(0, ()):
            self.count(piece)
        if chunk.buffer is not None:
            self.give_back(chunk.buffer)

    def _assemble(self, chunk: _Expected, window: Bytes) -> None:
        for part in self.plan.parts(chunk.window):
            if isinstance(part, Literal):
                _place(part.byte_offset, part.data, chunk.window, window)
            elif part.entry >= self.plan.file.nboxes:
                content = self.plan.file.contents[part.entry - self.plan.file.nboxes]
                _place(part.byte_offset, content[part.start : part.start + part.nbytes], chunk.window, window)
        for piece in chunk.pieces.get(0, ()):
            source = self.held[piece.part.entry, piece.box]
            for copy in self.copies(piece, source, chunk.window):
                source.port().push(copy, window)
        for rank, (_, message) in chunk.messages.items():
            position = 0
            for piece in chunk.pieces[rank]:
                insert(piece.copy, window, message[position : position + piece.copy.nbytes])
                position += piece.copy.nbytes


def _place(byte_offset: int, data: bytes, window: Window, target: Bytes) -> None:
    first, last = max(byte_offset, window[0]), min(byte_offset + len(data), window[1])
    if first < last:
        source = np.frombuffer(data, np.uint8)
        target[first - window[0] : last - window[0]] = source[first - byte_offset : last - byte_offset]
