"""Writing one file in chunks: fill a buffer, then checksum and write it in the background.

The caller fills aligned buffers one after the other; a few threads checksum and write them (both release the GIL), so
copying, checksumming and the device overlap. Memory is the buffers, whatever the file's size.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from parckpt.core.contents import chunk_count
from parckpt.core.crc import combine, crc32
from parckpt.core.manifest import CHUNK_NBYTES

__all__ = ["NBUFFERS", "ChunkWriter", "Output"]

# Three threads keep two writes in the device's queue while one checksums; one more buffer is being filled, two wait.
# 24 MiB a rank; docs/benchmarks.md has the figures.
NTHREADS = 3
NBUFFERS = 6

Bytes = npt.NDArray[np.uint8]


class Output(Protocol):
    """What chunks are written to: `storage.direct.OutputFile`."""

    def write(self, buffer: memoryview, byte_offset: int) -> None:
        """Write all of the buffer."""
        ...


class ChunkWriter:
    """Writes a file's chunks and keeps their checksums.

    Use as a context manager; leaving it ends the threads, also after an error. Not collective. One thread fills.

    Parameters
    ----------
    output : Output
        Open file.
    nbytes : int
        Final length of the file.
    buffers : list of memoryview
        Page-aligned, each `CHUNK_NBYTES` long; ours until `close`.
    volatile : sequence of (int, int)
        Byte ranges that differ from save to save although no tensor does (step numbers, trailer).

    Attributes
    ----------
    chunk_crcs : uint32 array
        crc32 of each chunk.
    content_crcs : uint32 array
        The same without the volatile bytes: equal to the last save's when no tensor changed.
    """

    def __init__(
        self, output: Output, nbytes: int, buffers: list[memoryview], volatile: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.nbytes = nbytes
        self._volatile = sorted(volatile)
        self.content_crcs = np.zeros(chunk_count(nbytes, CHUNK_NBYTES), "<u4")
        self.chunk_crcs = np.zeros(chunk_count(nbytes, CHUNK_NBYTES), "<u4")
        self._output = output
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[int, memoryview, int] | None] = queue.SimpleQueue()
        for buffer in buffers:
            self._free.put(buffer)
        self._nbuffers = len(buffers)
        self._error: BaseException | None = None
        self._current: memoryview | None = None
        self._array: Bytes = np.zeros(0, np.uint8)
        self._filled = 0
        self._submitted = 0
        self._threads = [
            threading.Thread(target=self._work, name="parckpt-write", daemon=True) for _ in range(NTHREADS)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, data: Bytes | bytes) -> None:
        """Add bytes at the end of what was added so far."""
        source = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        start = 0
        while start < source.size:
            room = self._room()
            count = min(room, source.size - start)
            self._array[self._filled : self._filled + count] = source[start : start + count]
            self._advance(count)
            start += count

    def fill(self, count: int, fill: Callable[[Bytes], Any]) -> None:
        """Let ``fill`` write the next ``count`` bytes itself; they must not cross the end of a chunk."""
        if count:
            assert count <= self._room()
            fill(self._array[self._filled : self._filled + count])
            self._advance(count)

    def crc_so_far(self) -> int:
        """crc32 of everything added; waits until the full chunks are checksummed."""
        self._drain()
        crc = 0
        for index, value in enumerate(self.chunk_crcs[: self._submitted].tolist()):
            crc = combine(crc, value, min(CHUNK_NBYTES, self.nbytes - index * CHUNK_NBYTES))
        if self._current is not None:
            crc = combine(crc, crc32(self._array[: self._filled]), self._filled)
        return crc

    def finish(self) -> None:
        """Write the last, short chunk and wait until all are written. Raises what a write raised."""
        if self._current is not None and self._filled:
            self._submit()
        self._drain()

    def close(self) -> None:
        """End the threads; what was not submitted is dropped."""
        for _ in self._threads:
            self._full.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _room(self) -> int:
        if self._current is None:
            self._current = self._take()
            self._array = np.frombuffer(self._current, np.uint8)
            self._filled = 0
        return CHUNK_NBYTES - self._filled

    def _advance(self, count: int) -> None:
        self._filled += count
        if self._filled == CHUNK_NBYTES:
            self._submit()

    def _take(self) -> memoryview:
        buffer = self._free.get()
        if self._error is not None:
            self._free.put(buffer)
            raise self._error
        return buffer

    def _submit(self) -> None:
        assert self._current is not None
        self._full.put((self._submitted, self._current, self._filled))
        self._submitted += 1
        self._current = None

    def _drain(self) -> None:
        held = 0 if self._current is None else 1
        taken = [self._free.get() for _ in range(self._nbuffers - held)]
        for buffer in taken:
            self._free.put(buffer)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._full.get()) is not None:
            index, buffer, nbytes = item
            try:
                if self._error is None:
                    self._write(index, buffer, nbytes)
            except BaseException as error:  # raised again in the filling thread, at its next call
                self._error = error
            finally:
                self._free.put(buffer)

    def _write(self, index: int, buffer: memoryview, nbytes: int) -> None:
        self.chunk_crcs[index] = crc32(buffer[:nbytes])
        self.content_crcs[index] = self._content_crc(index, buffer[:nbytes])
        # The tail is padded to a whole page, so that it can go past the page cache too; the file is cut afterwards.
        padded = -(-nbytes // 4096) * 4096
        if padded != nbytes:
            buffer[nbytes:padded] = bytes(padded - nbytes)
        self._output.write(buffer[:padded], index * CHUNK_NBYTES)

    def _content_crc(self, index: int, chunk: memoryview) -> int:
        first = index * CHUNK_NBYTES
        crc, position, skipped = 0, 0, False
        for start, stop in self._volatile:
            start, stop = max(start - first, 0), min(stop - first, len(chunk))
            if start < stop:
                crc, position, skipped = crc32(chunk[position:start], crc), stop, True
        return crc32(chunk[position:], crc) if skipped else int(self.chunk_crcs[index])
