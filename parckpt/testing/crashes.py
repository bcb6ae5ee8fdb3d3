"""A save in which the machine dies after the n-th file system call, for every n: what is there afterwards is whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import parckpt
from parckpt.comm.base import Communicator
from parckpt.errors import InternalError
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem, SimulatedCrash
from parckpt.testing.saves import fill, make_state, restore, started, unexpected
from parckpt.testing.world import run_world

__all__ = ["CHANGES", "LIMIT", "NEW", "OLD", "Crash", "crash_everywhere", "disks"]

OLD, NEW = 1, 2  # versions of the state
LIMIT = 500  # calls; the longest of these saves makes about 130


# A start also reads, in threads; dying at a read leaves what dying at the change before it left.
CHANGES = frozenset(
    {
        "chmod_open",  # follows each creation
        *("pwrite", "fsync", "truncate", "mkdir", "rmdir", "link", "unlink"),
        *("rename", "rename_noreplace", "exchange", "sync_directory"),
    }
)


class RankDiedError(Exception):
    """Ends the world of a rank whose file system is dead."""


@dataclass
class Crash:
    """A save of version NEW by ``size`` ranks in which rank ``rank`` dies after its n-th call.

    ``step`` 1 replaces version OLD. ``again``: OLD is saved by the same process, so it is not another attempt's.
    """

    mode: str
    disk: MemoryFileSystem
    step: int = 2
    size: int = 1
    rank: int = 0
    again: bool = False
    from_the_start: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    returned: bool = False
    recorded: bool = False
    reached_the_end: bool = False
    first_call: int = 0

    def run(self, n: int) -> None:
        """Let it happen."""
        self.system = FaultyFileSystem(self.disk, crash_at=n if self.from_the_start else None)
        try:
            if self.size == 1:
                self._program(parckpt.SELF, 0, n)
            else:
                run_world(self.size, lambda comm, rank: self._mortal(comm, rank, n))
            self.reached_the_end = True
        except (SimulatedCrash, RankDiedError, InternalError):
            pass
        synced = [c.path for c in self.system.calls[self.first_call :] if c.operation == "sync_directory"]
        self.recorded = any(path.endswith(f"/rank_{self.rank}") for path in synced)

    def _mortal(self, comm: Communicator, rank: int, n: int) -> None:
        try:
            self._program(comm, rank, n)
        except SimulatedCrash as death:
            raise RankDiedError from death

    def _program(self, comm: Any, rank: int, n: int) -> None:
        mine = rank == self.rank
        with started(self.system if mine else self.disk, self.mode, comm, **self.options) as run:
            state = make_state(rank, self.size)
            run.restore(state)
            if self.again:
                fill(state, rank, self.size, OLD)
                run.step_end(state, 1)
            fill(state, rank, self.size, NEW)
            run.poll()
            if mine and not self.from_the_start:
                self.first_call = self.system.count
                self.system.arm(crash_after=n)
            run.save_now(state, self.step)
            self.returned = True
            if rank == 0:
                run._run.keeper.flush()
            if mine:
                self.system.arm()


def disks(disk: MemoryFileSystem, n: int) -> Iterator[tuple[str, MemoryFileSystem]]:
    """What may be found after the death: of the process alone, and of the machine."""
    yield "all", disk.crash(keep="all")
    if n % 3 == 0:
        yield "none", disk.crash(keep="none")
    else:
        yield f"seed {n}", disk.crash(n)


def crash_everywhere(
    make: Callable[[], Crash], first: tuple[int, int] = (1, OLD), *, finalizes: bool, stride: int = 1
) -> int:
    """Die after call after call until the save ends before it; return how many calls there were.

    ``first`` is the (step, version) before the save. ``finalizes``: once all is recorded, a start publishes it.
    ``stride``: only after every so-manieth call.
    """
    for n in itertools.count(1, stride):
        assert n < LIMIT
        crash = make()
        crash.run(n)
        allowed = {(crash.step, NEW)} if crash.returned else {first, (crash.step, NEW)}
        for how, disk in disks(crash.disk, n):
            try:
                step, version, skipped = restore(disk, crash.mode, crash.size)
                assert (step, version) in allowed
                assert skipped == []
                assert unexpected(disk) == []
                if how == "all" and crash.size == 1 and crash.recorded and finalizes:
                    assert version == NEW
                if n % 8 == 0:
                    assert restore(disk, crash.mode, crash.size)[:2] == (step, version)
            except Exception as problem:
                raise AssertionError(f"after call {n}, {crash.system.failed}, kept {how}: {problem}") from problem
        if crash.reached_the_end:
            return n
    raise AssertionError("unreachable")
