"""The shape of MindSpore's callbacks: what a training loop calls, with an object that tells where it is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from parckpt.errors import ConfigError, ConfigTypeError

__all__ = ["CallbackShape", "Position", "RunContext", "position"]

_FIELDS = ("cur_step_num", "cur_epoch_num", "batch_num")


@runtime_checkable
class RunContext(Protocol):
    """What a training loop hands to its callbacks, MindSpore's or anybody's."""

    def original_args(self) -> Any:
        """An object, or a mapping, with ``cur_step_num``, ``cur_epoch_num``, ``batch_num``, ``train_network``."""


@dataclass(frozen=True)
class Position:
    """Where a training loop is.

    Attributes
    ----------
    step : int
        Steps the loop has done, by its own count; jumps when the loop runs several steps in one call (data sinking).
    epoch : int
        Of that step, from 1. Loops that begin with a later epoch count their steps from 1 all the same.
    batch_num : int
        Steps per epoch.
    network : object
        What the loop trains; None if it does not say.
    parameters : object
        All that the loop tells, for callables that want more.
    """

    step: int
    epoch: int
    batch_num: int
    network: Any
    parameters: Any

    @property
    def skipped(self) -> int:
        """Steps of the epochs before the one that the loop began with."""
        return max(0, (self.epoch - 1 - (self.step - 1) // self.batch_num) * self.batch_num)


def position(run_context: Any) -> Position:
    """Read where the loop is.

    Raises
    ------
    ConfigError, ConfigTypeError
        A field is missing, or is no number that it could be.
    """
    parameters = _parameters(run_context)
    step, epoch, batch_num = (_number(parameters, name) for name in _FIELDS)
    return Position(step, epoch, batch_num, _get(parameters, "train_network"), parameters)


def _parameters(run_context: Any) -> Any:
    if not isinstance(run_context, RunContext):
        raise ConfigTypeError(f"a run context has original_args(), {type(run_context).__name__} has not")
    return run_context.original_args()


def _get(parameters: Any, name: str) -> Any:
    # MindSpore's is a dict whose attributes are its items: asking it for a missing one is a KeyError.
    return parameters.get(name) if isinstance(parameters, Mapping) else getattr(parameters, name, None)


def _number(parameters: Any, name: str) -> int:
    value = _get(parameters, name)
    if value is None:
        raise ConfigError(f"the run context's original_args() has no {name}", parameter=name)
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigTypeError(f"{name} must be an int, not {type(value).__name__}", parameter=name) from None
    if number < 1:
        raise ConfigError(f"{name} must be at least 1 when a step has ended, not {number}", parameter=name)
    return number


class CallbackShape:
    """What MindSpore's training loop calls, for `ModelCheckpoint`.

    The loop counts its own steps from 1. A run that was restored, or that trained before, is further on: then the
    loop's first step is the one after the run's last. So steps, and with them names, never go back.
    """

    _loop_start: int | None = None  # the loop's own count where it began; None: nobody said
    _loop_offset: int | None = None  # from the loop's count to the run's; None: not known before a step has ended
    #: What the training loop last told of itself; None where there is no such loop.
    loop: Position | None = None

    def begin(self, run_context: RunContext) -> None:
        """Training begins. Not collective; nothing is saved."""
        self._loop_start = _get(_parameters(run_context), "cur_step_num") or 0
        self._loop_offset = None

    def epoch_begin(self, run_context: RunContext) -> None:
        """An epoch begins. Does nothing."""

    def step_begin(self, run_context: RunContext) -> None:
        """A step begins. Does nothing."""

    def epoch_end(self, run_context: RunContext) -> None:
        """An epoch has ended. Does nothing: its last step has ended before."""

    def on_train_begin(self, run_context: RunContext) -> None:
        """As `begin`."""
        self.begin(run_context)

    def on_train_epoch_begin(self, run_context: RunContext) -> None:
        """As `epoch_begin`."""
        self.epoch_begin(run_context)

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """As `step_begin`."""
        self.step_begin(run_context)

    def on_train_step_end(self, run_context: RunContext) -> None:
        """As `step_end`. Collective."""
        self.step_end(run_context)

    def on_train_epoch_end(self, run_context: RunContext) -> None:
        """As `epoch_end`."""
        self.epoch_end(run_context)

    def on_train_end(self, run_context: RunContext) -> None:
        """As `end`. Collective."""
        self.end(run_context)

    # Evaluation is not training, although its steps are counted in the same fields.

    def on_eval_begin(self, run_context: RunContext) -> None:
        """Does nothing."""

    def on_eval_epoch_begin(self, run_context: RunContext) -> None:
        """Does nothing."""

    def on_eval_step_begin(self, run_context: RunContext) -> None:
        """Does nothing."""

    def on_eval_step_end(self, run_context: RunContext) -> None:
        """Does nothing."""

    def on_eval_epoch_end(self, run_context: RunContext) -> None:
        """Does nothing."""

    def on_eval_end(self, run_context: RunContext) -> None:
        """Does nothing."""

    # The run's own methods, which take a run context, too.
    step_end: Any
    end: Any

    def _follow(self, run_context: RunContext, done: int) -> tuple[Position, int]:
        """Where the loop is, and the number of its step in a run that has done so many."""
        now = position(run_context)
        if self._loop_offset is None:
            if self._loop_start is not None:
                self._loop_offset = max(now.skipped, done - self._loop_start)
            else:
                self._loop_offset = now.skipped if now.step + now.skipped > done else done
        self.loop = now
        return now, now.step + self._loop_offset

    def as_mindspore_callback(self, *, metrics: Callable[[Any], Mapping[str, float]] | None = None) -> Any:
        """Make the ``mindspore.train.Callback`` that hands everything to this object.

        Not collective. ``model.train(epochs, data, callbacks=ckpt.as_mindspore_callback())`` then saves as
        MindSpore's own ``ModelCheckpoint`` would. MindSpore is imported here and nowhere else.

        Parameters
        ----------
        metrics : callable, optional
            Called at each step's end with what the run context tells (``net_outputs`` has the loss); returns numbers by
            name, as `step_end` takes them.
        """
        from parckpt.adapters.mindspore import make_callback

        return make_callback(self, metrics)
