"""The data files of a list of reads: each opened once, when first needed, and closed after its last read."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress

from parckpt.errors import StorageError
from parckpt.storage.direct import InputFile
from parckpt.storage.filesystem import FileSystem

__all__ = ["Inputs"]


class Inputs:
    """Open files by number, for several threads.

    Parameters
    ----------
    uses : iterable of int
        The file of each read to come.
    path : callable
        Path of a file.
    """

    def __init__(self, fs: FileSystem, uses: Iterable[int], path: Callable[[int], str]) -> None:
        self._fs, self._path = fs, path
        self._left = Counter(uses)
        self._open: dict[int, InputFile] = {}
        self._lock = threading.Lock()

    def get(self, file: int) -> InputFile:
        """The open file; StorageError if it cannot be opened."""
        with self._lock:
            if file not in self._open:
                self._open[file] = InputFile(self._fs, self._path(file))
            return self._open[file]

    def done(self, file: int) -> None:
        """One read of a file is over, however it went."""
        with self._lock:
            self._left[file] -= 1
            last = self._open.pop(file, None) if self._left[file] <= 0 else None
        _close(last)

    def close(self) -> None:
        """Close what is still open."""
        with self._lock:
            files, self._open = list(self._open.values()), {}
        for file in files:
            _close(file)


def _close(file: InputFile | None) -> None:
    if file is not None:
        with suppress(StorageError):  # nothing was written: the bytes were read and verified before
            file.close()
