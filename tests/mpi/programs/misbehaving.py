"""End, or do not end, in the way named on the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from mpi4py import MPI


def stuck_here() -> None:
    time.sleep(600)


def main() -> None:
    how, directory = sys.argv[1], Path(sys.argv[2])
    rank = MPI.COMM_WORLD.Get_rank()
    print("before", rank)
    (directory / f"pid-{rank}").write_text(str(os.getpid()))
    if how == "hang":
        if rank == 1:
            stuck_here()
        MPI.COMM_WORLD.Barrier()
    elif how == "helper":
        helper = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
        (directory / f"helper-{rank}").write_text(str(helper.pid))
    elif how == "raise" and rank == 1:
        raise ZeroDivisionError("on rank 1")
    elif how == "raise":
        MPI.COMM_WORLD.Barrier()


main()
