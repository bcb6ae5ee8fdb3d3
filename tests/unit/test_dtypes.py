from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from parckpt.core import dtypes
from parckpt.errors import ConfigTypeError

pytestmark = pytest.mark.fast

# name: code, bytes, ckpt, safetensors. Written to disk: a change here breaks files.
EXPECTED = {
    "bool": (1, 1, "Bool", "BOOL"),
    "int8": (2, 1, "Int8", "I8"),
    "int16": (3, 2, "Int16", "I16"),
    "int32": (4, 4, "Int32", "I32"),
    "int64": (5, 8, "Int64", "I64"),
    "uint8": (6, 1, "UInt8", "U8"),
    "uint16": (7, 2, "UInt16", "U16"),
    "uint32": (8, 4, "UInt32", "U32"),
    "uint64": (9, 8, "UInt64", "U64"),
    "float16": (10, 2, "Float16", "F16"),
    "float32": (11, 4, "Float32", "F32"),
    "float64": (12, 8, "Float64", "F64"),
    "bfloat16": (13, 2, "BFloat16", "BF16"),
    "complex64": (14, 8, "Complex64", "C64"),
    "complex128": (15, 16, "Complex128", None),
    "float8_e4m3fn": (16, 1, "Float8E4M3FN", "F8_E4M3"),
    "float8_e5m2": (17, 1, "Float8E5M2", "F8_E5M2"),
    "int4": (18, 1, "Int4", "I8"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_table(name: str) -> None:
    row = dtypes.by_name(name)
    assert (row.code, row.itemsize, row.ckpt, row.safetensors) == EXPECTED[name]
    assert dtypes.by_code(row.code) is row
    assert dtypes.by_ckpt(row.ckpt or "") is row
    if name != "int4":
        assert dtypes.from_numpy(row.numpy) is row
    if row.safetensors is not None and name != "int4":
        assert dtypes.by_safetensors(row.safetensors) is row


def test_int8_is_never_taken_for_int4() -> None:
    assert dtypes.from_numpy(np.int8).name == "int8"
    assert (dtypes.by_safetensors("I8") or dtypes.by_name("bool")).name == "int8"


@pytest.mark.parametrize("given", [">f4", ">i8", ">u2", ">c16", ">f2"])
def test_byte_order_does_not_matter(given: str) -> None:
    row = dtypes.from_numpy(given)
    assert row.numpy == np.dtype(given).newbyteorder("<")


def test_extension_types() -> None:
    assert dtypes.from_numpy(ml_dtypes.bfloat16).name == "bfloat16"
    assert dtypes.from_numpy(ml_dtypes.float8_e5m2).name == "float8_e5m2"


@pytest.mark.parametrize("given", [object, "U3", "S3", "M8[s]", [("a", "i4")], "V4", np.longdouble])
def test_other_types_are_refused(given: object) -> None:
    with pytest.raises(ConfigTypeError, match="cannot be saved"):
        dtypes.from_numpy(given)


def test_unknown_names_give_none() -> None:
    assert dtypes.by_ckpt("float32") is None
    assert dtypes.by_safetensors("F4") is None
