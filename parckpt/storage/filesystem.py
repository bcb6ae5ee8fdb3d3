"""The small set of file system calls everything else is built on, and their POSIX form.

This is the seam where tests inject faults, and the one place where OSError becomes a parckpt error.
"""

from __future__ import annotations

import errno
import os
import stat as stat_bits
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from parckpt.errors import NoSpaceError, StorageError, SyncError
from parckpt.storage import linux

__all__ = [
    "Bytes",
    "FileStat",
    "FileSystem",
    "PosixFileSystem",
    "UnsupportedOperation",
    "opened",
    "storage_error",
    "try_stat",
]

Bytes: TypeAlias = bytes | bytearray | memoryview
"""What can be written: C-contiguous; nothing keeps a reference after the call."""

SYNC_OPERATIONS = frozenset({"fsync", "sync_directory"})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


class UnsupportedOperation(StorageError):  # noqa: N818  # as io.UnsupportedOperation: a fact, often handled
    """The file system, the kernel or the C library has no such call; take the other way."""

    code = "unsupported"


@dataclass(frozen=True)
class FileStat:
    """What is known about one path.

    Attributes
    ----------
    nbytes : int
        Length of a file; meaningless for directories.
    mtime : float
        Seconds since the epoch of the last change of content, by the clock of the file system.
    is_dir : bool
    mode : int
        Permission bits, setgid included.
    device, inode : int
        Two paths with both equal are one file.
    """

    nbytes: int
    mtime: float
    is_dir: bool
    mode: int
    device: int
    inode: int


class FileSystem(Protocol):
    """File system calls, none of them collective, all of them usable from several threads.

    Every method raises `StorageError` with the facts ``operation`` and ``path`` and with ``errno``; `NoSpaceError`
    for a full disk or an exhausted quota; `SyncError` for a failed sync; `UnsupportedOperation` where said. Descriptors
    are small integers that only the same object understands.
    """

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """Open as open(2): ``mode`` is narrowed by the umask (see `chmod_open`)."""
        ...

    def close(self, fd: int) -> None:
        """Close; the descriptor is gone even if this raises."""
        ...

    def pwrite(self, fd: int, data: Bytes, byte_offset: int) -> int:
        """Write some of ``data``, perhaps not all; return how many bytes."""
        ...

    def pread_into(self, fd: int, buffer: bytearray | memoryview, byte_offset: int) -> int:
        """Read some bytes into the start of ``buffer``; return how many, 0 at the end of the file."""
        ...

    def fsync(self, fd: int) -> None:
        """Make content and size of the open file durable; not its name. Never repeat it after a `SyncError`."""
        ...

    def truncate(self, fd: int, nbytes: int) -> None:
        """Cut or extend the open file to ``nbytes``; new bytes are zero."""
        ...

    def allocate(self, fd: int, nbytes: int) -> bool:
        """Reserve space for ``nbytes`` and make the file at least as long; False where there is no such call."""
        ...

    def chmod_open(self, fd: int, mode: int) -> None:
        """Set the permission bits exactly, whatever the umask; a directory keeps its setgid bit."""
        ...

    def stat(self, path: str) -> FileStat:
        """Describe ``path``, following symbolic links."""
        ...

    def stat_open(self, fd: int) -> FileStat:
        """Describe an open file."""
        ...

    def listdir(self, path: str) -> list[str]:
        """Names in a directory, sorted."""
        ...

    def mkdir(self, path: str, mode: int = 0o700) -> None:
        """Make one directory; ``mode`` is narrowed by the umask."""
        ...

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        ...

    def unlink(self, path: str) -> None:
        """Remove the name of a file."""
        ...

    def link(self, src: str, dst: str) -> None:
        """Give a file a second name; EEXIST if ``dst`` is taken."""
        ...

    def rename(self, src: str, dst: str) -> None:
        """Rename; a file at ``dst``, or an empty directory, is replaced in the same act."""
        ...

    def rename_noreplace(self, src: str, dst: str) -> None:
        """Rename; EEXIST if ``dst`` is taken. `UnsupportedOperation` where rename flags are refused (Lustre, NFS)."""
        ...

    def exchange(self, a: str, b: str) -> None:
        """Swap two names in one act. `UnsupportedOperation` where rename flags are refused."""
        ...

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable."""
        ...

    def free_nbytes(self, path: str) -> int:
        """Bytes that an ordinary user can still write on the file system of ``path``."""
        ...


def storage_error(operation: str, path: str, code: int, other: str | None = None) -> StorageError:
    """Make the error for system error ``code``; ``other`` is the second path of a two-path operation."""
    where = f"{path!r} -> {other!r}" if other is not None else repr(path)
    cls = StorageError
    if operation in SYNC_OPERATIONS:
        # Whatever the reason, also a full disk: after a failed sync the written pages must be taken for lost.
        cls = SyncError
    elif code in _NO_SPACE:
        cls = NoSpaceError
    return cls(f"{operation} {where}: {os.strerror(code)}", errno=code, operation=operation, path=path)


@contextmanager
def opened(fs: FileSystem, path: str, flags: int, mode: int = 0o600) -> Iterator[int]:
    """Open for the length of a block. An error of `close` counts unless the block had failed already."""
    fd = fs.open(path, flags, mode)
    finished = False
    try:
        yield fd
        finished = True
    finally:
        if finished:
            fs.close(fd)
        else:
            with suppress(StorageError):
                fs.close(fd)


def try_stat(fs: FileSystem, path: str) -> FileStat | None:
    """Describe ``path``, or None if nothing is there. Any other error is raised: unknown is not absent."""
    try:
        return fs.stat(path)
    except StorageError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


@contextmanager
def _translated(operation: str, path: str, other: str | None = None) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(operation, path, error.errno or errno.EIO, other) from error


class PosixFileSystem:
    """The real file system.

    Parameters
    ----------
    rename_flags : bool
        False behaves as where rename flags are refused, so that tests can take that way on any disk.
    """

    def __init__(self, *, rename_flags: bool = True) -> None:
        self._rename_flags = rename_flags
        self._paths: dict[int, str] = {}  # of open descriptors, for messages

    def _path(self, fd: int) -> str:
        return self._paths.get(fd, f"<descriptor {fd}>")

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        with _translated("open", path):
            try:
                fd = os.open(path, flags | os.O_NONBLOCK, mode)  # not to wait for somebody who writes into a pipe
            except BlockingIOError:  # a lease on the file is called back (NFS servers): that takes a moment
                fd = os.open(path, flags, mode)
            kind = os.fstat(fd).st_mode
            if not (stat_bits.S_ISREG(kind) or stat_bits.S_ISDIR(kind)):
                os.close(fd)
                raise StorageError(f"open {path!r}: neither a file nor a directory", errno=errno.EINVAL, path=path)
        self._paths[fd] = path
        return fd

    def close(self, fd: int) -> None:
        # Forgotten first: as soon as it is closed, another thread may get the same number.
        path = self._paths.pop(fd, f"<descriptor {fd}>")
        with _translated("close", path):
            os.close(fd)

    def pwrite(self, fd: int, data: Bytes, byte_offset: int) -> int:
        with _translated("pwrite", self._path(fd)):
            return os.pwrite(fd, data, byte_offset)

    def pread_into(self, fd: int, buffer: bytearray | memoryview, byte_offset: int) -> int:
        with _translated("pread_into", self._path(fd)):
            return os.preadv(fd, [buffer], byte_offset)

    def fsync(self, fd: int) -> None:
        with _translated("fsync", self._path(fd)):
            os.fsync(fd)

    def truncate(self, fd: int, nbytes: int) -> None:
        with _translated("truncate", self._path(fd)):
            os.ftruncate(fd, nbytes)

    def allocate(self, fd: int, nbytes: int) -> bool:
        if nbytes == 0:  # fallocate(2) refuses 0
            return True
        with _translated("allocate", self._path(fd)):
            try:
                linux.fallocate(fd, nbytes)
            except OSError as error:
                if error.errno in _REFUSED:
                    return False
                raise
        return True

    def chmod_open(self, fd: int, mode: int) -> None:
        with _translated("chmod_open", self._path(fd)):
            found = os.fstat(fd).st_mode
            if stat_bits.S_ISDIR(found):
                mode |= found & stat_bits.S_ISGID
            # Not called for nothing: it rewrites the mask of an ACL, and some mounts refuse it.
            if stat_bits.S_IMODE(found) != mode:
                os.fchmod(fd, mode)

    def stat(self, path: str) -> FileStat:
        with _translated("stat", path):
            return _file_stat(os.stat(path))

    def stat_open(self, fd: int) -> FileStat:
        with _translated("stat_open", self._path(fd)):
            return _file_stat(os.fstat(fd))

    def listdir(self, path: str) -> list[str]:
        with _translated("listdir", path):
            return sorted(os.listdir(path))

    def mkdir(self, path: str, mode: int = 0o700) -> None:
        with _translated("mkdir", path):
            os.mkdir(path, mode)

    def rmdir(self, path: str) -> None:
        with _translated("rmdir", path):
            os.rmdir(path)

    def unlink(self, path: str) -> None:
        with _translated("unlink", path):
            os.unlink(path)

    def link(self, src: str, dst: str) -> None:
        with _translated("link", src, dst):
            os.link(src, dst)

    def rename(self, src: str, dst: str) -> None:
        with _translated("rename", src, dst):
            os.rename(src, dst)

    def rename_noreplace(self, src: str, dst: str) -> None:
        self._rename_with("rename_noreplace", src, dst, linux.RENAME_NOREPLACE)

    def exchange(self, a: str, b: str) -> None:
        self._rename_with("exchange", a, b, linux.RENAME_EXCHANGE)

    def _rename_with(self, operation: str, src: str, dst: str, flags: int) -> None:
        with _translated(operation, src, dst):
            try:
                if not self._rename_flags:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                linux.renameat2(src, dst, flags)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                raise UnsupportedOperation(
                    f"{operation} {src!r} -> {dst!r}: refused by this file system",
                    errno=error.errno,
                    operation=operation,
                    path=src,
                ) from error

    def sync_directory(self, path: str) -> None:
        with opened(self, path, os.O_RDONLY | os.O_DIRECTORY) as fd, _translated("sync_directory", path):
            try:
                os.fsync(fd)
            except OSError as error:
                # "This descriptor cannot be synced": a file system without such a notion, not a failed write.
                if error.errno != errno.EINVAL:
                    raise

    def free_nbytes(self, path: str) -> int:
        with _translated("free_nbytes", path):
            found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


def _file_stat(found: os.stat_result) -> FileStat:
    return FileStat(
        nbytes=found.st_size,
        mtime=found.st_mtime,
        is_dir=stat_bits.S_ISDIR(found.st_mode),
        mode=stat_bits.S_IMODE(found.st_mode),
        device=found.st_dev,
        inode=found.st_ino,
    )
