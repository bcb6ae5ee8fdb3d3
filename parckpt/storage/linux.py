"""Two system calls that Python's ``os`` lacks, through the C library: renameat2(2) and fallocate(2).

Not `os.posix_fallocate`: where the file system has no fallocate, the C library emulates that one by writing zeros,
which destroys what another process is writing to the same file.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any

__all__ = ["RENAME_EXCHANGE", "RENAME_NOREPLACE", "fallocate", "renameat2"]

RENAME_NOREPLACE = 1  # linux/fs.h
RENAME_EXCHANGE = 2
_AT_FDCWD = -100  # fcntl.h: paths are relative to the working directory


def _function(names: tuple[str, ...], argtypes: list[Any]) -> Callable[..., int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    for name in names:
        found = getattr(library, name, None)
        if found is not None:
            found.argtypes = argtypes
            found.restype = ctypes.c_int
            return found  # type: ignore[no-any-return]  # ctypes function pointers are untyped
    return None


_renameat2 = _function(("renameat2",), [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint])
# fallocate64 first: its lengths are 64 bits wide on every platform.
_fallocate = _function(("fallocate64", "fallocate"), [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64])


def _checked(function: Callable[..., int] | None, *arguments: object) -> None:
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        # Python repeats its own calls after a signal; a call through ctypes has to do that itself. Handlers run
        # between two turns of this loop.
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def renameat2(src: str, dst: str, flags: int) -> None:
    """Rename with flags; OSError with ENOSYS where the C library has no such call."""
    _checked(_renameat2, _AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), flags)


def fallocate(fd: int, nbytes: int) -> None:
    """Reserve blocks for the first ``nbytes`` bytes and make the file at least that long; existing bytes stay."""
    _checked(_fallocate, fd, 0, 0, nbytes)
