"""What a start finds of earlier ones: completed saves are published, everything else is removed.

Called on root only, with the directory's lock held. Touches only what is of its own family.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

from parckpt.core import naming
from parckpt.core.manifest import Facts, Manifest, Plan, Record, assemble, coverage
from parckpt.core.naming import parse_hidden
from parckpt.engine.belonging import Owner
from parckpt.engine.catalog import (
    MAX_MANIFEST_NBYTES,
    find_at,
    manifest_stem,
    read_facts,
    scan,
    step_directories,
)
from parckpt.engine.staging import Modes, Staging, discard
from parckpt.errors import FormatError, IntegrityError, StorageError, UnsupportedVersionError
from parckpt.storage.atomic import move_new, read_file, remove_tree
from parckpt.storage.filesystem import FileSystem, try_stat
from parckpt.storage.lock import find_locks

__all__ = ["Swept", "finalize", "judge", "orphan_manifests", "recover"]

log = logging.getLogger("parckpt")


@dataclass(frozen=True)
class Swept:
    """What `recover` did: paths it published, and paths it removed with the reason."""

    published: tuple[str, ...]
    removed: tuple[tuple[str, str], ...]


def recover(fs: FileSystem, directory: str, owner: Owner, check: Callable[[], None], modes: Modes) -> Swept:
    """Finalize what is complete and sweep the rest, but for names at which somebody else is making a checkpoint.

    Parameters
    ----------
    owner : Owner
        What is ours to touch.
    check : callable
        Raises if the lock was lost; called before each publish.
    """
    hidden = [
        _Hidden(name, *parts)
        for name in fs.listdir(directory)
        if (parts := parse_hidden(name)) and owner.owns_hidden(fs, directory, *parts)
    ]
    stems = {one.stem for one in hidden if one.kind != "bad"} | {stem for _, stem in _orphans(fs, directory, owner)}
    # And what is only locked: by a dead one, whose lock goes with the claim.
    stems |= {name for name in find_locks(fs, directory) if name != owner.family and owner.owns(name, None)}
    with ExitStack() as claims:
        # Our own lock keeps out runs of the family; who rewrites has the lock of the new name alone.
        ours = {stem for stem in sorted(stems) if stem == owner.family or claims.enter_context(owner.claim(stem))}
        for stem in sorted(stems - ours):
            log.info("left what is hidden of %s alone: it is being made from another checkpoint", stem)
        # What was listed may have been completed since; at what is there now, nobody is at work.
        names = set(fs.listdir(directory)) if stems else {one.name for one in hidden}
        here = [one for one in hidden if one.name in names and (one.stem in ours or one.kind == "bad")]
        swept = _settle(fs, directory, here, check, modes)
        for name, stem in _orphans(fs, directory, owner) if ours else ():
            if stem in ours:
                fs.unlink(os.path.join(directory, name))
                fs.sync_directory(directory)
    for name in step_directories(fs, directory, naming.PLAN):
        path = os.path.join(directory, name)
        if owner.owns(name, None) or owner.facts_if_ours(fs, os.path.join(path, naming.MANIFEST), name):
            _tidy(fs, path)
    return swept


class _Hidden(NamedTuple):
    name: str
    stem: str
    kind: naming.Kind
    token: str


def _orphans(fs: FileSystem, directory: str, owner: Owner) -> list[tuple[str, str]]:
    """Names and stems of our manifests without data."""
    names = orphan_manifests(fs, directory, lambda path, stem: owner.facts_if_ours(fs, path, stem))
    return [(name, manifest_stem(name) or "") for name in names]


def _settle(
    fs: FileSystem, directory: str, hidden: Sequence[_Hidden], check: Callable[[], None], modes: Modes
) -> Swept:
    """Publish, put back, or remove hidden entries that are ours."""
    published: list[str] = []
    removed: list[tuple[str, str]] = []
    for name, stem, kind, token in hidden:
        if kind == "staging":
            path = os.path.join(directory, name)
            try:
                done, why = finalize(fs, directory, stem, token, check, modes)
            except UnsupportedVersionError as error:
                log.warning("left %s alone: %s", path, error)
                continue
            if done:
                published.append(done)
                log.info("published %s, which an earlier start had completed", done)
            else:
                discard(fs, path, stem, token)
                removed.append((path, why))
                log.info("removed %s: %s", path, why)
    # Only now: a staging directory that was published may be what a replaced one waits for.
    _settle_replaced(fs, directory, [(name, stem, token) for name, stem, kind, token in hidden if kind == "replaced"])
    for name, stem, kind, token in hidden:
        path = os.path.join(directory, name)
        if kind == "trash":
            remove_tree(fs, path)
        elif kind == "bad" and not _names(fs, directory, stem, token):
            fs.unlink(path)
    return Swept(tuple(published), tuple(removed))


def finalize(
    fs: FileSystem, directory: str, stem: str, token: str, check: Callable[[], None], modes: Modes
) -> tuple[str | None, str]:
    """Publish a staging directory if nothing is missing.

    Returns
    -------
    (path, reason)
        The published path, or None and why not.

    Raises
    ------
    StorageError
        Something cannot be read: that proves nothing, so it is neither published nor given up.
    UnsupportedVersionError
        A newer parckpt wrote it.
    """
    manifest, why = judge(fs, directory, stem, token)
    if manifest is None:
        return None, why
    facts = manifest.facts
    path = os.path.join(directory, f".{stem}.staging-{token}")
    check()
    staging = Staging(fs, directory, stem, token, naming.EXTENSIONS[facts.format], modes)
    _drop_stale(fs, os.path.join(path, naming.MANIFEST))
    if facts.integrated:
        _drop_stale(fs, staging.final_manifest)
        return staging.publish_file(manifest.encode(), replace=_replaces(fs, staging.final_file, facts)), ""
    return staging.publish_directory(manifest.encode(), replace=_replaces(fs, staging.final_directory, facts)), ""


def judge(fs: FileSystem, directory: str, stem: str, token: str) -> tuple[Manifest | None, str]:
    """Say whether a staging directory can be published, without touching it.

    Returns
    -------
    (manifest, reason)
        The manifest it would get, or None and why it cannot be published.
    """
    path = os.path.join(directory, f".{stem}.staging-{token}")
    try:
        if try_stat(fs, os.path.join(path, naming.ABORTED)) is not None:
            return None, "the save was rejected"
        if try_stat(fs, os.path.join(path, naming.REWRITING)) is not None:
            return None, "a convert, merge, split or copy was interrupted"
        plan = Plan.decode(_read(fs, os.path.join(path, naming.PLAN)), path)
        if plan.facts.token != token or plan.facts.stem != stem:
            return None, "its plan belongs to another save"
    except UnsupportedVersionError:
        raise
    except (IntegrityError, FormatError, StorageError) as error:
        if isinstance(error, StorageError) and error.errno != errno.ENOENT:
            raise
        return None, f"its plan cannot be read: {error}"
    records = _records(fs, path, plan)
    missing = coverage(plan, [record.rank for record in records])
    if missing.boxes or (missing.per_rank and plan.facts.kind != "breakpoint"):
        lacking = [*missing.boxes, *missing.per_rank]
        return None, f"it is incomplete: {lacking[0]}" + (f" and {len(lacking) - 1} more" * (len(lacking) > 1))
    rival = _rival(fs, directory, plan.facts)
    if rival is not None:
        return None, f"{rival} was published since"
    staging = Staging(fs, directory, stem, token, naming.EXTENSIONS[plan.facts.format])
    final = staging.final_file if plan.facts.integrated else staging.final_directory
    if try_stat(fs, final) is not None and not _replaces(fs, final, plan.facts):
        return None, f"{final} is another checkpoint"
    facts = replace(plan.facts, missing=missing.per_rank, reason=plan.facts.reason or "finalized")
    try:
        return assemble(plan, records, facts), ""
    except (IntegrityError, FormatError) as error:
        return None, f"its records do not fit its plan: {error}"


def _records(fs: FileSystem, path: str, plan: Plan) -> list[Record]:
    """The records that belong to the plan and whose files are there in full."""
    found: list[Record] = []
    for rank in range(plan.nfiles):
        record_path = os.path.join(path, naming.rank_directory(rank), naming.RECORD)
        if try_stat(fs, record_path) is None:
            continue
        try:
            record = Record.decode(_read(fs, record_path), record_path)
        except UnsupportedVersionError:
            raise
        except (IntegrityError, FormatError) as error:
            log.warning("a record does not count: %s", error)
            continue
        own = os.path.join(naming.rank_directory(rank), f"{plan.facts.stem}.{naming.EXTENSIONS[plan.facts.format]}")
        stat = try_stat(fs, os.path.join(path, own))
        named = os.path.basename(own) if plan.facts.integrated else own
        fits = (record.token, record.plan_hash, record.rank, record.path) == (
            plan.facts.token,
            plan.facts.plan_hash,
            rank,
            named,
        )
        if fits and stat is not None and stat.nbytes == record.nbytes:
            found.append(record)
    return found


def _rival(fs: FileSystem, directory: str, facts: Facts) -> str | None:
    """A published checkpoint of another attempt at the same or a later step, or a later one of this very name."""
    for found in scan(fs, directory, facts.family):
        other = found.facts
        if other is None:
            continue
        elsewhere = other.attempt != facts.attempt and other.step >= facts.step
        superseded = (other.stem, other.format) == (facts.stem, facts.format) and other.sequence >= facts.sequence
        if elsewhere or superseded:
            return found.path
    return None


def _replaces(fs: FileSystem, path: str, facts: Facts) -> bool:
    """Whether something has the name that these facts may replace."""
    if try_stat(fs, path) is None:
        return False
    found = find_at(fs, path)
    return found is not None and found.facts is not None and facts.may_replace(found.facts)


def _settle_replaced(fs: FileSystem, directory: str, replaced: Sequence[tuple[str, str, str]]) -> None:
    """Of interrupted replacements: the newest goes back to its name, or all go if the new one has it."""
    paths = {name: os.path.join(directory, name) for name, _, _ in replaced}
    facts = {name: read_facts(fs, os.path.join(path, naming.MANIFEST))[0] for name, path in paths.items()}
    age = {name: -1 if known is None else known.sequence for name, known in facts.items()}
    for name, stem, token in sorted(replaced, key=lambda item: age[item[0]], reverse=True):
        final = os.path.join(directory, stem)
        if try_stat(fs, final) is None:
            move_new(fs, paths[name], final)
            fs.sync_directory(directory)
            log.info("put %s back: its replacement was not completed", final)
        elif read_facts(fs, os.path.join(final, naming.MANIFEST))[0] is not None:
            discard(fs, paths[name], stem, token)


def _tidy(fs: FileSystem, path: str) -> None:
    """Remove plan and records of a published directory, where a crash or a failed save left them; the plan last."""
    for name in fs.listdir(path):
        if naming.parse_rank_directory(name) is not None:
            _drop_stale(fs, os.path.join(path, name, naming.RECORD))
    fs.unlink(os.path.join(path, naming.PLAN))


def _names(fs: FileSystem, directory: str, stem: str, token: str) -> bool:
    """Whether a checkpoint with this stem and token is there."""
    paths = [stem, *(f"{stem}.{extension}" for extension in naming.EXTENSIONS.values())]
    found = [find_at(fs, os.path.join(directory, p)) for p in paths if try_stat(fs, os.path.join(directory, p))]
    return any(one is not None and (one.facts is None or one.token == token) for one in found)


def orphan_manifests(fs: FileSystem, directory: str, read: Callable[[str, str], Facts | None]) -> Iterator[str]:
    """Manifests whose data is not there (a crash before the data was renamed), or that do not fit it any more.

    Parameters
    ----------
    read : callable
        Facts of a manifest by its path and stem; None for one that is not looked for, or is damaged: those are kept,
        and reported by whoever reads them.
    """
    for name in fs.listdir(directory):
        stem = manifest_stem(name)
        if stem is None:
            continue
        facts = read(os.path.join(directory, name), stem)
        if facts is None:
            continue
        data = os.path.join(directory, f"{stem}.{naming.EXTENSIONS.get(facts.format, '')}")
        current = find_at(fs, data) if try_stat(fs, data) is not None else None
        orphan = try_stat(fs, data) is None
        outdated = current is not None and current.error is None and current.token != facts.token
        if orphan or outdated:
            yield name


def _drop_stale(fs: FileSystem, path: str) -> None:
    if try_stat(fs, path) is not None:
        fs.unlink(path)


def _read(fs: FileSystem, path: str) -> bytes:
    return read_file(fs, path, MAX_MANIFEST_NBYTES)
