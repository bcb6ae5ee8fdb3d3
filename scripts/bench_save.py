#!/usr/bin/env python3
"""How fast saving and restoring is, beside plain writes of the same bytes by the same ranks in the same run.

Run it under a launcher, on a file system with 4 GB to spare:

    mpiexec -n 2 python scripts/bench_save.py --directory /scratch --rounds 5

Each round runs every lane once, in an order that differs from round to round, each in a fresh directory that is removed
afterwards, so a disk that drifts drifts for all. A lane's time goes from one barrier to the next. Everything written is
synced within the time; what is restored is compared with what was saved, outside of it.

Lanes:

* ``raw-buffered``, ``raw-direct``: each rank writes its bytes into a file of its own, then syncs it.
* ``per-rank``, ``owners``, ``gather``: `ModelCheckpoint.save_now` in the steady state (a save went before), into a step
  directory (``owners``: with ``remove_redundancy``) or one file. ``…-first`` is the save that went before, with the
  planning and the comparison of replicas.
* ``read-buffered``, ``read-direct``: each rank reads its bytes back, not from the page cache.
* ``restore``, ``restore-gather``: `ModelCheckpoint.restore` of the ``per-rank`` and the ``gather`` checkpoint, not from
  the page cache; ``…-warm`` right after it was read through the page cache.

Payload A is 16 float32 tensors of 64 MiB in all, cut by rows over the ranks. Payload B has 2,000 tensors, sizes
log-uniform from 1 KiB to 1 MiB, and 4 of 64 MiB. ``--layout replicated`` gives every rank all of it.

Memory is each rank's highest resident set within the lane beyond what it was when the lane began.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import platform
import random
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import parckpt
from parckpt.errors import ParckptWarning

MIB = 1 << 20
BLOCK_NBYTES = 8 * MIB
SAVES: dict[str, dict[str, Any]] = {
    "per-rank": {"integrated_save": False},
    "owners": {"remove_redundancy": True},
    "gather": {"integrated_save": True},
}

State = dict[str, Any]


def payload(name: str, layout: str, scale: float, rank: int, size: int) -> State:
    """This rank's part of a payload. Seeded: the same in each run."""
    rng = np.random.default_rng(7)
    if name == "A":
        rows = {f"layer_{k}.weight": max(size, int(64 * MIB * scale) // 4096) for k in range(16)}
    else:
        lengths = np.exp(rng.uniform(np.log(1 << 10), np.log(1 << 20), 2000)).astype(int) // 4
        rows = {f"small_{k}": int(n) for k, n in enumerate(lengths)}
        rows |= {f"big_{k}": max(size, int(64 * MIB * scale) // 4096) for k in range(4)}
    block = rng.standard_normal(MIB, np.float32)
    state: State = {}
    for number, (key, length) in enumerate(rows.items()):
        width = () if key.startswith("small") else (1024,)
        low, high = (0, length) if layout == "replicated" else (length * rank // size, length * (rank + 1) // size)
        local = np.empty((high - low, *width), np.float32)
        flat = local.reshape(-1)
        shift = number + 1000 * low
        for start in range(0, flat.size, block.size):
            stop = min(start + block.size, flat.size)
            flat[start:stop] = np.roll(block, shift)[: stop - start] if start == 0 else block[: stop - start]
        state[key] = (
            local if layout == "replicated" else parckpt.Shard(local, (length, *width), (low, *(0 for _ in width)))
        )
    return state


def arrays(state: State) -> list[np.ndarray[Any, Any]]:
    """The arrays of a state, in order."""
    return [leaf.data if isinstance(leaf, parckpt.Shard) else leaf for leaf in state.values()]


# -- lanes without parckpt ------------------------------------------------------------------------------------------


def blocks(parts: list[np.ndarray[Any, Any]]) -> Iterator[memoryview]:
    for array in parts:
        view = memoryview(array.reshape(-1)).cast("B")
        for start in range(0, len(view), BLOCK_NBYTES):
            yield view[start : start + BLOCK_NBYTES]


def write_buffered(parts: list[np.ndarray[Any, Any]], path: Path) -> None:
    """Plain writes and one fsync."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    for block in blocks(parts):
        done = 0
        while done < len(block):
            done += os.write(fd, block[done:])
    os.fsync(fd)
    os.close(fd)


def write_direct(parts: list[np.ndarray[Any, Any]], path: Path, buffer: mmap.mmap) -> None:
    """Writes past the page cache, 8 MiB at a time, and one fsync."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    view = memoryview(buffer)
    filled = total = 0
    for block in blocks(parts):
        while len(block):
            count = min(len(block), BLOCK_NBYTES - filled)
            view[filled : filled + count] = block[:count]
            filled, total, block = filled + count, total + count, block[count:]
            if filled == BLOCK_NBYTES:
                os.write(fd, view)
                filled = 0
    os.write(fd, view[: -(-filled // 4096) * 4096])
    os.ftruncate(fd, total)
    os.fsync(fd)
    os.close(fd)


def read_buffered(parts: list[np.ndarray[Any, Any]], path: Path) -> None:
    """Plain reads into the arrays."""
    fd = os.open(path, os.O_RDONLY)
    for block in blocks(parts):
        done = 0
        while done < len(block):
            done += os.readv(fd, [block[done:]])
    os.close(fd)


def read_direct(parts: list[np.ndarray[Any, Any]], path: Path, buffer: mmap.mmap) -> None:
    """Reads past the page cache, copied into the arrays."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    view = memoryview(buffer)
    filled = position = 0
    for block in blocks(parts):
        while len(block):
            if position == filled:
                filled, position = os.readv(fd, [view]), 0
            count = min(len(block), filled - position)
            block[:count] = view[position : position + count]
            position, block = position + count, block[count:]
    os.close(fd)


# -- measuring ------------------------------------------------------------------------------------------------------


def resident_nbytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def forget(directory: Path) -> None:
    """Drop files from the page cache; they are synced, so this works."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


class Bench:
    """The lanes of one run. Everything in it is collective."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size
        self.state = payload(options.payload, options.layout, options.scale, self.rank, self.size)
        self.mine = arrays(self.state)
        self.target = payload(options.payload, options.layout, options.scale, self.rank, self.size)
        self.buffer = mmap.mmap(-1, BLOCK_NBYTES)
        self.seconds: dict[str, list[float]] = {}
        self.extra: dict[str, int] = {}
        self.step = 0
        self.written = sum(array.nbytes for array in self.mine)
        total = self.comm.allreduce(self.written)
        self.nbytes = total if options.layout == "sharded" else self.written

    def run(self) -> None:
        groups: list[Callable[[Path], None]] = [self.raw]
        wanted = [name for name in SAVES if name in self.options.lanes]
        groups += [lambda path, name=name: self.save(path, name) for name in wanted]  # type: ignore[misc]
        for number in range(self.options.rounds):
            random.Random(number).shuffle(groups)
            for group in groups:
                self.within(group)

    def within(self, group: Callable[[Path], None]) -> None:
        """Run lanes in a fresh directory."""
        directory = Path(self.options.directory).absolute() / f"bench_save-{self.comm.bcast(os.getpid())}"
        if self.rank == 0:
            directory.mkdir()
        self.comm.barrier()
        try:
            group(directory)
            self.comm.barrier()
        finally:
            if self.rank == 0:
                shutil.rmtree(directory, ignore_errors=True)
                os.sync()
            self.comm.barrier()

    def timed(self, lane: str, action: Callable[[], object]) -> None:
        """Barrier to barrier; memory of the worst rank."""
        self.comm.barrier()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident set starts again from here
        before = resident_nbytes("VmRSS")
        self.comm.barrier()
        start = time.perf_counter()
        action()
        self.comm.barrier()
        elapsed = time.perf_counter() - start
        extra = self.comm.allreduce(resident_nbytes("VmHWM") - before, MPI.MAX)
        self.seconds.setdefault(lane, []).append(self.comm.allreduce(elapsed, MPI.MAX))
        self.extra[lane] = max(self.extra.get(lane, 0), extra)

    def raw(self, directory: Path) -> None:
        # Replicated state is written once by anybody who is careful: each rank its share.
        parts = self.mine if self.options.layout == "sharded" else self.mine[self.rank :: self.size]
        targets = arrays(self.target)
        targets = targets if self.options.layout == "sharded" else targets[self.rank :: self.size]
        buffered, direct = directory / f"buffered-{self.rank}", directory / f"direct-{self.rank}"
        lanes: list[tuple[str, Callable[[], object]]] = [
            ("raw-buffered", lambda: write_buffered(parts, buffered)),
            ("raw-direct", lambda: write_direct(parts, direct, self.buffer)),
        ]
        if len(self.seconds.get("raw-direct", ())) % 2:
            lanes.reverse()
        for lane, action in lanes:
            self.timed(lane, action)
        if self.options.restore:
            self.cold(directory)
            self.timed("read-buffered", lambda: read_buffered(targets, buffered))
            self.timed("read-direct", lambda: read_direct(targets, direct, self.buffer))

    def save(self, directory: Path, name: str) -> None:
        config = parckpt.CheckpointConfig(
            keep_checkpoint_max=5, format=self.options.format, crc_check=self.options.crc_check, **SAVES[name]
        )
        with parckpt.ModelCheckpoint("bench", directory, config, comm=self.comm) as checkpoints:
            for lane in (f"{name}-first", name):
                self.step += 1
                for array in self.mine:
                    array.reshape(-1)[:1] += 1  # something has changed
                self.timed(lane, lambda: checkpoints.save_now(self.state, self.step))
        if self.options.restore and name != "owners":
            self.restore(directory, "restore" if name == "per-rank" else "restore-gather")

    def restore(self, directory: Path, name: str) -> None:
        for lane in (name, f"{name}-warm"):
            self.cold(directory)
            for array in arrays(self.target):
                array.fill(0)
            if lane.endswith("warm"):
                for path in directory.rglob("*"):
                    if path.is_file():
                        path.read_bytes()
            with parckpt.ModelCheckpoint("bench", directory, comm=self.comm) as checkpoints:
                self.timed(lane, lambda: checkpoints.restore(self.target))
            for found, expected in zip(arrays(self.target), self.mine, strict=True):
                if found.tobytes() != expected.tobytes():
                    raise SystemExit(f"{lane}: what was restored differs from what was saved")

    def cold(self, directory: Path) -> None:
        self.comm.barrier()
        if self.rank == 0:
            os.sync()
            forget(directory)
        self.comm.barrier()

    def report(self) -> dict[str, Any]:
        """Medians, rates and ratios."""
        rows = {}
        medians = {lane: statistics.median(seconds) for lane, seconds in self.seconds.items()}
        for lane, seconds in sorted(self.seconds.items()):
            floors = ("read-buffered", "read-direct") if "re" in lane[:2] else ("raw-buffered", "raw-direct")
            rows[lane] = {
                "median_s": medians[lane],
                "best_s": min(seconds),
                "worst_s": max(seconds),
                "gb_per_s": self.nbytes / medians[lane] / 1e9,
                "extra_mib": self.extra[lane] / MIB,
                # The median of the ratios round by round: a drift of the disk cancels out.
                "speed_vs": {
                    floor: statistics.median(f / s for f, s in zip(self.seconds[floor], seconds, strict=True))
                    for floor in floors
                    if floor in self.seconds
                },
            }
        return {
            "payload": self.options.payload,
            "layout": self.options.layout,
            "format": self.options.format,
            "ranks": self.size,
            "nbytes": self.nbytes,
            "rounds": self.options.rounds,
            "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, numpy {np.__version__}, "
            + MPI.Get_library_version().splitlines()[0].strip("\0 "),
            "load": list(os.getloadavg()),
            "lanes": rows,
        }


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"payload {report['payload']} {report['layout']}, {report['nbytes'] / 2**30:.2f} GiB, {report['format']}, "
        f"{report['ranks']} ranks, {report['rounds']} rounds; {report['machine']}; load {report['load'][0]:.1f}"
    )
    print(f"{'lane':22} {'median':>8} {'best':>8} {'worst':>8} {'GB/s':>6} {'extra MiB':>10}  speed against")
    for lane, row in report["lanes"].items():
        against = "  ".join(f"{floor} {ratio:.2f}" for floor, ratio in row["speed_vs"].items())
        times = " ".join(f"{row[key]:8.3f}" for key in ("median_s", "best_s", "worst_s"))
        print(f"{lane:22} {times} {row['gb_per_s']:6.2f} {row['extra_mib']:10.1f}  {against}")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=".", help="where to write; a directory in it is made and removed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--payload", choices=("A", "B"), default="A")
    parser.add_argument("--layout", choices=("sharded", "replicated"), default="sharded")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the 64 MiB tensors, as a factor")
    parser.add_argument("--format", choices=("ckpt", "safetensors"), default="ckpt")
    parser.add_argument("--crc-check", action="store_true", help="MindSpore's own checksum as well")
    parser.add_argument("--lanes", nargs="+", choices=tuple(SAVES), default=["per-rank", "gather"])
    parser.add_argument("--no-restore", dest="restore", action="store_false")
    parser.add_argument("--json", help="also write the report to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ParckptWarning)
    bench = Bench(options)
    bench.run()
    report = bench.report()
    if bench.rank == 0:
        show(report)
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
