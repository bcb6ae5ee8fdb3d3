"""The machine dies while an ephemeral checkpoint gives way to the next: one of the two is there, whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from parckpt.checkpointer import ModelCheckpoint
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem, SimulatedCrash
from parckpt.testing.saves import fill, make_state, new_disk, restore, started, unexpected

OPTIONS = {"save_checkpoint_steps": 10, "keep_checkpoint_max": 1, "ephemeral_steps": 1}


def dies(disk: MemoryFileSystem, mode: str, n: int, last: Callable[[ModelCheckpoint], None]) -> tuple[bool, bool]:
    """Save step 1 for a while, and die after the n-th call of what comes then: whether that returned, and the end."""
    system = FaultyFileSystem(disk)
    returned = False
    try:
        with started(system, mode, **OPTIONS) as run:  # type: ignore[arg-type]
            state = make_state(0, 1, 1)
            run.step_end(state, 1)
            assert run.last_decision is not None
            assert run.last_decision.is_ephemeral
            fill(state, 0, 1, 2)
            system.arm(crash_after=n)
            last(run)
            returned = True
            run._run.keeper.flush()
            system.arm()
    except SimulatedCrash:
        return returned, False
    return returned, True


def next_one(run: ModelCheckpoint) -> None:
    run.step_end(None, 2)


def same_one_for_good(run: ModelCheckpoint) -> None:
    run.end()


@pytest.mark.parametrize(("mode", "last"), [("integrated", next_one), ("per-rank", same_one_for_good)])
def test_one_of_both_is_there(mode: str, last: Callable[[ModelCheckpoint], None]) -> None:
    for n in itertools.count(1):
        disk = new_disk()
        returned, ended = dies(disk, mode, n, last)
        for keep in ("all", "none") if n % 3 == 0 else ("all",):
            survived = disk.crash(keep=keep)  # type: ignore[arg-type]
            step, version, skipped = restore(survived, mode, 1)
            assert version == 2 if returned else version in (1, 2), (n, keep)
            assert (step, skipped) == (version if last is next_one else 1, []), (n, keep)
            assert unexpected(survived) == [], (n, keep)
        if ended:
            break
    assert n > 50
