"""Waiting for a request without burning the core, within a bound, and naming who did not come.

A rank that blocks in MPI burns the core another rank writes with, and Python's signal handlers do not run there; so
every wait is `Request.test` and a short sleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from parckpt.comm.arrival import MAX_NAMED, ROOT, RollCall, Ticket
from parckpt.comm.base import Request
from parckpt.core.clock import Clock
from parckpt.errors import TimeoutExpiredError

__all__ = ["AGREE_TIMEOUT_S", "SystemClock", "Waiter"]

AGREE_TIMEOUT_S = 1800.0
"""Seconds that functions wait for other ranks, unless they are told otherwise."""

SPIN_S = 50e-6
"""An agreement of a few ranks takes 1 to 40 us when all are there: within that, sleeping would be the larger cost."""

MIN_SLEEP_S = 100e-6
MAX_SLEEP_S = 1e-3
"""Long waits poll a thousand times a second: about 1 % of a core, and a signal handler runs within a millisecond."""

NOTICE_S = 1.0
"""A rank that has waited this long tells root that it is there: by then it costs nothing that matters."""


class SystemClock:
    """The machine's clock."""

    def wall(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds since an arbitrary start."""
        return time.monotonic()


class Waiter:
    """Waits for requests, each at most ``timeout_s``.

    Parameters
    ----------
    timeout_s : float
        Bound of one wait, in seconds.
    clock : Clock, optional
        Source of time; the machine's by default.
    sleep : callable, optional
        Sleeps the given number of seconds.
    notice_s : float, optional
        How long to wait before telling root. When time is up, root listens for twice this long before it says who is
        missing, and the others wait for its answer for six times this long. Default 1 s, less for short time-outs.
    """

    def __init__(
        self,
        timeout_s: float,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
        *,
        notice_s: float | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        self.clock: Clock = SystemClock() if clock is None else clock
        self.sleep = sleep
        self.notice_s = min(NOTICE_S, timeout_s / 4) if notice_s is None else notice_s

    def wait(self, request: Request, what: str) -> None:
        """Return when the request is complete.

        Parameters
        ----------
        request : Request
            Begun by this rank.
        what : str
            What is being waited for, for the error: "the agreement of step 300".

        Raises
        ------
        TimeoutExpiredError
            When the time is up, or root told that another rank's was. Fact ``missing``: the ranks that did not come,
            as far as known. The communicator is then unusable and raises this again; the request stays under way.
        """
        if request.test():
            return
        started = self.clock.monotonic()
        if self._poll(request, started, self.notice_s):
            return
        ticket = request.ticket
        if ticket is None or ticket.sequence is None:
            if not self._poll(request, started, self.timeout_s):
                raise self._give_up(ticket, what)
        elif ticket.roll_call.is_root:
            self._wait_as_root(request, ticket.roll_call, ticket.sequence, started, what)
        else:
            self._wait_with_notice(request, ticket.roll_call, ticket.sequence, started, what)

    def _poll(self, request: Request, started: float, limit_s: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Test until complete (True), or until the limit or ``stop`` (False)."""
        pause = MIN_SLEEP_S
        while not request.test():
            elapsed = self.clock.monotonic() - started
            if elapsed >= limit_s or stop():
                return False
            if elapsed >= SPIN_S:
                self.sleep(min(pause, limit_s - elapsed))
                pause = min(2 * pause, MAX_SLEEP_S)
        return True

    def _give_up(self, ticket: Ticket | None, what: str) -> TimeoutExpiredError:
        message = f"{what} did not complete within {self.timeout_s:g} s"
        if ticket is None:
            return TimeoutExpiredError(message, missing=[], what=what)
        peers = [] if ticket.peer is None else [ticket.peer]
        for peer in peers:
            message += f": rank {peer} did not answer"
        return ticket.roll_call.fail(message, peers, what)

    def _wait_as_root(self, request: Request, roll: RollCall, sequence: int, started: float, what: str) -> None:
        def called_off() -> bool:
            roll.collect()
            return roll.someone_gave_up(sequence)

        def listening() -> bool:
            roll.collect()
            return False

        if self._poll(request, started, self.timeout_s, called_off):
            return
        # Those who came just now have not told yet.
        if self._poll(request, self.clock.monotonic(), 2 * self.notice_s, listening):
            return
        missing = roll.absent(sequence)
        roll.pronounce(sequence, missing)
        raise roll.fail(self._describe(len(missing), missing, what), missing, what)

    def _wait_with_notice(self, request: Request, roll: RollCall, sequence: int, started: float, what: str) -> None:
        verdict: tuple[int, list[int]] | None = None

        def told() -> bool:
            nonlocal verdict
            verdict = roll.verdict()
            return verdict is not None

        roll.announce(sequence)
        if self._poll(request, started, self.timeout_s, told):
            return
        if verdict is None:
            roll.announce(sequence, expired=True)
            if self._poll(request, self.clock.monotonic(), 6 * self.notice_s, told):
                roll.announce(sequence, recovered=True)
                return
        if verdict is None:
            message = f"{what} did not complete within {self.timeout_s:g} s: rank {ROOT} did not answer, others unknown"
            raise roll.fail(message, [ROOT], what)
        raise roll.fail(self._describe(verdict[0], verdict[1], what), verdict[1], what)

    def _describe(self, count: int, missing: list[int], what: str) -> str:
        names = ", ".join(str(rank) for rank in missing[:MAX_NAMED])
        more = f" and {count - MAX_NAMED} more" if count > MAX_NAMED else ""
        noun = "rank" if count == 1 else "ranks"
        return f"{what} did not complete within {self.timeout_s:g} s: {noun} {names}{more} did not come"
