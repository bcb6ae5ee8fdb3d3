"""Give up on a receive and drop its buffer, as after an error: the late message must not hit freed memory."""

from __future__ import annotations

import gc

import numpy as np

from parckpt.comm.collective import reduce_max
from parckpt.comm.mpi import wrap
from parckpt.comm.wait import Waiter

NBYTES = 4 << 20


def main() -> None:
    comm = wrap()
    waiter = Waiter(30)
    other = (comm.rank + 1) % comm.size
    comm.irecv(np.zeros(NBYTES, np.uint8), other, 1)
    gc.collect()
    fresh = np.zeros(NBYTES, np.uint8)
    reduce_max(comm, np.zeros(1, np.int64), waiter)
    waiter.wait(comm.isend(np.full(NBYTES, 255, np.uint8), other, 1), "the late message")
    reduce_max(comm, np.zeros(1, np.int64), waiter)
    assert not fresh.any()
    # One more that nobody will ever answer, alive at MPI's end.
    comm.irecv(bytearray(8), other, 2)
    print("done")


main()
