"""One suite for every `FileSystem`."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parckpt.errors import CheckpointExistsError, NoSpaceError, StorageError
from parckpt.storage import atomic
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, UnsupportedOperation, opened, try_stat
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem

pytestmark = pytest.mark.fast

FILE_SYSTEMS: dict[str, Callable[[], FileSystem]] = {
    "posix": PosixFileSystem,
    "posix-flagless": lambda: PosixFileSystem(rename_flags=False),
    "memory": MemoryFileSystem,
    "memory-flagless": lambda: MemoryFileSystem(rename_flags=False),
    "memory-bare": lambda: MemoryFileSystem(rename_flags=False, links=False),
    "faulty-posix": lambda: FaultyFileSystem(PosixFileSystem()),
    "faulty-memory": lambda: FaultyFileSystem(MemoryFileSystem(), max_transfer_nbytes=3),
}


@pytest.fixture(params=FILE_SYSTEMS)
def fs(request: pytest.FixtureRequest) -> FileSystem:
    return FILE_SYSTEMS[request.param]()


@pytest.fixture
def root(fs: FileSystem, tmp_path: Path) -> Iterator[str]:
    inner = fs.inner if isinstance(fs, FaultyFileSystem) else fs
    if isinstance(inner, PosixFileSystem):
        yield str(tmp_path)
        assert inner._paths == {}
    else:
        fs.mkdir("/work")
        yield "/work"
        assert isinstance(inner, MemoryFileSystem)
        assert inner.nopen == 0


def put(fs: FileSystem, path: str, content: bytes) -> None:
    atomic.write_file(fs, path, content)


def get(fs: FileSystem, path: str) -> bytes:
    return atomic.read_file(fs, path, 1 << 20)


def code_of(action: Callable[[], object]) -> int | None:
    with pytest.raises(StorageError) as caught:
        action()
    assert caught.value.facts["operation"]
    assert caught.value.facts["path"]
    assert os.strerror(caught.value.errno or 0) in str(caught.value)
    return caught.value.errno


def test_what_was_written_is_read(fs: FileSystem, root: str) -> None:
    with opened(fs, f"{root}/a", os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
        atomic.write_all(fs, fd, "a", b"0123456789", 2)
        buffer = bytearray(20)
        assert fs.pread_into(fd, buffer, 100) == 0
        assert 0 < fs.pread_into(fd, memoryview(buffer)[5:], 1) <= 11
        assert buffer[5:8] == b"\x0001"
        assert fs.stat_open(fd).nbytes == 12
        fs.truncate(fd, 4)
        fs.truncate(fd, 6)
        fs.fsync(fd)
    assert get(fs, f"{root}/a") == b"\0\x0001\0\0"
    found = fs.stat(f"{root}/a")
    assert (found.nbytes, found.is_dir) == (6, False)


def test_allocate_keeps_content_and_extends(fs: FileSystem, root: str) -> None:
    put(fs, f"{root}/a", b"abc")
    with opened(fs, f"{root}/a", os.O_RDWR) as fd:
        assert fs.allocate(fd, 0)
        if fs.allocate(fd, 5000):
            assert fs.stat_open(fd).nbytes == 5000
            assert fs.allocate(fd, 100)
            assert fs.stat_open(fd).nbytes == 5000
    assert get(fs, f"{root}/a")[:3] == b"abc"


def test_errors_name_what_failed(fs: FileSystem, root: str) -> None:
    fs.mkdir(f"{root}/d")
    put(fs, f"{root}/f", b"x")
    put(fs, f"{root}/d/f", b"x")
    gone = f"{root}/gone"
    assert code_of(lambda: fs.open(gone, os.O_RDONLY)) == errno.ENOENT
    assert code_of(lambda: fs.open(f"{gone}/x", os.O_WRONLY | os.O_CREAT)) == errno.ENOENT
    assert code_of(lambda: fs.open(f"{root}/f", os.O_WRONLY | os.O_CREAT | os.O_EXCL)) == errno.EEXIST
    assert code_of(lambda: fs.open(f"{root}/d", os.O_WRONLY)) == errno.EISDIR
    assert code_of(lambda: fs.open(f"{root}/f/x", os.O_RDONLY)) == errno.ENOTDIR
    assert code_of(lambda: fs.stat(gone)) == errno.ENOENT
    assert code_of(lambda: fs.listdir(gone)) == errno.ENOENT
    assert code_of(lambda: fs.listdir(f"{root}/f")) == errno.ENOTDIR
    assert code_of(lambda: fs.mkdir(f"{root}/d")) == errno.EEXIST
    assert code_of(lambda: fs.rmdir(f"{root}/d")) == errno.ENOTEMPTY
    assert code_of(lambda: fs.rmdir(f"{root}/f")) == errno.ENOTDIR
    assert code_of(lambda: fs.unlink(f"{root}/d")) == errno.EISDIR
    assert code_of(lambda: fs.unlink(gone)) == errno.ENOENT
    assert code_of(lambda: fs.rename(gone, f"{root}/x")) == errno.ENOENT
    assert code_of(lambda: fs.rename(f"{root}/f", f"{root}/d")) == errno.EISDIR
    assert code_of(lambda: fs.rename(f"{root}/d", f"{root}/f")) == errno.ENOTDIR
    assert code_of(lambda: fs.sync_directory(gone)) == errno.ENOENT
    assert code_of(lambda: fs.close(9999)) == errno.EBADF
    with opened(fs, f"{root}/f", os.O_RDONLY) as fd:
        assert code_of(lambda: fs.pwrite(fd, b"x", 0)) == errno.EBADF


def test_rename_replaces_a_file_and_an_empty_directory(fs: FileSystem, root: str) -> None:
    put(fs, f"{root}/a", b"new")
    put(fs, f"{root}/b", b"old")
    fs.rename(f"{root}/a", f"{root}/b")
    assert get(fs, f"{root}/b") == b"new"
    for name in ("d", "e"):
        fs.mkdir(f"{root}/{name}")
    put(fs, f"{root}/d/f", b"inside")
    fs.rename(f"{root}/d", f"{root}/e")
    assert fs.listdir(root) == ["b", "e"]
    assert get(fs, f"{root}/e/f") == b"inside"
    fs.mkdir(f"{root}/d")
    assert code_of(lambda: fs.rename(f"{root}/d", f"{root}/e")) in (errno.ENOTEMPTY, errno.EEXIST)


def test_rename_flags_work_or_are_refused(fs: FileSystem, root: str) -> None:
    put(fs, f"{root}/a", b"a")
    fs.mkdir(f"{root}/d")
    try:
        fs.exchange(f"{root}/a", f"{root}/d")
    except UnsupportedOperation:
        with pytest.raises(UnsupportedOperation):
            fs.rename_noreplace(f"{root}/a", f"{root}/x")
        assert fs.listdir(root) == ["a", "d"]
        return
    assert fs.stat(f"{root}/a").is_dir
    assert code_of(lambda: fs.rename_noreplace(f"{root}/a", f"{root}/d")) == errno.EEXIST
    assert code_of(lambda: fs.exchange(f"{root}/a", f"{root}/gone")) == errno.ENOENT
    fs.rename_noreplace(f"{root}/d", f"{root}/x")
    assert get(fs, f"{root}/x") == b"a"


def test_links_share_one_file(fs: FileSystem, root: str) -> None:
    put(fs, f"{root}/a", b"a")
    put(fs, f"{root}/c", b"c")
    if isinstance(fs, MemoryFileSystem) and not fs.links:
        assert code_of(lambda: fs.link(f"{root}/a", f"{root}/b")) == errno.EPERM
        return
    fs.link(f"{root}/a", f"{root}/b")
    first, second = fs.stat(f"{root}/a"), fs.stat(f"{root}/b")
    assert (first.device, first.inode) == (second.device, second.inode)
    assert code_of(lambda: fs.link(f"{root}/a", f"{root}/c")) == errno.EEXIST
    fs.rename(f"{root}/a", f"{root}/b")  # two names of one file: POSIX does nothing
    assert fs.listdir(root) == ["a", "b", "c"]
    fs.unlink(f"{root}/a")
    assert get(fs, f"{root}/b") == b"a"


def test_an_open_file_outlives_its_name(fs: FileSystem, root: str) -> None:
    put(fs, f"{root}/a", b"abc")
    with opened(fs, f"{root}/a", os.O_RDONLY) as fd:
        fs.unlink(f"{root}/a")
        fs.sync_directory(root)
        buffer = bytearray(3)
        assert fs.pread_into(fd, buffer, 0) > 0
        assert buffer[:1] == b"a"


def test_modes_are_exact_and_directories_keep_setgid(fs: FileSystem, root: str) -> None:
    atomic.write_file(fs, f"{root}/a", b"", mode=0o666)
    assert fs.stat(f"{root}/a").mode == 0o666
    fs.mkdir(f"{root}/d")
    with opened(fs, f"{root}/d", os.O_RDONLY | os.O_DIRECTORY) as fd:
        fs.chmod_open(fd, 0o2750)
        fs.chmod_open(fd, 0o770)
    assert fs.stat(f"{root}/d").mode == 0o2770


def test_free_space_is_known(fs: FileSystem, root: str) -> None:
    assert fs.free_nbytes(root) > 0


def test_move_new_moves_or_refuses(fs: FileSystem, root: str) -> None:
    put(fs, f"{root}/a", b"a")
    put(fs, f"{root}/taken", b"t")
    fs.mkdir(f"{root}/d")
    put(fs, f"{root}/d/x", b"x")
    fs.mkdir(f"{root}/empty")
    for src in ("a", "d"):
        for dst in ("taken", "empty"):
            with pytest.raises(CheckpointExistsError, match=dst):
                atomic.move_new(fs, f"{root}/{src}", f"{root}/{dst}")
    atomic.move_new(fs, f"{root}/a", f"{root}/b")
    atomic.move_new(fs, f"{root}/d", f"{root}/e")
    assert fs.listdir(root) == ["b", "e", "empty", "taken"]
    assert get(fs, f"{root}/b") == b"a"
    assert get(fs, f"{root}/e/x") == b"x"
    assert get(fs, f"{root}/taken") == b"t"
    assert code_of(lambda: atomic.move_new(fs, f"{root}/gone", f"{root}/f")) == errno.ENOENT


def test_move_new_finishes_after_a_crash_between_link_and_unlink(fs: FileSystem, root: str) -> None:
    put(fs, f"{root}/a", b"a")
    try:
        fs.link(f"{root}/a", f"{root}/b")
    except StorageError:
        fs.rename(f"{root}/a", f"{root}/b")  # without links that state cannot arise
    else:
        atomic.move_new(fs, f"{root}/a", f"{root}/b")
    assert fs.listdir(root) == ["b"]


def test_swap_replaces_a_directory(fs: FileSystem, root: str) -> None:
    for name in ("new", "current"):
        fs.mkdir(f"{root}/{name}")
        put(fs, f"{root}/{name}/f", name.encode())
    atomic.swap(fs, f"{root}/new", f"{root}/current", f"{root}/old")
    assert fs.listdir(root) == ["current", "old"]
    assert get(fs, f"{root}/current/f") == b"new"
    assert get(fs, f"{root}/old/f") == b"current"
    fs.mkdir(f"{root}/new")
    with pytest.raises(CheckpointExistsError, match="old"):
        atomic.swap(fs, f"{root}/new", f"{root}/current", f"{root}/old")
    assert get(fs, f"{root}/current/f") == b"new"


def test_remove_tree_removes_everything_and_forgives_absence(fs: FileSystem, root: str) -> None:
    path = f"{root}/t"
    for level in range(40):
        fs.mkdir(path)
        put(fs, f"{path}/file-{level}", b"x")
        path += "/d"
    put(fs, f"{root}/single", b"x")
    atomic.remove_tree(fs, f"{root}/t")
    atomic.remove_tree(fs, f"{root}/single")
    atomic.remove_tree(fs, f"{root}/gone")
    assert fs.listdir(root) == []


def test_replace_file_leaves_no_other_name(fs: FileSystem, root: str) -> None:
    atomic.replace_file(fs, f"{root}/a", [b"one ", b"", memoryview(b"two")])
    atomic.replace_file(fs, f"{root}/a", b"three", mode=0o640)
    assert get(fs, f"{root}/a") == b"three"
    assert fs.stat(f"{root}/a").mode == 0o640
    assert fs.listdir(root) == ["a"]


def test_try_stat_tells_absent_from_unknown(fs: FileSystem, root: str) -> None:
    put(fs, f"{root}/a", b"x")
    assert try_stat(fs, f"{root}/a") == fs.stat(f"{root}/a")
    assert try_stat(fs, f"{root}/gone") is None
    assert try_stat(fs, f"{root}/a/x") is None
    if isinstance(fs, MemoryFileSystem):
        fs.deny(f"{root}/a")
        assert code_of(lambda: try_stat(fs, f"{root}/a")) == errno.EACCES


def test_no_space_is_its_own_error() -> None:
    fs = MemoryFileSystem(capacity_nbytes=10)
    with pytest.raises(NoSpaceError):
        atomic.write_file(fs, "/a", b"x" * 11)
    assert fs.listdir("/") == []
    atomic.write_file(fs, "/a", b"x" * 10)
    assert fs.free_nbytes("/") == 0
