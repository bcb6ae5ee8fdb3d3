"""What the rest of parckpt asks of a communicator, and nothing more.

Anything that fits `Communicator` can be handed in as ``comm``. All calls return at once; completion is seen by asking
`Request.test`. No call passes Python objects: data travels as buffers, so nothing is unpickled.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from parckpt.comm.arrival import FIRST_RESERVED_TAG, Ticket

__all__ = [
    "FIRST_RESERVED_TAG",
    "MAX_NBYTES",
    "Buffer",
    "Bytes",
    "Communicator",
    "Int64s",
    "Request",
    "as_bytes",
    "host_domain",
]

Buffer: TypeAlias = "bytes | bytearray | memoryview | NDArray[Any]"
Bytes: TypeAlias = NDArray[np.uint8]
Int64s: TypeAlias = NDArray[np.int64]

MAX_NBYTES = 1 << 30
"""Largest buffer of one call: Open MPI 5 has no counts above 2**31 - 1, and 1 GiB leaves room for any header."""


class Request(Protocol):
    """Something under way. It keeps its buffers alive until it is complete."""

    @property
    def nbytes(self) -> int:
        """Bytes received, once a receive is complete; 0 for everything else."""
        ...

    @property
    def ticket(self) -> Ticket | None:
        """Who is being waited for, if that can be told; None costs only the names in a time-out's message."""
        ...

    def test(self) -> bool:
        """Whether it is complete; stays True once it was."""
        ...


@runtime_checkable
class Communicator(Protocol):
    """A group of ranks. Used by one thread at a time; every rank makes the same collective calls in the same order.

    Buffers are contiguous, at most `max_nbytes` long, and belong to the request until it is complete: the caller
    neither changes what is sent nor reads what is received before that.
    """

    @property
    def rank(self) -> int:
        """This rank, in ``[0, size)``."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def max_nbytes(self) -> int:
        """Largest buffer of one call; 1 GiB unless the communicator allows less."""
        ...

    def duplicate(self) -> Communicator:
        """Make a communicator of the same ranks whose messages never meet this one's. Collective."""
        ...

    def free(self) -> None:
        """Give the resources back. Collective, except after a time-out: then each rank for itself."""
        ...

    def isend(self, data: Buffer, dest: int, tag: int) -> Request:
        """Send to one rank. Messages of one sender and tag arrive in order. ``tag < FIRST_RESERVED_TAG``."""
        ...

    def irecv(self, buffer: Buffer, source: int, tag: int) -> Request:
        """Receive from one rank into a buffer at least as long as the message."""
        ...

    def iprobe(self, source: int | None, tag: int) -> tuple[int, int] | None:
        """Source and length in bytes of a message that can be received now (None: from any rank), or None."""
        ...

    def iallreduce_max(self, values: Int64s, result: Int64s) -> Request:
        """Element-wise maximum over the ranks. Collective; all ranks pass the same length."""
        ...

    def ibcast(self, buffer: Buffer, root: int) -> Request:
        """Copy root's buffer to all. Collective; all ranks pass the same length in bytes."""
        ...

    def iallgather(self, data: Bytes, result: Bytes) -> Request:
        """Gather equally long pieces by rank into ``result``, ``size * len(data)`` long. Collective."""
        ...

    def node(self) -> str:
        """Name of the memory domain this rank runs in: equal on two ranks if they share memory."""
        ...


def as_bytes(buffer: Buffer) -> memoryview:
    """View a contiguous buffer as unsigned bytes, without a copy.

    Raises
    ------
    ValueError
        If the buffer is not C-contiguous: sending it would need a copy the caller does not know of.
    """
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous:
            raise ValueError("a buffer to communicate must be C-contiguous")
        # By way of a uint8 view: memoryview refuses the types that numpy only knows by registration (bfloat16).
        return buffer.reshape(-1).view(np.uint8).data
    return memoryview(buffer).cast("B")


def host_domain() -> str:
    """Name this host and its shared-memory domain, without asking MPI.

    Containers of one machine may have equal host names but not /dev/shm in common, or the reverse; the file system's
    device number tells /dev/shm instances apart, the boot id tells machines apart.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    shared = Path("/dev/shm")
    boot_id = boot.read_text().strip() if boot.exists() else ""
    device = shared.stat().st_dev if shared.exists() else 0
    return f"{socket.gethostname()}/{boot_id}/{device}"
