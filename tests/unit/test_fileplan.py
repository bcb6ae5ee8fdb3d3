"""One file's layout: the names of its entries, and columns that say where the bytes really are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core.dtypes import by_name
from parckpt.core.layout import Box, slices, whole
from parckpt.core.tensors import TensorRow
from parckpt.engine.fileplan import FilePlan, plan_file
from parckpt.errors import ConfigError
from parckpt.formats.base import BytesReader
from parckpt.formats.registry import FORMATS
from parckpt.testing.checkpoints import random_array
from parckpt.testing.files import assemble, content
from parckpt.testing.strategies import shapes, splits

pytestmark = pytest.mark.fast

F4 = by_name("float32")


def row(name: str, *shape: int, rank: int = -1, dtype: str = "float32") -> TensorRow:
    return TensorRow(name, by_name(dtype), shape, rank)


def plan(boxes: Any, form: str = "ckpt", append: Any = (), *, integrated: bool = False, **options: Any) -> FilePlan:
    made = [FORMATS[form].value_entry(name, value) for name, value in dict(append).items()]
    return plan_file(FORMATS[form], boxes, made, integrated=integrated, **{"crc": None, **options})


def names(plan: FilePlan) -> list[str]:
    return [entry.name for entry in plan.entries]


def test_entries_are_called_as_their_tensors_and_further_boxes_are_counted() -> None:
    w, v = row("w", 4, 3), row("v", 2)
    boxes = [(w, Box((0, 0), (1, 3))), (v, whole((2,))), (w, Box((1, 0), (1, 3))), (w, Box((3, 0), (1, 3)))]
    found = plan(boxes, append={"epoch_num": 3})
    assert names(found) == ["w", "v", "w@shard_1", "w@shard_2", "epoch_num"]
    assert [entry.shape for entry in found.entries] == [(1, 3), (2,), (1, 3), (1, 3), ()]
    assert found.nboxes == 4
    assert found.contents == ((3).to_bytes(8, "little"),)
    assert found.record_columns["box_entry"].tolist() == [0, 0, 1, 2]
    assert found.record_columns["entry_names"] == ("w@shard_1", "w@shard_2")
    assert found.nbytes == found.layout.nbytes


def test_what_belongs_to_one_rank_has_its_rank_only_in_a_common_file() -> None:
    boxes = [(row("own", 2, rank=0), whole((2,))), (row("w", 2), whole((2,)))]
    assert names(plan(boxes)) == ["own", "w"]
    assert names(plan([*boxes, (row("own", 3, rank=1), whole((3,)))], integrated=True)) == [
        "own@rank_0",
        "w",
        "own@rank_1",
    ]


@pytest.mark.parametrize(
    ("boxes", "append", "name"),
    [
        (
            [(row("w", 2), Box((0,), (1,))), (row("w", 2), Box((1,), (1,))), (row("w@shard_1", 1), whole((1,)))],
            {},
            "w@shard_1",
        ),
        ([(row("w", 2), whole((2,)))], {"w": 1}, "w"),
    ],
)
def test_two_entries_of_one_name_are_refused(boxes: Any, append: Any, name: str) -> None:
    for form in FORMATS:
        with pytest.raises(ConfigError, match=f"'{name}'"):
            plan(boxes, form, append)


def test_what_the_format_cannot_hold_is_refused() -> None:
    boxes = [(row("w", 2, dtype="complex128"), whole((2,)))]
    assert names(plan(boxes, "ckpt")) == ["w"]
    with pytest.raises(ConfigError, match="complex128"):
        plan(boxes, "safetensors")


@given(st.data())
def test_the_columns_say_where_the_bytes_are(data: st.DataObject) -> None:
    form = FORMATS[data.draw(st.sampled_from(sorted(FORMATS)))]
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    boxes, pieces = [], []
    for number in range(data.draw(st.integers(0, 4))):
        tensor = row(
            f"t{number}", *data.draw(shapes(max_ndim=3)), dtype=data.draw(st.sampled_from(["int8", "float64"]))
        )
        array = random_array(rng, tensor.dtype, tensor.global_shape)
        for box in data.draw(splits(tensor.global_shape, max_cuts=3)):
            boxes.append((tensor, box))
            pieces.append(array[slices(box, (0,) * array.ndim)].tobytes())
    order = data.draw(st.permutations(range(len(boxes))))
    boxes, pieces = [boxes[i] for i in order], [pieces[i] for i in order]
    append = data.draw(st.sampled_from([{}, {"epoch_num": 2, "loss": 0.5}]))
    crc = data.draw(st.sampled_from([None, 0]))
    found = plan(boxes, form.name, append, crc=crc, metadata={"format": "ms"})
    file = assemble(found.layout, [*pieces, *found.contents], form)
    assert len(file) == found.nbytes
    columns = found.record_columns
    assert len(columns["box_entry"]) == len(columns["box_extents"]) == len(boxes)
    at = 0
    for piece, count in zip(pieces, columns["box_extents"].tolist(), strict=True):
        stored = b""
        for _ in range(count):
            assert columns["extent_start"][at] == len(stored)
            first = int(columns["extent_byte_offset"][at])
            stored += file[first : first + int(columns["extent_nbytes"][at])]
            at += 1
        assert stored == piece
    assert at == len(columns["extent_start"]) == len(columns["extent_nbytes"])
    # Any reader finds the same.
    index = form.read_index(BytesReader(file))
    read = {entry.name: content(BytesReader(file), entry) for entry in index.entries}
    assert read == dict(zip(names(found), [*pieces, *found.contents], strict=True))


def test_large_tensors_in_several_slices_are_one_box_with_several_extents() -> None:
    shape = (3, 200 << 20)
    found = plan([(row("w", *shape, dtype="int8"), whole(shape)), (row("v", 2), whole((2,)))])
    assert found.record_columns["box_extents"].tolist() == [2, 1]
    assert found.record_columns["extent_start"].tolist() == [0, 512 << 20, 0]
    assert found.record_columns["extent_nbytes"].tolist() == [512 << 20, 88 << 20, 8]
