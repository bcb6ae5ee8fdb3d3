"""Files of tensor data: written past the page cache where the file system takes it, buffered where not.

Not collective, no communication. One thread may write while another fills the next buffer.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from contextlib import suppress
from types import TracebackType
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np

from parckpt.errors import CheckpointExistsError, StorageError, SyncError, TruncatedError
from parckpt.storage.atomic import write_all
from parckpt.storage.filesystem import Bytes, FileSystem

__all__ = ["ALIGNMENT", "InputFile", "OutputFile", "aligned_buffer"]

logger = logging.getLogger(__name__)

ALIGNMENT = 4096
"""Bytes to which O_DIRECT wants address, offset and length aligned: no disk or file system in use asks for more."""

_DIRECT_READ_MIN_NBYTES = 256 << 10  # below are headers, which are read again: the page cache serves them better
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})


def aligned_buffer(nbytes: int) -> memoryview:
    """Return a writable buffer of zeros that starts at a page boundary; freed with its last view."""
    # Private, not the default: shared memory costs a detour through tmpfs at each first touch.
    mapping = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memoryview(mapping)[:nbytes]


class _Refusals:
    """Devices that accepted O_DIRECT at open and refused it at the first transfer: asked once, then remembered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._devices: WeakKeyDictionary[FileSystem, set[int]] = WeakKeyDictionary()

    def remember(self, fs: FileSystem, device: int, path: str) -> None:
        with self._lock:
            devices = self._devices.setdefault(fs, set())
            if device in devices:
                return
            devices.add(device)
        logger.info("the file system of %s refuses direct I/O: going through the page cache", path)

    def known(self, fs: FileSystem, device: int) -> bool:
        with self._lock:
            return device in self._devices.get(fs, ())


_refusals = _Refusals()


class _DirectDescriptor:
    """A second descriptor of an open file, with O_DIRECT, for as long as that works."""

    def __init__(self, fs: FileSystem, path: str, flags: int, device: int, wanted: bool) -> None:
        self._fs, self._path, self._device = fs, path, device
        self._fd: int | None = None
        self._works = False
        if not wanted or not _O_DIRECT or _refusals.known(fs, device):
            return
        try:
            self._fd = fs.open(path, flags | _O_DIRECT)
            self._works = True
        except StorageError as error:
            if error.errno not in _REFUSED:
                raise
            _refusals.remember(fs, device, path)

    @property
    def fd(self) -> int | None:
        """The descriptor, or None once direct I/O was refused."""
        return self._fd if self._works else None

    def refuse(self, error: StorageError) -> None:
        """Take ``error`` of a transfer as "not here", or raise it."""
        if error.errno not in _REFUSED:
            raise error
        self._works = False
        _refusals.remember(self._fs, self._device, self._path)

    def close(self) -> None:
        """Close; does nothing the second time."""
        fd, self._fd, self._works = self._fd, None, False
        if fd is not None:
            self._fs.close(fd)


class OutputFile:
    """A new file of known size, written in pieces at any offsets, in any order.

    Parameters
    ----------
    fs : FileSystem
    path : str
        Must be free.
    nbytes : int
        Expected size; that much space is reserved at once, where the file system can.
    mode : int
        Permission bits, whatever the umask.
    direct : {"auto", False}
        "auto" writes aligned pieces past the page cache where that works.

    Raises
    ------
    CheckpointExistsError
        If the name is taken.
    NoSpaceError, StorageError
        The file is removed again.

    Notes
    -----
    `finish` is the only promise of durability, and only for the content: the caller syncs the directory.
    """

    def __init__(
        self, fs: FileSystem, path: str, nbytes: int, *, mode: int = 0o600, direct: Literal["auto", False] = "auto"
    ) -> None:
        self.path = path
        self._fs = fs
        self._failed: SyncError | None = None
        try:
            self._fd: int | None = fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except StorageError as error:
            if error.errno == errno.EEXIST:
                raise CheckpointExistsError(f"{path!r} exists already", path=path) from error
            raise
        try:
            fs.chmod_open(self._fd, mode)
            # Up to the page boundary: the last page may be written whole and cut in `finish`.
            fs.allocate(self._fd, -(-nbytes // ALIGNMENT) * ALIGNMENT)
            device = fs.stat_open(self._fd).device
            self._direct = _DirectDescriptor(fs, path, os.O_WRONLY, device, direct == "auto")
        except StorageError:
            with suppress(StorageError):
                fs.close(self._fd)
            with suppress(StorageError):
                fs.unlink(path)
            raise

    @property
    def is_direct(self) -> bool:
        """Whether the next aligned piece is going to bypass the page cache, as far as known."""
        return self._direct.fd is not None

    def write(self, buffer: Bytes, byte_offset: int) -> None:
        """Write all of ``buffer`` (C-contiguous) at ``byte_offset``. The view is not kept.

        Direct when address, offset and length are multiples of `ALIGNMENT`; so a tail may be padded to that, and
        `finish` cuts the padding off. Pieces written at the same time must not share a page.
        """
        fd = self._open_fd()
        view = memoryview(buffer)
        if view.nbytes == 0:
            return
        view = view.cast("B")
        done = 0
        direct = self._direct.fd
        if direct is not None and not (view.nbytes | byte_offset | _address(view)) % ALIGNMENT:
            done = self._write_direct(direct, view, byte_offset)
        if done < view.nbytes:
            write_all(self._fs, fd, self.path, view[done:], byte_offset + done)

    def _write_direct(self, fd: int, view: memoryview, byte_offset: int) -> int:
        """Write whole pages for as long as that works; return how many bytes are done."""
        done = 0
        while done < view.nbytes:
            try:
                count = self._fs.pwrite(fd, view[done:], byte_offset + done)
            except StorageError as error:
                self._direct.refuse(error)
                return done
            done += count
            # After a short write the rest may start inside a page: that is for the page cache.
            if count <= 0 or done % ALIGNMENT:
                return done
        return done

    def finish(self, nbytes: int) -> None:
        """Cut the file to exactly ``nbytes`` and sync it.

        Raises
        ------
        SyncError
            The content must be taken for lost. Calling again raises the same error: a second sync could report success
            without the bytes being on disk.
        """
        fd = self._open_fd()
        self._fs.truncate(fd, nbytes)
        try:
            # One is enough: both descriptors belong to one inode, and this one, open from the start, sees every
            # error of writing back.
            self._fs.fsync(fd)
        except SyncError as error:
            self._failed = error
            raise

    def close(self) -> None:
        """Close both descriptors; an error of either is raised. Does nothing the second time."""
        fd, self._fd = self._fd, None
        try:
            self._direct.close()
        finally:
            if fd is not None:
                self._fs.close(fd)

    def discard(self) -> None:
        """Close and remove the file: it was not wanted after all."""
        with suppress(StorageError):
            self.close()
        self._fs.unlink(self.path)

    def _open_fd(self) -> int:
        if self._failed is not None:
            raise self._failed
        if self._fd is None:
            raise StorageError(f"{self.path!r} is closed", errno=errno.EBADF, operation="pwrite", path=self.path)
        return self._fd

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, cls: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        _close_on_exit(self, error)


class InputFile:
    """A file read at any offsets into any buffers; usable from several threads.

    Parameters
    ----------
    direct : {"auto", False}
        "auto" reads long pieces past the page cache where address and offset allow.

    Attributes
    ----------
    nbytes : int
        Size when it was opened.
    """

    def __init__(self, fs: FileSystem, path: str, *, direct: Literal["auto", False] = "auto") -> None:
        self.path = path
        self._fs = fs
        self._fd: int | None = fs.open(path, os.O_RDONLY)
        try:
            found = fs.stat_open(self._fd)
            self.nbytes = found.nbytes
            self._direct = _DirectDescriptor(fs, path, os.O_RDONLY, found.device, direct == "auto")
        except StorageError:
            with suppress(StorageError):
                fs.close(self._fd)
            raise

    def read_into(self, buffer: bytearray | memoryview, byte_offset: int) -> None:
        """Fill the whole of ``buffer`` (writable, C-contiguous) from ``byte_offset``. The view is not kept.

        Raises
        ------
        TruncatedError
            If the file ends before.
        StorageError
            If the disk refuses; what the buffer then holds is undefined.
        """
        view = memoryview(buffer)
        self._check_range(byte_offset, view.nbytes)
        if view.nbytes == 0:
            return
        view = view.cast("B")
        head = -byte_offset % ALIGNMENT
        middle = (view.nbytes - head) // ALIGNMENT * ALIGNMENT
        if middle < _DIRECT_READ_MIN_NBYTES or (_address(view) + head) % ALIGNMENT:
            self._read(self._buffered_fd(), view, byte_offset)
            return
        done = head + self._read_direct(view[head : head + middle], byte_offset + head)
        self._read(self._buffered_fd(), view[:head], byte_offset)
        self._read(self._buffered_fd(), view[done:], byte_offset + done)

    def read(self, byte_offset: int, nbytes: int) -> bytes:
        """Return exactly ``nbytes`` bytes; the range is checked before anything is allocated."""
        self._check_range(byte_offset, nbytes)
        content = bytearray(nbytes)
        self.read_into(content, byte_offset)
        return bytes(content)

    def _check_range(self, byte_offset: int, nbytes: int) -> None:
        if byte_offset < 0 or nbytes < 0 or byte_offset + nbytes > self.nbytes:
            stop = byte_offset + nbytes
            raise TruncatedError(
                f"{self.path!r} has {self.nbytes} bytes; bytes {byte_offset} to {stop} were asked for", path=self.path
            )

    def _read(self, fd: int, view: memoryview, byte_offset: int) -> None:
        done = 0
        while done < view.nbytes:
            count = self._fs.pread_into(fd, view[done:], byte_offset + done)
            if count == 0:
                raise TruncatedError(f"{self.path!r} ended at byte {byte_offset + done}", path=self.path)
            done += count

    def _read_direct(self, view: memoryview, byte_offset: int) -> int:
        """Read whole pages for as long as that works; return how many bytes are done."""
        done = 0
        while done < view.nbytes:
            fd = self._direct.fd
            if fd is None:
                break
            try:
                count = self._fs.pread_into(fd, view[done:], byte_offset + done)
            except StorageError as error:
                self._direct.refuse(error)
                break
            done += count
            if count == 0 or done % ALIGNMENT:
                break
        return done

    def _buffered_fd(self) -> int:
        if self._fd is None:
            raise StorageError(f"{self.path!r} is closed", errno=errno.EBADF, operation="pread_into", path=self.path)
        return self._fd

    def close(self) -> None:
        """Close; does nothing the second time."""
        fd, self._fd = self._fd, None
        try:
            self._direct.close()
        finally:
            if fd is not None:
                self._fs.close(fd)

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, cls: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        _close_on_exit(self, error)


def _close_on_exit(file: OutputFile | InputFile, error: BaseException | None) -> None:
    if error is None:
        file.close()
        return
    with suppress(StorageError):  # the first error is the one to know
        file.close()


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
