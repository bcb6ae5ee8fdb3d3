"""One writer per directory and prefix: the second job is refused, a dead one's place is taken.

Not collective: one rank of a job holds the lock. Readers take none.

The lock says who may write; it does not stop anybody. So `Lock.check` comes right before every publishing act: a holder
that was asleep for longer than others wait learns there that it was replaced.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone

from parckpt.core.clock import Clock
from parckpt.errors import LockedError, StorageError
from parckpt.storage import lockfile
from parckpt.storage.atomic import write_all
from parckpt.storage.filesystem import FileSystem, opened
from parckpt.storage.identity import Identity, Liveness, process_is_alive
from parckpt.storage.lockfile import LockFile, LockRecord, lock_path

__all__ = ["Lock", "break_lock", "find_locks", "read_lock", "why_replaceable"]

logger = logging.getLogger(__name__)

_MAX_ROUNDS = 20  # of finding a lock, judging it and finding another: each round means that somebody else got on
_LOCK_NAME = re.compile(r"\.(.*)\.lock", re.DOTALL)


class Lock:
    """A lock that this process holds; made by `acquire`.

    Attributes
    ----------
    path : str
        The lock file.
    record : LockRecord
        What it says.
    """

    def __init__(self, fs: FileSystem, directory: str, prefix: str, record: LockRecord, clock: Clock) -> None:
        self.path = lock_path(directory, prefix)
        self.record = record
        self._fs, self._directory, self._prefix, self._clock = fs, directory, prefix, clock
        self._released = False

    @classmethod
    def acquire(
        cls,
        fs: FileSystem,
        directory: str,
        prefix: str,
        identity: Identity,
        clock: Clock,
        stale_s: float,
        *,
        is_alive: Liveness = process_is_alive,
        mode: int = 0o600,
    ) -> Lock:
        """Take the lock of ``prefix`` in ``directory``, which exists.

        Parameters
        ----------
        identity : Identity
            Who takes it.
        stale_s : float
            Seconds without a heartbeat after which a holder whose life cannot be checked from here counts as gone.
        is_alive : callable
            Checks processes of this host.
        mode : int
            Permission bits of the file.

        Raises
        ------
        LockedError
            If another one has it; fact ``holder``.
        """
        path = lock_path(directory, prefix)
        token = secrets.token_hex(16)
        found = None
        for _ in range(_MAX_ROUNDS):
            now = clock.wall()
            found = lockfile.read(fs, path)
            if found is not None:
                reason = why_replaceable(found, identity, now, stale_s, is_alive)
                if reason is None:
                    raise _locked_error(directory, prefix, found, now)
                logger.warning("taking over the lock %s: %s", path, reason)
                if not lockfile.remove_if(fs, path, _same_as(found)):
                    continue
            record = LockRecord(token, identity, now, now)
            if lockfile.create(fs, path, lockfile.encode(record), mode):
                lock = cls(fs, directory, prefix, record, clock)
                lock._sweep(stale_s)
                return lock
        raise _locked_error(directory, prefix, found, clock.wall())

    def check(self) -> None:
        """Make sure that the lock is still this one.

        Raises
        ------
        LockedError
            If another job has taken it, somebody removed it, or it was released.
        """
        found = None if self._released else self._find()
        if found is None or not self._is_mine(found):
            raise _locked_error(self._directory, self._prefix, found, self._clock.wall(), lost=True)

    def refresh(self) -> None:
        """Write a new heartbeat.

        It goes through a descriptor that was seen to be this lock's own file: had another job moved that aside, the
        bytes would go where nobody looks, not into the other's lock. Not synced: it matters to the living only.

        Raises
        ------
        LockedError
            As `check`.
        """
        self.check()
        record = replace(self.record, heartbeat=self._clock.wall())
        try:
            with opened(self._fs, self.path, os.O_RDWR) as fd:
                if self._is_mine(lockfile.read_open(self._fs, fd)):
                    write_all(self._fs, fd, self.path, lockfile.encode(record), 0)
                    self.record = record
                    return
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
        self.check()  # lost between the two looks; or just being judged, and then the next refresh will do

    def release(self) -> None:
        """Give the lock up; one that was lost is left to its new holder. Does nothing the second time."""
        if self._released:
            return
        self._released = True
        if not lockfile.remove_if(self._fs, self.path, self._is_mine):
            # Somebody may be judging it: then it lies aside, and must not be put back.
            for path in self._mine_aside():
                with suppress(StorageError):
                    self._fs.unlink(path)
        # Else a loss of power could bring it back, and with another boot id nobody can tell that its holder is gone.
        self._fs.sync_directory(self._directory)

    def _is_mine(self, found: LockFile) -> bool:
        return found.record is not None and found.record.token == self.record.token

    def _find(self) -> LockFile | None:
        found = lockfile.read(self._fs, self.path)
        if found is None:
            # Another job that judged an older lock may have moved this one by mistake, and be dead before it put it
            # back. Only what lies aside is put back: a lock that was removed stays removed.
            for path in self._mine_aside():
                lockfile.put_back(self._fs, path, self.path)
            found = lockfile.read(self._fs, self.path)
        return found

    def _mine_aside(self) -> Iterator[str]:
        for path, found in lockfile.debris(self._fs, self.path, "aside"):
            if self._is_mine(found):
                yield path

    def _sweep(self, stale_s: float) -> None:
        """Remove what contenders left that died; best effort, and nothing young: its owner may be at work."""
        with suppress(StorageError):
            for path, found in lockfile.debris(self._fs, self.path):
                if self._clock.wall() - found.mtime > stale_s and not self._is_mine(found):
                    self._fs.unlink(path)


def why_replaceable(
    found: LockFile, identity: Identity, now: float, stale_s: float, is_alive: Liveness = process_is_alive
) -> str | None:
    """Say why ``identity`` may replace the lock that was found, or None if it may not.

    Parameters
    ----------
    now : float
        Seconds since the epoch.
    stale_s : float
        As in `Lock.acquire`.
    """
    record = found.record
    if record is None:
        age_s = now - found.mtime
        return f"it is unreadable and was not touched for {age_s:.0f} s" if age_s > stale_s else None
    holder = record.identity
    if identity.is_later_start_of(holder):
        return f"start {identity.restart_count} of job {holder.job_id} takes over from start {holder.restart_count}"
    if identity.sees_processes_of(holder):
        alive = is_alive(holder.pid, holder.start_time)
        if alive is not None:
            return None if alive else f"process {holder.pid} of this host is gone"
    age_s = now - record.heartbeat
    if age_s < -stale_s:
        # From a clock far ahead of ours, such a heartbeat would hold for ever; the file system's clock is a third one.
        age_s = now - found.mtime
    return f"no heartbeat from {holder.host} for {age_s:.0f} s" if age_s > stale_s else None


def read_lock(fs: FileSystem, directory: str, prefix: str) -> LockFile | None:
    """Read the lock of one prefix; None if nobody holds it. Changes nothing."""
    return lockfile.read(fs, lock_path(directory, prefix))


def break_lock(fs: FileSystem, directory: str, prefix: str, expected: LockFile | None = None) -> bool:
    """Remove a lock by decision of a human; False if there is none.

    Parameters
    ----------
    expected : LockFile, optional
        What `read_lock` gave and the human saw: another one that has come meanwhile, or a heartbeat since, is kept.
    """
    path = lock_path(directory, prefix)
    removed = lockfile.remove_if(fs, path, (lambda found: True) if expected is None else _same_as(expected))
    if removed:
        fs.sync_directory(directory)
    return removed


def find_locks(fs: FileSystem, directory: str) -> list[str]:
    """Return the prefixes that are locked in a directory."""
    matches = (_LOCK_NAME.fullmatch(name) for name in fs.listdir(directory))
    return [match.group(1) for match in matches if match]


def _same_as(judged: LockFile) -> Callable[[LockFile], bool]:
    # To the byte: a heartbeat since then means that the holder lives.
    return lambda found: found.raw == judged.raw


def _locked_error(
    directory: str, prefix: str, found: LockFile | None, now: float, *, lost: bool = False
) -> LockedError:
    place = f"the lock of {directory!r} for prefix {prefix!r}"
    head = f"{place} was lost" if lost else f"{place} is held"
    advice = f"If that run is gone: parckpt unlock {shlex.quote(directory)}"
    record = found.record if found else None
    if record is None:
        what = "it was removed" if found is None and lost else "the lock file is unreadable or changing"
        tail = "" if lost else f". {advice}"
        return LockedError(f"{head}: {what}{tail}", holder=None, directory=directory, prefix=prefix)
    who = record.identity
    since = datetime.fromtimestamp(record.since, timezone.utc).isoformat(timespec="seconds")
    job = f"job {who.job_id!r}" if who.job_id else "no job"
    holder = f"{who.host!r}, process {who.pid}, {job}, since {since}, last heard of {now - record.heartbeat:.0f} s ago"
    facts = asdict(who) | {"since": record.since, "heartbeat": record.heartbeat}
    tail = "" if lost else f". {advice}"
    return LockedError(f"{head}: by host {holder}{tail}", holder=facts, directory=directory, prefix=prefix)
