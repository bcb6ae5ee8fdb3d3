"""`Shard.stack`: the one way to make a Shard that needs the other ranks."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from parckpt.comm.launch import resolve
from parckpt.comm.outcome import run_on_all
from parckpt.comm.wait import AGREE_TIMEOUT_S, Waiter
from parckpt.core.leaves import Leaf, Shard, set_stacker
from parckpt.core.shards import STACK_ROW, stack_row, stacked

__all__ = ["stack"]

# Ranks that start up come minutes apart on a big machine; CheckpointConfig's default for agreements.


def stack(local: np.ndarray[Any, Any] | Leaf, comm: Any, axis: int = 0, *, timeout_s: float = AGREE_TIMEOUT_S) -> Shard:
    """Make this rank's Shard of the tensor that all ranks' pieces form when put one after the other along `axis`.

    Collective over `comm`; call from the thread that owns MPI. What it sends has a fixed size.

    Parameters
    ----------
    local : ndarray or Leaf
        This rank's piece, kept by reference; its length along `axis` may differ between ranks, and be 0.
    comm : communicator
        As for `ModelCheckpoint`: an mpi4py communicator, any object that fits `Communicator`, `parckpt.SELF`, or None
        for ``COMM_WORLD`` when launched.
    axis : int
        Counted from the end if negative. The same dimension on all ranks.
    timeout_s : float
        Limit for each wait for the other ranks.

    Raises
    ------
    LayoutError
        On all ranks, if dtypes, axes or the other dimensions differ.
    ConfigError
        On all ranks, if one of them hands in something that is no array, or has no such axis.
    """
    ranks = resolve(comm, os.environ)
    try:
        waiter = Waiter(timeout_s)
        row = run_on_all(ranks, lambda: stack_row(local, axis), waiter, "Shard.stack")
        rows = np.zeros((ranks.size, STACK_ROW), np.int64)
        waiter.wait(ranks.iallgather(row.view(np.uint8), rows.reshape(-1).view(np.uint8)), "Shard.stack")
        return stacked(local, rows, ranks.rank)
    finally:
        ranks.free()


set_stacker(stack)
