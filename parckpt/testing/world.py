"""N ranks in N threads of this process, for logic that needs several ranks but not MPI."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from parckpt.comm.base import MAX_NBYTES, Communicator
from parckpt.comm.memory import Exchange, MemoryCommunicator

__all__ = ["WorldError", "run_world"]

T = TypeVar("T")


class WorldError(AssertionError):
    """The ranks did not end in time. The message holds the stack of each."""


def run_world(
    size: int,
    fn: Callable[[Communicator, int], T],
    timeout_s: float = 60.0,
    *,
    nodes: Sequence[str] | None = None,
    max_nbytes: int = MAX_NBYTES,
) -> list[T]:
    """Run ``fn(comm, rank)`` on every rank and return what they returned, by rank.

    Parameters
    ----------
    size : int
        Number of ranks.
    fn : callable
        What each rank does, given its communicator and its rank.
    timeout_s : float, optional
        Limit for all of it, in seconds.
    nodes : sequence of str, optional
        Node name of each rank; all on this host by default.
    max_nbytes : int, optional
        Longest buffer of one call.

    Raises
    ------
    Exception
        What the first rank to fail raised. The calls of the other ranks then fail too, so nothing hangs. A rank that
        returns early just does not come any more.
    WorldError
        If the time is up.
    """
    exchange = Exchange(size, max_nbytes=max_nbytes)
    results: dict[int, T] = {}
    failures: list[Exception] = []

    def run(rank: int) -> None:
        comm = MemoryCommunicator(exchange, rank, node=None if nodes is None else nodes[rank])
        try:
            results[rank] = fn(comm, rank)
        except Exception as error:
            failures.append(error)
            exchange.abort(error)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    stuck = [thread for thread in threads if thread.is_alive()]
    if stuck:
        report = _stacks(stuck)
        exchange.abort(WorldError("out of time"))
        raise WorldError(f"{len(stuck)} of {size} ranks did not end within {timeout_s:g} s\n{report}")
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(size)]


def _stacks(threads: Sequence[threading.Thread]) -> str:
    frames = sys._current_frames()
    parts = []
    for thread in threads:
        frame = frames.get(thread.ident or 0)
        parts.append(f"--- {thread.name}\n" + "".join(traceback.format_stack(frame) if frame is not None else []))
    return "\n".join(parts)
