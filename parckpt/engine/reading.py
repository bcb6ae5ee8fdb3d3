"""Reading stored chunks ahead, each verified before anybody sees it.

A few threads read into page-aligned buffers and checksum (both release the GIL); results come out in the order asked
for. Memory is the buffers. The threads make no MPI call, and whatever goes wrong is a value, so that the caller can
keep its promises to the other ranks first.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.contents import Contents
from parckpt.core.crc import crc32
from parckpt.core.layout import Box
from parckpt.core.readplan import Segment, Want, plan_reads
from parckpt.core.transfer import Copy, Port
from parckpt.engine.inputs import Inputs
from parckpt.engine.targets import Target
from parckpt.errors import (
    CheckpointGoneError,
    ChecksumError,
    IntegrityError,
    StorageError,
    TimeoutExpiredError,
    TruncatedError,
)
from parckpt.storage.direct import InputFile, aligned_buffer
from parckpt.storage.filesystem import FileStat, FileSystem, try_stat

__all__ = ["ChunkReader", "ChunkResult", "ChunkTask", "names_within", "read_box", "stretch"]

log = logging.getLogger("parckpt")

# As for writing (engine.chunks): two reads in the device's queue while others are checksummed, copied and sent.
NTHREADS = 2
NBUFFERS = 5

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ChunkTask:
    """Bytes ``[start, stop)`` of a file; verified if they are a whole chunk and its checksum is known."""

    file: int
    start: int
    stop: int

    @classmethod
    def of(cls, contents: Contents, file: int, chunk: int) -> ChunkTask:
        """A whole chunk."""
        start = chunk * contents.chunk_nbytes
        return cls(file, start, min(start + contents.chunk_nbytes, contents.files[file].nbytes))

    @property
    def window(self) -> tuple[int, int]:
        """Its byte range."""
        return self.start, self.stop


@dataclass(frozen=True)
class ChunkResult:
    """The bytes of a task, valid until `ChunkReader.release`, or why there are none."""

    task: ChunkTask
    data: Bytes
    error: Exception | None
    _buffer: memoryview


class ChunkReader:
    """Reads tasks in order, ahead of the caller. Use as a context manager. Not collective.

    Parameters
    ----------
    root_path : str
        Directory that the files' paths are relative to.
    tasks : sequence of ChunkTask
        What to read; tasks of one file should follow each other, as few files are then open at a time.
    manifest_path : str, optional
        If this file goes or is replaced while data is missing or damaged, the checkpoint was deleted, not damaged.

    Notes
    -----
    A chunk whose checksum does not hold is read once more, with a new descriptor through the page cache; only if it
    fails again it is reported as damaged. Errors of a result: `ChecksumError` (facts ``path``, ``chunk``,
    ``tensors``), `TruncatedError`, `CheckpointGoneError`; any `StorageError` unchanged.
    """

    def __init__(
        self,
        fs: FileSystem,
        root_path: str,
        contents: Contents,
        tasks: Sequence[ChunkTask],
        *,
        manifest_path: str | None = None,
        nbuffers: int = NBUFFERS,
    ) -> None:
        self._fs, self._root, self._contents, self._tasks = fs, root_path, contents, tasks
        self._manifest_path = manifest_path
        self._seen = self._manifest_now()
        self._inputs = Inputs(fs, [task.file for task in tasks], self._path)
        longest = max((task.stop - task.start for task in tasks), default=0)
        self._free = [aligned_buffer(longest) for _ in range(min(nbuffers, len(tasks)))]
        self._cond = threading.Condition()
        self._results: dict[int, ChunkResult] = {}
        self._begun = self._given = 0
        self._closed = False
        self._died: BaseException | None = None
        count = min(NTHREADS, len(tasks))
        self._running = count
        self._threads = [threading.Thread(target=self._work, name="parckpt-read", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A disk that does not answer in time may never do, and nobody waits for it after an interrupt.
        self.close(wait=error is None or (isinstance(error, Exception) and not isinstance(error, TimeoutExpiredError)))

    def poll(self, timeout_s: float = 0.0) -> ChunkResult | None:
        """The next result, or None if it does not come within the time. Call once for each task at most."""
        with self._cond:
            self._cond.wait_for(lambda: self._given in self._results, timeout_s)
            result = self._results.pop(self._given, None)
            self._given += result is not None
            return result

    def ready(self, timeout_s: float) -> bool:
        """Wait a little for the next result, without taking it."""
        with self._cond:
            return self._cond.wait_for(lambda: self._given in self._results, timeout_s)

    def release(self, result: ChunkResult) -> None:
        """Give a result's buffer back."""
        with self._cond:
            self._free.append(result._buffer)
            self._cond.notify_all()

    def run(self) -> Iterator[ChunkResult]:
        """All results in order; each is valid until the next one is asked for."""
        for _ in range(len(self._tasks)):
            with self._cond:
                self._cond.wait_for(lambda: self._given in self._results or self._died is not None)
                if self._given not in self._results and self._died is not None:
                    raise self._died
                result = self._results.pop(self._given)
                self._given += 1
            yield result
            self.release(result)

    def close(self, *, wait: bool = True) -> None:
        """Read no more. Waits for what is being read, unless told not to."""
        with self._cond:
            self._closed = True
            self._cond.notify_all()
        if wait:
            for thread in self._threads:
                thread.join()
            # This object is part of a reference cycle: the buffers must not wait for the garbage collector.
            self._free, self._results = [], {}

    def _work(self) -> None:
        try:
            self._read_all()
        except BaseException as death:  # without this whoever waits for a result would wait for ever
            with self._cond:
                self._died = death
                self._cond.notify_all()

    def _read_all(self) -> None:
        while (claimed := self._claim()) is not None:
            index, buffer = claimed
            task = self._tasks[index]
            view = buffer[: task.stop - task.start]
            error: Exception | None = None
            try:
                self._read(task, view)
            except Exception as problem:  # a value for the caller: see the module's docstring
                error = problem
            self._inputs.done(task.file)
            with self._cond:
                self._results[index] = ChunkResult(task, np.frombuffer(view, np.uint8), error, buffer)
                self._cond.notify_all()
        with self._cond:
            self._running -= 1
            last = self._running == 0
        if last:
            self._inputs.close()

    def _claim(self) -> tuple[int, memoryview] | None:
        """The next task with a buffer for it. Together, so that the result which is due never lacks one."""
        with self._cond:
            self._cond.wait_for(lambda: self._closed or self._begun == len(self._tasks) or bool(self._free))
            if self._closed or self._begun == len(self._tasks):
                return None
            self._begun += 1
            return self._begun - 1, self._free.pop()

    def _read(self, task: ChunkTask, view: memoryview) -> None:
        wanted = self._expected_crc(task)
        try:
            file = self._inputs.get(task.file)
            self._check_size(task, file)
            file.read_into(view, task.start)
            if wanted is None or crc32(view) == wanted:
                return
            with InputFile(self._fs, self._path(task.file), direct=False) as again:
                self._check_size(task, again)
                again.read_into(view, task.start)
            found = crc32(view)
            if found != wanted:
                raise self._checksum_error(task, found, wanted)
            log.warning("%s: the chunk at byte %d was right only when read again", again.path, task.start)
        except IntegrityError as error:
            raise self._gone_or(error) from error
        except StorageError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            missing = TruncatedError(f"{self._path(task.file)} is missing", path=self._path(task.file))
            raise self._gone_or(missing) from error

    def _path(self, file: int) -> str:
        return os.path.join(self._root, self._contents.files[file].path)

    def _expected_crc(self, task: ChunkTask) -> int | None:
        crcs = self._contents.files[task.file].chunk_crcs
        if crcs is None:
            return None
        chunk = task.start // self._contents.chunk_nbytes
        return int(crcs[chunk]) if task == ChunkTask.of(self._contents, task.file, chunk) else None

    def _check_size(self, task: ChunkTask, file: InputFile) -> None:
        expected = self._contents.files[task.file].nbytes
        if file.nbytes != expected:
            raise TruncatedError(f"{file.path} has {file.nbytes} bytes, {expected} were expected", path=file.path)

    def _checksum_error(self, task: ChunkTask, found: int, wanted: int) -> ChecksumError:
        path, chunk = self._path(task.file), task.start // self._contents.chunk_nbytes
        names = names_within(self._contents, task.file, task.window)
        some = ", ".join(repr(name) for name in names[:3]) or "no tensor"
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ChecksumError(
            f"{path}: chunk {chunk} (bytes {task.start} to {task.stop}; {some}{more}) is damaged: "
            f"its crc32 is {found:08x}, the manifest says {wanted:08x}",
            path=path,
            chunk=chunk,
            tensors=names,
        )

    def _manifest_now(self) -> FileStat | None:
        # What cannot be asked is not gone: the reads themselves will tell.
        try:
            return None if self._manifest_path is None else try_stat(self._fs, self._manifest_path)
        except StorageError:
            return None

    def _gone_or(self, error: IntegrityError) -> IntegrityError | CheckpointGoneError:
        if self._manifest_path is None:
            return error
        now = try_stat(self._fs, self._manifest_path)
        if now is not None and (self._seen is None or (now.device, now.inode) == (self._seen.device, self._seen.inode)):
            return error
        return CheckpointGoneError(f"{self._root}: deleted or replaced while it was being read", path=self._root)


def names_within(contents: Contents, file: int, window: tuple[int, int]) -> list[str]:
    """Names of the tensors with bytes in a byte range of a file, in the order of the contents."""
    box = np.repeat(np.arange(len(contents.boxes.file)), contents.box_extents)
    first, nbytes = contents.extent_byte_offset, contents.extent_nbytes
    touched = (contents.boxes.file[box] == file) & (nbytes > 0) & (first < window[1]) & (first + nbytes > window[0])
    tensors = np.unique(contents.boxes.tensor[box[touched]]).tolist()
    return list(dict.fromkeys(contents.tensors[tensor].name for tensor in tensors))


def read_box(
    fs: FileSystem, root_path: str, contents: Contents, tensor: int, box: Box, *, manifest_path: str | None = None
) -> npt.NDArray[Any]:
    """Read one box of one tensor into a new array: only the chunks it needs, each verified. Not collective.

    Of a foreign file, which has no checksums, only the stretch of each chunk that holds the box is read.

    Raises
    ------
    IntegrityError
        If the box is not stored, or damaged; `ChecksumError`, `TruncatedError`.
    CheckpointGoneError, StorageError
    """
    row = contents.tensors[tensor]
    array = np.empty(box.shape, row.dtype.numpy)
    target = Target(box, Port(array, row.dtype.numpy))
    reads = plan_reads(contents, [[Want(tensor, box)]]).reads_of(0)
    segments = [read.deliveries[0].segments for read in reads]
    tasks = [
        _narrow(contents, ChunkTask.of(contents, read.file, read.chunk), target, wanted)
        for read, wanted in zip(reads, segments, strict=True)
    ]
    with ChunkReader(fs, root_path, contents, tasks, manifest_path=manifest_path) as reader:
        for result, wanted in zip(reader.run(), segments, strict=True):
            if result.error is not None:
                raise result.error
            for segment in wanted:
                target.pull(segment, result.task.window, result.data)
    target.check(row.name)
    return array


def _narrow(contents: Contents, task: ChunkTask, target: Target, segments: Sequence[Segment]) -> ChunkTask:
    """The stretch of a chunk that is needed; all of it where there is a checksum to verify."""
    if contents.files[task.file].chunk_crcs is not None:
        return task
    return stretch(task, (copy for segment in segments for copy in target.copies(segment, task.window)[1]))


def stretch(task: ChunkTask, found: Iterable[Copy]) -> ChunkTask:
    """The part of a task that holds these rectangles of its window; not verified, unless it is all of the chunk."""
    spans = [_span(copy) for copy in found]
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    return ChunkTask(task.file, task.start + first, task.start + last)


def _span(copy: Copy) -> tuple[int, int]:
    """From the first to behind the last byte of a rectangle, in its window: its run may be longer on both sides."""
    first = last = 0
    for index, length in zip(copy.run_index, copy.shape, strict=True):
        first, last = first * length + index.start, last * length + index.stop - 1
    return copy.position + first, copy.position + last + 1
