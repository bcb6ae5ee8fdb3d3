"""The command line, called by real ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import parckpt
from parckpt.testing.mpirun import Mpi, run


def test_works_inside_ranks(mpi: Mpi, programs: Path, tmp_path: Path) -> None:
    parckpt.save_checkpoint({"w": np.arange(3.0)}, tmp_path / "one")
    run(programs / "command_line.py", 2, [str(tmp_path)], mpi=mpi, timeout_s=60).check()
