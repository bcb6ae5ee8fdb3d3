"""File systems for tests: one in memory that can lose power, and one that fails or dies at a chosen call."""

from __future__ import annotations

import errno
import os
import posixpath
import stat as stat_bits
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from parckpt.core.clock import Clock
from parckpt.storage.filesystem import Bytes, FileStat, UnsupportedOperation, storage_error
from parckpt.testing.faulty import Call, FaultyFileSystem, SimulatedCrash
from parckpt.testing.memory import PAGE_NBYTES, Disk, Inode

__all__ = ["Call", "FaultyFileSystem", "MemoryFileSystem", "SimulatedCrash"]

_O_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True)
class _Open:
    inode: Inode
    path: str
    flags: int

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY


class MemoryFileSystem:
    """A `FileSystem` in memory; see `parckpt.testing.memory` for what survives a crash. Thread-safe.

    Parameters
    ----------
    rename_flags, links : bool
        False: `rename_noreplace` and `exchange`, or `link`, are refused.
    direct : {"refused", "open-only", "works"}
        What O_DIRECT does: EINVAL at open, EINVAL at the first read or write, or nothing but alignment checks.
    capacity_nbytes : int or None
        Sum of all file sizes at which writing gives ENOSPC; may be changed at any time.
    clock : Clock, optional
        Gives ``mtime``; without one every change is one second later than the last.
    """

    def __init__(
        self,
        *,
        rename_flags: bool = True,
        links: bool = True,
        direct: Literal["refused", "open-only", "works"] = "refused",
        capacity_nbytes: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.capacity_nbytes = capacity_nbytes
        self.links = links
        self._rename_flags, self._direct, self._clock = rename_flags, direct, clock
        self._lock = threading.RLock()
        self._disk = Disk()
        self._open: dict[int, _Open] = {}
        self._next_fd = 3
        self._ticks = 0.0
        self._denied: dict[str, int] = {}

    # What tests do to it.

    def crash(self, seed: int = 0, keep: Literal["all", "none"] | None = None) -> MemoryFileSystem:
        """Return what a machine finds after a loss of power now; this object stays as it is.

        Parameters
        ----------
        seed : int
            Chooses what survives of all that was not synced.
        keep : {"all", "none"}, optional
            Instead: everything, or nothing that was not synced.
        """
        with self._lock:
            other = MemoryFileSystem(
                rename_flags=self._rename_flags,
                links=self.links,
                direct=self._direct,
                capacity_nbytes=self.capacity_nbytes,
                clock=self._clock,
            )
            other._disk = self._disk.after_crash(seed, keep)
            other._ticks = self._ticks
            return other

    def sync_all(self) -> None:
        """Make everything durable: the state a test starts from."""
        with self._lock:
            self._disk.sync_all()

    def deny(self, path: str, code: int = errno.EACCES) -> None:
        """Fail every later call that names ``path``, or anything in it."""
        with self._lock:
            self._denied[_normal(path)] = code

    def allow(self, path: str) -> None:
        """Undo `deny`."""
        with self._lock:
            self._denied.pop(_normal(path), None)

    def fail_read(self, path: str, byte_offset: int | None = None, code: int = errno.EIO) -> None:
        """Make one byte of a file unreadable, or (None) all of it, under whatever name it has later."""
        with self._lock:
            self._inode("fail_read", path).bad_bytes[-1 if byte_offset is None else byte_offset] = code

    def corrupt(self, path: str, byte_offset: int, bit: int = 0) -> None:
        """Flip one stored bit of a file: in memory and on disk."""
        with self._lock:
            inode = self._inode("corrupt", path)
            inode.data[byte_offset] ^= 1 << bit
            if byte_offset < len(inode.durable):
                inode.durable[byte_offset] ^= 1 << bit

    def lose_unsynced(self, fd: int) -> None:
        """Do to an open file what a failed fsync does: its dirty pages count as clean and are never stored."""
        with self._lock:
            self._opened("lose_unsynced", fd).inode.lose_dirty()

    @property
    def nopen(self) -> int:
        """Number of open descriptors."""
        with self._lock:
            return len(self._open)

    # Descriptors.

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        with self._lock:
            self._check("open", path)
            if flags & _O_DIRECT and self._direct == "refused":
                raise storage_error("open", path, errno.EINVAL)
            inode = self._open_inode(path, flags, mode)
            fd, self._next_fd = self._next_fd, self._next_fd + 1
            self._open[fd] = _Open(inode, path, flags)
            inode.nopen += 1
            return fd

    def _open_inode(self, path: str, flags: int, mode: int) -> Inode:
        parent, name = self._parent("open", path)
        number = Disk.ROOT if name == "" else parent.names.get(name)
        if number is None:
            if not flags & os.O_CREAT:
                raise storage_error("open", path, errno.ENOENT)
            inode = self._disk.new(False, mode, self._now())
            self._disk.change((parent.number, name, inode.number))
            return inode
        if flags & os.O_CREAT and flags & os.O_EXCL:
            raise storage_error("open", path, errno.EEXIST)
        inode = self._disk.inodes[number]
        if inode.is_dir and (flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_CREAT):
            raise storage_error("open", path, errno.EISDIR)
        if not inode.is_dir and flags & os.O_DIRECTORY:
            raise storage_error("open", path, errno.ENOTDIR)
        if flags & os.O_TRUNC and not inode.is_dir:
            inode.resize(0)
        return inode

    def close(self, fd: int) -> None:
        with self._lock:
            inode = self._opened("close", fd).inode
            del self._open[fd]
            inode.nopen -= 1
            self._disk.collect()

    def pwrite(self, fd: int, data: Bytes, byte_offset: int) -> int:
        with self._lock:
            opened = self._opened("pwrite", fd)
            if not opened.writable:
                raise storage_error("pwrite", opened.path, errno.EBADF)
            view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
            self._check_direct("pwrite", opened, view.nbytes, byte_offset)
            room = self._room_for(opened.inode, byte_offset + view.nbytes)
            if view.nbytes and room < byte_offset + view.nbytes:
                view = view[: max(0, room - byte_offset)]
                if not view.nbytes:
                    raise storage_error("pwrite", opened.path, errno.ENOSPC)
            if view.nbytes:
                opened.inode.write(view, byte_offset)
                opened.inode.mtime = self._now()
            return view.nbytes

    def pread_into(self, fd: int, buffer: bytearray | memoryview, byte_offset: int) -> int:
        with self._lock:
            opened = self._opened("pread_into", fd)
            if opened.inode.is_dir:
                raise storage_error("pread_into", opened.path, errno.EISDIR)
            if not opened.readable:
                raise storage_error("pread_into", opened.path, errno.EBADF)
            view = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(bytearray())
            self._check_direct("pread_into", opened, view.nbytes, byte_offset)
            for bad, code in opened.inode.bad_bytes.items():
                if bad == -1 or byte_offset <= bad < byte_offset + view.nbytes:
                    raise storage_error("pread_into", opened.path, code)
            found = opened.inode.data[byte_offset : byte_offset + view.nbytes]
            view[: len(found)] = found
            return len(found)

    def _check_direct(self, operation: str, opened: _Open, nbytes: int, byte_offset: int) -> None:
        misaligned = nbytes % PAGE_NBYTES or byte_offset % PAGE_NBYTES
        if opened.flags & _O_DIRECT and (self._direct == "open-only" or misaligned):
            raise storage_error(operation, opened.path, errno.EINVAL)

    def fsync(self, fd: int) -> None:
        with self._lock:
            inode = self._opened("fsync", fd).inode
            if inode.is_dir:
                self._disk.sync_names(inode.number)
            else:
                inode.sync()

    def truncate(self, fd: int, nbytes: int) -> None:
        with self._lock:
            opened = self._opened("truncate", fd)
            if not opened.writable:
                raise storage_error("truncate", opened.path, errno.EINVAL)
            if self._room_for(opened.inode, nbytes) < nbytes:
                raise storage_error("truncate", opened.path, errno.ENOSPC)
            opened.inode.resize(nbytes)
            opened.inode.mtime = self._now()

    def allocate(self, fd: int, nbytes: int) -> bool:
        with self._lock:
            opened = self._opened("allocate", fd)
            if not opened.writable:
                raise storage_error("allocate", opened.path, errno.EBADF)
            if self._room_for(opened.inode, nbytes) < nbytes:
                raise storage_error("allocate", opened.path, errno.ENOSPC)
            if nbytes > len(opened.inode.data):
                opened.inode.resize(nbytes)
            return True

    def chmod_open(self, fd: int, mode: int) -> None:
        with self._lock:
            inode = self._opened("chmod_open", fd).inode
            inode.mode = mode | (inode.mode & stat_bits.S_ISGID if inode.is_dir else 0)

    # Names.

    def stat(self, path: str) -> FileStat:
        with self._lock:
            return self._stat(self._inode("stat", path))

    def stat_open(self, fd: int) -> FileStat:
        with self._lock:
            return self._stat(self._opened("stat_open", fd).inode)

    def listdir(self, path: str) -> list[str]:
        with self._lock:
            inode = self._inode("listdir", path)
            if not inode.is_dir:
                raise storage_error("listdir", path, errno.ENOTDIR)
            return sorted(inode.names)

    def mkdir(self, path: str, mode: int = 0o700) -> None:
        with self._changing("mkdir", path) as (parent, name):
            if name in parent.names or not name:
                raise storage_error("mkdir", path, errno.EEXIST)
            inode = self._disk.new(True, mode | (parent.mode & stat_bits.S_ISGID), self._now())
            self._disk.change((parent.number, name, inode.number))

    def rmdir(self, path: str) -> None:
        with self._changing("rmdir", path) as (parent, name):
            inode = self._inode("rmdir", path)
            if not inode.is_dir:
                raise storage_error("rmdir", path, errno.ENOTDIR)
            if inode.names:
                raise storage_error("rmdir", path, errno.ENOTEMPTY)
            self._disk.change((parent.number, name, None))

    def unlink(self, path: str) -> None:
        with self._changing("unlink", path) as (parent, name):
            if self._inode("unlink", path).is_dir:
                raise storage_error("unlink", path, errno.EISDIR)
            self._disk.change((parent.number, name, None))

    def link(self, src: str, dst: str) -> None:
        with self._changing("link", dst) as (parent, name):
            inode = self._inode("link", src)
            if inode.is_dir or not self.links:
                raise storage_error("link", src, errno.EPERM, dst)
            if name in parent.names:
                raise storage_error("link", src, errno.EEXIST, dst)
            self._disk.change((parent.number, name, inode.number))

    def rename(self, src: str, dst: str) -> None:
        with self._changing("rename", src) as source, self._changing("rename", dst) as target:
            inode = self._inode("rename", src)
            number = target[0].names.get(target[1])
            if number == inode.number:
                return
            if number is not None:
                self._check_replaceable(inode, self._disk.inodes[number], src, dst)
            self._check_not_below(inode, src, dst)
            self._disk.change((target[0].number, target[1], inode.number), (source[0].number, source[1], None))

    def rename_noreplace(self, src: str, dst: str) -> None:
        with self._changing("rename_noreplace", src) as source, self._changing("rename_noreplace", dst) as target:
            self._check_flags("rename_noreplace", src, dst)
            inode = self._inode("rename_noreplace", src)
            if target[1] in target[0].names:
                raise storage_error("rename_noreplace", src, errno.EEXIST, dst)
            self._check_not_below(inode, src, dst)
            self._disk.change((target[0].number, target[1], inode.number), (source[0].number, source[1], None))

    def exchange(self, a: str, b: str) -> None:
        with self._changing("exchange", a) as first, self._changing("exchange", b) as second:
            self._check_flags("exchange", a, b)
            here, there = self._inode("exchange", a), self._inode("exchange", b)
            self._disk.change((first[0].number, first[1], there.number), (second[0].number, second[1], here.number))

    def sync_directory(self, path: str) -> None:
        with self._lock:
            inode = self._inode("open", path)
            if not inode.is_dir:
                raise storage_error("open", path, errno.ENOTDIR)
            self._disk.sync_names(inode.number)

    def free_nbytes(self, path: str) -> int:
        with self._lock:
            self._inode("free_nbytes", path)
            return (
                (1 << 50)
                if self.capacity_nbytes is None
                else max(0, self.capacity_nbytes - self._disk.visible_nbytes())
            )

    # Below: called with the lock held.

    def _now(self) -> float:
        self._ticks += 1
        return self._ticks if self._clock is None else self._clock.wall()

    def _room_for(self, inode: Inode, nbytes: int) -> int:
        """Size that the file may have, at most ``nbytes``."""
        if self.capacity_nbytes is None or nbytes <= len(inode.data):
            return nbytes
        return min(nbytes, max(len(inode.data), self.capacity_nbytes - self._disk.visible_nbytes() + len(inode.data)))

    def _opened(self, operation: str, fd: int) -> _Open:
        found = self._open.get(fd)
        if found is None:
            raise storage_error(operation, f"<descriptor {fd}>", errno.EBADF)
        return found

    def _check(self, operation: str, path: str) -> None:
        where = _normal(path)
        while True:
            if where in self._denied:
                raise storage_error(operation, path, self._denied[where])
            if where == "/":
                return
            where = posixpath.dirname(where)

    def _check_flags(self, operation: str, src: str, dst: str) -> None:
        if not self._rename_flags:
            message = f"{operation} {src!r} -> {dst!r}: refused by this file system"
            raise UnsupportedOperation(message, errno=errno.EINVAL, operation=operation, path=src)

    def _parent(self, operation: str, path: str) -> tuple[Inode, str]:
        *parts, name = _normal(path)[1:].split("/")
        inode = self._disk.inodes[Disk.ROOT]
        for part in parts:
            number = inode.names.get(part)
            if number is None:
                raise storage_error(operation, path, errno.ENOENT)
            inode = self._disk.inodes[number]
            if not inode.is_dir:
                raise storage_error(operation, path, errno.ENOTDIR)
        return inode, name

    def _inode(self, operation: str, path: str) -> Inode:
        self._check(operation, path)
        parent, name = self._parent(operation, path)
        number = Disk.ROOT if name == "" else parent.names.get(name)
        if number is None:
            raise storage_error(operation, path, errno.ENOENT)
        return self._disk.inodes[number]

    @contextmanager
    def _changing(self, operation: str, path: str) -> Iterator[tuple[Inode, str]]:
        """Hold the lock and give the directory and the name that are about to change."""
        with self._lock:
            self._check(operation, path)
            yield self._parent(operation, path)

    def _check_replaceable(self, inode: Inode, target: Inode, src: str, dst: str) -> None:
        if inode.is_dir != target.is_dir:
            raise storage_error("rename", src, errno.EISDIR if target.is_dir else errno.ENOTDIR, dst)
        if target.is_dir and target.names:
            raise storage_error("rename", src, errno.ENOTEMPTY, dst)

    def _check_not_below(self, inode: Inode, src: str, dst: str) -> None:
        if inode.is_dir and _normal(dst).startswith(_normal(src) + "/"):
            raise storage_error("rename", src, errno.EINVAL, dst)

    def _stat(self, inode: Inode) -> FileStat:
        return FileStat(len(inode.data), inode.mtime, inode.is_dir, inode.mode, id(self._disk), inode.number)


def _normal(path: str) -> str:
    return posixpath.normpath("/" + path.lstrip("/"))
