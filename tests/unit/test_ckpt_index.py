from __future__ import annotations

import pytest

from parckpt.core import dtypes
from parckpt.errors import FormatError
from parckpt.formats import ckpt
from parckpt.formats.base import BytesReader, Entry, Extent, FileIndex
from parckpt.formats.ckpt_index import MAX_TEXT_NBYTES
from parckpt.formats.entries import MAX_NAME_NBYTES
from parckpt.formats.registry import FORMATS
from parckpt.formats.wire import bytes_field, varint
from parckpt.testing.files import CountingReader, assemble, content

pytestmark = pytest.mark.fast

TAG = bytes_field(1, b"a")
INT32 = bytes_field(2, b"Int32")
DIM2 = b"\x08\x02"
EIGHT = bytes_field(3, bytes(range(8)))


def value(*fields: bytes) -> bytes:
    return bytes_field(1, b"".join(fields))


def tensor(*fields: bytes) -> bytes:
    return bytes_field(2, b"".join(fields))


def named(name: bytes, *fields: bytes) -> bytes:
    return value(bytes_field(1, name), tensor(*fields))


def read(data: bytes) -> FileIndex:
    return ckpt.read_index(BytesReader(data, "f.ckpt"))


def contents(data: bytes) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {item.name: (item.shape, content(BytesReader(data), item)) for item in read(data).entries}


PLAIN = value(TAG, tensor(DIM2, INT32, EIGHT))


def test_plain() -> None:
    index = read(PLAIN)
    assert (index.format, index.metadata, index.crc, index.body_nbytes) == ("ckpt", {}, None, len(PLAIN))
    (item,) = index.entries
    assert (item.name, item.kind, item.type, item.shape) == ("a", "tensor", "Int32", (2,))
    assert item.dtype is dtypes.by_name("int32")
    assert item.extents == (Extent(0, 0, len(PLAIN) - 8, 8),)
    assert item.nbytes == 8


@pytest.mark.parametrize(
    "data",
    [
        value(tensor(EIGHT, INT32, DIM2), TAG),
        value(TAG, tensor(bytes_field(1, b"\x02"), INT32, EIGHT)),
        value(TAG, tensor(b"\x08\x82\x00", INT32, EIGHT)),
        value(bytes_field(1, b"old"), TAG, tensor(bytes_field(2, b"Int8"), INT32, bytes_field(3, b"old"), EIGHT, DIM2)),
        value(TAG, tensor(DIM2), tensor(INT32), tensor(EIGHT)),
        value(TAG, bytes_field(3, bytes_field(1, b"")), tensor(DIM2, INT32, EIGHT)),
        b"\x10\x05" + PLAIN + b"\x1d\0\0\0\0" + bytes_field(9, b"xyz") + b"\x23\x24",
        value(b"\x20\x01", TAG, bytes_field(7, b""), tensor(b"\x21" + bytes(8), DIM2, INT32, EIGHT, b"\x38\x01")),
    ],
    ids=["any order", "packed", "long varint", "last counts", "merged", "oneof", "unknown outside", "unknown inside"],
)
def test_legal_variants(data: bytes) -> None:
    assert contents(data) == {"a": ((2,), bytes(range(8)))}


def test_dims_may_mix_packed_and_not() -> None:
    data = named(b"a", b"\x08\x01", bytes_field(1, b"\x02\x04"), b"\x08\x01", INT32, bytes_field(3, bytes(32)))
    assert contents(data) == {"a": ((1, 2, 4, 1), bytes(32))}


def test_neighbours_of_one_tag_are_slices() -> None:
    parts = [named(b"a", DIM2, INT32, bytes_field(3, piece)) for piece in (b"123", b"", b"45678")]
    data = b"".join(parts)
    assert contents(data) == {"a": ((2,), b"12345678")}
    assert [(item.start, item.nbytes) for item in read(data).entries[0].extents] == [(0, 3), (3, 5)]


def test_an_unknown_field_between_does_not_part_neighbours() -> None:
    parts = [named(b"a", DIM2, INT32, bytes_field(3, piece)) for piece in (b"123", b"45678")]
    assert contents(parts[0] + b"\x10\x05" + parts[1]) == {"a": ((2,), b"12345678")}


def test_of_tags_apart_the_last_wins_at_the_first_place() -> None:
    one, two = bytes_field(3, b"1111"), bytes_field(3, b"2222")
    data = named(b"a", b"\x08\x01", INT32, one) + named(b"b", INT32, one) + named(b"a", INT32, two)
    assert list(contents(data).items()) == [("a", ((), b"2222")), ("b", ((), b"1111"))]
    assert [extent.entry for item in read(data).entries for extent in item.extents] == [0, 1]


def test_dims_zero_is_a_scalar_only_with_content() -> None:
    assert contents(named(b"a", b"\x08\0", INT32, bytes_field(3, b"1234"))) == {"a": ((), b"1234")}
    assert contents(named(b"a", b"\x08\0", INT32, bytes_field(3, b""))) == {"a": ((0,), b"")}


def map_value(*parts: bytes) -> bytes:
    return value(TAG, bytes_field(3, b"".join(bytes_field(1, part) for part in parts)))


def array(type_name: bytes, dims: bytes, data: bytes) -> bytes:
    return bytes_field(1, dims) + bytes_field(2, type_name) + bytes_field(3, data)


def test_map_slices_are_joined() -> None:
    first = map_value(
        array(b"int64", b"\2", b"k" * 16), array(b"float32", b"\2\3", b"v" * 24), array(b"int32", b"\2", b"s" * 8)
    )
    second = map_value(
        array(b"int64", b"\1", b"K" * 8), array(b"float32", b"\1\3", b"V" * 12), array(b"int32", b"\1", b"S" * 4)
    )
    data = first + second
    (item,) = read(data).entries
    assert (item.kind, item.type, item.shape, item.extents, item.nbytes) == ("map", "map", (), (), 72)
    found = [(part.name, part.type, part.shape, content(BytesReader(data), part)) for part in item.parts]
    assert found == [
        ("keys", "int64", (3,), b"k" * 16 + b"K" * 8),
        ("values", "float32", (3, 3), b"v" * 24 + b"V" * 12),
        ("status", "int32", (3,), b"s" * 8 + b"S" * 4),
    ]


STR = bytes_field(2, b"str")


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        (value(tensor(DIM2, INT32, EIGHT)), "value.tag", "missing"),
        (value(TAG), "value.tensor", "'a' has 0 tensors"),
        (value(TAG, tensor(DIM2, EIGHT)), "value.tensor.tensor_type", "missing"),
        (value(TAG, tensor(DIM2, INT32)), "value.tensor.tensor_content", "missing"),
        (named(b"\xff", DIM2, INT32, EIGHT), "value.tag", "not UTF-8"),
        (named(b"n" * (MAX_NAME_NBYTES + 1), DIM2, INT32, EIGHT), "value.tag", "at most 65536 are taken"),
        (named(b"a", DIM2, bytes_field(2, b"T" * 65), EIGHT), "value.tensor.tensor_type", "at most 64"),
        (named(b"a", DIM2, bytes_field(2, b"int32"), EIGHT), "value.tensor.tensor_type", "unknown type 'int32'"),
        (named(b"a", DIM2, INT32, bytes_field(3, bytes(7))), "value.tensor.tensor_content", "7 bytes, expected 8"),
        (named(b"a", DIM2, INT32, bytes_field(3, bytes(9))), "value.tensor.tensor_content", "9 bytes, expected 8"),
        (named(b"a", b"\x08\0\x08\0", INT32, bytes_field(3, bytes(4))), "value.tensor.tensor_content", "expected 0"),
        (named(b"a", b"\x08\0", INT32, bytes_field(3, bytes(8))), "value.tensor.tensor_content", "8 bytes, expected 0"),
        (named(b"a", b"\x08" + varint(2**64 - 1), INT32, EIGHT), "value.tensor.dims", r"impossible shape \(-1,\)"),
        (named(b"a", (b"\x08" + varint(2**62)) * 2, INT32, EIGHT), "value.tensor.dims", "impossible shape"),
        (named(b"a", b"\x08\0\x08" + varint(2**62), INT32, b"\x1a\0"), "value.tensor.dims", "impossible shape"),
        (named(b"a", b"\x08\1" * 33, INT32, EIGHT), "value.tensor.dims", "more than 32 dimensions"),
        (named(b"a", bytes_field(1, b"\1" * 1000), INT32, EIGHT), "value.tensor.dims", "more than 32 dimensions"),
        (named(b"a", bytes_field(1, b"\x82"), INT32, EIGHT), "value.tensor.dims", "ends inside a varint"),
        (b"\x08\x01", "checkpoint.value", "wire type 0, expected 2"),
        (value(b"\x08\x01"), "value.tag", "wire type 0, expected 2"),
        (value(TAG, b"\x10\x01"), "value.tensor", "wire type 0, expected 2"),
        (named(b"a", b"\x0d\0\0\0\0", INT32, EIGHT), "value.tensor.dims", "wire type 5, expected 2"),
        (named(b"a", DIM2, b"\x10\x01", EIGHT), "value.tensor.tensor_type", "wire type 0, expected 2"),
        (named(b"a", DIM2, INT32, b"\x18\x01"), "value.tensor.tensor_content", "wire type 0, expected 2"),
        (PLAIN + named(b"a", b"\x08\3", INT32, EIGHT), "value.tensor", "dims or type differ"),
        (PLAIN + named(b"a", DIM2, bytes_field(2, b"UInt32"), EIGHT), "value.tensor", "dims or type differ"),
        (PLAIN + PLAIN, "value.tensor.tensor_content", "16 bytes, expected 8"),
        (named(b"a", DIM2, STR, EIGHT), "value.tensor.dims", r"dims \[2\], expected \[0\]"),
        (named(b"a", b"\x08\0", STR, bytes_field(3, bytes(6))), "value.tensor.tensor_content", "multiple of 4"),
        (named(b"a", b"\x08\0", STR, bytes_field(3, b"")), "value.tensor.tensor_content", "multiple of 4"),
        (named(b"a", b"\x08\0", STR, bytes_field(3, b"\0\0\x11\0")), "value.tensor.tensor_content", "not UTF-32"),
        (map_value(array(b"int32", b"\1", bytes(4))), "value.maptensor", "has 1 tensors"),
        (map_value(*[array(b"int32", b"\1", bytes(4))] * 4), "maptensor.tensor", "more than 3 tensors"),
        (map_value(*[array(b"Int32", b"\1", bytes(4))] * 3), "maptensor.tensor.tensor_type", "unknown type 'Int32'"),
        (map_value(*[array(b"int32", b"", bytes(4))] * 3), "maptensor.tensor", "does not continue"),
        (map_value(*[array(b"int32", b"\2", bytes(4))] * 3), "maptensor.tensor.tensor_content", "4 bytes, expected 8"),
        (
            map_value(*[array(b"int32", b"\1", bytes(4))] * 2, array(b"int32", b"\2", bytes(8))),
            "value.maptensor",
            "lengths of 'a' differ",
        ),
        (
            map_value(*[array(b"int32", b"\1", bytes(4))] * 3) + PLAIN,
            "checkpoint.value",
            "a tensor in one slice, a map in the next",
        ),
    ],
)
def test_everything_else_is_refused(data: bytes, field: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read(data)
    assert (caught.value.path, caught.value.field) == ("f.ckpt", field)
    assert 0 <= caught.value.byte_offset <= len(data)


def test_a_damaged_slice_is_refused_even_if_a_later_one_replaces_it() -> None:
    short = named(b"a", DIM2, INT32, bytes_field(3, bytes(4)))
    other = named(b"b", INT32, bytes_field(3, bytes(4)))
    with pytest.raises(FormatError, match="4 bytes, expected 8"):
        read(short + other + PLAIN)


def test_every_cut_is_refused_but_those_between_messages() -> None:
    data = PLAIN + named(b"b", INT32, bytes_field(3, bytes(4)))
    whole = []
    for stop in range(len(data) + 1):
        try:
            whole.append((stop, [item.name for item in read(data[:stop]).entries]))
        except FormatError:
            continue
    assert whole == [(0, []), (len(PLAIN), ["a"]), (len(data), ["a", "b"])]


def test_the_trailer_is_found() -> None:
    index = read(PLAIN + ckpt.trailer(0x01020304))
    assert (index.crc, index.body_nbytes, len(index.entries)) == (0x01020304, len(PLAIN), 1)
    assert read(ckpt.trailer(7)).crc == 7


def test_a_damaged_high_byte_of_the_trailer_matches_no_crc() -> None:
    data = bytearray(PLAIN + ckpt.trailer(1))
    data[-10] = 1
    assert read(bytes(data)).crc == (1 << 72) + 1


def test_a_tensor_that_ends_like_a_trailer_is_a_tensor() -> None:
    fake = b"." * 7 + ckpt.trailer(1)
    data = named(b"a", b"\x08\x06", INT32, bytes_field(3, fake))
    index = read(data)
    assert (index.crc, index.body_nbytes) == (None, len(data))
    assert contents(data) == {"a": ((6,), fake)}


class Sparse:
    """A file of headers with nothing real in between; too big to exist here."""

    path = "big.ckpt"

    def __init__(self, entries: list[Entry]) -> None:
        self.layout = ckpt.layout(entries)
        self.nbytes = self.layout.nbytes
        self.literals = {part.byte_offset: part.data for part in self.layout.parts if not isinstance(part, Extent)}
        self.nbytes_read = 0

    def read(self, byte_offset: int, nbytes: int) -> bytes:
        assert 0 <= byte_offset <= byte_offset + nbytes <= self.nbytes
        self.nbytes_read += nbytes
        out = bytearray(nbytes)
        for at, data in self.literals.items():
            for index, byte in enumerate(data):
                if byte_offset <= at + index < byte_offset + nbytes:
                    out[at + index - byte_offset] = byte
        return bytes(out)


def test_a_hundred_gigabytes_are_indexed_from_kilobytes() -> None:
    file = Sparse([ckpt.entry(f"layer{i}.weight", dtypes.by_name("float32"), (5, 10**9)) for i in range(5)])
    index = ckpt.read_index(file)
    assert file.nbytes > 100 * 10**9
    assert [item.nbytes for item in index.entries] == [20 * 10**9] * 5
    assert tuple(extent for item in index.entries for extent in item.extents) == file.layout.extents
    assert file.nbytes_read < 200 << 10  # 190 messages of at most 512 MiB


def test_small_tensors_are_read_in_few_pieces() -> None:
    entries = [ckpt.entry(f"p{i}", dtypes.by_name("int32"), (10,)) for i in range(5000)]
    data = assemble(ckpt.layout(entries), [bytes(40)] * 5000, FORMATS["ckpt"])
    reader = CountingReader(data)
    assert len(ckpt.read_index(reader).entries) == 5000
    assert len(reader.reads) < 40


def test_no_read_is_longer_than_what_it_is_for() -> None:
    # A name that claims to be long, in a file that is long enough.
    data = value(bytes_field(1, bytes(1 << 20)), tensor(DIM2, INT32, EIGHT))
    reader = CountingReader(data)
    with pytest.raises(FormatError, match="at most 65536"):
        ckpt.read_index(reader)
    assert reader.nbytes_read < 2000


def test_strings_are_bounded() -> None:
    nbytes = MAX_TEXT_NBYTES + 4
    data = named(b"a", b"\x08\0", STR, bytes_field(3, bytes(nbytes)))
    reader = CountingReader(data)
    with pytest.raises(FormatError, match=f"string 'a' has {nbytes} bytes"):
        ckpt.read_index(reader)
    assert reader.nbytes_read < 2000
