#!/usr/bin/env python3
"""How long planning takes for a large simulated job, in one process and without MPI.

Cases:

* ``distinct``: all ranks describe something different. Half of the tensors are cut over all ranks (by rows, and every
  fourth by columns), the other half into one part per 8 ranks, each part held by 8.
* ``data-parallel``: 64 different descriptions (model parallel parts), each shared by all ranks that hold that part.

Prints one line per case and mode: seconds to pack one description, to unpack all, to plan, to hash the plan, and to
list one rank's boxes; the boxes written; the heaviest rank over the mean; the peak memory of the process so far.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterable

import numpy as np

from parckpt.core.describe import SPLIT, Description, unpack
from parckpt.core.dtypes import by_name
from parckpt.core.plan import plan_save

_WIDTH = 64  # elements of the dimension that is not cut
_ROWS = 8  # of each part
_REPLICAS = 8
_DATA_PARALLEL_PARTS = 64


def describe_rank(rank: int, ranks: int, tensors: int) -> Description:
    """Describe one rank of the ``distinct`` case."""
    tensor = np.arange(tensors)
    parts = np.where(tensor % 2 == 0, ranks, max(1, ranks // _REPLICAS))
    part = np.where(tensor % 2 == 0, rank, rank % np.maximum(1, ranks // _REPLICAS))
    return _columns(parts, part, by_columns=tensor % 8 == 0)


def describe_part(part: int, parts: int, tensors: int) -> Description:
    """Describe one model parallel part of the ``data-parallel`` case."""
    return _columns(np.full(tensors, parts), np.full(tensors, part), by_columns=np.arange(tensors) % 8 == 0)


def _columns(
    parts: np.ndarray[tuple[int], np.dtype[np.int64]],
    part: np.ndarray[tuple[int], np.dtype[np.int64]],
    by_columns: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> Description:
    tensors = len(parts)
    length = parts * _ROWS
    dims = np.zeros((tensors, 3, 2), dtype=np.int64)
    cut, other = by_columns.astype(np.int64), 1 - by_columns.astype(np.int64)
    rows = np.arange(tensors)
    dims[rows, 0, cut], dims[rows, 0, other] = length, _WIDTH
    dims[rows, 1, cut] = part * _ROWS
    dims[rows, 2, cut], dims[rows, 2, other] = _ROWS, _WIDTH
    return Description(
        names=tuple(f"model.layers.{t // 10}.block_{t % 10}.weight" for t in range(tensors)),
        row_name=np.arange(tensors, dtype=np.uint32),
        dtype=np.full(tensors, by_name("float32").code, dtype=np.uint8),
        flags=np.full(tensors, SPLIT, dtype=np.uint8),
        ndim=np.full(tensors, 2, dtype=np.uint8),
        dims=dims.reshape(-1),
        value_names=("lr", "step"),
        value_flags=np.zeros(2, dtype=np.uint8),
    )


def measure(case: str, packed: list[bytes], pack_s: float, rank_description: list[int], modes: Iterable[str]) -> None:
    """Plan one case in some modes and print a line for each."""
    start = time.perf_counter()
    descriptions = [unpack(data) for data in packed]
    unpack_s = time.perf_counter() - start
    nodes = [rank // 8 for rank in range(len(rank_description))]
    for mode in modes:
        start = time.perf_counter()
        plan = plan_save(
            descriptions,
            rank_description,
            nodes,
            integrated=mode == "integrated",
            remove_redundancy=mode == "owners",
            split_replicas=True,
        )
        planned = time.perf_counter()
        _ = plan.hash
        hashed = time.perf_counter()
        plan.boxes_of(len(rank_description) - 1)
        listed = time.perf_counter()
        load = plan.load()
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
        print(
            f"{case:14} {mode:11} pack one {pack_s:6.4f} s  unpack {len(packed)}: {unpack_s:5.2f} s  "
            f"plan {planned - start:6.2f} s  hash {hashed - planned:5.2f} s  list {listed - hashed:6.4f} s  "
            f"{len(plan.row_piece):,} boxes  heaviest/mean {load.max() / load.mean():.4f}  peak {peak_gib:.2f} GiB"
        )


def main() -> None:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--case", choices=("distinct", "data-parallel"), action="append")
    parser.add_argument("--mode", choices=("owners", "integrated", "everything"), action="append")
    options = parser.parse_args()
    modes = options.mode or ["owners", "integrated", "everything"]
    for case in options.case or ["data-parallel", "distinct"]:
        if case == "distinct":
            found = [describe_rank(rank, options.ranks, options.tensors) for rank in range(options.ranks)]
            rank_description = list(range(options.ranks))
        else:
            parts = min(_DATA_PARALLEL_PARTS, options.ranks)
            found = [describe_part(part, parts, options.tensors) for part in range(parts)]
            rank_description = [rank % parts for rank in range(options.ranks)]
        start = time.perf_counter()
        packed = [description.pack() for description in found]
        pack_s = (time.perf_counter() - start) / len(packed)
        del found
        measure(case, packed, pack_s, rank_description, modes)


if __name__ == "__main__":
    main()
