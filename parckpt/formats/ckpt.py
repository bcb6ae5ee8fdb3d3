"""The ``ckpt`` format: MindSpore's protocol buffer file, to the bit. Byte tables: ``docs/format-ckpt.md``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from typing import Literal as OneOf

from parckpt.core import dtypes
from parckpt.errors import ConfigError
from parckpt.formats.base import Entry, Extent, FileLayout, Literal
from parckpt.formats.ckpt_index import FORMAT, TRAILER_MAGIC, TRAILER_NBYTES, read_index
from parckpt.formats.ckpt_messages import (
    CHECKPOINT_VALUE,
    TENSOR_CONTENT,
    TENSOR_DIMS,
    TENSOR_TYPE,
    TEXT_TYPE,
    VALUE_TAG,
    VALUE_TENSOR,
)
from parckpt.formats.entries import encode_name, scalar_content, tensor_entry
from parckpt.formats.wire import VARINT, bytes_field, length_key, varint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parckpt.core.dtypes import DType

__all__ = ["SLICE_NBYTES", "entry", "layout", "read_index", "trailer", "value_entry"]

# MindSpore's threshold: more content than this is cut into several messages.
SLICE_NBYTES = 512 << 20

_DIM_KEY = varint(TENSOR_DIMS << 3 | VARINT)


def entry(name: str, dtype: DType, shape: Sequence[int]) -> Entry:
    """Entry for a tensor.

    Raises
    ------
    ConfigError
        If the name or shape cannot be stored, or the format has no such type.
    """
    return tensor_entry(FORMAT, name, dtype, dtype.ckpt, shape)


def value_entry(name: str, value: object) -> tuple[Entry, bytes]:
    """Entry and content for an appended value, by MindSpore's rules.

    A float becomes float32 (``numpy.float64`` stays), an int int64 or uint64. Strings are UTF-32; the empty one is one
    NUL, so ``"\\0"`` comes back empty.

    Raises
    ------
    ConfigError
        If the number does not fit, or the value is not a bool, int, float, numpy.float64 or str.
    """
    encode_name(FORMAT, name)
    if isinstance(value, str):
        # Lone surrogates pass, as they do in the NumPy strings that MindSpore writes.
        content = value.encode("utf-32-le", "surrogatepass") or bytes(4)
        return Entry(name, TEXT_TYPE, (0,), len(content)), content
    dtype_name, content = scalar_content(name, value)
    return entry(name, dtypes.by_name(dtype_name), ()), content


def layout(
    entries: Sequence[Entry],
    *,
    crc: bool = False,
    slice_nbytes: int = SLICE_NBYTES,
    slicing: OneOf["bytes", "rows"] = "bytes",
) -> FileLayout:
    """Where each byte of a file with these entries comes from.

    Parameters
    ----------
    entries : sequence of Entry
        In file order; names must differ.
    crc : bool
        Leave room for the trailer.
    slice_nbytes : int
        Content longer than this is cut into several messages. Other values than the default are for tests.
    slicing : {"bytes", "rows"}
        Cut every `slice_nbytes` bytes, as MindSpore's synchronous path does, or evenly along the first dimension, as
        its asynchronous path does.

    Raises
    ------
    ConfigError
        If two entries have one name.
    """
    parts: list[Literal | Extent] = []
    names: set[str] = set()
    at = 0
    for index, item in enumerate(entries):
        if item.name in names:
            # Neighbours of one name would even be read as slices of one tensor.
            raise ConfigError(f"{FORMAT}: two entries are called {item.name!r}", format=FORMAT, tensor=item.name)
        names.add(item.name)
        tag, description = _constant_fields(item)
        start = 0
        for nbytes in _slices(item, slice_nbytes, slicing):
            header = _header(tag, description, nbytes)
            parts.append(Literal(at, header))
            at += len(header)
            if nbytes:
                parts.append(Extent(index, start, at, nbytes))
                at += nbytes
                start += nbytes
    trailer_nbytes = TRAILER_NBYTES if crc else 0
    return FileLayout(at + trailer_nbytes, tuple(parts), trailer_nbytes)


def trailer(crc: int) -> bytes:
    """The trailer of a file whose other bytes have the CRC-32 `crc`."""
    return TRAILER_MAGIC + crc.to_bytes(TRAILER_NBYTES - len(TRAILER_MAGIC), "big")


def _constant_fields(item: Entry) -> tuple[bytes, bytes]:
    """What every slice repeats: the tag field; dims and type fields."""
    dims = b"".join([_DIM_KEY + varint(n) for n in item.shape])
    return bytes_field(VALUE_TAG, encode_name(FORMAT, item.name)), dims + bytes_field(TENSOR_TYPE, item.type.encode())


def _header(tag: bytes, description: bytes, nbytes: int) -> bytes:
    inner = description + length_key(TENSOR_CONTENT, nbytes)
    value = tag + length_key(VALUE_TENSOR, len(inner) + nbytes) + inner
    return length_key(CHECKPOINT_VALUE, len(value) + nbytes) + value


def _slices(item: Entry, slice_nbytes: int, slicing: str) -> Iterator[int]:
    if item.nbytes <= slice_nbytes:
        # MindSpore's synchronous path writes nothing for zero bytes, and the tensor is lost; its asynchronous one
        # writes a message with empty content, which it can load. So do we.
        yield item.nbytes
    elif slicing == "rows" and item.type != TEXT_TYPE:
        rows, count = item.shape[0], math.ceil(item.nbytes / slice_nbytes)
        row_nbytes = item.nbytes // rows
        for index in range(count):
            yield (rows // count + (index < rows % count)) * row_nbytes
    else:
        for start in range(0, item.nbytes, slice_nbytes):
            yield min(slice_nbytes, item.nbytes - start)
