"""Which checkpoint a start takes, what makes it take an older one, what makes it refuse, and what it never touches."""

from __future__ import annotations

import errno
import os
import posixpath
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.comm.base import Communicator
from parckpt.core import naming, tablefile
from parckpt.core.manifest import CHUNK_NBYTES, Manifest
from parckpt.engine.catalog import scan
from parckpt.errors import (
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    IntegrityError,
    ParckptError,
    StateMismatchError,
    StorageError,
    UnsupportedVersionError,
)
from parckpt.storage.atomic import remove_tree
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.testing import saves
from parckpt.testing.filesystem import Call, FaultyFileSystem, MemoryFileSystem
from parckpt.testing.saves import DIRECTORY, PREFIX, check, fill, make_state, new_disk, saved
from parckpt.testing.world import run_world

LAYOUTS = ["integrated", "integrated-safetensors", "per-rank", "deduplicated"]
UNTOUCHED = 999


# -- a checkpoint directory, and what happens to it -------------------------------------------------------------------


@contextmanager
def run_of(fs: FileSystem, comm: Any = parckpt.SELF, **options: Any) -> Iterator[parckpt.ModelCheckpoint]:
    config = parckpt.CheckpointConfig(**{"save_checkpoint_steps": 1, "keep_checkpoint_max": 9, **options})
    with parckpt.ModelCheckpoint(PREFIX, DIRECTORY, config, comm=comm, filesystem=fs) as run:
        yield run


def stem(step: int) -> str:
    return f"{PREFIX}-1_{step}"


def published(fs: FileSystem, step: int) -> str:
    """Path of what is published for a step."""
    (name,) = [n for n in fs.listdir(DIRECTORY) if n in (stem(step), f"{stem(step)}.ckpt", f"{stem(step)}.safetensors")]
    return posixpath.join(DIRECTORY, name)


def manifest_of(fs: FileSystem, step: int) -> str:
    if stem(step) in fs.listdir(DIRECTORY):
        return posixpath.join(DIRECTORY, stem(step), naming.MANIFEST)
    (name,) = [n for n in fs.listdir(DIRECTORY) if n.startswith(f"{stem(step)}.") and n.endswith(".manifest")]
    return posixpath.join(DIRECTORY, name)


def data_of(fs: FileSystem, step: int, rank: int = 0) -> str:
    path = published(fs, step)
    if not fs.stat(path).is_dir:
        return path
    (name,) = [n for n in fs.listdir(f"{path}/rank_{rank}") if n != naming.RECORD]
    return f"{path}/rank_{rank}/{name}"


def content(fs: FileSystem, path: str) -> bytes:
    fd = fs.open(path, os.O_RDONLY)
    try:
        data = bytearray(fs.stat(path).nbytes)
        assert fs.pread_into(fd, data, 0) == len(data)
        return bytes(data)
    finally:
        fs.close(fd)


def rewrite(fs: FileSystem, path: str, data: bytes) -> None:
    fd = fs.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
    try:
        assert fs.pwrite(fd, data, 0) == len(data)
    finally:
        fs.close(fd)


def change_facts(fs: FileSystem, step: int, **facts: Any) -> None:
    path = manifest_of(fs, step)
    manifest = Manifest.decode(content(fs, path), path)
    rewrite(fs, path, Manifest(replace(manifest.facts, **facts), manifest.contents).encode())


def marks(fs: FileSystem) -> list[str]:
    return [name for name in fs.listdir(DIRECTORY) if ".bad-" in name]


def two_saves(mode: str = "deduplicated", size: int = 2) -> MemoryFileSystem:
    """Version 10 at step 1, version 20 at step 2."""
    return saved(new_disk(), mode, size, [(1, 10), (2, 20)])


def attempt(
    fs: FileSystem,
    size: int = 1,
    *,
    saved_size: int = 2,
    mode: str = "deduplicated",
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
    **request: Any,
) -> tuple[int, int, list[tuple[str, str]]]:
    """Restore on ``size`` ranks, all of which must get the same: step, version, skipped.

    An error must be the same on all ranks, and is raised. ``before`` is called between construction and restore,
    ``after`` when the restore has failed.
    """

    def program(comm: Communicator, rank: int) -> tuple[Any, bool]:
        with saves.started(fs, mode, comm) as run:
            state = make_state(rank, size, UNTOUCHED)
            if rank == 0:
                before()
            try:
                progress = run.restore(state, **request)
            except ParckptError as error:
                if rank == 0:
                    after()
                return error, untouched(state, rank, size)
            if progress.step == 0:
                assert untouched(state, rank, size)
                return (0, UNTOUCHED, progress.skipped), True
            return (progress.step, version_of(state, rank, size, saved_size, progress), progress.skipped), False

    results = run_world(size, program)
    first = results[0][0]
    if isinstance(first, ParckptError):
        assert {(type(one), str(one)) for one, _ in results} == {(type(first), str(first))}
        first.facts["arrays_untouched"] = all(clean for _, clean in results)
        raise first
    assert all(one == first for one, _ in results)
    return first


def version_of(state: dict[str, Any], rank: int, size: int, saved_size: int, progress: parckpt.Progress) -> int:
    """The version that a rank's state holds, every bit of it checked."""
    version = int(state["sched"]["version"])
    if size == 1:
        assert check(state, saved_size, progress) == version
    expected = make_state(rank, size, version)
    own = [1000 * r + version for r in range(saved_size)]
    assert list(progress.per_rank["place"]) == own
    assert state["place"].value == (own[rank] if size == saved_size else own)
    expected["place"] = state["place"]
    assert bits(state) == bits(expected)
    return version


def bits(state: dict[str, Any]) -> Any:
    arrays = [state[name].tobytes() for name in ("b", "count")]
    return [*arrays, state["w"].data.tobytes(), dict(state["sched"]), state["place"].value]


def untouched(state: dict[str, Any], rank: int, size: int) -> bool:
    return bool(bits(state) == bits(make_state(rank, size, UNTOUCHED)))


# -- the newest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", LAYOUTS)
def test_a_branch_from_an_older_step_outranks_what_came_after_it(mode: str) -> None:
    disk = saved(new_disk(), mode, 2, [(1, 1), (2, 2), (3, 3), (12, 12)])

    def branch(comm: Communicator, rank: int) -> None:
        with saves.started(disk, mode, comm, keep_checkpoint_max=9) as run:
            state = make_state(rank, 2)
            assert run.restore(state, step=1).step == 1
            fill(state, rank, 2, 200)
            run.step_end(state, 2)

    run_world(2, branch)
    for size in (1, 3):
        assert attempt(disk, size, mode=mode) == (2, 200, [])
    assert attempt(disk, step=12, mode=mode)[:2] == (12, 12)
    # Going on from the branch: step 3 of the same run is replaced.
    saved(disk, mode, 2, [(3, 300)])
    assert attempt(disk, mode=mode) == (3, 300, [])


@pytest.mark.parametrize("layout", [{}, {"integrated_save": False}])
def test_time_stamps_do_not_count(tmp_path: Path, layout: dict[str, Any]) -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1, **layout)
    w = np.zeros(3)
    with parckpt.ModelCheckpoint("m", tmp_path, config, comm=parckpt.SELF) as run:
        for step in (1, 2, 10):
            w[:] = step
            run.step_end({"w": w}, step)
    for number, step in enumerate((10, 2, 1)):
        for path in [*tmp_path.glob(f"m-1_{step}.*"), *tmp_path.glob(f"m-1_{step}/**/*"), tmp_path]:
            os.utime(path, (10**9 + number, 10**9 + number))
    with parckpt.ModelCheckpoint("m", tmp_path, config, comm=parckpt.SELF) as run:
        assert run.restore({"w": w}).step == 10
    assert w.tolist() == [10.0] * 3


def test_a_step_that_is_not_there_names_those_that_are() -> None:
    disk = two_saves()
    with pytest.raises(CheckpointNotFoundError, match=r"there are steps \[1, 2\]") as caught:
        attempt(disk, 2, step=3)
    assert caught.value.steps == [1, 2]
    assert caught.value.arrays_untouched


def test_min_step_refuses_what_is_older() -> None:
    disk = two_saves()
    assert attempt(disk, min_step=2)[0] == 2
    with pytest.raises(CheckpointNotFoundError, match="step 2 is before min_step=3") as caught:
        attempt(disk, 2, min_step=3)
    assert caught.value.arrays_untouched
    with pytest.raises(CheckpointNotFoundError, match="at or after step 1"):
        attempt(new_disk(), min_step=1)


def test_min_step_never_takes_an_abandoned_line_instead() -> None:
    mode = "deduplicated"
    disk = saved(new_disk(), mode, 2, [(6, 6), (12, 12)])

    def branch(comm: Communicator, rank: int) -> None:
        with saves.started(disk, mode, comm, keep_checkpoint_max=9) as run:
            state = make_state(rank, 2)
            assert run.restore(state, step=6).step == 6
            fill(state, rank, 2, 70)
            run.step_end(state, 7)

    run_world(2, branch)
    assert attempt(disk, min_step=7) == (7, 70, [])
    with pytest.raises(CheckpointNotFoundError, match="step 7 is before min_step=9") as caught:
        attempt(disk, 2, min_step=9)
    assert caught.value.arrays_untouched
    assert marks(disk) == []
    # What is damaged is not the newest valid one.
    disk.corrupt(data_of(disk, 7, 0), 5)
    disk.corrupt(manifest_of(disk, 7), 30)
    assert attempt(disk, 2, min_step=9)[:2] == (12, 12)
    disk.corrupt(manifest_of(disk, 12), 30)
    with pytest.raises(CheckpointNotFoundError, match="step 6 is before min_step=9") as caught:
        attempt(disk, 2, min_step=9)
    assert stem(12) in str(caught.value)


@pytest.mark.parametrize("request_", [{"min_step": 3}, {"step": 1}])
def test_min_step_and_step_hold_for_a_path_too(request_: dict[str, int]) -> None:
    disk = two_saves()
    with pytest.raises(ParckptError, match="step 2") as caught:
        attempt(disk, 2, path=published(disk, 2), **request_)
    assert isinstance(caught.value, (CheckpointNotFoundError, IntegrityError))
    assert caught.value.arrays_untouched
    assert marks(disk) == []
    assert attempt(disk, 2, path=published(disk, 2), min_step=2, step=2)[:2] == (2, 20)


def test_what_is_not_one_step_of_all_ranks_is_taken_only_on_request() -> None:
    disk = two_saves()
    change_facts(disk, 2, consistent=False)
    step, version, skipped = attempt(disk, 2)
    assert (step, version) == (1, 10)
    assert skipped[0][0] == published(disk, 2)
    assert "allow_inconsistent" in skipped[0][1]
    assert attempt(disk, 2, allow_inconsistent=True) == (2, 20, [])
    with pytest.raises(ParckptError, match="allow_inconsistent"):
        attempt(disk, path=published(disk, 2))
    assert attempt(disk, path=published(disk, 2), allow_inconsistent=True)[:2] == (2, 20)
    assert marks(disk) == []


# -- damage -----------------------------------------------------------------------------------------------------------


def flip_data(disk: MemoryFileSystem) -> None:
    path = data_of(disk, 2)
    disk.corrupt(path, disk.stat(path).nbytes // 2, 3)


def cut_data(disk: MemoryFileSystem) -> None:
    path = data_of(disk, 2)
    rewrite(disk, path, content(disk, path)[:-1])


def lengthen_data(disk: MemoryFileSystem) -> None:
    path = data_of(disk, 2)
    rewrite(disk, path, content(disk, path) + b"\0")


def lose_rank_file(disk: MemoryFileSystem) -> None:
    disk.unlink(data_of(disk, 2, 1))


def lose_rank_directory(disk: MemoryFileSystem) -> None:
    remove_tree(disk, f"{DIRECTORY}/{stem(2)}/rank_1")


def flip_columns(disk: MemoryFileSystem) -> None:
    path = manifest_of(disk, 2)
    disk.corrupt(path, disk.stat(path).nbytes - 40)


def flip_facts(disk: MemoryFileSystem) -> None:
    path = manifest_of(disk, 2)
    disk.corrupt(path, content(disk, path).index(b"plan_hash") + 20)


def cut_manifest(disk: MemoryFileSystem) -> None:
    rewrite(disk, manifest_of(disk, 2), content(disk, manifest_of(disk, 2))[:100])


def empty_manifest(disk: MemoryFileSystem) -> None:
    rewrite(disk, manifest_of(disk, 2), b"")


def lose_manifest(disk: MemoryFileSystem) -> None:
    disk.unlink(manifest_of(disk, 2))


# By name: what is done, in which layouts it can be, and whether the checkpoint is known well enough to be marked.
DAMAGES: dict[str, tuple[Callable[[MemoryFileSystem], None], list[str], bool]] = {
    "data flipped": (flip_data, LAYOUTS, True),
    "data cut": (cut_data, LAYOUTS, True),
    "data too long": (lengthen_data, LAYOUTS, True),
    "rank file lost": (lose_rank_file, ["per-rank", "deduplicated"], True),
    "rank directory lost": (lose_rank_directory, ["deduplicated"], True),
    "manifest columns flipped": (flip_columns, LAYOUTS, True),
    "manifest facts flipped": (flip_facts, LAYOUTS, False),
    "manifest cut": (cut_manifest, LAYOUTS, False),
    "manifest empty": (empty_manifest, ["integrated", "deduplicated"], False),
    "manifest lost": (lose_manifest, ["deduplicated"], False),
}
DAMAGED = [pytest.param(mode, name, id=f"{name}-{mode}") for name, (_, modes, _) in DAMAGES.items() for mode in modes]


@pytest.mark.parametrize(("mode", "damage"), DAMAGED)
def test_a_damaged_newest_is_named_set_aside_and_passed_over(mode: str, damage: str) -> None:
    disk = two_saves(mode)
    act, _, is_marked = DAMAGES[damage]
    act(disk)
    path = published(disk, 2)
    for size in (2, 1, 3):
        step, version, skipped = attempt(disk, size, mode=mode)
        assert (step, version) == (1, 10)
        assert [where for where, _ in skipped] == [path]
        assert len(marks(disk)) == is_marked
    assert is_marked == skipped[0][1].startswith("set aside: ")


@pytest.mark.parametrize(("mode", "damage"), DAMAGED)
def test_without_fallback_a_damaged_newest_is_an_error(mode: str, damage: str) -> None:
    disk = two_saves(mode)
    DAMAGES[damage][0](disk)
    with pytest.raises((IntegrityError, FormatError)) as caught:
        attempt(disk, 2, mode=mode, fallback=False)
    assert stem(2) in str(caught.value)
    assert marks(disk) == []


@pytest.mark.parametrize("damage", ["data flipped", "data cut", "manifest columns flipped", "manifest facts flipped"])
@pytest.mark.parametrize("mode", ["integrated", "deduplicated"])
def test_a_path_is_all_or_nothing(mode: str, damage: str) -> None:
    disk = two_saves(mode)
    DAMAGES[damage][0](disk)
    with pytest.raises((IntegrityError, FormatError)) as caught:
        attempt(disk, 2, mode=mode, path=published(disk, 2))
    assert stem(2) in str(caught.value)
    assert marks(disk) == []


def test_nothing_of_what_was_set_aside_is_read_again() -> None:
    disk = two_saves()
    flip_data(disk)
    assert attempt(disk, 2)[0] == 1
    watched = FaultyFileSystem(disk, only=frozenset({"open"}))
    step, _, skipped = attempt(watched, 2)
    assert step == 1
    assert "is damaged" in skipped[0][1]
    assert not [call.path for call in watched.calls if f"{stem(2)}/rank" in call.path]
    with pytest.raises(CheckpointNotFoundError, match="set aside"):
        attempt(disk, step=2)


def test_when_all_are_damaged_each_one_is_named_and_nothing_starts_afresh() -> None:
    disk = saved(new_disk(), "deduplicated", 2, [(1, 10), (2, 20), (3, 30)])
    flip_data(disk)
    lose_rank_file_of(disk, 1)
    rewrite(disk, manifest_of(disk, 3), b"junk")
    for size in (2, 1):  # the second start finds them set aside
        with pytest.raises(IntegrityError) as caught:
            attempt(disk, size)
        for step in (1, 2, 3):
            assert stem(step) in str(caught.value)
        assert sorted(path for path, _ in caught.value.skipped) == [published(disk, step) for step in (1, 2, 3)]


def lose_rank_file_of(disk: MemoryFileSystem, step: int) -> None:
    disk.unlink(data_of(disk, step, 1))


def test_damage_that_a_later_save_has_replaced_is_forgotten() -> None:
    disk = two_saves()
    flip_data(disk)
    saved(disk, "deduplicated", 2, [(2, 21)])
    assert attempt(disk, 2) == (2, 21, [])


class Glitch(MemoryFileSystem):
    """Gives wrong bytes for the first reads of some files; what is stored is fine."""

    def __init__(self) -> None:
        super().__init__()
        self.bad_reads: dict[str, int] = {}
        self.names: dict[int, str] = {}

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        fd = super().open(path, flags, mode)
        self.names[fd] = path
        return fd

    def pread_into(self, fd: int, buffer: bytearray | memoryview, byte_offset: int) -> int:
        count = super().pread_into(fd, buffer, byte_offset)
        path = self.names[fd]
        if count > 16 and self.bad_reads.get(path, 0) > 0:
            self.bad_reads[path] -= 1
            memoryview(buffer).cast("B")[count // 2] ^= 4
        return count


def glitching(mode: str) -> Glitch:
    disk = Glitch()
    disk.mkdir(DIRECTORY)
    saved(disk, mode, 2, [(1, 10), (2, 20)])
    return disk


@pytest.mark.parametrize("mode", ["integrated", "deduplicated"])
@pytest.mark.parametrize("what", [data_of, manifest_of])
def test_a_read_that_is_right_the_second_time_is_no_damage(mode: str, what: Callable[..., str]) -> None:
    disk = glitching(mode)
    path = what(disk, 2)

    def go_bad() -> None:
        disk.bad_reads[path] = 1

    assert attempt(disk, 2, mode=mode, before=go_bad) == (2, 20, [])
    assert disk.bad_reads[path] == 0
    assert marks(disk) == []


def test_two_wrong_reads_are_damage() -> None:
    disk = glitching("deduplicated")

    def go_bad() -> None:
        disk.bad_reads[data_of(disk, 2)] = 2

    step, _, skipped = attempt(disk, 2, before=go_bad)
    assert (step, len(skipped), len(marks(disk))) == (1, 1, 1)


# -- half way ---------------------------------------------------------------------------------------------------------

LARGE = CHUNK_NBYTES // 8 + 1000  # more than a chunk of float64


def large_state(rank: int, size: int, value: float) -> dict[str, Any]:
    """Several chunks, so that some tensors are filled before the damage is met. The last is cut over the ranks."""
    half = np.full((LARGE // size + (rank == 0) * (LARGE % size),), value, "f8")
    offset = 0 if rank == 0 else LARGE // size + LARGE % size + (rank - 1) * (LARGE // size)
    return {
        "first": np.full(LARGE, value, "f8"),
        "second": np.full(LARGE, value, "f8"),
        "third": parckpt.Shard(half, (LARGE,), (offset,)),
    }


def save_large(disk: MemoryFileSystem, size: int, steps: list[int]) -> None:
    def program(comm: Communicator, rank: int) -> None:
        with run_of(disk, comm) as run:
            for step in steps:
                run.step_end(large_state(rank, size, step), step)

    run_world(size, program)


def damage_end(disk: MemoryFileSystem, step: int) -> None:
    path = data_of(disk, step)
    disk.corrupt(path, disk.stat(path).nbytes - 100)


def values_of(state: dict[str, Any]) -> dict[str, set[float]]:
    return {
        name: set(np.unique(leaf if isinstance(leaf, np.ndarray) else leaf.data).tolist())
        for name, leaf in state.items()
    }


@pytest.mark.parametrize("size", [1, 2])
def test_damage_half_way_without_an_older_one_spoils_the_state_until_a_restore_succeeds(size: int) -> None:
    disk = new_disk()
    save_large(disk, size, [1])
    damage_end(disk, 1)
    copy_good = new_disk()
    save_large(copy_good, size, [5])
    good = f"{DIRECTORY}/{stem(5)}.ckpt"
    (manifest,) = [name for name in copy_good.listdir(DIRECTORY) if name.endswith(".manifest")]

    def program(comm: Communicator, rank: int) -> list[str]:
        state = large_state(rank, size, -1.0)
        with run_of(disk, comm) as run:
            with pytest.raises(IntegrityError) as caught:
                run.restore(state)
            touched = caught.value.facts["state_touched"]
            assert "first" in touched
            assert {name for name, found in values_of(state).items() if found != {-1.0}} <= set(touched)
            with pytest.raises(StateMismatchError, match="restore again"):
                run.step_end(state, 1)
            with pytest.raises(CheckpointNotFoundError):
                run.restore(state, path=f"{DIRECTORY}/nothing.ckpt")
            with pytest.raises(StateMismatchError, match="restore again"):  # that changed nothing for the better
                run.step_end(state, 1)
            if rank == 0:
                for path in (f"{DIRECTORY}/{manifest}", good):
                    rewrite(disk, path, content(copy_good, path))
            assert run.restore(state, path=good).step == 5
            assert set().union(*values_of(state).values()) == {5.0}
            run.step_end(state, 6)
        return list(touched)

    lists = run_world(size, program)
    assert all(one == lists[0] for one in lists)
    assert "damaged" in str(attempt_error(disk, size, step=1))


def attempt_error(disk: FileSystem, size: int, **request: Any) -> ParckptError:
    def program(comm: Communicator, rank: int) -> ParckptError:
        with run_of(disk, comm) as run, pytest.raises(ParckptError) as caught:
            run.restore(large_state(rank, size, -1.0), **request)
        return caught.value

    errors = run_world(size, program)
    assert {(type(one), str(one)) for one in errors} == {(type(errors[0]), str(errors[0]))}
    return errors[0]


@pytest.mark.parametrize("size", [1, 2])
def test_atomic_leaves_the_arrays_alone(size: int) -> None:
    disk = new_disk()
    save_large(disk, size, [1])
    damage_end(disk, 1)

    def program(comm: Communicator, rank: int) -> None:
        state = large_state(rank, size, -1.0)
        with run_of(disk, comm) as run:
            with pytest.raises(IntegrityError) as caught:
                run.restore(state, atomic=True)
            assert "state_touched" not in caught.value.facts
            assert set().union(*values_of(state).values()) == {-1.0}
            run.step_end(state, 2)  # the state is as good as it was

    run_world(size, program)


@pytest.mark.parametrize("size", [1, 2])
def test_a_read_error_half_way_says_what_it_has_overwritten(size: int) -> None:
    disk = new_disk()
    save_large(disk, size, [1, 2])
    path = data_of(disk, 2)
    disk.fail_read(path, disk.stat(path).nbytes - 100)

    def program(comm: Communicator, rank: int) -> None:
        state = large_state(rank, size, -1.0)
        with run_of(disk, comm) as run:
            with pytest.raises(StorageError) as caught:
                run.restore(state)
            assert caught.value.errno == errno.EIO
            assert "first" in caught.value.facts["state_touched"]
            with pytest.raises(StateMismatchError, match="restore again"):
                run.step_end(state, 3)
            assert run.restore(state, step=1).step == 1
            assert set().union(*values_of(state).values()) == {1.0}
            run.step_end(state, 2)

    run_world(size, program)
    assert marks(disk) == []


def test_an_older_one_that_does_not_fit_is_told_together_with_what_the_damaged_one_overwrote() -> None:
    disk = new_disk()
    with run_of(disk) as run:
        run.step_end({"other": np.zeros(3)}, 1)
        run.step_end(large_state(0, 1, 2.0), 2)
    damage_end(disk, 2)
    with run_of(disk) as run:
        state = large_state(0, 1, -1.0)
        with pytest.raises(StateMismatchError) as caught:
            run.restore(state)
        assert caught.value.missing == ["first", "second", "third"]
        assert "first" in caught.value.facts["state_touched"]
        assert "nothing was changed" not in str(caught.value)
        with pytest.raises(StateMismatchError, match="restore again"):
            run.step_end(state, 3)


# -- what proves nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("where", ["data", "manifest", "directory", "older"])
@pytest.mark.parametrize("mode", ["integrated", "deduplicated"])
def test_what_the_file_system_refuses_is_raised_and_touches_nothing(mode: str, where: str, code: int) -> None:
    disk = two_saves(mode)
    paths = {
        "data": data_of(disk, 2),
        "manifest": manifest_of(disk, 2),
        "directory": DIRECTORY,
        "older": manifest_of(disk, 1),
    }
    names = disk.listdir(DIRECTORY)
    with pytest.raises(StorageError) as caught:
        attempt(
            disk,
            2,
            mode=mode,
            before=lambda: disk.deny(paths[where], code),
            after=lambda: disk.allow(paths[where]),
        )
    assert caught.value.errno == code
    assert caught.value.arrays_untouched
    assert set(disk.listdir(DIRECTORY)) - set(names) <= {f".{PREFIX}.lock"}
    assert attempt(disk, 2, mode=mode) == (2, 20, [])


def make_newer(disk: MemoryFileSystem, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = manifest_of(disk, step)
    manifest = Manifest.decode(content(disk, path), path)
    with monkeypatch.context() as patch:
        patch.setattr(tablefile, "VERSION", tablefile.VERSION + 1)
        rewrite(disk, path, manifest.encode())


@pytest.mark.parametrize("mode", ["integrated", "deduplicated"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_newer_format_is_not_damage(mode: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = two_saves(mode)
    make_newer(disk, step, monkeypatch)
    for request in ({}, {"path": published(disk, step)}, {"fallback": False}):
        with pytest.raises(UnsupportedVersionError) as caught:
            attempt(disk, 2, mode=mode, **request)
        assert stem(step) in str(caught.value)
        assert caught.value.arrays_untouched
    assert marks(disk) == []
    assert attempt(disk, mode=mode, step=3 - step)[0] == 3 - step  # asked for by number: that one is of our version


def test_a_checkpoint_deleted_while_it_is_read_leads_to_the_next() -> None:
    disk = two_saves()
    once = threading.Lock()

    def delete(call: Call) -> None:
        reading = call.operation == "open" and f"{stem(2)}/rank" in call.path
        if reading and once.acquire(blocking=False):
            trash = f"{DIRECTORY}/.{stem(2)}.trash-0000000000000000"
            disk.rename(f"{DIRECTORY}/{stem(2)}", trash)
            remove_tree(disk, trash)

    step, version, skipped = attempt(FaultyFileSystem(disk, on_call=delete), 2)
    assert (step, version) == (1, 10)
    assert "deleted" in skipped[0][1]
    assert marks(disk) == []


@pytest.mark.parametrize("mode", ["integrated", "deduplicated"])
def test_a_checkpoint_deleted_after_it_was_listed_leads_to_the_next(mode: str) -> None:
    disk = two_saves(mode)
    path, manifest = published(disk, 2), manifest_of(disk, 2)
    opens: list[str] = []

    def delete(call: Call) -> None:
        # The first read of the manifest after the start is the listing's, the second is of what was chosen.
        if opens and call.operation == "open" and call.path == manifest:
            opens.append(call.path)
            if len(opens) == 3:
                for gone in {path, manifest} if mode == "integrated" else {path}:
                    remove_tree(disk, gone)

    watched = FaultyFileSystem(disk, on_call=delete)
    step, version, skipped = attempt(watched, mode=mode, before=lambda: opens.append("start"))
    assert (step, version) == (1, 10)
    assert skipped[0][0] == path
    assert "deleted" in skipped[0][1]
    assert marks(disk) == []


# -- a fresh start ----------------------------------------------------------------------------------------------------


def test_an_empty_directory_is_a_fresh_start() -> None:
    disk = new_disk()
    assert attempt(disk, 2) == (0, UNTOUCHED, [])
    with run_of(disk) as run:
        progress = run.restore(make_state(0, 1))
    assert progress == parckpt.Progress(state=progress.state)
    assert (progress.step, progress.path, progress.world_size, progress.prefix) == (0, None, 0, None)


def test_a_required_checkpoint_that_is_not_there_is_an_error() -> None:
    disk = new_disk()
    with pytest.raises(CheckpointNotFoundError, match="one is required") as caught:
        attempt(disk, 2, required=True)
    assert caught.value.arrays_untouched
    saved(disk, "deduplicated", 2, [(1, 10)])
    assert attempt(disk, 2, required=True)[0] == 1


def test_a_restarted_job_must_find_the_trace_of_its_first_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    disk = new_disk()
    with pytest.raises(CheckpointNotFoundError, match="no trace of the first start") as caught:
        attempt(disk, 2)
    assert caught.value.arrays_untouched
    with pytest.raises(CheckpointNotFoundError, match="no trace"):  # asking does not leave the trace
        attempt(disk, 2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert attempt(disk, 2)[0] == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert attempt(disk, 2)[0] == 0  # it was killed before its first save
    saved(disk, "deduplicated", 2, [(1, 10)])
    assert attempt(disk, 2)[0] == 1


@pytest.mark.parametrize("mode", ["integrated", "deduplicated"])
def test_published_once_and_all_gone_is_not_a_fresh_start(mode: str) -> None:
    disk = two_saves(mode)
    for name in disk.listdir(DIRECTORY):
        if not name.startswith("."):
            remove_tree(disk, posixpath.join(DIRECTORY, name))
    with pytest.raises(CheckpointNotFoundError, match="although some were published"):
        attempt(disk, 2, mode=mode)
    disk.unlink(posixpath.join(DIRECTORY, naming.run_name(PREFIX)))  # as the message says
    assert attempt(disk, 2, mode=mode)[0] == 0


def test_foreign_files_and_other_families_are_not_ours() -> None:
    disk = new_disk()
    for name in ("m-1_5.ckpt", "m-1_5.safetensors", "notes.txt", "m-1_7.ckpt.manifest"):
        rewrite(disk, posixpath.join(DIRECTORY, name), b"not of this program")
    with parckpt.ModelCheckpoint("other", DIRECTORY, comm=parckpt.SELF, filesystem=disk) as run:
        run.save_now({"b": np.zeros(5)}, 3)
    assert attempt(disk, 2) == (0, UNTOUCHED, [])
    assert content(disk, f"{DIRECTORY}/m-1_5.ckpt") == b"not of this program"


# -- by path ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", LAYOUTS)
@pytest.mark.parametrize("size", [1, 3])
def test_a_path_is_taken_even_if_it_is_not_the_newest(mode: str, size: int) -> None:
    disk = two_saves(mode)
    assert attempt(disk, size, mode=mode, path=published(disk, 1)) == (1, 10, [])


@pytest.mark.parametrize("path", ["/ckpts/m-1_9.ckpt", "/ckpts/m-1_9", "/nowhere/at/all.ckpt"])
def test_a_path_with_nothing_is_an_error(path: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint at") as caught:
        attempt(two_saves(), 2, path=path)
    assert caught.value.arrays_untouched


def test_a_checkpoint_of_another_directory_starts_a_run_of_its_own(tmp_path: Path) -> None:
    elsewhere, here = tmp_path / "pretrained", tmp_path / "ckpts"
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1)
    w = np.arange(3.0)
    with parckpt.ModelCheckpoint("base", elsewhere, config, comm=parckpt.SELF) as run:
        run.step_end({"w": w}, 7)
    with parckpt.ModelCheckpoint("tuned", here, config, comm=parckpt.SELF) as run:
        progress = run.restore({"w": w}, path=elsewhere / "base-1_7.ckpt")
        assert (progress.step, progress.prefix) == (7, "base")
        run.step_end({"w": w + 1}, 8)
        assert run.latest_ckpt_file_name == str(here / "tuned-1_8.ckpt")
    ours, theirs = parckpt.list_checkpoints(here), parckpt.list_checkpoints(elsewhere)
    assert [(one.prefix, one.step) for one in ours] == [("tuned", 8)]
    assert [(one.prefix, one.step) for one in theirs] == [("base", 7)]
    found = [one.facts for d in (here, elsewhere) for one in scan(PosixFileSystem(), str(d))]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].run_id != found[1].run_id


def test_a_copied_directory_goes_on_as_the_same_run(tmp_path: Path) -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1, keep_checkpoint_max=1)
    w = np.arange(3.0)
    with parckpt.ModelCheckpoint("m", tmp_path / "a", config, comm=parckpt.SELF) as run:
        run.step_end({"w": w}, 7)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with parckpt.ModelCheckpoint("m", tmp_path / "b", config, comm=parckpt.SELF) as run:
        assert run.restore({"w": w}).step == 7
        run.step_end({"w": w}, 8)
    assert [one.step for one in parckpt.list_checkpoints(tmp_path / "b")] == [8]
    assert [one.step for one in parckpt.list_checkpoints(tmp_path / "a")] == [7]


@pytest.mark.parametrize("size", [1, 2])
def test_a_foreign_file_by_path(size: int, tmp_path: Path) -> None:
    parckpt.save_checkpoint({"w": np.arange(6.0)}, tmp_path / "x.ckpt", append_dict={"epoch_num": 2, "step_num": 9})
    (tmp_path / "alone").mkdir()
    foreign = shutil.copy(tmp_path / "x.ckpt", tmp_path / "alone" / "net-2_9.ckpt")

    def program(comm: Communicator, rank: int) -> None:
        w = np.zeros(6 // size)
        state = {"w": parckpt.Shard(w, (6,), (rank * len(w),))}
        with parckpt.ModelCheckpoint("m", tmp_path / "run", comm=comm) as run:
            progress = run.restore(state, path=foreign)
            assert (progress.step, progress.epoch, progress.prefix, progress.reason) == (9, 2, "net", "foreign")
            assert progress.append_dict == {"epoch_num": 2, "step_num": 9}
            run.save_now(state, 10)
            assert os.path.basename(run.latest_ckpt_file_name) == "m-1_10.ckpt"
        assert w.tolist() == np.arange(6.0)[rank * len(w) :][: len(w)].tolist()

    run_world(size, program)


def test_a_damaged_foreign_file_is_an_error_of_its_own_class(tmp_path: Path) -> None:
    parckpt.save_checkpoint({"w": np.arange(6.0)}, tmp_path / "x.ckpt", crc_check=True)
    (tmp_path / "alone").mkdir()
    foreign = tmp_path / "alone" / "y.ckpt"
    data = bytearray((tmp_path / "x.ckpt").read_bytes())
    data[30] ^= 1
    foreign.write_bytes(data)
    with parckpt.ModelCheckpoint("m", tmp_path / "run", comm=parckpt.SELF) as run:
        with pytest.raises(parckpt.ChecksumError, match=r"y\.ckpt"):
            run.restore({"w": np.zeros(6)}, path=foreign)
        foreign.write_bytes(b"\xff" * 50)
        with pytest.raises(FormatError, match=r"y\.ckpt"):
            run.restore({"w": np.zeros(6)}, path=foreign)


# -- a state that does not fit ----------------------------------------------------------------------------------------


def stages(rank: int, size: int, value: float = 0.0) -> dict[str, Any]:
    """As in a pipeline: each rank has names of its own, beside one that all share."""
    return {f"stage{rank}": {"w": np.full((4, 3), value, "f4")}, "shared": np.full(5, value), "lr": value}


def mismatch(
    states: Callable[[int], dict[str, Any]],
    *,
    first: Callable[[int, int, float], dict[str, Any]] = stages,
    saved_size: int = 2,
    **request: Any,
) -> StateMismatchError:
    """The error of restoring into other states, which must be the same on all ranks and leave the arrays alone."""
    disk = new_disk()

    def save(comm: Communicator, rank: int) -> None:
        with run_of(disk, comm, integrated_save=False) as run:
            run.step_end(first(rank, saved_size, 3.0), 1)

    def load(comm: Communicator, rank: int) -> StateMismatchError:
        state = states(rank)
        before = parckpt.core.state.flatten(state, writable=True)
        copies = [np.copy(p.source) for leaf in before.tensors for p in leaf.pieces if isinstance(p.source, np.ndarray)]
        with run_of(disk, comm) as run, pytest.raises(StateMismatchError) as caught:
            run.restore(state, **request)
        after = [p.source for leaf in before.tensors for p in leaf.pieces if isinstance(p.source, np.ndarray)]
        assert all(np.array_equal(a, b) for a, b in zip(copies, after, strict=True))
        assert "state_touched" not in caught.value.facts
        return caught.value

    run_world(saved_size, save)
    errors = run_world(2, load)
    assert str(errors[0]) == str(errors[1])
    assert marks(disk) == []
    return errors[0]


def test_names_that_only_one_rank_has_are_not_unexpected() -> None:
    disk = new_disk()

    def program(comm: Communicator, rank: int) -> None:
        with run_of(disk, comm, integrated_save=False) as run:
            run.step_end(stages(rank, 2, 3.0), 1)
        state = stages(rank, 2)
        with run_of(disk, comm) as run:
            assert run.restore(state).step == 1
        assert (state[f"stage{rank}"]["w"] == 3.0).all()
        assert state["lr"] == 3.0

    run_world(2, program)


def test_missing_on_one_rank_is_an_error_on_all() -> None:
    error = mismatch(lambda rank: {**stages(rank, 2), **({"new": {"v": np.zeros(2)}} if rank == 1 else {})})
    assert (error.missing, error.unexpected, error.mismatched) == (["new.v"], [], [])
    assert "new.v" in str(error)


def test_what_no_rank_wants_is_unexpected() -> None:
    error = mismatch(lambda rank: {k: v for k, v in stages(rank, 2).items() if k != "stage1"})
    assert (error.missing, error.unexpected, error.mismatched) == ([], ["stage1.w"], [])


@pytest.mark.parametrize(
    ("leaf", "gist"),
    [
        (np.zeros(6), "shape"),
        (np.zeros((5, 1)), "shape"),
        (np.zeros((5,), "f4"), "float32"),
        (parckpt.PerRank(np.zeros(5)), "PerRank in the state"),
        (0.5, "plain value in the state"),
        (parckpt.Shard(np.zeros(2), (7,), (0,)), "shape"),
        (parckpt.Shard(np.zeros(2), (5,), (4,)), "out of range"),
        (parckpt.Shard(np.zeros(2), (5,), (-1,)), "out of range"),
    ],
)
def test_a_leaf_that_is_something_else(leaf: Any, gist: str) -> None:
    for request in ({}, {"strict": False}):
        error = mismatch(lambda rank: {**stages(rank, 2), "shared": leaf}, **request)
        assert (error.missing, error.unexpected) == ([], [])
        assert len(error.mismatched) == 1
        assert error.mismatched[0].startswith("shared")
        assert gist in error.mismatched[0]


@pytest.mark.parametrize(
    ("there", "here", "gist"),
    [
        (0.5, np.zeros(3), "plain value in the checkpoint"),
        (0.5, parckpt.PerRank(0.5), "shared in the checkpoint"),
        (parckpt.PerRank(0.5), 0.5, "PerRank in the checkpoint"),
        (parckpt.PerRank(np.zeros(2)), np.zeros(2), "PerRank in the checkpoint"),
        (parckpt.PerRank(np.zeros(2)), parckpt.PerRank(np.zeros(3)), "shape"),
    ],
)
def test_kinds_that_changed(there: Any, here: Any, gist: str) -> None:
    error = mismatch(lambda rank: {"x": here}, first=lambda rank, size, value: {"x": there})
    assert (error.missing, error.unexpected) == ([], [])
    assert len(error.mismatched) == 1
    assert gist in error.mismatched[0]


def test_not_strict_fills_what_fits() -> None:
    disk = new_disk()

    def program(comm: Communicator, rank: int) -> None:
        with run_of(disk, comm, integrated_save=False) as run:
            run.step_end(stages(rank, 2, 3.0), 1)
        state = {"shared": np.zeros(5), "new": np.full(2, 8.0), "sched": {"gamma": 0.9}}
        with run_of(disk, comm) as run:
            progress = run.restore(state, strict=False)
        assert (state["shared"] == 3.0).all()
        assert (state["new"] == 8.0).all()
        assert state["sched"] == {"gamma": 0.9}
        assert sorted(progress.missing) == ["new", "sched.gamma"]
        assert progress.values == {"lr": 3.0}

    run_world(2, program)


def one_save(state: dict[str, Any]) -> MemoryFileSystem:
    disk = new_disk()
    with run_of(disk) as run:
        run.step_end(state, 1)
    return disk


MODEL = {
    "model": {"a": np.full(2, 1.0), "b": np.full(2, 2.0)},
    "optim": {"a": np.full(2, 3.0)},
    "model2": np.full(2, 4.0),
    "lr": 0.5,
    "note": "x",
}


@pytest.mark.parametrize(
    ("request_", "filled"),
    [
        ({"only": ["model"]}, {"model.a", "model.b"}),
        ({"only": ["model.a", "lr"]}, {"model.a", "lr"}),
        ({"only": ["*.a"]}, {"model.a", "optim.a"}),
        ({"only": ["mod"]}, set()),
        ({"only": []}, set()),
        ({"exclude": ["model"]}, {"optim.a", "model2", "lr", "note"}),
        ({"exclude": ["*2", "optim", "note"]}, {"model.a", "model.b", "lr"}),
        ({"only": ["model", "lr"], "exclude": ["*.b"]}, {"model.a", "lr"}),
    ],
)
def test_only_and_exclude(request_: dict[str, Any], filled: set[str]) -> None:
    disk = one_save(MODEL)
    state: dict[str, Any] = {
        "model": {"a": np.zeros(2), "b": np.zeros(2)},
        "optim": {"a": np.zeros(2)},
        "model2": np.zeros(2),
        "lr": -1.0,
        "note": "-",
    }
    with run_of(disk) as run:
        run.restore(state, **request_)
    found = {
        "model.a": state["model"]["a"][0] == 1,
        "model.b": state["model"]["b"][0] == 2,
        "optim.a": state["optim"]["a"][0] == 3,
        "model2": state["model2"][0] == 4,
        "lr": state["lr"] == 0.5,
        "note": state["note"] == "x",
    }
    assert {name for name, is_filled in found.items() if is_filled} == filled


def test_a_selection_says_nothing_about_the_rest() -> None:
    disk = one_save(MODEL)
    with run_of(disk) as run:
        # Neither what is not selected of the checkpoint, nor what is not selected of the state, is an error.
        run.restore({"model": {"a": np.zeros(2), "b": np.zeros(2)}, "new": np.zeros(9)}, only=["model"])
        with pytest.raises(StateMismatchError) as caught:
            run.restore({"model": {"a": np.zeros(2)}}, only=["model"])
        assert caught.value.unexpected == ["model.b"]


def test_a_selection_without_a_state_allocates_just_that() -> None:
    disk = one_save(MODEL)
    with run_of(disk) as run:
        everything = run.restore().state
        assert set(everything) == {"model.a", "model.b", "optim.a", "model2"}
        assert everything["model.b"].tolist() == [2.0, 2.0]
        found = run.restore(only=["model"]).state
        assert {name: array.tolist() for name, array in found.items()} == {"model.a": [1, 1], "model.b": [2, 2]}
        assert set(run.restore(exclude=["model", "optim"]).state) == {"model2"}
        renamed = run.restore(name_map=lambda name: f"net.{name}", only=["net.model"]).state
        assert set(renamed) == {"net.model.a", "net.model.b"}


@pytest.mark.parametrize(
    "name_map",
    [{"model.a": "net.weight", "lr": "rate"}, lambda name: {"model.a": "net.weight", "lr": "rate"}.get(name, name)],
)
def test_a_name_map_leads_from_the_checkpoint_to_the_state(name_map: Any) -> None:
    disk = one_save(MODEL)
    state: dict[str, Any] = {
        "net": {"weight": np.zeros(2)},
        "model": {"b": np.zeros(2)},
        "optim": {"a": np.zeros(2)},
        "model2": np.zeros(2),
        "rate": 0.0,
    }
    with run_of(disk) as run:
        run.restore(state, name_map=name_map)
        assert state["net"]["weight"].tolist() == [1.0, 1.0]
        assert state["rate"] == 0.5
        with pytest.raises(StateMismatchError) as caught:
            run.restore(state)
    assert caught.value.missing == ["net.weight", "rate"]
    assert caught.value.unexpected == ["model.a"]


@pytest.mark.parametrize("name_map", [{"model.a": "model2"}, {"lr": "note"}, {"lr": "model2"}, lambda name: "same"])
def test_a_name_map_must_not_merge_names(name_map: Any) -> None:
    disk = one_save(MODEL)
    with run_of(disk) as run, pytest.raises(ConfigError, match="name_map"):
        run.restore({"model2": np.zeros(2)}, name_map=name_map, strict=False)


@pytest.mark.parametrize(
    "request_", [{"only": "model"}, {"exclude": [1]}, {"name_map": ["a"]}, {"name_map": lambda name: None}, {"path": 5}]
)
def test_wrong_arguments_on_one_rank_are_an_error_on_all(request_: dict[str, Any]) -> None:
    disk = one_save(MODEL)

    def program(comm: Communicator, rank: int) -> str:
        with run_of(disk, comm) as run, pytest.raises((ConfigError, TypeError)) as caught:
            run.restore({"model": {"a": np.zeros(2)}}, **(request_ if rank == 1 or "path" in request_ else {}))
        return str(caught.value)

    said = run_world(2, program)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("there", "here"),
    [("f8", "f4"), ("f4", "f8"), ("f4", "f2"), ("i4", "i8"), ("i4", "f4"), ("f4", ">f8"), ("?", "i1"), ("i2", "c8")],
)
@pytest.mark.parametrize("atomic", [False, True])
def test_cast_converts(there: str, here: str, atomic: bool) -> None:
    disk = one_save({"w": np.array([[0, 1], [1, 0], [1, 1]], there)})
    w = np.full((3, 2), 7).astype(here)
    with run_of(disk) as run:
        with pytest.raises(StateMismatchError, match="cast=True"):
            run.restore({"w": w})
        run.restore({"w": w}, cast=True, atomic=atomic)
        assert w.tolist() == [[0, 1], [1, 0], [1, 1]]
        assert w.dtype == np.dtype(here)
        spec = run.restore({"w": parckpt.Spec((3, 2), here)}, cast=True, atomic=atomic).state["w"]
        assert spec.tolist() == w.tolist()
        assert spec.dtype == np.dtype(here).newbyteorder("<")


# -- what restore says ------------------------------------------------------------------------------------------------


def test_progress_has_every_fact() -> None:
    disk = new_disk()
    append = [{"epoch_num": 3, "step_num": 40, "tiny": 0.1, "huge": 1e300, "note": "ü", "flag": True, "n": 2**63 + 1}]

    def save(comm: Communicator, rank: int) -> None:
        config = parckpt.CheckpointConfig(save_checkpoint_steps=3, append_info=append, remove_redundancy=True)
        run = parckpt.ModelCheckpoint("net", DIRECTORY, config, comm=comm, steps_per_epoch=4, filesystem=disk)
        with run:
            state = {
                "w": np.arange(4.0),
                "plain": {"big": 2**200, "nan": float("-inf"), "b": b"\xff", "t": (1, None), "l": [0.1, 1e300]},
                "place": parckpt.PerRank(10 * rank),
                "rng": parckpt.PerRank(np.arange(rank + 1) + rank),
            }
            run.step_end(state, 6)

    def load(comm: Communicator, rank: int) -> None:
        run = parckpt.ModelCheckpoint("net", DIRECTORY, comm=comm, filesystem=disk)
        with run:
            progress = run.restore({"w": np.zeros(4)}, exclude=["rng"])
        assert (progress.step, progress.epoch, progress.step_in_epoch) == (6, 2, 2)
        assert progress.path == f"{DIRECTORY}/net-2_2"
        assert progress.prefix == "net"
        assert "steps" in progress.reason
        assert progress.consistent is True
        assert progress.world_size == 3
        assert progress.append_dict == {
            "epoch_num": 5, "step_num": 46, "tiny": 0.1, "huge": 1e300, "note": "ü", "flag": True, "n": 2**63 + 1
        }  # fmt: skip
        assert type(progress.append_dict["flag"]) is bool
        assert progress.values == {
            "plain.big": 2**200, "plain.nan": float("-inf"), "plain.b": b"\xff", "plain.t": (1, None),
            "plain.l": [0.1, 1e300],
        }  # fmt: skip
        assert set(progress.per_rank) == {"place", "rng"}
        assert list(progress.per_rank["place"]) == [0, 10, 20]
        rng = progress.per_rank["rng"]
        assert len(rng) == 3
        assert [one.tolist() for one in rng] == [[0], [1, 2], [2, 3, 4]]
        assert rng[-1].tolist() == [2, 3, 4]
        assert [one.tolist() for one in rng[1:]] == [[1, 2], [2, 3, 4]]
        with pytest.raises(IndexError):
            rng[3]
        assert progress.missing == []
        assert progress.skipped == []

    run_world(3, save)
    run_world(2, load)


def test_arrays_of_other_ranks_are_read_when_asked_for_and_verified() -> None:
    disk = new_disk()

    def save(comm: Communicator, rank: int) -> None:
        with run_of(disk, comm, remove_redundancy=True) as run:
            run.step_end({"rng": parckpt.PerRank(np.arange(50) + rank)}, 1)

    run_world(2, save)
    watched = FaultyFileSystem(disk, only=frozenset({"open"}))
    with run_of(watched) as run:
        progress = run.restore({}, exclude=["rng"])
        assert not [call for call in watched.calls if call.path.endswith(".ckpt")]
        assert progress.per_rank["rng"][1].tolist() == (np.arange(50) + 1).tolist()
        disk.corrupt(data_of(disk, 1, 0), disk.stat(data_of(disk, 1, 0)).nbytes - 10)
        with pytest.raises(parckpt.ChecksumError):
            progress.per_rank["rng"][0]


def test_values_come_back_into_what_held_them() -> None:
    disk = one_save(
        {"a": {"list": [1, 2.5], "dict": {"deep": {"x": 1}}, "n": 5}, "rows": [{"k": 1}, {"k": 2}], "w": np.ones(1)}
    )
    kept_list: list[Any] = []
    state: dict[str, Any] = {
        "a": {"list": kept_list, "dict": {"deep": {"x": 0}}, "n": 0},
        "rows": [{"k": 0}, {"k": 0}],
        "w": np.zeros(1),
    }
    deep, rows = state["a"]["dict"]["deep"], state["rows"]
    with run_of(disk) as run:
        progress = run.restore(state)
    assert kept_list == [1, 2.5]
    assert state["a"]["list"] is kept_list
    assert state["a"]["dict"]["deep"] is deep
    assert deep == {"x": 1}
    assert state["rows"] is rows
    assert rows == [{"k": 1}, {"k": 2}]
    assert state["a"]["n"] == 5
    assert progress.state["a"] == {"list": [1, 2.5], "dict": {"deep": {"x": 1}}, "n": 5}


def test_user_code_that_raises_is_the_same_error_on_all_ranks_and_spoils_the_state() -> None:
    disk = saved(new_disk(), "deduplicated", 2, [(1, 10)])

    def resize(values: list[Any], rank: int, size: int) -> Any:
        if rank == 1:
            raise ValueError("no idea")
        return values[0]

    def program(comm: Communicator, rank: int) -> tuple[str, bool]:
        state = make_state(rank, 3, UNTOUCHED)
        state["place"] = parckpt.PerRank(0, on_resize=resize)
        with saves.started(disk, "deduplicated", comm) as run:
            with pytest.raises(ValueError, match="no idea") as caught:
                run.restore(state)
            with pytest.raises(StateMismatchError, match="restore again"):
                run.step_end(state, 2)
            said = str(caught.value)
            with pytest.raises(ValueError, match="no idea"):
                run.restore(state, atomic=True)
        return said, True

    said = run_world(3, program)
    assert len(set(said)) == 1


def test_atomic_also_holds_when_user_code_raises() -> None:
    disk = saved(new_disk(), "deduplicated", 2, [(1, 10)])

    def resize(values: list[Any], rank: int, size: int) -> Any:
        if rank == 1:
            raise ValueError("no idea")
        return values[0]

    def program(comm: Communicator, rank: int) -> None:
        state = make_state(rank, 3, UNTOUCHED)
        state["place"] = parckpt.PerRank(make_state(rank, 3, UNTOUCHED)["place"].value, on_resize=resize)
        with saves.started(disk, "deduplicated", comm) as run:
            with pytest.raises(ValueError, match="no idea") as caught:
                run.restore(state, atomic=True)
            assert "state_touched" not in getattr(caught.value, "facts", {})
            assert untouched(state, rank, 3)
            run.step_end(state, 2)

    run_world(3, program)
