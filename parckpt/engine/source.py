"""Any checkpoint that can be read, ours or foreign, opened in one way. Not collective, takes no lock."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core import naming
from parckpt.core.contents import Contents
from parckpt.core.layout import Box
from parckpt.core.manifest import Facts, Manifest
from parckpt.core.readplan import Want, plan_reads
from parckpt.core.strategy import Strategy
from parckpt.core.transfer import Port
from parckpt.engine import foreign
from parckpt.engine.catalog import find_at, load_manifest
from parckpt.engine.reading import ChunkReader, ChunkResult, ChunkTask, stretch
from parckpt.engine.targets import Target
from parckpt.errors import CheckpointNotFoundError, ConfigError, FormatError
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["BoxReading", "Source", "open_source"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Source:
    """An open checkpoint.

    Attributes
    ----------
    path : str
    root : str
        Directory that the file names in `contents` are relative to.
    manifest : Manifest
        Of a foreign checkpoint what its headers say; its chunks have no checksums.
    manifest_path : str or None
        None: foreign.
    """

    fs: FileSystem = field(repr=False)
    path: str
    root: str
    manifest: Manifest
    manifest_path: str | None

    @property
    def facts(self) -> Facts:
        """Facts of the whole checkpoint; of a foreign one mostly empty."""
        return self.manifest.facts

    @property
    def contents(self) -> Contents:
        """What the files hold."""
        return self.manifest.contents

    @property
    def is_foreign(self) -> bool:
        """Whether it has no manifest."""
        return self.manifest_path is None


def open_source(fs: FileSystem, path: str, *, check: bool = False, strategy: Strategy | None = None) -> Source:
    """Open a step directory, a data file, or a directory of ``rank_<n>`` directories.

    Only the manifest is read, or, where there is none, the headers of the files.

    Parameters
    ----------
    check : bool
        Read files without a manifest once in full, to verify the checksum that they may carry, and compare replicas.
    strategy : Strategy, optional
        How the files of a directory without a manifest are cut.

    Raises
    ------
    CheckpointNotFoundError
        If there is nothing, or a directory that is no checkpoint itself.
    ConfigError
        A strategy for what has a manifest.
    IntegrityError, FormatError, LayoutError
    """
    if try_stat(fs, path) is None:
        raise CheckpointNotFoundError(f"there is no checkpoint at {path}", path=path)
    found = find_at(fs, path)
    if found is not None:
        if strategy is not None:
            raise ConfigError(f"{path} has a manifest, which says how it is cut: it takes no strategy", path=path)
        return Source(fs, found.path, found.root, load_manifest(fs, found), found.manifest_path)
    _check_is_one(fs, path)
    manifest = foreign.without_checksums(foreign.open_foreign(fs, path, check=check, strategy=strategy))
    if not manifest.contents.tensors and not manifest.facts.append:
        # Also what is left of a file whose writing never began.
        raise FormatError(f"{path} holds no tensors", path=path, byte_offset=0, field="file")
    root = path if fs.stat(path).is_dir else os.path.dirname(path)
    return Source(fs, path, root, manifest, None)


def _check_is_one(fs: FileSystem, path: str) -> None:
    """A directory full of checkpoints is a frequent mistake: say what to do instead."""
    if fs.stat(path).is_dir and not any(naming.parse_rank_directory(name) is not None for name in fs.listdir(path)):
        raise CheckpointNotFoundError(f"{path} is not a checkpoint itself; parckpt ls lists what is in it", path=path)


class BoxReading:
    """Reads boxes of one source, batch by batch, with the least reading that leaves nothing unverified.

    The first time a chunk is needed all of it is read and compared with its checksum; when a later batch needs more
    of it, only that stretch is read. So everything is read twice at most, however small the batches and however the
    boxes lie in the files, with memory for one batch only.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._verified: set[tuple[int, int]] = set()  # file and first byte of chunks that fitted their checksums
        self.nbytes = 0  # read so far

    @contextmanager
    def start(self, boxes: Sequence[tuple[int, Box]]) -> Iterator[_Batch]:
        """Begin to read some boxes (tensor number and box) in the background; the batch gives them as arrays."""
        contents = self._source.contents
        targets = [_target(contents, tensor, box) for tensor, box in boxes]
        reads = plan_reads(contents, [[Want(tensor, box) for tensor, box in boxes]]).reads_of(0)
        segments = [read.deliveries[0].segments for read in reads]
        tasks = []
        for read, wanted in zip(reads, segments, strict=True):
            task = ChunkTask.of(contents, read.file, read.chunk)
            if contents.files[task.file].chunk_crcs is None or (task.file, task.start) in self._verified:
                task = stretch(task, (c for s in wanted for c in targets[s.want].copies(s, task.window)[1]))
            tasks.append(task)
        source = self._source
        with ChunkReader(source.fs, source.root, contents, tasks, manifest_path=source.manifest_path) as reader:
            names = [contents.tensors[tensor].name for tensor, _ in boxes]
            yield _Batch(reader, targets, segments, names, self._read)

    def _read(self, result: ChunkResult) -> None:
        self.nbytes += len(result.data)
        self._verified.add((result.task.file, result.task.start))


class _Batch:
    """Boxes that are being read."""

    def __init__(
        self, reader: ChunkReader, targets: list[Target], segments: list[Any], names: list[str], on_read: Any
    ) -> None:
        self._reader, self._targets, self._segments = reader, targets, segments
        self._names, self._on_read = names, on_read

    def arrays(self) -> list[Array]:
        """The boxes, in the order asked for; raises what is wrong with the first chunk that is not sound."""
        for result, wanted in zip(self._reader.run(), self._segments, strict=True):
            if result.error is not None:
                raise result.error
            self._on_read(result)
            for segment in wanted:
                self._targets[segment.want].pull(segment, result.task.window, result.data)
        for target, name in zip(self._targets, self._names, strict=True):
            target.check(name)
        return [target.port.array for target in self._targets]


def _target(contents: Contents, tensor: int, box: Box) -> Target:
    dtype = contents.tensors[tensor].dtype.numpy
    return Target(box, Port(np.empty(box.shape, dtype), dtype))
