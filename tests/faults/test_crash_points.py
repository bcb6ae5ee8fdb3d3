"""The machine dies after every file system call of a save: what was published is there, whole, and the debris goes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from parckpt.testing.crashes import CHANGES, LIMIT, NEW, OLD, Crash, crash_everywhere, disks
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem, SimulatedCrash
from parckpt.testing.saves import DIRECTORY, abandon, make_state, new_disk, restore, saved, started, unexpected


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "flagless"])
@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_first_save_ever(mode: str, flags: bool) -> None:
    def make() -> Crash:
        return Crash(mode, MemoryFileSystem(rename_flags=flags), step=1, from_the_start=True)

    assert crash_everywhere(make, (0, -1), finalizes=True) > 90


@pytest.mark.parametrize("mode", ["integrated-safetensors", "deduplicated"])
def test_second_save(mode: str) -> None:
    base = saved(new_disk(), mode, 1, [(1, OLD)])
    assert crash_everywhere(lambda: Crash(mode, base.crash(keep="all")), finalizes=True) > 50


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "flagless"])
@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_replacing_what_the_same_attempt_saved(mode: str, flags: bool) -> None:
    base = new_disk(rename_flags=flags)
    make = lambda: Crash(mode, base.crash(keep="all"), step=1, again=True)  # noqa: E731
    assert crash_everywhere(make, finalizes=True) > 50


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "flagless"])
@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_replacing_what_an_earlier_attempt_saved(mode: str, flags: bool) -> None:
    base = saved(new_disk(rename_flags=flags), mode, 1, [(1, OLD)])
    assert crash_everywhere(lambda: Crash(mode, base.crash(keep="all"), step=1), finalizes=False) > 50


@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_deleting_the_only_other_one(mode: str) -> None:
    base = saved(new_disk(), mode, 1, [(1, OLD)])
    make = lambda: Crash(mode, base.crash(keep="all"), options={"keep_checkpoint_max": 1})  # noqa: E731
    assert crash_everywhere(make, finalizes=True) > 60


@pytest.mark.parametrize(("mode", "rank", "step"), [("integrated", 0, 2), ("per-rank", 0, 1), ("per-rank", 1, 2)])
def test_one_of_two_ranks_dies(mode: str, rank: int, step: int) -> None:
    base = saved(new_disk(rename_flags=step == 2), mode, 2, [(1, OLD)])
    make = lambda: Crash(mode, base.crash(keep="all"), step=step, size=2, rank=rank)  # noqa: E731
    assert crash_everywhere(make, finalizes=False) > (50 if rank == 0 else 15)


def dead_after(
    mode: str, operation: str, path_end: str, count: int = 1, *, step: int, **options: Any
) -> MemoryFileSystem:
    """A disk on which the same attempt saved OLD, and died in a save after such a call."""
    rehearsal = Crash(mode, new_disk(**options), step=step, again=True)
    rehearsal.run(LIMIT)
    found = [c.number for c in rehearsal.system.calls if c.operation == operation and c.path.endswith(path_end)]
    first = rehearsal.first_call
    crash = Crash(mode, new_disk(**options), step=step, again=True)
    crash.run([number - first for number in found if number > first][count - 1])
    last = crash.system.calls[-1]
    assert last.operation == operation
    assert last.path.endswith(path_end)
    return crash.disk


UNFINISHED: dict[str, Callable[[], tuple[str, MemoryFileSystem, set[tuple[int, int]]]]] = {
    "an incomplete save": lambda: ("per-rank", dead_after("per-rank", "pwrite", "m-1_2.ckpt", step=2), {(1, OLD)}),
    "a complete directory": lambda: (
        "per-rank",
        dead_after("per-rank", "sync_directory", "/rank_0", step=2),
        {(2, NEW)},
    ),
    "a complete file": lambda: (
        "integrated",
        dead_after("integrated", "sync_directory", "/rank_0", step=2),
        {(2, NEW)},
    ),
    "a file whose manifest is in place": lambda: (
        "integrated",
        dead_after("integrated", "rename_noreplace", "/manifest", step=2),
        {(2, NEW)},
    ),
    "a file linked to its name": lambda: (
        "integrated",
        dead_after("integrated", "link", "/m-1_2.ckpt", step=2, rename_flags=False),
        {(2, NEW)},
    ),
    "a replaced file": lambda: (
        "integrated",
        dead_after("integrated", "sync_directory", "/rank_0", step=1),
        {(1, NEW)},
    ),
    "two manifests": lambda: (
        "integrated",
        dead_after("integrated", "rename_noreplace", "/manifest", step=1),
        {(1, NEW)},
    ),
    "an old directory at its reserved name": lambda: (
        "per-rank",
        dead_after("per-rank", "rename", "/m-1_1", step=1, rename_flags=False),
        {(1, NEW)},
    ),
    "an exchanged directory": lambda: ("per-rank", dead_after("per-rank", "exchange", "", step=1), {(1, NEW)}),
    "half a deletion": lambda: ("per-rank", dead_after("per-rank", "rename", "", 2, step=1), {(1, NEW)}),
}


@pytest.mark.parametrize("what", UNFINISHED)
def test_dying_again_while_the_next_start_mends_it(what: str) -> None:
    mode, dead, allowed = UNFINISHED[what]()
    base = dead.crash(keep="all")
    base.sync_all()
    assert unexpected(base) != []
    for n in itertools.count(0):
        assert n < LIMIT
        disk = base.crash(keep="all")
        system = FaultyFileSystem(disk, crash_at=n, only=CHANGES)
        ended = False
        try:
            restore(system, mode, 1)  # type: ignore[arg-type]
            ended = True
        except SimulatedCrash:
            pass
        for how, found in disks(disk, n):
            step, version, skipped = restore(found, mode, 1)
            assert (step, version) in allowed, f"after call {n} of mending, {system.failed}, kept {how}"
            assert skipped == []
            assert unexpected(found) == []
        if ended:
            assert n > 12
            return


@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_setting_aside(mode: str) -> None:
    base = saved(new_disk(), mode, 1, [(1, OLD), (2, NEW)])
    data = f"{DIRECTORY}/m-1_2.ckpt" if mode == "integrated" else f"{DIRECTORY}/m-1_2/rank_0/m-1_2.ckpt"
    base.corrupt(data, 40)
    for n in itertools.count(0):
        assert n < LIMIT
        disk = base.crash(keep="all")
        system = FaultyFileSystem(disk, crash_at=n, only=CHANGES)
        run = None
        ended = False
        try:
            with started(system, mode) as run:
                run.restore(make_state(0, 1))
            ended = True
        except SimulatedCrash:
            if run is not None:
                abandon(run)
        for _, found in disks(disk, n):
            step, version, skipped = restore(found, mode, 1)
            assert (step, version) == (1, OLD)
            assert len(skipped) == 1
            assert skipped[0][0].startswith(f"{DIRECTORY}/m-1_2")
            marks = [name for name in found.listdir(DIRECTORY) if ".bad-" in name]
            assert len(marks) == 1
            assert unexpected(found) == marks
        if ended:
            assert n > 12
            return
