"""Stored boxes of any cut, written as boxes of any other cut: every byte where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parckpt.comm.memory import Exchange, MemoryCommunicator
from parckpt.comm.wait import Waiter
from parckpt.core.dtypes import by_name
from parckpt.core.layout import Box, slices
from parckpt.core.manifest import Facts, Manifest
from parckpt.core.tensors import TensorRow
from parckpt.engine.bands import BoxStream
from parckpt.engine.foreign import load_all
from parckpt.engine.group import Group
from parckpt.engine.rewrite import OutputSpec, Piece, write_files
from parckpt.engine.source import Source
from parckpt.engine.staging import Modes
from parckpt.formats.registry import FORMATS
from parckpt.testing.checkpoints import random_array, store
from parckpt.testing.filesystem import MemoryFileSystem
from parckpt.testing.strategies import shapes, splits

pytestmark = pytest.mark.fast

SCALAR = Box((), ())
FACTS = Facts("x", "", "", "", "x", "x", 0, 0, 0, 0, 1, "ckpt", False, 0.0)


def alone() -> Group:
    return Group(MemoryCommunicator(Exchange(1), 0), Waiter(30.0))


@settings(max_examples=25)
@given(st.data())
def test_a_stream_of_any_boxes(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    dtypes = [by_name(name) for name in ("int8", "float16", "float32", "complex128")]
    rows = [
        TensorRow(f"t{number}", data.draw(st.sampled_from(dtypes)), data.draw(shapes(3, 9)))
        for number in range(data.draw(st.integers(1, 4)))
    ]
    tensors = [(row, random_array(rng, row.dtype, row.global_shape)) for row in rows]
    files: list[list[tuple[int, object]]] = [[], [], []]
    for number, row in enumerate(rows):
        for box in data.draw(splits(row.global_shape)):
            files[data.draw(st.integers(0, 2))].append((number, box))
    fs = MemoryFileSystem()
    chunk = data.draw(st.sampled_from([1, 7, 64, 4096]))
    contents = store(fs, "/src", tensors, files, chunk_nbytes=chunk)  # type: ignore[arg-type]
    pieces = [(number, box) for number, row in enumerate(rows) for box in data.draw(splits(row.global_shape))]
    counted: list[int] = []
    band = data.draw(st.sampled_from([1, 30, 200, 1 << 20]))
    stream = BoxStream(
        Source(fs, "/src", "/src", Manifest(FACTS, contents), None), pieces, on_bytes=counted.append, band_nbytes=band
    )
    for number, box in pieces:
        expected = np.ascontiguousarray(tensors[number][1][slices(box, (0,) * len(box.shape))]).tobytes()
        assert b"".join(bytes(block) for block in stream.take(len(expected))) == expected
    stream.close()
    assert sum(counted) == sum(array.nbytes for _, array in tensors)
    assert fs.nopen == 0


@settings(max_examples=12)
@given(st.data())
def test_files_of_any_boxes(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    row = TensorRow("w", by_name("float32"), data.draw(shapes(3, 6)))
    other = TensorRow("n", by_name("int64"), ())
    tensors = [(row, random_array(rng, row.dtype, row.global_shape)), (other, np.array(5))]
    fs = MemoryFileSystem()
    held = [(0, box) for box in data.draw(splits(row.global_shape))]
    contents = store(fs, "/src", tensors, [held, [(1, SCALAR)]])
    form = FORMATS[data.draw(st.sampled_from(sorted(FORMATS)))]
    boxes = data.draw(splits(row.global_shape))
    crc = data.draw(st.booleans())
    outputs = [
        OutputSpec(
            f"/new/deep/{k}{form.extension}",
            (Piece("w", 0, box), Piece("step", 1, SCALAR)),
            {"epoch_num": 3},
            crc_check=crc,
        )
        for k, box in enumerate(boxes)
    ]
    write_files(alone(), fs, Manifest(FACTS, contents), "/src", outputs, form, modes=Modes())
    for spec, box in zip(outputs, boxes, strict=True):
        found = load_all(fs, spec.path, None, lambda name: True)
        assert sorted(found) == ["epoch_num", "step", "w"]
        assert found["w"].tobytes() == np.ascontiguousarray(tensors[0][1][slices(box, (0,) * len(box.shape))]).tobytes()
        assert (found["w"].shape, found["w"].dtype) == (box.shape, np.float32)
        assert found["step"] == 5
    assert sorted(fs.listdir("/new/deep")) == sorted(f"{k}{form.extension}" for k in range(len(boxes)))
