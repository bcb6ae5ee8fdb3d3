"""Where training stands, what was saved when, and so which save is due: what `ModelCheckpoint` asks at each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from parckpt.core import policyoptions
from parckpt.core.clock import Clock
from parckpt.core.manifest import Facts
from parckpt.core.policy import Decision, History, SavePolicy
from parckpt.engine.lineage import Cause
from parckpt.errors import ConfigError, ConfigTypeError

__all__ = ["Schedule"]


class Schedule:
    """One rank's view of its run's steps and saves. Nothing here is collective: times are this rank's, root's decide.

    Parameters
    ----------
    policy : SavePolicy
        The rules.
    clock : Clock
        Its monotonic seconds count.
    steps_per_epoch : int or None
        As the user gave it; None: what a training loop tells, if there is one.

    Attributes
    ----------
    step : int
        The last step that was told, or restored; 0 at the start.
    steps_per_epoch : int or None
        As far as it is known now.
    is_agreed : bool
        Whether the other ranks have the same number of steps per epoch, as far as this rank knows.
    """

    def __init__(self, policy: SavePolicy, clock: Clock, steps_per_epoch: int | None) -> None:
        self.step, self.steps_per_epoch, self.is_agreed = 0, steps_per_epoch, True
        self._policy, self._clock = policy, clock
        self._is_told = steps_per_epoch is None
        self._history = History(0, clock.monotonic())
        self._jump = 1  # steps from the step end before to the last
        self._metrics: dict[str, float] = {}  # of the present step

    # -- steps ----------------------------------------------------------------------------------------------------

    def go_to(self, step: int | None, metrics: Mapping[str, float] | None = None) -> None:
        """A step has ended; None: the one after the last.

        Raises
        ------
        ConfigTypeError, ConfigError
            That is no step, or one before the last; or the metrics are no numbers. Nothing has changed.
        """
        number = self.step + 1 if step is None else step
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise ConfigTypeError(f"step must be an int, not {type(number).__name__}")
        if number < max(1, self.step):
            raise ConfigError(f"step {number} after step {self.step}: steps are global, from 1, and do not go back")
        given = policyoptions.check_metrics(metrics)
        if number > self.step or metrics is not None:
            self._metrics = given
        self._jump = int(number) - self.step if self.step else 1
        self.step = int(number)

    def skip_to(self, step: int) -> None:
        """The steps up to this one are nobody's (a loop begins with a later epoch), so they make no save due."""
        if self.step < step:
            self.step, self._history = step, replace(self._history, last_step=step)

    def count_epochs(self, steps_per_epoch: int) -> None:
        """Take a training loop's number, unless the user gave one. The next save takes root's for all ranks."""
        if self._is_told and steps_per_epoch != self.steps_per_epoch:
            self.steps_per_epoch, self.is_agreed = steps_per_epoch, False

    def agree_on(self, steps_per_epoch: int | None) -> None:
        """From now on, on all ranks, an epoch has as many steps as root says."""
        self.steps_per_epoch, self.is_agreed = steps_per_epoch, True

    # -- saves ----------------------------------------------------------------------------------------------------

    def decide(self, step: int | None = None, *, ending: bool = False) -> Decision:
        """Whether a save is due, by this rank's clock, at a step (None: the last)."""
        return self._policy.decide(
            self.step if step is None else step,
            self._clock.monotonic(),
            self._history,
            ending=ending,
            steps_per_epoch=self.steps_per_epoch,
        )

    def cause(self, decision: Decision) -> Cause:
        """What is to be stored of a decision to save."""
        return Cause(
            decision.reason, decision.detail, decision.is_ephemeral, self._history.last_step, dict(self._metrics)
        )

    def lateness(self) -> str | None:
        """Why saves will come later than asked for; None if they will not.

        Where steps come so many at a time (data sinking, accumulation), an interval that is no multiple of that is
        met only at the step end after it.
        """
        rule = self._policy.uneven(self._jump, self.steps_per_epoch) if self._jump > 1 else None
        if rule is None:
            return None
        return (
            f"steps come {self._jump} at a time, and {rule} is no multiple of that: saves are made at the next step "
            "that comes, later than asked for"
        )

    def saved(self, *, ephemeral: bool) -> None:
        """The last step is saved."""
        if ephemeral:
            self._history = replace(self._history, ephemeral_step=self.step)
        else:
            self._history = History(self.step, self._clock.monotonic())

    def restored(self, step: int, facts: Facts | None) -> None:
        """Go on from a restored step. An ephemeral save did not count: the schedule goes on from the one before it."""
        now = self._clock.monotonic()
        self.step, self._metrics = step, {}
        self._history = History(step, now)
        if facts is not None and facts.ephemeral:
            self._history = History(min(facts.counted_step, step), now, ephemeral_step=step)
