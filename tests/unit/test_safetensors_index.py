from __future__ import annotations

import json
from typing import Any

import pytest

from parckpt.core import dtypes
from parckpt.errors import FormatError
from parckpt.formats.base import BytesReader, Extent, FileIndex
from parckpt.formats.safetensors import entry, layout, read_index
from parckpt.testing.files import CountingReader

pytestmark = pytest.mark.fast

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def with_header(header: bytes | dict[str, Any], data_nbytes: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_nbytes)


def read(data: bytes) -> FileIndex:
    return read_index(BytesReader(data, "f.safetensors"))


def test_plain() -> None:
    data = with_header({"__metadata__": {"format": "pt"}, "a": A})
    index = read(data)
    assert (index.format, index.metadata, index.crc) == ("safetensors", {"format": "pt"}, None)
    assert index.body_nbytes == len(data)
    (item,) = index.entries
    assert (item.name, item.kind, item.type, item.shape) == ("a", "tensor", "F32", (2,))
    assert item.dtype is dtypes.by_name("float32")
    assert item.extents == (Extent(0, 0, len(data) - 8, 8),)


def test_entries_come_in_order_of_their_data() -> None:
    second = {"dtype": "I8", "shape": [0], "data_offsets": [8, 8]}
    third = {"dtype": "I8", "shape": [], "data_offsets": [8, 9]}
    index = read(with_header({"z": third, "y": second, "a": A}, 9))
    assert [(item.name, item.nbytes) for item in index.entries] == [("a", 8), ("y", 0), ("z", 1)]
    assert [extent.entry for item in index.entries for extent in item.extents] == [0, 2]


@pytest.mark.parametrize(
    "data",
    [
        with_header(json.dumps({"a": A}).encode() + b"\n \t "),
        with_header({"a": A | {"quantized": False}}),
        with_header({"__metadata__": {}, "a": A}),
        with_header(b'{"\\u0061": ' + json.dumps(A).encode() + b"}"),
    ],
    ids=["white space", "unknown key", "no metadata", "escapes"],
)
def test_legal_variants(data: bytes) -> None:
    assert [item.name for item in read(data).entries] == ["a"]


def test_int4_is_known_by_its_mark() -> None:
    int8 = {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}
    other = {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]}
    index = read(with_header({"__metadata__": {"x": "Int4", "crc_num": "42"}, "x": int8, "y": other}))
    assert [(item.type, item.dtype and item.dtype.name) for item in index.entries] == [("Int4", "int4"), ("I8", "int8")]
    assert index.crc == 42


def changed(**fields: Any) -> dict[str, Any]:
    return {"a": A | fields}


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        (b"", "header length", "the file has 0 bytes"),
        (bytes(7), "header length", "the file has 7 bytes"),
        (b"\x03\0\0\0\0\0\0\0{}", "header length", "3 bytes, 2 are left"),
        (b"\xff" * 8 + b"{}", "header length", "at most 100000000"),
        ((100_000_001).to_bytes(8, "little") + bytes(100), "header length", "at most 100000000"),
        (bytes(8), "header", "does not begin with"),
        (with_header(b" {}", 0), "header", "does not begin with"),
        (with_header(b"[]", 0), "header", "does not begin with"),
        (with_header(b"{", 0), "header", "JSONDecodeError"),
        (with_header(b"{}\0", 0), "header", "JSONDecodeError"),
        (with_header(b'{"\xff":1}', 0), "header", "UnicodeDecodeError"),
        (with_header(b'{"\\ud800":1}', 0), "header", "UnicodeEncodeError"),
        (with_header(b'{"__metadata__":{"k":"\\ud800"}}', 0), "__metadata__", "not valid Unicode"),
        (with_header(b'{"a":1,"a":1}', 0), "header", "a key occurs twice"),
        (with_header(b'{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', 4), "header", "twice"),
        (with_header(b'{"a":' * 100_000, 0), "header", "RecursionError|JSONDecodeError"),
        (with_header(b'{"a":' + b"9" * 5000 + b"}", 0), "header", "ValueError"),
        (with_header({"__metadata__": None, "a": A}), "__metadata__", "not an object of strings"),
        (with_header({"__metadata__": {"k": 1}, "a": A}), "__metadata__", "not an object of strings"),
        (with_header({"__metadata__": {"crc_num": "-1"}, "a": A}), "__metadata__.crc_num", "not a decimal number"),
        (with_header({"__metadata__": {"crc_num": "²"}, "a": A}), "__metadata__.crc_num", "not a decimal number"),
        (with_header({"a": [1]}), "tensor", "'a' is not an object with"),
        (with_header({"a": {"dtype": "F32", "shape": [2]}}), "tensor", "'a' is not an object with"),
        (with_header(changed(dtype="Float32")), "a.dtype", "unknown type 'Float32'"),
        (with_header(changed(dtype=["F32"])), "a.dtype", "unknown type"),
        (with_header(changed(shape=None)), "a.shape", "impossible shape"),
        (with_header(changed(shape=[2.0])), "a.shape", "impossible shape"),
        (with_header(changed(shape=[True, 2])), "a.shape", "impossible shape"),
        (with_header(changed(shape=[-2])), "a.shape", "impossible shape"),
        (with_header(changed(shape=[2**63])), "a.shape", "impossible shape"),
        (with_header(changed(shape=[0, 2**62], data_offsets=[0, 0]), 0), "a.shape", "impossible shape"),
        (with_header(changed(shape=[1] * 33)), "a.shape", "impossible shape"),
        (with_header(changed(data_offsets=[0])), "a.data_offsets", "not two numbers"),
        (with_header(changed(data_offsets=[0, "8"])), "a.data_offsets", "not two numbers"),
        (with_header(changed(data_offsets=[8, 0])), "a.data_offsets", "-8 bytes, expected 8"),
        (with_header(changed(data_offsets=[0, 9]), 9), "a.data_offsets", "9 bytes, expected 8"),
        (with_header(changed(data_offsets=[1, 9]), 9), "a.data_offsets", "leave a gap"),
        (with_header({"a": A, "b": A}), "b.data_offsets", "overlap"),
        (with_header({"a": A}, 9), "data", "data end at byte"),
        (with_header({"a": A}, 7), "data", "data end at byte"),
        (with_header({}, 1), "data", "data end at byte"),
        (with_header({"n" * 70_000: A}), "name", "at most 65536"),
    ],
)
def test_everything_else_is_refused(data: bytes, field: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read(data)
    assert (caught.value.path, caught.value.field) == ("f.safetensors", field)
    assert 0 <= caught.value.byte_offset <= max(len(data), 8)


def test_only_the_header_is_read() -> None:
    made = layout([entry(f"p{i}", dtypes.by_name("float32"), (100,)) for i in range(200)], metadata={})
    header = made.parts[0]
    data = header.data + bytes(made.nbytes - header.nbytes)  # type: ignore[union-attr]
    reader = CountingReader(data)
    index = read_index(reader)
    assert reader.reads == [(0, 4096), (4096, header.nbytes - 4096)]
    assert sorted(item.name for item in index.entries) == sorted(f"p{i}" for i in range(200))
