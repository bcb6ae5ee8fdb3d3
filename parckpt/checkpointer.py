"""`ModelCheckpoint`: the life of one run, from its first restore to its last save."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

from parckpt.callbacks import CallbackShape, RunContext
from parckpt.comm.launch import resolve
from parckpt.comm.wait import SystemClock, Waiter
from parckpt.core.clock import Clock
from parckpt.core.config import CheckpointConfig
from parckpt.core.policy import Decision
from parckpt.core.round import Action, Agreement, Call, Voice
from parckpt.core.state import State, flatten
from parckpt.core.strategy import Strategy
from parckpt.core.target import NameMap, Selection
from parckpt.engine import notyet
from parckpt.engine.destination import DEFAULT_FAMILY, DirectoryRule, NameRule, Names, Parameters
from parckpt.engine.group import Group
from parckpt.engine.lineage import Cause
from parckpt.engine.local import LocalState, as_state
from parckpt.engine.progress import Progress
from parckpt.engine.restorer import Request
from parckpt.engine.rounds import compare_arguments, meet, peer_left, raise_mismatch
from parckpt.engine.run import Prepared, Run
from parckpt.engine.schedule import Schedule
from parckpt.errors import (
    ConfigError,
    ConfigTypeError,
    InternalError,
    ParckptError,
    StateMismatchError,
    TimeoutExpiredError,
)
from parckpt.signals import deferred_interrupt
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.strategies import as_strategy, name_of

__all__ = ["ModelCheckpoint"]

log = logging.getLogger("parckpt")

LEAVE_BY_ERROR_TIMEOUT_S = 60.0
"""How long a rank whose program raised waits for the others to come to their next call and hear of it."""


class ModelCheckpoint(CallbackShape):
    """Saves a training run's state when it is due, and gives it back.

    Collective: all ranks of ``comm`` make one and call its methods; from the thread that owns MPI. The methods that
    communicate are one and the same agreement, so ranks that are in different ones meet instead of hanging.

    Parameters
    ----------
    prefix : str or callable
        Begin of the names, ``<prefix>-<epoch>_<step in epoch>``. A callable is called at each save with an object that
        has ``cur_step_num``, ``cur_epoch_num``, ``batch_num`` and what else the training loop tells, and returns the
        whole name without extension, the same on all ranks. A name that it returns again replaces what this run saved
        under it before.
    directory : str, path-like or callable, optional
        Where checkpoints go; made if it is missing. Default: the working directory. A callable is called like that of
        ``prefix``, and once at the start, at step 0: `restore` looks into what it returns then, and into all that the
        run went on to from there. The numbers of what is kept hold in each directory by itself.
    config : CheckpointConfig, optional
        Default: ``CheckpointConfig()``. What is assigned to its attributes later does not count here.
    comm : mpi4py communicator, parckpt.SELF or Communicator, optional
        Default: ``COMM_WORLD`` when started by a launcher, else this process alone. Duplicated; the caller's is free.
    steps_per_epoch : int, optional
        Turns the global step into epoch and step within it. Default: what a run context says; without one all is
        epoch 1.
    family : str, optional
        With a callable prefix: the name of the lock, and of what `restore` finds and retention counts. Default:
        ``"CKP"``. (A prefix that is a str is its own.)
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
        prefix: str | Callable[[Any], str] = "CKP",
        directory: str | os.PathLike[str] | Callable[[Any], str | os.PathLike[str]] | None = None,
        config: CheckpointConfig | None = None,
        *,
        comm: Any = None,
        steps_per_epoch: int | None = None,
        family: str | None = None,
        clock: Clock | None = None,
        filesystem: FileSystem | None = None,
    ) -> None:
        self._closed = True  # until all is set up: leaving must not trip over a half-made object
        # As it is now, for good: the ranks compare it once, and plan by it.
        self.config = config.snapshot() if isinstance(config, CheckpointConfig) else CheckpointConfig()
        self._clock: Clock = clock if clock is not None else SystemClock()
        self._group = Group(resolve(comm, os.environ), Waiter(self.config.agree_timeout_s))
        self._schedule = Schedule(self.config.save_policy, self._clock, steps_per_epoch)
        self._state: State | None = None
        self._spoiled: list[str] = []
        self._failed_in_a_row = 0
        self._updating: int | None = None
        self._left = False  # all ranks have left together: what is left to do waits for nobody
        #: Path of the last published checkpoint; empty before the first.
        self.latest_ckpt_file_name = ""
        #: Whether a save was due at the last step, and why.
        self.last_decision: Decision | None = None
        try:
            names, home = self._agree_on_arguments(prefix, directory, family, config, steps_per_epoch)
            self._run = Run(
                self._group,
                filesystem if filesystem is not None else PosixFileSystem(),
                self._clock,
                self.config,
                names=names,
                directory=home,
                schedule=self._schedule,
                destination=lambda step: names.at(self._parameters_at(step)),
            )
        except BaseException:
            self._group.comm.free()
            raise
        self._closed = False

    def _agree_on_arguments(
        self,
        prefix: NameRule,
        directory: DirectoryRule,
        family: str | None,
        config: CheckpointConfig | None,
        steps_per_epoch: int | None,
    ) -> tuple[Names, str]:
        """Check the arguments on every rank and over all ranks; return also the first directory. Collective."""
        error: Exception | None = None
        names, path = Names(DEFAULT_FAMILY, "", DEFAULT_FAMILY), ""
        try:
            _check_config(config)
            names = Names.of(prefix, directory, family)
            path = names.home(Parameters.at(0, steps_per_epoch))
        except Exception as problem:  # user code and checks; the other ranks wait for the comparison
            error = problem
        self._group.agree(error)
        given = {**names.describe(), "directory": path, "steps_per_epoch": steps_per_epoch, **self.config.describe()}
        compare_arguments(self._group, given)
        return names, path

    # -- what users call ------------------------------------------------------------------------------------------

    @property
    def directory(self) -> str:
        """Where the last save went; before the first, where the run starts. Absolute."""
        return self._run.directory

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
        strategy: Strategy | str | os.PathLike[str] | None = None,
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
            Protects against a rolled-back directory: the one to be taken (the newest that is whole, in the order of
            saving) being of an older step is an error. Another one, as of a line that was given up, is never taken
            instead.
        allow_inconsistent : bool
            Also take what is not known to be one step of all ranks.
        strategy : Strategy or str, optional
            MindSpore's strategy, or its file: how the ``rank_<n>`` files in the directory `path` fit together. Not
            needed, and not used, for what parckpt wrote.

        Returns
        -------
        Progress
            Step 0 for a fresh start, which is an answer only where nothing was ever published.

        Raises
        ------
        StateMismatchError
            Names, shapes or types do not fit; nothing was touched.
        CheckpointNotFoundError
            Nothing was found where something was asked for or once was, or what was found is before `min_step`.
        IntegrityError
            Everything found is damaged; each one's reason is in the message.
        """
        prepared = Prepared()
        request = Request()
        flat = None
        cuts: str | None = None
        try:
            cuts = name_of(strategy)
            request = Request(
                Selection(only, exclude, name_map, strict, cast),
                step,
                None if path is None else os.path.abspath(os.fspath(path)),
                fallback,
                atomic,
                min_step,
                allow_inconsistent,
                strategy=self._strategy(strategy, path is not None),
            )
            flat = None if state is None else flatten(as_state(state), writable=True)
        except Exception as error:  # user code and checks before the first collective; the round carries the outcome
            prepared.error = error
        with deferred_interrupt():
            agreed = self._round(Call.RESTORE, self._schedule.step, prepared)
            assert agreed.action is Action.RESTORE
            # What each rank names in its state may differ; which checkpoint is meant, and how strictly, may not.
            given = {"step": step, "path": request.path, "strict": strict, "cast": cast, "fallback": fallback}
            given |= {"required": required, "min_step": min_step, "allow_inconsistent": allow_inconsistent}
            given["strategy"] = cuts
            compare_arguments(self._group, given)
            try:
                restored = self._run.restorer(required=bool(required)).restore(flat, request)
            except ParckptError as error:
                self._spoiled = sorted({*self._spoiled, *error.facts.get("state_touched", ())})
                raise
            self._run.adopt(restored.facts)
            self._spoiled = []
            self._schedule.restored(restored.progress.step, restored.facts)
        return restored.progress

    def _strategy(self, given: Strategy | str | os.PathLike[str] | None, has_path: bool) -> Strategy | None:
        """The strategy on root, which alone opens checkpoints; the others only say which one they mean."""
        if given is not None and not has_path:
            raise ConfigError("strategy= says how the files at path= fit together: give both", parameter="strategy")
        return as_strategy(given, self._run.fs) if self._group.is_root else None

    def step_end(
        self,
        state: State | RunContext | None = None,
        step: int | None = None,
        *,
        metrics: Mapping[str, float] | Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """Tell that a step is done; save if that is due.

        Collective.

        Parameters
        ----------
        state : mapping, callable or run context, optional
            What to save; a callable is called only when a save is decided. Default: the config's ``saved_network``, or
            what was handed in last. A training loop's run context stands for the loop's step and the network that it
            trains (which the config's ``saved_network`` comes before).
        step : int, optional
            Global step, from 1; may jump. Default: one more than the last. Not with a run context.
        metrics : mapping or callable, optional
            Numbers by name that describe this step, or what returns them; root's are stored with the checkpoint if this
            step is saved (``keep_best`` compares them).

        Raises
        ------
        StepMismatchError
            A save is due and the ranks are not at one step.
        ParckptError
            The save failed, on all ranks alike (see ``on_save_error``).
        """
        prepared = Prepared()
        due = False
        cause = _BY_ANOTHER
        try:
            if isinstance(state, RunContext):
                if step is not None:
                    raise ConfigError("a run context tells the step: step= cannot be given with it", parameter="step")
                state, step = self._from_loop(state)
            self._next_step(state, step, metrics() if callable(metrics) else metrics)
            self._run.warn_once("jump", self._schedule.lateness())
            decision = self._schedule.decide()
            self.last_decision = decision
            due = decision.save and self._group.is_root
            if decision.save:
                cause = self._schedule.cause(decision)
            # Every rank can count steps; the time is root's, so others wait for what it decides.
            if due or (decision.save and not decision.is_timed):
                self._run.prepare(prepared, self._describe, self._schedule.step, cause)
        except Exception as error:  # user code before the first collective; the round carries the outcome
            prepared.error = error
        with deferred_interrupt():
            agreed = self._round(Call.STEP, self._schedule.step, prepared, due=due)
            if agreed.action is Action.SAVE:
                self._save(prepared, agreed, cause)
            elif self.last_decision is not None and self.last_decision.save:
                self.last_decision = _NOT_BY_ROOT

    def save_now(self, state: State | None = None, step: int | None = None) -> str:
        """Save at once, due or not. Collective. Returns the path of what was published."""
        prepared = Prepared()
        cause = _ASKED_FOR
        try:
            self._next_step(state, self._schedule.step if step is None else step)
            cause = self._schedule.cause(Decision(True, "asked for", "save_now was called"))
            self._run.prepare(prepared, self._describe, self._schedule.step, cause)
        except Exception as error:  # user code before the first collective; the round carries the outcome
            prepared.error = error
        with deferred_interrupt():
            agreed = self._round(Call.SAVE, self._schedule.step, prepared)
            assert agreed.action is Action.SAVE
            self._save(prepared, agreed, cause)
        return self.latest_ckpt_file_name

    def poll(self) -> None:
        """Meet the other ranks without ending a step: in a long evaluation, say. Collective."""
        with deferred_interrupt():
            self._round(Call.POLL, self._schedule.step, Prepared())

    def need_checkpoint(self, step: int | None = None) -> bool:
        """Whether `step_end` would find a save due at a step. Collective; the same answer on all ranks.

        Parameters
        ----------
        step : int, optional
            Default: the one after the last.
        """
        prepared, due = Prepared(), False
        try:
            due = self._group.is_root and self._schedule.decide(self._schedule.step + 1 if step is None else step).save
        except Exception as error:  # the round carries the outcome
            prepared.error = error
        with deferred_interrupt():
            # A poll, so that ranks in other calls are met; nothing is saved.
            return self._round(Call.POLL, self._schedule.step, prepared, due_at_end=due).due_at_end

    def wait(self) -> None:
        """Return when everything saved so far is published. Collective."""
        with deferred_interrupt():
            self._round(Call.WAIT, self._schedule.step, Prepared())

    @contextmanager
    def updating(self, step: int) -> Iterator[None]:
        """Bracket the part of a step that changes the arrays: outside of it they are a consistent state of ``step``.

        Not collective. A save that is asked for inside would mix two steps, and is refused. (That a helper saves the
        arrays while they are outside, when a signal comes, is not there yet.)
        """
        self._updating = step
        try:
            yield
        finally:
            self._updating = None

    def end(self, run_context: RunContext | None = None) -> None:
        """Leave: wait for all ranks to leave, save the last step if it is not saved yet. Collective.

        With a run context, which tells the last step: a later training with this object goes on from there.
        """
        if self._closed:
            return
        mishap: Exception | None = None
        try:
            if run_context is not None and self.loop is not None:
                self._next_step(*self._from_loop(run_context))
        except Exception as error:  # the other ranks must not wait for this one
            mishap = error
        with deferred_interrupt():
            self._leave(by_error=False, mishap=mishap)

    def close(self) -> None:
        """Leave without a last save, and free everything. Collective. Does nothing the second time."""
        if self._closed:
            return
        with deferred_interrupt():
            try:
                if not self._left:
                    self._leave(by_error=False, save=False)
            finally:
                self._closed = True
                try:
                    self._run.close()
                finally:
                    self._group.comm.free()

    def __enter__(self) -> ModelCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._closed and not self._left:
                if isinstance(error, Exception) and not isinstance(error, ParckptError):
                    # Now, not when the others are there: until they are, nobody would know why this rank waits.
                    log.error("rank %d leaves because of an exception", self._group.rank, exc_info=error)
                with deferred_interrupt():
                    self._leave(by_error=error is not None)
        except ParckptError as problem:
            if error is None:
                raise
            log.error("leaving after an error, and the other ranks did not follow: %s", problem)
        finally:
            self.close()

    # -- below the surface ----------------------------------------------------------------------------------------

    def _round(
        self,
        call: Call,
        step: int,
        prepared: Prepared,
        *,
        due: bool = False,
        due_at_end: bool = False,
        by_error: bool = False,
    ) -> Agreement:
        """Meet the other ranks; what root had begun on a guess is taken back unless all save. Collective."""
        if self._closed:
            raise ConfigError("this ModelCheckpoint is closed")
        self._left = call is Call.LEAVE
        voice = Voice(
            call=call,
            step=step,
            due=due,
            due_at_end=due_at_end,
            failed=prepared.error is not None,
            left_by_error=by_error,
            plan_changed=prepared.changed,
            unprepared=prepared.failure is not None or prepared.ticket is None,
        )
        agreed: Agreement | None = None
        try:
            agreed = meet(self._group, voice, prepared.error)
        finally:
            if agreed is None or agreed.action is not Action.SAVE:
                self._run.drop(prepared)
        return agreed

    def _leave(self, *, by_error: bool, save: bool = True, mishap: Exception | None = None) -> None:
        """Answer the other ranks' rounds until all are leaving; then the last save, unless somebody failed."""
        if by_error:
            # The others may sit in a collective of the program, which this rank will never join: do not keep the
            # launcher from ending the job (python -m mpi4py) for as long as an agreement may take.
            waiter = Waiter(min(self.config.agree_timeout_s, LEAVE_BY_ERROR_TIMEOUT_S))
            self._group = replace(self._group, waiter=waiter)
        while True:
            failed = by_error or mishap is not None
            unsaved = False
            try:
                unsaved = save and not failed and self._has_unsaved()
            except Exception as error:  # user code: the others must not wait for this rank
                mishap = error
                continue
            try:
                agreed = self._round(Call.LEAVE, self._schedule.step, Prepared(), due_at_end=unsaved, by_error=failed)
            except TimeoutExpiredError:
                raise
            except ParckptError as error:
                if isinstance(error, InternalError) and isinstance(mishap, InternalError):
                    raise  # there is no round any more: asking again would be for ever
                mishap = error
                continue
            if agreed.action is Action.END:
                break
        if agreed.left_by_error:
            left = peer_left(self._group, by_error or mishap is not None)
            if by_error:
                return
            raise mishap or left
        if not agreed.due_at_end:
            return
        if agreed.first_step != agreed.last_step:
            raise_mismatch(self._group, Call.LEAVE, self._schedule.step)
        self._save(Prepared(), agreed, self._schedule.cause(self._schedule.decide(ending=True)))

    def _has_unsaved(self) -> bool:
        return self._schedule.decide(ending=True).save and self._state_or_none() is not None

    def _save(self, prepared: Prepared, agreed: Agreement, cause: Cause) -> None:
        try:
            saved = self._run.save(prepared, agreed, self._describe, self._schedule.step, cause)
        except ParckptError as error:
            self._save_failed(error)
            return
        self._failed_in_a_row = 0
        # Root's reason and root's schedule, on all ranks.
        self.last_decision = Decision(True, saved.reason, saved.detail)
        self._schedule.saved(ephemeral=saved.ephemeral)
        self.latest_ckpt_file_name = saved.path

    def _save_failed(self, error: ParckptError) -> None:
        """Raise or warn, as configured; the step stays due, so the next one tries again."""
        self._failed_in_a_row += 1
        patient = self.config.on_save_error == "warn" and self._failed_in_a_row < self.config.max_failed_saves
        if not patient or isinstance(error, TimeoutExpiredError):
            raise error
        if self._group.is_root:
            log.warning("save %d of %d in a row failed: %s", self._failed_in_a_row, self.config.max_failed_saves, error)

    def _next_step(self, state: State | None, step: int | None, metrics: Mapping[str, float] | None = None) -> None:
        if self._spoiled:
            raise StateMismatchError(
                f"a failed restore has overwritten {', '.join(self._spoiled[:8])}: restore again before going on",
                mismatched=self._spoiled,
            )
        if self._updating is not None:
            raise ConfigError(f"the arrays are being changed: this call is inside updating({self._updating})")
        self._schedule.go_to(step, metrics)
        if state is not None:
            self._state = state

    def _from_loop(self, run_context: RunContext) -> tuple[State | None, int]:
        """The state and the step that a training loop's context stands for."""
        now, step = self._follow(run_context, self._schedule.step)
        self._schedule.skip_to(step - now.step)
        self._schedule.count_epochs(now.batch_num)
        return (now.network if self.config.saved_network is None else None), step

    def _parameters_at(self, step: int) -> Any:
        """What callable names get."""
        loop = None if self.loop is None else self.loop.parameters
        return Parameters.at(step, self._schedule.steps_per_epoch, loop)

    def _state_or_none(self) -> State | None:
        if self._state is not None:
            return self._state
        return None if self.config.saved_network is None else as_state(self.config.saved_network)

    def _describe(self) -> LocalState:
        state = self._state_or_none()
        if state is None:
            raise ConfigError("there is no state to save: hand it to step_end, or give the config a saved_network")
        return LocalState.of(flatten(as_state(state), writable=False))


_BY_ANOTHER = Cause("asked for by another rank")
_ASKED_FOR = Cause("asked for")
_NOT_BY_ROOT = Decision(False, "not due", "it would be by this rank's clock, but root's decides")


def _check_config(config: CheckpointConfig | None) -> None:
    if config is None:
        return
    if not isinstance(config, CheckpointConfig):
        raise ConfigTypeError(f"config must be a CheckpointConfig, not {type(config).__name__}")
    notyet.refuse(
        async_save=config.async_save,
        enc_key=config.enc_key,
        exception_save=config.exception_save,
        format=config.format,
    )
