from __future__ import annotations

from collections.abc import Callable

import pytest

from parckpt.errors import FormatError
from parckpt.formats.wire import FIXED32, FIXED64, LENGTH, VARINT, Field, WireReader, bytes_field, length_key, varint
from parckpt.testing.files import CountingReader

pytestmark = pytest.mark.fast

VECTORS = {0: "00", 1: "01", 127: "7f", 128: "8001", 300: "ac02", 2**32: "8080808010", 2**64 - 1: "ff" * 9 + "01"}


def wire(text: str) -> WireReader:
    return WireReader(CountingReader(bytes.fromhex(text), "f.ckpt"))


def refused(call: Callable[[], object], message: str) -> FormatError:
    with pytest.raises(FormatError, match=message) as caught:
        call()
    assert caught.value.path == "f.ckpt"
    return caught.value


@pytest.mark.parametrize("value", VECTORS)
def test_varints_both_ways(value: int) -> None:
    assert varint(value).hex() == VECTORS[value]
    length = len(VECTORS[value]) // 2
    assert wire(VECTORS[value]).varint(0, length, "x") == (value, length)


def test_a_varint_may_be_longer_than_it_needs() -> None:
    assert wire("80808000").varint(0, 4, "x") == (0, 4)


@pytest.mark.parametrize(
    ("text", "stop", "message"),
    [
        ("", 0, "ends inside a varint"),
        ("80", 1, "ends inside a varint"),
        ("8080808001", 4, "ends inside a varint"),
        ("80" * 10 + "01", 11, "more than 10 bytes"),
        ("ff" * 9 + "02", 10, "more than 64 bits"),
    ],
)
def test_broken_varints_are_refused(text: str, stop: int, message: str) -> None:
    error = refused(lambda: wire(text).varint(0, stop, "value.tag"), message)
    assert (error.byte_offset, error.field) == (0, "value.tag")


def test_fields_of_each_wire_type() -> None:
    assert wire("089601").field(0, 3, "m") == Field(1, VARINT, 1, 3, 150)
    assert wire("1203616263").field(0, 5, "m") == Field(2, LENGTH, 2, 5, 0)
    assert wire("0d01020304").field(0, 5, "m") == Field(1, FIXED32, 1, 5, 0)
    assert wire("090102030405060708").field(0, 9, "m") == Field(1, FIXED64, 1, 9, 0)
    assert bytes_field(2, b"abc").hex() == "1203616263"
    assert length_key(3, 300).hex() == "1aac02"


def test_groups_are_stepped_over() -> None:
    # group 3 { varint, group 4 { bytes }, fixed32 }
    text = "1b" + "0801" + "23" + "0a0161" + "24" + "0d00000000" + "1c"
    assert wire(text).field(0, len(text) // 2, "m").stop == len(text) // 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1b", "ends inside a varint"),
        ("1b24", "groups do not nest"),
        ("1c", "illegal wire type 4"),
        ("1b" * 101 + "1c" * 101, "groups do not nest"),
        ("0e", "illegal wire type 6"),
        ("0f", "illegal wire type 7"),
        ("0000", "illegal field number 0"),
        ("80808080100000", "illegal field number"),
        ("0a05616263", "field 1 has 5 bytes where 3 are left"),
        ("0d010203", "field 1 has 4 bytes where 3 are left"),
        ("0a" + "ff" * 9 + "01", "field 1 has 18446744073709551615 bytes"),
    ],
)
def test_broken_fields_are_refused(text: str, message: str) -> None:
    refused(lambda: wire(text).field(0, len(text) // 2, "m"), message)


def test_a_hundred_open_groups_are_taken() -> None:
    assert wire("1b" * 100 + "1c" * 100).field(0, 200, "m").stop == 200


def test_a_value_may_not_pass_the_end_of_its_message() -> None:
    refused(lambda: wire("0a0361626364").field(0, 4, "m"), "field 1 has 3 bytes where 2 are left")


def test_reading_on_doubles_the_pieces_and_a_jump_starts_small_again() -> None:
    reader = CountingReader(bytes(200_000))
    source = WireReader(reader)
    for at in range(0, 20_000, 10):
        source.varint(at, 200_000, "x")
    source.varint(150_000, 200_000, "x")
    sizes = [nbytes for _, nbytes in reader.reads]
    assert sizes == [512, 1024, 2048, 4096, 8192, 16384, 512]


def test_pieces_stay_bounded() -> None:
    reader = CountingReader(bytes(2_000_000))
    source = WireReader(reader)
    for at in range(0, 1_900_000, 300):
        source.varint(at, 2_000_000, "x")
    assert max(nbytes for _, nbytes in reader.reads) == 64 << 10
