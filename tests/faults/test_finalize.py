"""When a start publishes what an earlier one had completed, and when it must not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.core import tablefile
from parckpt.core.manifest import Facts, Plan, Record
from parckpt.engine.catalog import find_at, read_facts, scan
from parckpt.engine.staging import Modes
from parckpt.engine.sweep import finalize
from parckpt.errors import LockedError, StorageError
from parckpt.storage.atomic import read_file, write_file
from parckpt.storage.filesystem import try_stat
from parckpt.testing.filesystem import MemoryFileSystem
from parckpt.testing.saves import (
    DIRECTORY,
    MODES,
    make_state,
    new_disk,
    restore,
    saved,
    started,
    unexpected,
    unpublished,
)

OLD, NEW = 1, 2
LIMIT = 1 << 30


def complete(mode: str = "per-rank", size: int = 2, step: int = 2) -> tuple[MemoryFileSystem, str]:
    """A disk with step 1 published, and a save of version NEW that only lacks its publish."""
    disk = saved(new_disk(), mode, size, [(1, OLD)])
    return disk, unpublished(disk, mode, size, step, lambda rank, size: make_state(rank, size, NEW))


def rewrite(disk: MemoryFileSystem, path: str, data: bytes) -> None:
    disk.unlink(path)
    write_file(disk, path, data)
    disk.sync_all()


def change_plan(disk: MemoryFileSystem, staging: str, **facts: Any) -> None:
    path = f"{staging}/plan"
    plan = Plan.decode(read_file(disk, path, LIMIT), path)
    rewrite(disk, path, replace(plan, facts=replace(plan.facts, **facts)).encode())


def change_record(disk: MemoryFileSystem, staging: str, which: int, /, **facts: Any) -> None:
    path = f"{staging}/rank_{which}/record"
    rewrite(disk, path, replace(Record.decode(read_file(disk, path, LIMIT), path), **facts).encode())


def assert_published(disk: MemoryFileSystem, mode: str, size: int = 2, step: int = 2) -> None:
    assert restore(disk, mode, size) == (step, NEW, [])
    assert unexpected(disk) == []


def assert_swept(disk: MemoryFileSystem, staging: str, mode: str = "per-rank", size: int = 2) -> None:
    assert restore(disk, mode, size) == (1, OLD, [])
    assert try_stat(disk, staging) is None
    assert unexpected(disk) == []


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_complete_save_is_published(mode: str, size: int) -> None:
    disk, staging = complete(mode, size)
    disk = disk.crash(keep="none")
    assert_published(disk, mode, size)
    assert try_stat(disk, staging) is None


def test_the_manifest_is_that_of_the_save() -> None:
    disk, staging = complete()
    path = f"{staging}/plan"
    planned = Plan.decode(read_file(disk, path, LIMIT), path).facts
    assert_published(disk, "per-rank")
    facts, _ = read_facts(disk, f"{DIRECTORY}/m-1_2/manifest")
    assert facts is not None
    same = ("stem", "token", "attempt", "run_id", "sequence", "step", "parent", "plan_hash", "created", "kind")
    assert [getattr(facts, name) for name in same] == [getattr(planned, name) for name in same]
    assert facts.values["sched.version"] == NEW


def test_the_plans_token_must_be_the_names() -> None:
    disk, staging = complete()
    change_plan(disk, staging, token="0123456789abcdef")
    assert_swept(disk, staging)


def test_a_staging_directory_under_another_token_is_not_published() -> None:
    disk, staging = complete()
    other = staging[:-16] + "0123456789abcdef"
    disk.rename(staging, other)
    assert_swept(disk, other)


def test_a_staging_directory_under_another_name_is_not_published() -> None:
    disk, staging = complete()
    other = staging.replace("m-1_2", "m-1_7")
    disk.rename(staging, other)
    assert_swept(disk, other)


@pytest.mark.parametrize("mode", ["per-rank", "deduplicated"])
@pytest.mark.parametrize("rank", [0, 1])
def test_coverage_is_against_the_plan_not_the_records(mode: str, rank: int) -> None:
    # What only the dead rank held is in no record: the union of those that are there looks complete.
    disk, staging = complete(mode)
    disk.unlink(f"{staging}/rank_{rank}/record")
    assert_swept(disk, staging, mode)


@pytest.mark.parametrize(
    "facts", [{"token": "0123456789abcdef"}, {"plan_hash": "00" * 32}, {"rank": 0}, {"path": "rank_0/m-1_2.ckpt"}]
)
def test_a_record_of_another_save_does_not_count(facts: dict[str, Any]) -> None:
    disk, staging = complete()
    change_record(disk, staging, 1, **facts)
    assert_swept(disk, staging)


def test_a_plan_of_another_hash_has_no_records() -> None:
    disk, staging = complete()
    change_plan(disk, staging, plan_hash="00" * 32)
    assert_swept(disk, staging)


@pytest.mark.parametrize("mode", ["per-rank", "integrated"])
@pytest.mark.parametrize("name", ["plan", "rank_0/record"])
def test_a_damaged_plan_or_record_does_not_count(mode: str, name: str) -> None:
    disk, staging = complete(mode)
    nbytes = disk.stat(f"{staging}/{name}").nbytes
    for byte_offset in range(0, nbytes, max(1, nbytes // 40)):
        damaged = disk.crash(keep="all")
        damaged.corrupt(f"{staging}/{name}", byte_offset)
        assert_swept(damaged, staging, mode)


@pytest.mark.parametrize("nbytes", [-1, +1])
def test_a_data_file_of_another_size_does_not_count(nbytes: int) -> None:
    disk, staging = complete()
    path = f"{staging}/rank_1/m-1_2.ckpt"
    fd = disk.open(path, os.O_WRONLY)
    disk.truncate(fd, disk.stat(path).nbytes + nbytes)
    disk.close(fd)
    assert_swept(disk, staging)


@pytest.mark.parametrize("mode", ["per-rank", "integrated"])
def test_a_rejected_save_is_not_published(mode: str) -> None:
    disk, staging = complete(mode)
    write_file(disk, f"{staging}/aborted", b"because")
    assert_swept(disk, staging, mode)


@pytest.mark.parametrize(("step", "blocked"), [(1, False), (2, True), (3, True)])
def test_another_attempts_later_publish_wins(step: int, blocked: bool) -> None:
    disk, staging = complete()
    lost = disk.crash(keep="all")
    disk.rename(staging, "/aside")
    saved(
        disk, "per-rank", 2, [(step, 5)]
    )  # another attempt: it starts, does not find the staging directory, and saves
    disk.rename("/aside", staging)
    if blocked:
        assert restore(disk, "per-rank", 2)[:2] == (step, 5)
        assert unexpected(disk) == []
        assert {one.facts.attempt for one in scan(disk, DIRECTORY) if one.facts} != set()
    else:
        with started(disk, "per-rank") as run:
            assert run.directory == DIRECTORY
        assert find_at(disk, f"{DIRECTORY}/m-1_2") is not None
    assert_published(lost, "per-rank")


@pytest.mark.parametrize("mode", ["per-rank", "integrated"])
def test_an_older_save_never_replaces_a_later_one_of_the_same_name(mode: str) -> None:
    disk, staging = complete(mode, step=1)
    change_plan(disk, staging, attempt=_published(disk).attempt, sequence=_published(disk).sequence - 1)
    assert_swept(disk, staging, mode)


def _published(disk: MemoryFileSystem) -> Facts:
    facts = scan(disk, DIRECTORY)[0].facts
    assert facts is not None
    return facts


@pytest.mark.parametrize("mode", ["per-rank", "integrated"])
def test_what_has_the_name_but_is_not_this_runs_stays(mode: str) -> None:
    disk, staging = complete(mode)
    name = f"{DIRECTORY}/m-1_2" + (".ckpt" if mode == "integrated" else "")
    if mode == "integrated":
        write_file(disk, name, b"foreign")
    else:
        disk.mkdir(name)
        write_file(disk, f"{name}/precious", b"foreign")
    with started(disk, mode):
        pass
    assert try_stat(disk, staging) is None
    kept = name if mode == "integrated" else f"{name}/precious"
    assert read_file(disk, kept, 100) == b"foreign"


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["plan", "rank_1/record"])
def test_what_cannot_be_read_is_neither_published_nor_swept(name: str, code: int) -> None:
    disk, staging = complete()
    disk.deny(f"{staging}/{name}", code)
    with pytest.raises(StorageError) as caught:
        restore(disk, "per-rank", 2)
    assert caught.value.errno == code
    disk.allow(f"{staging}/{name}")
    assert_published(disk, "per-rank")


def test_what_a_newer_parckpt_wrote_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, staging = complete()
    with monkeypatch.context() as patch:
        patch.setattr(tablefile, "VERSION", tablefile.VERSION + 1)
        change_plan(disk, staging)
    assert restore(disk, "per-rank", 2) == (1, OLD, [])
    assert try_stat(disk, f"{staging}/plan") is not None


def test_nothing_is_published_without_the_lock() -> None:
    disk, staging = complete()

    def lost() -> None:
        raise LockedError("gone")

    with pytest.raises(LockedError):
        finalize(disk, DIRECTORY, "m-1_2", staging[-16:], lost, Modes())
    assert find_at(disk, staging) is None
    assert_published(disk, "per-rank")


# What belongs to one rank alone.


def replicas(values: Callable[[int], Any]) -> Callable[[int, int], dict[str, Any]]:
    def make(rank: int, size: int) -> dict[str, Any]:
        return {
            "w": np.arange(6.0),
            "own": parckpt.PerRank(values(rank), on_resize=lambda values, rank, size: values[0]),
        }

    return make


@pytest.mark.parametrize("mode", ["per-rank", "deduplicated"])
@pytest.mark.parametrize("kind", ["regular", "breakpoint"])
@pytest.mark.parametrize("values", [lambda rank: rank, lambda rank: np.full(3, rank)], ids=["value", "array"])
def test_what_a_dead_rank_had_alone_blocks_a_regular_save(mode: str, kind: str, values: Callable[[int], Any]) -> None:
    disk = new_disk()
    staging = unpublished(disk, mode, 2, 1, replicas(values))
    change_plan(disk, staging, kind=kind)
    # The dead rank is the one that did not have to write the replica.
    record = Record.decode(read_file(disk, f"{staging}/rank_0/record", LIMIT), "record")
    disk.unlink(f"{staging}/rank_{1 if record.nbytes > 60 else 0}/record")
    with started(disk, mode):
        pass
    facts = [one.facts for one in scan(disk, DIRECTORY)]
    assert try_stat(disk, staging) is None
    if kind == "regular":
        assert facts == []
    else:
        assert len(facts) == 1
        assert facts[0] is not None
        assert list(facts[0].missing) in (["own@rank_1"], ["own@rank_0"])


def test_a_breakpoint_needs_every_shared_tensor() -> None:
    disk, staging = complete()
    change_plan(disk, staging, kind="breakpoint")
    disk.unlink(f"{staging}/rank_1/record")
    assert_swept(disk, staging)
