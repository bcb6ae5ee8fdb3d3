"""What the real file system says is translated once, and signals do not break calls."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from parckpt.errors import NoSpaceError, StorageError, SyncError
from parckpt.storage import linux
from parckpt.storage.filesystem import PosixFileSystem, UnsupportedOperation, opened, storage_error

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("operation", "code", "cls"),
    [
        ("pwrite", errno.EIO, StorageError),
        ("pwrite", errno.ENOSPC, NoSpaceError),
        ("allocate", errno.EDQUOT, NoSpaceError),
        ("close", errno.EDQUOT, NoSpaceError),
        ("fsync", errno.EIO, SyncError),
        ("fsync", errno.ENOSPC, SyncError),
        ("sync_directory", errno.EIO, SyncError),
    ],
)
def test_classes_by_what_can_be_done(operation: str, code: int, cls: type[StorageError]) -> None:
    error = storage_error(operation, "/a/b", code)
    assert type(error) is cls
    assert (error.errno, error.facts["operation"], error.facts["path"]) == (code, operation, "/a/b")
    assert str(error) == f"{operation} '/a/b': {os.strerror(code)}"
    assert isinstance(error, OSError)


def test_both_paths_of_a_rename_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"rename '.*gone' -> '.*x': No such file") as caught:
        PosixFileSystem().rename(str(tmp_path / "gone"), str(tmp_path / "x"))
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_descriptor_is_named_by_its_path(tmp_path: Path) -> None:
    fs = PosixFileSystem()
    path = str(tmp_path / "a")
    with opened(fs, path, os.O_WRONLY | os.O_CREAT) as fd, pytest.raises(StorageError) as caught:
        fs.pread_into(fd, bytearray(1), 0)
    assert (caught.value.errno, caught.value.facts["path"]) == (errno.EBADF, path)
    with pytest.raises(StorageError, match="descriptor"):
        fs.fsync(fd)


def test_a_directory_that_cannot_be_opened_is_no_failed_sync(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        PosixFileSystem().sync_directory(str(tmp_path / "gone"))
    assert not isinstance(caught.value, SyncError)
    PosixFileSystem().sync_directory(str(tmp_path))


def test_an_error_of_close_counts_unless_the_block_had_failed(tmp_path: Path) -> None:
    fs = PosixFileSystem()

    def use(fail: bool) -> None:
        with opened(fs, str(tmp_path / "a"), os.O_WRONLY | os.O_CREAT) as fd:
            os.close(fd)  # so that closing again fails
            if fail:
                raise KeyError("first")

    with pytest.raises(StorageError, match="close"):
        use(fail=False)
    with pytest.raises(KeyError, match="first"):
        use(fail=True)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_refused_calls_are_told_from_failed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fs = PosixFileSystem()

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(linux, "renameat2", refuse)
    monkeypatch.setattr(linux, "fallocate", refuse)
    with pytest.raises(UnsupportedOperation, match="refused"):
        fs.exchange(str(tmp_path / "a"), str(tmp_path / "b"))
    with opened(fs, str(tmp_path / "a"), os.O_WRONLY | os.O_CREAT) as fd:
        assert not fs.allocate(fd, 10)
        assert fs.stat_open(fd).nbytes == 0


def test_system_calls_of_ours_go_on_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [errno.EINTR, errno.EINTR, 0]
    monkeypatch.setattr(linux.ctypes, "get_errno", lambda: answers.pop(0))
    monkeypatch.setattr(linux, "_fallocate", lambda *_: -1 if len(answers) > 1 else answers.pop(0))
    linux.fallocate(3, 10)
    assert answers == []


def test_a_c_library_without_the_call_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "_renameat2", None)
    with pytest.raises(UnsupportedOperation):
        PosixFileSystem().exchange("/a", "/b")


def test_fallocate_does_not_touch_what_another_writes(tmp_path: Path) -> None:
    fs = PosixFileSystem()
    path = str(tmp_path / "a")
    with opened(fs, path, os.O_RDWR | os.O_CREAT) as fd:
        start = threading.Barrier(2)

        def write() -> None:
            start.wait()
            for page in range(256):
                fs.pwrite(fd, b"\x55" * 4096, page * 4096)

        writer = threading.Thread(target=write)
        writer.start()
        start.wait()
        for nbytes in range(4096, 257 * 4096, 4096):
            fs.allocate(fd, nbytes)
        writer.join()
        content = bytearray(256 * 4096)
        assert fs.pread_into(fd, content, 0) == len(content)
    assert content == b"\x55" * len(content)


def test_unwritable_directories_are_a_permission_error(tmp_path: Path) -> None:
    fs = PosixFileSystem()
    with pytest.raises(StorageError) as caught:
        fs.mkdir("/proc/no-such-place")
    assert caught.value.errno in (errno.ENOENT, errno.EACCES, errno.EPERM)


def test_what_is_neither_a_file_nor_a_directory_is_not_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "pipe.ckpt")
    os.mkfifo(path)
    for place in (path, os.devnull):
        with pytest.raises(StorageError, match=f"open '{place}': neither a file nor a directory") as caught:
            PosixFileSystem().open(place, os.O_RDONLY)
        assert caught.value.errno == errno.EINVAL
