"""Which checkpoints to delete once a new one is published. List in, list out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Candidate", "RetentionPolicy"]


@dataclass(frozen=True)
class Candidate:
    """One published checkpoint of this run and prefix, as its manifest tells.

    Attributes
    ----------
    name : str
        For the caller.
    sequence : int
        Age: the newest has the highest.
    created_s : float
        Wall clock, seconds.
    is_breakpoint, is_consistent : bool
        Saved on an exception or signal; known to hold one step of all ranks.
    is_set_aside, is_pinned : bool
        Found damaged; protected by the user. Neither is counted or deleted.
    """

    name: str
    sequence: int
    created_s: float
    is_breakpoint: bool = False
    is_consistent: bool = True
    is_set_aside: bool = False
    is_pinned: bool = False


@dataclass(frozen=True)
class RetentionPolicy:
    """What stays.

    Attributes
    ----------
    count : int or None
        The newest so many stay. 0 or None: `minutes` decides.
    minutes : int or None
        One per so many minutes stays, and the newest.
    breakpoints : int
        The newest so many breakpoints stay; they are not part of the other two rules.
    """

    count: int | None = 5
    minutes: int | None = None
    breakpoints: int = 2

    def surplus(self, published: Iterable[Candidate]) -> list[Candidate]:
        """Choose what to delete, oldest first.

        Parameters
        ----------
        published : iterable of Candidate
            All there are, the one just published among them.

        Returns
        -------
        list of Candidate
            Never all that a restore would take: the newest consistent one always stays.
        """
        counted = [one for one in published if not one.is_set_aside]
        counted.sort(key=lambda one: one.sequence)
        free = [one for one in counted if not one.is_pinned]
        regular = [one for one in free if not one.is_breakpoint]
        breakpoints = [one for one in free if one.is_breakpoint]
        doomed = self._surplus_regular(regular) + breakpoints[: max(0, len(breakpoints) - self.breakpoints)]
        survivors = [one for one in counted if one not in doomed]
        if not any(one.is_consistent for one in survivors):
            last = next((one for one in reversed(_oldest_first(doomed)) if one.is_consistent), None)
            doomed = [one for one in doomed if one is not last]
        return _oldest_first(doomed)

    def _surplus_regular(self, regular: Sequence[Candidate]) -> list[Candidate]:
        if self.count:
            return list(regular[: max(0, len(regular) - self.count)])
        return _thin_out(regular, 60.0 * self.minutes) if self.minutes else []


def _oldest_first(doomed: Iterable[Candidate]) -> list[Candidate]:
    """Oldest first."""
    return sorted(doomed, key=lambda one: one.sequence)


def _thin_out(regular: Sequence[Candidate], window_s: float) -> list[Candidate]:
    """MindSpore's rule: of those younger than the window, seen from the newest, only the oldest stays.

    It works only where the newest followed its predecessor within the window, and what is exactly as old as the
    window is outside it; survivors can therefore lie closer together than the window is long.
    """
    if len(regular) < 2:
        return []
    *earlier, newest = regular
    if newest.created_s - earlier[-1].created_s >= window_s:
        return []
    young = [one for one in earlier if newest.created_s - one.created_s < window_s]
    return young[1:]
