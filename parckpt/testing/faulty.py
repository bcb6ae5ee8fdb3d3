"""A file system that fails at its n-th call, or dies right after it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from parckpt.errors import StorageError
from parckpt.storage.filesystem import Bytes, FileStat, FileSystem, storage_error

__all__ = ["Call", "FaultyFileSystem", "SimulatedCrash"]

T = TypeVar("T")


class SimulatedCrash(BaseException):  # not an Exception: nothing may handle it, as nothing handles SIGKILL
    """The process that used the file system is dead; so is everything it tries afterwards."""


@dataclass(frozen=True)
class Call:
    """One call of a `FileSystem` method; ``number`` counts from 1."""

    number: int
    operation: str
    path: str


class FaultyFileSystem:
    """Passes calls on to another file system, counts them, and misbehaves where told. Thread-safe.

    Parameters
    ----------
    inner : FileSystem
        Where the calls go.
    fail_at : int, optional
        Number of the call, from 1, that fails instead of taking effect. A failing ``close`` does close; a failing
        ``fsync`` loses what was not synced, where ``inner`` can model that.
    error : int
        The errno it fails with.
    crash_at : int, optional
        Number of the call after which the process is dead: it takes effect, then it and every later call raise
        `SimulatedCrash`. 0 means that the process dies before its first call.
    only : collection of str, optional
        Count only these operations; the others pass.
    max_transfer_nbytes : int, optional
        ``pwrite`` and ``pread_into`` move at most this many bytes a call.
    on_call : callable, optional
        Called before each counted call, outside any lock: to let somebody else act between two calls.

    Attributes
    ----------
    calls : list of Call
        What was called, in order.
    failed : Call or None
        The call that was failed or died at. None: the run ended first.
    """

    def __init__(
        self,
        inner: FileSystem,
        fail_at: int | None = None,
        error: int = errno.EIO,
        *,
        crash_at: int | None = None,
        only: frozenset[str] | None = None,
        max_transfer_nbytes: int | None = None,
        on_call: Callable[[Call], None] | None = None,
    ) -> None:
        self.inner = inner
        self.calls: list[Call] = []
        self.failed: Call | None = None
        self._fail_at, self._error, self._crash_at, self._only = fail_at, error, crash_at, only
        self._max_transfer_nbytes, self._on_call = max_transfer_nbytes, on_call
        self._lock = threading.Lock()
        self._paths: dict[int, str] = {}
        self._dead = crash_at == 0

    @property
    def count(self) -> int:
        """Number of calls so far."""
        return len(self.calls)

    def arm(self, *, fail_after: int | None = None, crash_after: int | None = None) -> None:
        """Misbehave at a call counted from now, instead of what was asked for before; without arguments, never."""
        with self._lock:
            now = len(self.calls)
            self._fail_at = None if fail_after is None else now + fail_after
            self._crash_at = None if crash_after is None else now + crash_after
            self.failed = None

    def _count(self, operation: str, path: str) -> Call | None:
        with self._lock:
            if self._dead:
                raise SimulatedCrash(operation)
            if self._only is not None and operation not in self._only:
                return None
            call = Call(len(self.calls) + 1, operation, path)
            self.calls.append(call)
        if self._on_call is not None:
            self._on_call(call)
        return call

    def _call(
        self, operation: str, path: str, act: Callable[[], T], on_failure: Callable[[], object] | None = None
    ) -> T:
        call = self._count(operation, path)
        if call is not None and call.number == self._fail_at:
            self.failed = call
            if on_failure is not None:
                on_failure()
            raise storage_error(operation, path, self._error)
        if call is None or call.number != self._crash_at:
            return act()
        with self._lock:
            self._dead, self.failed = True, call
        try:
            act()
        except StorageError as error:
            raise SimulatedCrash(operation) from error
        raise SimulatedCrash(operation)

    def _path(self, fd: int) -> str:
        return self._paths.get(fd, f"<descriptor {fd}>")

    def _lose_unsynced(self, fd: int) -> None:
        lose = getattr(self.inner, "lose_unsynced", None)
        if lose is not None:
            lose(fd)

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        fd = self._call("open", path, lambda: self.inner.open(path, flags, mode))
        self._paths[fd] = path
        return fd

    def close(self, fd: int) -> None:
        self._call("close", self._path(fd), lambda: self.inner.close(fd), lambda: self.inner.close(fd))

    def pwrite(self, fd: int, data: Bytes, byte_offset: int) -> int:
        part = memoryview(data)[: self._max_transfer_nbytes]
        return self._call("pwrite", self._path(fd), lambda: self.inner.pwrite(fd, part, byte_offset))

    def pread_into(self, fd: int, buffer: bytearray | memoryview, byte_offset: int) -> int:
        part = memoryview(buffer)[: self._max_transfer_nbytes]
        return self._call("pread_into", self._path(fd), lambda: self.inner.pread_into(fd, part, byte_offset))

    def fsync(self, fd: int) -> None:
        self._call("fsync", self._path(fd), lambda: self.inner.fsync(fd), lambda: self._lose_unsynced(fd))

    def truncate(self, fd: int, nbytes: int) -> None:
        self._call("truncate", self._path(fd), lambda: self.inner.truncate(fd, nbytes))

    def allocate(self, fd: int, nbytes: int) -> bool:
        return self._call("allocate", self._path(fd), lambda: self.inner.allocate(fd, nbytes))

    def chmod_open(self, fd: int, mode: int) -> None:
        self._call("chmod_open", self._path(fd), lambda: self.inner.chmod_open(fd, mode))

    def stat(self, path: str) -> FileStat:
        return self._call("stat", path, lambda: self.inner.stat(path))

    def stat_open(self, fd: int) -> FileStat:
        return self._call("stat_open", self._path(fd), lambda: self.inner.stat_open(fd))

    def listdir(self, path: str) -> list[str]:
        return self._call("listdir", path, lambda: self.inner.listdir(path))

    def mkdir(self, path: str, mode: int = 0o700) -> None:
        self._call("mkdir", path, lambda: self.inner.mkdir(path, mode))

    def rmdir(self, path: str) -> None:
        self._call("rmdir", path, lambda: self.inner.rmdir(path))

    def unlink(self, path: str) -> None:
        self._call("unlink", path, lambda: self.inner.unlink(path))

    def link(self, src: str, dst: str) -> None:
        self._call("link", src, lambda: self.inner.link(src, dst))

    def rename(self, src: str, dst: str) -> None:
        self._call("rename", src, lambda: self.inner.rename(src, dst))

    def rename_noreplace(self, src: str, dst: str) -> None:
        self._call("rename_noreplace", src, lambda: self.inner.rename_noreplace(src, dst))

    def exchange(self, a: str, b: str) -> None:
        self._call("exchange", a, lambda: self.inner.exchange(a, b))

    def sync_directory(self, path: str) -> None:
        self._call("sync_directory", path, lambda: self.inner.sync_directory(path))

    def free_nbytes(self, path: str) -> int:
        return self._call("free_nbytes", path, lambda: self.inner.free_nbytes(path))
