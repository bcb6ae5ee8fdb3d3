"""What `parckpt.testing.mpirun` runs on every rank: output to files of its own, stacks before the limit, the program.

``python -m parckpt.testing.rank program.py [argument ...]``
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import sys
from pathlib import Path

__all__ = ["LIMIT_VARIABLE", "OUTPUT_VARIABLE", "RANK_VARIABLES"]

OUTPUT_VARIABLE = "PARCKPT_TEST_OUTPUT"
LIMIT_VARIABLE = "PARCKPT_TEST_LIMIT_S"
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")


def _rank() -> int:
    for variable in RANK_VARIABLES:
        if variable in os.environ:
            return int(os.environ[variable])
    raise SystemExit("not started by a launcher this knows: none of " + ", ".join(RANK_VARIABLES))


def _redirect(output: Path, rank: int) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with (output / f"rank-{rank}.{name}").open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    # A killed rank writes nothing at its end, so each line must be out before.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def main() -> None:
    """Run the program named on the command line as ``__main__``."""
    program = sys.argv[1]
    _redirect(Path(os.environ[OUTPUT_VARIABLE]), _rank())
    faulthandler.enable()
    # Written by a thread that needs neither the GIL nor the main thread, which may be stuck inside MPI.
    faulthandler.dump_traceback_later(float(os.environ[LIMIT_VARIABLE]))
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(program).resolve().parent))
    runpy.run_path(program, run_name="__main__")
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
