"""What is in a checkpoint directory beside checkpoints: locks, run files, debris, foreign files. Nothing is changed.

Made for people who look at a directory, so an odd entry is described, never an error.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from parckpt.core import naming
from parckpt.core.manifest import Facts
from parckpt.core.naming import parse_hidden
from parckpt.engine.belonging import facts_of_hidden
from parckpt.engine.catalog import Found, find_at, read_facts
from parckpt.engine.sweep import judge, orphan_manifests
from parckpt.errors import (
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    IntegrityError,
    ParckptError,
    StorageError,
    TruncatedError,
    UnsupportedVersionError,
)
from parckpt.formats.registry import FORMATS
from parckpt.storage.atomic import read_file
from parckpt.storage.filesystem import FileSystem, try_stat
from parckpt.storage.identity import identify, process_is_alive
from parckpt.storage.lock import read_lock, why_replaceable
from parckpt.storage.lockfile import LockFile

__all__ = [
    "Debris",
    "Foreign",
    "Holder",
    "data_files",
    "debris",
    "foreign_entries",
    "holder_of",
    "is_unreadable",
    "owns",
    "quick_problem",
    "run_files",
    "total_nbytes",
]

_MAX_RUN_NBYTES = 1 << 16
_EXTENSIONS = tuple(form.extension for form in FORMATS.values())

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.temp-[0-9a-f]{16}", re.DOTALL)

Fate = Literal["publish", "remove", "restore", "keep", "in progress"]


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, and how sure one can be from here.

    Attributes
    ----------
    alive : bool or None
        Whether its process runs; None where that cannot be told from this machine.
    heartbeat_age_s : float
        Seconds since it was last heard of.
    replaceable : str or None
        Why the next start takes the lock over; None: it would be refused.
    found : LockFile
        What was read.
    """

    prefix: str
    host: str
    pid: int
    job_id: str
    cluster: str
    restart_count: int
    since: float | None
    heartbeat: float | None
    heartbeat_age_s: float
    alive: bool | None
    replaceable: str | None
    found: LockFile

    @property
    def readable(self) -> bool:
        """False if the lock file is damaged or half written."""
        return self.found.record is not None


@dataclass(frozen=True)
class Debris:
    """Something that an interrupted save, deletion or replacement left, and what the next start will do with it.

    ``family`` is the one that it names itself; None where that cannot be read.
    """

    name: str
    kind: str
    stem: str
    fate: Fate
    reason: str
    nbytes: int
    mtime: float
    family: str | None = None


@dataclass(frozen=True)
class Foreign:
    """A data file, or a directory of ``rank_<n>`` directories, without a manifest, or with that of another name.

    Attributes
    ----------
    renamed : str or None
        What its manifest says of its name; None: there is no manifest.
    """

    name: str
    path: str
    is_directory: bool
    files: int
    nbytes: int
    mtime: float
    renamed: str | None = None

    @property
    def stem(self) -> str:
        """The name without extension."""
        return self.name if self.is_directory else os.path.splitext(self.name)[0]


def holder_of(fs: FileSystem, directory: str, prefix: str, now: float, stale_s: float) -> Holder | None:
    """Describe who holds the lock of a prefix; None if nobody does.

    Parameters
    ----------
    now : float
        Wall clock, seconds since the epoch.
    stale_s : float
        As `CheckpointConfig.lock_stale_s`.
    """
    found = read_lock(fs, directory, prefix)
    if found is None:
        return None
    # As a stranger to every job: what a batch system may restart is not known here.
    observer = identify({}, "")
    replaceable = why_replaceable(found, observer, now, stale_s)
    record = found.record
    if record is None:
        return Holder(prefix, "", 0, "", "", 0, None, None, now - found.mtime, None, replaceable, found)
    who = record.identity
    return Holder(
        prefix=prefix,
        host=who.host,
        pid=who.pid,
        job_id=who.job_id,
        cluster=who.cluster,
        restart_count=who.restart_count,
        since=record.since,
        heartbeat=record.heartbeat,
        heartbeat_age_s=now - record.heartbeat,
        alive=process_is_alive(who.pid, who.start_time) if observer.sees_processes_of(who) else None,
        replaceable=replaceable,
        found=found,
    )


def run_files(fs: FileSystem, directory: str) -> dict[str, Mapping[str, Any] | None]:
    """Content of each prefix's run file; None where it cannot be read as one."""
    found: dict[str, Mapping[str, Any] | None] = {}
    for name in fs.listdir(directory):
        prefix = name[1:].removesuffix(".run")
        if not name.startswith(".") or name != naming.run_name(prefix):
            continue
        try:
            content = json.loads(read_file(fs, os.path.join(directory, name), _MAX_RUN_NBYTES))
        except (ValueError, RecursionError, ParckptError):
            content = None
        found[prefix] = content if isinstance(content, dict) else None
    return found


def owns(prefix: str, stem: str, family: str | None = None) -> bool:
    """Whether a run with this prefix (or ``save_checkpoint`` with this very name) may touch what has this stem.

    Parameters
    ----------
    family : str, optional
        The family that it names itself, if that is known.
    """
    if family is not None:
        return family == prefix
    return stem == prefix or naming.belongs(stem, prefix)


def debris(fs: FileSystem, directory: str, is_busy: Callable[[str, str | None], bool]) -> list[Debris]:
    """List what is neither a checkpoint nor foreign, with what the next start of its prefix will do with it.

    Parameters
    ----------
    is_busy : callable
        Whether a living process may be at work right now on a stem, of the family that is given where it is known.
    """
    names = fs.listdir(directory)
    found = [item for name in names if (item := _hidden(fs, directory, name, is_busy)) is not None]
    for name in orphan_manifests(fs, directory, lambda path, stem: _facts_or_none(fs, path)):
        facts = _facts_or_none(fs, os.path.join(directory, name))
        stem, family = name.rsplit(".", 2)[0], facts.family if facts is not None else None
        busy = is_busy(stem, family)
        reason = "its data may be on its way" if busy else "the data it describes is not here"
        fate: Fate = "in progress" if busy else "remove"
        found.append(replace(_debris(fs, directory, name, "manifest", stem, fate, reason), family=family))
    for name in names:
        if ".run.temp-" in name or ".lock.aside-" in name or ".lock.temp-" in name:
            stem = name[1:].rsplit(".", 2)[0]
            found.append(_debris(fs, directory, name, "temporary", stem, "remove", "left by an interrupted start"))
    found.extend(_half_written(fs, directory, names))
    return found


def _half_written(fs: FileSystem, directory: str, names: list[str]) -> Iterator[Debris]:
    """Files without a manifest that are being written, or never were to the end; nothing tells which."""
    reason = "half written, of a file without a manifest: if nothing is writing that now, it can be deleted"
    places = ["", *(name for name in names if naming.parse_rank_directory(name) is not None)]
    for place in places:
        try:
            inner = fs.listdir(os.path.join(directory, place)) if place else names
        except StorageError:
            continue
        for name in inner:
            match = _TEMPORARY.fullmatch(name)
            if match is not None and not match["name"].endswith((".run", ".lock")):
                stem = os.path.splitext(match["name"])[0]
                yield _debris(fs, directory, os.path.join(place, name), "temporary", stem, "keep", reason)


def _facts_or_none(fs: FileSystem, manifest_path: str) -> Facts | None:
    try:
        return read_facts(fs, manifest_path)[0]
    except StorageError:
        return None


def _hidden(fs: FileSystem, directory: str, name: str, is_busy: Callable[[str, str | None], bool]) -> Debris | None:
    parts = parse_hidden(name)
    if parts is None:
        return None
    try:
        facts = facts_of_hidden(fs, directory, *parts)
    except StorageError:
        facts = None
    family = facts.family if facts is not None else None
    found = _hidden_of(fs, directory, name, lambda stem: is_busy(stem, family))
    return found and replace(found, family=family)


def _hidden_of(fs: FileSystem, directory: str, name: str, is_busy: Callable[[str], bool]) -> Debris | None:
    parts = parse_hidden(name)
    assert parts is not None
    stem, kind, token = parts
    if kind == "bad":
        if any(_is_marked(fs, path, token) for path in _paths(fs, directory, stem)):
            return None  # the mark of a checkpoint that is there: shown with it
        return _debris(fs, directory, name, "mark", stem, "remove", "the checkpoint it marked is gone")
    if is_busy(stem):
        return _debris(fs, directory, name, kind, stem, "in progress", "who works on it is alive")
    if kind == "staging":
        manifest, why = judge(fs, directory, stem, token)
        reason = "the save is complete, only its publishing was interrupted" if manifest is not None else why
        return _debris(fs, directory, name, kind, stem, "remove" if manifest is None else "publish", reason)
    if kind == "replaced" and try_stat(fs, os.path.join(directory, stem)) is None:
        return _debris(fs, directory, name, kind, stem, "restore", "valid: what was to replace it never took its name")
    reason = "its replacement is in place" if kind == "replaced" else "its deletion was interrupted"
    return _debris(fs, directory, name, kind, stem, "remove", reason)


def _is_marked(fs: FileSystem, path: str, token: str) -> bool:
    """Whether a mark with this token may be that of the checkpoint at a path."""
    try:
        found = find_at(fs, path)
    except StorageError:
        return True
    return found is not None and (found.facts is None or found.token == token)


def _paths(fs: FileSystem, directory: str, stem: str) -> Iterator[str]:
    for name in (stem, *(f"{stem}.{extension}" for extension in naming.EXTENSIONS.values())):
        path = os.path.join(directory, name)
        if try_stat(fs, path) is not None:
            yield path


def _debris(fs: FileSystem, directory: str, name: str, kind: str, stem: str, fate: Fate, reason: str) -> Debris:
    path = os.path.join(directory, name)
    stat = try_stat(fs, path)
    return Debris(name, kind, stem, fate, reason, total_nbytes(fs, path), stat.mtime if stat is not None else 0.0)


def total_nbytes(fs: FileSystem, path: str) -> int:
    """Bytes of a file, or of all files in a directory; what vanishes meanwhile or cannot be read counts nothing."""
    try:
        stat = fs.stat(path)
        if not stat.is_dir:
            return stat.nbytes
        return sum(total_nbytes(fs, os.path.join(path, name)) for name in fs.listdir(path))
    except StorageError:
        return 0


def foreign_entries(fs: FileSystem, directory: str, published: list[Found]) -> list[Foreign]:
    """Data files and directories of rank files in a directory that belong to no published checkpoint."""
    known = {os.path.basename(found.path) for found in published}
    entries: list[Foreign] = []
    names = fs.listdir(directory)
    if naming.rank_directory(0) in names:
        names = [".", *names]
    for name in names:
        path = os.path.normpath(os.path.join(directory, name))
        if name in known or (name.startswith(".") and name != "."):
            continue
        stat = try_stat(fs, path)
        is_data = stat is not None and not stat.is_dir and name.endswith(_EXTENSIONS)
        files = [path] if is_data else _rank_files_or_none(fs, path) if stat is not None and stat.is_dir else []
        if stat is not None and files:
            nbytes = sum(total_nbytes(fs, file) for file in files)
            renamed = _renamed(fs, path) if stat.is_dir else None
            entries.append(Foreign(name, path, stat.is_dir, len(files), nbytes, stat.mtime, renamed))
    return entries


def _renamed(fs: FileSystem, path: str) -> str | None:
    """Why a directory with a manifest does not count as a checkpoint."""
    found = find_at(fs, path)
    if found is None or found.facts is None:
        return None
    try:
        naming.check_name(found.stem)
    except ConfigError:
        return f"no checkpoint can have this name; it was saved as {found.facts.stem!r}"
    return f"it was saved as {found.facts.stem!r}"


def _rank_files_or_none(fs: FileSystem, path: str) -> list[str]:
    try:
        if try_stat(fs, os.path.join(path, naming.rank_directory(0))) is None:
            return []
        return data_files(fs, path)
    except (StorageError, CheckpointNotFoundError, FormatError):
        return []


def data_files(fs: FileSystem, path: str) -> list[str]:
    """The data files of a foreign checkpoint: a file itself, or every data file in its ``rank_<n>`` directories.

    Raises
    ------
    CheckpointNotFoundError
        If there is nothing, or nothing that could be data.
    """
    stat = try_stat(fs, path)
    if stat is None:
        raise CheckpointNotFoundError(f"there is no checkpoint at {path}", path=path)
    if not stat.is_dir:
        return [path]
    ranks = sorted(rank for name in fs.listdir(path) if (rank := naming.parse_rank_directory(name)) is not None)
    found = [
        os.path.join(path, naming.rank_directory(rank), name)
        for rank in ranks
        for name in fs.listdir(os.path.join(path, naming.rank_directory(rank)))
        if name.endswith(_EXTENSIONS)
    ]
    if not found:
        raise CheckpointNotFoundError(f"{path} has neither a manifest nor rank_<n> directories with data", path=path)
    return found


def quick_problem(fs: FileSystem, found: Found) -> ParckptError | None:
    """What can be seen to be wrong with a published checkpoint from its manifest's facts and its files' sizes."""
    if found.error is not None:
        return found.error
    facts = found.facts
    if facts is None:
        return IntegrityError("its manifest is unreadable", path=found.manifest_path)
    try:
        paths = _expected_files(fs, found, facts) if found.is_directory else [found.path]
    except StorageError as error:
        return error
    total = 0
    missing: str | None = None
    for path in paths:
        try:
            total += fs.stat(path).nbytes
        except StorageError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                return error
            missing = missing or path
    if total == facts.nbytes:
        return None
    if missing is not None and facts.kind != "breakpoint":  # which may lack the files of dead ranks
        return TruncatedError(f"{os.path.relpath(missing, found.root)} is missing", path=missing)
    return TruncatedError(f"its data has {total} bytes, its manifest says {facts.nbytes}", path=found.path)


def is_unreadable(error: ParckptError) -> bool:
    """Whether an error proves no damage: refused by the file system, or of a newer version."""
    return isinstance(error, (StorageError, UnsupportedVersionError))


def _expected_files(fs: FileSystem, found: Found, facts: Facts) -> list[str]:
    """A file for each rank; but what was rewritten may have more or fewer files than ranks."""
    name = f"{facts.stem}.{naming.EXTENSIONS.get(facts.format, facts.format)}"
    there = {rank for entry in fs.listdir(found.root) if (rank := naming.parse_rank_directory(entry)) is not None}
    ranks = sorted(there | set(range(1 if facts.integrated else facts.world_size)))
    return [os.path.join(found.root, naming.rank_directory(rank), name) for rank in ranks]
