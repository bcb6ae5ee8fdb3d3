"""Every file system call of a save fails, one after the other: all ranks say the same, nothing earlier is lost."""

from __future__ import annotations

import errno
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest

from parckpt.comm.base import Communicator
from parckpt.errors import ParckptError, StorageError
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem
from parckpt.testing.saves import fill, make_state, new_disk, restore, saved, started, unexpected
from parckpt.testing.world import run_world

OLD, NEW, NEXT = 1, 2, 3  # versions of the state
LIMIT = 400  # calls; a save of one rank makes about 80


@dataclass
class Outcome:
    """What one rank saw of a save at which one call failed."""

    error: Exception | None = None
    name_before: str = ""
    name_after: str = ""


@dataclass
class Trial:
    """A save of ``size`` ranks during which the n-th call of one rank fails.

    ``step`` 1 replaces the checkpoint of version OLD, 2 adds one.
    """

    mode: str
    size: int
    rank: int
    step: int
    error: int
    disk: MemoryFileSystem
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    after: list[MemoryFileSystem] = field(default_factory=list)
    systems: list[FaultyFileSystem] = field(default_factory=list)

    def run(self, n: int) -> None:
        """Restore, save with the fault, look, save again without."""
        self.systems = [FaultyFileSystem(self.disk, error=self.error) for _ in range(self.size)]
        run_world(self.size, lambda comm, rank: self._program(comm, rank, n))

    def _program(self, comm: Communicator, rank: int, n: int) -> None:
        with started(self.systems[rank], self.mode, comm) as run:
            state = make_state(rank, self.size)
            run.restore(state)
            fill(state, rank, self.size, NEW)
            run.poll()
            outcome = self.outcomes[rank] = Outcome(name_before=run.latest_ckpt_file_name)
            if rank == self.rank:
                self.systems[rank].arm(fail_after=n)
            try:
                run.save_now(state, self.step)
            except Exception as error:
                outcome.error = error
            outcome.name_after = run.latest_ckpt_file_name
            run.poll()
            if rank == 0:
                run._run.keeper.flush()
                self.after = [self.disk.crash(keep="all"), self.disk.crash(n, keep="none" if n % 3 == 0 else None)]
            run.poll()
            self.failed = self.systems[self.rank].failed
            run.poll()
            self.systems[rank].arm()
            fill(state, rank, self.size, NEXT)
            run.save_now(state, self.step)

    def check_outcomes(self) -> bool:
        """Whether the save failed; on all ranks alike, with the error that was injected."""
        first = self.outcomes[0]
        for outcome in self.outcomes.values():
            assert type(outcome.error) is type(first.error)
            assert str(outcome.error) == str(first.error)
            assert (outcome.name_before, outcome.name_after) == (first.name_before, first.name_after)
        if first.error is None:
            assert first.name_after
            return False
        assert isinstance(first.error, StorageError)
        assert first.error.errno == self.error
        assert first.name_after == first.name_before
        return True

    def check_what_is_left(self, failed: bool) -> None:
        """A start after the failed save, with or without a loss of power, finds OLD, or NEW where that is whole."""
        for disk in self.after:
            step, version, skipped = restore(disk, self.mode, self.size)
            assert skipped == []
            assert (step, version) in ([(1, OLD), (self.step, NEW)] if failed else [(self.step, NEW)])
            if self.step != 1 and disk is self.after[0]:
                assert restore(disk, self.mode, self.size, step=1)[:2] == (1, OLD)
            assert unexpected(disk) == []

    def check_no_sync_twice(self) -> None:
        """After a failed fsync nobody syncs that file again: the second would succeed without the bytes."""
        failed = self.failed
        if failed is not None and failed.operation == "fsync":
            later = [c for c in self.systems[self.rank].calls if c.number > failed.number and c.path == failed.path]
            assert "fsync" not in [call.operation for call in later]


def try_every_call(mode: str, size: int, rank: int, step: int, error: int, **options: Any) -> int:
    """Fail call after call until a save passes without that call; return how many there were."""
    base = saved(new_disk(**options), mode, size, [(1, OLD)])
    for n in itertools.count(1):
        assert n < LIMIT
        trial = Trial(mode, size, rank, step, error, base.crash(keep="all"))
        try:
            trial.run(n)
            failed = trial.check_outcomes()
            trial.check_what_is_left(failed)
            trial.check_no_sync_twice()
            assert restore(trial.disk, mode, size)[:2] == (step, NEXT)
            assert unexpected(trial.disk) == []
            assert trial.disk.nopen == 0
        except (AssertionError, ParckptError) as problem:
            raise AssertionError(f"call {n}: {trial.failed}, {errno.errorcode[error]}: {problem}") from problem
        if trial.failed is None:
            assert not failed
            return n
    raise AssertionError("unreachable")


REPLACE, ADD = 1, 2


@pytest.mark.parametrize(
    ("mode", "step", "error", "flags"),
    [
        ("integrated", ADD, errno.EIO, True),
        ("integrated", REPLACE, errno.EIO, True),
        ("integrated", ADD, errno.EACCES, False),
        ("integrated", REPLACE, errno.ENOSPC, False),
        ("per-rank", ADD, errno.EIO, True),
        ("per-rank", REPLACE, errno.EIO, True),
        ("per-rank", REPLACE, errno.EIO, False),
        ("deduplicated-safetensors", ADD, errno.EACCES, True),
    ],
)
def test_one_rank(mode: str, step: int, error: int, flags: bool) -> None:
    assert try_every_call(mode, 1, 0, step, error, rename_flags=flags) > 60


@pytest.mark.parametrize(
    ("mode", "size", "rank", "step", "error", "flags"),
    [
        ("integrated", 2, 0, ADD, errno.ENOSPC, True),
        ("integrated-safetensors", 3, 0, REPLACE, errno.EIO, False),
        ("per-rank", 2, 0, REPLACE, errno.EIO, False),
        ("per-rank", 2, 1, ADD, errno.ENOSPC, True),
        ("deduplicated", 3, 2, REPLACE, errno.EACCES, True),
        ("deduplicated-safetensors", 2, 1, ADD, errno.EIO, True),
    ],
)
def test_several_ranks(mode: str, size: int, rank: int, step: int, error: int, flags: bool) -> None:
    assert try_every_call(mode, size, rank, step, error, rename_flags=flags) > (50 if rank == 0 else 15)
