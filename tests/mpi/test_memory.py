"""Memory beyond the model: bounded by the engine's buffers, whatever the model's size.

Each case runs in fresh processes, because a process's highest resident set never falls again. The model is so large
that one more copy of a rank's part, or on root of the whole, would break the bounds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from parckpt.testing.mpirun import Mpi, run

MIB = 1 << 20
MODEL_MIB = 512
PER_RANK_MIB = 128
"""A quarter of the model: half of what each of two ranks holds."""
ROOT_MIB = 256


def peaks(tmp_path: Path, programs: Path, mpi: Mpi, mode: str, kind: str) -> list[dict[str, float]]:
    """MiB by rank: at the begin, after the save, after the restore; beyond what the model takes."""
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    try:
        args = [str(directory), mode, kind, str(MODEL_MIB)]
        run(programs / "memory.py", 2, args, mpi=mpi, timeout_s=180, abort_on_error=True).check()
        found = json.loads((directory / "peaks.json").read_text())
        return [{name: nbytes / MIB for name, nbytes in one.items()} for one in found]
    finally:
        shutil.rmtree(directory)  # half a gigabyte that nobody looks at later


@pytest.mark.parametrize("kind", ["arrays", "leaves"])
def test_each_rank_its_own_file(tmp_path: Path, programs: Path, mpi: Mpi, kind: str) -> None:
    for rank, found in enumerate(peaks(tmp_path, programs, mpi, "per-rank", kind)):
        assert max(found.values()) < PER_RANK_MIB, f"rank {rank}: {found}"


@pytest.mark.parametrize("kind", ["arrays", "leaves"])
def test_one_file_through_root(tmp_path: Path, programs: Path, mpi: Mpi, kind: str) -> None:
    root, other = peaks(tmp_path, programs, mpi, "gather", kind)
    assert max(root.values()) < ROOT_MIB, f"rank 0: {root}"
    assert max(other.values()) < PER_RANK_MIB, f"rank 1: {other}"
