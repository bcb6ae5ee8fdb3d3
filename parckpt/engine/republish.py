"""Making a checkpoint appear that was written from another one: staged, published in one act, or nothing at all."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from types import TracebackType

from parckpt.comm.wait import SystemClock
from parckpt.core import naming
from parckpt.core.clock import Clock
from parckpt.core.manifest import Facts
from parckpt.engine.belonging import NAME_STALE_S
from parckpt.engine.catalog import Found, find_at
from parckpt.engine.keeper import Heartbeat, make_directory
from parckpt.engine.pins import pin_path
from parckpt.engine.staging import Modes, Staging, discard
from parckpt.errors import CheckpointExistsError, ConfigError, NoSpaceError, StorageError
from parckpt.storage.atomic import move_new, remove_tree, write_file
from parckpt.storage.filesystem import FileSystem, try_stat
from parckpt.storage.identity import identify
from parckpt.storage.lock import Lock

__all__ = ["Publisher"]

log = logging.getLogger("parckpt")

# Manifest, directories and the pages around files, generously.
_SLACK_NBYTES = 1 << 20


class Publisher:
    """Root's hold on a name that is about to be published. Use as a context manager. Not collective.

    Entering takes the lock of the name, removes what an interrupted attempt left, checks that the name may be taken
    and that there is room, and makes the staging directory; leaving without `publish` removes it.

    Parameters
    ----------
    facts : Facts
        Of the new checkpoint: stem, token, format, and what decides whether it may replace one of this name.
    reading : str
        Path of the checkpoint that is read: never replaced.
    nbytes : int
        Bytes that will be written.
    pin : bool
        Keep it from the retention of a run that works in that directory.

    Raises
    ------
    ConfigError, CheckpointExistsError, NoSpaceError, LockedError, StorageError
        On entering; nothing was written.
    """

    def __init__(
        self,
        fs: FileSystem,
        directory: str,
        facts: Facts,
        *,
        reading: str,
        nbytes: int,
        modes: Modes,
        pin: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.fs, self.directory, self.facts = fs, directory, facts
        self.staging = Staging(fs, directory, facts.stem, facts.token, naming.EXTENSIONS[facts.format], modes)
        self._reading, self._nbytes, self._pin = reading, nbytes, pin
        self._clock = clock if clock is not None else SystemClock()
        self._lock: Lock | None = None
        self._heartbeat: Heartbeat | None = None
        self._pinned = False

    @property
    def final(self) -> str:
        """Where it will be."""
        return self.staging.final_file if self.facts.integrated else self.staging.final_directory

    def __enter__(self) -> Publisher:
        self._check_place()
        make_directory(self.fs, self.directory, self.staging.modes.directory)
        self._check_name()
        identity = identify({}, secrets.token_hex(16))
        mode = self.staging.modes.file
        self._lock = Lock.acquire(
            self.fs, self.directory, self.facts.stem, identity, self._clock, NAME_STALE_S, mode=mode
        )
        try:
            self._sweep()
            self._check_space()
            self._make_staging()
            self._heartbeat = Heartbeat(self._lock, NAME_STALE_S / 4)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def publish(self, manifest: bytes) -> str:
        """Make it exist, durably: every file is written and synced. Returns its path.

        Parameters
        ----------
        manifest : bytes
            Empty for a copy of a checkpoint that has none.
        """
        assert self._lock is not None
        self._lock.check()
        old = self._check_name()
        self._pin_down(old)
        if not self.facts.integrated:
            self.fs.unlink(os.path.join(self.staging.path, naming.REWRITING))
        if not manifest:
            self._publish_bare()
        elif not self.facts.integrated:
            self.staging.publish_directory(manifest, replace=old is not None)
        elif try_stat(self.fs, self.staging.final_manifest) is None:
            self.staging.publish_file(manifest, replace=old is not None)
        else:  # copied once more: the manifest is there, and sound
            self.fs.rename(self._staged_file, self.final)
            self.fs.sync_directory(self.directory)
        if old is not None and old.token != self.facts.token:
            self._clean(lambda: self._drop(self._pin_path(old.token)))
        self._clean(self._drop_replaced)
        return self.final

    @property
    def _staged_file(self) -> str:
        return os.path.join(self.staging.path, self.staging.data_path(0))

    def _publish_bare(self) -> None:
        staging = self.staging
        if self.facts.integrated:
            move_new(self.fs, self._staged_file, self.final)
        else:
            self.fs.sync_directory(staging.path)
            move_new(self.fs, staging.path, self.final)
        self.fs.sync_directory(self.directory)

    def _pin_down(self, old: Found | None) -> None:
        """Before it is there: a moment later the run that works there may already have deleted it."""
        if self._pin or (old is not None and try_stat(self.fs, self._pin_path(old.token)) is not None):
            path = self._pin_path(self.facts.token)
            if try_stat(self.fs, path) is None:
                write_file(self.fs, path, b"", self.staging.modes.file)
                self._pinned = True

    def _pin_path(self, token: str) -> str:
        return pin_path(self.directory, self.facts.stem, token)

    def _drop(self, path: str) -> None:
        if try_stat(self.fs, path) is not None:
            self.fs.unlink(path)

    def _check_place(self) -> None:
        """Within a checkpoint it would be deleted with that, or taken for a file of it."""
        reading, place = os.path.realpath(self._reading), os.path.realpath(self.directory)
        while place != os.path.dirname(place):
            above, name = os.path.split(place)
            found = find_at(self.fs, place) if try_stat(self.fs, os.path.join(place, naming.MANIFEST)) else None
            if found is not None and found.facts is not None:
                raise ConfigError(f"{self.directory} lies within the checkpoint {place}: choose another place")
            if above == reading and naming.parse_rank_directory(name) is not None:
                raise ConfigError(f"{self.directory} lies among the files that are being read: choose another place")
            place = above

    def _check_name(self) -> Found | None:
        """What it replaces, None if the name is free; an error if it must not be replaced."""
        if os.path.realpath(self.final) == os.path.realpath(self._reading):
            raise CheckpointExistsError(f"{self.final} is what is being read", path=self.final)
        if try_stat(self.fs, self.final) is None:
            return None
        old = find_at(self.fs, self.final)
        facts = old.facts if old is not None else None
        if facts is None or (facts.run_id, facts.step) != (self.facts.run_id, self.facts.step):
            raise CheckpointExistsError(
                f"{self.final} exists already and is not the same step of the same run: it is not replaced",
                path=self.final,
            )
        return old

    def _check_space(self) -> None:
        needed, free = self._nbytes + _SLACK_NBYTES, self.fs.free_nbytes(self.directory)
        if free < needed:
            raise NoSpaceError(
                f"{self.directory} has {free} bytes free, {needed} are needed: nothing was written",
                operation="save",
                path=self.directory,
                needed=needed,
                free=free,
            )

    def _make_staging(self) -> None:
        staging = self.staging
        self.fs.mkdir(staging.path, staging.modes.directory)
        write_file(self.fs, os.path.join(staging.path, naming.REWRITING), b"", staging.modes.file)
        self.fs.sync_directory(staging.path)
        self.fs.sync_directory(self.directory)

    def _sweep(self) -> None:
        """What interrupted attempts at this name left; the lock says that none is at work."""
        for name in self.fs.listdir(self.directory):
            parts = naming.parse_hidden(name)
            if parts is None or parts[0] != self.facts.stem:
                continue
            path = os.path.join(self.directory, name)
            if parts[1] == "trash":
                remove_tree(self.fs, path)
            elif parts[1] == "staging" and self._is_rewriting(path):
                discard(self.fs, path, parts[0], parts[2])

    def _drop_replaced(self) -> None:
        """What gave way to an attempt that died meanwhile: it was valid until now."""
        for name in self.fs.listdir(self.directory) if not self.facts.integrated else ():
            parts = naming.parse_hidden(name)
            if parts is not None and parts[:2] == (self.facts.stem, "replaced"):
                discard(self.fs, os.path.join(self.directory, name), parts[0], parts[2])

    def _is_rewriting(self, path: str) -> bool:
        """Whether a staging directory is of a rewriting: a save would have put its plan there before its manifest."""
        names = (naming.REWRITING, naming.MANIFEST, naming.PLAN)
        mark, manifest, plan = (try_stat(self.fs, os.path.join(path, name)) is not None for name in names)
        return mark or (manifest and not plan)

    def _leave(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
        self._clean(self._discard)
        if self._lock is not None:
            self._clean(self._lock.release)

    def _discard(self) -> None:
        """Remove what is not needed, or not any more; what was published and then could not be synced stays, whole."""
        if self._pinned:
            there = find_at(self.fs, self.final) if try_stat(self.fs, self.final) is not None else None
            if there is None or there.token != self.facts.token:
                self._drop(self._pin_path(self.facts.token))
        if try_stat(self.fs, self.staging.path) is not None:
            discard(self.fs, self.staging.path, self.facts.stem, self.facts.token)

    def _clean(self, step: Callable[[], None]) -> None:
        try:
            step()
        except StorageError as error:
            log.warning("%s could not be removed, the next attempt will: %s", self.staging.path, error)
