"""Contents, plan, record and manifest: round trips, every bound, and nothing but our errors for crafted columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core.contents import Contents, Extent, StoredFile, box_columns, chunk_count
from parckpt.core.dtypes import by_name
from parckpt.core.layout import Box, whole
from parckpt.core.manifest import CHUNK_NBYTES, Coverage, Facts, Manifest, Plan, Record, assemble, coverage
from parckpt.core.tablefile import Table, decode, encode, join_names
from parckpt.core.tensors import TensorRow
from parckpt.errors import FormatError, IntegrityError

pytestmark = pytest.mark.fast

F4, BF16 = by_name("float32"), by_name("bfloat16")
FACTS = Facts(
    stem="CKP-1_3", token="0" * 16, attempt="a", run_id="r", family="CKP", prefix="CKP", sequence=1, step=3, epoch=1,
    step_in_epoch=3, world_size=2, format="ckpt", integrated=False, created=12.5, plan_hash="h",
)  # fmt: skip
TENSORS = (
    TensorRow("w/ä", F4, (4, 6)),
    TensorRow("scalar", BF16, ()),
    TensorRow("empty", F4, (3, 0)),
    TensorRow("mine", F4, (2,), 0),
    TensorRow("mine", F4, (5,), 1),
)
ROWS = [
    (0, 0, Box((0, 0), (2, 6))),
    (1, 0, Box((), ())),
    (2, 0, Box((0, 0), (3, 0))),
    (3, 0, Box((0,), (2,))),
    (0, 1, Box((2, 0), (2, 6))),
    (4, 1, Box((0,), (5,))),
]
PLAN = Plan(FACTS, TENSORS, box_columns(ROWS), (("pos", 0), ("pos", 1)))


def record(rank: int, **changes: Any) -> Record:
    rows = [(PLAN.tensors[t].dtype.itemsize * box.size) for t, file, box in ROWS if file == rank]
    extents: list[tuple[int, int, int]] = []
    counts = []
    position = 30
    for nbytes in rows:
        # Boxes of more than 40 bytes lie in two pieces.
        cuts = [nbytes] if 0 < nbytes <= 40 else [40, nbytes - 40] if nbytes else []
        start = 0
        for cut in cuts:
            extents.append((start, position, cut))
            start, position = start + cut, position + cut + 7
        counts.append(len(cuts))
    table = np.array(extents, "<u8").reshape(-1, 3)
    made = Record(
        token=FACTS.token,
        plan_hash="h",
        rank=rank,
        path=f"rank_{rank}/CKP-1_3.ckpt",
        nbytes=position,
        chunk_crcs=np.array([77 + rank], "<u4"),
        box_entry=np.array([0] * (len(rows) - 1) + [1], "<u4"),
        box_extents=np.array(counts, "<u4"),
        extent_start=np.ascontiguousarray(table[:, 0]),
        extent_byte_offset=np.ascontiguousarray(table[:, 1]),
        extent_nbytes=np.ascontiguousarray(table[:, 2]),
        entry_names=(f"odd name {rank}",),
        append={"lr": 0.5},
        values={"v": [1]} if rank == 0 else {},
        per_rank_values={"pos": {str(rank): rank}},
    )
    return replace(made, **changes)


RECORDS = [record(0), record(1)]


def manifest() -> Manifest:
    return assemble(PLAN, RECORDS, FACTS)


def same_contents(a: Contents, b: Contents) -> None:
    assert a.tensors == b.tensors
    assert [(f.path, f.nbytes) for f in a.files] == [(f.path, f.nbytes) for f in b.files]
    assert a.entry_names == b.entry_names
    first, second = a.columns(), b.columns()
    assert list(first) == list(second)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_manifest_is_read_as_it_was_written() -> None:
    made = manifest()
    read = Manifest.decode(made.encode(), "m")
    assert read.facts == made.facts
    same_contents(read.contents, made.contents)
    assert read.encode() == made.encode()
    assert read.facts.values == {"v": [1]}
    assert read.facts.per_rank_values == {"pos": {"0": 0, "1": 1}}


def test_boxes_are_found_by_tensor_and_by_row() -> None:
    contents = manifest().contents
    boxes = list(contents.boxes_of(0))
    assert [(b.file, b.box, b.entry) for b in boxes] == [
        (0, Box((0, 0), (2, 6)), "w/ä"),
        (1, Box((2, 0), (2, 6)), "w/ä"),
    ]
    assert boxes[0].extents == (Extent(0, 30, 40), Extent(40, 77, 8))
    assert [contents.box(row).entry for row in (3, 5)] == ["odd name 0", "odd name 1"]
    assert contents.index == {"w/ä": [0], "scalar": [1], "empty": [2], "mine": [3, 4]}
    rows, offsets, shapes = contents.geometry(0)
    assert (rows.tolist(), offsets.tolist(), shapes.tolist()) == ([0, 4], [[0, 0], [2, 0]], [[2, 6], [2, 6]])
    assert [array.shape for array in contents.geometry(1)] == [(1,), (1, 0), (1, 0)]
    assert contents.box_nbytes().tolist() == [48, 2, 0, 8, 48, 20]


def test_per_rank_entries_of_one_file_carry_their_rank() -> None:
    contents = replace(manifest().contents, integrated=True, box_entry=np.zeros(6, "<u4"))
    assert [contents.box(row).entry for row in (0, 3, 5)] == ["w/ä", "mine@rank_0", "mine@rank_1"]


def test_unknown_facts_and_columns_do_not_disturb_and_facts_survive() -> None:
    table = decode(manifest().encode(), "m")
    newer = Table(table.kind, {**table.facts, "later": {"x": [1]}}, {**table.columns, "more": np.arange(3, dtype="u1")})
    read = Manifest.decode(encode(newer), "m")
    assert read.facts.unknown == {"later": {"x": [1]}}
    assert decode(read.encode(), "m").facts["later"] == {"x": [1]}
    again = decode(encode(decode(encode(newer), "m")), "m")
    assert again.columns["more"].tolist() == [0, 1, 2]


def test_a_plan_is_read_as_it_was_written() -> None:
    read = Plan.decode(PLAN.encode(), "p")
    assert (read.facts, read.tensors, read.per_rank_values) == (PLAN.facts, PLAN.tensors, PLAN.per_rank_values)
    assert read.boxes.dims.tolist() == PLAN.boxes.dims.tolist()
    assert read.encode() == PLAN.encode()


def test_a_record_is_read_as_it_was_written_with_and_without_its_boxes() -> None:
    first = RECORDS[0]
    for read in (
        Record.decode(first.encode(), "r"),
        Record.decode(first.encode(static=False), "r", replace(first, nbytes=1, values={})),
    ):
        assert read.encode() == first.encode()
    assert len(first.encode(static=False)) < len(first.encode())
    with pytest.raises(FormatError, match="lacks its boxes"):
        Record.decode(first.encode(static=False), "r")


# -- refusing ----------------------------------------------------------------------------------------------------------


def crafted(facts: dict[str, Any] | None = None, **columns: Any) -> bytes:
    """The manifest with other facts and columns (a function of the column, or None), digests that fit."""
    table = decode(manifest().encode(), "m")
    new = dict(table.columns)
    for name, change in columns.items():
        new[name] = np.asarray(change(new[name].copy()), new[name].dtype)
    return encode(Table(table.kind, {**table.facts, **(facts or {})}, new))


def put(index: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(column: np.ndarray) -> np.ndarray:
        column[index] = value
        return column

    return change


def cut(column: np.ndarray) -> np.ndarray:
    return column[:-1]


def longer(column: np.ndarray) -> np.ndarray:
    return np.append(column, column[-1:])


BIG = 2**64 - 1
HOSTILE: dict[str, dict[str, Any]] = {
    "dtype code": {"tensor_dtype": put(0, 200)},
    "negative extent": {"tensor_dims": put(0, -4)},
    "too many dimensions": {"tensor_ndim": lambda c: [65, 0, 0, 0, 0], "tensor_dims": lambda c: [1] * 65},
    "a tensor of 2**66 bytes": {"tensor_dims": lambda c: [1 << 32, 1 << 32, 3, 0, 2, 5]},
    "an empty tensor numpy cannot make": {
        "tensor_ndim": put(2, 3),
        "tensor_dims": lambda c: [4, 6, 2**62, 2**62, 0, 2, 5],
        "box_dims": lambda c: np.insert(c, 7, [0, 0, 0]),
    },
    "a tensor twice": {"tensor_rank": put(4, 0)},
    "a rank below none": {"tensor_rank": put(0, -2)},
    "box of no tensor": {"box_tensor": put(0, 5)},
    "box of no file": {"box_file": put(0, 2)},
    "box outside": {"box_dims": put(0, 3)},
    "box with a negative offset": {"box_dims": put(0, -1)},
    "box with a negative shape": {"box_dims": put(2, -2)},
    "box that wraps around": {"box_dims": put(0, 2**63 - 1)},
    "box too long": {"box_dims": put(2, 5)},
    "entry that is not there": {"box_entry": put(0, 3)},
    "extents too many": {"box_extents": put(0, 3)},
    "extents huge": {"box_extents": put(0, 2**32 - 1)},
    "extent begins elsewhere": {"extent_start": put(1, 41)},
    "extent behind the file": {"extent_byte_offset": put(0, 10**6)},
    "extent that wraps around": {"extent_byte_offset": put(0, BIG)},
    "extent too long": {"extent_nbytes": put(0, 41)},
    "extent huge": {"extent_nbytes": put(0, BIG)},
    "box without extents": {
        "box_extents": put(1, 0),
        "extent_start": lambda c: np.delete(c, 2),
        "extent_byte_offset": lambda c: np.delete(c, 2),
        "extent_nbytes": lambda c: np.delete(c, 2),
    },
    "file with too few checksums": {"file_nbytes": put(0, CHUNK_NBYTES + 1)},
    "file of 2**64 bytes": {"file_nbytes": put(0, BIG)},
    "file with too many checksums": {"file_nbytes": put(0, 0)},
    "name ends descending": {"name_ends": put(0, 11)},
    "name ends huge": {"name_ends": put(0, BIG)},
}  # fmt: skip
LENGTHS = {
    f"{name} {change.__name__}": {name: change} for name in manifest().contents.columns() for change in (cut, longer)
}


@pytest.mark.parametrize("name", [*HOSTILE, *LENGTHS])
def test_crafted_columns_are_refused(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        Manifest.decode(crafted(**{**HOSTILE, **LENGTHS}[name]), "some/manifest")
    assert "some/manifest" in caught.value.message
    assert caught.value.field


@pytest.mark.parametrize("missing", list(manifest().contents.columns()))
def test_a_missing_or_wrongly_typed_column_is_refused(missing: str) -> None:
    table = decode(manifest().encode(), "m")
    others = {name: values for name, values in table.columns.items() if name != missing}
    for columns in (others, {**others, missing: np.zeros(1, "<f8")}):
        with pytest.raises(FormatError, match=missing):
            Manifest.decode(encode(Table(table.kind, table.facts, columns)), "m")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/", "a\0b", "."])
def test_paths_that_leave_the_directory_are_refused(path: str) -> None:
    bad = RECORDS[0].encode()
    with pytest.raises(FormatError, match="path inside"):
        Record.decode(encode_like(bad, {"path": path}), "r")
    table = decode(manifest().encode(), "m")
    names = [*(t.name for t in TENSORS), "odd name 0", "odd name 1", "rank_0/CKP-1_3.ckpt", path]
    blob, ends = join_names(names)
    with pytest.raises(FormatError, match="path inside"):
        Manifest.decode(
            encode(Table(table.kind, table.facts, {**table.columns, "name_bytes": blob, "name_ends": ends})), "m"
        )


def encode_like(data: bytes, facts: dict[str, Any], columns: dict[str, Any] | None = None) -> bytes:
    table = decode(data, "x")
    return encode(Table(table.kind, {**table.facts, **facts}, {**table.columns, **(columns or {})}))


@pytest.mark.parametrize(
    "facts",
    [
        {"world_size": 0}, {"world_size": 10**15}, {"world_size": True}, {"step": -1}, {"sequence": -1}, {"step": "3"},
        {"step": 1 << 80}, {"missing": [5]},
        {"stem": "../x"}, {"stem": ""}, {"stem": ".."}, {"chunk_nbytes": 0}, {"chunk_nbytes": 1 << 40},
        {"created": "x"},
        {"parent": 5}, {"values": []}, {"per_rank_values": {"pos": 5}}, {"per_rank_values": {"pos": {"-1": 0}}},
        {"per_rank_values": {"pos": {"²": 0}}}, {"missing": "x"}, {"integrated": 1}, {"token": None},
    ],
)  # fmt: skip
def test_facts_that_make_no_sense_are_refused(facts: dict[str, Any]) -> None:
    for data, parse in ((manifest().encode(), Manifest.decode), (PLAN.encode(), Plan.decode)):
        with pytest.raises(FormatError) as caught:
            parse(encode_like(data, facts), "m")
        assert caught.value.field in facts


@pytest.mark.parametrize("names", [5, [5], [["pos"]], [["pos", "0"]], [["pos", True]], [["pos", 2]], [["pos", -1]]])
def test_per_rank_names_of_a_plan_are_checked(names: Any) -> None:
    with pytest.raises(FormatError) as caught:
        Plan.decode(encode_like(PLAN.encode(), {"per_rank_value_names": names}), "p")
    assert caught.value.field == "per_rank_value_names"


@pytest.mark.parametrize(
    ("facts", "columns"),
    [
        ({"nbytes": -1}, {}),
        ({"nbytes": CHUNK_NBYTES + 1}, {}),
        ({"rank": "0"}, {}),
        ({"per_rank_values": {"pos": [0]}}, {}),
        ({}, {"chunk_crc": np.zeros(2, "<u4")}),
        ({}, {"box_entry": np.zeros(3, "<u4")}),
        ({}, {"box_entry": np.array([0, 0, 0, 2], "<u4")}),
        ({}, {"box_extents": np.array([2, 1, 0, 2], "<u4")}),
        ({}, {"extent_start": np.zeros(3, "<u8")}),
    ],
)
def test_records_that_make_no_sense_are_refused(facts: dict[str, Any], columns: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        Record.decode(encode_like(RECORDS[0].encode(), facts, columns), "r")


@given(st.data())
def test_crafted_manifests_give_a_manifest_or_our_errors(data: st.DataObject) -> None:
    table = decode(manifest().encode(), "m")
    columns = {name: values.copy() for name, values in table.columns.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(columns)))
        column = columns[name]
        kind = data.draw(st.sampled_from(["byte", "value", "shorter", "longer", "swap"]))
        if kind == "byte" and column.size:
            column.view("u1")[data.draw(st.integers(0, column.nbytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "value" and column.size:
            info = np.iinfo(column.dtype)
            near = st.integers(max(info.min, -3), 8)
            column[data.draw(st.integers(0, column.size - 1))] = data.draw(near | st.sampled_from([info.max, info.min]))
        elif kind == "shorter":
            columns[name] = column[: data.draw(st.integers(0, column.size))]
        elif kind == "longer":
            columns[name] = np.append(column, column[: data.draw(st.integers(0, column.size))])
        elif column.size > 1:
            column[[0, -1]] = column[[-1, 0]]
    facts = dict(table.facts)
    if data.draw(st.booleans()):
        facts[data.draw(st.sampled_from(sorted(facts)))] = data.draw(
            st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()) | st.just({"a": 1})
        )
    try:
        read = Manifest.decode(encode(Table(table.kind, facts, columns)), "m")
    except (FormatError, IntegrityError):
        return
    # What was accepted can be used without looking again.
    contents = read.contents
    for row in range(len(contents.boxes.tensor)):
        box = contents.box(row)
        tensor, file = contents.tensors[box.tensor], contents.files[box.file]
        assert all(o >= 0 and s >= 0 for o, s in zip(box.box.offsets, box.box.shape, strict=True))
        assert all(a <= b for a, b in zip(box.box.stop, tensor.global_shape, strict=True))
        assert sum(extent.nbytes for extent in box.extents) == box.box.size * tensor.dtype.itemsize
        assert all(0 <= e.byte_offset <= e.byte_offset + e.nbytes <= file.nbytes for e in box.extents)
    for file in contents.files:
        assert file.chunk_crcs is not None
        assert len(file.chunk_crcs) == chunk_count(file.nbytes, contents.chunk_nbytes)
    assert Manifest.decode(read.encode(), "m").encode() == read.encode()


# -- putting a manifest together ---------------------------------------------------------------------------------------


def test_records_of_another_save_are_refused() -> None:
    for change in ({"token": "1" * 16}, {"plan_hash": "other"}):
        with pytest.raises(IntegrityError, match="another save"):
            assemble(PLAN, [RECORDS[0], replace(RECORDS[1], **change)], FACTS)


@pytest.mark.parametrize("ranks", [[1, 0], [0, 0], [0, 2], [-1, 1]])
def test_records_must_be_one_for_each_file_in_order(ranks: list[int]) -> None:
    with pytest.raises(IntegrityError, match="records of the ranks"):
        assemble(PLAN, [replace(r, rank=rank) for r, rank in zip(RECORDS, ranks, strict=True)], FACTS)


def test_a_record_that_lists_too_few_boxes_is_refused() -> None:
    short = replace(RECORDS[1], box_entry=np.zeros(1, "<u4"), box_extents=np.array([2], "<u4"))
    with pytest.raises(FormatError):
        assemble(PLAN, [RECORDS[0], short], FACTS)


def test_coverage_is_of_the_plan_and_not_of_the_records() -> None:
    assert coverage(PLAN, [0, 1]) == Coverage([], [])
    assert coverage(PLAN, [0]) == Coverage(["w/ä of rank 1"], ["pos@rank_1", "mine@rank_1"])
    replicated = Plan(FACTS, TENSORS[:1], box_columns([(0, rank, whole((4, 6))) for rank in (0, 1)]))
    assert coverage(replicated, [1]) == Coverage([], [])
    found = assemble(replicated, [replace(record(1), **one_box(96))], FACTS).contents
    assert [file.path for file in found.files] == ["rank_1/CKP-1_3.ckpt"]
    assert found.boxes.file.tolist() == [0]


def one_box(nbytes: int) -> dict[str, Any]:
    return {
        "box_entry": np.zeros(1, "<u4"),
        "box_extents": np.ones(1, "<u4"),
        "extent_start": np.zeros(1, "<u8"),
        "extent_byte_offset": np.array([5], "<u8"),
        "extent_nbytes": np.array([nbytes], "<u8"),
        "entry_names": (),
    }


def test_foreign_files_have_no_checksums_to_write() -> None:
    file = StoredFile("x.ckpt", 100, None)
    contents = Contents(
        (TensorRow("t", F4, (2,)),), (file,), box_columns([(0, 0, Box((0,), (2,)))]),
        np.zeros(1, "<u4"), (), np.ones(1, "<u4"), np.zeros(1, "<u8"), np.array([9], "<u8"), np.array([8], "<u8"),
        CHUNK_NBYTES, True,
    )  # fmt: skip
    assert contents.columns()["chunk_crc"].size == 0
