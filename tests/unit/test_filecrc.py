"""MindSpore's checksum of a safetensors file: computed before writing, it is the one that a reader finds."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core.dtypes import by_name
from parckpt.core.layout import whole
from parckpt.core.tensors import TensorRow
from parckpt.engine.filecrc import GatheredCrc, local_crc
from parckpt.engine.fileplan import FilePlan, plan_file
from parckpt.engine.foreign import index_file, verify_crc
from parckpt.errors import ChecksumError
from parckpt.formats.registry import FORMATS
from parckpt.storage.atomic import write_file
from parckpt.testing.checkpoints import random_array
from parckpt.testing.files import assemble
from parckpt.testing.filesystem import MemoryFileSystem
from parckpt.testing.strategies import shapes

pytestmark = pytest.mark.fast

FORM = FORMATS["safetensors"]


def plan_of(arrays: dict[str, np.ndarray], append: dict[str, Any], crc: int) -> FilePlan:
    boxes = [(TensorRow(name, by_name(a.dtype.name), a.shape), whole(a.shape)) for name, a in arrays.items()]
    made = [FORM.value_entry(name, value) for name, value in append.items()]
    return plan_file(FORM, boxes, made, integrated=False, crc=crc)


def blocks(array: np.ndarray, size: int) -> Any:
    data = np.frombuffer(array.tobytes(), np.uint8)
    return lambda: (data[start : start + size] for start in range(0, data.size, size))


@st.composite
def contents(draw: st.DrawFn) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    found = {}
    for number in range(draw(st.integers(0, 4))):
        dtype = by_name(draw(st.sampled_from(["bool", "float32", "float64", "uint8", "int64"])))
        shape = draw(shapes(max_ndim=3))
        array = random_array(rng, dtype, shape)
        if shape == () and dtype.name in ("uint8", "int64"):
            array = np.array(draw(st.integers(0, 200)), dtype.numpy)  # as counters are: such a value is a length
        found[draw(st.sampled_from(["b", "a", "ü", "z."])) + str(number)] = array
    return found


@given(contents(), st.sampled_from([{}, {"epoch_num": 300, "loss": 0.5, "flag": True}]), st.integers(1, 40))
def test_readers_find_it_right(arrays: dict[str, np.ndarray], append: dict[str, Any], size: int) -> None:
    crc = local_crc(plan_of(arrays, append, 0), [blocks(array, size) for array in arrays.values()])
    plan = plan_of(arrays, append, crc)
    pieces = [*(array.tobytes() for array in arrays.values()), *plan.contents]
    file = assemble(plan.layout, pieces, FORM)
    fs = MemoryFileSystem()
    write_file(fs, "/x.safetensors", file)
    index, nbytes = index_file(fs, "/x.safetensors")
    assert (index.crc, nbytes) == (crc, len(file))
    verify_crc(fs, "/x.safetensors", index, required=True)
    # Gathered, in windows of any size, it is the same.
    gathered = GatheredCrc(plan)
    for start in range(0, len(file), size):
        window = np.frombuffer(file[start : start + size], np.uint8)
        gathered.fill(len(window), lambda room, window=window: np.copyto(room, window))
    assert gathered.result() == crc


def test_any_changed_byte_of_data_is_seen() -> None:
    arrays = {"a": np.arange(5, dtype="f4"), "b": np.array(True), "c": np.array(7)}
    crc = local_crc(plan_of(arrays, {}, 0), [blocks(array, 3) for array in arrays.values()])
    plan = plan_of(arrays, {}, crc)
    pieces = [array.tobytes() for array in arrays.values()]
    for number, piece in enumerate(pieces):
        for at in range(len(piece) if number < 2 else 1):
            damaged = bytearray(piece)
            damaged[at] ^= 1
            file = assemble(plan.layout, [*pieces[:number], bytes(damaged), *pieces[number + 1 :]], FORM)
            fs = MemoryFileSystem()
            write_file(fs, "/x.safetensors", file)
            with pytest.raises(ChecksumError):
                verify_crc(fs, "/x.safetensors", index_file(fs, "/x.safetensors")[0])


def test_mindspores_rule_for_integers_without_dimensions() -> None:
    """300 counts as 300 zero bytes, as a file that MindSpore wrote says: its crc covers the name and those."""
    plan = plan_of({"step": np.array(300)}, {}, 0)
    assert local_crc(plan, [blocks(np.array(300), 8)]) == zlib.crc32(bytes(300), zlib.crc32(b"step"))
    two = plan_of({"b": np.zeros(3, "u1"), "a": np.ones(2, "f4")}, {}, 0)
    expected = zlib.crc32(np.ones(2, "f4").tobytes(), zlib.crc32(b"a"))
    expected = zlib.crc32(bytes(3), zlib.crc32(b"b", expected))
    assert local_crc(two, [blocks(np.zeros(3, "u1"), 2), blocks(np.ones(2, "f4"), 3)]) == expected
