"""Retention by hand: what of a directory may go by the policy that its runs stored, or by another. Not collective."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from parckpt.core.clock import Clock
from parckpt.core.retention import Candidate, RetentionPolicy, Verdict
from parckpt.engine.catalog import Found, scan
from parckpt.engine.deleting import remove_taken, take_away
from parckpt.engine.keeper import candidate_of
from parckpt.engine.survey import is_unreadable, quick_problem
from parckpt.errors import FormatError, NoSpaceError
from parckpt.storage.filesystem import FileSystem
from parckpt.storage.identity import identify
from parckpt.storage.lock import Lock

__all__ = ["Judged", "Pruned", "Rule", "judge_directory", "prune"]


@dataclass(frozen=True)
class Rule:
    """What stays, where it is not what the run stored.

    Attributes
    ----------
    count, minutes : int or None
        The newest so many, or one per so many minutes, in place of the run's keep_checkpoint_max and
        keep_checkpoint_per_n_minutes; its other rules hold. Both None: as the run stored them all.
    """

    count: int | None = None
    minutes: int | None = None

    def judge(
        self, stored: RetentionPolicy | None, candidates: Sequence[Candidate], now_s: float
    ) -> list[Verdict] | None:
        """Verdicts on one run's checkpoints; None if there is no rule for it."""
        if self.minutes is not None:
            return _thinned(stored or RetentionPolicy(), candidates, self.minutes, now_s)
        if self.count is None:
            return stored.judge(candidates, now_s) if stored is not None else None
        found = replace(stored or RetentionPolicy(), count=self.count, minutes=None).judge(candidates, now_s)
        # In the words of who asked: the run's own keep_checkpoint_max is another number.
        said, meant = f"keep_checkpoint_max={self.count}", f"--keep {self.count}"
        return [replace(one, reason=one.reason.replace(said, meant)) for one in found]


def _thinned(stored: RetentionPolicy, candidates: Sequence[Candidate], minutes: int, now_s: float) -> list[Verdict]:
    """One per so many minutes over the whole history, counted from the oldest; beside it, the run's other rules.

    A run's own keep_checkpoint_per_n_minutes thins out only what is young at each save, which comes to the same when
    it was in force from the start, but not when it comes late.
    """
    unlimited = replace(stored, count=None, minutes=None).judge(candidates, now_s)
    strict = replace(stored, count=1, minutes=None).judge(candidates, now_s)
    newest = max((one.sequence for one in candidates if one.is_usable), default=-1)
    found: list[Verdict] = []
    last = -math.inf
    for loose, tight in zip(unlimited, strict, strict=True):
        one = tight.candidate
        verdict = loose if not loose.keep else tight
        if loose.keep and not tight.keep:
            spaced = one.created_s - last >= 60 * minutes
            why = f"the first in {minutes} min" if spaced else f"within {minutes} min of an older one that stays"
            verdict = Verdict(one, spaced, f"{why} (--minutes {minutes})")
        elif one.sequence == newest:
            verdict = replace(tight, reason="the newest")
        if verdict.keep and not (one.is_breakpoint or one.is_ephemeral or one.is_set_aside):
            last = one.created_s
        found.append(verdict)
    return found


@dataclass(frozen=True)
class Judged:
    """A published checkpoint with the verdict on it.

    Attributes
    ----------
    run : (str, str, str)
        Family, prefix and run id: the checkpoints of one run are judged together, apart from all others.
    """

    found: Found
    run: tuple[str, str, str]
    keep: bool
    reason: str

    @property
    def path(self) -> str:
        """Of the checkpoint."""
        return self.found.path

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.found.facts.nbytes if self.found.facts is not None else 0


@dataclass(frozen=True)
class Pruned:
    """What `prune` did: what it deleted, and what it left after all, with the reason."""

    deleted: tuple[Judged, ...]
    left: tuple[tuple[Judged, str], ...]


def judge_directory(
    fs: FileSystem,
    directory: str,
    family: str | None,
    rule: Rule,
    now_s: float,
    damaged: Mapping[str, str] | None = None,
) -> list[Judged]:
    """Say of every published checkpoint whether it stays. Takes no lock.

    Parameters
    ----------
    family : str, optional
        Only of this prefix.
    now_s : float
        Wall clock, seconds since the epoch.
    damaged : mapping, optional
        Path to reason of what was found damaged by reading it: such are neither counted nor deleted.

    Returns
    -------
    list of Judged
        Newest first within each run. Of each run the newest that a restore would take always stays.
    """
    damaged = damaged or {}
    runs: dict[tuple[str, str, str], list[Found]] = {}
    fixed: list[Judged] = []
    for found in scan(fs, directory, family):
        facts = found.facts
        if facts is None:
            fixed.append(Judged(found, ("", "", ""), True, "its manifest is unreadable: nobody knows whose it is"))
        elif facts.stem != found.stem or os.path.basename(found.path).startswith("."):
            fixed.append(Judged(found, _run_of(found), True, "it was renamed: left alone"))
        else:
            runs.setdefault(_run_of(found), []).append(found)
    for run, members in runs.items():
        fixed += _judge_run(fs, directory, run, members, rule, now_s, damaged)
    return fixed


def prune(
    fs: FileSystem,
    directory: str,
    doomed: Collection[Judged],
    rule: Rule,
    clock: Clock,
    stale_s: float,
    *,
    damaged: Mapping[str, str] | None = None,
    on_deleted: Callable[[Judged], None] = lambda one: None,
) -> Pruned:
    """Delete what was judged so before, if it still is: what a human agreed to, and nothing else.

    Holds the lock of each prefix meanwhile.

    Parameters
    ----------
    doomed : collection of Judged
        From `judge_directory` with the same rule.
    stale_s : float
        As `CheckpointConfig.lock_stale_s`.

    Raises
    ------
    LockedError
        If a run is alive. What was deleted before that, of other prefixes, is gone.
    """
    work = _Pruning(fs, directory, rule, clock, stale_s, damaged, on_deleted)
    for family in sorted({one.run[0] for one in doomed}):
        work.prune_family(family, [one for one in doomed if one.run[0] == family])
    return Pruned(tuple(work.deleted), tuple(work.left))


class _Pruning:
    """One call of `prune`."""

    def __init__(
        self,
        fs: FileSystem,
        directory: str,
        rule: Rule,
        clock: Clock,
        stale_s: float,
        damaged: Mapping[str, str] | None,
        on_deleted: Callable[[Judged], None],
    ) -> None:
        self._fs, self._directory, self._rule, self._clock = fs, directory, rule, clock
        self._stale_s, self._damaged, self._on_deleted = stale_s, damaged, on_deleted
        self.deleted: list[Judged] = []
        self.left: list[tuple[Judged, str]] = []

    def prune_family(self, family: str, doomed: Sequence[Judged]) -> None:
        """Delete what was judged so of one prefix, holding its lock."""
        try:
            lock = self._lock(family)
        except NoSpaceError:
            # Not even room for a lock: that is what somebody who prunes may well have come for. The lock was free a
            # moment ago, or this were another error, and who starts just now cannot write its own. What was judged
            # may go beside a start, too, since that takes the newest: so the first one goes without a lock.
            self._delete_one_of(family, doomed)
            lock = self._lock(family)
        try:
            self._delete(family, doomed, lock.refresh)
        finally:
            lock.release()
        settled = {one.path for one in self.deleted} | {one.path for one, _ in self.left}
        self.left += [(one, "gone already") for one in doomed if one.path not in settled]

    def _lock(self, family: str) -> Lock:
        # As a stranger to every job: this is no restart of the one whose shell it may be typed in.
        identity = identify({}, secrets.token_hex(8))
        return Lock.acquire(self._fs, self._directory, family, identity, self._clock, self._stale_s)

    def _delete_one_of(self, family: str, doomed: Sequence[Judged]) -> None:
        for one in _oldest_first(doomed):
            self._delete(family, [one], lambda: None)
            if self.deleted and self.deleted[-1].path == one.path:
                return

    def _delete(self, family: str, doomed: Sequence[Judged], check: Callable[[], None]) -> None:
        settled = {one.path for one in self.deleted} | {one.path for one, _ in self.left}
        wanted = {(one.path, one.found.token) for one in doomed if one.path not in settled}
        judged = judge_directory(self._fs, self._directory, family, self._rule, self._clock.wall(), self._damaged)
        for one in _oldest_first(judged):
            if (one.path, one.found.token) not in wanted:
                continue
            check()
            trash = None if one.keep else take_away(self._fs, one.found)
            if trash is None:
                self.left.append((one, one.reason if one.keep else "pinned meanwhile"))
                continue
            remove_taken(self._fs, one.found, trash)
            self.deleted.append(one)
            self._on_deleted(one)


def _run_of(found: Found) -> tuple[str, str, str]:
    facts = found.facts
    return (facts.family, facts.prefix, facts.run_id) if facts is not None else ("", "", "")


def _judge_run(
    fs: FileSystem,
    directory: str,
    run: tuple[str, str, str],
    members: list[Found],
    rule: Rule,
    now_s: float,
    damaged: Mapping[str, str],
) -> list[Judged]:
    """One run's checkpoints, newest first as they come."""
    problems: dict[str, str] = {}
    candidates: list[Candidate] = []
    for found in members:
        seen = quick_problem(fs, found)
        problem = damaged.get(found.path) or (seen.message if seen is not None else None)
        candidate = candidate_of(fs, directory, found)
        if problem is not None:
            label = "unreadable" if seen is not None and is_unreadable(seen) else "damaged"
            problems[found.path] = f"{label}: {problem}; neither counted nor deleted"
            candidate = replace(candidate, is_set_aside=True)
        candidates.append(candidate)
    judged = rule.judge(_stored_policy(members), candidates, now_s)
    if judged is None:
        return [Judged(one, run, True, "no policy is stored with it: say --keep or --minutes") for one in members]
    verdicts = {one.candidate.name: one for one in judged}
    return [
        Judged(one, run, verdicts[one.path].keep, problems.get(one.path, verdicts[one.path].reason)) for one in members
    ]


def _stored_policy(members: Iterable[Found]) -> RetentionPolicy | None:
    """The policy of a run's newest checkpoint that has one."""
    for found in members:
        stored = found.facts.policy.get("keep") if found.facts is not None else None
        if stored is not None:
            try:
                return RetentionPolicy.from_json(stored)
            except FormatError as error:
                raise FormatError(f"{found.manifest_path}: {error.message}", path=found.manifest_path) from error
    return None


def _oldest_first(judged: Iterable[Judged]) -> list[Judged]:
    """In the order of deletion: whatever stops it, the newer ones are there."""
    return sorted(judged, key=lambda one: one.found.facts.sequence if one.found.facts is not None else 0)
