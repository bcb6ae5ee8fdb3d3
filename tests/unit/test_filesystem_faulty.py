"""The faulty file system fails where it was told to, and nowhere else."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from parckpt.errors import NoSpaceError, StorageError, SyncError
from parckpt.storage import atomic
from parckpt.storage.filesystem import opened
from parckpt.testing.filesystem import Call, FaultyFileSystem, MemoryFileSystem, SimulatedCrash

pytestmark = pytest.mark.fast

CALLS = ["open", "chmod_open", "pwrite", "fsync", "close"]  # of write_file


def test_calls_are_counted_in_order() -> None:
    fs = FaultyFileSystem(MemoryFileSystem())
    atomic.write_file(fs, "/a", b"x")
    assert fs.calls == [Call(number, operation, "/a") for number, operation in enumerate(CALLS, 1)]
    assert (fs.count, fs.failed) == (5, None)


@pytest.mark.parametrize("n", range(1, 6))
def test_the_nth_call_fails_without_effect(n: int) -> None:
    disk = MemoryFileSystem()
    fs = FaultyFileSystem(disk, n, errno.ENOSPC)
    with pytest.raises(SyncError if CALLS[n - 1] == "fsync" else NoSpaceError) as caught:
        atomic.write_file(fs, "/a", b"x")
    assert fs.failed == Call(n, CALLS[n - 1], "/a")
    assert (caught.value.errno, caught.value.facts["operation"]) == (errno.ENOSPC, CALLS[n - 1])
    assert (disk.listdir("/"), disk.nopen) == ([], 0)


@pytest.mark.parametrize("n", range(6))
def test_the_process_dies_right_after_the_nth_call(n: int) -> None:
    disk = MemoryFileSystem()
    fs = FaultyFileSystem(disk, crash_at=n)
    with pytest.raises(SimulatedCrash):
        atomic.write_file(fs, "/a", b"x")
    assert fs.count == n
    assert disk.listdir("/") == (["a"] if n >= 1 else [])
    assert disk.listdir("/") == [] or disk.stat("/a").nbytes == (1 if n >= 3 else 0)
    for _ in range(2):
        with pytest.raises(SimulatedCrash):
            fs.stat("/")
    assert fs.count == n


def test_even_a_failing_call_may_be_the_last() -> None:
    fs = FaultyFileSystem(MemoryFileSystem(), crash_at=1)
    with pytest.raises(SimulatedCrash) as caught:
        fs.stat("/gone")
    assert isinstance(caught.value.__cause__, StorageError)


def test_only_some_operations_count() -> None:
    fs = FaultyFileSystem(MemoryFileSystem(), 2, only=frozenset({"fsync"}))
    atomic.write_file(fs, "/a", b"x")
    with pytest.raises(SyncError):
        atomic.write_file(fs, "/b", b"x")
    assert [call.path for call in fs.calls] == ["/a", "/b"]


def test_transfers_may_be_short() -> None:
    fs = FaultyFileSystem(MemoryFileSystem(), max_transfer_nbytes=3)
    with opened(fs, "/a", os.O_RDWR | os.O_CREAT) as fd:
        assert fs.pwrite(fd, b"12345", 0) == 3
        assert fs.pread_into(fd, bytearray(2), 0) == 2
        assert fs.pread_into(fd, bytearray(9), 0) == 3


def test_threads_get_different_numbers() -> None:
    fs = FaultyFileSystem(MemoryFileSystem())
    threads = [threading.Thread(target=lambda: [fs.stat("/") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [call.number for call in fs.calls] == list(range(1, 801))
