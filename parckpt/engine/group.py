"""The ranks of one checkpoint directory, with every wait bounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from parckpt.comm import collective, outcome
from parckpt.comm.arrival import Ticket
from parckpt.comm.base import Bytes, Communicator, Request
from parckpt.comm.wait import Waiter

__all__ = ["TAG_GATHER", "TAG_RECORD", "TAG_RESTORE", "Group"]

T = TypeVar("T")

# One tag per kind of message, so that a late message of one kind is never taken for another.
TAG_RECORD = 11
TAG_GATHER = 12
TAG_RESTORE = 13


@dataclass(frozen=True)
class _Pieces:
    """One message that takes several calls."""

    requests: list[Request]

    @property
    def nbytes(self) -> int:
        """Bytes received, once all is complete."""
        return sum(request.nbytes for request in self.requests)

    @property
    def ticket(self) -> Ticket | None:
        """Who is being waited for."""
        return self.requests[0].ticket

    def test(self) -> bool:
        """Whether all is complete."""
        return all(request.test() for request in self.requests)


@dataclass(frozen=True)
class Group:
    """A communicator of our own, and how we wait on it.

    Every method is collective over ``comm`` unless it says otherwise; call from the thread that owns MPI.
    """

    comm: Communicator
    waiter: Waiter

    @property
    def rank(self) -> int:
        """This rank."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.comm.size

    @property
    def is_root(self) -> bool:
        """Rank 0 decides, publishes and deletes."""
        return self.comm.rank == 0

    def wait(self, request: Request, what: str) -> None:
        """Not collective by itself: wait for one request."""
        self.waiter.wait(request, what)

    def reduce_max(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Element-wise maximum over the ranks."""
        return collective.reduce_max(self.comm, values, self.waiter)

    def bcast(self, data: bytes | None) -> bytes:
        """Root's bytes, on every rank."""
        return collective.bcast_bytes(self.comm, data, 0, self.waiter)

    def allgather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, by rank."""
        return collective.allgather_bytes(self.comm, data, self.waiter)

    def allgather_distinct(self, data: bytes) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """The distinct byte strings, each sent once, and which of them each rank has."""
        distinct, index = collective.allgather_distinct(self.comm, data, self.waiter)
        return distinct, index

    def agree(self, error: Exception | None) -> None:
        """Return on all ranks if none has an error; else raise on all ranks the lowest failing rank's."""
        outcome.agree(self.comm, error, self.waiter)

    def run(self, step: Callable[[], T]) -> T:
        """Run a step without collectives on every rank; raise on all if it fails on any, unchanged if this is the only.

        User code may run in it: whatever it raises, no rank is left waiting.
        """
        result: list[T] = []
        error: Exception | None = None
        try:
            result.append(step())
        except Exception as problem:  # the other ranks wait for the outcome
            if self.size == 1:
                raise
            error = problem
        self.agree(error)
        return result[0]

    def isend(self, data: Bytes, dest: int, tag: int) -> Request:
        """Begin to send bytes of any length. Not collective."""
        step = self.comm.max_nbytes
        if data.size <= step:
            return self.comm.isend(data, dest, tag)
        return _Pieces([self.comm.isend(data[n : n + step], dest, tag) for n in range(0, data.size, step)])

    def irecv(self, buffer: Bytes, source: int, tag: int) -> Request:
        """Begin to receive as many bytes as `isend` sends on the other side. Not collective."""
        step = self.comm.max_nbytes
        if buffer.size <= step:
            return self.comm.irecv(buffer, source, tag)
        return _Pieces([self.comm.irecv(buffer[n : n + step], source, tag) for n in range(0, buffer.size, step)])

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, by rank, on root; an empty list elsewhere."""
        if not self.is_root:
            self._send_to_root(data)
            return []
        return [data, *(self._receive(source) for source in range(1, self.size))]

    def _send_to_root(self, data: bytes) -> None:
        view = memoryview(data)
        head = self.comm.isend(len(data).to_bytes(8, "little"), 0, TAG_RECORD)
        self.wait(head, "sending a record to rank 0")
        for start in range(0, len(view), self.comm.max_nbytes):
            part = self.comm.isend(view[start : start + self.comm.max_nbytes], 0, TAG_RECORD)
            self.wait(part, "sending a record to rank 0")

    def _receive(self, source: int) -> bytes:
        head = bytearray(8)
        self.wait(self.comm.irecv(head, source, TAG_RECORD), f"the record of rank {source}")
        data = bytearray(int.from_bytes(head, "little"))
        view = memoryview(data)
        for start in range(0, len(view), self.comm.max_nbytes):
            request = self.comm.irecv(view[start : start + self.comm.max_nbytes], source, TAG_RECORD)
            self.wait(request, f"the record of rank {source}")
        return bytes(data)
