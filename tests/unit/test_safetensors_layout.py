from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from parckpt.core import dtypes
from parckpt.errors import ConfigError
from parckpt.formats import safetensors
from parckpt.formats.base import Extent, Literal
from parckpt.formats.safetensors import MINDSPORE_METADATA, content_crc, entry, file_crc, layout

pytestmark = pytest.mark.fast

FLOAT32, INT8, INT4 = dtypes.by_name("float32"), dtypes.by_name("int8"), dtypes.by_name("int4")


def header(given: object) -> dict[str, object]:
    assert isinstance(given, Literal)
    assert given.byte_offset == 0
    nbytes = int.from_bytes(given.data[:8], "little")
    assert nbytes % 8 == 0
    assert len(given.data) == 8 + nbytes
    parsed: dict[str, object] = json.loads(given.data[8:])
    return parsed


def test_no_entries() -> None:
    made = layout([], metadata=MINDSPORE_METADATA)
    assert made.parts == (Literal(0, b"\x08\0\0\0\0\0\0\0{}      "),)
    assert made.nbytes == 16
    assert header(layout([], metadata=MINDSPORE_METADATA, crc=0).parts[0]) == {
        "__metadata__": {"format": "ms", "crc_num": "0"}
    }


def test_header_bytes() -> None:
    made = layout([entry("e", FLOAT32, (0, 3)), entry("é", FLOAT32, ())], metadata={"format": "ms"})
    text = '{"__metadata__":{"format":"ms"},"e":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},'
    text += '"é":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
    padded = text.encode() + b" " * (-len(text.encode()) % 8)
    assert made.parts == (
        Literal(0, len(padded).to_bytes(8, "little") + padded),
        Extent(1, 0, 8 + len(padded), 4),
    )
    assert (made.nbytes, made.trailer_nbytes) == (12 + len(padded), 0)


def test_metadata_may_be_left_out() -> None:
    assert header(layout([entry("a", INT8, (1,))], metadata={}).parts[0]).keys() == {"a"}


def test_order_is_by_type_then_by_name_or_as_given() -> None:
    given = [entry("b", INT8, (1,)), entry("c", FLOAT32, (1,)), entry("a", INT8, (2,)), entry("B", INT8, (1,))]
    by_library = layout(given, metadata={})
    assert [extent.entry for extent in by_library.extents] == [1, 3, 2, 0]
    assert list(header(by_library.parts[0])) == ["c", "B", "a", "b"]
    assert [extent.entry for extent in layout(given, metadata={}, order="given").extents] == [0, 1, 2, 3]


def test_int4_is_marked_in_the_metadata() -> None:
    made = layout([entry("x", INT4, (3,)), entry("y", INT8, (3,))], metadata={"format": "ms"}, crc=12)
    found = header(made.parts[0])
    assert found["__metadata__"] == {"format": "ms", "x": "Int4", "crc_num": "12"}
    assert found["x"] == {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}


def test_sizes_of_a_hundred_gigabytes() -> None:
    made = layout([entry(f"w{i}", FLOAT32, (25, 10**8)) for i in range(10)], metadata={})
    assert [extent.nbytes for extent in made.extents] == [10**10] * 10
    assert made.nbytes == made.extents[-1].byte_offset + 10**10


@pytest.mark.parametrize(
    ("names", "metadata", "crc", "message"),
    [
        (["a", "a"], {}, None, "two entries are called 'a'"),
        (["x"], {"x": "1"}, None, "metadata 'x' is taken"),
        (["a"], {"crc_num": "1"}, 1, "metadata 'crc_num' is taken"),
        (["crc_num"], {}, 1, "metadata 'crc_num' is taken"),
        (["crc_num"], {}, None, "metadata 'crc_num' is taken"),
        (["a"], {"k": 1}, None, "must be str to str"),
        (["a"], {"k": "\ud800"}, None, "valid Unicode"),
    ],
)
def test_what_cannot_be_written(names: list[str], metadata: dict[str, str], crc: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout([entry(name, INT4, (1,)) for name in names], metadata=metadata, crc=crc)


def test_a_header_longer_than_readers_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert safetensors.MAX_HEADER_NBYTES == 100_000_000
    fits = layout([entry("a", INT8, (1,))], metadata={"k": "x" * 900})
    monkeypatch.setattr(safetensors, "MAX_HEADER_NBYTES", fits.extents[0].byte_offset - 8)
    assert layout([entry("a", INT8, (1,))], metadata={"k": "x" * 900}) == fits
    with pytest.raises(ConfigError, match="readers take at most"):
        layout([entry("a", INT8, (1,))], metadata={"k": "x" * 910})


def test_metadata_key_is_no_name() -> None:
    with pytest.raises(ConfigError, match="no tensor can be called '__metadata__'"):
        entry("__metadata__", INT8, ())


def test_strings_cannot_be_appended() -> None:
    with pytest.raises(ConfigError, match="safetensors cannot hold 'note': it has no strings"):
        safetensors.value_entry("note", "x")


def test_numbers_can() -> None:
    made, data = safetensors.value_entry("n", np.float64(0.5))
    assert (made.type, made.shape, data) == ("F64", (), np.float64(0.5).tobytes())


def contribution(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> tuple[str, tuple[int, int]]:
    return name, content_crc(entry(name, dtypes.by_name(dtype), shape), zlib.crc32(data), data)


def test_crc_covers_names_and_contents_in_order_of_names() -> None:
    given = [contribution("b", "float32", (1,), b"BBBB"), contribution("a", "bool", (), b"\1")]
    assert file_crc(given) == zlib.crc32(b"a\1bBBBB")
    assert file_crc([]) == 0


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "stands_for"),
    [
        ("int64", (), (300).to_bytes(8, "little"), bytes(300)),
        ("uint8", (), b"\xc8", bytes(200)),
        ("int32", (), bytes(4), b""),
        ("int4", (), b"\x03", bytes(3)),
        ("int64", (1,), (300).to_bytes(8, "little"), (300).to_bytes(8, "little")),
        ("int64", (), (-1).to_bytes(8, "little", signed=True), b"\xff" * 8),
        ("bool", (), b"\1", b"\1"),
        ("bfloat16", (), b"\x80\x3f", b"\x80\x3f"),
    ],
)
def test_zero_dimensional_integers_count_as_zeros(
    dtype: str, shape: tuple[int, ...], data: bytes, stands_for: bytes
) -> None:
    _, (crc, nbytes) = contribution("x", dtype, shape, data)
    assert (crc, nbytes) == (zlib.crc32(stands_for), len(stands_for))


def test_huge_zero_dimensional_integers_take_no_memory() -> None:
    huge = (2**64 - 1).to_bytes(8, "little")
    _, (crc, nbytes) = contribution("x", "uint64", (), huge)
    assert nbytes == 2**64 - 1
    assert 0 <= file_crc([("x", (crc, nbytes))]) < 2**32


def test_content_is_needed_for_zero_dimensional_integers() -> None:
    with pytest.raises(ValueError, match="content of 0-d integer 'x' is needed"):
        content_crc(entry("x", INT8, ()), 0)
