"""The agreement of all ranks as a call: what one rank says goes in, what all do comes out, or one error on all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parckpt.core.round import Action, Agreement, Call, Voice, merge, pack
from parckpt.engine.group import Group
from parckpt.errors import ConfigError, RankError, StepMismatchError

__all__ = ["compare_arguments", "meet", "peer_left", "raise_mismatch"]

_NAMES = {
    Call.STEP: "step_end",
    Call.POLL: "poll",
    Call.SAVE: "save_now",
    Call.WAIT: "wait",
    Call.RESTORE: "restore",
    Call.LEAVE: "leaving",
}


def meet(group: Group, voice: Voice, error: Exception | None) -> Agreement:
    """Agree with the other ranks, whatever call they are in. Collective.

    Parameters
    ----------
    error : Exception or None
        Why this rank cannot do its part (``voice.failed``).

    Raises
    ------
    ParckptError
        The same on all ranks: a rank failed before the round.
    StepMismatchError
        The same on all ranks: their calls or steps do not go together.
    RankError
        The same on all ranks: the program of one of them raised, and it is leaving.
    """
    agreed = merge(group.reduce_max(pack(voice)))
    if agreed.action is Action.FAIL:
        group.agree(error)
    elif agreed.action is Action.MISMATCH:
        raise_mismatch(group, voice.call, voice.step)
    elif agreed.action is Action.PEER_LEFT:
        raise peer_left(group, voice.left_by_error)
    return agreed


def raise_mismatch(group: Group, call: Call, step: int) -> None:
    """Tell on all ranks which rank is where. Collective; always raises."""
    said = [json.loads(data) for data in group.allgather(json.dumps([int(call), step]).encode("ascii"))]
    places: dict[str, list[int]] = {}
    for rank, (number, at) in enumerate(said):
        places.setdefault(f"{_NAMES[Call(number)]} at step {at}", []).append(rank)
    shown = "; ".join(f"{what}: {_ranks(ranks)}" for what, ranks in places.items())
    raise StepMismatchError(
        f"the ranks are not at the same place, nothing was saved or restored: {shown}",
        places={what: ranks[:64] for what, ranks in places.items()},
    )


def peer_left(group: Group, by_error: bool) -> RankError:
    """Name the ranks that leave because of an exception; there is one at least. Collective; returns the error."""
    reports = group.allgather(b"1" if by_error else b"0")
    left = [rank for rank, report in enumerate(reports) if report == b"1"]
    return RankError(f"{_ranks(left)} left because of an exception; see its traceback", rank=left[0], type="left")


def compare_arguments(group: Group, given: Mapping[str, Any]) -> None:
    """Every rank must have been given the same; ConfigError on all ranks names the first difference. Collective."""
    distinct, index = group.allgather_distinct(json.dumps(given, sort_keys=True, default=str).encode("utf-8"))
    if len(distinct) == 1:
        return
    said = [json.loads(data) for data in distinct]
    name = next(name for name in said[0] if any(one[name] != said[0][name] for one in said))
    ranks = [int(np.flatnonzero(index == which)[0]) for which in range(len(distinct))]
    shown = ", ".join(f"{one[name]!r} on rank {rank}" for one, rank in list(zip(said, ranks, strict=True))[:4])
    own = [
        os.path.basename(str(said[which].get("directory"))) == f"rank_{rank}"
        for rank, which in enumerate(index.tolist())
    ]
    hint = "; drop rank_<n>: all ranks share one directory here" if name == "directory" and all(own) else ""
    raise ConfigError(f"{name} must be the same on all ranks: {shown}{hint}", parameter=name, ranks=ranks)


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"
