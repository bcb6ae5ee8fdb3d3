"""Rewriting and copying in which call after call fails, or is the last: all of the new checkpoint is there, or nothing.

And what it is made from is never touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import suppress

import pytest

from parckpt import SELF, ModelCheckpoint
from parckpt.comm.memory import Exchange, MemoryCommunicator
from parckpt.comm.wait import Waiter
from parckpt.core import recut
from parckpt.core.layout import whole
from parckpt.core.naming import parse_hidden
from parckpt.engine.catalog import find_at
from parckpt.engine.copying import copy_checkpoint, open_original
from parckpt.engine.foreign import load_all
from parckpt.engine.group import Group
from parckpt.engine.recast import Target, rewrite
from parckpt.engine.rewrite import OutputSpec, Piece, write_files
from parckpt.engine.source import Source, open_source
from parckpt.engine.staging import Modes
from parckpt.engine.verify import verify_checkpoint
from parckpt.errors import ParckptError
from parckpt.formats.registry import FORMATS
from parckpt.storage.atomic import read_file
from parckpt.storage.filesystem import FileSystem, try_stat
from parckpt.storage.lock import break_lock, find_locks
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem, SimulatedCrash
from parckpt.testing.saves import DIRECTORY, PREFIX, new_disk, saved

NEW, STEM = "/new", f"{PREFIX}-1_3"
LIMIT = 500

# Reads cannot change anything; that their failures are reported, every other test of reading shows.
CHANGES = frozenset(
    {
        *("open", "close", "chmod_open", "allocate", "pwrite", "fsync", "truncate", "mkdir", "rmdir", "link"),
        *("unlink", "rename", "rename_noreplace", "exchange", "sync_directory"),
    }
)


def alone() -> Group:
    return Group(MemoryCommunicator(Exchange(1), 0), Waiter(30.0))


def opened(fs: FileSystem, name: str) -> Source:
    return open_source(fs, f"{DIRECTORY}/{name}")


def merge(fs: FileSystem) -> None:
    rewrite(alone(), opened(fs, STEM), Target(NEW, STEM, FORMATS["safetensors"], crc_check=True))


def split(fs: FileSystem) -> None:
    source = opened(fs, STEM)
    rewrite(alone(), source, Target(NEW, STEM, FORMATS["ckpt"], recut.even(source.contents, 2)))


def copy_directory(fs: FileSystem) -> None:
    copy_checkpoint(alone(), open_original(fs, f"{DIRECTORY}/{STEM}"), NEW, modes=Modes())


def copy_file(fs: FileSystem) -> None:
    copy_checkpoint(alone(), open_original(fs, f"/other/{STEM}.ckpt"), NEW, modes=Modes())


def copy_foreign(fs: FileSystem) -> None:
    copy_checkpoint(alone(), open_original(fs, "/bare/rank_0/x.ckpt"), NEW, modes=Modes())


ACTS: dict[str, tuple[Callable[[FileSystem], None], str]] = {
    "merge": (merge, f"{STEM}.safetensors"),
    "split": (split, STEM),
    "copy a directory": (copy_directory, STEM),
    "copy a file": (copy_file, f"{STEM}.ckpt"),
    "copy a foreign file": (copy_foreign, "x.ckpt"),
}


def make_disk(**options: bool) -> MemoryFileSystem:
    disk = saved(new_disk(**options), "per-rank", 1, [(3, 7)])
    source = opened(disk, STEM)
    rewrite(alone(), source, Target("/other", STEM, FORMATS["ckpt"]))
    pieces = tuple(Piece(t.name, row, whole(t.global_shape)) for row, t in enumerate(source.contents.tensors))
    spec = OutputSpec("/bare/rank_0/x.ckpt", pieces, crc_check=True)
    write_files(alone(), disk, source.manifest, source.root, [spec], FORMATS["ckpt"], modes=Modes())
    disk.mkdir(NEW)
    disk.sync_all()
    return disk


def tree(disk: MemoryFileSystem, path: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in disk.listdir(path):
        inner = f"{path}/{name}"
        found.update(tree(disk, inner) if disk.stat(inner).is_dir else {inner: read_file(disk, inner, 1 << 20)})
    return found


def start(disk: MemoryFileSystem) -> None:
    """A run of the family starts where the new checkpoint is to be, and ends."""
    ModelCheckpoint(PREFIX, NEW, comm=SELF, filesystem=disk).close()


def hidden(disk: MemoryFileSystem) -> list[str]:
    return [entry for entry in disk.listdir(NEW) if parse_hidden(entry) is not None]


def originals(disk: MemoryFileSystem) -> Mapping[str, bytes]:
    return {**tree(disk, DIRECTORY), **tree(disk, "/other"), **tree(disk, "/bare")}


def is_there(disk: MemoryFileSystem, name: str) -> bool:
    """Whether the new checkpoint is there; then all of it must be."""
    path = f"{NEW}/{name}"
    if try_stat(disk, path) is None:
        return False
    found = find_at(disk, path)
    if found is None:
        assert name == "x.ckpt"
        assert load_all(disk, path, None, lambda one: True).keys() == {"w", "b", "count", "none"}
        return True
    assert verify_checkpoint(disk, found).verdict == "sound"
    return True


def old_ones(disk: MemoryFileSystem) -> list[str]:
    """Step directories that have given way to one that is not there yet: still valid."""
    found = [find_at(disk, f"{NEW}/{entry}") for entry in disk.listdir(NEW) if ".replaced-" in entry]
    return [one.path for one in found if one is not None and verify_checkpoint(disk, one).verdict == "sound"]


@pytest.mark.parametrize("flags", [True, False], ids=["flags", "flagless"])
def test_what_is_replaced_is_there_until_the_new_one_is(flags: bool) -> None:
    base = make_disk(rename_flags=flags)
    split(base)
    base.sync_all()
    gave_way = 0
    for n in itertools.count(1):
        assert n < LIMIT
        disk = base.crash(keep="all")
        system = FaultyFileSystem(disk, crash_at=n, only=CHANGES - {"open", "close", "allocate"})
        ended = False
        try:
            split(system)
            ended = True
        except SimulatedCrash:
            pass
        for left in (disk.crash(keep="all"), disk.crash(n)):
            assert is_there(left, STEM) or old_ones(left), f"after call {n}, {system.failed}"
        if not is_there(disk, STEM):
            gave_way += 1
            for lock in find_locks(disk, NEW):
                break_lock(disk, NEW, lock)
            split(disk)
            assert is_there(disk, STEM)
            assert [entry for entry in disk.listdir(NEW) if entry.startswith(".") and ".lock." not in entry] == []
        if ended:
            assert (gave_way > 0) == (not flags)
            return


@pytest.mark.parametrize("act", ACTS)
def test_any_call_fails(act: str) -> None:
    run, name = ACTS[act]
    base = make_disk()
    before = originals(base)
    for n in itertools.count(1):
        assert n < LIMIT
        disk = base.crash(keep="all")
        system = FaultyFileSystem(disk, fail_at=n, only=CHANGES)
        failed = False
        try:
            run(system)
        except ParckptError:
            failed = True
        assert is_there(disk, name) or failed, f"call {n}, {system.failed}"
        assert originals(disk) == before
        assert disk.nopen == 0
        if system.failed is None:
            assert n > 20
            assert not failed
            return
        if n % 3:
            continue
        # With the fault gone it works, and nothing is left of the failed attempt.
        for lock in find_locks(disk, NEW):
            break_lock(disk, NEW, lock)
        if name == "x.ckpt" and is_there(disk, name):
            continue  # what has no manifest is never replaced
        run(disk)
        assert is_there(disk, name)
        left = [entry for entry in disk.listdir(NEW) if entry.startswith(".") and ".lock." not in entry]
        assert left == [], f"call {n}, {system.failed}"


@pytest.mark.parametrize(
    ("act", "flags"), [*((act, True) for act in ACTS), *((act, False) for act in ("merge", "split", "copy a file"))]
)
def test_dead_after_any_call(act: str, flags: bool) -> None:
    run, name = ACTS[act]
    base = make_disk(rename_flags=flags)
    before = originals(base)
    for n in itertools.count(1):
        assert n < LIMIT
        disk = base.crash(keep="all")
        system = FaultyFileSystem(disk, crash_at=n, only=CHANGES - {"open", "close", "allocate"})
        returned = False
        try:
            run(system)
            returned = True
        except SimulatedCrash:
            pass
        for left in (disk.crash(keep="all"), disk.crash(keep="none") if n % 2 else disk.crash(n)):
            assert is_there(left, name) or not returned, f"after call {n}, {system.failed}"
            assert originals(left) == before
        if returned:
            assert n > 15
            return


@pytest.mark.parametrize("again", [False, True], ids=["new", "replaces"])
@pytest.mark.parametrize("act", ["merge", "split", "copy a directory", "copy a file"])
def test_a_run_that_starts_meanwhile_leaves_it_alone(act: str, again: bool) -> None:
    run, name = ACTS[act]
    base = make_disk(rename_flags=False)
    if again:
        run(base)
    for n in itertools.count(1):
        assert n < LIMIT
        disk = base.crash(keep="all")
        system = FaultyFileSystem(
            disk,
            only=CHANGES - {"open", "close", "allocate", "pwrite"},
            on_call=lambda call, n=n, disk=disk: start(disk) if call.number == n else None,
        )
        run(system)
        assert is_there(disk, name), f"start before call {n}"
        assert hidden(disk) == []
        assert [entry for entry in disk.listdir(NEW) if entry.endswith(".manifest")] == [
            f"{STEM}.{found.token}.manifest" for found in [find_at(disk, f"{NEW}/{name}")] if not found.is_directory
        ]
        if system.count < n:
            assert n > 15
            return


@pytest.mark.parametrize("act", ["merge", "split", "copy a directory"])
def test_a_start_removes_what_a_dead_one_left_and_nothing_of_a_living_one(act: str) -> None:
    run, name = ACTS[act]
    base = make_disk(rename_flags=False)
    swept = 0
    for n in itertools.count(1):
        assert n < LIMIT
        disk = base.crash(keep="all")
        system = FaultyFileSystem(disk, crash_at=n, only=CHANGES - {"open", "close", "allocate", "pwrite"})
        with suppress(SimulatedCrash):
            run(system)
        before, is_held = hidden(disk), find_locks(disk, NEW) != []
        start(disk)  # the holder is this very process, and alive
        assert hidden(disk) == (before if is_held else [])
        for lock in find_locks(disk, NEW):
            break_lock(disk, NEW, lock)
        start(disk)
        assert hidden(disk) == []
        assert find_locks(disk, NEW) == []
        assert all(is_there(disk, entry) for entry in disk.listdir(NEW) if entry == name)
        swept += bool(before)
        if system.failed is None:
            assert swept > 5
            return


def test_files_without_a_manifest_are_whole_or_not_there() -> None:
    base = make_disk()
    source = opened(base, STEM)
    pieces = tuple(Piece(t.name, row, whole(t.global_shape)) for row, t in enumerate(source.contents.tensors))
    outputs = [OutputSpec(f"{NEW}/deep/rank_{k}/x.ckpt", pieces, crc_check=True) for k in range(2)]
    paths = [spec.path for spec in outputs]
    before = originals(base)
    for n in itertools.count(1):
        assert n < LIMIT
        disk = base.crash(keep="all")
        kind = {"fail_at": n} if n % 2 else {"crash_at": n}
        system = FaultyFileSystem(disk, only=CHANGES, **kind)
        ended = False
        try:
            own = Source(system, source.path, source.root, source.manifest, source.manifest_path)
            write_files(alone(), system, own.manifest, own.root, outputs, FORMATS["ckpt"], modes=Modes())
            ended = True
        except (ParckptError, SimulatedCrash):
            pass
        for left in (disk, disk.crash(n)):
            there = [path for path in paths if try_stat(left, path) is not None]
            assert there == paths or not ended
            for path in there:
                assert load_all(left, path, None, lambda one: True).keys() == {"w", "b", "count", "none"}
            assert originals(left) == before
        if n % 2:
            assert [path for path in tree(disk, NEW) if ".temp-" in path] == [] or system.failed is not None
        if ended and system.failed is None:
            assert n > 30
            return
