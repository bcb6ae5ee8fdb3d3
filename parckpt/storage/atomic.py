"""Whole files and directories that appear, change and vanish in one act, as far as the file system allows.

Nothing here is collective. "Synced" means that it survives a loss of power from then on.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress

from parckpt.errors import CheckpointExistsError, FormatError, StorageError, TruncatedError
from parckpt.storage.filesystem import (
    Bytes,
    FileSystem,
    UnsupportedOperation,
    opened,
    storage_error,
    try_stat,
)

__all__ = ["move_new", "read_file", "remove_tree", "replace_file", "swap", "temp_path", "write_all", "write_file"]

# link(2) says one of these where the file system, or a policy of the kernel, has no hard links.
LINK_REFUSED = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EACCES}
)
_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR})


def temp_path(path: str) -> str:
    """Return a fresh hidden name beside ``path``: ``.<name>.temp-<16 hex digits>``."""
    parent, name = os.path.split(path)
    return os.path.join(parent, f".{name.lstrip('.')}.temp-{secrets.token_hex(8)}")


def write_all(fs: FileSystem, fd: int, path: str, data: Bytes, byte_offset: int) -> int:
    """Write the whole of ``data``, however many calls that takes; return its bytes. The view is not kept."""
    view = memoryview(data)
    nbytes = view.nbytes
    done = 0
    while done < nbytes:
        if done == 0:
            view = view.cast("B")
        written = fs.pwrite(fd, view[done:], byte_offset + done)
        if written <= 0:
            raise storage_error("pwrite", path, errno.EIO)
        done += written
    return nbytes


def write_file(
    fs: FileSystem, path: str, data: Bytes | Iterable[Bytes], mode: int = 0o600, exclusive: bool = True
) -> None:
    """Write a file and sync its content; its name is durable once the caller has synced the directory.

    Parameters
    ----------
    data : bytes or iterable of bytes
        The content, whole or in pieces.
    mode : int
        Permission bits, whatever the umask.
    exclusive : bool
        True: the file must not exist. False: an existing one is emptied first, so a crash may leave any part of it.

    Raises
    ------
    CheckpointExistsError
        If ``exclusive`` and the name is taken.
    StorageError
        Of which `SyncError` and `NoSpaceError`. After any error a file that this call made is removed again.
    """
    flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if exclusive else os.O_TRUNC)
    pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else data
    created = finished = False
    try:
        with opened(fs, path, flags, mode) as fd:
            created = exclusive
            fs.chmod_open(fd, mode)
            byte_offset = 0
            for piece in pieces:
                byte_offset += write_all(fs, fd, path, piece, byte_offset)
            fs.fsync(fd)
        finished = True
    except StorageError as error:
        if not created and exclusive and error.errno == errno.EEXIST:
            raise CheckpointExistsError(f"{path!r} exists already", path=path) from error
        raise
    finally:
        if created and not finished:
            with suppress(StorageError):
                fs.unlink(path)


def replace_file(fs: FileSystem, path: str, data: Bytes | Iterable[Bytes], mode: int = 0o600) -> None:
    """Put a synced file at ``path``, in place of what is there: a crash leaves the old one or the new one, whole.

    On an error the old one is still there, unless syncing the directory failed: then it may be either.
    """
    temp = temp_path(path)
    write_file(fs, temp, data, mode)
    try:
        fs.rename(temp, path)
    except StorageError:
        with suppress(StorageError):
            fs.unlink(temp)
        raise
    fs.sync_directory(_parent(path))


def read_file(fs: FileSystem, path: str, max_nbytes: int) -> bytes:
    """Read a whole file of at most ``max_nbytes`` bytes.

    Raises
    ------
    FormatError
        If it is longer, before anything is allocated.
    TruncatedError
        If it got shorter while it was read.
    """
    with opened(fs, path, os.O_RDONLY) as fd:
        nbytes = fs.stat_open(fd).nbytes
        if nbytes > max_nbytes:
            raise FormatError(
                f"{path!r} has {nbytes} bytes, at most {max_nbytes} expected", path=path, byte_offset=0, field="size"
            )
        content = bytearray(nbytes)
        done = 0
        while done < nbytes:
            count = fs.pread_into(fd, memoryview(content)[done:], done)
            if count == 0:
                raise TruncatedError(f"{path!r} ended at byte {done} of {nbytes}", path=path)
            done += count
    return bytes(content)


def move_new(fs: FileSystem, src: str, dst: str) -> None:
    """Rename a file or directory to a name that must be free. The caller syncs both parents.

    One act where rename flags work. Else a file gets its second name and loses its first (a crash between leaves
    both; calling again finishes), and a directory is renamed plainly after a look: the kernel itself refuses to
    replace anything but an empty directory.

    Raises
    ------
    CheckpointExistsError
        If ``dst`` is taken; ``src`` is untouched.
    """
    try:
        fs.rename_noreplace(src, dst)
    except UnsupportedOperation:
        _move_new_flagless(fs, src, dst)
    except StorageError as error:
        if error.errno != errno.EEXIST:
            raise
        _finish_or_refuse(fs, src, dst, error)


def _move_new_flagless(fs: FileSystem, src: str, dst: str) -> None:
    try:
        if fs.stat(src).is_dir:
            _rename_to_free(fs, src, dst)
            return
        try:
            fs.link(src, dst)
        except StorageError as error:
            if error.errno not in LINK_REFUSED:
                raise
            # No flags and no links: a look and a rename is all there is. The lock keeps other writers out.
            _rename_to_free(fs, src, dst)
        else:
            _drop_first_name(fs, src, dst)
    except StorageError as error:
        if error.errno not in _TAKEN:
            raise
        _finish_or_refuse(fs, src, dst, error)


def _rename_to_free(fs: FileSystem, src: str, dst: str) -> None:
    if try_stat(fs, dst) is not None:
        raise storage_error("rename", src, errno.EEXIST, dst)
    fs.rename(src, dst)


def _drop_first_name(fs: FileSystem, src: str, dst: str) -> None:
    # Synced before: else the loss of the old name may be on disk and the new name not, and the file is gone.
    fs.sync_directory(_parent(dst))
    fs.unlink(src)


def _finish_or_refuse(fs: FileSystem, src: str, dst: str, error: StorageError) -> None:
    """`dst` is taken: by `src` itself (a link whose answer was lost, or a crash before the unlink), or by another."""
    here, there = try_stat(fs, src), try_stat(fs, dst)
    if here and there and not here.is_dir and (here.device, here.inode) == (there.device, there.inode):
        _drop_first_name(fs, src, dst)
        return
    raise CheckpointExistsError(f"{dst!r} exists already; {src!r} was not moved", path=dst) from error


def swap(fs: FileSystem, new: str, current: str, reserved: str) -> None:
    """Put directory ``new`` in the place of directory ``current``, whose old content ends at ``reserved``; all synced.

    Parameters
    ----------
    new, current : str
        Complete, synced directories on one file system.
    reserved : str
        A free name that restore and sweep know to belong to ``current``.

    Raises
    ------
    CheckpointExistsError
        If ``reserved`` is taken; nothing was changed.
    StorageError
        The old directory was put back to ``current`` where that was possible, and ``new`` is ``new`` again.

    Notes
    -----
    What a crash leaves, where rename flags are refused:

    ==================================  =================  =================  =================
    after                               ``new``            ``current``        ``reserved``
    ==================================  =================  =================  =================
    the start                           new content        old content        nothing
    1. current -> reserved              new content        **nothing**        old content
    2. sync                             as 1, now for certain
    3. new -> current                   nothing            new content        old content
    4. sync                             as 3, now for certain
    ==================================  =================  =================  =================

    Without step 2 a file system may keep 3 and forget 1. In state 1 both contents are complete under names that are
    known: move ``new`` on (or ``reserved`` back) with `move_new`. Where rename flags work:

    ==================================  =================  =================  =================
    1. exchange new and current         **old content**    new content        nothing
    2. sync                             as 1, now for certain
    3. new -> reserved                  nothing            new content        old content
    4. sync                             as 3, now for certain
    ==================================  =================  =================  =================

    In state 1 the old content is at the staging name, where its token does not fit the name: debris. After 2 the new
    one is in place for good: if 3 or 4 fails, nothing is raised, and the old content may still be at ``new``. Never
    call `swap` again to finish an interrupted one: it would exchange the two back.
    """
    if try_stat(fs, reserved) is not None:
        raise CheckpointExistsError(f"{reserved!r} exists already; {current!r} was not replaced", path=reserved)
    parents = sorted({_parent(new), _parent(current), _parent(reserved)})
    try:
        fs.exchange(new, current)
    except UnsupportedOperation:
        _swap_flagless(fs, new, current, reserved, parents)
        return
    try:
        _sync(fs, parents)
    except StorageError:
        with suppress(StorageError):
            fs.exchange(new, current)
        raise
    with suppress(StorageError):
        fs.rename(new, reserved)
        _sync(fs, parents)


def _swap_flagless(fs: FileSystem, new: str, current: str, reserved: str, parents: list[str]) -> None:
    fs.rename(current, reserved)
    try:
        _sync(fs, parents)
        fs.rename(new, current)
    except StorageError:
        with suppress(StorageError):
            fs.rename(reserved, current)
        raise
    try:
        _sync(fs, parents)
    except StorageError:
        with suppress(StorageError):
            fs.rename(current, new)
            fs.rename(reserved, current)
        raise


def remove_tree(fs: FileSystem, path: str) -> None:
    """Remove a file, or a directory with all it holds; symbolic links are removed, not followed.

    What is gone already is no error, so several sweepers may meet.
    """
    pending = [path]
    emptied: set[str] = set()
    while pending:
        last = pending[-1]
        # Once only: NFS keeps a deleted open file under a new name in the directory, for as long as it is open.
        if _remove_one(fs, last, may_be_full=last not in emptied):
            pending.pop()
        else:
            emptied.add(last)
            pending.extend(_children(fs, last))


def _remove_one(fs: FileSystem, path: str, may_be_full: bool) -> bool:
    """Remove a file or an empty directory; False if it is a directory with something in it."""
    try:
        fs.unlink(path)
        return True
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return True
        # EISDIR is Linux's answer for a directory, EPERM the one of POSIX.
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        refused = error
    try:
        fs.rmdir(path)
        return True
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return True
        if may_be_full and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        if error.errno == errno.ENOTDIR:  # a file after all, which may not be removed
            raise refused from None
        raise


def _children(fs: FileSystem, path: str) -> Iterator[str]:
    try:
        names = fs.listdir(path)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        names = []
    return (os.path.join(path, name) for name in names)


def _parent(path: str) -> str:
    return os.path.dirname(path) or "."


def _sync(fs: FileSystem, directories: list[str]) -> None:
    for directory in directories:
        fs.sync_directory(directory)
