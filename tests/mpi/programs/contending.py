"""Hold a directory or a file name until told to go on, or try to take it.

``contending.py run|file hold|try directory``. A holder says on the pipe ``held`` that it has it, and goes on when
something comes on the pipe ``go``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

import parckpt
from parckpt.comm.mpi import wrap


def main() -> None:
    what, how, directory = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    comm = wrap()

    def hold(out: Any = None) -> None:
        if how == "hold" and comm.rank == 0:
            (directory / "held").write_text(f"{os.uname().nodename} {os.getpid()}\n")
            (directory / "go").read_text()
        if out is not None:
            out[...] = comm.rank

    try:
        if what == "run":
            with parckpt.ModelCheckpoint("net", directory / "data", comm=comm) as ckpt:
                hold()
                ckpt.step_end({"w": parckpt.Shard(np.zeros(2), (2 * comm.size,), (2 * comm.rank,))}, 1)
        else:
            leaf = parckpt.Leaf((2,), np.float64, hold)
            state = {"w": parckpt.Shard(leaf, (2 * comm.size,), (2 * comm.rank,))}
            parckpt.save_checkpoint(state, directory / "data" / "one", comm=comm)
    except parckpt.LockedError as error:
        print("refused:", error)
    else:
        print("done")
    comm.free()


main()
