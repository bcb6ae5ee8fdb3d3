"""``parckpt prune``: delete old checkpoints by hand, as a run's own retention would."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from parckpt.cli.failure import guarded
from parckpt.cli.options import STALE_S, DebugOption, DirectoryArgument, JsonOption, PrefixOption, absolute
from parckpt.cli.output import count, emit, line, moment, progress_bar, size, table
from parckpt.comm.wait import SystemClock
from parckpt.engine.pruning import Judged, Pruned, Rule, judge_directory
from parckpt.engine.pruning import prune as delete
from parckpt.engine.verify import Report, verify_checkpoint
from parckpt.errors import ConfigError, LockedError
from parckpt.storage.filesystem import FileSystem, PosixFileSystem

__all__ = ["prune"]


@guarded
def prune(
    directory: DirectoryArgument,
    keep: Annotated[
        int | None,
        typer.Option("--keep", metavar="N", min=1, help="Of each run the newest N stay.", show_default=False),
    ] = None,
    minutes: Annotated[
        int | None,
        typer.Option("--minutes", metavar="M", min=1, help="Of each run one per M minutes stays.", show_default=False),
    ] = None,
    prefix: PrefixOption = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", metavar="", help="First read all that stays; what is damaged does not count."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", metavar="", help="Only say what would go; works beside a running job.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Delete old checkpoints by the rules of the run that saved them, or by yours.

    Without --keep or --minutes: what keep_checkpoint_max and the other rules of the run's CheckpointConfig would
    delete now. With one of them: that number instead, the run's other rules as they are. Each run is judged apart.

    Says of every checkpoint whether it stays and why, and asks. Of each run the newest that a restore would take
    stays, whatever the rules. Pinned, damaged, set-aside ones and those without a manifest stay, too, and do not count.

    Takes the lock: refused while a run is alive, since that deletes by itself after each save.
    """
    del debug
    if keep is not None and minutes is not None:
        raise ConfigError("--keep and --minutes exclude each other: leave one of them out")
    fs, path, rule = PosixFileSystem(), absolute(directory), Rule(keep, minutes)
    judged = judge_directory(fs, path, prefix, rule, SystemClock().wall())
    damaged: dict[str, str] = {}
    if verify:
        judged, damaged = _verified(fs, path, prefix, rule, judged)
    doomed = [one for one in judged if not one.keep]
    if not as_json:
        _print(path, judged, doomed, dry_run)
    done = Pruned((), ())
    if doomed and not dry_run:
        if not yes and not _ask(doomed, as_json):
            line("nothing was deleted")
            return
        with progress_bar("deleting", sum(one.nbytes for one in doomed)) as on_done:
            done = _delete(fs, path, doomed, rule, damaged, lambda one: on_done(one.nbytes))
    if as_json:
        emit(_content(path, judged, done, dry_run))
    else:
        _print_done(done)


def _verified(
    fs: FileSystem, path: str, prefix: str | None, rule: Rule, judged: list[Judged]
) -> tuple[list[Judged], dict[str, str]]:
    """Judge again and again, until everything that stays and counts was read and is sound."""
    damaged: dict[str, str] = {}
    seen: set[str] = set()
    while True:
        unread = [one for one in judged if one.keep and one.run[2] and one.path not in seen]
        if not unread:
            return judged, damaged
        with progress_bar("verifying", sum(one.nbytes for one in unread)) as on_read:
            for one in unread:
                seen.add(one.path)
                report = verify_checkpoint(fs, one.found, on_read)
                if report.verdict != "sound":
                    damaged[one.path] = _first_finding(report)
        judged = judge_directory(fs, path, prefix, rule, SystemClock().wall(), damaged)


def _first_finding(report: Report) -> str:
    worst = [one.message for one in report.findings if one.severity != "note"]
    return worst[0] if worst else report.verdict


def _delete(
    fs: FileSystem, path: str, doomed: Sequence[Judged], rule: Rule, damaged: dict[str, str], on_deleted: Any
) -> Pruned:
    try:
        return delete(fs, path, doomed, rule, SystemClock(), STALE_S, damaged=damaged, on_deleted=on_deleted)
    except LockedError as error:
        hint = "A run that is alive deletes by itself after each save; --dry-run only looks"
        raise LockedError(f"{error.message}. {hint}", **error.facts) from error


def _ask(doomed: Sequence[Judged], as_json: bool) -> bool:
    if as_json or not _has_terminal():
        raise ConfigError("there is no terminal to ask at: --yes to delete, --dry-run to look")
    what = count(len(doomed), "checkpoint")
    return typer.confirm(f"Delete {what}, {size(sum(one.nbytes for one in doomed))}?")


def _has_terminal() -> bool:
    return sys.stdin.isatty()


def _content(path: str, judged: list[Judged], done: Pruned, dry_run: bool) -> dict[str, Any]:
    deleted = {one.path for one in done.deleted}
    left = {one.path: reason for one, reason in done.left}
    return {
        "directory": path,
        "dry_run": dry_run,
        "checkpoints": [
            {
                "name": os.path.basename(one.path),
                "path": one.path,
                "family": one.run[0],
                "prefix": one.run[1],
                "run_id": one.run[2],
                "step": one.found.facts.step if one.found.facts is not None else None,
                "nbytes": one.nbytes,
                "keep": one.keep,
                "reason": left.get(one.path, one.reason),
                "deleted": one.path in deleted,
            }
            for one in judged
        ],
        "deleted": len(deleted),
        "deleted_nbytes": sum(one.nbytes for one in done.deleted),
    }


def _print(path: str, judged: list[Judged], doomed: list[Judged], dry_run: bool) -> None:
    if not judged:
        line(f"no checkpoints with a manifest in {path}")
        return
    rows = []
    for one in judged:
        facts = one.found.facts
        step, when = (str(facts.step), moment(facts.created)) if facts is not None else ("-", "-")
        verdict = "stays" if one.keep else "would go" if dry_run else "goes"
        rows.append((os.path.basename(one.path), step, when, size(one.nbytes), verdict, one.reason))
    table(("name", "step", "when", "size", "", "why"), rows, right=("step", "size"))
    if not doomed:
        line("nothing to delete")
    elif dry_run:
        nbytes = size(sum(one.nbytes for one in doomed))
        line(f"{len(doomed)} of {count(len(judged), 'checkpoint')} would go: {nbytes}")


def _print_done(done: Pruned) -> None:
    for one, reason in done.left:
        line(f"left {os.path.basename(one.path)}: {reason}", "yellow")
    if done.deleted:
        nbytes = size(sum(one.nbytes for one in done.deleted))
        line(f"deleted {count(len(done.deleted), 'checkpoint')}, {nbytes}")
