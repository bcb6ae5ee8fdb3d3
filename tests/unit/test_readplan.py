"""Who reads what: every wanted byte planned exactly once, one reader for each chunk, work shared out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core.chunkbytes import bytes_by_chunk
from parckpt.core.contents import Contents, Extent, StoredBox, StoredFile, box_columns
from parckpt.core.dtypes import by_name
from parckpt.core.layout import Box, slices, whole
from parckpt.core.readplan import ReadPlan, Want, plan_reads
from parckpt.core.tensors import TensorRow
from parckpt.core.transfer import copies
from parckpt.errors import IntegrityError
from parckpt.testing.strategies import shapes, splits

pytestmark = pytest.mark.fast

F4 = by_name("float32")


def contents_of(
    shape: tuple[int, ...], files: list[list[Box]], *, chunk_nbytes: int = 64, gap: int = 5, names: int = 1
) -> Contents:
    """One tensor ``t0`` (or several of one shape, all cut alike), its boxes ``gap`` bytes apart in their files."""
    rows: list[tuple[int, int, Box]] = []
    offsets: list[int] = []
    stored = []
    for number, boxes in enumerate(files):
        position = gap
        for box in boxes:
            for tensor in range(names):
                rows.append((tensor, number, box))
                offsets.append(position)
                position += box.size * 4 + gap
        stored.append(StoredFile(f"rank_{number}/f", position, None))
    nbytes = [box.size * 4 for _, _, box in rows]
    kept = [n > 0 for n in nbytes]
    return Contents(
        tensors=tuple(TensorRow(f"t{k}", F4, shape) for k in range(names)),
        files=tuple(stored),
        boxes=box_columns(rows),
        box_entry=np.zeros(len(rows), "<u4"),
        entry_names=(),
        box_extents=np.array(kept, "<u4"),
        extent_start=np.zeros(sum(kept), "<u8"),
        extent_byte_offset=np.array([o for o, k in zip(offsets, kept, strict=True) if k], "<u8"),
        extent_nbytes=np.array([n for n in nbytes if n], "<u8"),
        chunk_nbytes=chunk_nbytes,
        integrated=False,
    )


def check_plan(contents: Contents, wants: list[list[Want]], plan: ReadPlan) -> None:
    """Every wanted element in exactly one part; sizes as `copies` has them; both sides see the same messages."""
    reads = [read for rank in range(len(wants)) for read in plan.reads_of(rank)]
    assert len({(read.file, read.chunk) for read in reads}) == len(reads) == len(plan.file)
    parts: dict[tuple[int, int], dict[tuple[int, Box], int]] = {}
    for read in reads:
        window = read.chunk * contents.chunk_nbytes, (read.chunk + 1) * contents.chunk_nbytes
        assert read.reader in {delivery.rank for delivery in read.deliveries}
        for delivery in read.deliveries:
            nbytes = 0
            for segment in delivery.segments:
                assert segment.stored.file == read.file
                found = copies(segment.stored.box, segment.stored.extents, 4, window, segment.part, flat=True)
                nbytes += sum(copy.nbytes for copy in found)
                by_part = parts.setdefault((delivery.rank, segment.want), {})
                key = segment.stored.index, segment.part
                by_part[key] = by_part.get(key, 0) + sum(copy.nbytes for copy in found)
            assert nbytes == delivery.nbytes > 0
    for rank, row in enumerate(wants):
        for number, want in enumerate(row):
            hits = np.zeros(contents.tensors[want.tensor].global_shape, int)
            for (_, part), nbytes in parts.get((rank, number), {}).items():
                assert nbytes == part.size * 4
                hits[slices(part, (0,) * len(part.shape))] += 1
            expected = np.zeros_like(hits)
            expected[slices(want.box, (0,) * len(want.box.shape))] = 1
            assert np.array_equal(hits, expected)
    for rank in range(len(wants)):
        expected_from = {
            source: [
                (read.file, read.chunk, delivery)
                for read in plan.reads_of(source)
                for delivery in read.deliveries
                if delivery.rank == rank
            ]
            for source in range(len(wants))
            if source != rank
        }
        receipts = plan.receipts_of(rank)
        found_from = {s: [(r.file, r.chunk, r.deliveries[0]) for r in row] for s, row in receipts.items()}
        assert found_from == {source: row for source, row in expected_from.items() if row}


@given(st.data())
def test_every_wanted_element_is_planned_exactly_once(data: st.DataObject) -> None:
    shape = data.draw(shapes(max_ndim=4, max_extent=5))
    nfiles, nranks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    files: list[list[Box]] = [[] for _ in range(nfiles)]
    for box in data.draw(splits(shape)):
        for file in data.draw(st.sets(st.integers(0, nfiles - 1), min_size=1)):
            files[file].append(box)
    if data.draw(st.booleans()):
        # A foreign file with a cut of its own, partly or wholly over the others.
        extra = data.draw(splits(shape))
        files.append(extra[: data.draw(st.integers(0, len(extra)))])
    wants = [[Want(0, box) for box in data.draw(splits(shape))] for _ in range(nranks)]
    contents = contents_of(shape, files, chunk_nbytes=data.draw(st.sampled_from([3, 16, 100, 4096])))
    check_plan(contents, wants, plan_reads(contents, wants))


@given(st.data())
def test_bytes_of_a_part_are_counted_in_each_chunk(data: st.DataObject) -> None:
    shape = data.draw(shapes(max_ndim=4, max_extent=4, min_extent=1))
    stored = data.draw(st.sampled_from(data.draw(splits(shape))))
    part = data.draw(st.sampled_from(data.draw(splits(stored.shape))))
    part = Box(tuple(a + b for a, b in zip(part.offsets, stored.offsets, strict=True)), part.shape)
    itemsize, chunk = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.integers(1, 40))
    nbytes = stored.size * itemsize
    cut = data.draw(st.integers(0, nbytes))
    extents = (Extent(0, 9, cut), Extent(cut, 9 + cut + 4, nbytes - cut))
    found = bytes_by_chunk([(StoredBox(0, 0, 0, "t", stored, extents), part, itemsize)], chunk)[0]
    expected = Counter(
        {
            k: sum(c.nbytes for c in copies(stored, extents, itemsize, (k * chunk, (k + 1) * chunk), part, flat=False))
            for k in range((nbytes + 13) // chunk + 1)
        }
    )
    assert found == {k: n for k, n in expected.items() if n}


def test_the_own_file_is_preferred_and_else_the_lowest() -> None:
    shape = (8, 4)
    contents = contents_of(shape, [[whole(shape)]] * 3)
    wants = [[Want(0, whole(shape))] for _ in range(5)]
    plan = plan_reads(contents, wants)
    check_plan(contents, wants, plan)
    by_rank = [{s.stored.file for s in segments_of(plan, rank)} for rank in range(5)]
    assert by_rank == [{0}, {1}, {2}, {0}, {0}]


def test_local_files_can_be_said() -> None:
    shape = (8, 4)
    contents = contents_of(shape, [[whole(shape)]] * 3)
    plan = plan_reads(contents, [[Want(0, whole(shape))] for _ in range(2)], local_files={2: 0, 1: 1})
    assert [{s.stored.file for s in segments_of(plan, rank)} for rank in range(2)] == [{2}, {1}]
    assert plan.reader.tolist() == [0 if file == 2 else 1 for file in plan.file.tolist()]


def segments_of(plan: ReadPlan, rank: int) -> list:
    return [
        segment
        for row in range(len(plan.file))
        for delivery in plan.read(row).deliveries
        if delivery.rank == rank
        for segment in delivery.segments
    ]


@pytest.mark.parametrize(("nfiles", "nranks"), [(1, 4), (2, 8), (4, 4), (8, 3)])
def test_replicated_tensors_are_read_by_all_ranks_alike(nfiles: int, nranks: int) -> None:
    shape = (nfiles * 64, 16)
    files = [[Box((64 * f, 0), (64, 16))] for f in range(nfiles)]
    contents = contents_of(shape, files, chunk_nbytes=64, names=4)
    wants = [[Want(t, whole(shape)) for t in range(4)] for _ in range(nranks)]
    plan = plan_reads(contents, wants)
    counts = np.bincount(plan.reader, minlength=nranks)
    assert counts.max() - counts.min() <= 2
    if nfiles == nranks:
        assert np.array_equal(plan.reader, plan.file)


def test_the_plan_is_the_same_each_time() -> None:
    contents = contents_of((9, 9), [[Box((0, 0), (4, 9))], [Box((4, 0), (5, 9))]])
    wants = [[Want(0, Box((0, a), (9, 3)))] for a in (0, 3, 6)]
    first, second = plan_reads(contents, wants), plan_reads(contents, wants)
    assert first.reader.tolist() == second.reader.tolist()
    assert [first.read(row) for row in range(len(first.file))] == [second.read(row) for row in range(len(second.file))]


def test_what_is_not_stored_is_named() -> None:
    contents = contents_of((10, 4), [[Box((0, 0), (3, 4)), Box((5, 0), (5, 4))]])
    with pytest.raises(IntegrityError, match=r"offsets \(3, 1\) of shape \(2, 2\) of 't0'") as e:
        plan_reads(contents, [[], [Want(0, Box((2, 1), (4, 2)))]])
    assert (e.value.tensor, e.value.offsets, e.value.shape) == ("t0", [3, 1], [2, 2])


def test_two_overlapping_boxes_that_add_up_to_the_size_do_not_hide_a_gap() -> None:
    contents = contents_of((6,), [[Box((0,), (3,)), Box((1,), (3,))]])
    with pytest.raises(IntegrityError, match=r"offsets \(4,\) of shape \(2,\)"):
        plan_reads(contents, [[Want(0, whole((6,)))]])


def test_nothing_is_read_for_empty_boxes_and_empty_jobs() -> None:
    contents = contents_of((4, 0), [[whole((4, 0))], []])
    for wants in ([[Want(0, whole((4, 0)))], []], [[], []]):
        plan = plan_reads(contents, wants)
        assert len(plan.file) == 0
        assert plan.reads_of(0) == [] == list(plan.receipts_of(1))


def test_an_empty_file_before_others_does_not_shift_them() -> None:
    good = contents_of((4, 4), [[], [Box((0, 0), (2, 4))], [], [Box((2, 0), (2, 4))], []], gap=0)
    assert [file.nbytes for file in good.files] == [0, 32, 0, 32, 0]
    plan = plan_reads(good, [[Want(0, whole((4, 4)))]])
    assert plan.file.tolist() == [1, 3]
    check_plan(good, [[Want(0, whole((4, 4)))]], plan)
