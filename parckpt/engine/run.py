"""One run in its directory: the plan that is kept, the next name, saving together, taking over what was restored."""

from __future__ import annotations

import json
import logging
import os
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parckpt.core.clock import Clock
from parckpt.core.config import CheckpointConfig
from parckpt.core.manifest import Facts
from parckpt.core.round import Agreement
from parckpt.engine.destination import Destination, Names
from parckpt.engine.group import Group
from parckpt.engine.keeper import Keeper, make_directory
from parckpt.engine.lineage import Cause, Lineage, Moment, make_ticket
from parckpt.engine.local import LocalState
from parckpt.engine.places import Places
from parckpt.engine.planning import Planned, check_replicas, make_plan, node_numbers
from parckpt.engine.restorer import Restorer
from parckpt.engine.rounds import compare_arguments
from parckpt.engine.saver import Saved, Saver, Ticket
from parckpt.engine.schedule import Schedule
from parckpt.engine.staging import Modes
from parckpt.errors import ConfigError, ConfigWarning, ParckptError, StateWarning, StorageError
from parckpt.formats.registry import FORMATS
from parckpt.storage.filesystem import FileSystem
from parckpt.storage.identity import identify

__all__ = ["Prepared", "Run"]

log = logging.getLogger("parckpt")


@dataclass
class Prepared:
    """What a rank has ready before a round.

    Attributes
    ----------
    local : LocalState or None
        The described state, if it was looked at.
    destination : Destination or None
        Where it goes, if that was asked.
    ticket : Ticket or None
        What this rank writes by; on root: a save that was begun on the guess that all agree.
    changed : bool
        The plan or the name does not hold any more.
    error : Exception or None
        Why the call itself is wrong: raised on all ranks, whatever they do.
    failure : Exception or None
        Why the save cannot be made. It counts once all ranks save: then that save fails on all of them.
    """

    local: LocalState | None = None
    destination: Destination | None = None
    ticket: Ticket | None = None
    changed: bool = False
    error: Exception | None = None
    failure: Exception | None = None


class Run:
    """A run's place in a directory. Made collectively, with arguments that are equal on all ranks.

    Attributes
    ----------
    planned : Planned or None
        The plan that holds while no rank's description changes.
    """

    def __init__(
        self,
        group: Group,
        fs: FileSystem,
        clock: Clock,
        config: CheckpointConfig,
        *,
        names: Names,
        directory: str,
        schedule: Schedule,
        destination: Callable[[int], Destination],
    ) -> None:
        self.group, self.fs, self.clock, self.config = group, fs, clock, config
        self.directory, self._schedule = directory, schedule
        self.planned: Planned | None = None
        self._names, self._destination = names, destination
        self._places: Places | None = None
        self._warned: set[str] = set()
        self._saved_step: int | None = None
        # Root: the highest sequence number ever begun. A failed save's is not used again, so neither is its token: what
        # it left behind can never be taken for part of a later one. With chosen names: the highest there is.
        self._begun = 0
        ids = group.bcast(secrets.token_bytes(32) if group.is_root else None)
        self._lineage = Lineage(ids[:16].hex(), ids[16:].hex(), names.family, names.prefix_in_names)
        modes = Modes(config.file_mode, config.dir_mode)
        self._on_root(lambda: self._take_home(modes))
        self._nodes = node_numbers(group)
        self._saver = Saver(
            group,
            fs,
            clock,
            directory,
            FORMATS[config.format],
            crc_check=config.crc_check,
            modes=modes,
            check=lambda: self.keeper.check(),
        )
        # Where warnings are errors, all ranks must get this one.
        self._on_root(self._warn_of_config)

    @property
    def keeper(self) -> Keeper:
        """Root's hold on the present directory."""
        return self.places.present

    @property
    def places(self) -> Places:
        """Root's hold on all directories of the run."""
        assert self._places is not None
        return self._places

    def _take_home(self, modes: Modes) -> None:
        self._places = Places(self.fs, lambda path: self._take(path, modes), self.directory)
        if self._lineage.prefix is not None:
            self._begun = self._places.highest_sequence()

    def _take(self, directory: str, modes: Modes) -> Keeper:
        make_directory(self.fs, directory, modes.directory)
        return Keeper(
            self.fs,
            directory,
            self._lineage.family,
            identify(os.environ, self._lineage.attempt),
            self.clock,
            stale_s=self.config.lock_stale_s,
            modes=modes,
            retention=self.config.retention_policy,
        )

    # -- saving ---------------------------------------------------------------------------------------------------

    def prepare(self, prepared: Prepared, describe: Callable[[], LocalState], step: int, cause: Cause) -> None:
        """Do before the round what can be done without the others: then the round is all that precedes the writing.

        Not collective. Root begins the save on the guess that all will agree; `drop` takes that back.
        """
        try:
            self._prepare(prepared, describe, step, cause)
        except Exception as error:  # user code and I/O before the first collective; the save carries the outcome
            prepared.failure = error

    def _prepare(self, prepared: Prepared, describe: Callable[[], LocalState], step: int, cause: Cause) -> None:
        prepared.local = describe()
        prepared.changed = self.planned is None or self.planned.digest != prepared.local.digest
        prepared.changed |= not self._schedule.is_agreed
        if not self._names.are_fixed:
            prepared.destination = self._destination(step)
            prepared.changed = True  # all ranks have to compare what they are told
        if prepared.changed or self._lineage.prefix is None:
            return
        if not self.group.is_root:
            prepared.ticket = self._ticket(self._lineage, step, cause)
            return
        assert self.planned is not None
        if self._begun > self._lineage.sequence:
            prepared.changed = True  # a save failed: all ranks have to know the next number
            return
        ticket = self._ticket(self._lineage, step, cause)
        taken, ours = self._taken(ticket)
        if taken and not ours:
            prepared.changed = True  # the name must be changed, which all ranks have to know
            return
        prepared.ticket = replace(ticket, replace=ours)
        self._begun = ticket.facts.sequence
        try:
            self._saver.begin(self.planned, prepared.ticket)
        except Exception as error:
            self._reject(prepared, error)
            raise

    def drop(self, prepared: Prepared) -> None:
        """Root: a save that was begun on a guess does not happen. Not collective."""
        if prepared.ticket is not None and self.group.is_root:
            self._reject(prepared, ConfigError("the ranks did not agree to save"))
        prepared.ticket = None

    def _reject(self, prepared: Prepared, error: Exception) -> None:
        assert prepared.ticket is not None
        self._saver.reject(self._saver.staging(prepared.ticket), error)
        prepared.ticket = None

    def save(
        self, prepared: Prepared, agreed: Agreement, describe: Callable[[], LocalState], step: int, cause: Cause
    ) -> Saved:
        """Make the save that all ranks have agreed on. Collective.

        Raises
        ------
        ParckptError
            The same on all ranks; nothing changed.
        """
        started = self.clock.monotonic()
        if agreed.plan_changed or agreed.unprepared or self._lineage.prefix is None:
            self.drop(prepared)
            self._prepare_together(prepared, describe, step, cause)
        ticket = prepared.ticket
        assert ticket is not None
        assert prepared.local is not None
        assert self.planned is not None
        saved = self._saver.save(prepared.local, self.planned, ticket)
        facts, before = ticket.facts, self._saved_step
        self._saved_step = facts.step
        self._lineage = replace(self._lineage, prefix=facts.prefix, sequence=facts.sequence, parent=facts.token)
        if self.group.is_root:
            self._after_publish(saved, facts, before, self.clock.monotonic() - started)
        return saved

    def _prepare_together(
        self, prepared: Prepared, describe: Callable[[], LocalState], step: int, cause: Cause
    ) -> None:
        """Plan anew where something changed, name the save, begin it. Collective."""
        error = prepared.failure
        try:
            if error is None:
                prepared.local = prepared.local or describe()
                prepared.destination = prepared.destination or self._destination(step)
        except Exception as problem:  # user code: the others wait for the outcome
            error = problem
        self.group.agree(error)
        assert prepared.local is not None
        assert prepared.destination is not None
        if not self._names.are_fixed:
            self._go_to(prepared.destination)
        self._plan(prepared.local)
        begun: list[Ticket] = []
        name = prepared.destination.name
        self._on_root(lambda: begun.append(self._begin(step, cause, name)))
        header: bytes | None = None
        if begun:
            facts = begun[0].facts
            header = json.dumps([facts.prefix, facts.sequence, facts.stem, facts.steps_per_epoch]).encode("utf-8")
        prefix, sequence, stem, steps_per_epoch = json.loads(self.group.bcast(header))
        self._schedule.agree_on(steps_per_epoch)
        self._lineage = replace(self._lineage, prefix=prefix, sequence=sequence - 1)
        name = None if name is None else stem
        try:
            # Appended values may be read by user code, on every rank.
            prepared.ticket = self.group.run(
                lambda: begun[0] if begun else self._ticket(self._lineage, step, cause, name)
            )
        except ParckptError as problem:
            for ticket in begun:
                self._saver.reject(self._saver.staging(ticket), problem)
            raise

    def _go_to(self, destination: Destination) -> None:
        """Save to where the program wants it, if all ranks say the same. Collective.

        Raises
        ------
        ConfigError
            On all ranks: they do not; it names what was returned, and the ranks.
        LockedError, StorageError
            The directory cannot be had; the run stays in the one before.
        """
        compare_arguments(
            self.group, {"what prefix returned": destination.name, "what directory returned": destination.directory}
        )
        if destination.directory == self.directory:
            return
        self._on_root(lambda: self.places.enter(destination.directory))
        self.directory = self._saver.directory = destination.directory

    def _plan(self, local: LocalState) -> None:
        changed = self.planned is None or self.planned.digest != local.digest
        if self.group.reduce_max(np.array([changed], np.int64))[0]:
            self.planned = None
            planned = make_plan(
                self.group,
                local,
                self._nodes,
                integrated=self.config.is_integrated,
                remove_redundancy=self.config.remove_redundancy,
                split_replicas=self.config.split_replicas,
                ownership=self.config.ownership,
            )
            if self.config.replica_check != "never":
                check_replicas(self.group, local, planned)
            self.planned = planned
        elif self.config.replica_check == "always":
            assert self.planned is not None
            check_replicas(self.group, local, self.planned)

    def _begin(self, step: int, cause: Cause, name: str | None) -> Ticket:
        """Choose the name and the place in the lineage, and begin. Root only."""
        assert self.planned is not None
        lineage = self._lineage
        if lineage.prefix is None:
            prefix, sequence = self.keeper.numbered_prefix(), self.places.highest_sequence()
            lineage = replace(lineage, prefix=prefix, sequence=sequence)
        lineage = replace(lineage, sequence=max(lineage.sequence, self._begun))
        ticket = self._ticket(lineage, step, cause, name)
        taken, ours = self._taken(ticket)
        number = 0
        while taken and not ours and name is not None:
            number += 1
            ticket = self._ticket(lineage, step, cause, f"{name}_{number}")
            taken, ours = self._taken(ticket)
        if taken and not ours:
            ticket = self._ticket(replace(lineage, prefix=self.keeper.numbered_prefix()), step, cause)
            ours = self._taken(ticket)[1]
        ticket = replace(ticket, replace=ours)
        self._begun = ticket.facts.sequence
        self.places.note_start(lineage.run_id)
        try:
            self._saver.begin(self.planned, ticket)
        except Exception as error:
            self._saver.reject(self._saver.staging(ticket), error)
            raise
        return ticket

    def _ticket(self, lineage: Lineage, step: int, cause: Cause, name: str | None = None) -> Ticket:
        moment = Moment(step, self._schedule.steps_per_epoch, cause, self.clock.wall())
        return make_ticket(lineage, moment, self.config, self.group.size, name)

    def _taken(self, ticket: Ticket) -> tuple[bool, bool]:
        staging = self._saver.staging(ticket)
        path = staging.final_file if ticket.facts.integrated else staging.final_directory
        return self.keeper.taken(path, ticket.facts)

    def _after_publish(self, saved: Saved, facts: Facts, before: int | None, blocked_s: float) -> None:
        """Root: tell, remember, delete what is not kept."""
        gigabytes = saved.nbytes / 1e9
        log.info(
            "saved step %d to %s: %.3g GB in %.2f s (%.3g GB/s), blocked %.2f s, slowest rank %d (%.2f s)",
            facts.step,
            saved.path,
            gigabytes,
            saved.seconds,
            gigabytes / saved.seconds if saved.seconds > 0 else 0.0,
            blocked_s,
            saved.slowest,
            saved.slowest_seconds,
        )
        try:
            self.places.note_published(facts.run_id, facts.step)
        except StorageError as error:
            log.warning("the run file could not be written: %s", error)
        self.keeper.retain(facts.run_id, facts.prefix)
        self.places.leave_behind(facts)
        # Last: where warnings are errors, it ends this.
        if saved.unchanged and before is not None and facts.step > before and self.planned and self.planned.tensors:
            self._warn_unchanged(before, facts.step)
        self._warn_unrated(facts)

    def _warn_unchanged(self, before: int, step: int) -> None:
        assert self.planned is not None
        names = ", ".join(tensor.name for tensor in self.planned.tensors[:8])
        self.warn_once(
            "unchanged",
            f"no tensor has changed between steps {before} and {step} ({names}): were arrays rebound instead of "
            "updated in place? Pass a callable that returns the current ones",
        )

    def _warn_unrated(self, facts: Facts) -> None:
        name = self.config.best_metric
        if self.config.keep_best and name not in facts.metrics:
            self.warn_once(
                "unrated",
                f"step {facts.step} was saved without the metric {name!r}, so keep_best cannot keep it: hand "
                f"metrics={{{name!r}: ...}} to step_end",
            )

    def warn_once(self, about: str, message: str | None) -> None:
        """Root, the first time only: warn of how the run is used. Nothing for None."""
        if message is not None and self.group.is_root and about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, StateWarning, stacklevel=4)

    # -- restoring ------------------------------------------------------------------------------------------------

    def restorer(self, *, required: bool) -> Restorer:
        """A restorer of this run's directories and family."""

        def nothing_found() -> None:
            self.places.home.nothing_found(required=required)
            self.places.home.note_start(self._lineage.run_id)

        return Restorer(
            self.group,
            self.fs,
            lambda: self.places.directories(),
            self._lineage.family,
            any_name=not self._names.are_fixed,
            nothing_found=nothing_found,
            may_mark=True,
        )

    def adopt(self, facts: Facts | None) -> None:
        """Go on as the run that was restored: its id, prefix and place in the lineage. Collective.

        After a fresh start or a foreign file (None) this stays a run of its own.
        """
        self._saved_step = None
        if facts is None:
            return
        highest: list[int] = []
        self._on_root(lambda: highest.append(self.places.highest_sequence()))
        sequence = int(self.group.bcast(str(highest[0]).encode("ascii") if highest else None))
        self._lineage = replace(
            self._lineage, run_id=facts.run_id, prefix=facts.prefix, sequence=sequence, parent=facts.token
        )

    # -- small things ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the directories up. Not collective."""
        if self._places is not None:
            self._places.close()
            self._places = None

    def _on_root(self, step: Callable[[], Any]) -> None:
        """Run something on root; an error is raised on all ranks. Collective."""
        error: Exception | None = None
        if self.group.is_root:
            try:
                step()
            except Exception as problem:  # the other ranks wait for the outcome
                error = problem
        self.group.agree(error)

    def _warn_of_config(self) -> None:
        for message in self.config.warnings:
            warnings.warn(message, ConfigWarning, stacklevel=5)
