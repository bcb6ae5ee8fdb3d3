"""MindSpore's checksum of a safetensors file, which stands in the header: the tensors are read once before writing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.crc import crc32
from parckpt.core.manifest import CHUNK_NBYTES
from parckpt.engine.fileplan import FilePlan
from parckpt.formats.base import Entry, Extent
from parckpt.formats.safetensors import content_crc, file_crc

__all__ = ["GatheredCrc", "local_crc"]

Bytes = npt.NDArray[np.uint8]


class _Running:
    """crc of one entry, and its content where the rule for 0-d integers needs it."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.crc = 0
        self.content = b""

    def add(self, block: Bytes | bytes) -> None:
        self.crc = crc32(block, self.crc)
        if self.entry.shape == ():
            self.content += bytes(block)

    def result(self) -> tuple[str, tuple[int, int]]:
        content = self.content if self.entry.shape == () else None
        return self.entry.name, content_crc(self.entry, self.crc, content)


def local_crc(plan: FilePlan, blocks: Sequence[Callable[[], Iterable[Bytes]]]) -> int:
    """Checksum of a file with this rank's boxes. Not collective.

    Parameters
    ----------
    plan : FilePlan
        Laid out with any crc: only its entries matter.
    blocks : sequence of callable
        For each box, what yields its bytes.
    """
    results = []
    for index, entry in enumerate(plan.entries):
        running = _Running(entry)
        parts = blocks[index]() if index < plan.nboxes else [plan.contents[index - plan.nboxes]]
        for block in parts:
            running.add(block)
        results.append(running.result())
    return file_crc(results)


class GatheredCrc:
    """A `Sink` that checksums what passes and keeps nothing."""

    def __init__(self, plan: FilePlan) -> None:
        self._plan = plan
        self._running = [_Running(entry) for entry in plan.entries]
        self._buffer = np.empty(CHUNK_NBYTES, np.uint8)
        self._extents = [part for part in plan.layout.parts if isinstance(part, Extent)]
        self._next = 0
        self._position = 0

    def fill(self, count: int, fill: Callable[[Bytes], Any]) -> None:
        """Let ``fill`` write the next ``count`` bytes, and checksum them entry by entry."""
        window = self._buffer[:count]
        fill(window)
        first, last = self._position, self._position + count
        while self._next < len(self._extents) and self._extents[self._next].byte_offset < last:
            extent = self._extents[self._next]
            start, stop = max(extent.byte_offset, first), min(extent.byte_offset + extent.nbytes, last)
            self._running[extent.entry].add(window[start - first : stop - first])
            if extent.byte_offset + extent.nbytes > last:
                break
            self._next += 1
        self._position = last

    def result(self) -> int:
        """The file's checksum."""
        return file_crc(running.result() for running in self._running)
