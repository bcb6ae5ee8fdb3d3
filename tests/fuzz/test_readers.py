"""Damaged files give an index or a `FormatError`, and cost no more than they weigh."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from parckpt.core import dtypes
from parckpt.errors import FormatError
from parckpt.formats.base import FileIndex, Format, IndexedEntry
from parckpt.formats.registry import FORMATS
from parckpt.formats.wire import varint
from parckpt.testing.files import CountingReader, assemble, golden_files

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
MUTATIONS = 5000  # per format
BATCHES = 10

# What breaks parsers: extremes of lengths, of signs, of varints; and the words of both formats.
TOKENS = [
    *(varint(value) for value in (0, 1, 127, 128, 2**31, 2**32 - 1, 2**63, 2**64 - 1)),
    *(b"\xff" * 9 + b"\x02", b"\x80" * 11, b"\x0a", b"\x0b", b"\x0c", b"\x12", b"\x1a", b"\x08", b"\0", b"\x63rc_num"),
    *(b"{", b"}", b'"', b"[", b"]", b",", b":", b"-1", b"1e9", b"null", b"true", b"\\ud800", b"9" * 5000, b"[" * 2000),
    *(b"__metadata__", b"crc_num", b"dtype", b"shape", b"data_offsets", b"F32", b"Int4", b"Int32", b"str", b"int32"),
]


def generated(form: Format, rng: random.Random) -> bytes:
    entries = []
    for index in range(rng.randint(1, 6)):
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 4))]
        entries.append(form.entry(f"layer{index}.w", dtypes.by_code(rng.randint(1, 14)), shape))
    crc = rng.choice([None, 7])
    return assemble(
        form.layout(entries, metadata={"format": "ms"}, crc=crc), [rng.randbytes(e.nbytes) for e in entries], form
    )


def mutated(data: bytes, rng: random.Random, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randint(0, len(out))
        # Headers are where the trouble is, and safetensors has all of them in front.
        if rng.random() < 0.5:
            at = min(at, rng.randint(0, 64))
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 2:
            out[at : at + rng.randint(1, 16)] = b""
        elif kind == 3:
            out[at:at] = rng.choice(TOKENS)
        elif kind == 4:
            token = rng.choice(TOKENS)
            out[at : at + len(token)] = token
        elif kind == 5:
            start = rng.randint(0, len(other))
            out[at:at] = other[start : start + rng.randint(1, 64)]
        else:
            del out[at:]
    return bytes(out)


def check(entry: IndexedEntry, nbytes: int) -> None:
    assert entry.dtype is not None or entry.kind in ("str", "map")
    if entry.kind == "tensor":
        assert entry.dtype is not None
        size = entry.dtype.itemsize
        for n in entry.shape:
            size *= n
        assert entry.nbytes == size
    at = 0
    for extent in entry.extents:
        assert extent.start == at
        assert 0 <= extent.byte_offset < extent.byte_offset + extent.nbytes <= nbytes
        at += extent.nbytes
    for part in entry.parts:
        check(part, nbytes)


def fuzzed(form: Format, rng: random.Random, corpus: list[bytes]) -> bytes:
    base = rng.choice(corpus) if rng.random() < 0.7 else generated(form, rng)
    if form.name == "safetensors" and len(base) > 16 and rng.random() < 0.6:
        # Else nearly every mutation ends at a length that no longer fits, and never gets to the JSON.
        stop = 8 + int.from_bytes(base[:8], "little")
        text = mutated(base[8:stop], rng, rng.choice(corpus))
        return len(text).to_bytes(8, "little") + text + base[stop:]
    return mutated(base, rng, rng.choice(corpus))


def read(form: Format, reader: CountingReader) -> FileIndex | FormatError:
    try:
        return form.read_index(reader)
    except FormatError as error:
        return error


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_an_index_or_a_format_error(form: Format, batch: int) -> None:
    rng = random.Random(f"{form.name} {batch}")
    files = golden_files(GOLDEN, form.name)
    corpus = [data for data in (file.path.read_bytes() for file in files) if 8 < len(data) < 2000]
    refused = 0
    for number in range(MUTATIONS // BATCHES):
        data = fuzzed(form, rng, corpus)
        reader = CountingReader(data, "fuzzed")
        found = read(form, reader)
        if isinstance(found, FormatError):
            refused += 1
            assert (found.path, bool(found.field)) == ("fuzzed", True), (batch, number)
            assert 0 <= found.byte_offset <= max(len(data), 8), (batch, number)
        else:
            assert len({entry.name for entry in found.entries}) == len(found.entries)
            assert 0 <= found.body_nbytes <= len(data)
            for entry in found.entries:
                check(entry, len(data))
        assert len(reader.reads) < 50 + len(data), (batch, number)
        assert all(0 <= at <= at + nbytes <= len(data) for at, nbytes in reader.reads), (batch, number)
    # Neither all refused nor all taken: the mutations do reach the parsers' insides.
    assert 0.2 < refused / (MUTATIONS // BATCHES) < 0.99


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_noise(form: Format) -> None:
    rng = random.Random(f"{form.name} noise")
    for _ in range(300):
        data = rng.randbytes(rng.randint(0, 200))
        found = read(form, CountingReader(data))
        # Unknown fields are legal in ckpt, and noise can look like them; but entries it never makes.
        assert isinstance(found, FormatError) or (form.name == "ckpt" and not found.entries)
