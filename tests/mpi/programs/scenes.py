"""Play the scenes named on the command line: ``scenes.py directory name ...``."""

from __future__ import annotations

import os
import sys

from parckpt.comm.mpi import wrap
from parckpt.testing.scenarios import SCENES


def main() -> None:
    directory, *names = sys.argv[1:]
    world = wrap()
    for name in names:
        place = os.path.join(directory, name)
        if world.rank == 0:
            os.mkdir(place)
        comm = world.duplicate()
        # An error here ends all ranks, through mpi4py's own runner.
        SCENES[name](comm, place)
        comm.free()
        print(name)


main()
