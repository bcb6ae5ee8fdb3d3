"""Making entries: the limits that all formats share, and what an appended number is stored as."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from parckpt.errors import ConfigError, ConfigTypeError
from parckpt.formats.base import Entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parckpt.core.dtypes import DType

__all__ = ["MAX_NAME_NBYTES", "MAX_NDIM", "content_nbytes", "encode_name", "scalar_content", "tensor_entry"]

# Longest tensor name in UTF-8 bytes: far above any real one, and what a hostile header can make us allocate.
MAX_NAME_NBYTES = 64 << 10
# Most dimensions of a tensor: what NumPy 1.26 can hold.
MAX_NDIM = 32
# Bytes of one tensor must fit a signed 64-bit size, or NumPy cannot hold the array.
_MAX_NBYTES = 2**63 - 1


def content_nbytes(shape: Sequence[int], itemsize: int) -> int | None:
    """Bytes of an array, or None where no array can have this shape.

    Zeros do not excuse impossible neighbours: NumPy refuses shape ``(0, 2**62)`` too.
    """
    if len(shape) > MAX_NDIM or any(n < 0 or n > _MAX_NBYTES for n in shape):
        return None
    if math.prod(n for n in shape if n) * itemsize > _MAX_NBYTES:
        return None
    return math.prod(shape) * itemsize


def encode_name(format_name: str, name: str) -> bytes:
    """UTF-8 of an entry's name; `ConfigError` if it cannot be stored."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        message = f"{format_name}: name {name!r} is not valid Unicode"
        raise ConfigError(message, format=format_name, tensor=name) from error
    if len(encoded) > MAX_NAME_NBYTES:
        message = f"{format_name}: name {name[:50]!r}... has {len(encoded)} bytes, more than {MAX_NAME_NBYTES}"
        raise ConfigError(message, format=format_name, tensor=name[:50])
    return encoded


def tensor_entry(format_name: str, name: str, dtype: DType, type_name: str | None, shape: Sequence[int]) -> Entry:
    """Make an `Entry` for a tensor; `ConfigError` where the format cannot hold it."""
    encode_name(format_name, name)
    if type_name is None:
        message = f"{format_name} cannot hold {name!r}: it has no type for {dtype.name}"
        raise ConfigError(message, format=format_name, tensor=name, dtype=dtype.name)
    dims = tuple(int(n) for n in shape)
    nbytes = content_nbytes(dims, dtype.itemsize)
    if nbytes is None:
        message = f"{format_name} cannot hold {name!r}: impossible shape {dims}"
        raise ConfigError(message, format=format_name, tensor=name, shape=list(dims))
    return Entry(name, type_name, dims, nbytes)


def scalar_content(name: str, value: object) -> tuple[str, bytes]:
    """Canonical dtype name and content of an appended number, by MindSpore's rules.

    bool is bool; int is int64, above that uint64; float is **float32**, rounded, out of range becoming infinity;
    `numpy.float64` is float64.
    """
    if isinstance(value, bool):
        return "bool", bytes([value])
    if isinstance(value, int):
        if -(2**63) <= value < 2**63:
            return "int64", value.to_bytes(8, "little", signed=True)
        if 0 <= value < 2**64:
            return "uint64", value.to_bytes(8, "little")
        raise ConfigError(f"appended value {name!r}: {value} does not fit 64 bits", entry=name)
    if isinstance(value, np.float64):
        return "float64", value.astype("<f8").tobytes()
    if isinstance(value, float):
        with np.errstate(over="ignore", under="ignore"):
            return "float32", np.array(value).astype("<f4").tobytes()
    message = f"appended value {name!r} is a {type(value).__name__}; expected bool, int, float, numpy.float64 or str"
    raise ConfigTypeError(message, entry=name)
