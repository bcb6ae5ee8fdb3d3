"""MindSpore's own checksum of a file, computed while the file's bytes go by once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.crc import crc32
from parckpt.formats.base import FileIndex, IndexedEntry
from parckpt.formats.safetensors import content_crc, file_crc

__all__ = ["StoredCrc"]

Bytes = npt.NDArray[np.uint8]


class StoredCrc:
    """Compares the checksum that a file carries with its bytes, given in ascending order without gaps.

    Parameters
    ----------
    index : FileIndex
        The headers of the file.

    Attributes
    ----------
    checks : bool
        False where there is nothing to compare: no checksum, or one that MindSpore itself computes wrongly (it leaves
        map parameters out).
    """

    def __init__(self, index: FileIndex) -> None:
        self._index = index
        self.checks = index.crc is not None and all(item.kind != "map" for item in index.entries)
        self._crc = 0
        self._whole = index.format == "ckpt"
        self._entries = [_Entry(item) for item in index.entries]
        self._runs = sorted(
            (extent.byte_offset, extent.nbytes, number)
            for number, item in enumerate(index.entries)
            for extent in item.extents
        )
        self._next = 0

    def add(self, start: int, data: Bytes) -> None:
        """Take the bytes of the file from ``start``; they are not kept."""
        if not self.checks:
            return
        if self._whole:
            self._crc = crc32(data[: max(self._index.body_nbytes - start, 0)], self._crc)
            return
        stop = start + len(data)
        while self._next < len(self._runs) and self._runs[self._next][0] < stop:
            first, nbytes, number = self._runs[self._next]
            self._entries[number].add(data[max(first - start, 0) : first + nbytes - start])
            if first + nbytes > stop:
                break
            self._next += 1

    def problem(self) -> str | None:
        """After the last byte: what is wrong, None if nothing is."""
        if not self.checks:
            return None
        found = self._crc if self._whole else file_crc(entry.result() for entry in self._entries)
        return None if found == self._index.crc else f"its crc is {found}, the file itself says {self._index.crc}"


class _Entry:
    """crc of one entry, and its content where MindSpore's rule for 0-d integers needs it."""

    def __init__(self, item: IndexedEntry) -> None:
        self._item = item
        self._crc = 0
        self._content = b""

    def add(self, data: Any) -> None:
        self._crc = crc32(data, self._crc)
        if self._item.shape == ():
            self._content += bytes(data)

    def result(self) -> tuple[str, tuple[int, int]]:
        content = self._content if self._item.shape == () else None
        return self._item.name, content_crc(self._item, self._crc, content)
