"""A clock that stands still until it is told to move."""

from __future__ import annotations

import threading

__all__ = ["ManualClock"]


class ManualClock:
    """`parckpt.core.clock.Clock` for tests; usable from several threads.

    Parameters
    ----------
    wall : float
        Seconds since the epoch at the start; the default lies in November 2023.
    """

    def __init__(self, wall: float = 1.7e9) -> None:
        self._lock = threading.Lock()
        self._wall = wall
        self._monotonic = 0.0

    def wall(self) -> float:
        """Seconds since the epoch."""
        with self._lock:
            return self._wall

    def monotonic(self) -> float:
        """Seconds that were advanced since the clock was made."""
        with self._lock:
            return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        if seconds < 0:
            raise ValueError(f"time cannot go back by {-seconds} s; use jump_wall for the wall clock")
        with self._lock:
            self._wall += seconds
            self._monotonic += seconds

    def sleep(self, seconds: float) -> None:
        """Advance instead of sleeping: for code that takes a ``sleep`` function."""
        self.advance(seconds)

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back, as an administrator or NTP does; monotonic time does not notice."""
        with self._lock:
            self._wall += seconds
