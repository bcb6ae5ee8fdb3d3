"""Root's hold on a directory: lock, run file, names, deletion."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from parckpt.core import naming
from parckpt.core.manifest import Facts
from parckpt.core.retention import RetentionPolicy
from parckpt.engine.catalog import scan
from parckpt.engine.keeper import Keeper, make_directory
from parckpt.engine.staging import Modes
from parckpt.errors import CheckpointNotFoundError, LockedError, StorageError
from parckpt.storage.atomic import read_file, write_file
from parckpt.storage.filesystem import FileSystem
from parckpt.storage.identity import Identity, identify
from parckpt.storage.lock import break_lock
from parckpt.testing.clock import ManualClock
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem
from parckpt.testing.saves import DIRECTORY, new_disk, saved

pytestmark = pytest.mark.fast

WHO = identify({}, "00" * 16)
RUN = f"{DIRECTORY}/.m.run"


@contextmanager
def kept(fs: FileSystem, *, who: Identity = WHO, count: int = 1, family: str = "m") -> Iterator[Keeper]:
    keeper = Keeper(
        fs,
        DIRECTORY,
        family,
        who,
        ManualClock(),
        stale_s=600.0,
        modes=Modes(),
        retention=RetentionPolicy(count=count),
    )
    try:
        yield keeper
    finally:
        keeper.close()


def facts_of(disk: MemoryFileSystem) -> Facts:
    facts = scan(disk, DIRECTORY)[0].facts
    assert facts is not None
    return facts


def run_id_of(disk: MemoryFileSystem) -> str:
    return facts_of(disk).run_id


@pytest.mark.parametrize(
    ("family", "stem", "owned"),
    [
        ("m", "m-1_1", True),
        ("m", "m_1-1_1", True),
        ("m", "m_12-3_4_breakpoint", True),
        ("m", "m_x-1_1", False),
        ("m", "mm-1_1", False),
        ("m", "m_-1_1", False),
        ("m", "m", False),
        ("m", "other-1_1", False),
    ],
)
def test_what_belongs_to_a_family(family: str, stem: str, owned: bool) -> None:
    assert naming.belongs(stem, family) is owned


def test_the_lock_is_held_until_close() -> None:
    disk = new_disk()
    with kept(disk) as keeper:
        keeper.check()
        with pytest.raises(LockedError), kept(disk):
            pass
        with kept(disk, family="other"):
            pass
        break_lock(disk, DIRECTORY, "m")
        with pytest.raises(LockedError):
            keeper.check()
    assert disk.listdir(DIRECTORY) == []
    with kept(disk):
        pass


def test_a_start_that_fails_gives_the_lock_back() -> None:
    disk = saved(new_disk(), "per-rank", 1, [(1, 1)])
    raised = 0
    for n in range(1, 200):
        system = FaultyFileSystem(disk, fail_at=n)
        try:
            with kept(system):  # type: ignore[arg-type]
                system.arm()
                failed = False
        except StorageError:
            failed = True
        raised += failed
        with kept(disk):
            pass
        if not failed and n > system.count:
            break
    assert raised > 5


# The run file.


def test_first_start_in_an_empty_directory() -> None:
    with kept(new_disk()) as keeper:
        keeper.nothing_found(required=False)
        with pytest.raises(CheckpointNotFoundError, match="required"):
            keeper.nothing_found(required=True)


def test_a_restarted_job_must_find_its_trace() -> None:
    disk = new_disk()
    again = replace(WHO, job_id="7", restart_count=1)
    with kept(disk, who=again) as keeper, pytest.raises(CheckpointNotFoundError, match="mounted"):
        keeper.nothing_found(required=False)
    with kept(disk) as keeper:
        keeper.note_start("r")
    with kept(disk, who=again) as keeper:
        keeper.nothing_found(required=False)


def test_where_something_was_published_nothing_is_no_answer() -> None:
    disk = new_disk()
    with kept(disk) as keeper:
        keeper.note_start("r")
        keeper.note_published("r", 3)
        content = json.loads(read_file(disk, RUN, 1000))
        assert content == {"run_id": "r", "published": True, "step": 3}
    disk = disk.crash(keep="none")
    with kept(disk) as keeper, pytest.raises(CheckpointNotFoundError, match="step 3"):
        keeper.nothing_found(required=False)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"{" * 2000, b"[" * 60_000])
def test_a_damaged_run_file_counts_as_published(content: bytes) -> None:
    disk = new_disk()
    write_file(disk, RUN, content)
    with kept(disk) as keeper, pytest.raises(CheckpointNotFoundError):
        keeper.nothing_found(required=False)


def test_the_run_file_is_written_once_a_run_and_not_at_each_save() -> None:
    system = FaultyFileSystem(new_disk())
    with kept(system) as keeper:  # type: ignore[arg-type]
        keeper.note_start("r")
        keeper.note_published("r", 1)
        before = system.count
        keeper.note_start("r")
        keeper.note_published("r", 2)
        assert system.count == before
        keeper.note_published("another", 2)
        assert system.count > before


def test_what_writing_the_run_file_left_is_removed() -> None:
    disk = new_disk()
    write_file(disk, f"{DIRECTORY}/.m.run.temp-0123456789abcdef", b"{")
    write_file(disk, f"{DIRECTORY}/.n.run.temp-0123456789abcdef", b"{")
    with kept(disk):
        pass
    assert disk.listdir(DIRECTORY) == [".n.run.temp-0123456789abcdef"]


# Names and deletion.


def test_a_new_run_is_numbered_on() -> None:
    disk = saved(new_disk(), "per-rank", 1, [(1, 1)])
    with kept(disk) as keeper:
        assert keeper.numbered_prefix() == "m_1"
        assert keeper.highest_sequence() == 1
        facts = facts_of(disk)
        other_step = replace(facts, step=2, step_in_epoch=2, stem="m-1_2")
        assert keeper.taken(f"{DIRECTORY}/m-1_1", facts) == (True, True)
        assert keeper.taken(f"{DIRECTORY}/m-1_1", other_step) == (True, False)
        assert keeper.taken(f"{DIRECTORY}/m-1_1", replace(other_step, stem="best")) == (True, True)
        assert keeper.taken(f"{DIRECTORY}/m-1_1", replace(facts, run_id="another")) == (True, False)
        assert keeper.taken(f"{DIRECTORY}/m-1_9", replace(facts, step=9)) == (False, False)


def test_the_directories_of_a_run_are_remembered_the_last_one_last() -> None:
    disk = new_disk()
    with kept(disk) as keeper:
        for path in ("../a", "b", "../a", "../a"):
            keeper.note_directory(path)
        keeper.note_start("r")
        keeper.note_published("r", 3)
    disk = disk.crash(keep="none")
    with kept(disk) as keeper:
        assert keeper.noted_directories() == ["b", "../a"]
        assert keeper.run_file == {"directories": ["b", "../a"], "run_id": "r", "published": True, "step": 3}
        for number in range(4000):
            assert keeper.run_file is not None
            keeper.run_file["directories"].append(f"somewhere/{number}")
        keeper.note_directory("c")
    with kept(disk) as keeper:
        assert keeper.noted_directories()[-2:] == ["somewhere/3999", "c"]


@pytest.mark.parametrize("noted", [7, "abc", {"a": 1}, [1, None, "/etc", "a\0b"]])
def test_directories_that_a_damaged_run_file_names_are_ignored(noted: object) -> None:
    disk = new_disk()
    write_file(disk, RUN, json.dumps({"directories": noted}).encode())
    with kept(disk) as keeper:
        assert keeper.noted_directories() == []


@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_retention_is_for_this_run_and_prefix_only(mode: str) -> None:
    disk = saved(new_disk(), mode, 1, [(1, 1), (2, 2), (3, 3)])
    with kept(disk, count=1) as keeper:
        keeper.retain("another", "m")
        keeper.retain(run_id_of(disk), "m_1")
        keeper.flush()
        assert len(scan(disk, DIRECTORY)) == 3
        keeper.retain(run_id_of(disk), "m")
        keeper.flush()
        assert [f.facts.step for f in scan(disk, DIRECTORY) if f.facts] == [3]
        assert [name for name in disk.listdir(DIRECTORY) if "trash" in name or "-1_1" in name] == []


def test_a_pinned_one_stays() -> None:
    disk = saved(new_disk(), "per-rank", 1, [(1, 1), (2, 2), (3, 3)])
    token = next(f.token for f in scan(disk, DIRECTORY) if f.facts and f.facts.step == 1)
    write_file(disk, f"{DIRECTORY}/.m-1_1.pin-{token}", b"")
    with kept(disk, count=1) as keeper:
        keeper.retain(run_id_of(disk), "m")
    assert sorted(f.facts.step for f in scan(disk, DIRECTORY) if f.facts) == [1, 3]


@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_a_deletion_that_fails_is_told_and_finished_by_the_next_start(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = saved(new_disk(), mode, 1, [(1, 1), (2, 2)])
    for n in range(1, 200):
        disk = base.crash(keep="all")
        system = FaultyFileSystem(disk)
        with kept(system, count=1) as keeper, caplog.at_level(logging.WARNING):  # type: ignore[arg-type]
            caplog.clear()
            system.arm(fail_after=n)
            keeper.retain(run_id_of(base), "m")
            keeper.flush()
            failed = system.failed
            system.arm()
        if failed is None:
            break
        with kept(disk, count=1) as keeper:
            keeper.retain(run_id_of(base), "m")
        assert [f.facts.step for f in scan(disk, DIRECTORY) if f.facts] == [2]
        names = [name for name in disk.listdir(DIRECTORY) if name != ".m.run"]
        assert names == [name for name in base.listdir(DIRECTORY) if name.startswith("m-1_2")]
        assert caplog.messages
    assert n > 10


def test_make_directory_makes_each_level_durable() -> None:
    disk = MemoryFileSystem()
    make_directory(disk, "/a/b/c", 0o750)
    after = disk.crash(keep="none")
    assert after.stat("/a/b/c").mode == 0o750
    make_directory(disk, "/a/b", 0o700)
    assert disk.stat("/a/b").mode == 0o750
    write_file(disk, "/file", b"")
    with pytest.raises(StorageError):
        make_directory(disk, "/file", 0o700)
