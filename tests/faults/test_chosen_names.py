"""Names of the program's own choice survive what names of a prefix do: every death, every next start."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

import parckpt
from parckpt import SELF
from parckpt.storage.atomic import write_file
from parckpt.storage.filesystem import try_stat
from parckpt.storage.lock import break_lock
from parckpt.testing.crashes import CHANGES, LIMIT, Crash, crash_everywhere
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem, SimulatedCrash
from parckpt.testing.saves import (
    DIRECTORY,
    NAMED,
    abandon,
    check,
    config,
    fill,
    make_state,
    new_disk,
    restore,
    saved,
    unexpected,
    unpublished,
)

OLD, NEW = 1, 2
TOKEN = "0123456789abcdef"


def complete(mode: str, size: int = 2) -> tuple[MemoryFileSystem, str]:
    """A disk with step 1 published, and a save of step 2 that only lacks its publish."""
    disk = saved(new_disk(), mode, size, [(1, OLD)])
    return disk, unpublished(disk, mode, size, 2, lambda rank, size: make_state(rank, size, NEW))


@pytest.mark.parametrize(("mode", "flags"), [("latest", True), ("latest-per-rank", True), ("latest-per-rank", False)])
def test_dying_while_the_same_name_is_used_again(mode: str, flags: bool) -> None:
    base = saved(new_disk(rename_flags=flags), mode, 1, [(1, OLD)])
    assert crash_everywhere(lambda: Crash(mode, base.crash(keep="all")), finalizes=True, stride=3) > 50


@pytest.mark.parametrize("mode", ["named", "named-per-rank"])
def test_dying_while_a_new_name_takes_the_place_of_a_deleted_one(mode: str) -> None:
    base = saved(new_disk(), mode, 1, [(1, OLD)])
    make = lambda: Crash(mode, base.crash(keep="all"), options={"keep_checkpoint_max": 1})  # noqa: E731
    assert crash_everywhere(make, finalizes=True, stride=3) > 60


@pytest.mark.parametrize("mode", NAMED)
def test_a_complete_save_is_published(mode: str) -> None:
    disk, staging = complete(mode)
    disk = disk.crash(keep="none")
    assert restore(disk, mode, 2) == (2, NEW, [])
    assert unexpected(disk) == []
    assert try_stat(disk, staging) is None


@pytest.mark.parametrize(("mode", "later"), [("latest", "integrated"), ("named-per-rank", "per-rank")])
def test_a_start_with_a_prefix_of_that_name_publishes_it_too(mode: str, later: str) -> None:
    disk, staging = complete(mode)
    assert restore(disk, later, 2) == (2, NEW, [])
    assert try_stat(disk, staging) is None


@pytest.mark.parametrize("mode", ["latest", "named-per-rank"])
def test_an_incomplete_one_is_swept(mode: str) -> None:
    disk, staging = complete(mode)
    disk.unlink(f"{staging}/rank_0/record")
    assert restore(disk, mode, 2) == (1, OLD, [])
    assert unexpected(disk) == []


def test_others_in_the_directory_leave_it_alone() -> None:
    disk, staging = complete("named-per-rank")
    with parckpt.ModelCheckpoint("other", DIRECTORY, comm=SELF, filesystem=disk):
        pass
    with parckpt.ModelCheckpoint(lambda p: "at 2", DIRECTORY, comm=SELF, filesystem=disk, family="other"):
        pass
    parckpt.save_checkpoint(make_state(0, 1, OLD), f"{DIRECTORY}/at 2.ckpt", filesystem=disk, comm=SELF)
    assert try_stat(disk, f"{staging}/plan") is not None
    assert restore(disk, "named-per-rank", 2) == (2, NEW, [])


def test_what_is_under_way_elsewhere_is_left_although_it_does_not_say_whose_it_is() -> None:
    disk = saved(new_disk(), "named", 1, [(1, OLD)])
    with parckpt.ModelCheckpoint("other", DIRECTORY, comm=SELF, filesystem=disk):
        for kind in ("staging", "trash"):
            disk.mkdir(f"{DIRECTORY}/.best.{kind}-{TOKEN}")  # a save that has not written its plan yet
        write_file(disk, f"{DIRECTORY}/.at 1.bad-{TOKEN}", b"of a checkpoint that is gone")
        there = sorted(name for name in disk.listdir(DIRECTORY) if name.startswith((".best", ".at 1")))
        assert restore(disk, "named", 1) == (1, OLD, [])
        assert sorted(name for name in disk.listdir(DIRECTORY) if name.startswith((".best", ".at 1"))) == there
    assert restore(disk, "named", 1) == (1, OLD, [])
    assert unexpected(disk) == []


def test_a_directory_entered_by_a_dead_run_is_finished_by_the_next_start() -> None:
    disk = new_disk()
    where = lambda p: f"{DIRECTORY}/{'even' if p.cur_step_num and p.cur_step_num % 2 == 0 else 'odd'}"  # noqa: E731

    def start() -> parckpt.ModelCheckpoint:
        return parckpt.ModelCheckpoint("m", where, comm=SELF, filesystem=disk)

    with start() as run:
        for step in (1, 2):
            run.step_end(make_state(0, 1, step), step)
    left = f"{DIRECTORY}/even/.m-1_2.trash-{TOKEN}"
    disk.mkdir(left)
    write_file(disk, f"{left}/x", b"x")
    with start() as run:
        state = make_state(0, 1, 0)
        assert run.restore(state).step == 2
    assert try_stat(disk, left) is None


@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_dying_while_another_directory_is_entered(mode: str) -> None:
    where = lambda p: f"{DIRECTORY}/{'even' if p.cur_step_num == 2 else 'odd'}"  # noqa: E731

    def go(fs: Any, first: int, last: int) -> int:
        """A run from step to step; the step it found."""
        for place in ("even", "odd"):
            if try_stat(fs, f"{DIRECTORY}/{place}") is not None:
                break_lock(fs, f"{DIRECTORY}/{place}", "m")  # of a run of this same process, that died
        run = parckpt.ModelCheckpoint("m", where, config(mode), comm=SELF, filesystem=fs)
        try:
            state = make_state(0, 1, -1)
            progress = run.restore(state)
            assert progress.step == 0 or check(state, 1, progress) == progress.step
            for step in range(first, last + 1):
                fill(state, 0, 1, step)
                run.step_end(state, step)
            run.close()
            return progress.step
        except SimulatedCrash:
            abandon(run)
            raise

    base = new_disk()
    go(base, 1, 1)
    base.sync_all()
    for n in range(1, LIMIT, 3):
        disk = base.crash(keep="all")
        system = FaultyFileSystem(disk, crash_at=n, only=CHANGES)
        returned = False
        with suppress(SimulatedCrash):
            go(system, 2, 2)
            returned = True
        for how in ("all", "none"):
            found = disk.crash(keep=how)  # type: ignore[arg-type]
            assert go(found, 3, 2) in ((2,) if returned else (1, 2)), f"after call {n}, {system.failed}, kept {how}"
            left = [name for place in found.listdir(DIRECTORY) for name in found.listdir(f"{DIRECTORY}/{place}")]
            assert [name for name in left if name.startswith(".") and name != ".m.run"] == []
        if returned:
            assert n > 40
            return
