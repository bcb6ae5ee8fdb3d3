"""Whatever n ranks stored, m ranks get back bit for bit, however both cut it; damage reaches all and no array."""

from __future__ import annotations

import errno
import os
import posixpath
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parckpt.comm.base import Communicator
from parckpt.comm.wait import Waiter
from parckpt.core.contents import Contents
from parckpt.core.dtypes import by_name
from parckpt.core.layout import Box, slices, whole
from parckpt.core.readplan import Want, plan_reads
from parckpt.core.tensors import TensorRow
from parckpt.core.transfer import Port
from parckpt.engine import mailbox
from parckpt.engine.exchange import Outcome, restore_arrays
from parckpt.engine.group import Group
from parckpt.engine.reading import read_box
from parckpt.errors import (
    CheckpointGoneError,
    ChecksumError,
    ParckptError,
    StorageError,
    TimeoutExpiredError,
    TruncatedError,
)
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.testing.checkpoints import random_array, store
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem
from parckpt.testing.strategies import shapes, splits
from parckpt.testing.world import run_world

ROOT = "/ckpt"
DTYPES = ("bool", "int8", "uint16", "int64", "float16", "bfloat16", "float32", "float64", "complex128", "float8_e5m2")


@dataclass(frozen=True)
class Case:
    """Tensors, what each file stores of them, and what each rank wants."""

    tensors: list[tuple[TensorRow, np.ndarray]]
    files: list[list[tuple[int, Box]]]
    wants: list[list[Want]]
    chunk_nbytes: int
    seed: int


@st.composite
def cases(draw: st.DrawFn, max_ranks: int = 5) -> Case:
    nfiles, nranks = draw(st.integers(1, 4)), draw(st.integers(1, max_ranks))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    tensors, files, wants = [], [[] for _ in range(nfiles)], [[] for _ in range(nranks)]
    for number in range(draw(st.integers(0, 4))):
        row = TensorRow(f"t{number}", by_name(draw(st.sampled_from(DTYPES))), draw(shapes(max_ndim=3)))
        tensors.append((row, random_array(rng, row.dtype, row.global_shape)))
        for box in draw(splits(row.global_shape)):
            for file in draw(st.sets(st.integers(0, nfiles - 1), min_size=1)):
                files[file].append((number, box))
        for box in draw(splits(row.global_shape)):
            for rank in draw(st.sets(st.integers(0, nranks - 1))):
                wants[rank].append(Want(number, box))
        for rank in draw(st.sets(st.integers(0, nranks - 1))):
            if Want(number, whole(row.global_shape)) not in wants[rank]:
                wants[rank].append(Want(number, whole(row.global_shape)))
    wants = [draw(st.permutations(row)) for row in wants]
    return Case(tensors, files, wants, draw(st.sampled_from([7, 64, 4096])), seed)


def holder(kind: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of zeros: plain, in Fortran order, byte-swapped, strided."""
    if kind == 1:
        return np.zeros(shape, dtype, order="F")
    if kind == 2 and dtype.isbuiltin == 1:
        return np.zeros(shape, dtype.newbyteorder(">"))
    if kind == 3:
        return np.zeros((*(2 * n for n in shape), 2), dtype)[(*(slice(None, None, 2),) * len(shape), ..., 1)]
    return np.zeros(shape, dtype)


def restore(
    comm: Communicator,
    fs: FileSystem,
    contents: Contents,
    wants: Sequence[Sequence[Want]],
    *,
    root: str = ROOT,
    manifest_path: str | None = None,
    on_filled: Callable[[Want], None] | None = None,
    timeout_s: float = 30.0,
) -> tuple[Outcome, list[tuple[Want, np.ndarray]]]:
    """One rank's part; its arrays are of all kinds, two for its first want."""
    arrays = []
    for number, want in enumerate([*wants[comm.rank], *wants[comm.rank][:1]]):
        dtype = contents.tensors[want.tensor].dtype.numpy
        arrays.append((want, holder((number + comm.rank) % 4, want.box.shape, dtype)))
    ports: dict[Want, list[Port]] = {}
    for want, array in arrays:
        ports.setdefault(want, []).append(Port(array, contents.tensors[want.tensor].dtype.numpy))
    group = Group(comm, Waiter(timeout_s))
    plan = plan_reads(contents, wants)
    outcome = restore_arrays(group, fs, root, contents, plan, ports, manifest_path=manifest_path, on_filled=on_filled)
    return outcome, arrays


def bits(array: np.ndarray, dtype: np.dtype) -> bytes:
    return np.ascontiguousarray(array, dtype).tobytes()


def check_arrays(case_tensors: list[tuple[TensorRow, np.ndarray]], arrays: list[tuple[Want, np.ndarray]]) -> None:
    for want, array in arrays:
        row, full = case_tensors[want.tensor]
        expected = full[slices(want.box, (0,) * len(want.box.shape))]
        assert bits(array, row.dtype.numpy) == bits(expected, row.dtype.numpy)


@settings(max_examples=80)
@given(cases(), st.sampled_from([True, False]), st.sampled_from([5, 33, 1 << 30]))
def test_every_rank_gets_its_boxes_bit_for_bit(case: Case, checksums: bool, max_nbytes: int) -> None:
    fs = MemoryFileSystem()
    contents = store(fs, ROOT, case.tensors, case.files, chunk_nbytes=case.chunk_nbytes, checksums=checksums)
    filled: list[list[Want]] = [[] for _ in case.wants]

    def rank_part(comm: Communicator, rank: int) -> tuple[Outcome, list[tuple[Want, np.ndarray]]]:
        return restore(comm, fs, contents, case.wants, on_filled=filled[rank].append)

    results = run_world(len(case.wants), rank_part, max_nbytes=max_nbytes)
    for rank, (outcome, arrays) in enumerate(results):
        assert (outcome.error, outcome.failed_peers, outcome.complete) == (None, (), True)
        check_arrays(case.tensors, arrays)
        assert Counter(filled[rank]) == Counter(case.wants[rank])
        touched = {contents.tensors[want.tensor].name for want in case.wants[rank] if not want.box.is_empty}
        assert set(outcome.touched) == touched
    assert fs.nopen == 0


@settings(max_examples=40)
@given(cases(max_ranks=1), st.booleans())
def test_one_box_is_read_without_ranks(case: Case, checksums: bool) -> None:
    fs = MemoryFileSystem()
    contents = store(fs, ROOT, case.tensors, case.files, chunk_nbytes=case.chunk_nbytes, checksums=checksums)
    arrays = [(want, read_box(fs, ROOT, contents, want.tensor, want.box)) for want in case.wants[0]]
    check_arrays(case.tensors, arrays)
    assert fs.nopen == 0


def two_tensors(chunk_nbytes: int = 4096) -> Case:
    """A replicated tensor of 40 kB and a cut one of 64 kB, stored by 4 ranks without redundancy, wanted by 3."""
    rng = np.random.default_rng(1)
    f4, i8 = by_name("float32"), by_name("int64")
    tensors = [
        (TensorRow("bias", f4, (100, 100)), random_array(rng, f4, (100, 100))),
        (TensorRow("weight", i8, (80, 100)), random_array(rng, i8, (80, 100))),
    ]
    files = [[(1, Box((20 * r, 0), (20, 100)))] for r in range(4)]
    for r in range(4):
        files[r].append((0, Box((25 * r, 0), (25, 100))))
    wants = [[Want(0, whole((100, 100))), Want(1, Box((0, a), (80, b)))] for a, b in ((0, 33), (33, 33), (66, 34))]
    return Case(tensors, files, wants, chunk_nbytes, 1)


class CountingFileSystem(MemoryFileSystem):
    """Counts how often each byte of each data file is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[str, np.ndarray] = {}
        self._names: dict[int, str] = {}
        self._guard = threading.Lock()

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        fd = super().open(path, flags, mode)
        with self._guard:
            self._names[fd] = path
        return fd

    def pread_into(self, fd: int, buffer: bytearray | memoryview, byte_offset: int) -> int:
        count = super().pread_into(fd, buffer, byte_offset)
        with self._guard:
            path = self._names[fd]
            seen = self.reads.setdefault(path, np.zeros(self.stat(path).nbytes, int))
            seen[byte_offset : byte_offset + count] += 1
        return count


def test_each_stored_chunk_has_one_reader_in_the_whole_job() -> None:
    case, fs = two_tensors(), CountingFileSystem()
    contents = store(fs, ROOT, case.tensors, case.files, chunk_nbytes=case.chunk_nbytes)
    fs.reads.clear()
    results = run_world(3, lambda comm, rank: restore(comm, fs, contents, case.wants))
    assert [outcome.complete for outcome, _ in results] == [True] * 3
    # Every byte of every file is needed (all but the header's chunks hold wanted bytes), and is read exactly once.
    assert len(fs.reads) == 4
    for seen in fs.reads.values():
        assert seen.tolist() == [1] * len(seen)
    assert sum(outcome.nbytes_read for outcome, _ in results) == sum(file.nbytes for file in contents.files)
    assert all(outcome.chunks_read >= 6 for outcome, _ in results)  # shared out: 28 chunks, 3 ranks


def test_same_ranks_and_cut_read_their_own_files_and_send_nothing() -> None:
    rng = np.random.default_rng(2)
    f8 = by_name("float64")
    tensors = [(TensorRow("w", f8, (40, 16)), random_array(rng, f8, (40, 16)))]
    files = [[(0, Box((10 * r, 0), (10, 16)))] for r in range(4)]
    fs = MemoryFileSystem()
    contents = store(fs, ROOT, tensors, files, chunk_nbytes=256)
    wants = [[Want(0, box) for _, box in boxes] for boxes in files]
    plan = plan_reads(contents, wants)
    assert plan.reader.tolist() == plan.file.tolist()
    assert [plan.receipts_of(rank) for rank in range(4)] == [{}] * 4


@pytest.mark.parametrize("victim", [0, 3])
def test_a_flipped_bit_is_an_error_on_all_ranks_and_stays_out_of_the_arrays(victim: int) -> None:
    case, fs = two_tensors(), MemoryFileSystem()
    contents = store(fs, ROOT, case.tensors, case.files, chunk_nbytes=case.chunk_nbytes)
    path = posixpath.join(ROOT, contents.files[victim].path)
    chunk = 2
    fs.corrupt(path, chunk * case.chunk_nbytes + 17)
    agreed: dict[int, ParckptError] = {}

    def rank_part(comm: Communicator, rank: int) -> tuple[Outcome, list[tuple[Want, np.ndarray]]]:
        outcome, arrays = restore(comm, fs, contents, case.wants)
        with pytest.raises(ParckptError) as caught:
            Group(comm, Waiter(30.0)).agree(outcome.error)
        agreed[rank] = caught.value
        return outcome, arrays

    results = run_world(3, rank_part)
    failed = [rank for rank, (outcome, _) in enumerate(results) if outcome.error is not None]
    assert len(failed) == 1
    error = results[failed[0]][0].error
    assert isinstance(error, ChecksumError)
    assert (error.path, error.chunk, error.tensors) == (path, chunk, ["weight"])
    assert {type(error) for error in agreed.values()} == {ChecksumError}
    assert len({error.message for error in agreed.values()}) == 1
    for rank, (outcome, arrays) in enumerate(results):
        assert not outcome.complete
        assert outcome.failed_peers in ((), tuple(failed))
        assert rank in failed or outcome.failed_peers == tuple(failed)
        for want, array in arrays:
            # What is there is right; what is not there is still zero, and the damaged chunk is nowhere.
            _, full = case.tensors[want.tensor]
            expected = full[slices(want.box, (0, 0))]
            raw = np.ascontiguousarray(array, full.dtype).view(np.uint8)
            good = np.ascontiguousarray(expected).view(np.uint8)
            assert np.all((raw == good) | (raw == 0))
    plan = plan_reads(contents, case.wants)
    row = int(np.flatnonzero((plan.file == victim) & (plan.chunk == chunk))[0])
    for delivery in plan.read(row).deliveries:
        for want, array in results[delivery.rank][1]:
            if want.tensor == 1:
                segment = next(s for s in delivery.segments if s.stored.tensor == 1)
                local = array[slices(segment.part, want.box.offsets)]
                assert np.any(local == 0)
    assert fs.nopen == 0


def test_a_chunk_that_is_right_when_read_again_is_taken() -> None:
    case, inner = two_tensors(), MemoryFileSystem()
    contents = store(inner, ROOT, case.tensors, case.files, chunk_nbytes=case.chunk_nbytes)

    class Unsteady(FaultyFileSystem):
        spoiled = 0

        def pread_into(self, fd: int, buffer: bytearray | memoryview, byte_offset: int) -> int:
            count = super().pread_into(fd, buffer, byte_offset)
            if not self.spoiled:
                self.spoiled = 1
                memoryview(buffer)[0] ^= 1
            return count

    fs = Unsteady(inner)
    wants = [case.wants[0]]
    outcome, arrays = run_world(1, lambda comm, rank: restore(comm, fs, contents, wants))[0]
    assert outcome.complete
    assert fs.spoiled == 1
    check_arrays(case.tensors, arrays)


@pytest.mark.parametrize("change", ["short", "long", "missing"])
def test_a_short_long_or_missing_file_is_damage(change: str) -> None:
    case, fs = two_tensors(), MemoryFileSystem()
    contents = store(fs, ROOT, case.tensors, case.files, chunk_nbytes=case.chunk_nbytes)
    path = posixpath.join(ROOT, contents.files[2].path)
    if change == "missing":
        fs.unlink(path)
    else:
        fd = fs.open(path, os.O_RDWR)
        fs.truncate(fd, contents.files[2].nbytes + (1 if change == "long" else -1))
        fs.close(fd)
    results = run_world(3, lambda comm, rank: restore(comm, fs, contents, case.wants))
    errors = [outcome.error for outcome, _ in results if outcome.error is not None]
    assert errors
    assert {type(error) for error in errors} == {TruncatedError}
    assert errors[0].path == path
    with pytest.raises(TruncatedError):
        read_box(fs, ROOT, contents, 1, whole((80, 100)))
    assert fs.nopen == 0


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_checkpoint_deleted_or_replaced_under_the_reader_is_gone_and_not_damaged(how: str) -> None:
    case, inner = two_tensors(), MemoryFileSystem()
    contents = store(inner, ROOT, case.tensors, case.files, chunk_nbytes=case.chunk_nbytes)
    manifest = posixpath.join(ROOT, "manifest")
    inner.close(inner.open(manifest, os.O_CREAT | os.O_WRONLY))
    inner.close(inner.open(manifest + ".new", os.O_CREAT | os.O_WRONLY))

    class Retention(FaultyFileSystem):
        """Deletes data and manifest when the first data file is opened."""

        def open(self, path: str, flags: int, mode: int = 0o600) -> int:
            for file in contents.files:
                if inner_exists(posixpath.join(ROOT, file.path)):
                    inner.unlink(posixpath.join(ROOT, file.path))
            if how == "replaced" and inner_exists(manifest + ".new"):
                inner.rename(manifest + ".new", manifest)
            elif how == "deleted" and inner_exists(manifest):
                inner.unlink(manifest)
            return super().open(path, flags, mode)

    def inner_exists(path: str) -> bool:
        return posixpath.basename(path) in inner.listdir(posixpath.dirname(path))

    fs = Retention(inner)
    wants = [case.wants[0]]
    outcome, _ = run_world(1, lambda comm, rank: restore(comm, fs, contents, wants, manifest_path=manifest))[0]
    assert isinstance(outcome.error, CheckpointGoneError)
    assert outcome.touched == ()


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_what_the_disk_refuses_is_passed_on_unchanged(code: int) -> None:
    case, fs = two_tensors(), MemoryFileSystem()
    contents = store(fs, ROOT, case.tensors, case.files, chunk_nbytes=case.chunk_nbytes)
    fs.fail_read(posixpath.join(ROOT, contents.files[1].path), case.chunk_nbytes, code)
    results = run_world(3, lambda comm, rank: restore(comm, fs, contents, case.wants))
    errors = [outcome.error for outcome, _ in results if outcome.error is not None]
    assert [(type(error), error.errno) for error in errors if isinstance(error, StorageError)] == [(StorageError, code)]
    assert len(errors) == 1
    assert not any(outcome.complete for outcome, _ in results)


def test_an_error_at_any_read_ends_on_all_ranks_with_right_bytes_or_none() -> None:
    case = two_tensors()
    for fail_at in range(1, 200):
        inner = MemoryFileSystem()
        contents = store(inner, ROOT, case.tensors, case.files, chunk_nbytes=case.chunk_nbytes)
        fs = FaultyFileSystem(inner, fail_at)
        results = run_world(2, lambda comm, rank, fs=fs, contents=contents: restore(comm, fs, contents, case.wants[:2]))
        if fs.failed is None:
            break
        failed = [outcome.error for outcome, _ in results if outcome.error is not None]
        if fs.failed.operation == "close" or not failed:
            assert all(outcome.complete for outcome, _ in results)
        else:
            assert all(isinstance(error, StorageError) for error in failed)
            assert not any(outcome.complete for outcome, _ in results)
        assert inner.nopen == 0
    assert 30 < fail_at < 199


def test_an_array_that_cannot_be_written_fails_the_restore_and_not_the_messages() -> None:
    case, fs = two_tensors(), MemoryFileSystem()
    contents = store(fs, ROOT, case.tensors, case.files, chunk_nbytes=case.chunk_nbytes)

    def rank_part(comm: Communicator, rank: int) -> Outcome:
        ports = {}
        for want in case.wants[rank]:
            array = np.zeros(want.box.shape, contents.tensors[want.tensor].dtype.numpy)
            array.flags.writeable = rank != 1 or want.tensor != 1
            ports[want] = [Port(array, array.dtype)]
        plan = plan_reads(contents, case.wants)
        return restore_arrays(Group(comm, Waiter(30.0)), fs, ROOT, contents, plan, ports)

    outcomes = run_world(3, rank_part)
    assert isinstance(outcomes[1].error, ValueError)
    assert [outcomes[0].error, outcomes[2].error] == [None, None]
    assert not outcomes[1].complete


def test_messages_beyond_the_memory_budget_still_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one message at a time, every rank sends to every other: nothing may lock up."""
    monkeypatch.setattr(mailbox, "OUTSTANDING_NBYTES", 1)
    rng = np.random.default_rng(3)
    f4 = by_name("float32")
    tensors = [(TensorRow("w", f4, (6, 50_000)), random_array(rng, f4, (6, 50_000)))]
    files = [[(0, Box((r, 0), (1, 50_000)))] for r in range(6)]
    fs = MemoryFileSystem()
    contents = store(fs, ROOT, tensors, files, chunk_nbytes=70_000)
    wants = [[Want(0, whole((6, 50_000)))] for _ in range(6)]
    results = run_world(6, lambda comm, rank: restore(comm, fs, contents, wants))
    for outcome, arrays in results:
        assert outcome.complete
        check_arrays(tensors, arrays)


def test_a_rank_that_does_not_come_is_named_when_the_time_is_up() -> None:
    case, fs = two_tensors(), MemoryFileSystem()
    contents = store(fs, ROOT, case.tensors, case.files, chunk_nbytes=case.chunk_nbytes)

    def rank_part(comm: Communicator, rank: int) -> TimeoutExpiredError | None:
        if rank == 2:
            return None
        with pytest.raises(TimeoutExpiredError) as caught:
            restore(comm, fs, contents, case.wants, timeout_s=0.3)
        return caught.value

    errors = run_world(3, rank_part)
    for rank in (0, 1):
        error = errors[rank]
        assert error is not None
        assert 2 in error.missing
        assert "rank" in error.message


def test_real_files(tmp_path: Path) -> None:
    """On a real disk, past the page cache where it takes that, with chunks of the real size."""
    rng = np.random.default_rng(4)
    f4 = by_name("float32")
    shape = (3000, 1000)
    tensors = [(TensorRow("w", f4, shape), random_array(rng, f4, shape))]
    files = [[(0, Box((0, 0), (1700, 1000)))], [(0, Box((1700, 0), (1300, 1000)))]]
    root = str(tmp_path)
    fs = PosixFileSystem()
    contents = store(fs, root, tensors, files)
    wants = [[Want(0, Box((1000 * r, 0), (1000, 1000)))] for r in range(3)]
    results = run_world(3, lambda comm, rank: restore(comm, fs, contents, wants, root=root))
    for outcome, arrays in results:
        assert outcome.complete
        check_arrays(tensors, arrays)
