"""The ``safetensors`` format, as its library and MindSpore write it. Byte tables: ``docs/format-ckpt.md``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from typing import Literal as OneOf

from parckpt.core import crc as crc_module
from parckpt.core import dtypes
from parckpt.errors import ConfigError
from parckpt.formats.base import Entry, Extent, FileLayout, Literal
from parckpt.formats.entries import scalar_content, tensor_entry
from parckpt.formats.safetensors_index import (
    CRC_KEY,
    FORMAT,
    INT4,
    LENGTH_NBYTES,
    MAX_HEADER_NBYTES,
    METADATA_KEY,
    read_index,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from parckpt.core.dtypes import DType
    from parckpt.formats.base import IndexedEntry

__all__ = ["MINDSPORE_METADATA", "content_crc", "entry", "file_crc", "layout", "read_index", "trailer", "value_entry"]

# What MindSpore puts into every file that has tensors, and torch's readers look at.
MINDSPORE_METADATA = {"format": "ms"}

# The library's order of data: its list of types backwards, then by name.
_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_RANK = {type_name: rank for rank, type_name in enumerate(_ORDER)}
_ALIGNMENT = 8

_SIGNED = {"I8", "I16", "I32", "I64", INT4}
_UNSIGNED = {"U8", "U16", "U32", "U64"}


def entry(name: str, dtype: DType, shape: Sequence[int]) -> Entry:
    """Entry for a tensor. Int4 is stored as I8 and marked in the metadata; its type here is ``"Int4"``.

    Raises
    ------
    ConfigError
        If the name or shape cannot be stored, or the format has no such type (complex128).
    """
    if name == METADATA_KEY:
        raise ConfigError(f"{FORMAT}: no tensor can be called {name!r}", format=FORMAT, tensor=name)
    return tensor_entry(FORMAT, name, dtype, INT4 if dtype.name == "int4" else dtype.safetensors, shape)


def value_entry(name: str, value: object) -> tuple[Entry, bytes]:
    """Entry and content for an appended number, by MindSpore's rules (a float becomes float32).

    Raises
    ------
    ConfigError
        For a str, which the format cannot hold, as for anything else but bool, int, float and numpy.float64.
    """
    if isinstance(value, str):
        raise ConfigError(f"{FORMAT} cannot hold {name!r}: it has no strings", format=FORMAT, tensor=name, dtype="str")
    dtype_name, content = scalar_content(name, value)
    return entry(name, dtypes.by_name(dtype_name), ()), content


def layout(
    entries: Sequence[Entry],
    *,
    metadata: Mapping[str, str],
    crc: int | None = None,
    order: OneOf["library", "given"] = "library",
) -> FileLayout:
    """Where each byte of a file with these entries comes from.

    Parameters
    ----------
    entries : sequence of Entry
        In any order; names must differ. `Extent.entry` counts in this order.
    metadata : mapping of str to str
        Stored in this order, then Int4 marks, then the crc. Without entries MindSpore stores none at all, and nor
        does this, unless there is a crc.
    crc : int or None
        `file_crc` of all entries, stored as MindSpore does. It is in the header, whose length depends on its digits,
        so the contents have to be read once before.
    order : {"library", "given"}
        Order of the data: that of the safetensors library, which MindSpore files have, or that of `entries`.

    Raises
    ------
    ConfigError
        If two entries have one name, metadata is not str to str or clashes, or the header is too long for readers.
    """
    if order == "library":
        sequence = sorted(range(len(entries)), key=lambda i: (_RANK[_stored_type(entries[i])], entries[i].name))
    else:
        sequence = list(range(len(entries)))
    header: dict[str, Any] = {}
    facts = _metadata(entries, metadata, crc)
    if facts and (entries or crc is not None):
        header[METADATA_KEY] = facts
    at = 0
    for index in sequence:
        item = entries[index]
        if item.name in header or item.name == METADATA_KEY:
            raise ConfigError(f"{FORMAT}: two entries are called {item.name!r}", format=FORMAT, tensor=item.name)
        span = [at, at + item.nbytes]
        header[item.name] = {"dtype": _stored_type(item), "shape": list(item.shape), "data_offsets": span}
        at += item.nbytes
    return _laid_out(entries, sequence, _encoded(header))


def trailer(crc: int) -> bytes:
    """Nothing: the crc is in the header."""
    return b""


def content_crc(item: Entry | IndexedEntry, crc: int, content: bytes | None = None) -> tuple[int, int]:
    """What one entry's content adds to the crc of a file: a CRC-32 and the number of bytes it stands for.

    MindSpore's code feeds a 0-d integer of value n as n zero bytes, and what it writes must be checkable by it. It
    fails on negative ones; for those the content itself counts here, like any other.

    Parameters
    ----------
    item : Entry
        The entry, written or indexed.
    crc : int
        CRC-32 of its content.
    content : bytes, optional
        The content; needed only where the shape is ``()``.
    """
    if item.shape == () and item.type in _SIGNED | _UNSIGNED:
        if content is None or len(content) != item.nbytes:
            raise ValueError(f"content of 0-d integer {item.name!r} is needed, {item.nbytes} bytes")
        value = int.from_bytes(content, "little", signed=item.type in _SIGNED)
        if value >= 0:
            return crc_module.crc32_zeros(value), value
    return crc, item.nbytes


def file_crc(contents: Iterable[tuple[str, tuple[int, int]]]) -> int:
    """The crc that MindSpore stores: over name and content of each entry, in order of names.

    Parameters
    ----------
    contents : iterable of (str, (int, int))
        Name and `content_crc` of every entry, in any order.
    """
    total = 0
    for name, (crc, nbytes) in sorted(contents):
        total = crc_module.combine(crc_module.crc32(name.encode(), total), crc, nbytes)
    return total


def _stored_type(item: Entry) -> str:
    return "I8" if item.type == INT4 else item.type


def _metadata(entries: Sequence[Entry], metadata: Mapping[str, str], crc: int | None) -> dict[str, str]:
    facts = dict(metadata)
    for key, value in facts.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigError(f"{FORMAT}: metadata {key!r} must be str to str", format=FORMAT)
    marks = {item.name: INT4 for item in entries if item.type == INT4}
    if crc is not None:
        marks[CRC_KEY] = str(crc)
    clash = facts.keys() & marks.keys() or {item.name for item in entries if item.type == INT4} & {CRC_KEY}
    if clash:
        raise ConfigError(f"{FORMAT}: metadata {min(clash)!r} is taken", format=FORMAT)
    return facts | marks


def _encoded(header: Mapping[str, Any]) -> bytes:
    try:
        data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{FORMAT}: names and metadata must be valid Unicode", format=FORMAT) from error
    data += b" " * (-len(data) % _ALIGNMENT)
    if len(data) > MAX_HEADER_NBYTES:
        message = f"{FORMAT}: header of {len(data)} bytes, readers take at most {MAX_HEADER_NBYTES}"
        raise ConfigError(message, format=FORMAT)
    return len(data).to_bytes(LENGTH_NBYTES, "little") + data


def _laid_out(entries: Sequence[Entry], sequence: Sequence[int], header: bytes) -> FileLayout:
    parts: list[Literal | Extent] = [Literal(0, header)]
    at = len(header)
    for index in sequence:
        nbytes = entries[index].nbytes
        if nbytes:
            parts.append(Extent(index, 0, at, nbytes))
            at += nbytes
    return FileLayout(at, tuple(parts))
