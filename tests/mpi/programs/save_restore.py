"""Save every case, or restore them all on however many ranks this is: ``save_restore.py save|restore directory n``."""

from __future__ import annotations

import sys

from parckpt.comm.mpi import wrap
from parckpt.testing.jobs import CASES, restore_cases, save_cases


def main() -> None:
    what, directory, saved_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    comm = wrap()
    if what == "save":
        assert comm.size == saved_size
        save_cases(comm, directory)
    else:
        restore_cases(comm, directory, saved_size=saved_size)
    print(len(CASES), "cases")


main()
