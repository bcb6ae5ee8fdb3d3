"""``parckpt pin``: keep one checkpoint from being deleted."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from parckpt.cli.failure import guarded
from parckpt.cli.options import DebugOption, JsonOption, absolute
from parckpt.cli.output import emit, line, moment, table
from parckpt.engine.catalog import Found, find_at, scan
from parckpt.engine.pins import Pin, find_pins, unpin
from parckpt.engine.pins import pin as set_pin
from parckpt.errors import CheckpointNotFoundError, ConfigError
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat

__all__ = ["pin"]


@guarded
def pin(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A checkpoint (step directory or data file); with --list the directory it is in.",
            show_default=False,
        ),
    ],
    remove: Annotated[
        bool, typer.Option("--remove", metavar="", help="Take the pin away: it may be deleted again.")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", metavar="", help="List what is pinned in a directory.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Keep one checkpoint from being deleted by a run's retention and by prune.

    Works beside a running job. A pinned checkpoint is not counted either: keep_checkpoint_max others stay. The pin
    belongs to this very save; if the same step is saved again in its place, the new one is not pinned. It protects
    from parckpt, not from rm.
    """
    del debug
    if remove and listing:
        raise ConfigError("--list changes nothing: leave out --remove, or name the checkpoint to unpin without --list")
    fs = PosixFileSystem()
    place = absolute(path)
    if listing:
        _list(fs, place, as_json)
    elif remove:
        _remove(fs, place, as_json)
    else:
        _pin(fs, place, as_json)


def _pin(fs: FileSystem, path: str, as_json: bool) -> None:
    found = _find(fs, path)
    changed = set_pin(fs, found)
    step = found.facts.step if found.facts is not None else None
    if as_json:
        emit({"path": found.path, "step": step, "token": found.token, "pinned": True, "changed": changed})
    else:
        line(f"{found.path} (step {step}): {'pinned' if changed else 'was pinned already'}")


def _find(fs: FileSystem, path: str) -> Found:
    stat = try_stat(fs, path)
    if stat is None:
        raise CheckpointNotFoundError(f"there is no checkpoint at {path}", path=path)
    found = find_at(fs, path)
    if found is not None:
        return found
    if stat.is_dir:
        said = "is not a checkpoint; parckpt ls lists what is in it, --list what is pinned there"
        raise CheckpointNotFoundError(f"{path} {said}", path=path)
    raise ConfigError(f"{path} has no manifest: neither retention nor prune ever deletes it, so it needs no pin")


def _remove(fs: FileSystem, path: str, as_json: bool) -> None:
    """Also of a checkpoint that is not there any more: then all pins of its name."""
    directory, name = os.path.split(path)
    found = find_at(fs, path) if try_stat(fs, path) is not None else None
    if found is not None:
        stem, tokens = found.stem, [found.token]
    else:
        stems = {name, os.path.splitext(name)[0]}
        gone = [one for one in find_pins(fs, directory) if one.stem in stems]
        if not gone:
            raise CheckpointNotFoundError(f"there is no checkpoint at {path}, and no pin of one", path=path)
        stem, tokens = gone[0].stem, [one.token for one in gone if one.stem == gone[0].stem]
    changed = sum(unpin(fs, directory, stem, token) for token in tokens) > 0
    if as_json:
        step = found.facts.step if found is not None and found.facts is not None else None
        emit({"path": path, "step": step, "token": tokens[0], "pinned": False, "changed": changed})
    else:
        line(f"{path}: {'no longer pinned' if changed else 'was not pinned'}")


def _list(fs: FileSystem, directory: str, as_json: bool) -> None:
    there = {(found.stem, found.token): found for found in scan(fs, directory)}
    rows = [_row(one, there.get((one.stem, one.token))) for one in find_pins(fs, directory)]
    if as_json:
        emit({"directory": directory, "pins": rows})
    elif not rows:
        line(f"nothing is pinned in {directory}")
    else:
        cells = [(row["name"] or row["stem"], _step_text(row), moment(row["since"]), _state_text(row)) for row in rows]
        table(("pinned", "step", "since", "state"), cells, right=("step",))


def _row(one: Pin, found: Found | None) -> dict[str, Any]:
    facts = found.facts if found is not None else None
    return {
        "name": os.path.basename(found.path) if found is not None else None,
        "stem": one.stem,
        "path": found.path if found is not None else None,
        "step": facts.step if facts is not None else None,
        "token": one.token,
        "since": one.since,
        "pin": one.name,
    }


def _step_text(row: dict[str, Any]) -> str:
    return "-" if row["step"] is None else str(row["step"])


def _state_text(row: dict[str, Any]) -> str:
    return "there" if row["path"] is not None else "gone: the pin can be removed"
