"""The model of a disk that loses power keeps what was promised and loses what was not, in every mixture."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from parckpt.errors import NoSpaceError, StorageError
from parckpt.storage import atomic
from parckpt.storage.filesystem import opened
from parckpt.testing.clock import ManualClock
from parckpt.testing.filesystem import MemoryFileSystem

pytestmark = pytest.mark.fast

PAGE = 4096
SEEDS = range(60)


def disk_with(**files: bytes) -> MemoryFileSystem:
    disk = MemoryFileSystem()
    disk.mkdir("/d")
    for name, content in files.items():
        atomic.write_file(disk, f"/d/{name}", content)
    disk.sync_all()
    return disk


def write(disk: MemoryFileSystem, path: str, content: bytes, byte_offset: int = 0, sync: bool = False) -> None:
    with opened(disk, path, os.O_WRONLY | os.O_CREAT) as fd:
        disk.pwrite(fd, content, byte_offset)
        if sync:
            disk.fsync(fd)


def read(disk: MemoryFileSystem, path: str) -> bytes:
    return atomic.read_file(disk, path, 1 << 20)


def test_unsynced_pages_are_torn_page_by_page() -> None:
    disk = disk_with(a=b"o" * 3 * PAGE)
    write(disk, "/d/a", b"n" * 3 * PAGE)
    assert read(disk.crash(keep="none"), "/d/a") == b"o" * 3 * PAGE
    assert read(disk.crash(keep="all"), "/d/a") == b"n" * 3 * PAGE
    found = {read(disk.crash(seed), "/d/a")[::PAGE] for seed in SEEDS}
    assert len(found) == 8  # every mixture of three pages
    assert all(set(read(disk.crash(seed), "/d/a")[:PAGE]) in ({ord("o")}, {ord("n")}) for seed in SEEDS)
    assert read(disk, "/d/a") == b"n" * 3 * PAGE  # the disk itself has not crashed


def test_an_unsynced_size_may_be_anything_between() -> None:
    disk = disk_with(a=b"o" * 10)
    write(disk, "/d/a", b"n" * 5000, 10)
    sizes = {len(read(disk.crash(seed), "/d/a")) for seed in SEEDS}
    assert {10, 5010} < sizes
    assert all(10 <= size <= 5010 for size in sizes)
    with opened(disk, "/d/a", os.O_WRONLY) as fd:
        disk.fsync(fd)
    assert {read(disk.crash(seed), "/d/a") for seed in SEEDS} == {b"o" * 10 + b"n" * 5000}


def test_a_name_is_not_durable_by_syncing_the_file() -> None:
    disk = disk_with()
    write(disk, "/d/a", b"x", sync=True)
    assert disk.crash(keep="none").listdir("/d") == []
    assert {tuple(disk.crash(seed).listdir("/d")) for seed in SEEDS} == {(), ("a",)}


def test_a_name_may_be_durable_without_its_content() -> None:
    disk = disk_with()
    write(disk, "/d/a", b"x" * 5000)
    disk.sync_directory("/d")
    assert read(disk.crash(keep="none"), "/d/a") == b""
    assert len({read(disk.crash(seed), "/d/a") for seed in SEEDS}) > 2


def test_an_unlinked_name_may_come_back_with_its_content() -> None:
    disk = disk_with(a=b"abc")
    disk.unlink("/d/a")
    found = {tuple(disk.crash(seed).listdir("/d")) for seed in SEEDS}
    assert found == {(), ("a",)}
    assert read(disk.crash(keep="none"), "/d/a") == b"abc"
    disk.sync_directory("/d")
    assert disk.crash(keep="none").listdir("/d") == []


def test_a_rename_is_atomic_and_brings_the_content() -> None:
    disk = disk_with()
    disk.mkdir("/d/s")
    write(disk, "/d/s/f", b"abc", sync=True)
    disk.sync_directory("/d/s")
    disk.sync_directory("/d")
    disk.rename("/d/s", "/t")
    for seed in SEEDS:
        found = disk.crash(seed)
        there = [path for path in ("/d/s", "/t") if os.path.basename(path) in found.listdir(os.path.dirname(path))]
        assert len(there) == 1
        assert read(found, f"{there[0]}/f") == b"abc"
    disk.sync_directory("/")  # either parent covers the whole act
    assert disk.crash(keep="none").listdir("/") == ["d", "t"]
    assert disk.crash(keep="none").listdir("/d") == []


def test_independent_changes_survive_independently_and_changes_of_one_name_in_order() -> None:
    disk = disk_with(a=b"a")
    disk.rename("/d/a", "/d/b")
    disk.rename("/d/b", "/d/c")
    write(disk, "/d/x", b"")
    found = {tuple(disk.crash(seed).listdir("/d")) for seed in SEEDS}
    assert found == {("a",), ("b",), ("c",), ("a", "x"), ("b", "x"), ("c", "x")}


def test_exchange_is_atomic() -> None:
    disk = disk_with(a=b"a", b=b"b")
    disk.exchange("/d/a", "/d/b")
    found = {(read(disk.crash(seed), "/d/a"), read(disk.crash(seed), "/d/b")) for seed in SEEDS}
    assert found == {(b"a", b"b"), (b"b", b"a")}


def test_a_failed_sync_loses_the_pages_for_good() -> None:
    disk = disk_with(a=b"o" * PAGE)
    with opened(disk, "/d/a", os.O_WRONLY) as fd:
        disk.pwrite(fd, b"n" * PAGE, 0)
        disk.lose_unsynced(fd)
        disk.fsync(fd)
    assert read(disk, "/d/a") == b"n" * PAGE
    assert read(disk.crash(keep="all"), "/d/a") == b"o" * PAGE


def test_syncing_an_open_directory_syncs_its_names() -> None:
    disk = disk_with()
    write(disk, "/d/a", b"")
    with opened(disk, "/d", os.O_RDONLY | os.O_DIRECTORY) as fd:
        disk.fsync(fd)
    assert disk.crash(keep="none").listdir("/d") == ["a"]


def test_a_full_disk_takes_what_fits_then_nothing() -> None:
    disk = disk_with(a=b"x" * 10)
    disk.capacity_nbytes = 15
    with opened(disk, "/d/b", os.O_WRONLY | os.O_CREAT) as fd:
        assert disk.pwrite(fd, b"y" * 10, 0) == 5
        for action in (lambda: disk.pwrite(fd, b"y", 5), lambda: disk.truncate(fd, 6), lambda: disk.allocate(fd, 6)):
            with pytest.raises(NoSpaceError):
                action()
        assert disk.pwrite(fd, b"z", 2) == 1
        assert disk.free_nbytes("/") == 0
        disk.unlink("/d/a")
        assert disk.pwrite(fd, b"y" * 9, 5) == 9


def test_denied_paths_and_all_below() -> None:
    disk = disk_with(a=b"x")
    disk.deny("/d")
    for action in (
        lambda: disk.listdir("/d"),
        lambda: disk.stat("/d/a"),
        lambda: disk.mkdir("/d/e"),
        lambda: disk.rename("/d/a", "/a"),
        lambda: disk.open("/d/a", os.O_RDONLY),
    ):
        with pytest.raises(StorageError) as caught:
            action()
        assert caught.value.errno == errno.EACCES
    disk.allow("/d")
    assert read(disk, "/d/a") == b"x"


def test_unreadable_bytes_follow_the_file() -> None:
    disk = disk_with(a=b"x" * 100, b=b"y")
    disk.fail_read("/d/a", 50)
    disk.fail_read("/d/b", code=errno.ESTALE)
    disk.rename("/d/a", "/d/c")
    with opened(disk, "/d/c", os.O_RDONLY) as fd:
        assert disk.pread_into(fd, bytearray(50), 0) == 50
        with pytest.raises(StorageError, match="Input/output"):
            disk.pread_into(fd, bytearray(1), 50)
    with pytest.raises(StorageError, match="Stale"):
        read(disk, "/d/b")


def test_flipped_bits_are_on_disk() -> None:
    disk = disk_with(a=b"abc")
    disk.corrupt("/d/a", 1)
    assert read(disk, "/d/a") == b"acc"
    assert read(disk.crash(keep="none"), "/d/a") == b"acc"


def test_direct_io_wants_whole_pages() -> None:
    with pytest.raises(StorageError, match="Invalid argument"):
        disk_with(a=b"").open("/d/a", os.O_WRONLY | os.O_DIRECT)
    disk = MemoryFileSystem(direct="works")
    with opened(disk, "/a", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd:
        assert disk.pwrite(fd, bytes(PAGE), PAGE) == PAGE
        for nbytes, byte_offset in ((PAGE - 1, 0), (PAGE, 1)):
            with pytest.raises(StorageError, match="Invalid argument"):
                disk.pwrite(fd, bytes(nbytes), byte_offset)
            with pytest.raises(StorageError, match="Invalid argument"):
                disk.pread_into(fd, bytearray(nbytes), byte_offset)


def test_times_come_from_the_clock() -> None:
    clock = ManualClock()
    disk = MemoryFileSystem(clock=clock)
    write(disk, "/a", b"x")
    clock.advance(5)
    write(disk, "/b", b"x")
    clock.jump_wall(-100)
    write(disk, "/c", b"x")
    assert [disk.stat(path).mtime - 1.7e9 for path in ("/a", "/b", "/c")] == [0, 5, -95]
    assert clock.monotonic() == 5
    with pytest.raises(ValueError, match="go back"):
        clock.advance(-1)


def test_threads_do_not_lose_each_others_names() -> None:
    disk = MemoryFileSystem()

    def work(who: int) -> None:
        for index in range(50):
            write(disk, f"/{who}-{index}", b"x" * who, sync=True)
            if index % 2:
                disk.unlink(f"/{who}-{index}")

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    disk.sync_directory("/")
    assert len(disk.crash(keep="none").listdir("/")) == 100
    assert disk.nopen == 0


def test_old_descriptors_mean_nothing_after_a_crash() -> None:
    disk = disk_with(a=b"x")
    fd = disk.open("/d/a", os.O_RDONLY)
    with pytest.raises(StorageError, match="Bad file descriptor"):
        disk.crash().pread_into(fd, bytearray(1), 0)
    disk.close(fd)
