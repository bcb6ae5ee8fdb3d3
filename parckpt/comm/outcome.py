"""Success or failure of one step on all ranks: exchanged, then the same on all.

No rank may raise between two collectives on its own: the others would wait for it. So errors are exchanged here, and
every rank raises the same one.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import numpy as np

from parckpt.comm.base import Communicator
from parckpt.comm.collective import allgather_bytes, reduce_max
from parckpt.comm.wait import Waiter
from parckpt.errors import ParckptError, RankError, TimeoutExpiredError, rebuild

__all__ = ["agree", "run_on_all"]

T = TypeVar("T")

MAX_FACTS_NBYTES = 64 << 10
"""Facts longer than this (thousands of tensor names) stay on their rank, so 4,096 failing ranks do not move GBs."""

MAX_MESSAGE_LENGTH = 16 << 10


def agree(comm: Communicator, error: Exception | None, waiter: Waiter, what: str = "an agreement") -> None:
    """Return if no rank passes an error, else raise the same error on all. Collective over ``comm``.

    Parameters
    ----------
    comm : Communicator
        The ranks that took part.
    error : Exception or None
        What this rank's part failed with.
    waiter : Waiter
        Bounds the wait for the others.
    what : str, optional
        Name of the step, for the error of a time-out.

    Raises
    ------
    ParckptError
        Of the class, message and facts of the lowest failing rank's error. One that is not ours is a `RankError`, and
        a builtin exception's class as well, so ``except ValueError`` catches it on every rank;
        ``failures`` has the message of every failing rank. This rank's own error, if any, is its ``__cause__``.
    """
    try:
        if reduce_max(comm, np.array([error is not None], np.int64), waiter, what)[0] == 0:
            return
        reports = allgather_bytes(comm, b"" if error is None else _report(error, comm.rank), waiter, what)
    except TimeoutExpiredError as late:
        # The others cannot be told any more; what went wrong here is at least as telling as that.
        raise late from error
    raise _merge(reports) from error


def run_on_all(comm: Communicator, step: Callable[[], T], waiter: Waiter, what: str = "an agreement") -> T:
    """Run a step without collectives on every rank, and raise on all if it fails on any. Collective over ``comm``."""
    result: list[T] = []
    error: Exception | None = None
    try:
        result.append(step())
    except Exception as problem:
        error = problem
    agree(comm, error, waiter, what)
    return result[0]


def _report(error: Exception, rank: int) -> bytes:
    """Describe an error as JSON: code, message, facts."""
    if isinstance(error, ParckptError):
        code, message, facts = type(error).code, error.message, error.facts
    else:
        kind = type(error).__name__
        code, message, facts = RankError.code, f"{kind}: {error}", {"rank": rank, "type": kind}
    text = _encode(code, message, facts)
    if len(text) > MAX_FACTS_NBYTES:
        text = _encode(code, message[:MAX_MESSAGE_LENGTH], {})
    return text


def _encode(code: str, message: str, facts: dict[str, Any]) -> bytes:
    return json.dumps([code, message, facts], default=_plain).encode()


def _plain(value: object) -> object:
    """Make a fact that JSON does not know one it does."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return str(value)


def _merge(reports: list[bytes]) -> ParckptError:
    """Make the one error of all ranks' reports (empty: this rank did not fail)."""
    failures = {rank: json.loads(report) for rank, report in enumerate(reports) if report}
    lowest = min(failures)
    code, message, facts = failures[lowest]
    messages = {rank: str(failure[1]) for rank, failure in failures.items()}
    if len(failures) < len(reports):
        others = f", and {len(failures) - 1} more failed" if len(failures) > 1 else ""
        message = f"{message} (rank {lowest}{others})"
    merged = _as_builtin(message, facts) if code == RankError.code else rebuild(code, message, facts)
    merged.failures = messages
    return merged


def _as_builtin(message: str, facts: dict[str, Any]) -> ParckptError:
    """A `RankError` that is also of the builtin class of the rank's exception, where there is one to be had."""
    try:
        return _rank_error_class(str(facts.get("type")))(message, **facts)
    except TypeError:  # a class with a constructor of its own (UnicodeDecodeError)
        return rebuild(RankError.code, message, facts)


@cache
def _rank_error_class(name: str) -> type[RankError]:
    base = getattr(builtins, name, None)
    if not (isinstance(base, type) and issubclass(base, Exception)):
        return RankError
    return type(f"Rank{name}", (RankError, base), {"__module__": RankError.__module__})
