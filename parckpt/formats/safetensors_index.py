"""Reading the header of a ``safetensors`` file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from parckpt.core import dtypes
from parckpt.formats.base import Extent, FileIndex, IndexedEntry, refuse
from parckpt.formats.entries import MAX_NAME_NBYTES, content_nbytes

if TYPE_CHECKING:
    from parckpt.core.dtypes import DType
    from parckpt.formats.base import RangeReader

__all__ = ["FORMAT", "MAX_HEADER_NBYTES", "read_index"]

FORMAT = "safetensors"

LENGTH_NBYTES = 8
METADATA_KEY = "__metadata__"
CRC_KEY = "crc_num"
# Type of MindSpore's qint4x2 here; in the file it is I8, with this word under the tensor's name in the metadata.
INT4 = "Int4"

# The library's own limit.
MAX_HEADER_NBYTES = 100_000_000
# Enough for the header of most files: one read instead of two.
_FIRST_READ_NBYTES = 4096
# MindSpore writes at most 10 digits.
_MAX_CRC_DIGITS = 20
_TENSOR_KEYS = {"dtype", "shape", "data_offsets"}


class _NotStrictError(ValueError):
    """JSON that parsers disagree about."""


def read_index(reader: RangeReader) -> FileIndex:
    """Read what a safetensors file holds, without its contents.

    Not collective. Reads the header: at most `MAX_HEADER_NBYTES` + 8 bytes.

    Returns
    -------
    FileIndex
        Entries in the order of the data. `crc` is ``crc_num`` of the metadata; the caller compares it with `file_crc`.

    Raises
    ------
    FormatError
        With ``path``, ``byte_offset`` and ``field``: of the header's first byte for what is wrong inside it.
    """
    header, data_offset = _read_header(reader)
    metadata = _read_metadata(reader.path, header.pop(METADATA_KEY, {}))
    found = sorted(_read_tensor(reader.path, name, item, metadata) for name, item in header.items())
    entries = []
    at = 0
    for index, (start, stop, name, dtype, type_name, shape) in enumerate(found):
        if start != at:
            what = "overlap" if start < at else "leave a gap"
            _refuse(reader.path, f"{name}.data_offsets", f"data {what}: tensor at {start}, the one before ends at {at}")
        extents = (Extent(index, 0, data_offset + start, stop - start),) if stop > start else ()
        entries.append(IndexedEntry(name, "tensor", dtype, type_name, shape, extents))
        at = stop
    if data_offset + at != reader.nbytes:
        problem = f"data end at byte {data_offset + at}, the file at {reader.nbytes}"
        refuse(reader.path, min(data_offset + at, reader.nbytes), "data", problem)
    return FileIndex(FORMAT, tuple(entries), metadata, _crc(reader.path, metadata), reader.nbytes)


def _read_header(reader: RangeReader) -> tuple[dict[str, Any], int]:
    """The header as parsed, and the byte offset of the data."""
    if reader.nbytes < LENGTH_NBYTES:
        refuse(reader.path, 0, "header length", f"the file has {reader.nbytes} bytes, fewer than {LENGTH_NBYTES}")
    data = reader.read(0, min(_FIRST_READ_NBYTES, reader.nbytes))
    nbytes = int.from_bytes(data[:LENGTH_NBYTES], "little")
    left = reader.nbytes - LENGTH_NBYTES
    if nbytes > min(left, MAX_HEADER_NBYTES):
        limit = f"at most {MAX_HEADER_NBYTES} are taken" if nbytes > MAX_HEADER_NBYTES else f"{left} are left"
        refuse(reader.path, 0, "header length", f"{nbytes} bytes, {limit}")
    stop = LENGTH_NBYTES + nbytes
    if stop > len(data):
        data += reader.read(len(data), stop - len(data))
    text = data[LENGTH_NBYTES:stop]
    if not text.startswith(b"{"):
        _refuse(reader.path, "header", "does not begin with '{'")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        # ValueError: not JSON, not UTF-8, a key twice, a number of thousands of digits.
        _refuse(reader.path, "header", f"{type(error).__name__}: {error}")
    return header, stop


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _NotStrictError("a key occurs twice in one object")
    for key in found:
        key.encode()  # a lone surrogate, written as an escape, raises UnicodeEncodeError, which is a ValueError
    return found


def _read_metadata(path: str, item: Any) -> dict[str, str]:
    if not isinstance(item, dict) or not all(isinstance(value, str) for value in item.values()):
        _refuse(path, METADATA_KEY, "not an object of strings")
    try:
        "".join(item.values()).encode()
    except UnicodeEncodeError as error:
        _refuse(path, METADATA_KEY, f"not valid Unicode: {error}")
    return item


def _read_tensor(
    path: str, name: str, item: Any, metadata: dict[str, str]
) -> tuple[int, int, str, DType, str, tuple[int, ...]]:
    if len(name) > MAX_NAME_NBYTES:
        _refuse(path, "name", f"{name[:50]!r}... has {len(name)} characters, at most {MAX_NAME_NBYTES} are taken")
    # More keys than these are stepped over, as the library does.
    if not isinstance(item, dict) or not item.keys() >= _TENSOR_KEYS:
        _refuse(path, "tensor", f"{name!r} is not an object with {', '.join(sorted(_TENSOR_KEYS))}")
    type_name, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    dtype = dtypes.by_safetensors(type_name) if isinstance(type_name, str) else None
    if dtype is None:
        _refuse(path, f"{name}.dtype", f"unknown type {str(type_name)[:50]!r}")
    if type_name == "I8" and metadata.get(name) == INT4:
        dtype, type_name = dtypes.by_name("int4"), INT4
    nbytes = content_nbytes(shape, dtype.itemsize) if _are_sizes(shape) else None
    if nbytes is None:
        _refuse(path, f"{name}.shape", f"impossible shape {str(shape)[:200]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(path, f"{name}.data_offsets", f"not two numbers: {str(offsets)[:200]}")
    start, stop = offsets
    if stop - start != nbytes:
        problem = f"{stop - start} bytes, expected {nbytes} for {type_name} of shape {shape}"
        _refuse(path, f"{name}.data_offsets", problem)
    return start, stop, name, dtype, type_name, tuple(shape)


def _are_sizes(item: Any) -> bool:
    # bool is an int to Python; JSON's true is no size.
    return isinstance(item, list) and all(type(n) is int and n >= 0 for n in item)


def _crc(path: str, metadata: dict[str, str]) -> int | None:
    digits = metadata.get(CRC_KEY)
    if digits is None:
        return None
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MAX_CRC_DIGITS):
        _refuse(path, f"{METADATA_KEY}.{CRC_KEY}", f"not a decimal number: {digits[:50]!r}")
    return int(digits)


def _refuse(path: str, where: str, problem: str) -> NoReturn:
    # Positions inside the JSON are not kept; the name of the field says more.
    refuse(path, LENGTH_NBYTES, where[:200], problem)
