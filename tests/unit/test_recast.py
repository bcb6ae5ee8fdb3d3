"""New checkpoints from stored ones: what `restore` finds in them, on any number of ranks."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.comm.memory import Exchange, MemoryCommunicator
from parckpt.comm.wait import Waiter
from parckpt.core import recut
from parckpt.core.dtypes import by_name
from parckpt.core.layout import Box
from parckpt.core.manifest import Facts, Manifest
from parckpt.core.mesh import Layout
from parckpt.core.tensors import TensorRow
from parckpt.engine.bands import BoxStream
from parckpt.engine.catalog import find_at, scan
from parckpt.engine.copying import copy_checkpoint, open_original
from parckpt.engine.group import Group
from parckpt.engine.recast import Target, read_nbytes, rewrite
from parckpt.engine.source import Source, open_source
from parckpt.engine.staging import Modes
from parckpt.engine.survey import debris
from parckpt.engine.verify import verify_checkpoint
from parckpt.errors import CheckpointExistsError, ChecksumError, ConfigError, NoSpaceError
from parckpt.formats.registry import FORMATS
from parckpt.storage.atomic import read_file
from parckpt.storage.lock import break_lock
from parckpt.testing.checkpoints import store
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem, SimulatedCrash
from parckpt.testing.saves import DIRECTORY, MODES, PREFIX, check, config, make_state, new_disk, saved
from parckpt.testing.world import run_world

NEW = "/elsewhere"
VERSION = 7


class CountingFileSystem(MemoryFileSystem):
    nbytes_read = 0

    def pread_into(self, fd: int, buffer: bytearray | memoryview, byte_offset: int) -> int:
        count = super().pread_into(fd, buffer, byte_offset)
        self.nbytes_read += count
        return count


def alone() -> Group:
    return Group(MemoryCommunicator(Exchange(1), 0), Waiter(30.0))


def original(disk: MemoryFileSystem, mode: str) -> str:
    is_file = mode.startswith("integrated")
    extension = f".{MODES[mode].get('format', 'ckpt')}" if is_file else ""
    return f"{DIRECTORY}/{PREFIX}-1_3{extension}"


def restored(disk: MemoryFileSystem, path: str, size: int) -> parckpt.Progress:
    """What one rank gets of it, every bit of it checked."""
    with parckpt.ModelCheckpoint("any", NEW, config("integrated"), comm=parckpt.SELF, filesystem=disk) as run:
        state = make_state(0, 1, -1)
        progress = run.restore(state, path=path)
        assert check(state, size, progress) == VERSION
    return progress


def cut_of(contents: Any, how: str) -> recut.Cut | None:
    layouts = {"w": (Layout((2, 2), None, (0, 1)),), "b": (Layout((4,), None, (0,)),)}
    return {
        "integrated": lambda: None,
        "as stored": lambda: recut.as_stored(contents),
        "one": lambda: recut.even(contents, 1),
        "three": lambda: recut.even(contents, 3),
        "layout": lambda: recut.by_layout(contents, layouts, 4, once=False),
        "layout, once": lambda: recut.by_layout(contents, layouts, 4, once=True),
    }[how]()


CASES = [("per-rank", how) for how in ("integrated", "as stored", "one", "three", "layout", "layout, once")]
CASES += [(mode, how) for mode in MODES if mode != "per-rank" for how in ("integrated", "three")]


@pytest.mark.parametrize(("mode", "how"), CASES)
def test_any_recast_is_the_same_checkpoint(mode: str, how: str) -> None:
    disk = saved(new_disk(), mode, 2, [(3, VERSION)])
    source = open_source(disk, original(disk, mode))
    cut = cut_of(source.contents, how)
    for name, form in FORMATS.items():
        stem = f"{PREFIX}-1_3"
        target = Target(f"{NEW}/{name}", stem, form, cut, remove_redundancy=how == "layout, once", crc_check=True)
        counted: list[int] = []
        path = rewrite(alone(), source, target, on_bytes=counted.append)
        assert sum(counted) == read_nbytes(source, target)
        assert path == f"{NEW}/{name}/{stem}{form.extension if cut is None else ''}"
        found = find_at(disk, path)
        assert found is not None
        report = verify_checkpoint(disk, found)
        assert (report.verdict, report.findings) == ("sound", [])
        new, old = found.facts, source.facts
        assert new is not None
        assert new.token != old.token
        assert new.generation == old.generation + 1
        same = ("run_id", "family", "prefix", "sequence", "step", "epoch", "parent", "created", "values", "kind")
        assert [getattr(new, one) for one in same] == [getattr(old, one) for one in same]
        assert (new.per_rank_values, new.append, new.world_size) == (old.per_rank_values, old.append, 2)
        assert (new.format, new.integrated) == (name, cut is None)
        progress = restored(disk, path, 2)
        assert (progress.step, progress.world_size) == (3, 2)
        assert [one.path for one in scan(disk, f"{NEW}/{name}")] == [path]
        assert [entry for entry in disk.listdir(f"{NEW}/{name}") if entry.startswith(".")] == []
    assert disk.nopen == 0


@pytest.mark.parametrize("how", ["integrated", "three"])
def test_each_rank_gets_its_own_back(how: str) -> None:
    disk = saved(new_disk(), "per-rank", 2, [(3, VERSION)])
    source = open_source(disk, original(disk, "per-rank"))
    stem = f"{PREFIX}-1_3"
    rewrite(alone(), source, Target(NEW, stem, FORMATS["ckpt"], cut_of(source.contents, how)))

    def program(comm: Any, rank: int) -> tuple[int, Any]:
        with parckpt.ModelCheckpoint(PREFIX, NEW, config("per-rank"), comm=comm, filesystem=disk) as run:
            state = make_state(rank, 2, -1)
            progress = run.restore(state)
            expected = make_state(rank, 2, VERSION)
            assert state["w"].data.tobytes() == expected["w"].data.tobytes()
            return progress.step, progress.state["place"]

    assert run_world(2, program) == [(3, VERSION), (3, 1000 + VERSION)]


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_is_the_same_bytes(mode: str) -> None:
    disk = saved(new_disk(), mode, 2, [(3, VERSION)])
    counted: list[int] = []
    found = open_original(disk, original(disk, mode))
    path = copy_checkpoint(alone(), found, NEW, modes=Modes(), on_bytes=counted.append)
    assert sum(counted) == found.nbytes > 0
    copied = open_original(disk, path)
    assert copied.manifest == found.manifest
    for file in found.contents.files:
        assert read_file(disk, f"{copied.root}/{file.path}", 1 << 20) == read_file(
            disk, f"{found.root}/{file.path}", 1 << 20
        )
    assert restored(disk, path, 2).step == 3
    # A second time it is the same step of the same run.
    assert copy_checkpoint(alone(), found, NEW, modes=Modes()) == path
    assert restored(disk, path, 2).step == 3


@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_a_run_goes_on_from_a_recast(mode: str) -> None:
    disk = saved(new_disk(), mode, 2, [(3, VERSION)])
    source = open_source(disk, original(disk, mode))
    cut = None if mode == "per-rank" else recut.even(source.contents, 2)
    rewrite(alone(), source, Target(NEW, f"{PREFIX}-1_3", FORMATS["safetensors"], cut))
    with parckpt.ModelCheckpoint(PREFIX, NEW, config(mode), comm=parckpt.SELF, filesystem=disk) as run:
        state = make_state(0, 1, -1)
        progress = run.restore(state)
        assert (progress.step, check(state, 2, progress)) == (3, VERSION)
        run.step_end(state, 4)
    assert sorted(one.facts.step for one in scan(disk, NEW) if one.facts) == [3, 4]


def test_several_ranks_write_together() -> None:
    disk = saved(new_disk(), "per-rank", 3, [(3, VERSION)])

    def program(comm: Any, rank: int) -> str:
        source = open_source(disk, original(disk, "per-rank"))
        target = Target(NEW, "x", FORMATS["ckpt"], recut.even(source.contents, 4))
        return rewrite(Group(comm, Waiter(30.0)), source, target)

    assert run_world(3, program) == [f"{NEW}/x"] * 3
    assert restored(disk, f"{NEW}/x", 3).step == 3


@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_a_damaged_chunk_is_refused_by_name(mode: str) -> None:
    disk = saved(new_disk(), mode, 1, [(3, VERSION)])
    path = original(disk, mode)
    file = open_source(disk, path)
    data = f"{file.root}/{file.contents.files[0].path}"
    disk.corrupt(data, 60)
    for act in (
        lambda: rewrite(alone(), file, Target(NEW, "x", FORMATS["ckpt"])),
        lambda: copy_checkpoint(alone(), open_original(disk, path), NEW, modes=Modes()),
    ):
        with pytest.raises(ChecksumError, match="chunk 0") as caught:
            act()
        assert caught.value.path == data
        assert set(caught.value.tensors) == {"w", "b", "count"}
        assert disk.listdir(NEW) == []


def test_names_that_are_taken() -> None:
    disk = saved(new_disk(), "integrated", 1, [(3, VERSION), (4, VERSION + 1)])
    source = open_source(disk, original(disk, "integrated"))
    target = Target(DIRECTORY, f"{PREFIX}-1_3", FORMATS["ckpt"])
    with pytest.raises(CheckpointExistsError, match="is what is being read"):
        rewrite(alone(), source, target)
    with pytest.raises(CheckpointExistsError, match="not the same step"):
        rewrite(alone(), source, Target(DIRECTORY, f"{PREFIX}-1_4", FORMATS["ckpt"]))
    before = disk.listdir(DIRECTORY)
    # The same step of the same run may be replaced: for once with a checksum of MindSpore's.
    other = Target(DIRECTORY, f"{PREFIX}-1_3", FORMATS["safetensors"])
    first = rewrite(alone(), source, other)
    token = open_source(disk, first).facts.token
    again = rewrite(alone(), source, Target(DIRECTORY, f"{PREFIX}-1_3", FORMATS["safetensors"], crc_check=True))
    assert again == first
    assert open_source(disk, again).facts.token != token
    assert restored(disk, again, 1).step == 3
    # What lies beside the run's own is pinned, or its retention would take it for one too many.
    token = open_source(disk, again).facts.token
    stem = f"{PREFIX}-1_3"
    assert set(disk.listdir(DIRECTORY)) - set(before) == {
        f".{stem}.pin-{token}", f"{stem}.safetensors", f"{stem}.{token}.manifest"
    }  # fmt: skip
    with pytest.raises(CheckpointExistsError, match="is what is being read"):
        copy_checkpoint(alone(), open_original(disk, first), DIRECTORY, modes=Modes())


def test_no_room_is_said_before_anything_is_written() -> None:
    disk = saved(new_disk(), "integrated", 1, [(3, VERSION)])
    source = open_source(disk, original(disk, "integrated"))
    disk.capacity_nbytes = 100_000
    with pytest.raises(NoSpaceError, match="nothing was written"):
        rewrite(alone(), source, Target(NEW, "x", FORMATS["ckpt"]))
    assert disk.listdir(NEW) == []


def test_even_cuts() -> None:
    disk = saved(new_disk(), "per-rank", 1, [(3, VERSION)])
    source = open_source(disk, original(disk, "per-rank"))
    cut = recut.even(source.contents, 4)
    names = [[(source.contents.tensors[row].name, box.offsets, box.shape) for row, box in boxes] for boxes in cut]
    assert [[one for one in boxes if one[0] == "w"] for boxes in names] == [
        [("w", (0, 0), (3, 3))],
        [("w", (3, 0), (3, 3))],
        [("w", (6, 0), (3, 3))],
        [("w", (9, 0), (2, 3))],
    ]
    assert [[one[2] for one in boxes if one[0] == "b"] for boxes in names] == [[(2,)], [(1,)], [(1,)], [(1,)]]
    assert sum(one[0] in ("count", "none") for boxes in names for one in boxes) == 2
    with pytest.raises(ConfigError, match="at least 1 rank"):
        recut.even(source.contents, 0)
    with pytest.raises(ConfigError, match="no such tensor"):
        recut.by_layout(source.contents, {"v": (Layout((2,), None, (0,)),)}, 2, once=True)
    with pytest.raises(ConfigError, match="ranks 0 to 3"):
        recut.by_layout(source.contents, {"w": (Layout((4,), None, (0,)),)}, 2, once=True)
    assert np.prod(source.contents.tensors[0].global_shape) > 0


@pytest.mark.parametrize("act", ["rewrite", "copy"])
def test_an_interrupt_leaves_nothing(act: str) -> None:
    disk = saved(new_disk(), "per-rank", 2, [(3, VERSION)])
    path = original(disk, "per-rank")

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    target = Target(NEW, "x", FORMATS["ckpt"])
    acts = {
        "rewrite": lambda: rewrite(alone(), open_source(disk, path), target, on_bytes=interrupt),
        "copy": lambda: copy_checkpoint(alone(), open_original(disk, path), NEW, modes=Modes(), on_bytes=interrupt),
    }
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        acts[act]()
    assert disk.listdir(NEW) == []
    assert set(threading.enumerate()) <= before


def test_what_a_killed_one_left_is_told_and_swept() -> None:
    disk = saved(new_disk(), "per-rank", 1, [(3, VERSION)])
    path = original(disk, "per-rank")
    system = FaultyFileSystem(disk, crash_at=3, only=frozenset({"mkdir"}))  # of rank_0
    with pytest.raises(SimulatedCrash):
        rewrite(alone(), open_source(system, path), Target(NEW, "x", FORMATS["ckpt"]))
    (left,) = debris(disk, NEW, lambda *whose: False)
    assert (left.kind, left.fate, left.reason) == (
        *("staging", "remove"),
        "a convert, merge, split or copy was interrupted",
    )
    break_lock(disk, NEW, "x")
    rewrite(alone(), open_source(disk, path), Target(NEW, "x", FORMATS["ckpt"]))
    assert debris(disk, NEW, lambda *whose: False) == []


def test_columns_are_put_together_without_reading_anything_more_than_twice() -> None:
    disk = CountingFileSystem()
    rows, columns, nfiles = 512, 64, 8
    whole = np.arange(rows * columns, dtype="f4").reshape(rows, columns)
    width = columns // nfiles
    boxes = [Box((0, k * width), (rows, width)) for k in range(nfiles)]
    row = TensorRow("w", by_name("float32"), whole.shape)
    contents = store(disk, "/src", [(row, whole)], [[(0, box)] for box in boxes], chunk_nbytes=4096)
    facts = Facts("x", "", "", "", "x", "x", 0, 0, 0, 0, 1, "ckpt", False, 0.0)
    disk.nbytes_read = 0
    source = Source(disk, "/src", "/src", Manifest(facts, contents), None)
    stream = BoxStream(source, [(0, Box((0, 0), whole.shape))], band_nbytes=4096)
    assert b"".join(bytes(block) for block in stream.take(whole.nbytes)) == whole.tobytes()
    stream.close()
    # Each of 32 bands needs a little of every file's chunks: all of a chunk once, and then that little.
    assert disk.nbytes_read <= 2 * sum(file.nbytes for file in contents.files)
