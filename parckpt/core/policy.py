"""When to save. Values in, a decision out; without triggers and ephemeral saves the rules are MindSpore's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from parckpt.core import checks, triggers
from parckpt.core.triggers import EverySeconds, Trigger
from parckpt.errors import ConfigError, FormatError

__all__ = ["Decision", "Due", "History", "SavePolicy"]

_TIMED = ("seconds", "every seconds")


@dataclass(frozen=True)
class Decision:
    """Whether to save, and why (or why not).

    Attributes
    ----------
    save : bool
    reason : str
        A word for programs. With a save "steps", "seconds", "every steps", "every seconds", "every epochs",
        "at steps", "ephemeral", "end", "asked for" or "asked for by another rank"; without one "not due",
        "already saved" or "no trigger".
    detail : str
        A sentence for people; two decisions that differ only in this are equal.
    """

    save: bool
    reason: str
    detail: str = field(default="", compare=False)

    @property
    def is_timed(self) -> bool:
        """Whether it depends on a clock, and may therefore differ between ranks."""
        return self.reason in _TIMED

    @property
    def is_ephemeral(self) -> bool:
        """Whether what is saved lives only until the next publish."""
        return self.save and self.reason == "ephemeral"


@dataclass(frozen=True)
class History:
    """What the policy has to know of the past.

    Attributes
    ----------
    last_step : int
        Global step of the last save that counts (not an ephemeral one), or that was restored; 0 at the start of a run.
    last_s : float
        When that was, or when the run started; seconds of the clock that `SavePolicy.decide` gets.
    ephemeral_step : int
        Global step of the last ephemeral save, if it is later.
    """

    last_step: int = 0
    last_s: float = 0.0
    ephemeral_step: int = 0


@dataclass(frozen=True)
class Due:
    """What one rule of a policy waits for: a step, or (``seconds``) more than so many seconds after ``since_s``."""

    reason: str
    rule: str
    step: int | None = None
    seconds: float | None = None
    since_s: float = 0.0

    def is_met(self, step: int, now_s: float) -> bool:
        """Whether a save is due at a step and time."""
        if self.step is not None:
            return step >= self.step
        # Strictly more: at exactly the interval MindSpore does not save yet.
        return self.seconds is not None and now_s - self.since_s > self.seconds


@dataclass(frozen=True)
class SavePolicy:
    """When to save.

    Attributes
    ----------
    steps : int or None
        Every so many steps since the last save, or, if this is 0 or None:
    seconds : int or None
        when more than so many seconds passed since the last save.
    triggers : tuple of Trigger
        Any of these makes a save due as well.
    ephemeral_steps : int or None
        Save so many steps after the last save, of either kind, one that lives only until the next publish. It leaves
        the schedule of the others as it is.

    Notes
    -----
    If any of these is set, the end of training saves what is not saved yet.
    """

    steps: int | None = 1
    seconds: int | None = None
    triggers: tuple[Trigger, ...] = ()
    ephemeral_steps: int | None = None

    def decide(
        self, step: int, now_s: float, history: History, *, ending: bool = False, steps_per_epoch: int | None = None
    ) -> Decision:
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
            Put the next one in its place when a save has succeeded. A failed save is tried again at the next step.
        steps_per_epoch : int, optional
            Needed by `EveryEpochs`; without it that is a ConfigError.
        """
        rules = list(self.waiting(history, steps_per_epoch))
        if not rules and not self.is_active:
            return Decision(False, "no trigger", "nothing is set that makes a save due")
        if step == history.last_step:
            return Decision(False, "already saved", f"step {step} is saved")
        ephemeral = None
        for due in rules:
            if not due.is_met(step, now_s):
                continue
            if due.reason != "ephemeral":
                return Decision(True, due.reason, _why(due, step, now_s, history))
            ephemeral = Decision(True, due.reason, _why(due, step, now_s, history))
        if ending:
            return Decision(True, "end", f"training ends and step {step} is not saved yet")
        return ephemeral or Decision(False, "not due", _wait(rules))

    @property
    def is_active(self) -> bool:
        """Whether anything ever makes a save due."""
        return bool(self.steps or self.seconds or self.triggers or self.ephemeral_steps)

    def waiting(self, history: History, steps_per_epoch: int | None = None) -> Iterator[Due]:
        """What each rule waits for; those of steps come first, ephemeral saves last."""
        timed: list[Due] = []
        if self.steps:
            yield Due("steps", f"save_checkpoint_steps={self.steps}", history.last_step + self.steps)
        elif self.seconds:
            rule = f"save_checkpoint_seconds={self.seconds}"
            timed.append(Due("seconds", rule, seconds=self.seconds, since_s=history.last_s))
        for trigger in self.triggers:
            if isinstance(trigger, EverySeconds):
                timed.append(Due(trigger.reason, str(trigger), seconds=trigger.seconds, since_s=history.last_s))
                continue
            step = trigger.next_step(history.last_step, steps_per_epoch)
            if step is not None:
                yield Due(trigger.reason, str(trigger), step)
        yield from timed
        if self.ephemeral_steps:
            start = max(history.last_step, history.ephemeral_step)
            yield Due("ephemeral", f"ephemeral_steps={self.ephemeral_steps}", start + self.ephemeral_steps)

    def uneven(self, jump: int, steps_per_epoch: int | None = None) -> str | None:
        """The first rule whose interval is no multiple of ``jump``, the number of steps between two step ends.

        A save at every step (interval 1) means every step end, however far apart they are.
        """
        intervals = {
            f"save_checkpoint_steps={self.steps}": self.steps,
            **{str(trigger): trigger.interval(steps_per_epoch) for trigger in self.triggers},
            f"ephemeral_steps={self.ephemeral_steps}": self.ephemeral_steps,
        }
        return next(
            (rule for rule, interval in intervals.items() if interval and interval > 1 and interval % jump), None
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values, for the facts of a checkpoint."""
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "triggers": triggers.to_json(self.triggers),
            "ephemeral_steps": self.ephemeral_steps,
        }

    @classmethod
    def from_json(cls, data: Any) -> SavePolicy:
        """The reverse, on data from disk; FormatError for anything else. Unknown members are ignored."""
        if not isinstance(data, dict):
            raise FormatError("the stored policy is no object", field="policy")
        try:
            steps, seconds, ephemeral = (
                checks.count(name, data.get(name), none=True) for name in ("steps", "seconds", "ephemeral_steps")
            )
        except ConfigError as error:
            raise FormatError(f"the stored policy is ill-formed: {error.message}", field="policy") from error
        return cls(steps, seconds, triggers.from_json(data.get("triggers", [])), ephemeral)


def _why(due: Due, step: int, now_s: float, history: History) -> str:
    if due.step is None:
        return f"{due.rule}: {now_s - due.since_s:.1f} s since the last save"
    late = "" if step == due.step else f" (due at {due.step})"
    since = f", the last save was at step {history.last_step}" if history.last_step else ""
    return f"{due.rule}: step {step}{late}{since}"


def _wait(rules: list[Due]) -> str:
    steps = [due for due in rules if due.step is not None]
    if steps:
        first = min(steps, key=lambda due: due.step or 0)
        return f"the next is due at step {first.step} ({first.rule})"
    return f"waiting for {rules[0].rule}" if rules else "nothing more is due before the end"
