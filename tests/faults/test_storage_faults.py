"""A step directory written, published, replaced by the storage layer alone: every call fails or is the last."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from parckpt.errors import LockedError, StorageError
from parckpt.storage import atomic
from parckpt.storage.direct import ALIGNMENT, InputFile, OutputFile, aligned_buffer
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat
from parckpt.storage.identity import identify
from parckpt.storage.lock import Lock
from parckpt.testing.clock import ManualClock
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem, SimulatedCrash

OLD, NEW = b"\x11" * (3 * ALIGNMENT + 5), b"\x22" * (5 * ALIGNMENT + 9)
STAGING, STEP, RESERVED = "/ckpts/.step.staging-1", "/ckpts/step", "/ckpts/.step.replaced-1"

MAKES: dict[str, Callable[[], MemoryFileSystem]] = {
    "flagless": lambda: MemoryFileSystem(rename_flags=False, direct="works"),
    "flags": lambda: MemoryFileSystem(direct="works"),
    "buffered": lambda: MemoryFileSystem(direct="open-only"),
}


def write_step(fs: FileSystem, path: str, content: bytes) -> None:
    """Data, rank directory, manifest, staging directory: in the order that a save has to keep."""
    fs.mkdir(path)
    fs.mkdir(f"{path}/rank_0")
    buffer = aligned_buffer(-(-len(content) // ALIGNMENT) * ALIGNMENT)
    buffer[: len(content)] = content
    with OutputFile(fs, f"{path}/rank_0/data", len(content)) as file:
        file.write(buffer[:ALIGNMENT], 0)
        file.write(buffer[ALIGNMENT:], ALIGNMENT)
        file.finish(len(content))
    fs.sync_directory(f"{path}/rank_0")
    atomic.write_file(fs, f"{path}/manifest", str(len(content)).encode())
    fs.sync_directory(path)


def publish(fs: FileSystem) -> None:
    atomic.move_new(fs, STAGING, STEP)
    fs.sync_directory("/ckpts")


def read_step(fs: FileSystem, path: str) -> bytes | None:
    """Content of a step that a restore would take: it is complete, or it raises."""
    if try_stat(fs, path) is None:
        return None
    nbytes = int(atomic.read_file(fs, f"{path}/manifest", 100))
    with InputFile(fs, f"{path}/rank_0/data") as file:
        assert file.nbytes == nbytes
        return file.read(0, nbytes)


def with_old(make: Callable[[], MemoryFileSystem]) -> MemoryFileSystem:
    disk = make()
    disk.mkdir("/ckpts")
    write_step(disk, STEP, OLD)
    disk.sync_all()
    return disk


def empty(make: Callable[[], MemoryFileSystem]) -> MemoryFileSystem:
    disk = make()
    disk.mkdir("/ckpts")
    disk.sync_all()
    return disk


def first_save(fs: FileSystem) -> None:
    write_step(fs, STAGING, NEW)
    publish(fs)


def replacing_save(fs: FileSystem, root: str = "/ckpts") -> None:
    staging, step, reserved = f"{root}/.step.staging-1", f"{root}/step", f"{root}/.step.replaced-1"
    write_step(fs, staging, NEW)
    atomic.swap(fs, staging, step, reserved)
    atomic.remove_tree(fs, reserved)


@pytest.mark.parametrize("make", MAKES)
def test_a_first_publish_is_all_or_nothing_at_every_crash(make: str) -> None:
    for n in range(1000):
        disk = empty(MAKES[make])
        try:
            first_save(FaultyFileSystem(disk, crash_at=n))
        except SimulatedCrash:
            finished = False
        else:
            finished = True
        for found in [disk.crash(keep="all"), disk.crash(keep="none"), *(disk.crash(seed) for seed in range(8))]:
            content = read_step(found, STEP)
            assert content == NEW if finished else content in (None, NEW)
        if finished:
            assert n > 20
            return


@pytest.mark.parametrize("make", MAKES)
def test_a_replaced_step_is_old_or_new_at_every_crash(make: str) -> None:
    for n in range(1000):
        disk = with_old(MAKES[make])
        try:
            replacing_save(FaultyFileSystem(disk, crash_at=n))
        except SimulatedCrash:
            finished = False
        else:
            finished = True
        for found in [disk.crash(keep="all"), disk.crash(keep="none"), *(disk.crash(seed) for seed in range(8))]:
            content = read_step(found, STEP)
            if content is None:  # between the two renames: restore knows the reserved name
                assert make != "flags"
                content = read_step(found, RESERVED)
                assert content == OLD
                assert read_step(found, STAGING) == NEW
            assert content == NEW if finished else content in (OLD, NEW)
        if finished:
            assert n > 25
            return


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("make", MAKES)
def test_a_failed_save_leaves_the_old_step_and_the_next_one_succeeds(make: str, error: int) -> None:
    for n in range(1, 1000):
        disk = with_old(MAKES[make])
        fs = FaultyFileSystem(disk, fail_at=n, error=error)
        try:
            replacing_save(fs)
        except StorageError as caught:
            failed = caught
        else:
            failed = None
        assert disk.nopen == 0
        content = read_step(disk, STEP)
        assert content in (OLD, NEW)
        if fs.failed is None:
            assert failed is None
            assert n > 25
            return
        if failed is not None:
            assert failed.errno == error
        # What is left is debris: swept, and the name is free for the next save.
        for debris in (STAGING, RESERVED):
            atomic.remove_tree(disk, debris)
        replacing_save(disk)
        assert read_step(disk, STEP) == NEW
        assert disk.listdir("/ckpts") == ["step"]


@pytest.mark.parametrize("rename_flags", [False, True])
def test_the_same_on_a_real_disk(tmp_path: Path, rename_flags: bool) -> None:
    disk = PosixFileSystem(rename_flags=rename_flags)
    for n in range(1, 1000):
        root = str(tmp_path / str(n))
        disk.mkdir(root)
        write_step(disk, f"{root}/step", OLD)
        fs = FaultyFileSystem(disk, fail_at=n)
        with suppress(StorageError):
            replacing_save(fs, root)
        assert read_step(disk, f"{root}/step") in (OLD, NEW)
        if fs.failed is None:
            assert read_step(disk, f"{root}/step") == NEW
            assert disk.listdir(root) == ["step"]
            return


def test_of_many_threads_one_gets_the_lock(tmp_path: Path) -> None:
    me = identify({}, "attempt")
    for fs, directory in ((PosixFileSystem(), str(tmp_path)), (MemoryFileSystem(), "/")):
        for _ in range(10):
            barrier = threading.Barrier(8)
            taken: list[Lock] = []
            refused: list[LockedError] = []

            def contend(
                fs: FileSystem = fs,
                directory: str = directory,
                b: threading.Barrier = barrier,
                won: list[Lock] = taken,
                lost: list[LockedError] = refused,
            ) -> None:
                b.wait()
                try:
                    won.append(Lock.acquire(fs, directory, "p", me, ManualClock(), 600))
                except LockedError as error:
                    lost.append(error)

            threads = [threading.Thread(target=contend) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (len(taken), len(refused)) == (1, 7)
            taken[0].check()
            taken[0].release()
            assert fs.listdir(directory) == []
