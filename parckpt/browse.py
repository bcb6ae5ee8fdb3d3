"""Looking at checkpoints without loading them: list, inspect, open lazily. Nothing here is collective."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core import appended, values
from parckpt.core.contents import Contents
from parckpt.core.layout import Box
from parckpt.core.manifest import Manifest
from parckpt.core.strategy import Strategy
from parckpt.engine import foreign, notyet
from parckpt.engine.catalog import Found, find_at, load_manifest, scan
from parckpt.engine.reading import read_box
from parckpt.errors import (
    CheckpointNotFoundError,
)
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat
from parckpt.strategies import as_strategy

__all__ = ["Checkpoint", "CheckpointInfo", "inspect", "latest_checkpoint", "list_checkpoints", "open_checkpoint"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known of a checkpoint without reading its data.

    Attributes
    ----------
    path : str
    step, epoch, step_in_epoch, sequence : int
    prefix, format, reason, kind : str
    created : float
        Wall clock, seconds since the epoch.
    world_size, nbytes, tensors : int
        Ranks that saved it, bytes of its data files, number of tensors.
    integrated, consistent : bool
    problem : str or None
        Why it cannot be loaded, as far as that is seen without reading data.
    ephemeral : bool
        It lives only until the next publish.
    metrics : mapping
        What `ModelCheckpoint.step_end` was told of its step.
    """

    path: str
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    sequence: int = 0
    prefix: str = ""
    format: str = ""
    reason: str = ""
    kind: str = ""
    created: float = 0.0
    world_size: int = 0
    nbytes: int = 0
    tensors: int = 0
    integrated: bool = True
    consistent: bool = True
    problem: str | None = None
    ephemeral: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


def list_checkpoints(
    directory: str | os.PathLike[str], *, prefix: str | None = None, filesystem: FileSystem | None = None
) -> list[CheckpointInfo]:
    """List the published checkpoints of a directory, newest first; unreadable ones last. Not collective."""
    fs = filesystem if filesystem is not None else PosixFileSystem()
    return [_info(found) for found in scan(fs, os.path.abspath(os.fspath(directory)), prefix)]


def latest_checkpoint(
    directory: str | os.PathLike[str], *, prefix: str | None = None, filesystem: FileSystem | None = None
) -> str | None:
    """Path of the newest checkpoint that restore would try first; None if there is none. Not collective."""
    usable = [
        info
        for info in list_checkpoints(directory, prefix=prefix, filesystem=filesystem)
        if info.problem is None and info.consistent
    ]
    return usable[0].path if usable else None


def inspect(path: str | os.PathLike[str], *, filesystem: FileSystem | None = None) -> CheckpointInfo:
    """What is known of the checkpoint at a path. Not collective; reads kilobytes.

    Raises
    ------
    CheckpointNotFoundError
        If there is none, or it has no manifest.
    """
    fs = filesystem if filesystem is not None else PosixFileSystem()
    absolute = os.path.abspath(os.fspath(path))
    found = find_at(fs, absolute) if try_stat(fs, absolute) is not None else None
    if found is None:
        raise CheckpointNotFoundError(f"there is no checkpoint with a manifest at {absolute}", path=absolute)
    return _info(found)


def _info(found: Found) -> CheckpointInfo:
    facts = found.facts
    if facts is None:
        return CheckpointInfo(found.path, problem=found.error.message if found.error is not None else "unreadable")
    problem: str | None = found.error.message if found.error is not None else None
    if found.set_aside is not None:
        problem = f"set aside: {found.set_aside}"
    return CheckpointInfo(
        path=found.path,
        step=facts.step,
        epoch=facts.epoch,
        step_in_epoch=facts.step_in_epoch,
        sequence=facts.sequence,
        prefix=facts.prefix,
        format=facts.format,
        reason=facts.reason,
        kind=facts.kind,
        created=facts.created,
        world_size=facts.world_size,
        nbytes=facts.nbytes,
        tensors=facts.tensor_count,
        integrated=facts.integrated,
        consistent=facts.consistent,
        problem=problem,
        ephemeral=facts.ephemeral,
        metrics=dict(facts.metrics),
    )


def open_checkpoint(
    path: str | os.PathLike[str],
    dec_key: bytes | None = None,
    *,
    strategy: Strategy | str | os.PathLike[str] | None = None,
    filesystem: FileSystem | None = None,
) -> Checkpoint:
    """Open a file or step directory lazily: only what is indexed is read, and verified. Not collective.

    What has no manifest (MindSpore's files) can be read, but not verified, in parts; files of several ranks need the
    ``strategy`` by which tensors were cut, unless none were.
    """
    notyet.refuse(enc_key=dec_key)
    fs = filesystem if filesystem is not None else PosixFileSystem()
    absolute = os.path.abspath(os.fspath(path))
    if try_stat(fs, absolute) is None:
        raise CheckpointNotFoundError(f"there is no checkpoint at {absolute}", path=absolute)
    found = find_at(fs, absolute)
    if found is not None:
        return Checkpoint(fs, found.path, found.root, load_manifest(fs, found), found.manifest_path)
    stat = try_stat(fs, absolute)
    is_dir = stat is not None and stat.is_dir
    cuts = as_strategy(strategy, fs) if is_dir else None
    manifest = foreign.without_checksums(foreign.open_foreign(fs, absolute, check=False, strategy=cuts))
    root = absolute if is_dir else os.path.dirname(absolute)
    return Checkpoint(fs, absolute, root, manifest)


class Checkpoint(Mapping[str, "StoredArray"]):
    """The tensors of one checkpoint by name; nothing is read before it is indexed.

    Attributes
    ----------
    path : str
    step : int
    values_by_name, append_dict : dict
        Plain values, decoded.
    """

    def __init__(
        self, fs: FileSystem, path: str, root: str, manifest: Manifest, manifest_path: str | None = None
    ) -> None:
        self.path = path
        self._manifest_path = manifest_path
        self._fs, self._root, self._manifest = fs, root, manifest
        facts = manifest.facts
        self.step = facts.step
        self.values_by_name = {name: values.decode(value) for name, value in facts.values.items()}
        self.append_dict = {name: appended.decode(value) for name, value in facts.append.items()}
        contents = manifest.contents
        self._rows = {tensor.file_name: row for row, tensor in enumerate(contents.tensors)}

    def __getitem__(self, name: str) -> StoredArray:
        return StoredArray(self._fs, self._root, self._manifest.contents, self._rows[name], self._manifest_path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: step {self.step}, {len(self)} tensors>"


class StoredArray:
    """One stored tensor: ``c["w"][2:5]`` reads and verifies just the chunks that hold those rows."""

    def __init__(
        self, fs: FileSystem, root: str, contents: Contents, row: int, manifest_path: str | None = None
    ) -> None:
        self._fs, self._root, self._contents, self._row = fs, root, contents, row
        self._manifest_path = manifest_path

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape."""
        return self._contents.tensors[self._row].global_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self._contents.tensors[self._row].dtype.numpy

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a stored array cannot be had without a copy")
        array: Array = self[...]
        return array if dtype is None else array.astype(dtype)

    def __getitem__(self, index: Any) -> Any:
        """Read a part: integers, slices and ``...``, as in NumPy."""
        offsets, shape, rest = _bounding(self.shape, index)
        box = Box(offsets, shape)
        array = read_box(self._fs, self._root, self._contents, self._row, box, manifest_path=self._manifest_path)
        return array[rest]

    def __repr__(self) -> str:
        return f"<StoredArray {self._contents.tensors[self._row].name}: {self.dtype}{list(self.shape)}>"


def _bounding(shape: tuple[int, ...], index: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
    """The box that holds everything an index asks for, and the index into that box."""
    items = list(index) if isinstance(index, tuple) else [index]
    dots = [at for at, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1 or len(items) - len(dots) > len(shape):
        raise IndexError(f"index {index!r} does not fit shape {shape}")
    for at in dots:
        items[at : at + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    items += [slice(None)] * (len(shape) - len(items))
    offsets: list[int] = []
    lengths: list[int] = []
    rest: list[Any] = []
    for item, length in zip(items, shape, strict=True):
        if isinstance(item, slice):
            start, stop, step = item.indices(length)
            chosen = range(start, stop, step)
            low, high = (min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1]) + 1) if len(chosen) else (0, 0)
            offsets.append(low)
            lengths.append(high - low)
            rest.append(slice(None, None, step))
        elif isinstance(item, (int, np.integer)) and not isinstance(item, bool):
            position = int(item) + length if item < 0 else int(item)
            if not 0 <= position < length:
                raise IndexError(f"index {item} is out of range for a dimension of {length}")
            offsets.append(position)
            lengths.append(1)
            rest.append(0)
        else:
            raise TypeError(f"only integers, slices and ... can index a stored array, not {item!r}")
    # As in NumPy, integers alone give a scalar, with ... an array of no dimensions.
    return tuple(offsets), tuple(lengths), (*rest, ...) if dots else tuple(rest)
