"""Ranks of one process, one per thread, talking through memory.

One rank is `SelfCommunicator`, many are a test's world. It behaves as MPI may, not as kindly as memory could: long
sends complete only when they are received, results appear in the caller's buffer only when the caller tests, and misuse
that MPI answers with a hang or garbage is an error here.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from parckpt.comm.arrival import RollCall, Ticket
from parckpt.comm.base import MAX_NBYTES, Buffer, Bytes, Int64s, Request, as_bytes, host_domain
from parckpt.errors import InternalError

__all__ = ["EAGER_NBYTES", "Exchange", "MemoryCommunicator"]

EAGER_NBYTES = 64 << 10
"""Sends up to this length complete at once, as MPI's usually do; longer ones wait for their receiver."""


@dataclass(eq=False)
class _Request:
    """A message on its way, or one rank's part in a collective."""

    exchange: Exchange
    ticket: Ticket
    view: memoryview
    nbytes: int = 0
    done: bool = False
    problem: str | None = None
    meeting: _Meeting | None = None

    def test(self) -> bool:
        with self.exchange.lock:
            self.exchange.check()
            if self.problem is not None:
                raise InternalError(self.problem)
            if not self.done and self.meeting is not None and self.meeting.result is not None:
                self.view[:] = self.meeting.result
                self.done = True
            return self.done


class _Kind(NamedTuple):
    """What must be equal on all ranks of one collective."""

    name: str
    nbytes: int
    root: int = 0


@dataclass(eq=False)
class _Meeting:
    """One collective: what each rank brought, and the result once it is known."""

    kind: _Kind
    brought: dict[int, bytes] = field(default_factory=dict)
    result: bytes | None = None


class Exchange:
    """The memory that the ranks of one world share.

    Parameters
    ----------
    size : int
        Number of ranks.
    max_nbytes : int, optional
        Longest buffer of one call; tests set it low to see data cut into pieces.
    """

    def __init__(self, size: int, *, max_nbytes: int = MAX_NBYTES) -> None:
        self.size = size
        self.max_nbytes = max_nbytes
        self.lock = threading.RLock()
        self._aborted: BaseException | None = None
        # Keyed by (context of the communicator, receiving rank, tag); sender first in each entry, oldest entry first.
        self._arrived: defaultdict[tuple[str, int, int], deque[tuple[int, bytes | _Request]]] = defaultdict(deque)
        self._awaited: defaultdict[tuple[str, int, int], deque[tuple[int, _Request]]] = defaultdict(deque)
        self._meetings: dict[tuple[str, int], _Meeting] = {}

    def abort(self, reason: BaseException) -> None:
        """Make every further call of every rank fail: what MPI_Abort is to processes."""
        with self.lock:
            self._aborted = self._aborted or reason

    def check(self) -> None:
        """Raise if the world was aborted."""
        if self._aborted is not None:
            raise InternalError(f"another rank ended the world: {self._aborted!r}")

    def send(self, key: tuple[str, int, int], source: int, request: _Request) -> None:
        """Hand a message to a waiting receive, or keep it."""
        with self.lock:
            self.check()
            waiting = self._awaited[key]
            for entry in waiting:
                if entry[0] == source:
                    waiting.remove(entry)
                    self._deliver(request.view, entry[1])
                    request.done = True
                    return
            request.done = len(request.view) <= EAGER_NBYTES
            self._arrived[key].append((source, bytes(request.view) if request.done else request))

    def receive(self, key: tuple[str, int, int], source: int, request: _Request) -> None:
        """Take the oldest message of a sender, or wait for it."""
        with self.lock:
            self.check()
            arrived = self._arrived[key]
            for entry in arrived:
                if entry[0] == source:
                    arrived.remove(entry)
                    sender = entry[1]
                    self._deliver(sender if isinstance(sender, bytes) else sender.view, request)
                    if isinstance(sender, _Request):
                        sender.done = True
                    return
            self._awaited[key].append((source, request))

    def probe(self, key: tuple[str, int, int], source: int | None) -> tuple[int, int] | None:
        """Sender and length of the oldest message that fits."""
        with self.lock:
            self.check()
            for sender, message in self._arrived[key]:
                if source is None or sender == source:
                    return sender, len(message if isinstance(message, bytes) else message.view)
            return None

    def meet(self, key: tuple[str, int], kind: _Kind, rank: int, data: bytes) -> _Meeting:
        """Bring this rank's part to a collective; the last one to come makes the result."""
        with self.lock:
            self.check()
            meeting = self._meetings.setdefault(key, _Meeting(kind))
            if meeting.kind != kind:
                raise InternalError(f"ranks disagree on collective {key[1]}: {meeting.kind} and {kind}")
            meeting.brought[rank] = data
            if kind.name == "bcast":
                # Root does not wait for the others, and they not for each other.
                meeting.result = meeting.brought.get(kind.root)
            elif len(meeting.brought) == self.size:
                meeting.result = self._combine(kind, [meeting.brought[r] for r in range(self.size)])
            if len(meeting.brought) == self.size:
                del self._meetings[key]
            return meeting

    @staticmethod
    def _combine(kind: _Kind, parts: list[bytes]) -> bytes:
        if kind.name == "allgather":
            return b"".join(parts)
        columns = np.array([np.frombuffer(part, np.int64) for part in parts])
        return bytes(columns.max(axis=0).data)

    @staticmethod
    def _deliver(message: bytes | memoryview, receiver: _Request) -> None:
        if len(message) > len(receiver.view):
            receiver.problem = f"a message of {len(message)} bytes met a receive of {len(receiver.view)}"
            return
        receiver.view[: len(message)] = message
        receiver.nbytes = len(message)
        receiver.done = True


class MemoryCommunicator:
    """One rank's end of an `Exchange`; fits `parckpt.comm.base.Communicator`."""

    def __init__(self, exchange: Exchange, rank: int, *, node: str | None = None, context: str = "") -> None:
        self._exchange = exchange
        self._rank = rank
        self._node = host_domain() if node is None else node
        self._context = context
        self._duplicates = 0
        self._freed = False
        self._roll_call = RollCall(self)

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._exchange.size

    @property
    def max_nbytes(self) -> int:
        """Longest buffer of one call."""
        return self._exchange.max_nbytes

    def duplicate(self) -> MemoryCommunicator:
        """Make a communicator of the same ranks with messages of its own. Collective, but waits for nobody."""
        self._check()
        self._duplicates += 1
        # All ranks duplicate in the same order, so they arrive at the same name without talking.
        context = f"{self._context}.{self._duplicates}"
        return MemoryCommunicator(self._exchange, self._rank, node=self._node, context=context)

    def free(self) -> None:
        """Make every further call an error."""
        self._freed = True

    def isend(self, data: Buffer, dest: int, tag: int) -> Request:
        """Send to one rank."""
        request = self._message(data, dest)
        self._exchange.send((self._context, dest, tag), self._rank, request)
        return request

    def irecv(self, buffer: Buffer, source: int, tag: int) -> Request:
        """Receive from one rank."""
        request = self._message(buffer, source)
        if request.view.readonly:
            raise InternalError("cannot receive into a read-only buffer")
        self._exchange.receive((self._context, self._rank, tag), source, request)
        return request

    def iprobe(self, source: int | None, tag: int) -> tuple[int, int] | None:
        """Source and length of a message that can be received now."""
        self._check()
        return self._exchange.probe((self._context, self._rank, tag), source)

    def iallreduce_max(self, values: Int64s, result: Int64s) -> Request:
        """Element-wise maximum. Collective."""
        if values.dtype != np.int64 or result.dtype != np.int64 or values.size != result.size:
            raise InternalError("a maximum is taken of int64 into as many int64")
        data = as_bytes(values)
        return self._meet(_Kind("max", len(data)), data, as_bytes(result))

    def ibcast(self, buffer: Buffer, root: int) -> Request:
        """Copy root's buffer to all. Collective."""
        view = as_bytes(buffer)
        request = self._meet(_Kind("bcast", len(view), root), view if self._rank == root else memoryview(b""), view)
        if self._rank == root:
            # Its buffer holds the result already, and may be read-only.
            request.done = True
        return request

    def iallgather(self, data: Bytes, result: Bytes) -> Request:
        """Gather equally long pieces. Collective."""
        view = as_bytes(data)
        if len(as_bytes(result)) != len(view) * self.size:
            raise InternalError(f"{self.size} pieces of {len(view)} bytes do not fill {len(as_bytes(result))}")
        return self._meet(_Kind("allgather", len(view)), view, as_bytes(result))

    def node(self) -> str:
        """Name of the memory domain."""
        return self._node

    def _check(self) -> None:
        if self._freed:
            raise InternalError("this communicator was freed")
        self._roll_call.check()

    def _bounded(self, view: memoryview) -> memoryview:
        if len(view) > self.max_nbytes:
            raise InternalError(f"{len(view)} bytes in one call, at most {self.max_nbytes} are allowed")
        return view

    def _message(self, buffer: Buffer, peer: int) -> _Request:
        self._check()
        if not 0 <= peer < self.size:
            raise InternalError(f"rank {peer} is not in [0, {self.size})")
        return _Request(self._exchange, Ticket(self._roll_call, peer=peer), self._bounded(as_bytes(buffer)))

    def _meet(self, kind: _Kind, data: memoryview, result: memoryview) -> _Request:
        self._check()
        self._bounded(data)
        ticket = self._roll_call.begin()
        assert ticket.sequence is not None
        meeting = self._exchange.meet((self._context, ticket.sequence), kind, self._rank, bytes(data))
        return _Request(self._exchange, ticket, result, meeting=meeting)
