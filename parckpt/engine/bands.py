"""Stored boxes as one stream of bytes in the order of a new file, in bounded memory.

A new file wants the bytes of its boxes one after the other; a stored file may hold them cut and ordered otherwise (by
columns, say). So the stream is made in bands: a stretch of it is a few boxes, whose chunks are read once each,
verified, and scattered into one buffer. The next bands' chunks are read ahead meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parckpt.core.contents import Contents
from parckpt.core.layout import Box, range_boxes, shift
from parckpt.core.readplan import Segment, Want, plan_reads
from parckpt.core.transfer import Port
from parckpt.engine.reading import ChunkReader, ChunkResult, ChunkTask
from parckpt.engine.targets import Target
from parckpt.storage.filesystem import FileSystem

__all__ = ["BAND_NBYTES", "BoxStream", "StoredSource"]

BAND_NBYTES = 96 << 20
"""Length of a band. Columns of n files need n chunks a band, so a long band reads them less often; with the buffers of
reader and writer it stays well below 200 MiB."""

# Bands planned at a time: what a plan of a whole file of many tensors would take is not memory to be counted on.
_BANDS_AT_ONCE = 16

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class StoredSource:
    """A checkpoint to read from.

    Attributes
    ----------
    root : str
        Directory that the files' paths are relative to.
    manifest_path : str or None
        If this file goes while data is missing, the checkpoint was deleted, not damaged.
    """

    fs: FileSystem
    root: str
    contents: Contents
    manifest_path: str | None = None


@dataclass(frozen=True)
class _Planned:
    """One band: what it wants, where in the band each wanted box begins, and the reads that fill it."""

    wants: list[Want]
    starts: list[int]
    nbytes: int
    tasks: list[ChunkTask]
    segments: list[tuple[Segment, ...]]


class BoxStream:
    """The bytes of boxes, each in C order, one box after the other. Not collective.

    Parameters
    ----------
    pieces : sequence of (int, Box)
        Row of the tensor in the source's contents, and a box of it in global coordinates.
    on_bytes : callable, optional
        Called with the number of bytes that have come.
    band_nbytes : int
        Length of a band; an element is never cut.
    """

    def __init__(
        self,
        source: StoredSource,
        pieces: Sequence[tuple[int, Box]],
        *,
        on_bytes: Callable[[int], None] | None = None,
        band_nbytes: int = BAND_NBYTES,
    ) -> None:
        self._source, self._pieces, self._band_nbytes = source, pieces, band_nbytes
        self._on_bytes = on_bytes or (lambda nbytes: None)
        self._blocks = self._stream()
        self._rest: Bytes = np.zeros(0, np.uint8)

    def take(self, nbytes: int) -> Iterator[Bytes]:
        """Yield the next ``nbytes`` in blocks, each valid until the next is asked for.

        Raises
        ------
        IntegrityError
            A chunk is damaged or something is not stored; names file, chunk and tensors.
        CheckpointGoneError, StorageError
        """
        while nbytes:
            if not self._rest.size:
                self._rest = next(self._blocks)
            block, self._rest = self._rest[:nbytes], self._rest[nbytes:]
            nbytes -= block.size
            yield block

    def close(self) -> None:
        """End the threads that read ahead."""
        self._blocks.close()
        self._rest = np.zeros(0, np.uint8)

    def _stream(self) -> Generator[Bytes, None, None]:
        buffer: Bytes = np.zeros(0, np.uint8)
        for batch in self._batches():
            source = self._source
            tasks = _without_repeats([task for band in batch for task in band.tasks])
            with ChunkReader(
                source.fs, source.root, source.contents, tasks, manifest_path=source.manifest_path
            ) as reader:
                results = _Results(reader.run())
                for band in batch:
                    if buffer.size < band.nbytes:
                        buffer = np.empty(band.nbytes, np.uint8)
                    self._fill(band, buffer, results)
                    self._on_bytes(band.nbytes)
                    yield buffer[: band.nbytes]

    def _fill(self, band: _Planned, buffer: Bytes, results: _Results) -> None:
        targets = [self._target(want, buffer, start) for want, start in zip(band.wants, band.starts, strict=True)]
        for task, segments in zip(band.tasks, band.segments, strict=True):
            data = results.of(task)
            for segment in segments:
                targets[segment.want].pull(segment, task.window, data)
        for want, target in zip(band.wants, targets, strict=True):
            target.check(self._source.contents.tensors[want.tensor].name)

    def _target(self, want: Want, buffer: Bytes, start: int) -> Target:
        dtype = self._source.contents.tensors[want.tensor].dtype.numpy
        flat = buffer[start : start + want.box.size * dtype.itemsize]
        return Target(want.box, Port(flat.view(dtype).reshape(want.box.shape), dtype))

    def _batches(self) -> Iterator[list[_Planned]]:
        batch: list[_Planned] = []
        for wants, starts, nbytes in self._bands():
            batch.append(self._plan(wants, starts, nbytes))
            if len(batch) == _BANDS_AT_ONCE:
                yield batch
                batch = []
        if batch:
            yield batch

    def _bands(self) -> Iterator[tuple[list[Want], list[int], int]]:
        """Cut the stream: boxes that are runs of it, as many as fit a band."""
        wants: list[Want] = []
        starts: list[int] = []
        filled = 0
        for tensor, piece in self._pieces:
            itemsize = self._source.contents.tensors[tensor].dtype.itemsize
            done, back = 0, tuple(-offset for offset in piece.offsets)
            while done < piece.size:
                count = min(piece.size - done, max((self._band_nbytes - filled) // itemsize, 0 if filled else 1))
                for box in range_boxes(piece.shape, done, done + count):
                    wants.append(Want(tensor, shift(box, back)))
                    starts.append(filled)
                    filled += box.size * itemsize
                done += count
                if done < piece.size or filled >= self._band_nbytes:
                    yield wants, starts, filled
                    wants, starts, filled = [], [], 0
        if wants:
            yield wants, starts, filled

    def _plan(self, wants: list[Want], starts: list[int], nbytes: int) -> _Planned:
        contents = self._source.contents
        tasks: list[ChunkTask] = []
        segments: list[tuple[Segment, ...]] = []
        for read in plan_reads(contents, [wants]).reads_of(0):
            tasks.append(ChunkTask.of(contents, read.file, read.chunk))
            segments.append(read.deliveries[0].segments)
        return _Planned(wants, starts, nbytes, tasks, segments)


class _Results:
    """The results of a list of tasks without repeats, given once more where the list had one."""

    def __init__(self, results: Iterator[ChunkResult]) -> None:
        self._results = results
        self._last: ChunkResult | None = None

    def of(self, task: ChunkTask) -> Bytes:
        """The bytes of the next task."""
        if self._last is None or self._last.task != task:
            self._last = next(self._results)
        if self._last.error is not None:
            raise self._last.error
        assert self._last.task == task
        return self._last.data


def _without_repeats(tasks: Sequence[ChunkTask]) -> list[ChunkTask]:
    """A band often begins in the chunk in which the one before ended: read once."""
    return [task for number, task in enumerate(tasks) if not number or tasks[number - 1] != task]
