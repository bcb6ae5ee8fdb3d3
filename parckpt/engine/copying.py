"""The same checkpoint in another directory, byte for byte, every chunk verified on the way."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from parckpt.comm.outcome import run_on_all
from parckpt.comm.wait import SystemClock
from parckpt.core import naming
from parckpt.core.clock import Clock
from parckpt.core.contents import BoxColumns, Contents, StoredFile, chunk_count
from parckpt.core.manifest import CHUNK_NBYTES, Facts
from parckpt.engine import foreign
from parckpt.engine.catalog import MAX_MANIFEST_NBYTES, find_at, load_manifest
from parckpt.engine.chunks import NBUFFERS, ChunkWriter
from parckpt.engine.group import Group
from parckpt.engine.reading import ChunkReader, ChunkTask
from parckpt.engine.republish import Publisher
from parckpt.engine.staging import Modes
from parckpt.engine.survey import data_files
from parckpt.engine.transcribe import OnBytes
from parckpt.errors import CheckpointGoneError, CheckpointNotFoundError, ChecksumError, FormatError, StorageError
from parckpt.formats.registry import FORMATS
from parckpt.storage.atomic import read_file
from parckpt.storage.direct import OutputFile, aligned_buffer
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["Original", "copy_checkpoint", "open_original"]

_BATCH = 1024  # chunks planned at a time: 4 GiB


@dataclass(frozen=True)
class Original:
    """A checkpoint to be copied.

    Attributes
    ----------
    path : str
    root : str
        Directory that the file names are relative to.
    facts : Facts
        With the name that it has; of one without a manifest made up.
    contents : Contents
        Of one without a manifest only the files.
    manifest_path : str or None
    manifest : bytes
        As it lies on disk; empty where there is none.
    has_checksums : bool
        Whether every file can be verified, be it by MindSpore's own checksum.
    """

    fs: FileSystem = field(repr=False)
    path: str
    root: str
    facts: Facts
    contents: Contents
    manifest_path: str | None
    manifest: bytes = field(repr=False)
    has_checksums: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its data files."""
        return sum(file.nbytes for file in self.contents.files)


def open_original(fs: FileSystem, path: str) -> Original:
    """Open a step directory, a data file, or a directory of ``rank_<n>`` directories. Not collective.

    A checksum that a file without a manifest carries is verified here.

    Raises
    ------
    CheckpointNotFoundError, IntegrityError, FormatError
    """
    if try_stat(fs, path) is None:
        raise CheckpointNotFoundError(f"there is no checkpoint at {path}", path=path)
    found = find_at(fs, path)
    if found is None:
        return _open_foreign(fs, path)
    manifest = load_manifest(fs, found)
    try:
        data = read_file(fs, found.manifest_path, MAX_MANIFEST_NBYTES)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        raise CheckpointGoneError(f"{path} was deleted while it was being read", path=path) from error
    facts = replace(manifest.facts, stem=found.stem, integrated=not found.is_directory)
    return Original(fs, found.path, found.root, facts, manifest.contents, found.manifest_path, data, True)


def _open_foreign(fs: FileSystem, path: str) -> Original:
    is_dir = fs.stat(path).is_dir
    root = path if is_dir else os.path.dirname(path)
    files: list[StoredFile] = []
    has_checksums = True
    form = ""
    for name in data_files(fs, path):
        index, nbytes = foreign.index_file(fs, name)
        if not index.entries:
            raise FormatError(f"{name} ({nbytes} bytes) holds no tensors", path=name, byte_offset=0, field="file")
        foreign.verify_crc(fs, name, index)
        files.append(StoredFile(os.path.relpath(name, root), nbytes, None))
        has_checksums &= index.crc is not None
        form = index.format
    none = np.zeros(0, "<u8")
    boxes = BoxColumns(np.zeros(0, "<u4"), np.zeros(0, "<u4"), np.zeros(0, "<i8"))
    counts = np.zeros(0, "<u4")
    contents = Contents((), tuple(files), boxes, counts, (), counts, none, none, none, CHUNK_NBYTES, not is_dir)
    name = os.path.basename(path)
    stem = name if is_dir else name.removesuffix(FORMATS[form].extension)
    some = secrets.token_hex(16)
    facts = Facts(
        *(stem, some[:16], some, some, stem, stem),
        sequence=0,
        step=0,
        epoch=0,
        step_in_epoch=0,
        world_size=1,
        format=form,
        integrated=not is_dir,
        created=0.0,
    )
    return Original(fs, path, root, facts, contents, None, b"", has_checksums)


def copy_checkpoint(
    group: Group,
    original: Original,
    directory: str,
    *,
    modes: Modes,
    on_bytes: OnBytes | None = None,
    clock: Clock | None = None,
) -> str:
    """Publish a copy of a checkpoint, under its names, in another directory; returns its path.

    Collective over ``group``. File k is copied by rank k % size. Data and manifest are the same bytes; of a checkpoint
    without a manifest, every data file in it.

    Parameters
    ----------
    directory : str
        Absolute; made if it is missing.
    on_bytes : callable, optional
        Called with bytes of files that this rank has copied.

    Raises
    ------
    CheckpointExistsError
        The name is taken, and not by the same step of the same run.
    IntegrityError, NoSpaceError, LockedError, ParckptError
        The same on all ranks. Nothing is there, and the original is untouched.
    """
    publisher = Publisher(
        original.fs,
        directory,
        original.facts,
        reading=original.path,
        nbytes=original.nbytes,
        modes=modes,
        clock=clock if clock is not None else SystemClock(),
    )
    copying = _Copying(original, publisher, modes, on_bytes or (lambda nbytes: None))
    numbers = range(group.rank, len(original.contents.files), group.size)
    publish: Callable[[], str] = lambda: publisher.publish(original.manifest) if group.is_root else ""  # noqa: E731
    with ExitStack() as stack:
        run_on_all(group.comm, lambda: stack.enter_context(publisher) if group.is_root else None, group.waiter)
        run_on_all(group.comm, lambda: copying.copy(numbers), group.waiter)
        path = run_on_all(group.comm, publish, group.waiter)
        return os.fsdecode(group.bcast(os.fsencode(path) if group.is_root else None))


@dataclass(frozen=True)
class _Copying:
    """This rank's part."""

    original: Original
    publisher: Publisher
    modes: Modes
    on_bytes: OnBytes
    buffers: list[memoryview] = field(default_factory=lambda: [aligned_buffer(CHUNK_NBYTES) for _ in range(NBUFFERS)])

    def copy(self, numbers: Iterable[int]) -> None:
        """Files, each synced with its directory."""
        for number in numbers:
            self._copy(number)

    def _copy(self, number: int) -> None:
        fs, staging = self.original.fs, self.publisher.staging
        file = self.original.contents.files[number]
        relative = staging.data_path(0) if self.original.facts.integrated else file.path
        path = os.path.join(staging.path, relative)
        parent = os.path.dirname(path)
        rank = naming.parse_rank_directory(os.path.basename(parent))
        if rank is not None:
            _make_once(fs, lambda: staging.make_rank_directory(rank), parent)
        with OutputFile(fs, path, file.nbytes, mode=self.modes.file) as output:
            with ChunkWriter(output, file.nbytes, self.buffers) as writer:
                for batch in self._batches(number):
                    self._stream(batch, writer)
                writer.finish()
            output.finish(file.nbytes)
        if file.chunk_crcs is not None and not np.array_equal(writer.chunk_crcs, file.chunk_crcs):
            # The chunks were right when they were read, so it is this machine's memory.
            raise ChecksumError(f"{path}: what was written is not what was read", path=path)
        fs.sync_directory(parent)

    def _stream(self, batch: list[ChunkTask], writer: ChunkWriter) -> None:
        original = self.original
        with ChunkReader(
            original.fs, original.root, original.contents, batch, manifest_path=original.manifest_path
        ) as reader:
            for result in reader.run():
                if result.error is not None:
                    raise result.error
                writer.append(result.data)
                self.on_bytes(len(result.data))

    def _batches(self, number: int) -> Iterator[list[ChunkTask]]:
        contents = self.original.contents
        count = chunk_count(contents.files[number].nbytes, contents.chunk_nbytes)
        for first in range(0, count, _BATCH):
            yield [ChunkTask.of(contents, number, k) for k in range(first, min(first + _BATCH, count))]


def _make_once(fs: FileSystem, make: Callable[[], None], path: str) -> None:
    """Ranks that copy files of one directory may meet."""
    if try_stat(fs, path) is not None:
        return
    try:
        make()
    except StorageError as error:
        if error.errno != errno.EEXIST:
            raise
