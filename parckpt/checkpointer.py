"""`ModelCheckpoint`: the life of one run, from its first restore to its last save."""

from __future__ import annotations

import json
import logging
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np

from parckpt.comm.base import Communicator
from parckpt.comm.launch import resolve
from parckpt.comm.wait import SystemClock, Waiter
from parckpt.core import appended, naming
from parckpt.core.clock import Clock
from parckpt.core.config import CheckpointConfig
from parckpt.core.manifest import Facts
from parckpt.core.policy import Decision, History
from parckpt.core.round import Action, Agreement, Call, Voice, merge, pack
from parckpt.core.state import State, flatten
from parckpt.core.target import NameMap, Selection
from parckpt.engine.group import Group
from parckpt.engine.keeper import Keeper, make_directory
from parckpt.engine.local import LocalState
from parckpt.engine.planning import Planned, check_replicas, make_plan, node_numbers
from parckpt.engine.progress import Progress
from parckpt.engine.restorer import Request, Restored, Restorer
from parckpt.engine.saver import Saved, Saver, Ticket
from parckpt.engine.staging import Modes
from parckpt.errors import (
    ConfigError,
    ConfigTypeError,
    ConfigWarning,
    ParckptError,
    RankError,
    StateMismatchError,
    StateWarning,
    StepMismatchError,
    StorageError,
)
from parckpt.formats.registry import FORMATS
from parckpt.signals import deferred_interrupt
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.storage.identity import identify

__all__ = ["ModelCheckpoint"]

log = logging.getLogger("parckpt")


@dataclass(frozen=True)
class _Lineage:
    """Where the next save stands; equal on all ranks."""

    run_id: str
    attempt: str
    prefix: str | None = None
    sequence: int = 0
    parent: str | None = None


@dataclass
class _Prepared:
    """What a rank has ready before the round."""

    local: LocalState | None = None
    ticket: Ticket | None = None
    changed: bool = False
    error: Exception | None = None


class ModelCheckpoint:
    """Saves a training run's state when it is due, and gives it back.

    Collective: all ranks of ``comm`` make one and call its methods; from the thread that owns MPI. The methods that
    communicate are one and the same agreement, so ranks that are in different ones meet instead of hanging.

    Parameters
    ----------
    prefix : str
        Begin of the names.
    directory : str or path-like, optional
        Where checkpoints go; made if it is missing. Default: the working directory.
    config : CheckpointConfig, optional
        Default: ``CheckpointConfig()``.
    comm : mpi4py communicator, parckpt.SELF or Communicator, optional
        Default: ``COMM_WORLD`` when started by a launcher, else this process alone. Duplicated; the caller's is free.
    steps_per_epoch : int, optional
        Turns the global step into epoch and step within it. Default: all is epoch 1.
    clock : Clock, optional
        Asked for everything that depends on time.
    filesystem : FileSystem, optional
        Default: the machine's.

    Raises
    ------
    ConfigError
        On all ranks: arguments differ between ranks, or are impossible.
    LockedError
        Another job writes this prefix in this directory.
    """

    def __init__(
        self,
        prefix: str = "CKP",
        directory: str | os.PathLike[str] | None = None,
        config: CheckpointConfig | None = None,
        *,
        comm: Any = None,
        steps_per_epoch: int | None = None,
        clock: Clock | None = None,
        filesystem: FileSystem | None = None,
    ) -> None:
        self._closed = True  # until all is set up: __del__ and close must not trip over a half-made object
        self.config = _checked_config(config)
        self._clock: Clock = clock if clock is not None else SystemClock()
        self._fs: FileSystem = filesystem if filesystem is not None else PosixFileSystem()
        self._steps_per_epoch = steps_per_epoch
        communicator: Communicator = resolve(comm, os.environ)
        self._group = Group(communicator, Waiter(self.config.agree_timeout_s))
        self._step = 0
        self._history = History(0, self._clock.monotonic())
        self._planned: Planned | None = None
        self._state: State | None = None
        self._spoiled: list[str] = []
        self._failed_in_a_row = 0
        self._warned: set[str] = set()
        self._last_saved_step: int | None = None
        self._updating: int | None = None
        self._keeper: Keeper | None = None
        self.latest_ckpt_file_name = ""
        self.last_decision: Decision | None = None
        try:
            self._open(prefix, directory)
        except BaseException:
            self._group.comm.free()
            raise
        self._closed = False

    def _open(self, prefix: str, directory: str | os.PathLike[str] | None) -> None:
        """Check the arguments over all ranks, take the directory. Collective."""
        error: Exception | None = None
        path = ""
        try:
            self._prefix = naming.check_prefix(prefix)
            path = _checked_directory(directory)
            if self._steps_per_epoch is not None:
                naming.epoch_and_step(1, self._steps_per_epoch)
        except Exception as problem:  # the other ranks wait for the comparison
            error = problem
        self._group.agree(error)
        self.directory = path
        self._compare_arguments()
        attempt = self._group.bcast(secrets.token_bytes(16) if self._group.is_root else None).hex()
        run_id = self._group.bcast(secrets.token_bytes(16) if self._group.is_root else None).hex()
        self._lineage = _Lineage(run_id, attempt)
        modes = Modes(self.config.file_mode, self.config.dir_mode)
        self._on_root(lambda: self._take_directory(modes))
        self._nodes = node_numbers(self._group)
        self._saver = Saver(
            self._group,
            self._fs,
            self._clock,
            self.directory,
            FORMATS[self.config.format],
            crc_check=self.config.crc_check,
            modes=modes,
            check=self._check_lock,
        )
        if self._group.is_root:
            for message in self.config.warnings:
                self._warn(message, ConfigWarning)

    def _compare_arguments(self) -> None:
        """Every rank must have been given the same; ConfigError on all ranks names the first difference."""
        # The directory as it was spelled, made absolute: `rank_<own rank>` in it is MindSpore's habit, not ours.
        mine = {
            "prefix": self._prefix,
            "directory": self.directory,
            "steps_per_epoch": self._steps_per_epoch,
            **self.config.describe(),
        }
        distinct, index = self._group.allgather_distinct(json.dumps(mine, sort_keys=True, default=str).encode("utf-8"))
        if len(distinct) == 1:
            return
        given = [json.loads(data) for data in distinct]
        name = next(name for name in given[0] if any(one[name] != given[0][name] for one in given))
        ranks = [int(np.flatnonzero(index == which)[0]) for which in range(len(distinct))]
        shown = ", ".join(f"{one[name]!r} on rank {rank}" for one, rank in list(zip(given, ranks, strict=True))[:4])
        hint = ""
        if name == "directory" and all(
            os.path.basename(given[which][name].rstrip("/")) == f"rank_{rank}"
            for rank, which in enumerate(index.tolist())
        ):
            hint = "; drop rank_<n>: parckpt makes one directory for all ranks"
        raise ConfigError(f"{name} must be the same on all ranks: {shown}{hint}", parameter=name, ranks=ranks)

    def _take_directory(self, modes: Modes) -> None:
        make_directory(self._fs, self.directory, modes.directory)
        self._keeper = Keeper(
            self._fs,
            self.directory,
            self._prefix,
            identify(os.environ, self._lineage.attempt),
            self._clock,
            stale_s=self.config.lock_stale_s,
            modes=modes,
            retention=self.config.retention_policy,
        )

    def _check_lock(self) -> None:
        if self._keeper is not None:
            self._keeper.check()

    # -- what users call ------------------------------------------------------------------------------------------

    @property
    def should_exit(self) -> bool:
        """Whether all ranks have agreed to stop. Changes only within the calls that communicate."""
        return False

    @property
    def exit_code(self) -> int:
        """Status to end the process with: 0, done."""
        return 0

    def restore(
        self,
        state: State | None = None,
        *,
        step: int | None = None,
        path: str | os.PathLike[str] | None = None,
        only: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name_map: NameMap | None = None,
        strict: bool = True,
        cast: bool = False,
        fallback: bool = True,
        required: bool | None = None,
        atomic: bool = False,
        min_step: int | None = None,
        allow_inconsistent: bool = False,
    ) -> Progress:
        """Fill the state from the newest checkpoint that is whole.

        Collective. Arrays are filled in place, plain values written back where their container can be changed.

        Parameters
        ----------
        state : mapping or callable, optional
            What to fill. Without it every tensor is allocated, whole, on every rank (`Progress.state`).
        step : int, optional
            This step instead of the newest.
        path : str, optional
            This file or directory; the only way to take what has no manifest (MindSpore's files).
        only, exclude : list of str, optional
            Names of the state, shell patterns, or prefixes that end before a dot.
        name_map : mapping or callable, optional
            From the name in the checkpoint to the name in the state.
        strict : bool
            Tensors that only the state, or only the checkpoint, has are an error.
        cast : bool
            Convert other element types instead of refusing them.
        fallback : bool
            Take an older checkpoint where the newest is damaged.
        required : bool, optional
            No checkpoint is an error, not a fresh start.
        atomic : bool
            Fill a second buffer first: a failed restore then leaves the arrays alone.
        min_step : int, optional
            Refuse anything older: the protection against a rolled-back directory.
        allow_inconsistent : bool
            Also take what is not known to be one step of all ranks.

        Returns
        -------
        Progress
            Step 0 for a fresh start, which is an answer only where nothing was ever published.

        Raises
        ------
        StateMismatchError
            Names, shapes or types do not fit; nothing was touched.
        CheckpointNotFoundError
            Nothing was found where something was asked for or once was.
        IntegrityError
            Everything found is damaged; each one's reason is in the message.
        """
        prepared = _Prepared()
        selection = None
        flat = None
        try:
            selection = Selection(only, exclude, name_map, strict, cast)
            flat = None if state is None else flatten(state, writable=True)
        except Exception as error:  # user code and checks before the first collective; the round carries the outcome
            prepared.error = error
        with deferred_interrupt():
            agreed = self._round(Call.RESTORE, self._step, prepared)
            assert agreed.action is Action.RESTORE
            assert selection is not None
            request = Request(
                selection,
                step,
                None if path is None else os.path.abspath(os.fspath(path)),
                fallback,
                atomic,
                min_step,
                allow_inconsistent,
            )
            restorer = Restorer(
                self._group,
                self._fs,
                self.directory,
                self._prefix,
                nothing_found=lambda: self._nothing_found(bool(required)),
                may_mark=True,
            )
            try:
                restored = restorer.restore(flat, request)
            except ParckptError as error:
                self._spoiled = list(error.facts.get("state_touched", ()))
                raise
            self._adopt(restored)
        return restored.progress

    def step_end(
        self, state: State | None = None, step: int | None = None, *, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Tell that a step is done; save if that is due.

        Collective.

        Parameters
        ----------
        state : mapping or callable, optional
            What to save; a callable is called only when a save is decided. Default: the config's ``saved_network``, or
            what was handed in last.
        step : int, optional
            Global step, from 1; may jump. Default: one more than the last.
        metrics : mapping, optional
            Kept for policies that look at them.

        Raises
        ------
        StepMismatchError
            A save is due and the ranks are not at one step.
        ParckptError
            The save failed, on all ranks alike (see ``on_save_error``).
        """
        del metrics
        prepared = _Prepared()
        due = False
        try:
            self._next_step(state, step)
            decision = self._decide(self._step)
            self.last_decision = decision
            due = decision.save and self._group.is_root
            if decision.save:
                self._prepare(prepared, "steps" if self.config.save_checkpoint_steps else "seconds")
        except Exception as error:  # user code before the first collective; the round carries the outcome
            prepared.error = error
        with deferred_interrupt():
            agreed = self._round(Call.STEP, self._step, prepared, due=due)
            if agreed.action is Action.SAVE:
                self._save(prepared, agreed, self.last_decision.reason if self.last_decision else "")

    def save_now(self, state: State | None = None, step: int | None = None) -> str:
        """Save at once, due or not. Collective. Returns the path of what was published."""
        prepared = _Prepared()
        try:
            self._next_step(state, self._step if step is None else step)
            self._prepare(prepared, "asked for")
        except Exception as error:  # user code before the first collective; the round carries the outcome
            prepared.error = error
        with deferred_interrupt():
            agreed = self._round(Call.SAVE, self._step, prepared)
            assert agreed.action is Action.SAVE
            self._save(prepared, agreed, "asked for")
        return self.latest_ckpt_file_name

    def poll(self) -> None:
        """Meet the other ranks without ending a step: in a long evaluation, say. Collective."""
        with deferred_interrupt():
            self._round(Call.POLL, self._step, _Prepared())

    def wait(self) -> None:
        """Return when everything saved so far is published. Collective."""
        with deferred_interrupt():
            self._round(Call.WAIT, self._step, _Prepared())

    @contextmanager
    def updating(self, step: int) -> Iterator[None]:
        """Bracket the part of a step that changes the arrays: outside of it they are a consistent state of ``step``."""
        self._updating = step
        try:
            yield
        finally:
            self._updating = None

    def end(self) -> None:
        """Leave: wait for all ranks to leave, save the last step if it is not saved yet. Collective."""
        if self._closed:
            return
        with deferred_interrupt():
            self._leave(by_error=False)

    def close(self) -> None:
        """Leave without a last save, and free everything. Collective. Does nothing the second time."""
        if self._closed:
            return
        with deferred_interrupt():
            self._closed = True
            try:
                if self._keeper is not None:
                    self._keeper.close()
            finally:
                self._group.comm.free()

    def __enter__(self) -> ModelCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._closed:
                with deferred_interrupt():
                    self._leave(by_error=error is not None)
        except ParckptError as problem:
            if error is None:
                raise
            log.error("leaving after an error, and the other ranks did not follow: %s", problem)
        finally:
            self.close()

    # -- the round ------------------------------------------------------------------------------------------------

    def _round(
        self, call: Call, step: int, prepared: _Prepared, *, due: bool = False, by_error: bool = False
    ) -> Agreement:
        """Agree with the other ranks, whatever call they are in, and raise what all must raise. Collective."""
        if self._closed:
            raise ConfigError("this ModelCheckpoint is closed")
        voice = Voice(
            call=call,
            step=step,
            due=due,
            failed=prepared.error is not None,
            left_by_error=by_error,
            plan_changed=prepared.changed,
            unprepared=prepared.ticket is None and not (prepared.local is not None and not self._group.is_root),
        )
        agreed = merge(self._group.reduce_max(pack(voice)))
        try:
            if agreed.action is Action.FAIL:
                self._group.agree(prepared.error)
            elif agreed.action is Action.MISMATCH:
                self._raise_mismatch(call, step)
            elif agreed.action is Action.PEER_LEFT:
                self._raise_peer_left(call, by_error)
        except ParckptError:
            self._drop(prepared)
            raise
        if agreed.action is not Action.SAVE:
            self._drop(prepared)
        return agreed

    def _raise_mismatch(self, call: Call, step: int) -> None:
        said = [json.loads(data) for data in self._group.allgather(json.dumps([call.name, step]).encode("utf-8"))]
        names = {"STEP": "step_end", "POLL": "poll", "SAVE": "save_now", "WAIT": "wait", "RESTORE": "restore"}
        places: dict[str, list[int]] = {}
        for rank, (name, at) in enumerate(said):
            places.setdefault(f"{names.get(name, 'leaving')} at step {at}", []).append(rank)
        shown = "; ".join(f"{what}: rank{'s' * (len(ranks) > 1)} {_ranks(ranks)}" for what, ranks in places.items())
        raise StepMismatchError(f"the ranks are not at the same place, nothing was saved or restored: {shown}")

    def _raise_peer_left(self, call: Call, by_error: bool) -> None:
        reports = self._group.allgather(b"1" if by_error else b"0")
        left = [rank for rank, report in enumerate(reports) if report == b"1"]
        raise RankError(
            f"rank{'s' * (len(left) > 1)} {_ranks(left)} left because of an exception; see its traceback",
            rank=left[0],
            type="left",
        )

    def _drop(self, prepared: _Prepared) -> None:
        """A save that was begun on a guess does not happen."""
        if prepared.ticket is not None and self._group.is_root:
            self._saver.reject(self._saver.staging(prepared.ticket), ConfigError("the ranks did not agree to save"))
        prepared.ticket = None

    def _leave(self, *, by_error: bool) -> None:
        """Answer the other ranks' rounds until all are leaving; then the last save, unless somebody failed."""
        mishap: ParckptError | None = None
        while True:
            prepared = _Prepared()
            due = False
            try:
                decision = self._decide(self._step, ending=True)
                due = decision.save and not by_error and mishap is None and self._state_or_none() is not None
            except Exception as error:
                prepared.error = error
            try:
                agreed = self._round(Call.LEAVE, self._step, prepared, due=due, by_error=by_error or mishap is not None)
            except ParckptError as error:
                if isinstance(error, TimeoutError):
                    raise
                mishap = error
                continue
            if agreed.action is Action.END:
                break
        if mishap is not None and not by_error:
            raise mishap
        if agreed.left_by_error or not agreed.due:
            return
        if agreed.first_step != agreed.last_step:
            self._raise_mismatch(Call.LEAVE, self._step)
        self._save(_Prepared(), agreed, "end")

    # -- saving ---------------------------------------------------------------------------------------------------

    def _next_step(self, state: State | None, step: int | None) -> None:
        if self._spoiled:
            raise StateMismatchError(
                f"a failed restore has overwritten {', '.join(self._spoiled[:8])}: restore again before going on",
                mismatched=self._spoiled,
            )
        if state is not None:
            self._state = state
        number = self._step + 1 if step is None else step
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise ConfigTypeError(f"step must be an int, not {type(number).__name__}")
        if number < max(1, self._step):
            raise ConfigError(f"step {number} after step {self._step}: steps are global, from 1, and do not go back")
        self._step = int(number)

    def _decide(self, step: int, *, ending: bool = False) -> Decision:
        return self.config.save_policy.decide(step, self._clock.monotonic(), self._history, ending=ending)

    def _state_or_none(self) -> State | None:
        if self._state is not None:
            return self._state
        return _network_state(self.config.saved_network)

    def _describe(self) -> LocalState:
        state = self._state_or_none()
        if state is None:
            raise ConfigError("there is no state to save: hand it to step_end, or give the config a saved_network")
        return LocalState.of(flatten(state, writable=False))

    def _prepare(self, prepared: _Prepared, reason: str) -> None:
        """Do before the round what can be done without the others: then the round is all that precedes the writing."""
        prepared.local = self._describe()
        prepared.changed = self._planned is None or self._planned.digest != prepared.local.digest
        if prepared.changed or self._lineage.prefix is None or not self._group.is_root:
            return
        assert self._planned is not None
        ticket = self._ticket(self._lineage, reason)
        taken, ours = self._taken(ticket)
        if taken and not ours:
            prepared.changed = True  # the name must be changed, which all ranks have to know
            return
        prepared.ticket = replace(ticket, replace=ours)
        try:
            self._saver.begin(self._planned, prepared.ticket)
        except Exception:
            self._saver.reject(self._saver.staging(prepared.ticket), ConfigError("the save could not begin"))
            prepared.ticket = None
            raise

    def _save(self, prepared: _Prepared, agreed: Agreement, reason: str) -> None:
        """The save all ranks have agreed on. Collective."""
        started = self._clock.monotonic()
        try:
            if agreed.plan_changed or agreed.unprepared or self._lineage.prefix is None:
                self._drop(prepared)
                self._prepare_together(prepared, reason)
            local, ticket = prepared.local, prepared.ticket or self._ticket(self._lineage, reason)
            assert local is not None
            assert self._planned is not None
            saved = self._saver.save(local, self._planned, ticket)
        except ParckptError as error:
            self._save_failed(error)
            return
        self._saved(saved, ticket, self._clock.monotonic() - started)

    def _prepare_together(self, prepared: _Prepared, reason: str) -> None:
        """Plan anew where something changed, name the save, begin it. Collective."""
        error: Exception | None = None
        try:
            if prepared.local is None:
                prepared.local = self._describe()
        except Exception as problem:  # user code: the others wait for the outcome
            error = problem
        self._group.agree(error)
        local = prepared.local
        assert local is not None
        changed = self._planned is None or self._planned.digest != local.digest
        if self._group.reduce_max(np.array([changed], np.int64))[0]:
            self._planned = None
            planned = make_plan(
                self._group,
                local,
                self._nodes,
                integrated=self.config.is_integrated,
                remove_redundancy=self.config.remove_redundancy,
                split_replicas=self.config.split_replicas,
            )
            if self.config.replica_check != "never":
                check_replicas(self._group, local, planned)
            self._planned = planned
        elif self.config.replica_check == "always":
            assert self._planned is not None
            check_replicas(self._group, local, self._planned)
        tickets: list[Ticket] = []
        self._on_root(lambda: tickets.append(self._begin_on_root(reason)))
        header = None
        if tickets:
            facts = tickets[0].facts
            header = json.dumps([facts.prefix, facts.sequence]).encode("utf-8")
        prefix, sequence = json.loads(self._group.bcast(header))
        self._lineage = replace(self._lineage, prefix=prefix, sequence=sequence - 1)
        prepared.ticket = tickets[0] if tickets else self._ticket(self._lineage, reason)

    def _begin_on_root(self, reason: str) -> Ticket:
        """Choose the name and the place in the lineage, and begin. Root only."""
        assert self._keeper is not None
        assert self._planned is not None
        lineage = self._lineage
        if lineage.prefix is None:
            lineage = replace(lineage, prefix=self._keeper.numbered_prefix(), sequence=self._keeper.highest_sequence())
        ticket = self._ticket(lineage, reason)
        taken, ours = self._taken(ticket)
        if taken and not ours:
            lineage = replace(lineage, prefix=self._keeper.numbered_prefix())
            ticket = self._ticket(lineage, reason)
            taken, ours = self._taken(ticket)
        ticket = replace(ticket, replace=ours)
        self._keeper.note_start(lineage.run_id)
        try:
            self._saver.begin(self._planned, ticket)
        except Exception as error:
            self._saver.reject(self._saver.staging(ticket), error)
            raise
        return ticket

    def _ticket(self, lineage: _Lineage, reason: str) -> Ticket:
        assert lineage.prefix is not None
        epoch, inner = naming.epoch_and_step(self._step, self._steps_per_epoch)
        sequence = lineage.sequence + 1
        facts = Facts(
            stem=str(naming.Stem(lineage.prefix, epoch, inner)),
            token=naming.token(bytes.fromhex(lineage.attempt), sequence, epoch, self._step, "save"),
            attempt=lineage.attempt,
            run_id=lineage.run_id,
            family=self._prefix,
            prefix=lineage.prefix,
            sequence=sequence,
            step=self._step,
            epoch=epoch,
            step_in_epoch=inner,
            world_size=self._group.size,
            format=self.config.format,
            integrated=self.config.is_integrated,
            created=self._clock.wall(),
            parent=lineage.parent,
            steps_per_epoch=self._steps_per_epoch,
            reason=reason,
            remove_redundancy=self.config.remove_redundancy,
            crc_check=self.config.crc_check,
        )
        return Ticket(facts, False, appended.settle(self.config.append_dict, epoch, self._step))

    def _taken(self, ticket: Ticket) -> tuple[bool, bool]:
        assert self._keeper is not None
        staging = self._saver.staging(ticket)
        path = staging.final_file if ticket.facts.integrated else staging.final_directory
        return self._keeper.taken(path, ticket.facts.run_id, ticket.facts.step)

    def _saved(self, saved: Saved, ticket: Ticket, blocked_s: float) -> None:
        facts = ticket.facts
        before = self._last_saved_step
        self._failed_in_a_row = 0
        self._last_saved_step = facts.step
        self._lineage = replace(self._lineage, prefix=facts.prefix, sequence=facts.sequence, parent=facts.token)
        self._history = History(facts.step, self._clock.monotonic())
        self.latest_ckpt_file_name = saved.path
        if not self._group.is_root:
            return
        assert self._keeper is not None
        gigabytes = saved.nbytes / 1e9
        log.info(
            "saved step %d to %s: %.3f GB in %.2f s (%.2f GB/s), blocked %.2f s, slowest rank %d (%.2f s)",
            facts.step,
            saved.path,
            gigabytes,
            saved.seconds,
            gigabytes / saved.seconds if saved.seconds > 0 else 0.0,
            blocked_s,
            saved.slowest,
            saved.slowest_seconds,
        )
        if saved.unchanged and before is not None and facts.step > before and self._planned is not None:
            names = [tensor.name for tensor in self._planned.tensors[:8]]
            self._warn(
                f"no tensor has changed between steps {before} and {facts.step} ({', '.join(names)}): were arrays "
                "rebound instead of updated in place? Pass a callable that returns the current ones",
                StateWarning,
            )
        try:
            self._keeper.note_published(facts.run_id, facts.step)
        except StorageError as error:
            log.warning("the run file could not be written: %s", error)
        self._keeper.retain(facts.run_id, facts.prefix)

    def _save_failed(self, error: ParckptError) -> None:
        """Raise or warn, as configured; the step stays due, so the next one tries again."""
        self._failed_in_a_row += 1
        patient = self.config.on_save_error == "warn" and self._failed_in_a_row < self.config.max_failed_saves
        if not patient or isinstance(error, TimeoutError):
            raise error
        if self._group.is_root:
            log.warning("save %d of %d in a row failed: %s", self._failed_in_a_row, self.config.max_failed_saves, error)

    # -- restoring ------------------------------------------------------------------------------------------------

    def _nothing_found(self, required: bool) -> None:
        assert self._keeper is not None
        self._keeper.nothing_found(required=required)
        self._keeper.note_start(self._lineage.run_id)

    def _adopt(self, restored: Restored) -> None:
        """Go on where the checkpoint stands: its run, prefix and place in the lineage. Collective."""
        facts, progress = restored.facts, restored.progress
        self._spoiled = []
        self._step = progress.step
        self._history = History(progress.step, self._clock.monotonic())
        if facts is None or restored.is_foreign:
            return
        highest: list[int] = []
        self._on_root(lambda: highest.append(self._highest()))
        sequence = int(self._group.bcast(str(highest[0]).encode("ascii") if highest else None))
        self._lineage = replace(
            self._lineage, run_id=facts.run_id, prefix=facts.prefix, sequence=sequence, parent=facts.token
        )
        self._last_saved_step = None

    def _highest(self) -> int:
        assert self._keeper is not None
        return self._keeper.highest_sequence()

    # -- small things ---------------------------------------------------------------------------------------------

    def _on_root(self, step: Callable[[], Any]) -> None:
        """Run something on root; an error is raised on all ranks. Collective."""
        error: Exception | None = None
        if self._group.is_root:
            try:
                step()
            except Exception as problem:  # the other ranks wait for the outcome
                error = problem
        self._group.agree(error)

    def _warn(self, message: str, category: type[Warning]) -> None:
        """Say something once."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, category, stacklevel=4)


def _checked_config(config: CheckpointConfig | None) -> CheckpointConfig:
    if config is None:
        config = CheckpointConfig()
    if not isinstance(config, CheckpointConfig):
        raise ConfigTypeError(f"config must be a CheckpointConfig, not {type(config).__name__}")
    for name in ("async_save", "exception_save", "enc_key"):
        if getattr(config, name):
            raise NotImplementedError(f"{name} is not implemented yet")
    if config.format not in FORMATS:
        raise NotImplementedError(f"format {config.format!r} is not implemented yet")
    if config.ownership != "parckpt":
        raise NotImplementedError(f"ownership {config.ownership!r} is not implemented yet")
    return config


def _checked_directory(directory: str | os.PathLike[str] | None) -> str:
    if directory is None:
        return os.getcwd()
    path = os.fspath(directory)
    if not isinstance(path, str):
        raise ConfigTypeError(f"directory must be a str, not {type(directory).__name__}")
    if not path.strip():
        raise ConfigError("directory must not be blank")
    return os.path.abspath(path)


def _network_state(network: Any) -> State | None:
    if network is None or isinstance(network, Mapping):
        return network
    if hasattr(network, "state_dict"):
        state: State = network.state_dict()
        return state
    return network  # type: ignore[no-any-return]  # a callable, as the config has checked


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
