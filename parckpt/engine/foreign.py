"""Files without a manifest: MindSpore's, or anybody's. Indexed from headers, checked as far as the format allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parckpt.core import naming, values
from parckpt.core.contents import Contents, Extent, StoredFile, box_columns, chunk_count
from parckpt.core.crc import crc32
from parckpt.core.layout import whole
from parckpt.core.manifest import CHUNK_NBYTES, Facts, Manifest
from parckpt.core.tensors import TensorRow
from parckpt.errors import CheckpointNotFoundError, ChecksumError, ConfigError, FormatError, LayoutError
from parckpt.formats.base import Entry, FileIndex, IndexedEntry
from parckpt.formats.registry import FORMATS
from parckpt.formats.safetensors import content_crc, file_crc
from parckpt.storage.direct import InputFile
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["format_of", "index_file", "load_all", "open_foreign", "verify_crc", "without_checksums"]

# MindSpore's appended counters are facts of the run, not tensors of the model.
_COUNTERS = ("epoch_num", "step_num")


@dataclass(frozen=True)
class _Indexed:
    path: str  # relative to the checkpoint
    index: FileIndex
    nbytes: int


def open_foreign(fs: FileSystem, path: str, *, check: bool = True, form: str | None = None) -> Manifest:
    """Describe a file, or a directory of ``rank_<n>`` directories, as a checkpoint without checksums.

    Not collective. A checksum that the files carry is verified, unless ``check`` is False: of a single file only the
    header is read then. A tensor that several rank files hold must be the same in all of them: without a layout,
    slices cannot be told from replicas.

    Raises
    ------
    CheckpointNotFoundError, FormatError, ChecksumError, LayoutError
    """
    stat = try_stat(fs, path)
    if stat is None:
        raise CheckpointNotFoundError(f"there is no checkpoint at {path}", path=path)
    root, names = (
        (path, _rank_files(fs, path)) if stat.is_dir else (os.path.dirname(path) or ".", [os.path.basename(path)])
    )
    files = []
    for name in names:
        index, nbytes = index_file(fs, os.path.join(root, name), form)
        if check:
            verify_crc(fs, os.path.join(root, name), index)
        files.append(_Indexed(name, index, nbytes))
    return _manifest(fs, root, path, files)


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
    """Headers of a file, and its size. Kilobytes are read."""
    with InputFile(fs, path, direct=False) as source:
        return FORMATS[format_name or format_of(path)].read_index(source), source.nbytes


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
        for block in _blocks(source, item.extents):
            crc = crc32(block, crc)
            content = block if item.shape == () else b""
        entry = Entry(item.name, item.type, item.shape, item.nbytes)
        results.append((item.name, content_crc(entry, crc, content if item.shape == () else None)))
    return file_crc(results)


def _blocks(source: InputFile, extents: Iterable[Any]) -> Iterator[bytes]:
    for extent in extents:
        for start in range(0, extent.nbytes, CHUNK_NBYTES):
            yield source.read(extent.byte_offset + start, min(CHUNK_NBYTES, extent.nbytes - start))


def _rank_files(fs: FileSystem, path: str) -> list[str]:
    """One file of each ``rank_<n>`` directory: those of the latest name that all of them have."""
    ranks = sorted(rank for name in fs.listdir(path) if (rank := naming.parse_rank_directory(name)) is not None)
    if not ranks:
        raise CheckpointNotFoundError(f"{path} has neither a manifest nor rank_<n> directories", path=path)
    if ranks != list(range(len(ranks))):
        missing = sorted(set(range(ranks[-1])) - set(ranks))
        raise FormatError(f"{path}: the directories of ranks {missing} are missing", path=path, field="rank")
    known = [f".{naming.EXTENSIONS[name]}" for name in FORMATS]
    listed = [
        {n for n in fs.listdir(os.path.join(path, f"rank_{rank}")) if os.path.splitext(n)[1] in known} for rank in ranks
    ]
    common = set.intersection(*listed)
    if not common:
        raise FormatError(
            f"{path}: no file name is in all of its {len(ranks)} rank directories", path=path, field="rank"
        )
    latest = max(common, key=_order)
    return [f"rank_{rank}/{latest}" for rank in ranks]


def _order(name: str) -> tuple[int, int, str]:
    stem = naming.parse_stem(os.path.splitext(name)[0])
    return (stem.epoch, stem.step_in_epoch, name) if stem else (0, 0, name)


def _manifest(fs: FileSystem, root: str, path: str, files: Sequence[_Indexed]) -> Manifest:
    tensors: dict[str, int] = {}
    rows: list[TensorRow] = []
    boxes: list[tuple[int, int, Any]] = []
    extents: list[tuple[Extent, ...]] = []
    append: dict[str, Any] = {}
    first: dict[str, tuple[int, IndexedEntry]] = {}
    for number, file in enumerate(files):
        for item in file.index.entries:
            if item.kind == "str":
                append[item.name] = values.encode(item.text)
            elif item.kind == "tensor" and item.name in _COUNTERS and item.shape == ():
                append[item.name] = _counter(fs, os.path.join(root, file.path), item)
            elif item.kind == "tensor" and item.name in first:
                _check_same(fs, root, files, first[item.name], (number, item))
            elif item.kind == "tensor" and item.dtype is not None:
                first[item.name] = (number, item)
                tensors[item.name] = len(rows)
                rows.append(TensorRow(item.name, item.dtype, item.shape))
                boxes.append((tensors[item.name], number, whole(item.shape)))
                extents.append(tuple(Extent(e.start, e.byte_offset, e.nbytes) for e in item.extents))
    flat = [extent for run in extents for extent in run]
    contents = Contents(
        tensors=tuple(rows),
        files=tuple(StoredFile(f.path, f.nbytes, np.zeros(chunk_count(f.nbytes, CHUNK_NBYTES), "<u4")) for f in files),
        boxes=box_columns(boxes),
        box_entry=np.zeros(len(boxes), "<u4"),
        entry_names=(),
        box_extents=np.array([len(run) for run in extents], "<u4"),
        extent_start=np.array([e.start for e in flat], "<u8"),
        extent_byte_offset=np.array([e.byte_offset for e in flat], "<u8"),
        extent_nbytes=np.array([e.nbytes for e in flat], "<u8"),
        chunk_nbytes=CHUNK_NBYTES,
        integrated=True,
    )
    return Manifest(_facts(path, files, append), contents)


def _facts(path: str, files: Sequence[_Indexed], append: dict[str, Any]) -> Facts:
    stem_text = os.path.splitext(os.path.basename(files[0].path))[0]
    stem = naming.parse_stem(stem_text)
    step = append.get("step_num", 0)
    return Facts(
        stem=stem_text,
        token="",
        attempt="",
        run_id="",
        family=stem.prefix if stem else stem_text,
        prefix=stem.prefix if stem else stem_text,
        sequence=0,
        step=step if isinstance(step, int) and step >= 0 else 0,
        epoch=stem.epoch if stem else 0,
        step_in_epoch=stem.step_in_epoch if stem else 0,
        world_size=len(files),
        format=files[0].index.format,
        integrated=True,
        created=0.0,
        reason="foreign",
        append=append,
    )


def _counter(fs: FileSystem, path: str, item: IndexedEntry) -> Any:
    assert item.dtype is not None
    with InputFile(fs, path, direct=False) as source:
        content = b"".join(_blocks(source, item.extents))
    return values.encode(np.frombuffer(content, item.dtype.numpy)[0].item())


def _check_same(
    fs: FileSystem,
    root: str,
    files: Sequence[_Indexed],
    first: tuple[int, IndexedEntry],
    second: tuple[int, IndexedEntry],
) -> None:
    """Two rank files hold a tensor of one name: it must be the same, or a layout is needed to make sense of it."""
    (file_a, a), (file_b, b) = first, second
    same = (a.type, a.shape) == (b.type, b.shape)
    if same:
        with (
            InputFile(fs, os.path.join(root, files[file_a].path)) as left,
            InputFile(fs, os.path.join(root, files[file_b].path)) as right,
        ):
            same = _crc(left, a) == _crc(right, b)
    if not same:
        raise LayoutError(
            f"{a.name!r} differs between {files[file_a].path} and {files[file_b].path}: these are slices, and without "
            "a layout nobody knows how they fit together",
            tensor=a.name,
            ranks=[file_a, file_b],
        )


def _crc(source: InputFile, item: IndexedEntry) -> int:
    crc = 0
    for block in _blocks(source, item.extents):
        crc = crc32(block, crc)
    return crc


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
