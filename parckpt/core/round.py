"""The one agreement of all ranks: what each says in it, and what follows for all of them.

`step_end`, `poll`, `save_now`, `wait`, `restore` and leaving are the same fixed-size reduction (element-wise maximum of
int64), so ranks that are in different calls meet in it instead of hanging in different collectives. What follows is a
pure function of the reduced vector, hence equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum

import numpy as np
import numpy.typing as npt

__all__ = ["Action", "Agreement", "Call", "Voice", "merge", "pack"]


class Call(IntEnum):
    """Which call a rank is in."""

    STEP = 0
    POLL = 1
    SAVE = 2
    WAIT = 3
    RESTORE = 4
    LEAVE = 5


class Action(Enum):
    """What all ranks do next, together."""

    NOTHING = "nothing"
    SAVE = "save"
    RESTORE = "restore"
    END = "end"  # all are leaving
    MISMATCH = "mismatch"  # calls or steps that do not go together: one typed error everywhere
    FAIL = "fail"  # a rank failed before the round: exchange errors and raise everywhere
    PEER_LEFT = "peer left"  # a rank is leaving because of an exception of the program


_STEP_LIMIT = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Voice:
    """What one rank says.

    Attributes
    ----------
    step : int
        Step of this call, or the last one known.
    due : bool
        This rank wants a save (root by the policy; any rank by a request or a signal).
    due_at_end : bool
        This rank is leaving and has something unsaved: that counts once all are leaving.
    severity : int
        0 none; higher: how urgently a stop was asked for.
    milliseconds_left : int or None
        Until this rank will be killed, if known.
    busy : bool
        An earlier save of this rank is still running.
    written_up_to : int
        Sequence number of the last save whose bytes this rank has durable.
    failed : bool
        This rank cannot do its part; its error follows.
    left_by_error : bool
        The program raised; this rank is leaving.
    plan_changed, unprepared : bool
        This rank's description differs from the plan's; this rank has not looked at its state yet.
    """

    call: Call
    step: int
    due: bool = False
    due_at_end: bool = False
    severity: int = 0
    milliseconds_left: int | None = None
    busy: bool = False
    written_up_to: int = 0
    failed: bool = False
    left_by_error: bool = False
    plan_changed: bool = False
    unprepared: bool = False


@dataclass(frozen=True)
class Agreement:
    """The voices of all ranks, reduced. Equal on every rank."""

    calls: frozenset[Call]
    first_step: int
    last_step: int
    due: bool
    due_at_end: bool
    severity: int
    milliseconds_left: int | None
    busy: bool
    written_up_to: int
    failed: bool
    left_by_error: bool
    plan_changed: bool
    unprepared: bool
    action: Action = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "action", _action(self))


_MAXIMA = ("due", "due_at_end", "severity", "busy", "failed", "left_by_error", "plan_changed", "unprepared")
NCALLS = len(Call)


def pack(voice: Voice) -> npt.NDArray[np.int64]:
    """The vector to reduce; minima travel negated."""
    left = _STEP_LIMIT if voice.milliseconds_left is None else voice.milliseconds_left
    calls = [int(voice.call == call) for call in Call]
    maxima = [int(getattr(voice, name)) for name in _MAXIMA]
    return np.array([*calls, voice.step, -voice.step, -left, -voice.written_up_to, *maxima], np.int64)


def merge(reduced: Sequence[int] | npt.NDArray[np.int64]) -> Agreement:
    """Read a reduced vector."""
    values = [int(value) for value in reduced]
    step, negated_step, negated_left, negated_written = values[NCALLS : NCALLS + 4]
    flags = dict(zip(_MAXIMA, values[NCALLS + 4 :], strict=True))
    severity = flags.pop("severity")
    return Agreement(
        calls=frozenset(call for call in Call if values[call]),
        first_step=-negated_step,
        last_step=step,
        severity=severity,
        milliseconds_left=None if -negated_left == _STEP_LIMIT else -negated_left,
        written_up_to=-negated_written,
        **{name: bool(value) for name, value in flags.items()},
    )


def _action(agreed: Agreement) -> Action:
    """The rule: errors first, then calls that do not go together, then what was asked for."""
    calls = agreed.calls
    if agreed.failed:
        return Action.FAIL
    if agreed.left_by_error and calls != {Call.LEAVE}:
        return Action.PEER_LEFT
    if calls == {Call.LEAVE}:
        return Action.END
    for call, action in ((Call.RESTORE, Action.RESTORE), (Call.SAVE, Action.SAVE)):
        if call in calls:
            alone = calls == {call} and (call is Call.RESTORE or agreed.first_step == agreed.last_step)
            return action if alone else Action.MISMATCH
    if agreed.due:
        alone = calls == {Call.STEP} and agreed.first_step == agreed.last_step
        return Action.SAVE if alone else Action.MISMATCH
    return Action.NOTHING


assert {f.name for f in fields(Voice)} >= set(_MAXIMA)  # a renamed field must not vanish from the vector
