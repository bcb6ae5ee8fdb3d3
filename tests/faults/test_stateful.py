"""Save, die, restore, prune, corrupt, in any order, against a list of what must be there; and damage of every file."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from parckpt.core import naming
from parckpt.errors import ConfigError, IntegrityError, ParckptError
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem, SimulatedCrash
from parckpt.testing.saves import (
    DIRECTORY,
    MODES,
    PREFIX,
    abandon,
    check,
    fill,
    make_state,
    new_disk,
    restore,
    saved,
    started,
    unexpected,
)

KEPT = 3  # checkpoints that retention leaves


class Checkpoints(RuleBasedStateMachine):
    """One rank, one prefix; ``published`` is (step, version), oldest first by sequence; the last KEPT must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.published: list[tuple[int, int]] = []
        self.version = 0
        self.step = 0
        self._opened: Any = None

    @initialize(mode=st.sampled_from(["integrated", "per-rank"]), flags=st.booleans())
    def begin(self, mode: str, flags: bool) -> None:
        self.mode = mode
        self.disk = new_disk(rename_flags=flags)
        self.state = make_state(0, 1)
        self.start()

    def start(self) -> None:
        """A new attempt: it restores the newest."""
        self.system = FaultyFileSystem(self.disk)
        self._opened = started(self.system, self.mode, keep_checkpoint_max=KEPT)  # type: ignore[arg-type]
        self.run_ = self._opened.__enter__()
        self.go_back()

    def go_back(self, step: int | None = None) -> Any:
        """Restore and compare with the model."""
        progress = self.run_.restore(self.state, step=step)
        self.step = progress.step
        if self.published:
            expected = self.published[-1] if step is None else dict(self.published)[step]
            found = (progress.step, check(self.state, 1, progress))
            assert found == expected if step is None else found == (step, expected)
        else:
            assert progress.step == 0
        return progress

    def note(self, step: int, version: int) -> None:
        self.published = [entry for entry in self.published if entry[0] != step] + [(step, version)]

    def check_swept(self) -> None:
        """A start has left only what it holds itself, and marks."""
        debris = [name for name in unexpected(self.disk) if ".bad-" not in name and name != f".{PREFIX}.lock"]
        assert debris == []

    def next_version(self) -> int:
        self.version += 1
        fill(self.state, 0, 1, self.version)
        return self.version

    @rule(ahead=st.integers(0, 2))
    def save(self, ahead: int) -> None:
        """Of a later step, or (0) of the same once more."""
        step = max(1, self.step + ahead)
        version = self.next_version()
        self.run_.save_now(self.state, step)
        self.run_._run.keeper.flush()
        self.step = step
        self.note(step, version)

    @rule(ahead=st.integers(0, 2), n=st.integers(1, 130), seed=st.integers(0, 1 << 20), power=st.booleans())
    def die_while_saving(self, ahead: int, n: int, seed: int, power: bool) -> None:
        step = max(1, self.step + ahead)
        version = self.next_version()
        self.system.arm(crash_after=n)
        returned = False
        with suppress(SimulatedCrash):
            self.run_.save_now(self.state, step)
            returned = True
            self.run_._run.keeper.flush()
        abandon(self.run_)
        before = list(self.published)
        self.disk = self.disk.crash(seed) if power else self.disk.crash(keep="all")
        self.note(step, version)
        if not returned:
            found = restore(self.disk, self.mode, 1)[:2]
            old = before[-1] if before else (0, -1)
            assert found in (old, (step, version))
            if found == old:
                self.published = before
        self.start()
        self.check_swept()

    @rule(n=st.integers(1, 130))
    def fail_while_saving(self, n: int) -> None:
        """One call fails; the save may raise, and what was published before is there."""
        step = self.step + 1
        version = self.next_version()
        self.system.arm(fail_after=n)
        try:
            self.run_.save_now(self.state, step)
            self.run_._run.keeper.flush()
            self.note(step, version)
        except ParckptError:
            self.system.arm()
            found = (self.run_.restore(self.state).step, int(self.state["sched"]["version"]))
            if found == (step, version):  # only the last sync failed
                self.note(step, version)
        self.system.arm()
        self.go_back()

    @rule()
    def restart(self) -> None:
        """Leave in order, come again."""
        self._opened.__exit__(None, None, None)
        self.start()
        self.check_swept()

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def go_to_an_older_one(self, data: st.DataObject) -> None:
        """A branch: what is saved from now on outranks the rest."""
        step = data.draw(st.sampled_from([step for step, _ in self.published[-KEPT:]]))
        self.go_back(step)

    @precondition(lambda self: len(self.published) >= 2)
    @rule(byte_offset=st.integers(0, 1 << 30), bit=st.integers(0, 7))
    def corrupt_the_newest(self, byte_offset: int, bit: int) -> None:
        """It is named, set aside, and the one before is taken."""
        step = self.published[-1][0]
        path = data_path(self.disk, self.mode, step)
        self.disk.corrupt(path, byte_offset % self.disk.stat(path).nbytes, bit)
        self.published = self.published[:-1][-KEPT + 1 :]
        progress = self.go_back()
        assert any(f"m-1_{step}" in skipped for skipped, _ in progress.skipped)

    def teardown(self) -> None:
        if self._opened is not None:
            abandon(self.run_)


def data_path(disk: MemoryFileSystem, mode: str, step: int) -> str:
    extension = naming.EXTENSIONS[MODES[mode].get("format", "ckpt")]
    name = f"m-1_{step}.{extension}"
    integrated = not (MODES[mode].get("remove_redundancy") or MODES[mode].get("integrated_save") is False)
    return f"{DIRECTORY}/{name}" if integrated else f"{DIRECTORY}/m-1_{step}/rank_0/{name}"


TestCheckpoints = Checkpoints.TestCase
TestCheckpoints.settings = settings(max_examples=25, stateful_step_count=8, deadline=None)


# Damage.


def manifest_path(disk: MemoryFileSystem, step: int) -> str:
    single = [n for n in disk.listdir(DIRECTORY) if n.startswith(f"m-1_{step}.") and n.endswith(".manifest")]
    return f"{DIRECTORY}/{single[0]}" if single else f"{DIRECTORY}/m-1_{step}/manifest"


def resize(disk: MemoryFileSystem, path: str, by: int) -> None:
    fd = disk.open(path, os.O_WRONLY)
    disk.truncate(fd, disk.stat(path).nbytes + by)
    disk.close(fd)


def assert_never_returned(disk: MemoryFileSystem, mode: str) -> None:
    """Step 2 is damaged: the restore says so and takes step 1; asked for step 2, it raises."""
    for request in ({"step": 2}, {"fallback": False}):
        copy = disk.crash(keep="all")
        with pytest.raises((IntegrityError, ParckptError)):
            restore(copy, mode, 1, **request)
    step, version, skipped = restore(disk, mode, 1)
    assert (step, version) == (1, 1)
    assert any(path.startswith(f"{DIRECTORY}/m-1_2") for path, _ in skipped)


@pytest.fixture(scope="module")
def disks() -> dict[str, MemoryFileSystem]:
    return {mode: saved(new_disk(), mode, 1, [(1, 1), (2, 2)]) for mode in MODES}


@pytest.mark.parametrize("what", ["data", "manifest"])
@pytest.mark.parametrize("mode", ["integrated", "integrated-safetensors", "per-rank"])
def test_a_flipped_bit_anywhere(disks: dict[str, MemoryFileSystem], mode: str, what: str) -> None:
    path = data_path(disks[mode], mode, 2) if what == "data" else manifest_path(disks[mode], 2)
    nbytes = disks[mode].stat(path).nbytes
    for byte_offset in range(0, nbytes, max(1, nbytes // 25)):
        disk = disks[mode].crash(keep="all")
        disk.corrupt(path, byte_offset, byte_offset % 8)
        assert_never_returned(disk, mode)


@pytest.mark.parametrize("by", [-1, 1, -4096, 4096])
@pytest.mark.parametrize("what", ["data", "manifest"])
@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_another_length(disks: dict[str, MemoryFileSystem], mode: str, what: str, by: int) -> None:
    disk = disks[mode].crash(keep="all")
    path = data_path(disk, mode, 2) if what == "data" else manifest_path(disk, 2)
    resize(disk, path, max(by, -disk.stat(path).nbytes))
    assert_never_returned(disk, mode)


@pytest.mark.parametrize("mode", MODES)
def test_data_of_another_step(disks: dict[str, MemoryFileSystem], mode: str) -> None:
    disk = disks[mode].crash(keep="all")
    first, second = data_path(disk, mode, 1), data_path(disk, mode, 2)
    disk.exchange(first, second)
    with pytest.raises(IntegrityError) as caught:
        restore(disk, mode, 1)
    assert "m-1_1" in str(caught.value)
    assert "m-1_2" in str(caught.value)


@pytest.mark.parametrize("mode", ["per-rank", "deduplicated"])
def test_a_missing_data_file(disks: dict[str, MemoryFileSystem], mode: str) -> None:
    disk = disks[mode].crash(keep="all")
    disk.unlink(data_path(disk, mode, 2))
    assert_never_returned(disk, mode)


def test_a_missing_manifest_of_a_step_directory(disks: dict[str, MemoryFileSystem]) -> None:
    disk = disks["per-rank"].crash(keep="all")
    disk.unlink(manifest_path(disk, 2))
    assert_never_returned(disk, "per-rank")


def test_a_missing_manifest_of_a_file_makes_it_foreign(disks: dict[str, MemoryFileSystem]) -> None:
    disk = disks["integrated"].crash(keep="all")
    disk.unlink(manifest_path(disk, 2))
    assert restore(disk, "integrated", 1)[:2] == (1, 1)
    with pytest.raises(ParckptError):
        restore(disk, "integrated", 1, step=2)
    disk.unlink(manifest_path(disk, 1))
    with pytest.raises(ParckptError) as caught:  # never a fresh start
        restore(disk, "integrated", 1)
    assert not isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_manifests_of_another_step(disks: dict[str, MemoryFileSystem], mode: str) -> None:
    disk = disks[mode].crash(keep="all")
    disk.exchange(manifest_path(disk, 1), manifest_path(disk, 2))
    with pytest.raises(ParckptError):
        restore(disk, mode, 1)
