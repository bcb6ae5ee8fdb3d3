"""Bounded waiting and roll calls, step by step on a clock that stands still."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from parckpt.comm.arrival import DRAIN_EVERY, MAX_NAMED, RollCall
from parckpt.comm.base import Request
from parckpt.comm.memory import Exchange, MemoryCommunicator
from parckpt.comm.wait import MAX_SLEEP_S, NOTICE_S, Waiter
from parckpt.errors import TimeoutExpiredError

pytestmark = pytest.mark.fast


class Timeline:
    """A clock whose sleeping lets the other ranks' acts happen at their times."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []
        self._acts: list[tuple[float, Callable[[], object]]] = []

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        # Asking takes a moment too, else the spinning before the first sleep would never end.
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds
        due = [act for act in self._acts if act[0] <= self.now]
        self._acts = [act for act in self._acts if act[0] > self.now]
        for _, act in due:
            act()

    def at(self, when: float, act: Callable[[], object]) -> None:
        self._acts.append((when, act))

    def waiter(self, timeout_s: float = 10.0) -> Waiter:
        return Waiter(timeout_s, self, self.sleep)


@pytest.fixture
def timeline() -> Timeline:
    return Timeline()


def _world(size: int) -> list[MemoryCommunicator]:
    exchange = Exchange(size)
    return [MemoryCommunicator(exchange, rank) for rank in range(size)]


def _arrive(comm: MemoryCommunicator) -> Request:
    return comm.iallreduce_max(np.zeros(1, np.int64), np.zeros(1, np.int64))


def _roll_call(request: Request) -> tuple[RollCall, int]:
    assert request.ticket is not None
    assert request.ticket.sequence is not None
    return request.ticket.roll_call, request.ticket.sequence


def _waits_at(comm: MemoryCommunicator, *, expired: bool = False) -> Callable[[], None]:
    """What another rank does when it arrives and waits."""

    def act() -> None:
        roll_call, sequence = _roll_call(_arrive(comm))
        roll_call.announce(sequence)
        if expired:
            roll_call.announce(sequence, expired=True)

    return act


def test_what_is_complete_costs_nothing(timeline: Timeline) -> None:
    (comm,) = _world(1)
    timeline.waiter().wait(_arrive(comm), "a reduction")
    assert timeline.now == 0
    assert timeline.sleeps == []


def test_sleeps_grow_and_stay_short(timeline: Timeline) -> None:
    comm, other = _world(2)
    timeline.at(0.5, lambda: _arrive(other))
    timeline.waiter().wait(_arrive(comm), "a reduction")
    assert 0.5 <= timeline.now < 0.51
    assert timeline.sleeps == sorted(timeline.sleeps)
    assert timeline.sleeps[-1] == MAX_SLEEP_S


def test_nobody_is_told_of_a_short_wait(timeline: Timeline) -> None:
    comm, other = _world(2)
    timeline.at(0.9 * NOTICE_S, lambda: _arrive(comm))
    timeline.waiter().wait(_arrive(other), "a reduction")
    _arrive(comm)
    assert comm.iprobe(None, 32_000) is None


def test_root_names_those_who_did_not_come(timeline: Timeline) -> None:
    comm, *others = _world(5)
    timeline.at(3, _waits_at(others[0]))
    # After root's own time is up, while it still listens.
    timeline.at(11, _waits_at(others[2]))
    with pytest.raises(TimeoutExpiredError, match="ranks 2, 4 did not come") as caught:
        timeline.waiter().wait(_arrive(comm), "the agreement of step 3")
    assert caught.value.missing == [2, 4]
    assert str(caught.value).startswith("the agreement of step 3 did not complete within 10 s")
    assert 12 <= timeline.now < 12.1


def test_root_tells_everybody(timeline: Timeline) -> None:
    comm, other, absent = _world(3)
    timeline.at(2, _waits_at(other))
    with pytest.raises(TimeoutExpiredError):
        timeline.waiter().wait(_arrive(comm), "x")
    assert _roll_call(_arrive(other))[0].verdict() == (1, [2])
    # Memory is kind: the collective it missed still ends. In the next one it is told, long before its own time is up.
    _arrive(absent)
    late = Timeline()
    with pytest.raises(TimeoutExpiredError, match="rank 2 did not come"):
        late.waiter(1000).wait(_arrive(absent), "y")
    assert late.now < 1.1 * NOTICE_S


def test_root_ends_as_soon_as_another_gave_up(timeline: Timeline) -> None:
    comm, hasty, absent = _world(3)
    timeline.at(2, _waits_at(hasty, expired=True))
    with pytest.raises(TimeoutExpiredError) as caught:
        timeline.waiter(1000).wait(_arrive(comm), "x")
    assert caught.value.missing == [absent.rank]
    assert timeline.now < 5


def test_a_late_root_names_itself(timeline: Timeline) -> None:
    comm, other = _world(2)
    with pytest.raises(TimeoutExpiredError) as caught:
        timeline.waiter().wait(_arrive(other), "x")
    assert caught.value.missing == [0]
    assert "rank 0 did not answer" in str(caught.value)
    assert timeline.now < 10 + 7 * NOTICE_S
    # The collective itself would still end: memory is kind. A receive by root would not.
    roll_call, sequence = _roll_call(_arrive(comm))
    roll_call.collect()
    assert roll_call.someone_gave_up(sequence)
    assert roll_call.absent(sequence) == [0]


def test_who_got_out_after_all_does_not_end_later_collectives(timeline: Timeline) -> None:
    comm, other = _world(2)
    timeline.at(12, lambda: _arrive(comm))
    timeline.waiter().wait(_arrive(other), "x")
    roll_call, sequence = _roll_call(_arrive(comm))
    roll_call.collect()
    assert not roll_call.someone_gave_up(sequence)


def test_many_missing_are_counted(timeline: Timeline) -> None:
    comm, other, *_ = _world(MAX_NAMED + 10)
    timeline.at(1, _waits_at(other))
    with pytest.raises(TimeoutExpiredError, match=r"ranks 2, 3, .* and 8 more did not come") as caught:
        timeline.waiter().wait(_arrive(comm), "x")
    assert len(caught.value.missing) == MAX_NAMED + 8
    verdict = _roll_call(_arrive(other))[0].verdict()
    assert verdict == (MAX_NAMED + 8, list(range(2, MAX_NAMED + 2)))


def test_unneeded_notices_do_not_pile_up() -> None:
    comm, other = _world(2)
    for _ in range(DRAIN_EVERY):
        assert comm.rank == 0
        roll_call, sequence = _roll_call(_arrive(other))
        roll_call.announce(sequence)
        _arrive(comm)
    assert comm.iprobe(None, 32_000) is None


def test_a_message_that_does_not_come_names_its_sender(timeline: Timeline) -> None:
    comm, _ = _world(2)
    with pytest.raises(TimeoutExpiredError, match="rank 1 did not answer") as caught:
        timeline.waiter(2).wait(comm.irecv(bytearray(1), 1, 1), "the plan")
    assert caught.value.missing == [1]
    assert 2 <= timeline.now < 2.1
    for use in (lambda: comm.isend(b"", 1, 1), lambda: _arrive(comm), comm.duplicate, lambda: comm.iprobe(None, 1)):
        with pytest.raises(TimeoutExpiredError, match="the plan did not complete"):
            use()
    comm.free()


def test_a_request_without_a_ticket_is_bounded_too(timeline: Timeline) -> None:
    class Foreign:
        nbytes = 0
        ticket = None

        def test(self) -> bool:
            return False

    with pytest.raises(TimeoutExpiredError) as caught:
        timeline.waiter(2).wait(Foreign(), "something foreign")
    assert caught.value.missing == []
