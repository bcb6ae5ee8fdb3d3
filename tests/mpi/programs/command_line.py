"""Each rank calls the command line after MPI_Init: command_line.py DIR."""

from __future__ import annotations

import json
import subprocess
import sys

from mpi4py import MPI


def main(directory: str) -> None:
    world = MPI.COMM_WORLD
    command = [sys.executable, "-m", "parckpt.cli", "verify", directory, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    counts = json.loads(done.stdout)["counts"]
    # MPI still works afterwards: the command did not pass for one of its ranks.
    assert world.allgather((done.returncode, counts["sound"])) == [(0, 1)] * world.size
    assert world.size == 2


if __name__ == "__main__":
    main(*sys.argv[1:])
