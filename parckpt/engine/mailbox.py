"""Many messages of known sizes between many ranks, sent and received without waiting and within bounded memory.

Receives are posted ahead, a few for each source. Sources for which the memory does not suffice are asked by probing:
so each sender's oldest message is always taken, and no pattern of messages can lock up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from parckpt.comm.arrival import Ticket
from parckpt.comm.base import Communicator, Request

__all__ = ["Inbox", "Outbox"]

Bytes = npt.NDArray[np.uint8]

OUTSTANDING_NBYTES = 64 << 20
"""Bytes on their way out of one rank, and as many on their way in: a dozen chunks hide any latency."""

OUTSTANDING_COUNT = 256
WINDOW = 4  # receives posted ahead for each source
PROBES = 16  # sources asked for in one step


def _pieces(message: Bytes, planned_nbytes: int, max_nbytes: int) -> Iterator[Bytes]:
    """A message in as many pieces as planned, also where it is shorter: the receiver has posted that many."""
    for start in range(0, planned_nbytes, max_nbytes):
        yield message[start : start + max_nbytes]


@dataclass
class _Message:
    """A message under way."""

    peer: int
    buffer: Bytes
    requests: list[Request]
    overdrawn: bool = False

    @property
    def is_complete(self) -> bool:
        return all(request.test() for request in self.requests)

    @property
    def ticket(self) -> Ticket | None:
        return self.requests[0].ticket if self.requests else None

    @property
    def content(self) -> Bytes:
        """What was received."""
        return self.buffer[: sum(request.nbytes for request in self.requests)]


class Outbox:
    """Messages on their way to other ranks."""

    def __init__(self, comm: Communicator, tag: int) -> None:
        self._comm, self._tag = comm, tag
        self._under_way: list[_Message] = []
        self._nbytes = 0

    @property
    def is_empty(self) -> bool:
        """All messages were taken."""
        return not self._under_way

    @property
    def has_room(self) -> bool:
        """Whether another message may be sent now."""
        return self._nbytes < OUTSTANDING_NBYTES and len(self._under_way) < OUTSTANDING_COUNT

    @property
    def destinations(self) -> set[int]:
        """Ranks that have not taken all."""
        return {message.peer for message in self._under_way}

    @property
    def ticket(self) -> Ticket | None:
        """Of one message under way."""
        return self._under_way[0].ticket if self._under_way else None

    def send(self, dest: int, message: Bytes, planned_nbytes: int) -> None:
        """Begin to send; the message must not change until it is taken. Shorter than planned is fine."""
        pieces = _pieces(message, planned_nbytes, self._comm.max_nbytes)
        requests = [self._comm.isend(piece, dest, self._tag) for piece in pieces]
        self._under_way.append(_Message(dest, message, requests))
        self._nbytes += message.size

    def poll(self) -> bool:
        """Forget what was taken; whether there was any."""
        before = len(self._under_way)
        self._under_way = [message for message in self._under_way if not message.is_complete]
        self._nbytes = sum(message.buffer.size for message in self._under_way)
        return len(self._under_way) < before


@dataclass
class _Line:
    """What is expected from one rank, in order: planned sizes, then receives under way."""

    source: int
    sizes: deque[int]
    posted: deque[_Message] = field(default_factory=deque)


class Inbox:
    """Messages expected from other ranks.

    Parameters
    ----------
    sizes : mapping
        For each source the greatest length of each of its messages, in the order in which it sends them.
    """

    def __init__(self, comm: Communicator, tag: int, sizes: Mapping[int, Sequence[int]]) -> None:
        self._comm, self._tag = comm, tag
        self._lines = deque(_Line(source, deque(row)) for source, row in sorted(sizes.items()) if row)
        self._nbytes = self._count = 0
        self._overdrawn = False
        self._post_ahead()

    @property
    def is_empty(self) -> bool:
        """Everything has come."""
        return not self._lines

    @property
    def sources(self) -> set[int]:
        """Ranks of which something is missing."""
        return {line.source for line in self._lines}

    @property
    def ticket(self) -> Ticket | None:
        """Of one receive under way."""
        return next((line.posted[0].ticket for line in self._lines if line.posted), None)

    def poll(self) -> list[tuple[int, Bytes]]:
        """What has come since the last call, as (source, message): in order for each source."""
        found: list[tuple[int, Bytes]] = []
        for line in self._lines:
            while line.posted and line.posted[0].is_complete:
                message = line.posted.popleft()
                self._nbytes -= message.buffer.size
                self._count -= 1
                self._overdrawn &= not message.overdrawn
                found.append((line.source, message.content))
        if found:
            self._lines = deque(line for line in self._lines if line.posted or line.sizes)
            self._post_ahead()
        self._probe()
        return found

    def _post_ahead(self) -> None:
        # In turns, so that the first sources do not take all the memory.
        for depth in range(WINDOW):
            for line in self._lines:
                if len(line.posted) == depth and line.sizes and self._has_room(line.sizes[0]):
                    self._post(line)

    def _has_room(self, nbytes: int) -> bool:
        return self._nbytes + nbytes <= OUTSTANDING_NBYTES and self._count < OUTSTANDING_COUNT

    def _post(self, line: _Line, *, overdrawn: bool = False) -> None:
        buffer = np.empty(line.sizes.popleft(), np.uint8)
        pieces = _pieces(buffer, buffer.size, self._comm.max_nbytes)
        requests = [self._comm.irecv(piece, line.source, self._tag) for piece in pieces]
        line.posted.append(_Message(line.source, buffer, requests, overdrawn))
        self._nbytes += buffer.size
        self._count += 1

    def _probe(self) -> None:
        """Take one message beyond the memory, of a source that has none posted: its sender has begun, so it ends."""
        for _ in range(min(PROBES, len(self._lines))):
            if self._overdrawn:
                return
            line = self._lines[0]
            self._lines.rotate(-1)
            if not line.posted and self._comm.iprobe(line.source, self._tag) is not None:
                self._overdrawn = True
                self._post(line, overdrawn=True)
