"""A small training state whose every bit follows from a version number, and checkpoints of it on a memory file system.

A mix of two saves, or a torn one, cannot pass for either: each tensor and value is recomputed from the version found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

import parckpt
from parckpt.checkpointer import ModelCheckpoint
from parckpt.comm.base import Communicator
from parckpt.core import naming
from parckpt.errors import InternalError
from parckpt.storage.filesystem import FileSystem, try_stat
from parckpt.storage.lock import break_lock, find_locks
from parckpt.testing.filesystem import Call, FaultyFileSystem, MemoryFileSystem, SimulatedCrash
from parckpt.testing.world import run_world

__all__ = [
    "DIRECTORY",
    "MODES",
    "NAMED",
    "PREFIX",
    "abandon",
    "check",
    "config",
    "fill",
    "make_state",
    "new_disk",
    "restore",
    "saved",
    "started",
    "unexpected",
    "unpublished",
]

DIRECTORY, PREFIX = "/ckpts", "m"

MODES: dict[str, dict[str, Any]] = {
    "integrated": {},
    "integrated-safetensors": {"format": "safetensors", "crc_check": True},
    "per-rank": {"integrated_save": False},
    "deduplicated": {"remove_redundancy": True},
    "deduplicated-safetensors": {"remove_redundancy": True, "format": "safetensors"},
}

# With a callable prefix: a name for each step, or the same one again and again.
NAMED: dict[str, tuple[Callable[[Any], str], dict[str, Any]]] = {
    "named": (lambda parameters: f"at {parameters.cur_step_num}", {}),
    "named-per-rank": (lambda parameters: f"at {parameters.cur_step_num}", {"integrated_save": False}),
    "latest": (lambda parameters: "latest", {}),
    "latest-per-rank": (lambda parameters: "latest", {"integrated_save": False}),
}

_ROWS, _COLUMNS = 11, 3


def config(mode: str, **options: Any) -> parckpt.CheckpointConfig:
    """Options of a mode: a save at each step."""
    given = NAMED[mode][1] if mode in NAMED else MODES[mode]
    return parckpt.CheckpointConfig(**{"save_checkpoint_steps": 1, "keep_checkpoint_max": 4, **given, **options})


def make_state(rank: int, size: int, version: int = 0) -> dict[str, Any]:
    """One rank's part of the state: a tensor cut by rows, replicas, an empty and a 0-d one, shared and own values."""
    first, last = _ROWS * rank // size, _ROWS * (rank + 1) // size
    state: dict[str, Any] = {
        "w": parckpt.Shard(np.zeros((last - first, _COLUMNS), "f4"), (_ROWS, _COLUMNS), (first, 0)),
        "b": np.zeros(5, "f8"),
        "count": np.zeros((), "i8"),
        "none": np.zeros((0, 2), "f4"),
        "sched": {"version": 0, "lr": 0.0},
        "place": parckpt.PerRank(0, on_resize=_all),
    }
    fill(state, rank, size, version)
    return state


def _all(values: Sequence[Any], rank: int, size: int) -> list[Any]:
    return list(values)


def fill(state: dict[str, Any], rank: int, size: int, version: int) -> None:
    """Move the state to another version, in place."""
    first = _ROWS * rank // size
    shard = state["w"].data
    shard[...] = _whole(version)[first : first + len(shard)]
    state["b"][...] = np.arange(5) + version
    state["count"][...] = version
    state["sched"]["version"], state["sched"]["lr"] = version, version / 7
    state["place"] = parckpt.PerRank(1000 * rank + version, on_resize=_all)


def _whole(version: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(version + 1).standard_normal((_ROWS, _COLUMNS)).astype("f4")


def check(state: dict[str, Any], size: int, progress: parckpt.Progress) -> int:
    """The version that the one rank's state holds, with every bit of it checked; ``size`` ranks saved it."""
    version = int(state["sched"]["version"])
    assert state["w"].data.tobytes() == _whole(version).tobytes()
    assert state["b"].tobytes() == (np.arange(5, dtype="f8") + version).tobytes()
    assert state["count"].item() == version
    assert state["sched"]["lr"] == version / 7
    assert list(progress.per_rank["place"]) == [1000 * rank + version for rank in range(size)]
    return version


def abandon(run: ModelCheckpoint) -> None:
    """End the threads of a run that "died"; what it holds on disk stays."""
    places, run._run._places, run._closed = run._run._places, None, True
    for keeper in {places.home, places.present} if places is not None else ():
        if keeper._heartbeat is not None:
            keeper._heartbeat.stop()
        keeper._cleaner.shutdown(wait=True)


@contextmanager
def started(fs: FileSystem, mode: str, comm: Any = parckpt.SELF, **options: Any) -> Iterator[ModelCheckpoint]:
    """A run that saves at each step. Locks may be left of a dead run: of this same process, so they are broken first.

    After a `SimulatedCrash` the run is abandoned as it stands.
    """
    if getattr(comm, "rank", 0) == 0:
        locks = find_locks(fs, DIRECTORY) if try_stat(fs, DIRECTORY) is not None else ()
        for lock in locks:
            if lock == PREFIX or naming.belongs(lock, PREFIX):
                break_lock(fs, DIRECTORY, lock)
    prefix: Any = NAMED[mode][0] if mode in NAMED else PREFIX
    run = ModelCheckpoint(prefix, DIRECTORY, config(mode, **options), comm=comm, filesystem=fs, family=PREFIX)
    try:
        yield run
    except SimulatedCrash:
        abandon(run)
        raise
    except BaseException:
        with suppress(Exception):  # another rank may have ended the world
            run.close()
        raise
    else:
        run.close()


def new_disk(**options: Any) -> MemoryFileSystem:
    """An empty disk with the checkpoint directory on it."""
    disk = MemoryFileSystem(**options)
    disk.mkdir(DIRECTORY)
    disk.sync_all()
    return disk


def saved(disk: MemoryFileSystem, mode: str, size: int, versions: Sequence[tuple[int, int]]) -> MemoryFileSystem:
    """Let ``size`` ranks go on with the run on the disk and save each (step, version), all durable."""

    def program(comm: Communicator, rank: int) -> None:
        with started(disk, mode, comm) as run:
            state = make_state(rank, size)
            run.restore(state)
            for step, version in versions:
                fill(state, rank, size, version)
                run.step_end(state, step)

    run_world(size, program)
    disk.sync_all()
    return disk


def unpublished(
    disk: MemoryFileSystem, mode: str, size: int, step: int, make: Callable[[int, int], Mapping[str, Any]]
) -> str:
    """Let ``size`` ranks go on with the run, save, and die once all have recorded; the staging directory."""
    paths: list[str] = []

    def die(call: Call) -> None:
        if call.operation == "open" and call.path.endswith("/manifest") and ".staging-" in call.path:
            paths.append(os.path.dirname(call.path))
            raise SimulatedCrash(call.path)

    def program(comm: Communicator, rank: int) -> None:
        fs = FaultyFileSystem(disk, on_call=die) if rank == 0 else disk
        try:
            with started(fs, mode, comm) as run:
                run.restore(make(rank, size))
                run.save_now(make(rank, size), step)
        except SimulatedCrash as death:
            raise InterruptedError from death

    with suppress(InterruptedError, InternalError):
        run_world(size, program)
    disk.sync_all()
    return paths[0]


def restore(fs: FileSystem, mode: str, size: int, **request: Any) -> tuple[int, int, list[tuple[str, str]]]:
    """What a start on one rank finds: step, version, and what it skipped. Step 0: nothing was ever published."""
    with started(fs, mode) as run:
        state = make_state(0, 1, -1)
        progress = run.restore(state, **request)
        if progress.step == 0:
            assert state["sched"]["version"] == -1
            return 0, -1, progress.skipped
        return progress.step, check(state, size, progress), progress.skipped


def unexpected(fs: MemoryFileSystem) -> list[str]:
    """What is in the directory beside whole checkpoints and the run file, once a start has swept and a run has left.

    A record that a loss of power brought back into a published directory does no harm and is not searched for: 4,096
    ranks would take a start too long. Nor does what dying while the lock of a single name was taken or judged left:
    who takes that lock the next time removes it.
    """
    of_names = f".{PREFIX}-"
    names = [
        name
        for name in fs.listdir(DIRECTORY)
        if name != naming.run_name(PREFIX)
        and not (name.startswith(of_names) and (".lock.temp-" in name or ".lock.aside-" in name))
    ]
    endings = tuple(f".{extension}" for extension in naming.EXTENSIONS.values())
    steps = [name for name in names if not name.startswith(".") and fs.stat(os.path.join(DIRECTORY, name)).is_dir]
    data = [name.rpartition(".")[0] for name in names if name.endswith(endings)]
    manifests = [name.rsplit(".", 2)[0] for name in names if name.endswith(".manifest")]
    wrong = [name for name in names if name not in steps and not name.endswith((*endings, ".manifest"))]
    wrong += [
        f"manifests of {stem}" for stem in {*data, *manifests} if (data.count(stem), manifests.count(stem)) != (1, 1)
    ]
    for name in steps:
        wrong += [f"{name}/{inner}" for inner in _unexpected_inside(fs, os.path.join(DIRECTORY, name), name)]
    return wrong


def _unexpected_inside(fs: MemoryFileSystem, path: str, stem: str) -> Iterator[str]:
    for name in fs.listdir(path):
        if naming.parse_rank_directory(name) is None:
            if name != naming.MANIFEST:
                yield name
            continue
        for inner in fs.listdir(os.path.join(path, name)):
            if inner.rpartition(".")[0] != stem and inner != naming.RECORD:
                yield f"{name}/{inner}"
