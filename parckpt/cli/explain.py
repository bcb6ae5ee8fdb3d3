"""``parckpt explain``: why the checkpoints of a directory are there, and what becomes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from parckpt.cli.failure import guarded, status_of
from parckpt.cli.options import DebugOption, DirectoryArgument, JsonOption, PrefixOption, absolute
from parckpt.cli.output import age, count, emit, line, moment, size
from parckpt.comm.wait import SystemClock
from parckpt.engine.catalog import Found, scan
from parckpt.engine.explaining import Explained, Explanation, explain_family
from parckpt.engine.keeper import noted_in
from parckpt.engine.places import directories_of
from parckpt.engine.survey import is_unreadable, owns, run_files
from parckpt.errors import StorageError
from parckpt.storage.filesystem import FileSystem, PosixFileSystem

__all__ = ["explain"]


@guarded
def explain(
    directory: DirectoryArgument = ".",
    prefix: PrefixOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Say why each checkpoint is there, whether it stays, and which one a restore would take.

    For each prefix: what a restore would take, and why not the others; when the next save is due; of each checkpoint
    why it was saved ("made"), why it is kept ("stays"), and why the next save would delete it ("goes").

    What is said of damage is what names and sizes tell; only verify reads the data. Takes no lock, changes nothing:
    safe beside a running job. Exit status 6, or 10, if a manifest could not be read.
    """
    del debug
    fs = PosixFileSystem()
    path = absolute(directory)
    now = SystemClock().wall()
    runs = run_files(fs, path)
    families = _families(scan(fs, path, prefix, tolerant=True), [name for name in runs if prefix in (None, name)])
    others = {name: _elsewhere(fs, path, name, runs.get(name)) for name in families}
    here = scan(fs, path, tolerant=True)  # a restore reads the manifests of all
    told = [
        explain_family(
            *(fs, path, name, found, now, runs.get(name), others[name]),
            refused=next((one for one in (*here, *others[name]) if isinstance(one.error, StorageError)), None),
        )
        for name, found in families.items()
    ]
    unread = [one.error for found in (*families.values(), *others.values()) for one in found if one.error is not None]
    status = next((status_of(error) for error in unread if is_unreadable(error)), 0)
    if as_json:
        emit({"directory": path, "prefixes": [_row(one, path, now) for one in told]})
        return status
    if not told:
        line(f"no checkpoints{f' of prefix {prefix!r}' if prefix is not None else ''} in {path}")
    for number, one in enumerate(told):
        if number:
            line("")
        _print(one, now)
    return status


def _elsewhere(fs: FileSystem, path: str, family: str, run_file: Mapping[str, Any] | None) -> list[Found]:
    """What the run has in other directories, where a callable made it go on."""
    others = directories_of(fs, path, noted_in(run_file))[1:]
    return [one for other in others for one in scan(fs, other, family, any_name=True, tolerant=True)]


def _families(published: list[Found], known: list[str]) -> dict[str, list[Found]]:
    """By prefix; what cannot say whose it is goes to the prefix that its name begins with."""
    found: dict[str, list[Found]] = {name: [] for name in sorted(known)}
    for one in published:
        if one.facts is not None:
            found.setdefault(one.facts.family, []).append(one)
    for one in published:
        if one.facts is None:
            name = next((name for name in found if owns(name, one.stem)), one.stem)
            found.setdefault(name, []).append(one)
    return found


def _row(told: Explanation, path: str, now: float) -> dict[str, Any]:
    policies = told.policies
    return {
        "prefix": told.family,
        "restore": told.restore,
        "restored": os.path.relpath(told.restored.path, path) if told.restored is not None else None,
        "next_save": list(told.due),
        "policy": {
            "save": policies.save.to_json() if policies.save is not None else None,
            "keep": policies.keep.to_json() if policies.keep is not None else None,
            "problem": policies.problem,
        },
        "checkpoints": [_checkpoint_row(one, now) for one in told.checkpoints],
    }


def _checkpoint_row(one: Explained, now: float) -> dict[str, Any]:
    facts = one.found.facts
    metrics = facts.metric_values() if facts is not None else {}
    return {
        "name": os.path.basename(one.found.path),
        "path": one.found.path,
        "step": facts.step if facts else None,
        "created": facts.created if facts else None,
        "nbytes": facts.nbytes if facts else None,
        "age_s": round(now - facts.created, 3) if facts else None,
        "reason": facts.reason if facts else None,
        "ephemeral": facts.ephemeral if facts else None,
        # JSON has no NaN.
        "metrics": {name: value if abs(value) < float("inf") else str(value) for name, value in metrics.items()},
        "made": one.made,
        "stays": one.stays,
        "goes": one.goes,
        "restore": one.restore,
    }


def _when(row: dict[str, Any]) -> str:
    """Nothing of a checkpoint whose manifest is damaged."""
    if row["step"] is None:
        return ""
    return f"  step {row['step']}, {moment(row['created'])}, {age(row['age_s'])} ago, {size(row['nbytes'])}"


def _print(told: Explanation, now: float) -> None:
    line(f"prefix {told.family!r}: {count(len(told.checkpoints), 'checkpoint')}", "bold")
    line(f"  restore    {told.restore}")
    for number, due in enumerate(told.due):
        line(f"  {'next save' if number == 0 else 'or':<9}  {due}")
    if told.policies.problem is not None and told.checkpoints:
        line(f"  policy     unknown: {told.policies.problem}")
    for one in told.checkpoints:
        row = _checkpoint_row(one, now)
        line("")
        line(f"{row['name']}{_when(row)}")
        if row["metrics"]:
            line(f"  metrics    {', '.join(f'{name}={value}' for name, value in row['metrics'].items())}")
        line(f"  made       {one.made}")
        if one.stays is not None:
            line(f"  stays      {one.stays}")
        if one.goes is not None:
            line(f"  goes       at the next save: {one.goes}")
        line(f"  restore    {one.restore}")
