"""Save and restore a model of a given size and write down how much memory that took beyond the model.

Arguments: directory, mode (``gather`` or ``per-rank``), kind (``arrays`` or ``leaves``), MiB of the model.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

import parckpt

MIB = 1 << 20
NTENSORS = 16


def peak_nbytes() -> int:
    """The highest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_nbytes() -> int:
    """The resident set now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def content(number: int, row: int) -> float:
    """What stands in a row of a tensor."""
    return float(1000 * number + row)


def fill(array: np.ndarray, number: int, first: int) -> None:
    """Fill in place: no temporary array that would count."""
    for row in range(len(array)):
        array[row].fill(content(number, first + row))


def main() -> None:
    """Save, forget, restore, compare."""
    directory, mode, kind, mib = sys.argv[1:]
    comm = MPI.COMM_WORLD
    width = MIB // 4
    rows = int(mib) // NTENSORS
    first, last = rows * comm.rank // comm.size, rows * (comm.rank + 1) // comm.size
    arrays = [np.empty((last - first, width), np.float32) for _ in range(NTENSORS if kind == "arrays" else 0)]
    for number, array in enumerate(arrays):
        fill(array, number, first)
    leaves: list = list(arrays) or [
        parckpt.Leaf((last - first, width), np.float32, lambda out, number=number: fill(out, number, first), None)
        for number in range(NTENSORS)
    ]
    state = {f"w{k}": parckpt.Shard(leaf, (rows, width), (first, 0)) for k, leaf in enumerate(leaves)}
    # Leaves go through the format that reads them twice, for the checksum in its header.
    extra = {"format": "safetensors", "crc_check": True} if kind == "leaves" else {}
    config = parckpt.CheckpointConfig(integrated_save=mode == "gather", **extra)

    before = resident_nbytes()
    peaks = {"before": peak_nbytes() - before}
    with parckpt.ModelCheckpoint("m", directory, config, comm=comm) as checkpoints:
        checkpoints.save_now(state, 1)
    peaks["save"] = peak_nbytes() - before
    if arrays:
        for array in arrays:
            array.fill(0)
        with parckpt.ModelCheckpoint("m", directory, config, comm=comm) as checkpoints:
            assert checkpoints.restore(state).step == 1
        peaks["restore"] = peak_nbytes() - before
        for number, array in enumerate(arrays):
            assert all((array[row] == content(number, first + row)).all() for row in range(len(array)))
    gathered = comm.gather(peaks)
    if comm.rank == 0:
        Path(directory, "peaks.json").write_text(json.dumps(gathered))


main()
