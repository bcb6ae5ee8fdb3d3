"""Who has arrived at a collective: asked only when it takes long, so that a time-out can name the missing ranks.

A collective that does not end tells nobody who is absent. So a rank that has waited a while sends root a small notice,
point to point, with the number of the collective it waits in; one that has waited its whole time says so too. Root then
collects notices a little longer and sends everybody the list of those from whom none came. A rank that root does not
answer names root. While nothing is late, no message is sent.

Messages (int64):

* to root, tag `ARRIVAL_TAG`: (kind, number of the collective), kind one of `_WAITING`, `_EXPIRED`, `_RECOVERED`;
* from root, tag `FAILURE_TAG`: (number of the collective, how many are missing, the first `MAX_NAMED` of them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from parckpt.errors import TimeoutExpiredError

if TYPE_CHECKING:
    from parckpt.comm.base import Communicator, Request

__all__ = ["ARRIVAL_TAG", "FAILURE_TAG", "FIRST_RESERVED_TAG", "MAX_NAMED", "RollCall", "Ticket"]

FIRST_RESERVED_TAG = 32_000
"""Tags from here to 32,767, the largest that MPI promises, are parckpt.comm's own."""

ARRIVAL_TAG = FIRST_RESERVED_TAG
FAILURE_TAG = FIRST_RESERVED_TAG + 1
ROOT = 0

MAX_NAMED = 62
"""Missing ranks that are named: the message then has 512 bytes, which every MPI sends without a handshake."""

DRAIN_EVERY = 64
"""Collectives between two looks for notices nobody needed: rare enough to cost nothing, often enough that the
notices of ranks that regularly wait for a slow root do not pile up in its memory."""

_WAITING, _EXPIRED, _RECOVERED = 1, 2, 3


@dataclass(frozen=True)
class Ticket:
    """Who a request waits for.

    Attributes
    ----------
    roll_call : RollCall
        That of the request's communicator.
    sequence : int or None
        Number of the collective on its communicator, equal on all ranks; None for point to point.
    peer : int or None
        The other rank, point to point; None for a collective.
    """

    roll_call: RollCall
    sequence: int | None = None
    peer: int | None = None


class RollCall:
    """Numbers the collectives of one communicator, and knows whether it is still usable.

    A communicator makes one for itself, calls `begin` for each collective and `check` before anything else.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._begun = 0
        self._broken: TimeoutExpiredError | None = None
        self._unsent: list[Request] = []
        # On root: rank -> (highest collective it was seen to wait in, whether its time ran out there).
        self._seen: dict[int, tuple[int, bool]] = {}

    @property
    def broken(self) -> bool:
        """Whether a wait on this communicator ran out, here or (as root told) elsewhere."""
        return self._broken is not None

    @property
    def is_root(self) -> bool:
        """Whether this rank is the one that collects the notices."""
        return self._comm.rank == ROOT

    def check(self) -> None:
        """Raise the error that broke this communicator, if one did: its ranks no longer agree on what comes next."""
        if self._broken is not None:
            raise TimeoutExpiredError(self._broken.message, **self._broken.facts)

    def begin(self) -> Ticket:
        """Number the collective that is about to start."""
        self.check()
        ticket = Ticket(self, sequence=self._begun)
        self._begun += 1
        if self._begun % DRAIN_EVERY == 0 and self.is_root and self._comm.size > 1:
            self.collect()
        return ticket

    def fail(self, message: str, missing: list[int], what: str) -> TimeoutExpiredError:
        """Mark the communicator unusable and return the error to raise."""
        self._broken = TimeoutExpiredError(message, missing=missing, what=what)
        return TimeoutExpiredError(message, missing=missing, what=what)

    # -- ranks other than root -------------------------------------------------------------------------------------

    def announce(self, sequence: int, *, expired: bool = False, recovered: bool = False) -> None:
        """Tell root that this rank waits in a collective, gave up on it, or got out of it after all."""
        kind = _RECOVERED if recovered else _EXPIRED if expired else _WAITING
        self._post(np.array([kind, sequence], np.int64), ROOT, ARRIVAL_TAG)

    def verdict(self) -> tuple[int, list[int]] | None:
        """How many ranks root misses, and the first of them; None while root has said nothing."""
        self._settle()
        if self._comm.iprobe(ROOT, FAILURE_TAG) is None:
            return None
        message = self._take(ROOT, FAILURE_TAG, 2 + MAX_NAMED)
        count = int(message[1])
        return count, [int(rank) for rank in message[2 : 2 + min(count, MAX_NAMED)]]

    # -- root ------------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Receive all notices that have come."""
        self._settle()
        while (found := self._comm.iprobe(None, ARRIVAL_TAG)) is not None:
            kind, sequence = (int(number) for number in self._take(found[0], ARRIVAL_TAG, 2))
            self._seen[found[0]] = (sequence, kind == _EXPIRED)

    def someone_gave_up(self, sequence: int) -> bool:
        """Whether a rank's time ran out in this collective or an earlier one that it is still in."""
        return any(expired and seen <= sequence for seen, expired in self._seen.values())

    def absent(self, sequence: int) -> list[int]:
        """Ranks not known to have come to the collective that somebody gave up on; [0] if that was for root's sake."""
        given_up = min((seen for seen, expired in self._seen.values() if expired), default=sequence)
        wanted = min(given_up, sequence)
        missing = [r for r in range(self._comm.size) if r != ROOT and self._seen.get(r, (-1, False))[0] < wanted]
        # All others were there and yet one gave up: root itself came too late.
        return missing or [ROOT]

    def pronounce(self, sequence: int, missing: list[int]) -> None:
        """Send every other rank the list of the missing, those included: they may only be late."""
        message = np.zeros(2 + MAX_NAMED, np.int64)
        named = missing[:MAX_NAMED]
        message[:2] = sequence, len(missing)
        message[2 : 2 + len(named)] = named
        for rank in range(1, self._comm.size):
            self._post(message, rank, FAILURE_TAG)

    # -- both ------------------------------------------------------------------------------------------------------

    def _post(self, message: NDArray[np.int64], dest: int, tag: int) -> None:
        self._unsent.append(self._comm.isend(message, dest, tag))
        self._settle()

    def _settle(self) -> None:
        self._unsent = [request for request in self._unsent if not request.test()]

    def _take(self, source: int, tag: int, length: int) -> NDArray[np.int64]:
        message = np.zeros(length, np.int64)
        request = self._comm.irecv(message, source, tag)
        # The probe saw the whole message waiting, so this does not depend on anybody else.
        while not request.test():
            pass
        return message
