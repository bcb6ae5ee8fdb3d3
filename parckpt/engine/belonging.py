"""Whose an entry of a checkpoint directory is: several runs and `save_checkpoint` calls may share one.

The family that a plan or manifest names decides. Where there is none to read, the name does; and what has neither
belongs to whoever is alone at work in the directory, since what it is part of may be under way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

from parckpt.core import naming
from parckpt.core.clock import Clock
from parckpt.core.manifest import Facts
from parckpt.engine.catalog import find_at, manifest_stem, read_facts
from parckpt.errors import LockedError, StorageError
from parckpt.storage.filesystem import FileSystem, try_stat
from parckpt.storage.identity import Identity, identify
from parckpt.storage.lock import Lock, find_locks, read_lock, why_replaceable

__all__ = ["NAME_STALE_S", "Owner", "claimed", "facts_of_hidden", "is_alone"]

NAME_STALE_S = 600.0
"""Seconds without a heartbeat after which who has locked a single name, to make a checkpoint there, counts as gone."""


@dataclass(frozen=True)
class Owner:
    """Who is about to clean up.

    Attributes
    ----------
    family : str
        The prefix as the user gave it, or the name that `save_checkpoint` was given.
    alone : callable
        Whether nobody else is at work in the directory.
    one_name : bool
        Only what is called exactly like the family is ours, not what is made of it as a prefix.
    claim : callable
        Takes the lock of a stem for as long as its context lasts; gives False if somebody alive has it.
    """

    family: str
    alone: Callable[[], bool] = lambda: False
    one_name: bool = False
    claim: Callable[[str], AbstractContextManager[bool]] = lambda stem: nullcontext(True)

    def owns(self, stem: str, facts: Facts | None) -> bool:
        """Whether what has this stem is ours to touch, as far as its facts are known."""
        if self.one_name:
            return stem == self.family and (facts is None or facts.family == self.family)
        return naming.belongs(stem, self.family) if facts is None else facts.family == self.family

    def facts_if_ours(self, fs: FileSystem, manifest_path: str, stem: str) -> Facts | None:
        """Facts of a manifest that is ours; None if it is another's or damaged.

        Raises
        ------
        StorageError
            If it cannot be read and its name is ours; what strangers do not let us read is theirs.
        """
        try:
            facts, _ = read_facts(fs, manifest_path)
        except StorageError:
            if self.owns(stem, None):
                raise
            return None
        return facts if facts is not None and self.owns(stem, facts) else None

    def owns_hidden(self, fs: FileSystem, directory: str, stem: str, kind: str, token: str) -> bool:
        """Whether a hidden entry is ours to touch."""
        try:
            facts = facts_of_hidden(fs, directory, stem, kind, token)
        except StorageError:
            return self.owns(stem, None)  # of ours, whoever looks into it next meets the error again
        if self.owns(stem, facts):
            return True
        nameless = facts is None and naming.parse_stem(stem) is None
        return nameless and not self.one_name and self.alone()


def facts_of_hidden(fs: FileSystem, directory: str, stem: str, kind: str, token: str) -> Facts | None:
    """Facts of what a hidden entry is, or was, part of; None where nothing tells.

    Raises
    ------
    StorageError
        If it cannot be looked at.
    """
    path = os.path.join(directory, f".{stem}.{kind}-{token}")
    if kind == "bad":
        names = (stem, *(f"{stem}.{extension}" for extension in naming.EXTENSIONS.values()))
        paths = [os.path.join(directory, name) for name in names]
        found = [one for p in paths if try_stat(fs, p) is not None and (one := find_at(fs, p)) is not None]
        return next((one.facts for one in found if one.token == token), None)
    facts, stat = None, try_stat(fs, path)
    if stat is not None and stat.is_dir:
        facts = read_facts(fs, os.path.join(path, naming.PLAN), "plan")[0]
        facts = facts or read_facts(fs, os.path.join(path, naming.MANIFEST))[0]
    if facts is None and kind == "trash":  # a file's manifest stays beside it until it is gone
        beside = (name for name in fs.listdir(directory) if manifest_stem(name) == stem and f".{token}." in name)
        facts = next((read_facts(fs, os.path.join(directory, name))[0] for name in beside), None)
    return facts


@contextmanager
def claimed(
    fs: FileSystem, directory: str, stem: str, identity: Identity, clock: Clock, stale_s: float, mode: int
) -> Iterator[bool]:
    """Hold the lock of a name; gives False if somebody alive has it, who makes a checkpoint there."""
    lock = None
    with suppress(LockedError):
        lock = Lock.acquire(fs, directory, stem, identity, clock, max(stale_s, NAME_STALE_S), mode=mode)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def is_alone(fs: FileSystem, directory: str, family: str, now: float, stale_s: float) -> bool:
    """Whether no other run or `save_checkpoint` call holds a lock in a directory.

    Ask after listing the directory: who came later has nothing in the list.

    Parameters
    ----------
    now : float
        Wall clock, seconds.
    stale_s : float
        As `CheckpointConfig.lock_stale_s`.
    """
    stranger = identify({}, "")
    locks = [read_lock(fs, directory, name) for name in find_locks(fs, directory) if name != family]
    return all(why_replaceable(found, stranger, now, stale_s) for found in locks if found is not None)
