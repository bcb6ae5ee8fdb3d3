"""``parckpt unlock``: remove the lock of a run that is gone, when a human knows better than the lock."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from parckpt.cli.failure import guarded
from parckpt.cli.options import STALE_S, DebugOption, DirectoryArgument, JsonOption, absolute
from parckpt.cli.output import age, emit, line
from parckpt.cli.status import holder_row, holder_text
from parckpt.comm.wait import SystemClock
from parckpt.engine.survey import Holder, holder_of
from parckpt.errors import CheckpointNotFoundError, ConfigError, LockedError
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.storage.lock import break_lock, find_locks, read_lock

__all__ = ["unlock"]


@guarded
def unlock(
    directory: DirectoryArgument,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", metavar="P", help="Whose lock; needed if there are several.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Even if the holder seems to be alive.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove the lock of a run that is gone.

    Hardly ever needed: a start takes the lock over by itself when the holder's process is gone (on the same machine),
    when the same batch job is started again, or after 600 s without a sign of life.

    Shows the holder first. A holder that is alive, or was heard of in the last 600 s on a machine that cannot be
    seen from here, is left alone without --force. If it lives after all, its next save fails; it destroys nothing.
    """
    del debug
    fs = PosixFileSystem()
    path = absolute(directory)
    holder = _holder(fs, path, prefix)
    if holder is None:
        if as_json:
            emit({"directory": path, "prefix": prefix, "unlocked": False, "holder": None})
        else:
            line(f"nothing is locked in {path}")
        return
    row = holder_row(holder)
    if not as_json:
        line(f"{path}, prefix {holder.prefix!r}: {holder_text(row)}")
    if not force:
        _refuse_living(holder, path)
    if not yes:
        _ask(as_json)
    if not break_lock(fs, path, holder.prefix, holder.found) and read_lock(fs, path, holder.prefix) is not None:
        raise LockedError(f"the lock of prefix {holder.prefix!r} in {path} changed meanwhile: its holder is alive")
    if as_json:
        emit({"directory": path, "prefix": holder.prefix, "unlocked": True, "holder": row})
    else:
        line("unlocked")


def _holder(fs: FileSystem, path: str, prefix: str | None) -> Holder | None:
    locked = find_locks(fs, path)
    if prefix is None and len(locked) > 1:
        names = ", ".join(repr(name) for name in locked)
        raise ConfigError(f"{len(locked)} prefixes are locked in {path}: say which with --prefix: {names}")
    if prefix is not None and prefix not in locked and locked:
        names = ", ".join(repr(name) for name in locked)
        raise CheckpointNotFoundError(f"prefix {prefix!r} is not locked in {path}; locked: {names}", path=path)
    wanted = prefix if prefix is not None else locked[0] if locked else None
    return holder_of(fs, path, wanted, SystemClock().wall(), STALE_S) if wanted is not None else None


def _refuse_living(holder: Holder, path: str) -> None:
    if holder.alive:
        raise LockedError(
            f"process {holder.pid} is alive and holds the lock of {path}: end it first, or use --force (its next "
            "save then fails)"
        )
    if holder.replaceable is None:
        raise LockedError(
            f"the holder was heard of {age(holder.heartbeat_age_s)} ago and may well be alive: "
            f"wait until that is {age(STALE_S)}, or --force if you are sure that it is gone"
        )


def _ask(as_json: bool) -> None:
    if as_json or not _has_terminal():
        raise ConfigError("there is no terminal to ask at: --yes if you are sure")
    if not typer.confirm("Remove this lock?"):
        raise LockedError("left as it is")


def _has_terminal() -> bool:
    return sys.stdin.isatty()
