"""What a rank tells the others about its state: names once, everything else in packed numeric columns."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from parckpt.core.dtypes import DType, by_code
from parckpt.core.layout import Box, whole
from parckpt.errors import FormatError, LayoutError, UnsupportedVersionError

__all__ = [
    "EMPTY",
    "MAX_NBYTES",
    "MAX_NDIM",
    "PER_RANK",
    "SPLIT",
    "Description",
    "Held",
    "describe",
    "digest",
    "pack",
    "unpack",
]

PER_RANK = 1
SPLIT = 2  # of a box
EMPTY = 2  # of a plain value

MAX_NDIM = 32  # what numpy 1.26 can hold
MAX_NBYTES = 1 << 62  # of one tensor, and the bound of every coordinate: sums of two still fit in int64

_VERSION = 1
_HEADER = struct.Struct("<6Q")  # version, rows, dims, tensor names, values, bytes of names


@dataclass(frozen=True)
class Held:
    """One box of one tensor that a rank holds.

    Attributes
    ----------
    name : str
    dtype : DType
    global_shape, offsets, shape : tuple of int
        The tensor, and the box in it, in elements.
    per_rank : bool
        The tensor belongs to this rank alone.
    split : bool
        The user stated a box (``Shard``); False for a plain array, which is the whole tensor.
    """

    name: str
    dtype: DType
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    per_rank: bool = False
    split: bool = False

    @property
    def box(self) -> Box:
        """The box as such."""
        return Box(self.offsets, self.shape)


@dataclass(frozen=True, eq=False)
class Description:
    """Everything one rank holds, as columns; rows are in the order of its state.

    Attributes
    ----------
    names : tuple of str
        Tensor names, each once.
    row_name : uint32 array
        Index into `names` of each held box.
    dtype, flags, ndim : uint8 array
        Table code of the element type, ``PER_RANK | SPLIT``, and number of dimensions of each held box.
    dims : int64 array
        For each row, one after the other: global shape, offsets, shape (``3 * ndim`` numbers).
    value_names : tuple of str
        Plain values this rank has.
    value_flags : uint8 array
        ``PER_RANK``, ``EMPTY`` or 0 for each. EMPTY: an empty sequence, which is also what a rank hands in that holds
        no Shard of some tensor.
    """

    names: tuple[str, ...]
    row_name: npt.NDArray[np.uint32]
    dtype: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    ndim: npt.NDArray[np.uint8]
    dims: npt.NDArray[np.int64]
    value_names: tuple[str, ...]
    value_flags: npt.NDArray[np.uint8]

    @property
    def nrows(self) -> int:
        """Number of held boxes."""
        return len(self.row_name)

    def pack(self) -> bytes:
        """Return the one byte string of these columns; equal columns give equal bytes."""
        names, lengths = _encode_names((*self.names, *self.value_names))
        counts = (self.nrows, len(self.dims), len(self.names), len(self.value_names), len(names))
        columns: tuple[tuple[npt.NDArray[Any], str], ...] = (
            (self.dims, "<i8"),
            (self.row_name, "<u4"),
            (lengths, "<u4"),
            (self.dtype, "u1"),
            (self.flags, "u1"),
            (self.ndim, "u1"),
            (self.value_flags, "u1"),
        )
        return b"".join(
            [_HEADER.pack(_VERSION, *counts), *(np.asarray(c, dtype=t).tobytes() for c, t in columns), names]
        )


def describe(held: Sequence[Held], values: Iterable[tuple[str, int]]) -> Description:
    """Put what a rank holds into columns.

    Parameters
    ----------
    held : sequence of Held
        In the order of the rank's state.
    values : iterable of (str, int)
        Names of plain values, and the flags of each.

    Raises
    ------
    LayoutError
        If a box has another number of dimensions than its tensor, or numbers that cannot be meant.
    """
    index: dict[str, int] = {}
    rows = [index.setdefault(h.name, len(index)) for h in held]
    for h in held:
        _check_held(h)
    listed = list(values)
    return Description(
        names=tuple(index),
        row_name=np.array(rows, dtype=np.uint32),
        dtype=np.array([h.dtype.code for h in held], dtype=np.uint8),
        flags=np.array([PER_RANK * h.per_rank | SPLIT * h.split for h in held], dtype=np.uint8),
        ndim=np.array([len(h.global_shape) for h in held], dtype=np.uint8),
        dims=np.array([n for h in held for n in (*h.global_shape, *h.offsets, *h.shape)], dtype=np.int64),
        value_names=tuple(name for name, _ in listed),
        value_flags=np.array([flags for _, flags in listed], dtype=np.uint8),
    )


def pack(held: Sequence[Held], values: Iterable[tuple[str, int]]) -> bytes:
    """Describe what a rank holds in one deterministic byte string; see `describe`."""
    return describe(held, values).pack()


def digest(data: bytes) -> bytes:
    """Return the SHA-256 of a packed description: equal digests, equal descriptions."""
    return hashlib.sha256(data).digest()


def unpack(data: bytes) -> Description:
    """Read a packed description.

    Raises
    ------
    UnsupportedVersionError
        If a newer parckpt packed it.
    FormatError
        If it is anything but what `pack` returns.
    """
    if len(data) < _HEADER.size:
        _refuse("header", 0, f"{len(data)} bytes are too few")
    version, nrows, ndims, nnames, nvalues, names_nbytes = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise UnsupportedVersionError(
            f"packed description of version {version}, expected {_VERSION}", path=None, byte_offset=0, field="version"
        )
    expected = _HEADER.size + 8 * ndims + 4 * (nrows + nnames + nvalues) + 3 * nrows + nvalues + names_nbytes
    if len(data) != expected:
        _refuse("header", 0, f"{len(data)} bytes where its counts need {expected}")
    columns = _Columns(data, _HEADER.size)
    dims = columns.take("<i8", ndims)
    row_name = columns.take("<u4", nrows)
    names_start = columns.byte_offset
    columns.byte_offset += 4 * (nnames + nvalues)
    dtype, flags, ndim = (columns.take("u1", nrows) for _ in range(3))
    value_flags = columns.take("u1", nvalues)
    lengths = data[names_start : names_start + 4 * (nnames + nvalues)]
    names = _decode_names(lengths, data[columns.byte_offset :], nnames)
    _check_columns(dims, row_name, dtype, flags, ndim, value_flags, nnames)
    return Description(names[0], row_name, dtype, flags, ndim, dims, names[1], value_flags)


class _Columns:
    """Takes one array after the other out of a buffer whose total length was checked."""

    def __init__(self, data: bytes, byte_offset: int) -> None:
        self._data = data
        self.byte_offset = byte_offset

    def take(self, dtype: str, count: int) -> npt.NDArray[Any]:
        column = np.frombuffer(self._data, dtype=dtype, count=count, offset=self.byte_offset)
        self.byte_offset += column.nbytes
        return column


def _check_held(held: Held) -> None:
    ndim = len(held.global_shape)
    facts = {"tensor": held.name, "boxes": [[list(held.offsets), list(held.shape)]]}
    if len(held.offsets) != ndim or len(held.shape) != ndim:
        raise LayoutError(
            f"tensor {held.name!r} of global shape {held.global_shape}: {held.box} is not {ndim}-d", **facts
        )
    if ndim > MAX_NDIM:
        raise LayoutError(f"tensor {held.name!r} has {ndim} dimensions; at most {MAX_NDIM} can be saved", **facts)
    if any(abs(n) >= MAX_NBYTES for n in (*held.global_shape, *held.offsets, *held.shape)):
        raise LayoutError(
            f"tensor {held.name!r} of global shape {held.global_shape}: {held.box} is beyond 2**62", **facts
        )
    if min(held.global_shape, default=0) < 0 or math.prod(held.global_shape) * held.dtype.itemsize >= MAX_NBYTES:
        raise LayoutError(f"tensor {held.name!r}: a global shape of {held.global_shape} cannot be meant", **facts)
    if held.per_rank and held.box != whole(held.global_shape):
        raise LayoutError(f"tensor {held.name!r} belongs to this rank alone and must be whole, not {held.box}", **facts)


def _check_columns(
    dims: npt.NDArray[np.int64],
    row_name: npt.NDArray[np.uint32],
    dtype: npt.NDArray[np.uint8],
    flags: npt.NDArray[np.uint8],
    ndim: npt.NDArray[np.uint8],
    value_flags: npt.NDArray[np.uint8],
    nnames: int,
) -> None:
    if len(row_name) and int(row_name.max()) >= nnames:
        _refuse("row_name", 0, "a name index is out of range")
    for code in np.flatnonzero(np.bincount(dtype, minlength=1)).tolist():
        try:
            by_code(code)
        except KeyError:
            _refuse("dtype", 0, f"element type {code} is unknown")
    if (flags > (PER_RANK | SPLIT)).any() or (value_flags > EMPTY).any():
        _refuse("flags", 0, "an unknown flag is set")
    if len(ndim) and int(ndim.max()) > MAX_NDIM:
        _refuse("ndim", 0, f"more than {MAX_NDIM} dimensions")
    if 3 * int(ndim.sum(dtype=np.int64)) != len(dims):
        _refuse("dims", _HEADER.size, f"{len(dims)} numbers do not fit the dimensions")
    if len(dims) and (int(dims.max()) >= MAX_NBYTES or int(dims.min()) <= -MAX_NBYTES):
        _refuse("dims", _HEADER.size, "a coordinate is beyond 2**62")


def _encode_names(names: Sequence[str]) -> tuple[bytes, npt.NDArray[np.uint32]]:
    encoded = [name.encode() for name in names]
    return b"".join(encoded), np.array([len(name) for name in encoded], dtype=np.uint32)


# Ranks mostly differ in boxes and not in names: 4,096 descriptions then share one tuple of names.
@lru_cache(maxsize=16)
def _decode_names(lengths: bytes, blob: bytes, nnames: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    stops = np.cumsum(np.frombuffer(lengths, dtype="<u4"), dtype=np.int64).tolist()
    if (stops[-1] if stops else 0) != len(blob):
        _refuse("names", 0, "lengths do not add up")
    try:
        names = [blob[a:b].decode() for a, b in zip([0, *stops], stops, strict=False)]
    except UnicodeDecodeError as error:
        raise FormatError("packed description: a name is not UTF-8", path=None, byte_offset=0, field="names") from error
    tensors, values = tuple(names[:nnames]), tuple(names[nnames:])
    if len(set(tensors)) != len(tensors) or len(set(values)) != len(values):
        _refuse("names", 0, "a name occurs twice")
    return tensors, values


def _refuse(field: str, byte_offset: int, reason: str) -> NoReturn:
    raise FormatError(f"packed description: {field}: {reason}", path=None, byte_offset=byte_offset, field=field)
