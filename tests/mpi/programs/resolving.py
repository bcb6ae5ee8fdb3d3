"""What `resolve` makes of None, SELF, and communicators the user made."""

from __future__ import annotations

import os

import numpy as np
from mpi4py import MPI

from parckpt.comm.collective import allgather_bytes
from parckpt.comm.launch import SELF, launched_size, resolve
from parckpt.comm.wait import Waiter
from parckpt.errors import ConfigError


def main() -> None:
    size = MPI.COMM_WORLD.Get_size()
    assert launched_size(os.environ) == size
    world = resolve(None, os.environ)
    assert (world.rank, world.size) == (MPI.COMM_WORLD.Get_rank(), size)
    assert resolve(SELF, os.environ).size == 1
    assert resolve(MPI.COMM_SELF, os.environ).size == 1
    # Without the launcher's variables an initialised MPI still counts.
    assert resolve(None, {}).size == size

    half = MPI.COMM_WORLD.Split(world.rank % 2, key=-world.rank)
    mine = resolve(half, os.environ)
    again = resolve(mine, os.environ)
    names = allgather_bytes(again, str(world.rank).encode(), Waiter(30))
    assert names == [str(r).encode() for r in reversed(range(size)) if r % 2 == world.rank % 2]

    # Ours is a duplicate: it still works when the user's is gone, and theirs has seen none of our messages.
    half.Free()
    result = np.zeros(1, np.int64)
    Waiter(30).wait(mine.iallreduce_max(np.array([world.rank]), result), "a maximum")
    assert result[0] % 2 == world.rank % 2
    try:
        resolve(half, os.environ)
    except ConfigError as error:
        print(error)
    else:
        raise AssertionError("a freed communicator was taken")
    for comm in (again, mine, world):
        comm.free()


main()
