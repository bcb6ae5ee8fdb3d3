"""The few collective shapes parckpt uses, on top of any `Communicator`.

All of them are collective over ``comm``; call them from the thread that uses it. ``what`` names the wait in the error
of a time-out. Nothing longer than the communicator's `max_nbytes` goes into one call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from parckpt.comm.base import Bytes, Communicator, Int64s
from parckpt.comm.wait import Waiter

__all__ = ["allgather_bytes", "allgather_distinct", "bcast_bytes", "reduce_max"]

GATHER_NBYTES = 64 << 20
"""Bound of the buffer that one padded gather fills on each rank."""

RAGGED_FACTOR = 4
"""Padding pieces to the longest may multiply the traffic by this; beyond, each rank broadcasts its own."""


def reduce_max(comm: Communicator, values: Int64s, waiter: Waiter, what: str = "a reduction") -> Int64s:
    """Take the element-wise maximum over the ranks; all pass the same length."""
    result = np.zeros_like(values)
    waiter.wait(comm.iallreduce_max(values, result), what)
    return result


def bcast_bytes(comm: Communicator, data: bytes | None, root: int, waiter: Waiter, what: str = "a broadcast") -> bytes:
    """Copy root's bytes to all ranks; the others pass None."""
    if comm.rank == root and data is None:
        raise ValueError("root has nothing to broadcast")
    length = np.array([0 if data is None else len(data)], np.int64)
    waiter.wait(comm.ibcast(length, root), what)
    return _bcast_known(comm, data, int(length[0]), root, waiter, what)


def allgather_bytes(comm: Communicator, data: bytes, waiter: Waiter, what: str = "a gather") -> list[bytes]:
    """Give every rank the bytes of all ranks, by rank; lengths may differ."""
    lengths = _allgather_int64(comm, [len(data)], waiter, what)[:, 0]
    longest = int(lengths.max())
    if longest * comm.size > RAGGED_FACTOR * int(lengths.sum()):
        # One long piece among short ones (an error's text among successes): padding would move size times its length.
        return [
            _bcast_known(comm, data, int(length), rank, waiter, what) if length else b""
            for rank, length in enumerate(lengths)
        ]
    return _allgather_padded(comm, data, lengths, waiter, what)


def allgather_distinct(
    comm: Communicator, data: bytes, waiter: Waiter, what: str = "a gather"
) -> tuple[list[bytes], NDArray[np.int64]]:
    """Give every rank the distinct byte strings of all ranks, each of which travels once.

    Returns
    -------
    distinct : list of bytes
        In the order of the lowest rank that has each.
    index : int64 array
        For each rank, where its own is in ``distinct``.
    """
    digests = allgather_bytes(comm, hashlib.sha256(data).digest(), waiter, what)
    first: dict[bytes, int] = {}
    for rank, digest in enumerate(digests):
        first.setdefault(digest, rank)
    position = {digest: number for number, digest in enumerate(first)}
    index = np.array([position[digest] for digest in digests], np.int64)
    senders = set(first.values())
    # The others have the same bytes as one of the senders, and need not repeat them.
    pieces = allgather_bytes(comm, data if comm.rank in senders else b"", waiter, what)
    return [pieces[rank] for rank in first.values()], index


def _bcast_known(comm: Communicator, data: bytes | None, nbytes: int, root: int, waiter: Waiter, what: str) -> bytes:
    """Broadcast bytes whose length all ranks know."""
    if comm.rank == root and data is not None:
        view = memoryview(data)
        for start in range(0, nbytes, comm.max_nbytes):
            waiter.wait(comm.ibcast(view[start : start + comm.max_nbytes], root), what)
        return data
    buffer = bytearray(nbytes)
    with memoryview(buffer) as view:
        for start in range(0, nbytes, comm.max_nbytes):
            waiter.wait(comm.ibcast(view[start : start + comm.max_nbytes], root), what)
        return bytes(view)


def _allgather_int64(comm: Communicator, row: Sequence[int], waiter: Waiter, what: str) -> Int64s:
    """Gather one row of numbers from each rank: (size, len(row))."""
    mine = np.array(row, np.int64)
    rows = np.zeros((comm.size, len(row)), np.int64)
    waiter.wait(comm.iallgather(mine.view(np.uint8), rows.reshape(-1).view(np.uint8)), what)
    return rows


def _allgather_padded(comm: Communicator, data: bytes, lengths: Int64s, waiter: Waiter, what: str) -> list[bytes]:
    """Gather in rounds of equally long pieces, within `GATHER_NBYTES` a round."""
    longest = int(lengths.max())
    step = max(1, min(longest, GATHER_NBYTES // comm.size, comm.max_nbytes // comm.size))
    parts = [bytearray() for _ in range(comm.size)]
    for start in range(0, longest, step):
        width = min(step, longest - start)
        mine: Bytes = np.zeros(width, np.uint8)
        piece = np.frombuffer(data[start : start + width], np.uint8)
        mine[: len(piece)] = piece
        gathered: Bytes = np.zeros(width * comm.size, np.uint8)
        waiter.wait(comm.iallgather(mine, gathered), what)
        for rank, part in enumerate(parts):
            part += gathered[rank * width : (rank + 1) * width].data
    return [bytes(memoryview(part)[: int(length)]) for part, length in zip(parts, lengths, strict=True)]
