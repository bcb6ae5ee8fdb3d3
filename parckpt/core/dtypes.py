"""The one table of element types: numpy names, their names in each file format, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from parckpt.errors import ConfigTypeError

__all__ = ["DType", "by_ckpt", "by_code", "by_name", "by_safetensors", "from_numpy"]


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes
    ----------
    name : str
        Canonical name, numpy's where numpy has the type.
    code : int
        Stable number used in packed tables; part of the on-disk manifest format.
    numpy : numpy.dtype
        Little-endian numpy (or ml_dtypes) type.
    ckpt, safetensors : str or None
        Type string in that format; None where the format cannot hold it.
    """

    name: str
    code: int
    numpy: np.dtype[Any]
    ckpt: str | None
    safetensors: str | None

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return int(self.numpy.itemsize)


def _row(name: str, code: int, numpy: Any, ckpt: str | None, safetensors: str | None) -> DType:
    return DType(name, code, np.dtype(numpy).newbyteorder("<"), ckpt, safetensors)


# Codes are written to disk: never renumber, only append.
_TABLE = (
    _row("bool", 1, np.bool_, "Bool", "BOOL"),
    _row("int8", 2, np.int8, "Int8", "I8"),
    _row("int16", 3, np.int16, "Int16", "I16"),
    _row("int32", 4, np.int32, "Int32", "I32"),
    _row("int64", 5, np.int64, "Int64", "I64"),
    _row("uint8", 6, np.uint8, "UInt8", "U8"),
    _row("uint16", 7, np.uint16, "UInt16", "U16"),
    _row("uint32", 8, np.uint32, "UInt32", "U32"),
    _row("uint64", 9, np.uint64, "UInt64", "U64"),
    _row("float16", 10, np.float16, "Float16", "F16"),
    _row("float32", 11, np.float32, "Float32", "F32"),
    _row("float64", 12, np.float64, "Float64", "F64"),
    _row("bfloat16", 13, ml_dtypes.bfloat16, "BFloat16", "BF16"),
    # MindSpore writes these three to ckpt and cannot load them; we can.
    _row("complex64", 14, np.complex64, "Complex64", "C64"),
    _row("complex128", 15, np.complex128, "Complex128", None),
    _row("float8_e4m3fn", 16, ml_dtypes.float8_e4m3fn, "Float8E4M3FN", "F8_E4M3"),
    _row("float8_e5m2", 17, ml_dtypes.float8_e5m2, "Float8E5M2", "F8_E5M2"),
    # MindSpore's qint4x2: one byte per element, not packed; int8 in numpy.
    _row("int4", 18, np.int8, "Int4", "I8"),
)
_BY_NAME = {row.name: row for row in _TABLE}
_BY_CODE = {row.code: row for row in _TABLE}
_BY_NUMPY = {row.numpy: row for row in _TABLE if row.name != "int4"}
_BY_CKPT = {row.ckpt: row for row in _TABLE if row.ckpt is not None}
_BY_SAFETENSORS = {row.safetensors: row for row in _TABLE if row.safetensors is not None and row.name != "int4"}


def from_numpy(dtype: Any) -> DType:
    """Look a numpy dtype up, whatever its byte order.

    Raises
    ------
    ConfigTypeError
        If no format can hold it (objects, strings, structures, dates).
    """
    wanted = np.dtype(dtype)
    row = _BY_NUMPY.get(wanted.newbyteorder("<")) if wanted.names is None else None
    if row is None:
        raise ConfigTypeError(f"arrays of dtype {wanted} cannot be saved; expected one of {', '.join(_BY_NAME)}")
    return row


def by_name(name: str) -> DType:
    """Row of a canonical name; KeyError if there is none."""
    return _BY_NAME[name]


def by_code(code: int) -> DType:
    """Row of a table code; KeyError if there is none."""
    return _BY_CODE[code]


def by_ckpt(name: str) -> DType | None:
    """Row of a MindSpore ``tensor_type`` string, or None."""
    return _BY_CKPT.get(name)


def by_safetensors(name: str) -> DType | None:
    """Row of a safetensors dtype string, or None."""
    return _BY_SAFETENSORS.get(name)
