"""The state of a pretend training job, cut over its ranks in every way that real ones are, and what must come back.

The whole tensors are a function of the step alone. So every rank can compute what it must hold without parckpt, on any
number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from parckpt.checkpointer import ModelCheckpoint
from parckpt.comm.base import Communicator
from parckpt.core.config import CheckpointConfig
from parckpt.core.leaves import Leaf, PerRank, Shard
from parckpt.storage.filesystem import PosixFileSystem

__all__ = ["CASES", "LAYOUTS", "Job", "QuickFileSystem", "config_of", "restore_cases", "save_cases", "whole_tensors"]

Array = npt.NDArray[Any]

LAYOUTS: dict[str, dict[str, Any]] = {
    "integrated": {},
    "each": {"integrated_save": False},
    "owners": {"remove_redundancy": True, "split_replicas": False},
    "split": {"remove_redundancy": True},
}
# Differs from "owners" in who writes what, which is tested by itself: one case of it is enough.
_BY_NAME: dict[str, Any] = {"remove_redundancy": True, "ownership": "mindspore"}

CASES = (
    *(f"{layout}-{form}{crc}" for layout in LAYOUTS for form in ("ckpt", "safetensors") for crc in ("", "-crc")),
    "names-ckpt",
)
"""Every layout, format and checksum, as prefixes."""

LARGE = ("integrated-ckpt", "integrated-safetensors-crc", "each-safetensors", "owners-ckpt-crc", "split-ckpt")
"""Cases with tensors of several chunks: each layout once, each format and checksum."""

STEP = 3


class QuickFileSystem(PosixFileSystem):
    """The machine's, but without waiting for the device: for tests in which nobody loses power."""

    def fsync(self, fd: int) -> None:
        """Do nothing."""

    def sync_directory(self, path: str) -> None:
        """Do nothing."""


def config_of(case: str, **options: Any) -> CheckpointConfig:
    """The configuration of a case; saves are asked for, never due."""
    layout, form, *crc = case.split("-")
    given = {"save_checkpoint_steps": 1000, "crc_check": bool(crc), **LAYOUTS.get(layout, _BY_NAME), **options}
    return CheckpointConfig(format=form, **given)


@cache
def whole_tensors(step: int, *, large: bool = True) -> dict[str, Array]:
    """Every shared tensor, whole and read-only. Random bits where the type allows it: NaNs with payloads among them.

    Step 0 is a pattern that no other step has.
    """
    rng = np.random.default_rng(step)

    def bits(dtype: Any, *shape: int) -> Array:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        bits: Array = np.frombuffer(rng.bytes(nbytes), dtype).reshape(shape).copy()
        return bits

    tensors = {
        "rows": bits("<f4", 37, 5),
        "columns": bits("<i8", 6, 41),
        "grid": bits("<f8", 13, 11),
        "pairs": bits("<u4", 10, 7),
        "replicated": bits(ml_dtypes.bfloat16, 19, 3),
        "scalar": bits("<f8"),
        "flag": np.array(step % 2 == 0),
        "empty": bits("<f4", 0, 3),
        "empty/rows": bits("<f4", 5, 0),
        "blocks": bits("<u2", 21, 4),
        "stage": bits("<f2", 9),
        "complex": bits("<c8", 8, 2),
        "float8": bits(ml_dtypes.float8_e5m2, 33),
        "strided": bits("<f4", 9, 6),
        "fortran": bits("<i4", 5, 7),
        "swapped": rng.standard_normal((7, 4)),
        "leaf": bits("<i2", 12, 3),
        "cube": bits("<u1", 3, 4, 2, 5),
    }
    if large:
        tensors["large/inner"] = bits("<f2", 3, 700, 1100)  # 4.4 MiB, cut along its last dimension
        tensors["large/middle"] = bits("<u1", 5, 1000, 900)  # 4.3 MiB, cut along its second one
        tensors["large/whole"] = bits("<f4", 1100, 1001)  # 4.2 MiB on every rank
    for array in tensors.values():
        if step == 0:
            array.reshape(-1).view(np.uint8)[...] = 0xA5 if array.dtype != bool else 0
        array.flags.writeable = False
    return tensors


class Job:
    """One rank's state.

    Attributes
    ----------
    state : dict
        What the rank hands to parckpt.
    arrays : dict
        By tensor, the arrays behind it: what must be compared.
    """

    def __init__(self, rank: int, size: int, step: int | None, *, large: bool = True) -> None:
        self.rank, self.size, self.step = rank, size, step
        self.arrays: dict[str, list[Array]] = {}
        self._whole = whole_tensors(0 if step is None else step, large=large)
        number = -1 if step is None else step
        self.state: dict[str, Any] = {
            "model": {name: leaf for name, leaf in self._tensors() if leaf is not None},
            "sched": {"lr": 3e-4 * number, "steps": [number, 2**70 + number, (float(number), "x\udc80", None)]},
            "list": [{"k": number}, bits_of(number), number > 0],
            "own": {
                "count": PerRank(self._count(rank), on_resize=lambda all_, rank, size: sum(all_) + rank),
                "ring": PerRank(self._ring(rank), on_resize=lambda all_, rank, size: sum(all_) + rank),
                "kept": PerRank(np.full(rank + 1, number), on_resize="keep"),
                "name": PerRank(f"rank {rank} at {number}", on_resize="keep"),
            },
        }

    def _count(self, rank: int) -> int:
        return -1 if self.step is None else 100 * rank + self.step

    def _ring(self, rank: int) -> Array:
        return np.full(4, -1) if self.step is None else np.arange(4) + 10 * rank + self.step

    def _tensors(self) -> Iterable[tuple[str, Any]]:
        for name, array in self._whole.items():
            self.arrays[name] = []
            yield name, _CUTS.get(name, _plain)(self, name, array)

    def hold(self, name: str, array: Array) -> Array:
        """Remember an array of this rank."""
        self.arrays[name].append(array)
        return array

    def check(self, step: int, saved_size: int) -> None:
        """Assert that this state is that of ``step``, as ``saved_size`` ranks had saved it."""
        expected = Job(self.rank, self.size, step, large="large/whole" in self.arrays)
        for name, arrays in expected.arrays.items():
            assert [_raw(a) for a in self.arrays[name]] == [_raw(a) for a in arrays], f"{name} on rank {self.rank}"
        assert self.state["sched"] == expected.state["sched"]
        assert self.state["list"] == expected.state["list"]
        own, want = self.state["own"], expected.state["own"]
        if self.size == saved_size:
            assert {k: _raw(v.value) for k, v in own.items()} == {k: _raw(v.value) for k, v in want.items()}
            return
        assert own["count"].value == sum(expected._count(r) for r in range(saved_size)) + self.rank
        assert _raw(own["ring"].value) == _raw(sum(expected._ring(r) for r in range(saved_size)) + self.rank)
        untouched = Job(self.rank, self.size, None, large=False).state["own"]
        assert _raw(own["kept"].value) == _raw(untouched["kept"].value)
        assert own["name"].value == untouched["name"].value


def bits_of(number: int) -> bytes:
    """Bytes that are no text."""
    return b"\xff\x00" + str(number).encode()


def _raw(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return value.shape, np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()


# -- ways to cut --------------------------------------------------------------------------------------------------


def _range(length: int, rank: int, size: int) -> tuple[int, int]:
    return length * rank // size, length * (rank + 1) // size


def _mesh(size: int) -> tuple[int, int]:
    rows = max(r for r in range(1, size + 1) if size % r == 0 and r * r <= size)
    return rows, size // rows


def _shard(job: Job, name: str, array: Array, ranges: Sequence[tuple[int, int]], like: Any = np.copy) -> Shard:
    part = like(array[tuple(slice(start, stop) for start, stop in ranges)])
    return Shard(job.hold(name, part), array.shape, [start for start, _ in ranges])


def _plain(job: Job, name: str, array: Array) -> Any:
    return job.hold(name, array.copy())


def _along(axis: int, like: Any = np.copy) -> Callable[[Job, str, Array], Any]:
    def cut(job: Job, name: str, array: Array) -> Any:
        ranges = [(0, length) for length in array.shape]
        ranges[axis] = _range(array.shape[axis], job.rank, job.size)
        return _shard(job, name, array, ranges, like)

    return cut


def _grid(job: Job, name: str, array: Array) -> Any:
    rows, columns = _mesh(job.size)
    row, column = divmod(job.rank, columns)
    return _shard(job, name, array, [_range(array.shape[0], row, rows), _range(array.shape[1], column, columns)])


def _pairs(job: Job, name: str, array: Array) -> Any:
    """Two parts, each on every other rank: replicas of Shards."""
    parts = min(2, job.size)
    ranges = [_range(array.shape[0], job.rank % parts, parts), (0, array.shape[1])]
    return _shard(job, name, array, ranges)


def _blocks(job: Job, name: str, array: Array) -> Any:
    """Seven blocks dealt out in turn: some ranks hold several, the eighth none."""
    return [
        _shard(job, name, array, [(3 * block, 3 * block + 3), (0, array.shape[1])])
        for block in range(7)
        if block % job.size == job.rank
    ]


def _stage(job: Job, name: str, array: Array) -> Any:
    """Of one pipeline stage: no other rank knows the name."""
    return job.hold(name, array.copy()) if job.rank == 1 % job.size else None


def _strided(part: Array) -> Array:
    base = np.zeros((part.shape[0], 2 * part.shape[1]), part.dtype)
    view: Array = base[:, ::2]
    view[...] = part
    return view


def _swapped(part: Array) -> Array:
    return part.astype(part.dtype.newbyteorder(">"))


def _leaf(job: Job, name: str, array: Array) -> Any:
    start, stop = _range(array.shape[0], job.rank, job.size)
    held = job.hold(name, array[start:stop].copy())

    def read_into(out: Array) -> None:
        out[...] = held

    def write_from(new: Array) -> None:
        held[...] = new

    return Shard(Leaf(held.shape, held.dtype, read_into, write_from), array.shape, (start, 0))


_CUTS: dict[str, Callable[[Job, str, Array], Any]] = {
    "rows": _along(0),
    "empty/rows": _along(0),
    "columns": _along(1),
    "grid": _grid,
    "pairs": _pairs,
    "blocks": _blocks,
    "stage": _stage,
    "complex": _along(0),
    "float8": _along(0),
    "strided": _along(0, _strided),
    "fortran": _along(1, lambda part: np.array(part, order="F")),
    "swapped": _along(0, _swapped),
    "leaf": _leaf,
    "cube": _along(1),
    "large/inner": _along(2),
    "large/middle": _along(1),
}


# -- the same on any communicator ---------------------------------------------------------------------------------


def save_cases(comm: Communicator, directory: str, *, large: bool = True) -> None:
    """Save one checkpoint for each case. Collective."""
    for case in CASES:
        with ModelCheckpoint(case, directory, config_of(case), comm=comm, filesystem=QuickFileSystem()) as ckpt:
            ckpt.save_now(Job(comm.rank, comm.size, STEP, large=large and case in LARGE).state, STEP)


def restore_cases(comm: Communicator, directory: str, *, saved_size: int, large: bool = True) -> None:
    """Restore each case into a fresh state, and compare; some once more without a state. Collective."""
    for case in CASES:
        with_large = large and case in LARGE
        with ModelCheckpoint(case, directory, config_of(case), comm=comm, filesystem=QuickFileSystem()) as ckpt:
            job = Job(comm.rank, comm.size, None, large=with_large)
            progress = ckpt.restore(job.state)
            assert (progress.step, progress.world_size, progress.prefix) == (STEP, saved_size, case)
            job.check(STEP, saved_size)
            assert progress.per_rank["own.count"] == [100 * rank + STEP for rank in range(saved_size)]
            assert [a.tolist() for a in progress.per_rank["own.kept"]] == [[STEP] * (r + 1) for r in range(saved_size)]
            if case not in LARGE:
                continue
            only = ["model.[!l]*", "model.leaf", "model.large/middle"]
            whole = ckpt.restore(only=only).state
            for name, array in whole_tensors(STEP, large=with_large).items():
                if name not in ("large/inner", "large/whole"):
                    assert _raw(whole[f"model.{name}"]) == _raw(array), f"{case}: {name}, whole"
