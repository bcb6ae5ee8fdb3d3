"""Which checkpoints to delete once a new one is published, and why each of the others stays. List in, list out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from parckpt.core import checks
from parckpt.errors import ConfigError, FormatError

__all__ = ["Candidate", "RetentionPolicy", "Verdict"]


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
    is_ephemeral : bool
        Made to live until the next publish.
    step : int
        Global step.
    metrics : mapping
        What `step_end` was told, by name.
    """

    name: str
    sequence: int
    created_s: float
    is_breakpoint: bool = False
    is_consistent: bool = True
    is_set_aside: bool = False
    is_pinned: bool = False
    is_ephemeral: bool = False
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_usable(self) -> bool:
        """Whether a restore would take it."""
        return self.is_consistent and not self.is_set_aside


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint stays, and why (or why not)."""

    candidate: Candidate
    keep: bool
    reason: str


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
        The newest so many breakpoints stay; they are not part of the other rules.
    every_steps : int or None
        Beside those, the first at or after each multiple of so many steps stays for good.
    best : int
        Beside those, so many with the best value of `best_metric` stay; among equal ones the newer.
    best_metric, best_mode : str or None, {"min", "max"}
        What is compared, and which is better. One without that metric, or with NaN, is never best.
    time_to_live_s : float or None
        What is older goes, though the first three rules would keep it; the newest that a restore would take stays.
    """

    count: int | None = 5
    minutes: int | None = None
    breakpoints: int = 2
    every_steps: int | None = None
    best: int = 0
    best_metric: str | None = None
    best_mode: str = "min"
    time_to_live_s: float | None = None

    def judge(self, published: Iterable[Candidate], now_s: float | None = None) -> list[Verdict]:
        """Say of each checkpoint whether it stays, and why.

        Parameters
        ----------
        published : iterable of Candidate
            All there are of one run and prefix, the one just published among them.
        now_s : float, optional
            Wall clock, seconds: for `time_to_live_s`. Default: when the newest was made.

        Returns
        -------
        list of Verdict
            Oldest first. Never all that a restore would take go: of those the newest stays if no other does.
        """
        ordered = sorted(published, key=lambda one: one.sequence)
        usable = [one for one in ordered if one.is_usable]
        newest = usable[-1] if usable else None
        if now_s is None:
            now_s = ordered[-1].created_s if ordered else 0.0
        free = [one for one in ordered if not one.is_set_aside and not one.is_pinned]
        regular = [one for one in free if not one.is_breakpoint and not one.is_ephemeral]
        found = {id(one): Verdict(one, True, _FIXED[one.is_set_aside]) for one in ordered}
        found |= _by_id(self._judge_regular(regular))
        found |= _by_id(self._judge_breakpoints([one for one in free if one.is_breakpoint]))
        found |= _by_id(_judge_ephemeral([one for one in free if one.is_ephemeral], newest))
        for one in free:
            expired = self.time_to_live_s is not None and now_s - one.created_s > self.time_to_live_s
            if expired and one is not newest and found[id(one)].keep:
                found[id(one)] = Verdict(one, False, f"older than time_to_live_s={self.time_to_live_s:g}")
        found |= _by_id([*self._every(regular), *self._best(regular)])
        if newest is not None and not any(found[id(one)].keep for one in usable):
            found[id(newest)] = Verdict(newest, True, "the last one that a restore would take")
        return [found[id(one)] for one in ordered]

    def surplus(self, published: Iterable[Candidate], now_s: float | None = None) -> list[Candidate]:
        """Choose what to delete, oldest first; parameters as of `judge`."""
        return [verdict.candidate for verdict in self.judge(published, now_s) if not verdict.keep]

    def _judge_regular(self, regular: Sequence[Candidate]) -> list[Verdict]:
        if self.count:
            rule = f"keep_checkpoint_max={self.count}"
            first = len(regular) - self.count
            return [
                Verdict(one, True, f"number {len(regular) - at} of the newest {self.count} ({rule})")
                if at >= first
                else Verdict(one, False, f"{_newer(self.count)} ({rule})")
                for at, one in enumerate(regular)
            ]
        if not self.minutes:
            return [Verdict(one, True, "nothing limits their number") for one in regular]
        rule = f"keep_checkpoint_per_n_minutes={self.minutes}"
        thinned = [id(one) for one in _thin_out(regular, 60.0 * self.minutes)]
        return [
            Verdict(one, False, f"within {self.minutes} min of an older one that stays ({rule})")
            if id(one) in thinned
            else Verdict(one, True, f"the newest ({rule})" if one is regular[-1] else f"one per period ({rule})")
            for one in regular
        ]

    def _judge_breakpoints(self, breakpoints: Sequence[Candidate]) -> list[Verdict]:
        rule = f"keep_breakpoints={self.breakpoints}"
        first = len(breakpoints) - self.breakpoints
        return [
            Verdict(one, True, f"among the newest breakpoints ({rule})")
            if at >= first
            else Verdict(one, False, f"{_newer(self.breakpoints)} ({rule})")
            for at, one in enumerate(breakpoints)
        ]

    def _every(self, regular: Sequence[Candidate]) -> list[Verdict]:
        """The first of each window of `every_steps` steps; the window before the first multiple has none."""
        found: dict[int, Verdict] = {}
        for one in regular if self.every_steps else ():
            assert self.every_steps
            window = one.step // self.every_steps
            if window > 0 and one.is_consistent and window not in found:
                start = window * self.every_steps
                why = f"the first at or after step {start} (keep_every_n_steps={self.every_steps})"
                found[window] = Verdict(one, True, why)
        return list(found.values())

    def _best(self, regular: Sequence[Candidate]) -> list[Verdict]:
        if not self.best or self.best_metric is None:
            return []
        name, sign = self.best_metric, 1 if self.best_mode == "min" else -1
        rated = [one for one in regular if one.is_consistent and not math.isnan(one.metrics.get(name, math.nan))]
        rated.sort(key=lambda one: (sign * one.metrics[name], -one.sequence))
        return [
            Verdict(one, True, f"number {place} by {name}={one.metrics[name]:g} (keep_best={self.best})")
            for place, one in enumerate(rated[: self.best], 1)
        ]

    def to_json(self) -> dict[str, Any]:
        """As plain values, for the facts of a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> RetentionPolicy:
        """The reverse, on data from disk; FormatError for anything else. Unknown members are ignored."""
        if not isinstance(data, dict):
            raise FormatError("the stored policy is no object", field="policy")
        given = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        try:
            for name in ("count", "minutes", "every_steps"):
                checks.count(name, given.get(name), none=True)
            for name in ("breakpoints", "best"):
                checks.count(name, given.get(name, 0))
            if given.get("best_metric") is not None:
                checks.text("best_metric", given["best_metric"])
            checks.choice("best_mode", given.get("best_mode", "min"), ("min", "max"))
            if given.get("time_to_live_s") is not None:
                checks.seconds("time_to_live_s", given["time_to_live_s"])
            if (given.get("minutes") or 0) > _MAX_MINUTES:
                raise ConfigError("minutes beyond all time")
        except (ConfigError, OverflowError) as error:
            raise FormatError(f"the stored policy is ill-formed: {error}", field="policy") from error
        return cls(**given)


_MAX_MINUTES = 1 << 53  # of a stored policy, so that seconds are a float
_FIXED = {True: "set aside: neither counted nor deleted", False: "pinned: neither counted nor deleted"}


def _newer(number: int) -> str:
    return "one newer is there" if number == 1 else f"{number} newer ones are there" if number else "none is kept"


def _by_id(verdicts: Iterable[Verdict]) -> dict[int, Verdict]:
    return {id(verdict.candidate): verdict for verdict in verdicts}


def _judge_ephemeral(ephemeral: Sequence[Candidate], newest: Candidate | None) -> list[Verdict]:
    """They go as soon as there is something newer that a restore would take."""
    return [
        Verdict(one, False, "ephemeral, and a newer one is published")
        if newest is not None and newest.sequence > one.sequence
        else Verdict(one, True, "ephemeral: until the next publish")
        for one in ephemeral
    ]


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
