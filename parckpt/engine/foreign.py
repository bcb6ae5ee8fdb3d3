"""Files without a manifest: MindSpore's, or anybody's. Indexed from headers, checked as far as the format allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from parckpt.core import naming
from parckpt.core.crc import crc32
from parckpt.core.manifest import CHUNK_NBYTES, Manifest
from parckpt.core.strategy import Strategy
from parckpt.engine.assembly import Assembly, RankFile, blocks
from parckpt.engine.rankfiles import given_files, rank_files
from parckpt.errors import CheckpointNotFoundError, ChecksumError, ConfigError, FormatError
from parckpt.formats.base import Entry, FileIndex, IndexedEntry
from parckpt.formats.registry import FORMATS
from parckpt.formats.safetensors import content_crc, file_crc
from parckpt.storage.direct import InputFile
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["cipher_of", "encrypted", "format_of", "index_file", "load_all", "open_foreign", "verify_crc"]
__all__ += ["without_checksums"]

# The first bytes of MindSpore's encrypted files.
_CIPHERS = {b"\xd8\x5e\x3a\x7f": "AES-GCM", b"\xd9\x5e\x3a\x7f": "AES-CBC", b"\xda\x5e\x3a\x7f": "SM4-CBC"}


def open_foreign(
    fs: FileSystem,
    path: str,
    *,
    check: bool = True,
    form: str | None = None,
    strategy: Strategy | None = None,
    files: Sequence[str] | Mapping[int, str] | None = None,
    complete: bool = True,
    counters: bool = True,
) -> Manifest:
    """Describe a file, or a directory of ``rank_<n>`` directories, as a checkpoint without checksums.

    Not collective. A checksum that the files carry is verified, unless `check` is False: of a single file only the
    header is read then.

    Without a strategy a tensor that several rank files hold must be the same in all of them: slices cannot be told
    from replicas. With one, the files' entries are the boxes that it says, of which each must be there at least once;
    replicas are compared if `check` is True. What the strategy does not name must be the same in all files; of single
    numbers that differ the first rank's is taken, with a warning in the log, as MindSpore does with all of them.

    Parameters
    ----------
    form : str, optional
        Format of the files. Default: by their extension.
    strategy : Strategy, optional
        How tensors are cut. Without ``rank_<n>`` directories, `path` is the file of rank 0.
    files : sequence of str or mapping of int to str, optional
        The file of each rank, in `path`. Default: of each ``rank_<n>`` the one of the latest name that all have.
    complete : bool
        False: parts of tensors may be in no file; reading them is an error then.
    counters : bool
        False: MindSpore's counters (``step_num``, ``epoch_num``) are tensors like any other.

    Raises
    ------
    CheckpointNotFoundError, FormatError, ChecksumError, LayoutError
    """
    stat = try_stat(fs, path)
    if stat is None:
        raise CheckpointNotFoundError(f"there is no checkpoint at {path}", path=path)
    if files is not None:
        root, names = path, given_files(path, files)
    elif stat.is_dir:
        root, names = path, rank_files(fs, path, partial=strategy is not None)
    else:
        root, names = os.path.dirname(path) or ".", {0: os.path.basename(path)}
    opened = []
    for rank, name in names.items():
        index, nbytes = index_file(fs, os.path.join(root, name), form)
        if check:
            verify_crc(fs, os.path.join(root, name), index)
        opened.append(RankFile(rank, name, index, nbytes))
    assembly = Assembly(fs, root, opened, strategy=strategy, check=check, complete=complete, counters=counters)
    return assembly.manifest(path)


def without_checksums(manifest: Manifest) -> Manifest:
    """Mark the chunks of a foreign checkpoint as unknown, after it came over the wire."""
    contents = manifest.contents
    files = tuple(replace(file, chunk_crcs=None) for file in contents.files)
    return Manifest(manifest.facts, replace(contents, files=files))


def format_of(path: str) -> str:
    """Format by a file's extension; ConfigError if it is none of ours."""
    extension = os.path.splitext(path)[1].lstrip(".")
    for name, known in naming.EXTENSIONS.items():
        if extension == known and name in FORMATS:
            return name
    raise ConfigError(f"{path} should end with {' or '.join(FORMATS[name].extension for name in FORMATS)}", path=path)


def index_file(fs: FileSystem, path: str, format_name: str | None = None) -> tuple[FileIndex, int]:
    """Headers of a file, and its size. Kilobytes are read.

    Raises
    ------
    ConfigError
        If it is encrypted, or has no extension of ours where no format is given.
    FormatError
    """
    form = FORMATS[format_name or format_of(path)]
    with InputFile(fs, path, direct=False) as source:
        cipher = _cipher(source)
        if cipher is not None:
            raise ConfigError(encrypted(path, cipher), path=path)
        return form.read_index(source), source.nbytes


def cipher_of(fs: FileSystem, path: str) -> str | None:
    """Cipher of an encrypted file of MindSpore's, told by its first bytes; None for any other file."""
    with InputFile(fs, path, direct=False) as source:
        return _cipher(source)


def encrypted(path: str, cipher: str) -> str:
    """What to say of an encrypted file, which is not damage."""
    return f"{path} is encrypted with {cipher}: parckpt cannot read encrypted files yet"


def _cipher(source: InputFile) -> str | None:
    return _CIPHERS.get(bytes(source.read(0, 4))) if source.nbytes >= 4 else None


def verify_crc(fs: FileSystem, path: str, index: FileIndex, *, required: bool = False) -> None:
    """Check MindSpore's own checksum of a file, reading it once.

    Raises
    ------
    ChecksumError
        If it does not match, or is missing where one is ``required``.
    """
    if index.crc is None:
        if required:
            raise ChecksumError(f"{path} carries no crc, though a check was asked for", path=path)
        return
    if any(item.kind == "map" for item in index.entries) and not required:
        return  # MindSpore leaves maps out of its crc, so that of a file with maps never matches
    with InputFile(fs, path) as source:
        found = _ckpt_crc(source, index) if index.format == "ckpt" else _safetensors_crc(source, index)
    if found != index.crc:
        raise ChecksumError(f"{path}: crc {index.crc} stored, {found} computed", path=path)


def _ckpt_crc(source: InputFile, index: FileIndex) -> int:
    crc = 0
    for start in range(0, index.body_nbytes, CHUNK_NBYTES):
        crc = crc32(source.read(start, min(CHUNK_NBYTES, index.body_nbytes - start)), crc)
    return crc


def _safetensors_crc(source: InputFile, index: FileIndex) -> int:
    results = []
    for item in index.entries:
        crc, content = 0, b""
        for block in blocks(source, item.extents):
            crc = crc32(block, crc)
            content = block if item.shape == () else b""
        entry = Entry(item.name, item.type, item.shape, item.nbytes)
        results.append((item.name, content_crc(entry, crc, content if item.shape == () else None)))
    return file_crc(results)


def load_all(fs: FileSystem, path: str, format_name: str | None, keep: Callable[[str], bool]) -> dict[str, Any]:
    """Read a whole foreign file: arrays, strings, and maps as [keys, values, status]. A checksum it has is verified."""
    index, nbytes = index_file(fs, path, format_name)
    if not index.entries:
        # Also what is left of a file whose writing never began.
        raise FormatError(f"{path} ({nbytes} bytes) holds no tensors", path=path, byte_offset=0, field="file")
    verify_crc(fs, path, index)
    # Of safetensors the library that wrote it chose the order: MindSpore gives them by name.
    entries = sorted(index.entries, key=lambda item: item.name) if index.format == "safetensors" else index.entries
    with InputFile(fs, path) as source:
        return {item.name: _load(source, item) for item in entries if keep(item.name)}


def _load(source: InputFile, item: IndexedEntry) -> Any:
    if item.kind == "str":
        return item.text
    if item.kind == "map":
        return [_load(source, part) for part in item.parts]
    assert item.dtype is not None
    array = np.empty(item.shape, item.dtype.numpy)
    view = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # an array is a buffer
    for extent in item.extents:
        source.read_into(view[extent.start : extent.start + extent.nbytes], extent.byte_offset)
    return array
