"""Root's hold on a checkpoint directory: the lock with its heartbeat, the run file, the names, what to delete."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from parckpt.core import naming
from parckpt.core.clock import Clock
from parckpt.core.manifest import Facts
from parckpt.core.retention import Candidate, RetentionPolicy
from parckpt.engine.belonging import Owner, claimed, is_alone
from parckpt.engine.catalog import Found, find_at, scan
from parckpt.engine.deleting import remove_taken, take_away
from parckpt.engine.pins import is_pinned
from parckpt.engine.staging import Modes
from parckpt.engine.sweep import recover
from parckpt.errors import CheckpointNotFoundError, FileInTheWayError, LockedError, StorageError
from parckpt.storage.atomic import read_file, replace_file
from parckpt.storage.filesystem import FileSystem, opened, try_stat
from parckpt.storage.identity import Identity
from parckpt.storage.lock import Lock

__all__ = ["Heartbeat", "Keeper", "candidate_of", "ephemeral_before", "make_directory", "noted_in"]

log = logging.getLogger("parckpt")

_MAX_RUN_NBYTES = 1 << 16
_MAX_NOTED_NBYTES = 48 << 10  # of directories in the run file: some thousands, of which the oldest are forgotten


@dataclass
class Heartbeat:
    """Refreshes the lock from a thread: a step may take longer than the lock's patience."""

    lock: Lock
    interval_s: float

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="parckpt-heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            try:
                self.lock.refresh()
            except LockedError as error:
                log.error("the lock is lost, the next save will fail: %s", error)
                return
            except StorageError as error:
                log.warning("the lock could not be refreshed: %s", error)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()


class Keeper:
    """What only root does to the directory, between agreements. Nothing here is collective.

    Parameters
    ----------
    family : str
        The prefix as the user gave it; numbered prefixes belong to it.
    """

    def __init__(
        self,
        fs: FileSystem,
        directory: str,
        family: str,
        identity: Identity,
        clock: Clock,
        *,
        stale_s: float,
        modes: Modes,
        retention: RetentionPolicy,
    ) -> None:
        self.fs, self.directory, self.family, self.clock = fs, directory, family, clock
        self.modes, self.retention, self.identity = modes, retention, identity
        self.lock = Lock.acquire(fs, directory, family, identity, clock, stale_s, mode=modes.file)
        self._heartbeat: Heartbeat | None = None
        self._cleaner = ThreadPoolExecutor(1, "parckpt-clean")
        self._cleaning: list[Future[None]] = []
        try:
            owner = Owner(
                family,
                lambda: is_alone(fs, directory, family, clock.wall(), stale_s),
                claim=lambda stem: claimed(fs, directory, stem, identity, clock, stale_s, modes.file),
            )
            recover(fs, directory, owner, self.lock.check, modes)
            self._drop_temporary_files()
            self.run_file: dict[str, Any] | None = self._read_run_file()
            self._heartbeat = Heartbeat(self.lock, stale_s / 4)
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """LockedError if the directory is no longer ours."""
        self.lock.check()

    # -- the run file ---------------------------------------------------------------------------------------------

    def nothing_found(self, *, required: bool) -> None:
        """Called when there is no checkpoint: return if that can be a first start.

        Raises
        ------
        CheckpointNotFoundError
            If one was required, if this job was restarted but its first start left nothing here (an unmounted or a
            wrong directory), or if something was published here and is gone.
        """
        place = f"no checkpoint of {self.family!r} in {self.directory}"
        if required:
            raise CheckpointNotFoundError(f"{place}, and one is required", path=self.directory)
        if self.run_file is None and self.identity.restart_count > 0:
            raise CheckpointNotFoundError(
                f"{place}, and no trace of the first start, though this job was restarted "
                f"{self.identity.restart_count} times: is the right file system mounted, is the path the same?",
                path=self.directory,
            )
        if self.run_file is not None and self.run_file.get("published"):
            raise CheckpointNotFoundError(
                f"{place}, although some were published (the last at step {self.run_file.get('step')}): they were "
                f"deleted or moved; remove {self._run_path()} to start from scratch",
                path=self.directory,
            )

    def note_start(self, run_id: str) -> None:
        """Leave the trace by which a restarted job knows that this is the right directory."""
        if self.run_file is None or "run_id" not in self.run_file:
            self._write_run_file({"run_id": run_id, "published": False, "step": 0, **(self.run_file or {})})

    def note_published(self, run_id: str, step: int) -> None:
        """Remember, durably and once per run, that something was published here."""
        if self.run_file is None or not self.run_file.get("published") or self.run_file.get("run_id") != run_id:
            self._write_run_file({"run_id": run_id, "published": True, "step": step})

    def note_directory(self, path: str) -> None:
        """Remember, durably, that the run goes on in another directory, relative to this one; as the last of all."""
        noted = self.noted_directories()
        if noted[-1:] != [path]:
            noted = [*(one for one in noted if one != path), path]
            while len(json.dumps(noted)) > _MAX_NOTED_NBYTES:
                del noted[: 1 + len(noted) // 8]
            self._write_run_file({"directories": noted})

    def noted_directories(self) -> list[str]:
        """What `note_directory` was told, the last one last."""
        return noted_in(self.run_file)

    def _run_path(self) -> str:
        return os.path.join(self.directory, naming.run_name(self.family))

    def _read_run_file(self) -> dict[str, Any] | None:
        path = self._run_path()
        if try_stat(self.fs, path) is None:
            return None
        try:
            content = json.loads(read_file(self.fs, path, _MAX_RUN_NBYTES))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            log.warning("%s is damaged; it is taken as the trace of an earlier start that published", path)
            return {"published": True, "step": "unknown"}
        return content

    def _write_run_file(self, content: Mapping[str, Any]) -> None:
        content = {**(self.run_file or {}), **content}
        data = json.dumps(content).encode("utf-8")
        replace_file(self.fs, self._run_path(), data, self.modes.file)
        self.run_file = content

    # -- names and lineage ----------------------------------------------------------------------------------------

    def numbered_prefix(self) -> str:
        """The prefix of a run that restored nothing: numbered on where an earlier run used it."""
        names = self.fs.listdir(self.directory)
        directories = [name for name in names if naming.parse_stem(name) is not None]
        return naming.numbered_prefix(self.family, names, directories)

    def highest_sequence(self) -> int:
        """Of everything published in this family; 0 if nothing is."""
        return max((f.facts.sequence for f in scan(self.fs, self.directory, self.family) if f.facts), default=0)

    def taken(self, path: str, facts: Facts) -> tuple[bool, bool]:
        """Whether a name is taken, and whether by what a save with these facts may replace."""
        if try_stat(self.fs, path) is None:
            return False, False
        found = find_at(self.fs, path)
        return True, found is not None and found.facts is not None and facts.may_replace(found.facts)

    # -- retention ------------------------------------------------------------------------------------------------

    def retain(self, run_id: str, prefix: str) -> None:
        """Delete what the policy does not keep, of this run and prefix only. Errors are only logged."""
        try:
            published = {
                one.path: one
                for one in scan(self.fs, self.directory, self.family)
                if one.facts is not None
                and (one.facts.run_id, one.facts.prefix, one.facts.stem) == (run_id, prefix, one.stem)
            }
            candidates = [candidate_of(self.fs, self.directory, one) for one in published.values()]
            for verdict in self.retention.judge(candidates, self.clock.wall()):
                if not verdict.keep:
                    log.info("deleting %s: %s", verdict.candidate.name, verdict.reason)
                    self._delete(published[verdict.candidate.name])
        except StorageError as error:
            log.warning("old checkpoints could not be deleted: %s", error)

    def drop_ephemeral(self, published: Facts) -> None:
        """Delete what was to live only until this publish, which was made in another directory."""
        for one in ephemeral_before(self.fs, self.directory, published):
            log.info("deleting %s: ephemeral, and a newer one is published", one.path)
            self._delete(one)

    def _delete(self, found: Found) -> None:
        """Take away, durably, and remove in the background."""
        trash = take_away(self.fs, found)
        self._cleaning = [future for future in self._cleaning if not future.done()]
        if trash is not None:
            self._cleaning.append(self._cleaner.submit(self._clean, found, trash))

    def _clean(self, found: Found, trash: str) -> None:
        try:
            remove_taken(self.fs, found, trash)
        except StorageError as error:
            log.warning("%s could not be removed, the next start will: %s", trash, error)

    def _drop_temporary_files(self) -> None:
        """What a crash left of writing the run file."""
        start = f"{naming.run_name(self.family)}.temp-"
        for name in self.fs.listdir(self.directory):
            if name.startswith(start):
                self.fs.unlink(os.path.join(self.directory, name))

    def flush(self) -> None:
        """Wait until what was to be deleted is."""
        for future in self._cleaning:
            future.result()
        self._cleaning = []

    def close(self) -> None:
        """Finish deleting, stop the heartbeat, give the lock up."""
        self._cleaner.shutdown(wait=True)
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        self.lock.release()


def noted_in(run_file: Mapping[str, Any] | None) -> list[str]:
    """The directories that a run file says the run went on to, relative to its own, the last one last."""
    noted = (run_file or {}).get("directories")
    if not isinstance(noted, list):
        return []
    return [path for path in noted if isinstance(path, str) and "\0" not in path and not os.path.isabs(path)]


def ephemeral_before(fs: FileSystem, directory: str, published: Facts) -> list[Found]:
    """Ephemeral checkpoints of a run in a directory that are older than one of its own; those set aside stay."""
    return [
        one
        for one in scan(fs, directory, published.family)
        if one.facts is not None
        and one.facts.ephemeral
        and (one.facts.run_id, one.facts.stem) == (published.run_id, one.stem)
        and one.facts.sequence < published.sequence
        and one.set_aside is None
    ]


def candidate_of(fs: FileSystem, directory: str, found: Found) -> Candidate:
    """A published checkpoint with readable facts, as the retention rules see it; its name is its path."""
    facts = found.facts
    assert facts is not None
    return Candidate(
        found.path,
        facts.sequence,
        facts.created,
        is_breakpoint=facts.kind == "breakpoint",
        is_consistent=facts.consistent,
        is_set_aside=found.set_aside is not None or found.error is not None,
        is_pinned=is_pinned(fs, directory, found),
        is_ephemeral=facts.ephemeral,
        step=facts.step,
        metrics=facts.metric_values(),
    )


def make_directory(fs: FileSystem, path: str, mode: int) -> None:
    """Make a directory and its parents, each durable in its own parent; an existing one is left as it is."""
    stat = try_stat(fs, path)
    if stat is not None:
        if not stat.is_dir:
            raise FileInTheWayError(f"{path} is not a directory", errno=errno.ENOTDIR, operation="mkdir", path=path)
        return
    parent = os.path.dirname(path.rstrip("/")) or "."
    make_directory(fs, parent, mode)
    try:
        fs.mkdir(path, mode)
    except StorageError as error:
        if error.errno != errno.EEXIST:
            raise
        return
    with opened(fs, path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        fs.chmod_open(fd, mode)
    fs.sync_directory(parent)
