"""Pins: marks of a user that keep one checkpoint from being deleted by retention or prune.

A pin is an empty file ``.<stem>.pin-<token>`` beside the checkpoint. With the token it holds for this very save: what
takes the name later is not pinned. Setting one needs no lock, and works beside a running job.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from parckpt.engine.catalog import Found, find_at
from parckpt.errors import CheckpointExistsError, CheckpointGoneError
from parckpt.storage.atomic import write_file
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["Pin", "find_pins", "is_pinned", "pin", "pin_path", "unpin"]

_PIN = re.compile(r"\.(?P<stem>.+)\.pin-(?P<token>[0-9a-f]{16})", re.DOTALL)


@dataclass(frozen=True)
class Pin:
    """One pin; ``since`` is when it was set, in seconds since the epoch."""

    name: str
    stem: str
    token: str
    since: float


def find_pins(fs: FileSystem, directory: str) -> list[Pin]:
    """List the pins of a directory, also those whose checkpoint is not there any more."""
    found: list[Pin] = []
    for name in fs.listdir(directory):
        match = _PIN.fullmatch(name)
        stat = try_stat(fs, os.path.join(directory, name)) if match else None
        if match is not None and stat is not None:
            found.append(Pin(name, match["stem"], match["token"], stat.mtime))
    return sorted(found, key=lambda one: one.name)


def is_pinned(fs: FileSystem, directory: str, found: Found) -> bool:
    """Whether a checkpoint in a directory is pinned."""
    return try_stat(fs, pin_path(directory, found.stem, found.token)) is not None


def pin(fs: FileSystem, found: Found) -> bool:
    """Pin a checkpoint; False if it is pinned already.

    Raises
    ------
    CheckpointGoneError
        If it was deleted meanwhile: who deletes looks for a pin afterwards, so one of the two always notices.
    """
    if found.error is not None:
        raise found.error
    directory = os.path.dirname(found.path)
    try:
        write_file(fs, pin_path(directory, found.stem, found.token), b"")
    except CheckpointExistsError:
        return False
    fs.sync_directory(directory)
    now = find_at(fs, found.path)
    if now is None or now.token != found.token:
        unpin(fs, directory, found.stem, found.token)
        raise CheckpointGoneError(f"{found.path} was deleted before it was pinned", path=found.path)
    return True


def unpin(fs: FileSystem, directory: str, stem: str, token: str) -> bool:
    """Remove a pin; False if there is none."""
    path = pin_path(directory, stem, token)
    if try_stat(fs, path) is None:
        return False
    fs.unlink(path)
    fs.sync_directory(directory)
    return True


def pin_path(directory: str, stem: str, token: str) -> str:
    """Path of the pin of a checkpoint."""
    return os.path.join(directory, f".{stem}.pin-{token}")
