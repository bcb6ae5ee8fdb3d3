"""What every format owes the engine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parckpt.core import dtypes
from parckpt.core.crc import crc32
from parckpt.errors import ConfigError, FormatError
from parckpt.formats.base import BytesReader, Entry, Extent, FileIndex, Format
from parckpt.formats.registry import FORMATS
from parckpt.formats.safetensors import content_crc, file_crc
from parckpt.testing.files import assemble, content

pytestmark = [pytest.mark.fast, pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)]

DTYPES = [dtypes.by_code(code) for code in range(1, 19)]
NAMES = ["w", "model.layers.0.weight", "optim/exp_avg", "权重.嵌入🎉", "x" * 200, 'tab\tquote"\\\n\x00', "0", "Crc_num"]
SHAPES = [(), (0,), (0, 7), (3, 0, 2), (1,), (1, 1), (300,), (2, 3, 4), (2, 1, 2, 1, 2, 1, 2, 3), (1,) * 32]


def holds(form: Format, dtype: dtypes.DType) -> bool:
    return (dtype.ckpt if form.name == "ckpt" else dtype.safetensors) is not None


def made(form: Format, entries: list[Entry], contents: list[bytes], *, crc: bool = False) -> bytes:
    total: int | None = None
    if crc:
        named = zip(entries, contents, strict=True)
        total = file_crc((item.name, content_crc(item, crc32(data), data)) for item, data in named)
    return assemble(form.layout(entries, metadata={"format": "ms"}, crc=total), contents, form)


def loaded(data: bytes, index: FileIndex) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    reader = BytesReader(data)
    return {item.name: (item.dtype.name, item.shape, content(reader, item)) for item in index.entries if item.dtype}


def test_registry(form: Format) -> None:
    assert FORMATS[form.name] is form
    assert form.extension == f".{form.name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_dtype_in_every_shape_under_every_name(form: Format, dtype: dtypes.DType) -> None:
    if not holds(form, dtype):
        with pytest.raises(
            ConfigError, match=f"{form.name} cannot hold 'w': it has no type for {dtype.name}"
        ) as caught:
            form.entry("w", dtype, (1,))
        assert caught.value.facts == {"format": form.name, "tensor": "w", "dtype": dtype.name}
        return
    rng = np.random.default_rng(dtype.code)
    entries, contents = [], []
    for name in NAMES:
        for number, shape in enumerate(SHAPES):
            entries.append(form.entry(f"{name}{number}", dtype, shape))
            contents.append(rng.bytes(entries[-1].nbytes))
    data = made(form, entries, contents)
    expected = {
        entry.name: (dtype.name, entry.shape, content) for entry, content in zip(entries, contents, strict=True)
    }
    assert loaded(data, form.read_index(BytesReader(data))) == expected


entry_lists = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30),
        st.sampled_from([dtype for dtype in DTYPES if dtype.safetensors is not None and dtype.name != "int4"]),
        st.lists(st.integers(0, 4), max_size=5),
    ),
    max_size=12,
    unique_by=lambda item: item[0],
)


@given(items=entry_lists, crc=st.booleans(), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=100)
def test_index_of_layout_is_identity(
    form: Format, items: list[tuple[str, dtypes.DType, list[int]]], crc: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    entries = [form.entry(name, dtype, shape) for name, dtype, shape in items if name != "__metadata__"]
    contents = [rng.bytes(entry.nbytes) for entry in entries]
    layout = form.layout(entries, metadata={"format": "ms"}, crc=0 if crc else None)
    data = assemble(layout, contents, form)
    index = form.read_index(BytesReader(data))
    assert len(data) == layout.nbytes
    assert index.format == form.name
    assert index.body_nbytes == layout.body_nbytes
    assert (index.crc is not None) == crc
    assert {item.name: (item.type, item.shape, item.nbytes) for item in index.entries} == {
        entry.name: (entry.type, entry.shape, entry.nbytes) for entry in entries
    }
    # Both sides name the same bytes of the file.
    written = {
        (entries[extent.entry].name, extent.start, extent.byte_offset, extent.nbytes) for extent in layout.extents
    }
    read = {(item.name, e.start, e.byte_offset, e.nbytes) for item in index.entries for e in item.extents}
    assert read == written
    assert all(isinstance(e, Extent) and index.entries[e.entry] is item for item in index.entries for e in item.extents)


def test_the_crc_is_found_and_right(form: Format) -> None:
    entries = [form.entry("b", dtypes.by_name("int32"), ()), form.entry("a", dtypes.by_name("float32"), (2,))]
    contents = [(7).to_bytes(4, "little"), b"12345678"]
    data = made(form, entries, contents, crc=True)
    index = form.read_index(BytesReader(data))
    assert index.crc == (crc32(b"a12345678b" + bytes(7)) if form.crc_first else crc32(data[: index.body_nbytes]))


@pytest.mark.parametrize("value", [True, -5, 2**63, 0.1, np.float64(0.1)])
def test_appended_numbers(form: Format, value: float) -> None:
    entry, data = form.value_entry("v", value)
    file = made(form, [entry], [data])
    (item,) = form.read_index(BytesReader(file)).entries
    assert item.dtype is not None
    assert item.shape == ()
    back = np.frombuffer(content(BytesReader(file), item), item.dtype.numpy)[0]
    assert back == (np.float32(value) if type(value) is float else value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("\ud800", (1,), "not valid Unicode"),
        ("n" * 65_537, (1,), "has 65537 bytes, more than 65536"),
        ("w", (1,) * 33, "impossible shape"),
        ("w", (-1,), "impossible shape"),
        ("w", (2**62, 2), "impossible shape"),
        ("w", (0, 2**62), "impossible shape"),
    ],
)
def test_impossible_entries_are_refused(form: Format, name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        form.entry(name, dtypes.by_name("float32"), shape)
    assert caught.value.format == form.name


def test_the_largest_possible_entries_are_taken(form: Format) -> None:
    shape = (2**61 - 1,)
    assert form.entry("n" * 65_536, dtypes.by_name("float32"), shape).nbytes == 2**63 - 4


def test_names_are_unique(form: Format) -> None:
    entries = [form.entry("w", dtypes.by_name("int8"), shape) for shape in ((1,), (2,))]
    with pytest.raises(ConfigError, match="two entries are called 'w'"):
        form.layout(entries, metadata={}, crc=None)


def test_each_cut_of_a_single_tensor_is_refused(form: Format) -> None:
    data = made(form, [form.entry("w", dtypes.by_name("int32"), (3,))], [bytes(12)])
    for stop in range(1, len(data)):
        with pytest.raises(FormatError) as caught:
            form.read_index(BytesReader(data[:stop], "cut"))
        assert caught.value.path == "cut"


def test_ten_thousand_entries(form: Format) -> None:
    entries = [form.entry(f"model.layers.{i}.weight", dtypes.by_name("float32"), (2, 3)) for i in range(10_000)]
    contents = [i.to_bytes(4, "little") * 6 for i in range(10_000)]
    data = made(form, entries, contents)
    found = loaded(data, form.read_index(BytesReader(data)))
    assert found == {entry.name: ("float32", (2, 3), content) for entry, content in zip(entries, contents, strict=True)}
