"""Run the communicator checks named on the command line, each on a fresh communicator, or all that fit."""

from __future__ import annotations

import sys

from parckpt.comm.mpi import wrap
from parckpt.testing.communicators import CHECKS, TIMEOUT_CHECKS


def main() -> None:
    kind, max_nbytes, *names = sys.argv[1:]
    checks = {"lasting": CHECKS, "breaking": TIMEOUT_CHECKS}[kind]
    world = wrap(max_nbytes=int(max_nbytes))
    for name in names or checks:
        comm = world.duplicate()
        # An error here ends all ranks, through mpi4py's own runner.
        checks[name](comm)
        comm.free()
        print(name)
    world.free()


main()
