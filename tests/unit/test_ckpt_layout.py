from __future__ import annotations

import struct

import numpy as np
import pytest

from parckpt.core import dtypes
from parckpt.errors import ConfigError, ConfigTypeError
from parckpt.formats import ckpt
from parckpt.formats.base import BytesReader, Entry, Extent, Literal
from parckpt.formats.registry import FORMATS
from parckpt.testing.files import assemble

pytestmark = pytest.mark.fast

INT32 = dtypes.by_name("int32")
UINT8 = dtypes.by_name("uint8")


def file_of(*items: tuple[Entry, bytes], crc: bool = False) -> bytes:
    layout = ckpt.layout([entry for entry, _ in items], crc=crc)
    return assemble(layout, [data for _, data in items], FORMATS["ckpt"])


def test_worked_example() -> None:
    expected = "0a14 0a017a 120f 0801 1205496e743332 1a04 01000000"
    assert file_of((ckpt.entry("z", INT32, (1,)), b"\1\0\0\0")) == bytes.fromhex(expected)


def test_parts_say_where_each_byte_comes_from() -> None:
    layout = ckpt.layout([ckpt.entry("z", INT32, (1,)), ckpt.entry("y", UINT8, (2, 3))])
    assert layout.parts == (
        Literal(0, bytes.fromhex("0a140a017a120f08011205496e7433321a04")),
        Extent(0, 0, 18, 4),
        Literal(22, bytes.fromhex("0a180a017912130802080312055549 6e7438 1a06".replace(" ", ""))),
        Extent(1, 0, 42, 6),
    )
    assert (layout.nbytes, layout.body_nbytes, layout.trailer_nbytes) == (48, 48, 0)
    assert layout.extents == (layout.parts[1], layout.parts[3])


def test_a_scalar_has_no_dims() -> None:
    assert file_of((ckpt.entry("z", INT32, ()), b"\1\0\0\0")) == bytes.fromhex(
        "0a120a017a120d1205496e7433321a0401000000"
    )


def test_no_entries_make_no_bytes() -> None:
    assert file_of() == b""


def test_trailer() -> None:
    assert ckpt.trailer(0x5CB82B5A) == b"crc_num" + bytes.fromhex("0000000000005cb82b5a")
    layout = ckpt.layout([ckpt.entry("z", INT32, (1,))], crc=True)
    assert (layout.nbytes, layout.body_nbytes, layout.trailer_nbytes) == (39, 22, 17)
    assert file_of(crc=True) == ckpt.trailer(0)


def test_an_empty_tensor_is_kept_with_its_shape() -> None:
    data = file_of((ckpt.entry("e", INT32, (3, 0)), b""), (ckpt.entry("f", INT32, (0,)), b""))
    index = ckpt.read_index(BytesReader(data))
    assert [(item.name, item.shape, item.extents) for item in index.entries] == [("e", (3, 0), ()), ("f", (0,), ())]


def slice_sizes(shape: tuple[int, ...], slice_nbytes: int, slicing: str) -> list[int]:
    item = ckpt.entry("x", UINT8, shape)
    layout = ckpt.layout([item], slice_nbytes=slice_nbytes, slicing="rows" if slicing == "rows" else "bytes")
    sizes = []
    for part in layout.parts:
        if isinstance(part, Literal):
            sizes.append(0)
        else:
            sizes[-1] = part.nbytes
    starts = [extent.start for extent in layout.extents]
    assert starts == [sum(sizes[:i]) for i in range(len(sizes)) if sizes[i]]
    return sizes


@pytest.mark.parametrize(
    ("shape", "slicing", "expected"),
    [
        ((1024,), "bytes", [1024]),
        ((1025,), "bytes", [1024, 1]),
        ((2048,), "bytes", [1024, 1024]),
        ((1024,), "rows", [1024]),
        ((1025,), "rows", [513, 512]),
        ((7, 602), "rows", [1204, 1204, 602, 602, 602]),
        ((1, 3000), "rows", [3000, 0, 0]),
        ((2, 3000), "rows", [3000, 3000, 0, 0, 0, 0]),
    ],
)
def test_slices(shape: tuple[int, ...], slicing: str, expected: list[int]) -> None:
    assert slice_sizes(shape, 1024, slicing) == expected


@pytest.mark.parametrize(
    ("nbytes", "slicing", "expected"),
    [
        (2**29, "bytes", [2**29]),
        (2**29 + 1, "bytes", [2**29, 1]),
        (600 << 20, "bytes", [536870912, 92274688]),
        (600 << 20, "rows", [314572800, 314572800]),
        (40 * 2**30, "bytes", [2**29] * 80),
    ],
)
def test_slices_of_real_size(nbytes: int, slicing: str, expected: list[int]) -> None:
    assert slice_sizes((nbytes,), ckpt.SLICE_NBYTES, slicing) == expected


def test_a_hundred_gigabytes_add_up() -> None:
    float32 = dtypes.by_name("float32")
    entries = [ckpt.entry(f"layer{i}.weight", float32, (25, 10**8)) for i in range(10)]
    layout = ckpt.layout(entries, crc=True)
    assert sum(extent.nbytes for extent in layout.extents) == 100 * 10**9
    at = 0
    for part in layout.parts:
        assert part.byte_offset == at
        at += part.nbytes
    assert at == layout.body_nbytes == layout.nbytes - 17
    # Each message states its own length: 512 MiB and what stands before it.
    assert layout.parts[0] == Literal(
        0,
        bytes.fromhex("0aab80808002 0a0d")
        + b"layer0.weight"
        + bytes.fromhex("129680808002 0819 0880c2d72f 1207")
        + b"Float32"
        + bytes.fromhex("1a8080808002"),
    )


def test_one_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="two entries are called 'a'"):
        ckpt.layout([ckpt.entry("a", INT32, ()), ckpt.entry("b", INT32, ()), ckpt.entry("a", UINT8, (1,))])


@pytest.mark.parametrize(
    ("value", "type_name", "content"),
    [
        (True, "Bool", "01"),
        (False, "Bool", "00"),
        (-7, "Int64", "f9ffffffffffffff"),
        (2**63 - 1, "Int64", "ffffffffffffff7f"),
        (-(2**63), "Int64", "0000000000000080"),
        (2**63, "UInt64", "0000000000000080"),
        (2**64 - 1, "UInt64", "ffffffffffffffff"),
        (0.1, "Float32", struct.pack("<f", 0.1).hex()),
        (1e300, "Float32", "0000807f"),
        (-1e300, "Float32", "000080ff"),
        (1e-50, "Float32", "00000000"),
        (-0.0, "Float32", "00000080"),
        (np.float64(0.1), "Float64", struct.pack("<d", 0.1).hex()),
        ("", "str", "00000000"),
        ("aé", "str", "61000000e9000000"),
        ("\U0001f600", "str", "00f60100"),
        ("a\0", "str", "6100000000000000"),
        ("\ud800", "str", "00d80000"),
    ],
)
def test_appended_values(value: object, type_name: str, content: str) -> None:
    entry, data = ckpt.value_entry("v", value)
    assert (entry.type, data.hex(), entry.nbytes) == (type_name, content, len(data))
    assert entry.shape == ((0,) if isinstance(value, str) else ())
    if isinstance(value, str):
        index = ckpt.read_index(BytesReader(file_of((entry, data))))
        assert index.entries[0].text == value


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_integers_beyond_64_bits_are_refused(value: int) -> None:
    with pytest.raises(ConfigError, match="does not fit 64 bits"):
        ckpt.value_entry("v", value)


@pytest.mark.parametrize("value", [None, b"x", 1j, [1], np.int64(1), np.float32(1)])
def test_other_appended_values_are_refused(value: object) -> None:
    with pytest.raises(ConfigTypeError, match="'v' is a"):
        ckpt.value_entry("v", value)
