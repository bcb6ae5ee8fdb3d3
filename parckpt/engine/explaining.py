"""Why each checkpoint of a directory exists, stays, goes next, is restored or not; and when the next save is due.

All of it follows from the manifests: they carry the reason of their save and the policies of their run. Nothing is
changed, and no data is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from parckpt.core.manifest import Facts
from parckpt.core.policy import Due, History, SavePolicy
from parckpt.core.retention import Candidate, RetentionPolicy, Verdict
from parckpt.engine.catalog import Found, newest_first
from parckpt.engine.choosing import Request
from parckpt.engine.keeper import candidate_of
from parckpt.engine.survey import is_unreadable, quick_problem
from parckpt.errors import ConfigError, FormatError, UnsupportedVersionError
from parckpt.storage.filesystem import FileSystem

__all__ = ["Explained", "Explanation", "Policies", "explain_family", "read_policies"]

_OLD_REASONS = {
    "steps": "save_checkpoint_steps made it due",
    "seconds": "save_checkpoint_seconds made it due",
    "end": "training ended",
    "asked for": "save_now was called",
    "save_checkpoint": "save_checkpoint was called",
}
"""For manifests of versions that stored no sentence."""


@dataclass(frozen=True)
class Policies:
    """The policies that a checkpoint's run had, or why they are not known."""

    save: SavePolicy | None = None
    keep: RetentionPolicy | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Explained:
    """What there is to say of one checkpoint.

    Attributes
    ----------
    made : str
        Why it exists.
    stays, goes : str or None
        Why it is kept, and why a publish now would delete it; not both None.
    restore : str
        Why a restore takes it, or not.
    """

    found: Found
    made: str
    stays: str | None
    goes: str | None
    restore: str


@dataclass(frozen=True)
class Explanation:
    """All checkpoints of one family, newest first.

    Attributes
    ----------
    restored : Found or None
        What a restore would take, as far as that can be told without reading data.
    restore : str
        What a restore does, in a sentence.
    policies : Policies
        Of the newest checkpoint.
    due : tuple of str
        When the next save is due, soonest first.
    """

    family: str
    checkpoints: tuple[Explained, ...]
    restored: Found | None
    restore: str
    policies: Policies
    due: tuple[str, ...] = field(default_factory=tuple)


def read_policies(facts: Facts) -> Policies:
    """The policies stored with a checkpoint."""
    if not facts.policy:
        return Policies(problem="its manifest does not say by what policy it was saved")
    try:
        return Policies(
            SavePolicy.from_json(facts.policy.get("save")), RetentionPolicy.from_json(facts.policy.get("keep"))
        )
    except FormatError as error:
        return Policies(problem=f"{error.message}: a newer parckpt may have written it")


def explain_family(
    fs: FileSystem,
    directory: str,
    family: str,
    published: Sequence[Found],
    now_s: float,
    run_file: Mapping[str, Any] | None = None,
    elsewhere: Sequence[Found] = (),
    refused: Found | None = None,
) -> Explanation:
    """Explain one family of a directory. Not collective.

    Parameters
    ----------
    published : sequence of Found
        All there are of this family, newest first, as `scan` lists them.
    now_s : float
        Wall clock, seconds.
    run_file : mapping, optional
        What the family's run file says.
    elsewhere : sequence of Found, optional
        Those of the family in the directories that the run went on to: a restore looks there, too.
    refused : Found, optional
        One of the directory, of whatever family, whose manifest the file system refuses to read: a restore fails.

    Raises
    ------
    StorageError
        If something cannot be looked at.
    """
    newest = next((found.facts for found in published if found.facts is not None), None)
    policies = read_policies(newest) if newest is not None else Policies(problem="there is no manifest to tell")
    everything = newest_first([*published, *elsewhere])
    objections = {found.path: _objection(fs, found) for found in everything}
    restored = next((found for found in everything if objections[found.path] is None), None)
    too_new = next((found for found in everything if isinstance(found.error, UnsupportedVersionError)), None)
    if too_new is not None or refused is not None:
        restored = None  # a restore raises: nobody can tell whether that one is the newest
    own = [found for found in published if newest is not None and _is_of_run(found, newest)]
    latest = next((found.facts for found in everything if found.facts is not None), None)
    has_moved = latest != newest  # then the next publish is not here
    verdicts = _verdicts(fs, directory, own, policies, now_s, has_moved=has_moved)
    checkpoints = tuple(
        Explained(
            found,
            _made(found.facts),
            *_fate(found, newest, verdicts.get(found.path), policies),
            _restore(found, restored, objections[found.path], directory),
        )
        for found in published
    )
    if has_moved and latest is not None:
        own, policies = [found for found in everything if _is_of_run(found, latest)], read_policies(latest)
    due = _due(latest, own, policies.save) if latest is not None and policies.save is not None else ()
    return Explanation(
        family,
        checkpoints,
        restored,
        _outcome(everything, restored, refused, too_new, run_file, directory),
        policies,
        due,
    )


def _is_of_run(found: Found, newest: Facts) -> bool:
    """Whether retention looks at it: of the run and prefix that saved last, under its own name."""
    facts = found.facts
    return facts is not None and (facts.run_id, facts.prefix, facts.stem) == (newest.run_id, newest.prefix, found.stem)


def _made(facts: Facts | None) -> str:
    if facts is None:
        return "unknown: its manifest cannot be read"
    said = facts.detail or _OLD_REASONS.get(facts.reason, facts.reason) or "unknown"
    kinds = ["breakpoint"] * (facts.kind == "breakpoint") + ["ephemeral"] * facts.ephemeral
    return f"{', '.join(kinds)}: {said}" if kinds else said


# -- restoring ----------------------------------------------------------------------------------------------------


def _objection(fs: FileSystem, found: Found) -> str | None:
    """Why a restore of the newest does not take it; None if it would."""
    if found.facts is None:
        return found.error.message if found.error is not None else "its manifest is unreadable"
    if found.set_aside is not None:
        return f"set aside: {found.set_aside}"
    problem = quick_problem(fs, found)
    return Request().objection(found.facts) or (problem.message if problem is not None else None)


def _restore(found: Found, restored: Found | None, objection: str | None, directory: str) -> str:
    if objection is not None:
        return f"passed over: {objection}"
    if found is restored:
        return "a restore takes this one: the newest that is whole"
    if restored is None:
        return "not reached: a restore fails before it"
    return f"older than {os.path.relpath(restored.path, directory)}"


def _outcome(
    published: Sequence[Found],
    restored: Found | None,
    refused: Found | None,
    too_new: Found | None,
    run_file: Mapping[str, Any] | None,
    directory: str,
) -> str:
    if refused is not None:
        return f"fails: {os.path.relpath(refused.path, directory)} cannot be read, and may be the newest"
    if too_new is not None:
        return (
            f"fails: {os.path.relpath(too_new.path, directory)} was written by a newer parckpt, and may be the newest"
        )
    if restored is not None and restored.facts is not None:
        return f"takes {os.path.relpath(restored.path, directory)}, step {restored.facts.step}"
    if published:
        return f"fails: none of {len(published)} can be loaded"
    if run_file is not None and run_file.get("published"):
        return "fails: checkpoints were published here, and none is left"
    return "starts afresh: nothing was published here"


# -- keeping ------------------------------------------------------------------------------------------------------


def _verdicts(
    fs: FileSystem, directory: str, own: Sequence[Found], policies: Policies, now_s: float, *, has_moved: bool
) -> dict[str, tuple[Verdict, Verdict]]:
    """By path: what the retention rules say as it is, and after a publish now."""
    if policies.keep is None or not own:
        return {}
    candidates = [candidate_of(fs, directory, found) for found in own]
    newest = max(candidates, key=lambda one: one.sequence)
    created_s = max(now_s, newest.created_s)
    next_one = Candidate("", newest.sequence + 1, created_s, step=newest.step + 1)
    present = policies.keep.judge(candidates, now_s)
    future = present if has_moved else policies.keep.judge([*candidates, next_one], created_s)[:-1]
    return {one.candidate.name: (one, then) for one, then in zip(present, future, strict=True)}


def _fate(
    found: Found, newest: Facts | None, verdicts: tuple[Verdict, Verdict] | None, policies: Policies
) -> tuple[str | None, str | None]:
    """Why it stays, and why it goes at the next publish."""
    if verdicts is not None:
        present, future = verdicts
        return present.reason if present.keep else None, None if future.keep else future.reason
    facts = found.facts
    if found.error is not None and is_unreadable(found.error):
        return "unreadable: neither counted nor deleted", None
    if facts is None or newest is None:
        return "damaged: neither counted nor deleted", None
    if facts.reason == "save_checkpoint":
        return "made by save_checkpoint: no run deletes it", None
    if not _is_of_run(found, newest):
        return f"of another run (prefix {facts.prefix!r}): only that one deletes it", None
    return policies.problem or "unknown", None


# -- the next save ------------------------------------------------------------------------------------------------


def _due(newest: Facts, own: Sequence[Found], policy: SavePolicy) -> tuple[str, ...]:
    counted = newest.counted_step if newest.ephemeral else newest.step
    last = next((f.facts for f in own if f.facts is not None and not f.facts.ephemeral), newest)
    history = History(counted, last.created, newest.step if newest.ephemeral else 0)
    try:
        waiting = list(policy.waiting(history, newest.steps_per_epoch))
    except ConfigError as error:
        return (error.message,)
    if not waiting:
        return ("at the end of training" if policy.is_active else "never: only save_now saves",)
    waiting.sort(key=lambda due: (due.step is None, due.step or 0))
    first = next((due.step for due in waiting if due.step is not None and due.reason != "ephemeral"), None)
    waiting = [due for due in waiting if due.reason != "ephemeral" or first is None or (due.step or 0) < first]
    return tuple(_when(due, newest) for due in waiting)


def _when(due: Due, newest: Facts) -> str:
    if due.step is not None:
        ephemeral = ", ephemeral" if due.reason == "ephemeral" else ""
        return f"at step {max(due.step, newest.step + 1)} ({due.rule}{ephemeral})"
    return f"at the first step end more than {due.seconds:g} s after the last save ({due.rule})"
