"""The safetensors library as an independent reader and writer."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import safetensors as library
from safetensors import numpy as safetensors_numpy

from parckpt.core import dtypes
from parckpt.errors import FormatError
from parckpt.formats import safetensors
from parckpt.formats.base import BytesReader
from parckpt.formats.registry import FORMATS
from parckpt.testing.files import assemble, content

pytestmark = pytest.mark.fast

DTYPES = [row for row in (dtypes.by_code(code) for code in range(1, 18)) if row.safetensors is not None]
NAMES = ["a", "model.layers.0.weight", "optim/exp_avg", "权重.嵌入", "x" * 200, 'tab\tquote"\\\x01\x7f', "Z", "é", ""]
SHAPES = [(), (0,), (3, 0), (1,), (30,), (2, 3, 4), (2, 1, 2, 1, 2, 1, 2, 1)]


Tensor = tuple[str, dtypes.DType, tuple[int, ...], bytes]


def tensors(seed: int) -> list[Tensor]:
    rng = random.Random(seed)
    out = []
    for index in range(rng.randint(1, 60)):
        dtype, shape = rng.choice(DTYPES), rng.choice(SHAPES)
        nbytes = safetensors.entry("x", dtype, shape).nbytes
        out.append((f"{rng.choice(NAMES)}{index % 7}{index}", dtype, shape, rng.randbytes(nbytes)))
    return out


def written_by_library(given: list[Tensor], metadata: dict[str, str]) -> bytes:
    arrays = {name: np.frombuffer(data, dtype.numpy).reshape(shape) for name, dtype, shape, data in given}
    return bytes(safetensors_numpy.save(arrays, metadata))


@pytest.mark.parametrize("seed", range(40))
def test_same_bytes_as_the_library(seed: int) -> None:
    given = tensors(seed)
    entries = [safetensors.entry(name, dtype, shape) for name, dtype, shape, _ in given]
    layout = safetensors.layout(entries, metadata={"format": "ms"})
    ours = assemble(layout, [data for *_, data in given], FORMATS["safetensors"])
    theirs = written_by_library(given, {"format": "ms"})
    assert ours == theirs


@pytest.mark.parametrize("seed", range(20))
def test_the_library_reads_what_we_write(seed: int) -> None:
    given = tensors(seed)
    entries = [safetensors.entry(name, dtype, shape) for name, dtype, shape, _ in given]
    layout = safetensors.layout(entries, metadata={"format": "ms"}, crc=seed, order="given" if seed % 2 else "library")
    ours = assemble(layout, [data for *_, data in given], FORMATS["safetensors"])
    found = {
        name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in library.deserialize(ours)
    }
    assert found == {name: (dtype.safetensors, shape, data) for name, dtype, shape, data in given}


@pytest.mark.parametrize("seed", range(20))
def test_we_read_what_the_library_writes(seed: int) -> None:
    given = tensors(seed)
    data = written_by_library(given, {"made by": "the library", "ключ": "значение"})
    reader = BytesReader(data)
    index = safetensors.read_index(reader)
    assert index.metadata == {"made by": "the library", "ключ": "значение"}
    found = {item.name: (item.dtype, item.shape, content(reader, item)) for item in index.entries}
    assert found == {name: (dtype, shape, content) for name, dtype, shape, content in given}


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        ({"a": A}, True),
        ({"a": A | {"more": 1}}, True),
        ({"a": A | {"data_offsets": [1, 9]}}, False),
        ({"a": A | {"shape": [3]}}, False),
        ({"a": A | {"dtype": "F33"}}, False),
        ({"a": A, "b": A}, False),
        ({"a": A | {"shape": [2, 1, 1]}}, True),
        ({"__metadata__": {"k": 1}, "a": A}, False),
        ({}, False),
    ],
)
def test_the_library_agrees_on_what_is_legal(header: dict[str, object], taken: bool) -> None:
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(8)
    if taken:
        assert [name for name, _ in library.deserialize(data)] == [
            item.name for item in safetensors.read_index(BytesReader(data)).entries
        ]
        return
    with pytest.raises(library.SafetensorError):
        library.deserialize(data)
    with pytest.raises(FormatError):
        safetensors.read_index(BytesReader(data))
