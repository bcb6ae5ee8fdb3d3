"""When to save. Values in, a decision out; the rules are MindSpore's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Decision", "History", "Reason", "SavePolicy"]

Reason = Literal["steps", "seconds", "end", "not due", "already saved", "no trigger"]


@dataclass(frozen=True)
class Decision:
    """Whether to save, and why (or why not)."""

    save: bool
    reason: Reason


@dataclass(frozen=True)
class History:
    """What the policy has to know of the past.

    Attributes
    ----------
    last_step : int
        Global step of the last save that was started, or that was restored; 0 at the start of a run.
    last_s : float
        When that was, or when the run started; seconds of the clock that `SavePolicy.decide` gets.
    """

    last_step: int = 0
    last_s: float = 0.0


@dataclass(frozen=True)
class SavePolicy:
    """Save every `steps` steps, or, if that is 0 or None, every `seconds` seconds; and at the end of either."""

    steps: int | None = 1
    seconds: int | None = None

    def decide(self, step: int, now_s: float, history: History, *, ending: bool = False) -> Decision:
        """Decide at a step's end, or (with `ending`) at the end of training.

        Not collective: root decides and tells the others, since clocks differ.

        Parameters
        ----------
        step : int
            Global step, from 1. It may jump: due is every step at or after last + steps.
        now_s : float
            Seconds of any clock, the same one as in `history`. A monotonic one makes the rule immune to time
            adjustments; MindSpore uses the wall clock.
        history : History
            Put ``History(step, now_s)`` in its place when a save starts. To try a failed save again at the next
            step, put the old one back.
        """
        if not self.steps and not self.seconds:
            return Decision(False, "no trigger")
        if step == history.last_step:
            return Decision(False, "already saved")
        if self.steps:
            if step >= history.last_step + self.steps:
                return Decision(True, "steps")
        # Strictly more: at exactly the interval MindSpore does not save yet.
        elif self.seconds and now_s - history.last_s > self.seconds:
            return Decision(True, "seconds")
        return Decision(True, "end") if ending else Decision(False, "not due")
