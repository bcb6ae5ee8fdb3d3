"""A communicator that notes what goes through it."""

from __future__ import annotations

from dataclasses import dataclass, field

from parckpt.comm.base import Buffer, Bytes, Communicator, Int64s, Request, as_bytes

__all__ = ["CountingCommunicator", "Traffic"]


@dataclass(frozen=True)
class Traffic:
    """One call: its name, how many bytes this rank handed in, and its tag (-1 for collectives)."""

    call: str
    nbytes: int
    tag: int = -1


@dataclass
class CountingCommunicator:
    """Passes everything on; duplicates note in the same list. Receives are not noted, their sends are.

    Attributes
    ----------
    log : list
        Every call in order. Others may put their own marks in it.
    """

    inner: Communicator
    log: list[object] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.inner.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.inner.size

    @property
    def max_nbytes(self) -> int:
        """Longest buffer of one call."""
        return self.inner.max_nbytes

    def duplicate(self) -> CountingCommunicator:
        """Duplicate the inner one."""
        return CountingCommunicator(self.inner.duplicate(), self.log)

    def free(self) -> None:
        """Free the inner one."""
        self.inner.free()

    def isend(self, data: Buffer, dest: int, tag: int) -> Request:
        """Note and send."""
        self.log.append(Traffic("isend", len(as_bytes(data)), tag))
        return self.inner.isend(data, dest, tag)

    def irecv(self, buffer: Buffer, source: int, tag: int) -> Request:
        """Receive."""
        return self.inner.irecv(buffer, source, tag)

    def iprobe(self, source: int | None, tag: int) -> tuple[int, int] | None:
        """Probe."""
        return self.inner.iprobe(source, tag)

    def iallreduce_max(self, values: Int64s, result: Int64s) -> Request:
        """Note and reduce."""
        self.log.append(Traffic("iallreduce_max", values.nbytes))
        return self.inner.iallreduce_max(values, result)

    def ibcast(self, buffer: Buffer, root: int) -> Request:
        """Note and broadcast."""
        self.log.append(Traffic("ibcast", len(as_bytes(buffer))))
        return self.inner.ibcast(buffer, root)

    def iallgather(self, data: Bytes, result: Bytes) -> Request:
        """Note and gather."""
        self.log.append(Traffic("iallgather", data.nbytes))
        return self.inner.iallgather(data, result)

    def node(self) -> str:
        """Name of the memory domain."""
        return self.inner.node()
