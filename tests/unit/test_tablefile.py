"""The one form of manifest, record and plan: round trips, and refusal of everything that is not one."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core.tablefile import MAX_HEADER_NBYTES, VERSION, Table, decode, encode, join_names, peek, split_names
from parckpt.errors import ChecksumError, FormatError, IntegrityError, TruncatedError, UnsupportedVersionError

pytestmark = pytest.mark.fast

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.text(min_size=1).filter(lambda name: name not in ("parckpt", "parckpt_version", "facts_sha256", "sha256"))
KINDS = ("u1", "<u4", "<i4", "<u8", "<i8", "<f8")


@st.composite
def tables(draw: st.DrawFn) -> Table:
    columns = {
        name: np.frombuffer(draw(st.binary(max_size=40)).ljust(40)[: draw(st.integers(0, 5)) * 8], kind)
        for name, kind in draw(
            st.dictionaries(NAMES.filter(lambda n: n != "__metadata__"), st.sampled_from(KINDS))
        ).items()
    }
    return Table(draw(st.sampled_from(["manifest", "plan"])), draw(st.dictionaries(NAMES, JSON, max_size=4)), columns)


def peek_at(data: bytes, kind: str | None = None) -> Table:
    def read(byte_offset: int, nbytes: int) -> bytes:
        assert 0 <= byte_offset <= byte_offset + nbytes <= len(data)
        return data[byte_offset : byte_offset + nbytes]

    return peek(read, len(data), "m", kind)


def resealed(data: bytes) -> bytes:
    """The same bytes with a digest that fits: crafted, not damaged."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def with_header(table: Table, change: Any, *, facts_digest: bool = True) -> bytes:
    """An encoded table whose header was changed, with digests that fit."""
    data = encode(table)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if facts_digest and isinstance(metadata, dict):
        texts = {name: text for name, text in metadata.items() if name != "facts_sha256"}
        digest = hashlib.sha256(json.dumps(sorted(texts.items())).encode("ascii")).hexdigest()
        metadata["facts_sha256"] = json.dumps(digest)
    text = json.dumps(header).encode()
    return resealed(len(text).to_bytes(8, "little") + text + data[8 + length :])


SMALL = Table("manifest", {"step": 3, "name": "x"}, {"a": np.arange(3, dtype="<u4"), "b": np.arange(2, dtype="<i8")})


@given(tables())
def test_what_is_encoded_is_decoded(table: Table) -> None:
    data = encode(table)
    found = decode(data, "m", table.kind)
    assert (found.kind, dict(found.facts)) == (table.kind, dict(table.facts))
    assert list(found.columns) == list(table.columns)
    for name, values in table.columns.items():
        assert found.columns[name].dtype == values.dtype
        assert found.columns[name].tobytes() == values.tobytes()
    assert encode(found) == data
    assert dict(peek_at(data, table.kind).facts) == dict(found.facts)
    assert peek_at(data).columns == {}


@given(tables(), st.data())
def test_any_changed_bit_is_damage(table: Table, data: st.DataObject) -> None:
    encoded = bytearray(encode(table))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ChecksumError, match="damaged"):
        decode(bytes(encoded), "m")


@given(tables(), st.data())
def test_any_cut_is_damage(table: Table, data: st.DataObject) -> None:
    encoded = encode(table)
    cut = encoded[: data.draw(st.integers(0, len(encoded) - 1))]
    with pytest.raises(IntegrityError):
        decode(cut, "m")
    with pytest.raises(IntegrityError):
        peek_at(cut)


@given(tables(), st.data())
def test_crafted_bytes_give_a_table_or_one_of_three_errors(table: Table, data: st.DataObject) -> None:
    encoded = bytearray(encode(table))
    length = int.from_bytes(encoded[:8], "little")
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, 8 + length - 1))
        encoded[at] = data.draw(st.sampled_from(b'0123456789-.eE"[]{},:\\ntfuaN \x00\xff'))
    for step in (lambda: decode(resealed(bytes(encoded)), "m"), lambda: peek_at(bytes(encoded))):
        with suppress(IntegrityError, FormatError):
            step()


@given(tables(), st.data())
def test_peek_agrees_with_decode_whatever_was_changed(table: Table, data: st.DataObject) -> None:
    encoded = bytearray(encode(table))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = peek_at(bytes(encoded))
    except (IntegrityError, FormatError):
        return
    # Whatever lies beyond the facts peek cannot know; the facts themselves it never gets wrong.
    assert dict(found.facts) == dict(table.facts)
    assert found.kind == table.kind


def _set(**changes: Any) -> Any:
    def change(header: dict[str, Any]) -> None:
        for name, value in changes.items():
            header["a"][name] = value

    return change


HOSTILE = {
    "not an object": lambda header: [header],
    "no facts": lambda header: header.pop("__metadata__") and None,
    "facts are a list": lambda header: header.update(__metadata__=[]),
    "a fact is no text": lambda header: header["__metadata__"].update(step=5),
    "a fact is not JSON": lambda header: header["__metadata__"].update(step="{"),
    "a fact is NaN": lambda header: header["__metadata__"].update(step="NaN"),
    "a fact is infinite": lambda header: header["__metadata__"].update(step="[1e999]"),
    "no version": lambda header: header["__metadata__"].pop("parckpt_version") and None,
    "version is true": lambda header: header["__metadata__"].update(parckpt_version="true"),
    "kind is a number": lambda header: header["__metadata__"].update(parckpt="5"),
    "unknown element type": _set(dtype="I3"),
    "element type is a list": _set(dtype=["U4"]),
    "two dimensions": _set(shape=[1, 3]),
    "negative count": _set(shape=[-3]),
    "count is text": _set(shape=["3"]),
    "count is true": _set(shape=[True], data_offsets=[0, 4]),
    "huge count": _set(shape=[1 << 70], data_offsets=[0, 4 << 70]),
    "offsets backwards": _set(data_offsets=[12, 0]),
    "offsets overlap": _set(data_offsets=[4, 16]),
    "offsets are floats": _set(data_offsets=[0.0, 12.0]),
    "no offsets": _set(data_offsets=None),
    "column is a number": lambda header: header.update(a=5),
    "no digest": lambda header: header.pop("sha256") and None,
    "digest of another size": lambda header: header["sha256"].update(shape=[31], data_offsets=[28, 59]),
    "digest first": lambda header: {"sha256": header["sha256"], **header},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_crafted_headers_are_refused(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        decode(with_header(SMALL, HOSTILE[name]), "some/manifest")
    assert "some/manifest" in caught.value.message


def test_a_header_longer_than_the_file_or_the_bound_is_refused_before_reading_it() -> None:
    data = encode(SMALL)
    for length in (len(data), MAX_HEADER_NBYTES + 1, 2**64 - 1):
        crafted = resealed(length.to_bytes(8, "little") + data[8:])
        with pytest.raises(FormatError):
            decode(crafted, "m")
        with pytest.raises(ChecksumError):
            peek_at(crafted)


@pytest.mark.parametrize("offsets", [["a", "b"], [0, None], [0, [3]], [0, 1.5], [0, True], [0]])
def test_peek_refuses_offsets_that_are_no_numbers(offsets: list[Any]) -> None:
    def change(header: dict[str, Any]) -> None:
        for info in (header["a"], header["b"], header["sha256"]):
            info["data_offsets"] = offsets

    with pytest.raises(IntegrityError):
        peek_at(with_header(SMALL, change))


def test_peek_refuses_changed_facts_and_another_length() -> None:
    change = with_header(SMALL, lambda header: header["__metadata__"].update(step="4"), facts_digest=False)
    with pytest.raises(ChecksumError, match="facts"):
        peek_at(change)
    with pytest.raises(TruncatedError):
        peek_at(encode(SMALL) + b"\0")


def test_peek_reads_the_header_alone() -> None:
    data = encode(Table("manifest", {"step": 1}, {"big": np.zeros(1 << 20, "u1")}))
    asked = []

    def read(byte_offset: int, nbytes: int) -> bytes:
        asked.append(nbytes)
        return data[byte_offset : byte_offset + nbytes]

    assert peek(read, len(data), "m").facts["step"] == 1
    assert sum(asked) < 1000


def test_a_newer_version_is_no_damage() -> None:
    data = with_header(SMALL, lambda header: header["__metadata__"].update(parckpt_version=str(VERSION + 1)))
    for step in (lambda: decode(data, "m"), lambda: peek_at(data)):
        with pytest.raises(UnsupportedVersionError, match="update parckpt"):
            step()


def test_another_kind_is_refused() -> None:
    for step in (lambda: decode(encode(SMALL), "m", "plan"), lambda: peek_at(encode(SMALL), "plan")):
        with pytest.raises(FormatError, match="expected a plan, found a manifest"):
            step()


@pytest.mark.parametrize(
    ("value", "kind", "good"),
    [
        (3, int, True),
        (True, int, False),
        (True, bool, True),
        (1, bool, False),
        ("x", int, False),
        (None, (str, type(None)), True),
        (None, str, False),
        (True, (int, float), False),
        (2.5, (int, float), True),
    ],
)
def test_facts_are_typed(value: object, kind: Any, good: bool) -> None:
    table = Table("plan", {"f": value})
    if good:
        assert table.fact("f", kind) == value
    else:
        with pytest.raises(FormatError, match="fact 'f'"):
            table.fact("f", kind, "p")


def test_columns_are_typed() -> None:
    assert SMALL.column("a", "<u4").tolist() == [0, 1, 2]
    for name, kind in (("a", "<i4"), ("b", "<u8"), ("c", "<u4")):
        with pytest.raises(FormatError, match=f"column '{name}'"):
            SMALL.column(name, kind, "p")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_names_survive(names: list[str]) -> None:
    blob, ends = join_names(names)
    assert split_names(blob, ends, "p") == names


@pytest.mark.parametrize(
    ("blob", "ends"), [(b"abc", [2, 1, 3]), (b"abc", [1, 2]), (b"abc", [4]), (b"abc", [2**64 - 1, 3]), (b"\xff", [1])]
)
def test_inconsistent_name_tables_are_refused(blob: bytes, ends: list[int]) -> None:
    with pytest.raises(FormatError):
        split_names(np.frombuffer(blob, "u1"), np.array(ends, "<u8"), "p")
