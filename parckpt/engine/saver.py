"""One save, from a plan to a published checkpoint, on all ranks together.

Errors never cut a rank out of a collective: each rank does its part, keeps its error, and all raise the same one at
the next agreement.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.clock import Clock
from parckpt.core.manifest import Facts, Plan, Record, assemble
from parckpt.engine.group import Group
from parckpt.engine.local import LocalState
from parckpt.engine.planning import Planned
from parckpt.engine.staging import Modes, Staging
from parckpt.engine.writers import Job, Writers, Written
from parckpt.errors import InternalError, NoSpaceError, ParckptError, StorageError
from parckpt.formats.base import Format
from parckpt.storage.filesystem import FileSystem

__all__ = ["Saved", "Saver", "Ticket"]

log = logging.getLogger("parckpt")

_WIRE = struct.Struct("<?d")  # whether any tensor changed since the last save, and this rank's seconds
# Manifest, records, directories and the pages around them: what a save needs beyond its tensors, generously.
_SLACK_NBYTES = 1 << 20


@dataclass(frozen=True)
class Ticket:
    """What all ranks know of one save before it begins.

    Attributes
    ----------
    facts : Facts
        Of the plan; values are filled in from the records.
    replace : bool
        The name may be replaced: the same step of the same run.
    append : mapping
        Plain values appended to every file.
    marks : mapping
        What MindSpore puts into the file's metadata, where the format has any.
    """

    facts: Facts
    replace: bool = False
    append: Mapping[str, Any] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """What became of a save. Equal on all ranks.

    Attributes
    ----------
    path : str
        Published step directory or file.
    nbytes : int
        Bytes of all data files.
    seconds : float
        On root, from the begin to the publish.
    slowest, slowest_seconds : int, float
        The rank that took longest to write, and how long.
    unchanged : bool
        No tensor differs from the save before.
    reason, detail, ephemeral : str, str, bool
        As in the manifest: why root saved.
    """

    path: str
    nbytes: int
    seconds: float
    slowest: int
    slowest_seconds: float
    unchanged: bool
    reason: str = ""
    detail: str = ""
    ephemeral: bool = False


class Saver:
    """Saves of one format and layout into one directory.

    Parameters
    ----------
    check : callable
        Called on root right before anything is created or published; raises if the directory is no longer ours.
    """

    def __init__(
        self,
        group: Group,
        fs: FileSystem,
        clock: Clock,
        directory: str,
        form: Format,
        *,
        crc_check: bool,
        modes: Modes,
        check: Callable[[], None],
    ) -> None:
        self.group, self.fs, self.clock = group, fs, clock
        self.directory, self.form, self.modes, self.check = directory, form, modes, check
        self._writers = Writers(group, form, crc_check=crc_check)
        self._last: tuple[str, npt.NDArray[np.uint32]] | None = None
        # Every rank's last record, known to root, and this rank's: only what differs in layout is sent again.
        self._known: dict[int, Record] = {}
        self._sent: Record | None = None

    def staging(self, ticket: Ticket) -> Staging:
        """The unpublished directory of a save."""
        extension = self.form.extension.lstrip(".")
        return Staging(self.fs, self.directory, ticket.facts.stem, ticket.facts.token, extension, self.modes)

    def begin(self, planned: Planned, ticket: Ticket) -> None:
        """Root, before any rank writes: check lock and space, make the staging directory with the synced plan."""
        self.check()
        needed, free = planned.nbytes() + _SLACK_NBYTES, self.fs.free_nbytes(self.directory)
        if free < needed:
            raise NoSpaceError(
                f"{self.directory} has {free} bytes free, this checkpoint needs {needed}: nothing was written",
                operation="save",
                path=self.directory,
                needed=needed,
                free=free,
            )
        facts = replace(ticket.facts, plan_hash=planned.hash)
        self.staging(ticket).begin(Plan(facts, planned.tensors, planned.stored_boxes, planned.per_rank_values).encode())

    def save(self, local: LocalState, planned: Planned, ticket: Ticket) -> Saved:
        """Write, record, agree, publish. Collective; `begin` has succeeded on root and all ranks know it.

        Raises
        ------
        ParckptError
            The same on all ranks. The previous checkpoint is untouched, the staging directory is marked as aborted.
        """
        started = self.clock.monotonic()
        staging = self.staging(ticket)
        last = self._last
        try:
            written = self._write(Job(local, planned, ticket.facts, ticket.append, ticket.marks, staging))
            messages = self.group.gather(self._message(written, planned, self.clock.monotonic() - started))
            saved = self._publish(planned, ticket, staging, messages, started)
        except ParckptError as error:
            self._last = last  # the next save is compared with the last that succeeded
            if self.group.is_root:
                self.reject(staging, error)
            raise
        if not ticket.facts.integrated:
            staging.tidy([self.group.rank], root=self.group.is_root)
        return saved

    def reject(self, staging: Staging, error: Exception) -> None:
        """Root: mark a failed save as aborted. What cannot be removed now, the next start sweeps."""
        try:
            staging.abort(f"{type(error).__name__}: {error}")
        except StorageError as problem:
            log.warning("the failed save at %s could not be removed: %s", staging.path, problem)

    def _write(self, job: Job) -> Written | None:
        written: Written | None = None
        error: Exception | None = None
        if job.facts.integrated:
            written, error = self._writers.write_gathered(job)
        else:
            try:
                written = self._writers.write_own(job)
            except Exception as problem:  # whatever it is, the other ranks must hear of it
                error = problem
        self.group.agree(error)
        return written

    def _message(self, written: Written | None, planned: Planned, seconds: float) -> bytes:
        """What root needs of this rank for the manifest; static columns only when the plan is new."""
        if written is None:
            return _WIRE.pack(False, seconds)
        changed = (
            self._last is None
            or self._last[0] != planned.hash
            or not np.array_equal(self._last[1], written.fingerprint)
        )
        self._last = (planned.hash, written.fingerprint.copy())
        known = self._sent is not None and self._sent.same_layout(written.record)
        self._sent = written.record
        return _WIRE.pack(changed, seconds) + written.record.encode(static=not known)

    def _publish(
        self, planned: Planned, ticket: Ticket, staging: Staging, messages: list[bytes], started: float
    ) -> Saved:
        saved: Saved | None = None
        error: Exception | None = None
        if self.group.is_root:
            try:
                saved = self._publish_on_root(planned, ticket, staging, messages, started)
            except Exception as problem:  # the others wait for the outcome
                error = problem
        try:
            self.group.agree(error)
        except ParckptError:
            self._sent = None  # root may not have read it
            raise
        data = self.group.bcast(None if saved is None else json.dumps(asdict(saved)).encode("utf-8"))
        return Saved(**json.loads(data))

    def _publish_on_root(
        self, planned: Planned, ticket: Ticket, staging: Staging, messages: list[bytes], started: float
    ) -> Saved:
        heads = [_WIRE.unpack_from(message) for message in messages]
        records = [
            Record.decode(message[_WIRE.size :], f"record of rank {rank}", self._known.get(rank))
            for rank, message in enumerate(messages)
            if len(message) > _WIRE.size
        ]
        self._known = {record.rank: record for record in records}
        facts = replace(ticket.facts, plan_hash=planned.hash)
        plan = Plan(facts, planned.tensors, planned.stored_boxes, planned.per_rank_values)
        if len(records) != plan.nfiles:
            raise InternalError(f"{len(records)} records for {plan.nfiles} files")
        manifest = assemble(plan, records, facts)
        self.check()
        publish = staging.publish_file if facts.integrated else staging.publish_directory
        path = publish(manifest.encode(), replace=ticket.replace)
        seconds = [head[1] for head in heads]
        slowest = int(np.argmax(seconds))
        unchanged = not any(head[0] for head in heads)
        total = self.clock.monotonic() - started
        why = (facts.reason, facts.detail, facts.ephemeral)
        return Saved(path, manifest.facts.nbytes, total, slowest, seconds[slowest], unchanged, *why)
