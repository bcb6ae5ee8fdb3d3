"""``parckpt ls``: the checkpoints of a directory, newest first."""

from __future__ import annotations

import os
from typing import Any

from parckpt.cli.failure import guarded, status_of_code
from parckpt.cli.options import DebugOption, DirectoryArgument, JsonOption, PrefixOption, absolute
from parckpt.cli.output import emit, line, moment, size, table
from parckpt.engine.catalog import Found, scan
from parckpt.engine.pins import is_pinned
from parckpt.engine.survey import Foreign, foreign_entries, is_unreadable, owns, quick_problem
from parckpt.storage.filesystem import FileSystem, PosixFileSystem

__all__ = ["checkpoint_row", "ls", "state_text", "unreadable_status"]

_COLUMNS = ("name", "step", "epoch", "when", "size", "ranks", "format", "reason", "state")


@guarded
def ls(
    directory: DirectoryArgument = ".",
    prefix: PrefixOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """List the checkpoints of a directory, newest first.

    Newest is what a restore would try first; several prefixes come one after the other. State: "ok" (manifest and
    sizes are right; only verify reads the data), "damaged: why", "unreadable: why" (not to be judged from here), "set
    aside: why" (a restore found damage and marked it), "no manifest" (not published by parckpt), "renamed: why";
    "pinned" if retention leaves it alone.

    Reads kilobytes, takes no lock, changes nothing: safe beside a running job. Exit status 6, or 10, if something was
    unreadable.
    """
    del debug
    fs = PosixFileSystem()
    path = absolute(directory)
    published = _by_family(scan(fs, path, prefix, tolerant=True))
    foreign = foreign_entries(fs, path, scan(fs, path, tolerant=True) if prefix is not None else published)
    foreign = [entry for entry in foreign if prefix is None or owns(prefix, entry.stem)]
    rows = [checkpoint_row(fs, found) for found in published]
    if as_json:
        emit({"directory": path, "checkpoints": rows, "foreign": [_foreign_row(entry) for entry in foreign]})
    elif not rows and not foreign:
        line(f"no checkpoints{f' of prefix {prefix!r}' if prefix is not None else ''} in {path}")
    else:
        shown = [_cells(row) for row in rows] + [_foreign_cells(entry) for entry in foreign]
        table(_COLUMNS, shown, right=("step", "epoch", "size", "ranks"))
    return unreadable_status(rows)


def unreadable_status(rows: list[dict[str, Any]]) -> int:
    """Exit status of a listing: 0, or that of the first that could not be read."""
    return next((status_of_code(row["code"]) for row in rows if row["state"] == "unreadable"), 0)


def _by_family(published: list[Found]) -> list[Found]:
    """Runs apart, the one that saved last first: sequence numbers order the checkpoints of one run only."""
    latest: dict[str, float] = {}
    for found in published:
        if found.facts is not None:
            family = found.facts.family
            latest[family] = max(latest.get(family, 0.0), found.facts.created)

    def order(found: Found) -> tuple[bool, float, str]:
        family = found.facts.family if found.facts is not None else ""
        return found.facts is None, -latest.get(family, 0.0), family

    return sorted(published, key=order)


def checkpoint_row(fs: FileSystem, found: Found) -> dict[str, Any]:
    """What is known of a published checkpoint without reading its data."""
    facts, problem = found.facts, quick_problem(fs, found)
    state = "set aside" if found.set_aside is not None else "ok"
    if problem is not None:
        state = "unreadable" if is_unreadable(problem) else "damaged"
    return {
        "name": os.path.basename(found.path),
        "path": found.path,
        "state": state,
        "problem": problem.message if problem is not None else found.set_aside,
        "code": problem.code if problem is not None else None,
        "pinned": is_pinned(fs, os.path.dirname(found.path), found),
        "step": facts.step if facts else None,
        "epoch": facts.epoch if facts else None,
        "step_in_epoch": facts.step_in_epoch if facts else None,
        "sequence": facts.sequence if facts else None,
        "created": facts.created if facts else None,
        "nbytes": facts.nbytes if facts else None,
        "tensor_count": facts.tensor_count if facts else None,
        "ranks": facts.world_size if facts else None,
        "format": facts.format if facts else None,
        "integrated": facts.integrated if facts else None,
        "prefix": facts.prefix if facts else None,
        "family": facts.family if facts else None,
        "kind": facts.kind if facts else None,
        "reason": facts.reason if facts else None,
        "consistent": facts.consistent if facts else None,
        "run_id": facts.run_id if facts else None,
        "token": facts.token if facts else None,
    }


def _foreign_row(entry: Foreign) -> dict[str, Any]:
    return {
        "name": entry.name,
        "path": entry.path,
        "state": "no manifest" if entry.renamed is None else "renamed",
        "problem": entry.renamed,
        "files": entry.files,
        "nbytes": entry.nbytes,
        "modified": entry.mtime,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    numbers = [str(row[key]) if row[key] is not None else "-" for key in ("step", "epoch", "ranks")]
    kind, reason = row["kind"] or "-", row["reason"] or "-"
    why = reason if kind in ("regular", "-") else f"{kind}, {reason}" + ("" if row["consistent"] else ", inconsistent")
    nbytes = size(row["nbytes"]) if row["nbytes"] is not None else "-"
    when = moment(row["created"])
    return (row["name"], numbers[0], numbers[1], when, nbytes, numbers[2], row["format"] or "-", why, state_text(row))


def state_text(row: dict[str, Any]) -> str:
    """State of a checkpoint in words."""
    why = f": {row['problem']}" if row["problem"] else ""
    return f"{row['state']}{', pinned' * row['pinned']}{why}"


def _foreign_cells(entry: Foreign) -> tuple[str, ...]:
    state = "no manifest" if entry.renamed is None else f"renamed: {entry.renamed}"
    form = f"{entry.files} files" if entry.is_directory else os.path.splitext(entry.name)[1].lstrip(".")
    return (entry.name, "-", "-", moment(entry.mtime), size(entry.nbytes), "-", form, "-", state)
