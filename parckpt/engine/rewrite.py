"""New files, and whole new checkpoints, from stored ones: other format, other cut, other place. In bounded memory.

Nothing is loaded: chunks of 4 MiB are read, verified, put in the order of the new file and written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from parckpt.comm.outcome import run_on_all
from parckpt.core import naming
from parckpt.core.layout import Box
from parckpt.core.manifest import Manifest
from parckpt.engine.catalog import find_at
from parckpt.engine.group import Group
from parckpt.engine.keeper import make_directory
from parckpt.engine.source import Source
from parckpt.engine.staging import Modes
from parckpt.engine.transcribe import NewFile, Scribe
from parckpt.errors import CheckpointExistsError, ConfigError, StorageError
from parckpt.formats.base import Format
from parckpt.storage.atomic import temp_path
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["OutputSpec", "Piece", "write_files"]

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Piece:
    """One box in a new file.

    Attributes
    ----------
    name : str
        Its entry there.
    tensor : int
        Row of the tensor in ``source.contents.tensors``.
    box : Box
        The part of it, in global coordinates.
    """

    name: str
    tensor: int
    box: Box


@dataclass(frozen=True)
class OutputSpec:
    """One new file.

    Attributes
    ----------
    path : str
        Absolute.
    append : mapping
        Plain values and arrays after the pieces, as they are (not encoded).
    metadata : mapping
        Of safetensors, beside MindSpore's own.
    crc_check : bool
        Add MindSpore's checksum.
    """

    path: str
    pieces: tuple[Piece, ...]
    append: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    crc_check: bool = False


def write_files(
    group: Group,
    fs: FileSystem,
    source: Manifest,
    root: str,
    outputs: Sequence[OutputSpec],
    form: Format,
    *,
    modes: Modes,
    on_bytes: OnBytes | None = None,
    manifest_path: str | None = None,
) -> None:
    """Write files, without a manifest, from the boxes of a checkpoint. Collective over ``group``.

    Output k is written by rank k % size. Each file appears whole or not at all, and replaces what has its name; those
    that were written before another failed stay. Missing directories are made.

    Parameters
    ----------
    source : Manifest
        Ours, or `engine.foreign.open_foreign`'s after `without_checksums`.
    root : str
        Directory that the source's files are relative to.
    outputs : sequence of OutputSpec
        Equal on all ranks.
    on_bytes : callable, optional
        Called with bytes of tensors that this rank has read.
    manifest_path : str, optional
        Of the source, to tell its deletion from damage.

    Raises
    ------
    CheckpointExistsError
        A path is a file of the source, or of a published checkpoint; nothing was written.
    ParckptError
        The same on all ranks; `IntegrityError` names what is damaged in the source.
    """
    stored = Source(fs, root, root, source, manifest_path)
    scribe = Scribe(stored, form, on_bytes=on_bytes)

    def write_own() -> None:
        for spec in outputs[group.rank :: group.size]:
            _write_output(fs, scribe, stored, spec, modes)

    run_on_all(group.comm, lambda: _check_outputs(fs, stored, outputs), group.waiter)
    run_on_all(group.comm, write_own, group.waiter)


def _write_output(fs: FileSystem, scribe: Scribe, source: Source, spec: OutputSpec, modes: Modes) -> None:
    tensors = source.contents.tensors
    file = NewFile(
        [piece.tensor for piece in spec.pieces],
        [(replace(tensors[piece.tensor], name=piece.name, per_rank=-1), piece.box) for piece in spec.pieces],
        spec.append,
        spec.metadata,
        crc_check=spec.crc_check,
    )
    directory = os.path.dirname(spec.path)
    make_directory(fs, directory, modes.directory)
    temp = temp_path(spec.path)
    try:
        scribe.write(file, temp, modes.file)
        fs.rename(temp, spec.path)
    except BaseException:
        with suppress(StorageError):
            fs.unlink(temp)
        raise
    fs.sync_directory(directory)


def _check_outputs(fs: FileSystem, source: Source, outputs: Sequence[OutputSpec]) -> None:
    """Before anything is written, on every rank alike."""
    own = {os.path.join(source.root, file.path) for file in source.contents.files}
    seen: set[str] = set()
    for spec in outputs:
        names = [piece.name for piece in spec.pieces]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"two entries of {spec.path} would be called {twice!r}", path=spec.path)
        if spec.path in seen:
            raise ConfigError(f"two files would be called {spec.path}", path=spec.path)
        seen.add(spec.path)
        if spec.path in own:
            raise CheckpointExistsError(f"{spec.path} is a file that is being read", path=spec.path)
        if try_stat(fs, spec.path) is not None and _is_published(fs, spec.path):
            raise CheckpointExistsError(f"{spec.path} belongs to a published checkpoint", path=spec.path)


def _is_published(fs: FileSystem, path: str) -> bool:
    """Whether a file is a checkpoint with a manifest, or one of the files of one."""
    directory = os.path.dirname(path)
    in_step = naming.parse_rank_directory(os.path.basename(directory)) is not None
    manifest = os.path.join(os.path.dirname(directory), naming.MANIFEST)
    return find_at(fs, path) is not None or (in_step and try_stat(fs, manifest) is not None)
