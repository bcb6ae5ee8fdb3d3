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

from parckpt.core.layout import Box, range_boxes, shift
from parckpt.core.readplan import Segment, Want, plan_reads
from parckpt.core.transfer import Port
from parckpt.engine.reading import ChunkReader, ChunkResult, ChunkTask, stretch
from parckpt.engine.source import Source
from parckpt.engine.targets import Target

__all__ = ["BAND_NBYTES", "BoxStream"]

BAND_NBYTES = 96 << 20
"""Length of a band. Files cut by columns give each band a few bytes of many chunks, so long bands read less; with the
buffers of reader and writer it stays well below 200 MiB."""

# Bands planned at a time: what a plan of a whole file of many tensors would take is not memory to be counted on.
_BANDS_AT_ONCE = 16

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Band:
    """A stretch of the stream: what is read, and which segments of which targets each read gives."""

    nbytes: int
    names: list[str]
    targets: list[Target]
    tasks: list[ChunkTask]
    segments: list[tuple[Segment, ...]]

    def fill(self, results: _Results) -> None:
        for task, segments in zip(self.tasks, self.segments, strict=True):
            data = results.of(task)
            for segment in segments:
                self.targets[segment.want].pull(segment, task.window, data)
        for target, name in zip(self.targets, self.names, strict=True):
            target.check(name)


class BoxStream:
    """The bytes of boxes, each in C order, one box after the other. Not collective.

    Every chunk is compared with its checksum when it is first needed; later bands that need more of it read only that
    stretch. So nothing is read more than twice, however the boxes lie in the files.

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
        source: Source,
        pieces: Sequence[tuple[int, Box]],
        *,
        on_bytes: Callable[[int], None] | None = None,
        band_nbytes: int = BAND_NBYTES,
    ) -> None:
        self._source, self._pieces = source, pieces
        self._on_bytes = on_bytes or (lambda nbytes: None)
        itemsizes = [source.contents.tensors[tensor].dtype.itemsize for tensor, _ in pieces]
        self._band_nbytes = max([band_nbytes, *itemsizes])
        total = sum(box.size * itemsize for (_, box), itemsize in zip(pieces, itemsizes, strict=True))
        self._buffer: Bytes = np.empty(min(self._band_nbytes, total), np.uint8)
        self._verified: set[tuple[int, int]] = set()  # file and first byte
        self._last: ChunkTask | None = None
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
        source = self._source
        for batch in self._batches():
            tasks = [task for band in batch for task in band.tasks]
            distinct = [task for number, task in enumerate(tasks) if not number or tasks[number - 1] != task]
            with ChunkReader(
                source.fs, source.root, source.contents, distinct, manifest_path=source.manifest_path
            ) as reader:
                results = _Results(reader.run())
                for band in batch:
                    band.fill(results)
                    self._on_bytes(band.nbytes)
                    yield self._buffer[: band.nbytes]

    def _batches(self) -> Iterator[list[_Band]]:
        batch: list[_Band] = []
        for wants, starts, nbytes in self._cut():
            batch.append(self._plan(wants, starts, nbytes))
            if len(batch) == _BANDS_AT_ONCE:
                yield batch
                batch, self._last = [], None
        if batch:
            yield batch

    def _cut(self) -> Iterator[tuple[list[Want], list[int], int]]:
        """Bands: boxes that are runs of the stream, as many as there is room for, and where each begins."""
        wants: list[Want] = []
        starts: list[int] = []
        filled = 0
        for tensor, piece in self._pieces:
            itemsize = self._source.contents.tensors[tensor].dtype.itemsize
            done, back = 0, tuple(-offset for offset in piece.offsets)
            while done < piece.size:
                count = min(piece.size - done, (self._band_nbytes - filled) // itemsize)
                for box in range_boxes(piece.shape, done, done + count):
                    wants.append(Want(tensor, shift(box, back)))
                    starts.append(filled)
                    filled += box.size * itemsize
                done += count
                if done < piece.size:
                    yield wants, starts, filled
                    wants, starts, filled = [], [], 0
        if wants:
            yield wants, starts, filled

    def _plan(self, wants: list[Want], starts: list[int], nbytes: int) -> _Band:
        contents = self._source.contents
        names = [contents.tensors[want.tensor].name for want in wants]
        targets = [self._target(want, start) for want, start in zip(wants, starts, strict=True)]
        reads = plan_reads(contents, [wants]).reads_of(0)
        segments = [read.deliveries[0].segments for read in reads]
        tasks = [
            self._task(ChunkTask.of(contents, read.file, read.chunk), targets, needed)
            for read, needed in zip(reads, segments, strict=True)
        ]
        return _Band(nbytes, names, targets, tasks, segments)

    def _target(self, want: Want, start: int) -> Target:
        dtype = self._source.contents.tensors[want.tensor].dtype.numpy
        flat = self._buffer[start : start + want.box.size * dtype.itemsize]
        return Target(want.box, Port(flat.view(dtype).reshape(want.box.shape), dtype))

    def _task(self, task: ChunkTask, targets: Sequence[Target], segments: Sequence[Segment]) -> ChunkTask:
        """All of a chunk the first time, and where the band before ended in it: then it is still at hand."""
        known = self._source.contents.files[task.file].chunk_crcs is None or (task.file, task.start) in self._verified
        if known and task != self._last:
            task = stretch(task, (c for s in segments for c in targets[s.want].copies(s, task.window)[1]))
        else:
            self._verified.add((task.file, task.start))
        self._last = task
        return task


class _Results:
    """The results of a list of tasks, given once more where a task comes twice in a row."""

    def __init__(self, results: Iterator[ChunkResult]) -> None:
        self._results = results
        self._last: ChunkResult | None = None

    def of(self, task: ChunkTask) -> Bytes:
        """The bytes of the next task."""
        if self._last is None or self._last.task != task:
            self._last = next(self._results)
        assert self._last.task == task
        if self._last.error is not None:
            raise self._last.error
        return self._last.data
