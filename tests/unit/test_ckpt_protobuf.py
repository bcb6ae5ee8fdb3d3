"""The protobuf runtime as an independent reader and writer of ckpt files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from parckpt.core import dtypes
from parckpt.errors import FormatError
from parckpt.formats import ckpt
from parckpt.formats.base import BytesReader
from parckpt.formats.registry import FORMATS
from parckpt.testing.files import GoldenFile, assemble, content, golden_files

pytestmark = pytest.mark.fast

FILES = golden_files(Path(__file__).parents[1] / "data" / "golden", "ckpt")

FieldType = descriptor_pb2.FieldDescriptorProto
STRING, BYTES, INT64, MESSAGE = (
    FieldType.TYPE_STRING,
    FieldType.TYPE_BYTES,
    FieldType.TYPE_INT64,
    FieldType.TYPE_MESSAGE,
)
OPTIONAL, REQUIRED, REPEATED = FieldType.LABEL_OPTIONAL, FieldType.LABEL_REQUIRED, FieldType.LABEL_REPEATED


def checkpoint_class() -> Any:
    """MindSpore's schema, described here and compiled by the runtime."""
    file = descriptor_pb2.FileDescriptorProto(name="checkpoint_under_test.proto", package="t", syntax="proto2")

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> Any:
        item = file.message_type.add(name=name)
        for field_name, number, kind, label, type_name in fields:
            item.field.add(name=field_name, number=number, type=kind, label=label, type_name=type_name or None)
        return item

    tensor = (("dims", 1, INT64, REPEATED, ""), ("tensor_type", 2, STRING, REQUIRED, ""))
    message("TensorProto", *tensor, ("tensor_content", 3, BYTES, REQUIRED, ""))
    message("MapTensorProto", ("tensor", 1, MESSAGE, REPEATED, ".t.TensorProto"))
    kinds = (
        ("tensor", 2, MESSAGE, OPTIONAL, ".t.TensorProto"),
        ("maptensor", 3, MESSAGE, OPTIONAL, ".t.MapTensorProto"),
    )
    value = message("Value", ("tag", 1, STRING, REQUIRED, ""), *kinds)
    value.oneof_decl.add(name="kind")
    value.field[1].oneof_index = value.field[2].oneof_index = 0
    message("Checkpoint", ("value", 1, MESSAGE, REPEATED, ".t.Value"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Checkpoint"))


Checkpoint = checkpoint_class()
NAMES = ["a", "model.layers.0.weight", "optim/exp_avg", "权重.嵌入", "x" * 200, "", 'tab\tquote"\\']


@pytest.mark.parametrize("dtype", [row for row in (dtypes.by_code(code) for code in range(1, 19)) if row.ckpt])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (300,), (2, 3, 4), (2, 1, 2, 1, 2, 1, 2, 1)])
def test_the_runtime_reads_what_we_write(dtype: dtypes.DType, shape: tuple[int, ...]) -> None:
    rng = random.Random(str((dtype.name, shape)))
    entries = [ckpt.entry(name, dtype, shape) for name in NAMES]
    contents = [rng.randbytes(entry.nbytes) for entry in entries]
    data = assemble(ckpt.layout(entries), contents, FORMATS["ckpt"])
    parsed = Checkpoint.FromString(data)
    assert [value.tag for value in parsed.value] == NAMES
    assert [tuple(value.tensor.dims) for value in parsed.value] == [shape] * len(NAMES)
    assert {value.tensor.tensor_type for value in parsed.value} == {dtype.ckpt}
    assert [value.tensor.tensor_content for value in parsed.value] == contents
    # Same choices as the runtime's own writer: order of fields, unpacked dims, shortest varints.
    assert parsed.SerializeToString() == data


@pytest.mark.parametrize("slicing", ["bytes", "rows"])
@pytest.mark.parametrize("seed", range(20))
def test_slices_are_whole_messages_to_the_runtime(slicing: Any, seed: int) -> None:
    rng = random.Random(seed)
    shape = (rng.randint(1, 9), rng.randint(1, 400))
    entry = ckpt.entry("w", dtypes.by_name("int16"), shape)
    data = rng.randbytes(entry.nbytes)
    layout = ckpt.layout([entry], slice_nbytes=256, slicing=slicing)
    values = Checkpoint.FromString(assemble(layout, [data], FORMATS["ckpt"])).value
    assert b"".join(value.tensor.tensor_content for value in values) == data
    assert {tuple(value.tensor.dims) for value in values} == {shape}
    assert len(values) == -(-entry.nbytes // 256)
    if slicing == "bytes":
        assert all(len(value.tensor.tensor_content) == 256 for value in values[:-1])
    else:
        rows = [len(piece) for piece in np.array_split(np.zeros(shape), len(values))]
        assert [len(value.tensor.tensor_content) for value in values] == [n * shape[1] * 2 for n in rows]


@pytest.mark.parametrize("seed", range(30))
def test_we_read_what_the_runtime_writes(seed: int) -> None:
    rng = random.Random(seed)
    parsed = Checkpoint()
    expected = {}
    for index in range(rng.randint(0, 20)):
        dtype = dtypes.by_code(rng.randint(1, 18))
        shape = tuple(rng.randint(0, 5) for _ in range(rng.randint(0, 8)))
        entry = ckpt.entry(f"{rng.choice(NAMES)}.{index}", dtype, shape)
        value = parsed.value.add(tag=entry.name)
        value.tensor.dims.extend(shape)
        value.tensor.tensor_type = entry.type
        value.tensor.tensor_content = rng.randbytes(entry.nbytes)
        expected[entry.name] = (dtype, shape, value.tensor.tensor_content)
    data = parsed.SerializeToString()
    index = ckpt.read_index(BytesReader(data))
    found = {item.name: (item.dtype, item.shape, content(BytesReader(data), item)) for item in index.entries}
    assert found == expected
    assert list(found) == list(expected)


def test_a_map_that_the_runtime_writes() -> None:
    parsed = Checkpoint()
    value = parsed.value.add(tag="m")
    for type_name, dims, data in (("int32", (2,), b"k" * 8), ("float16", (2, 3), b"v" * 12), ("int32", (2,), b"s" * 8)):
        value.maptensor.tensor.add(dims=dims, tensor_type=type_name, tensor_content=data)
    data = parsed.SerializeToString()
    (item,) = ckpt.read_index(BytesReader(data)).entries
    assert [(part.name, part.shape, content(BytesReader(data), part)) for part in item.parts] == [
        ("keys", (2,), b"k" * 8),
        ("values", (2, 3), b"v" * 12),
        ("status", (2,), b"s" * 8),
    ]


@pytest.mark.parametrize("file", [pytest.param(file, id=file.name) for file in FILES])
def test_what_the_runtime_cannot_parse_we_refuse(file: GoldenFile) -> None:
    data = file.reader().data
    body = data[:-17] if data[-17:].startswith(b"crc_num") else data
    try:
        Checkpoint.FromString(body)
    except DecodeError:
        with pytest.raises(FormatError):
            ckpt.read_index(file.reader())
    else:
        assert file.facts["loads"][0]["ok"] or "corrupt" not in file.facts["loads"][0]["error"]
