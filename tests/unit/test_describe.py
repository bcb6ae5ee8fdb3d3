"""Packed descriptions: exact round trip, one form, and nothing but `FormatError` for other bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from parckpt.core.describe import PER_RANK, SPLIT, Held, describe, digest, pack, unpack
from parckpt.core.dtypes import by_name
from parckpt.core.layout import Box
from parckpt.errors import FormatError, LayoutError, UnsupportedVersionError

pytestmark = pytest.mark.fast

F32 = by_name("float32")
HELD = [
    Held("w/ü.0", F32, (8, 4), (4, 0), (4, 4), split=True),
    Held("scalar", by_name("int64"), (), (), ()),
    Held("w/ü.0", F32, (8, 4), (0, 0), (2, 4), split=True),
    Held("own", by_name("bool"), (0, 3), (0, 0), (0, 3), per_rank=True),
]
VALUES = [("lr", False), ("position", True)]


def test_columns() -> None:
    found = unpack(pack(HELD, VALUES))
    assert found.names == ("w/ü.0", "scalar", "own")
    assert found.row_name.tolist() == [0, 1, 0, 2]
    assert found.nrows == 4
    assert found.dtype.tolist() == [h.dtype.code for h in HELD]
    assert found.flags.tolist() == [SPLIT, 0, SPLIT, PER_RANK]
    assert found.ndim.tolist() == [2, 0, 2, 2]
    assert found.dims.tolist() == [8, 4, 4, 0, 4, 4, 8, 4, 0, 0, 2, 4, 0, 3, 0, 0, 0, 3]
    assert found.value_names == ("lr", "position")
    assert found.value_flags.tolist() == [0, PER_RANK]
    assert HELD[0].box == Box((4, 0), (4, 4))


def test_nothing_held() -> None:
    found = unpack(pack([], []))
    assert (found.nrows, found.names, found.value_names, len(found.dims)) == (0, (), (), 0)


def test_one_form() -> None:
    data = pack(HELD, VALUES)
    assert unpack(data).pack() == data
    assert pack(list(HELD), iter(VALUES)) == data
    assert digest(data) == digest(bytes(data))
    for other in (pack(HELD[::-1], VALUES), pack(HELD, VALUES[::-1]), pack(HELD[:3], VALUES), pack(HELD, VALUES[:1])):
        assert digest(other) != digest(data)


def test_an_empty_name_boundary_does_not_blur() -> None:
    """Names are told apart by their lengths: no pair of lists has the same bytes."""
    ab = pack([Held("a", F32, (), (), ()), Held("bc", F32, (), (), ())], [])
    other = pack([Held("ab", F32, (), (), ()), Held("c", F32, (), (), ())], [])
    assert ab != other
    assert pack([Held("a", F32, (), (), ())], [("b", False)]) != pack([Held("a", F32, (), (), ())], [("a", False)])


@pytest.mark.parametrize(
    ("held", "match"),
    [
        (Held("w", F32, (8, 4), (0,), (8, 4)), "2-d"),
        (Held("w", F32, (8,), (0,), (8, 1)), "1-d"),
        (Held("w", F32, (1 << 62,), (0,), (1,)), "beyond"),
        (Held("w", F32, (8,), (-(1 << 62),), (1,)), "beyond"),
        (Held("w", F32, (1 << 31, 1 << 31), (0, 0), (1, 1)), "cannot be meant"),
        (Held("w", F32, (-1,), (0,), (1,)), "cannot be meant"),
        (Held("w", F32, (1,) * 33, (0,) * 33, (1,) * 33), "33 dimensions"),
        (Held("w", F32, (8,), (0,), (4,), per_rank=True), "whole"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused_before_they_travel(held: Held, match: str) -> None:
    with pytest.raises(LayoutError, match=match) as caught:
        describe([held], [])
    assert caught.value.facts["tensor"] == "w"


def test_wrong_offsets_travel_so_that_all_ranks_can_refuse_them() -> None:
    assert unpack(pack([Held("w", F32, (8,), (-3,), (20,), split=True)], [])).dims.tolist() == [8, -3, 20]


def test_every_truncation_and_extension_is_refused() -> None:
    data = pack(HELD, VALUES)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            unpack(data[:length])
    with pytest.raises(FormatError):
        unpack(data + b"\0")


def test_a_newer_version_is_told_apart() -> None:
    data = pack(HELD, VALUES)
    with pytest.raises(UnsupportedVersionError):
        unpack(struct.pack("<Q", 2) + data[8:])


def test_any_flipped_byte_gives_a_description_or_a_format_error() -> None:
    data = pack(HELD, VALUES)
    refused = 0
    for at in range(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
            try:
                found = unpack(damaged)
            except FormatError:
                refused += 1
            else:
                assert int(found.row_name.max()) < len(found.names)
                assert 3 * int(found.ndim.sum()) == len(found.dims)
    assert refused > 48  # at least wherever the header is hit


def _columns_of(count: int) -> dict[str, int]:
    """Byte offset of each column of `HELD` and `VALUES`, as documented: header, then columns by falling width."""
    offsets, at = {}, 48
    for name, nbytes in (("dims", 8 * 18), ("row_name", 16), ("lengths", 20), ("dtype", 4), ("flags", 4), ("ndim", 4)):
        offsets[name] = at
        at += nbytes
    return {**offsets, "value_flags": at, "names": at + count}


@pytest.mark.parametrize(
    ("column", "value", "field"),
    [
        ("row_name", 3, "row_name"),
        ("dtype", 200, "dtype"),
        ("flags", 4, "flags"),
        ("value_flags", 4, "flags"),
        ("ndim", 3, "dims"),
        ("ndim", 40, "ndim"),
        ("lengths", 250, "names"),
        ("names", 0xFF, "names"),
    ],
)
def test_damage_is_named(column: str, value: int, field: str) -> None:
    data = bytearray(pack(HELD, VALUES))
    data[_columns_of(2)[column]] = value
    with pytest.raises(FormatError) as caught:
        unpack(bytes(data))
    assert caught.value.facts["field"] == field


def test_a_name_that_occurs_twice_is_refused() -> None:
    data = pack([Held("ab", F32, (), (), ()), Held("ac", F32, (), (), ())], [])
    with pytest.raises(FormatError, match="twice"):
        unpack(data.replace(b"ac", b"ab"))


def test_coordinates_beyond_the_bound_are_refused() -> None:
    data = bytearray(pack(HELD, VALUES))
    data[48:56] = np.array([1 << 62], dtype="<i8").tobytes()
    with pytest.raises(FormatError, match="beyond"):
        unpack(bytes(data))
