"""What makes a save due beside MindSpore's two numbers: small values that can be compared, stored and read back."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias

from parckpt.core import checks
from parckpt.errors import ConfigError, ConfigTypeError, FormatError

__all__ = ["AtSteps", "EveryEpochs", "EverySeconds", "EverySteps", "Trigger", "checked", "from_json", "to_json"]


@dataclass(frozen=True)
class EverySteps:
    """At steps ``offset``, ``offset + steps``, ``offset + 2 * steps``, ..., counted from the start of training.

    Unlike ``save_checkpoint_steps``, which counts from the last save, these steps never shift. Where steps jump over
    one of them, the save is made at the step that comes next.

    Parameters
    ----------
    steps : int
        Distance, at least 1.
    offset : int
        The first step; 0: the first is ``steps``.
    """

    steps: int
    offset: int = 0
    reason: ClassVar[str] = "every steps"

    def __post_init__(self) -> None:
        checks.count("steps", self.steps, least=1)
        checks.count("offset", self.offset)

    def __str__(self) -> str:
        return f"EverySteps({self.steps}{f', offset={self.offset}' if self.offset else ''})"

    def interval(self, steps_per_epoch: int | None) -> int | None:
        """Steps from one to the next."""
        return self.steps

    def next_step(self, after: int, steps_per_epoch: int | None) -> int | None:
        """The first of its steps behind ``after``."""
        if after < self.offset:
            return self.offset
        return self.offset + ((after - self.offset) // self.steps + 1) * self.steps


@dataclass(frozen=True)
class EveryEpochs:
    """At the last step of every so many epochs; needs ``steps_per_epoch``.

    Parameters
    ----------
    epochs : int
        At least 1.
    """

    epochs: int = 1
    reason: ClassVar[str] = "every epochs"

    def __post_init__(self) -> None:
        checks.count("epochs", self.epochs, least=1)

    def __str__(self) -> str:
        return f"EveryEpochs({self.epochs})"

    def interval(self, steps_per_epoch: int | None) -> int | None:
        """Steps from one to the next; None if nobody knows."""
        return None if steps_per_epoch is None else self.epochs * steps_per_epoch

    def next_step(self, after: int, steps_per_epoch: int | None) -> int | None:
        """The last step of the next such epoch."""
        if steps_per_epoch is None:
            raise ConfigError(f"{self} needs steps_per_epoch: nobody knows where an epoch ends", parameter="triggers")
        return EverySteps(self.epochs * steps_per_epoch).next_step(after, None)


@dataclass(frozen=True, init=False)
class AtSteps:
    """At these steps, each once.

    Parameters
    ----------
    steps : iterable of int
        Global steps, from 1, in any order.
    """

    steps: tuple[int, ...]
    reason: ClassVar[str] = "at steps"

    def __init__(self, steps: Iterable[int]) -> None:
        if isinstance(steps, (str, bytes)) or not isinstance(steps, Iterable):
            raise ConfigTypeError(f"AtSteps takes a sequence of steps, not {steps!r}", parameter="steps")
        found = sorted({checks.count("steps", step, least=1) for step in steps})
        if not found:
            raise ConfigError("AtSteps needs at least one step", parameter="steps")
        object.__setattr__(self, "steps", tuple(found))

    def __str__(self) -> str:
        shown = ", ".join(str(step) for step in self.steps[:4])
        return f"AtSteps([{shown}{', ...' if len(self.steps) > 4 else ''}])"

    def interval(self, steps_per_epoch: int | None) -> int | None:
        """None: there is no fixed distance."""
        return None

    def next_step(self, after: int, steps_per_epoch: int | None) -> int | None:
        """The first of its steps behind ``after``; None if that was all."""
        place = bisect_right(self.steps, after)
        return self.steps[place] if place < len(self.steps) else None


@dataclass(frozen=True)
class EverySeconds:
    """When more than so many seconds passed since the last save.

    Parameters
    ----------
    seconds : float
        Positive; of root's clock.
    """

    seconds: float
    reason: ClassVar[str] = "every seconds"

    def __post_init__(self) -> None:
        checks.seconds("seconds", self.seconds)

    def __str__(self) -> str:
        return f"EverySeconds({self.seconds:g})"

    def interval(self, steps_per_epoch: int | None) -> int | None:
        """None: steps do not matter."""
        return None

    def next_step(self, after: int, steps_per_epoch: int | None) -> int | None:
        """None: steps do not matter."""
        return None


Trigger: TypeAlias = EverySteps | EverySeconds | EveryEpochs | AtSteps

_KINDS: dict[str, type[Trigger]] = {
    "every_steps": EverySteps,
    "every_seconds": EverySeconds,
    "every_epochs": EveryEpochs,
    "at_steps": AtSteps,
}


def checked(triggers: Any) -> tuple[Trigger, ...]:
    """What the argument ``triggers`` may be: a sequence of triggers."""
    if isinstance(triggers, tuple(_KINDS.values())):
        raise ConfigTypeError(f"triggers must be a sequence: [{triggers}]", parameter="triggers")
    if isinstance(triggers, (str, bytes)) or not isinstance(triggers, Sequence):
        raise ConfigTypeError(f"triggers must be a sequence, not {type(triggers).__name__}", parameter="triggers")
    for trigger in triggers:
        if not isinstance(trigger, tuple(_KINDS.values())):
            raise ConfigTypeError(
                f"triggers holds EverySteps, EverySeconds, EveryEpochs and AtSteps, not {type(trigger).__name__}",
                parameter="triggers",
            )
    return tuple(triggers)


def to_json(triggers: Iterable[Trigger]) -> list[dict[str, Any]]:
    """Triggers as plain values: ``{"kind": ..., field: value, ...}``."""
    names = {kind: name for name, kind in _KINDS.items()}
    return [{"kind": names[type(trigger)], **asdict(trigger)} for trigger in triggers]


def from_json(data: Any) -> tuple[Trigger, ...]:
    """The reverse of `to_json`, on data from disk; FormatError for anything else."""
    found: list[Trigger] = []
    for item in data if isinstance(data, list) else [data]:
        arguments = dict(item) if isinstance(item, dict) else {}
        kind = _KINDS.get(str(arguments.pop("kind", None)))
        if kind is None:
            raise FormatError(f"a trigger of unknown kind: {item!r:.80}", field="policy")
        try:
            found.append(kind(**arguments))
        except (ConfigError, TypeError, OverflowError) as error:
            raise FormatError(f"an ill-formed trigger: {item!r:.80}", field="policy") from error
    return tuple(found)
