"""How a command fails: exit status by error class, one line for people, an object for programs."""

from __future__ import annotations

import errno
import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec

import typer

from parckpt.cli.output import emit, plain
from parckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    IntegrityError,
    LayoutError,
    LockedError,
    ParckptError,
    RankError,
    SaveInProgressError,
    StateMismatchError,
    StepMismatchError,
    StorageError,
    TimeoutExpiredError,
    UnsupportedVersionError,
    classes_by_code,
)

__all__ = ["DAMAGED", "DIFFERENT", "EXIT_STATUSES", "INTERRUPTED", "UNEXPECTED", "UNVERIFIED", "USAGE", "exit_help"]
__all__ += ["guarded", "status_of", "status_of_code"]

P = ParamSpec("P")

UNEXPECTED, USAGE, DAMAGED, UNVERIFIED, INTERRUPTED = 1, 2, 5, 9, 130
DIFFERENT = 1  # as of diff and cmp; what Python itself exits with cannot be had apart from it

# The first row that fits decides, so a subclass with a status of its own stands before its base.
EXIT_STATUSES: tuple[tuple[int, tuple[type[ParckptError], ...], str], ...] = (
    (3, (ConfigError,), "asked for something impossible: change the command"),
    (4, (CheckpointNotFoundError,), "nothing there, or deleted meanwhile"),
    (10, (UnsupportedVersionError,), "written by a newer parckpt: update this one"),
    (5, (FormatError, IntegrityError), "damaged"),
    (12, (TimeoutExpiredError,), "a bounded wait ran out"),
    (11, (CheckpointExistsError,), "the name is taken"),
    (6, (StorageError,), "the file system refused: permission, disk full, I/O error"),
    (7, (LockedError, SaveInProgressError), "another job is at work there"),
    (8, (StateMismatchError, LayoutError, StepMismatchError), "checkpoint, state or ranks do not fit together"),
    (13, (RankError,), "another rank failed"),
)


def status_of(error: BaseException) -> int:
    """Exit status of an error."""
    return next((status for status, classes, _ in EXIT_STATUSES if isinstance(error, classes)), UNEXPECTED)


def status_of_code(code: str) -> int:
    """Exit status of the error class with a code; `UNEXPECTED` for an unknown code."""
    cls = classes_by_code().get(code, ParckptError)
    return next((status for status, classes, _ in EXIT_STATUSES if issubclass(cls, classes)), UNEXPECTED)


def exit_help() -> list[tuple[int, str]]:
    """Every exit status with its meaning, ascending."""
    rows = [(status, meaning) for status, _, meaning in EXIT_STATUSES]
    rows += [
        (0, "done, and nothing is wrong"),
        (UNEXPECTED, "diff: they differ. Elsewhere unexpected: a bug in parckpt, or a broken pipe"),
        (USAGE, "the command line could not be understood"),
        (UNVERIFIED, "readable, but without checksums to verify it by"),
        (INTERRUPTED, "interrupted (Ctrl-C)"),
    ]
    return sorted(rows)


def guarded(command: Callable[P, int | None]) -> Callable[P, None]:
    """Turn what a command raises into one line, or one JSON object, and an exit status.

    The command has parameters ``as_json`` and ``debug``, and returns its exit status (None: 0).
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json, debug = bool(kwargs.get("as_json")), bool(kwargs.get("debug"))
        try:
            status = command(*args, **kwargs)
        except KeyboardInterrupt:
            _fail("interrupted", "interrupted", INTERRUPTED, as_json)
        except (typer.Exit, typer.Abort):
            raise
        except ParckptError as error:
            error = _translated(error)
            _show_trace(debug)
            _fail(type(error).code, error.message, status_of(error), as_json)
        except BrokenPipeError:
            raise  # whoever read us has seen enough: typer ends quietly
        except Exception as error:  # the last line of defence: a traceback helps nobody at night
            _show_trace(debug)
            hint = "" if debug else " (--debug shows where)"
            _fail("internal", f"unexpected {type(error).__name__}: {error}{hint}", UNEXPECTED, as_json)
        raise typer.Exit(status or 0)

    return run


def _translated(error: ParckptError) -> ParckptError:
    """A path that is not there is "not found" to the user, whatever call noticed it."""
    if isinstance(error, StorageError) and error.errno in (errno.ENOENT, errno.ENOTDIR):
        path = error.facts.get("path", "")
        what = "does not exist" if error.errno == errno.ENOENT else "is not a directory"
        return CheckpointNotFoundError(f"{path} {what}", path=path)
    return error


def _show_trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


def _fail(code: str, message: str, status: int, as_json: bool) -> NoReturn:
    report(code, message, as_json)
    raise typer.Exit(status)


def report(code: str, message: str, as_json: bool) -> None:
    """Say what went wrong: an object on standard output, or one line on standard error."""
    if as_json:
        content: dict[str, Any] = {"error": {"code": code, "message": message}}
        emit(content)
    else:
        print(f"parckpt: {plain(message)}", file=sys.stderr, flush=True)
