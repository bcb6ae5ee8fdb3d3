"""Deleting a published checkpoint in steps that a crash may end anywhere: what is left is swept, never half a one."""

from __future__ import annotations

import os

from parckpt.core import naming
from parckpt.engine.catalog import Found
from parckpt.engine.pins import is_pinned
from parckpt.storage.atomic import move_new, remove_tree
from parckpt.storage.filesystem import FileSystem

__all__ = ["remove_taken", "take_away"]


def take_away(fs: FileSystem, found: Found) -> str | None:
    """Rename a checkpoint to a trash name, durably: from here on it does not exist.

    The caller holds the lock. Returns the new path for `remove_taken`, or None if somebody has pinned it meanwhile:
    then it is left, or put back.
    """
    assert found.facts is not None
    directory = os.path.dirname(found.path)
    if is_pinned(fs, directory, found):
        return None
    trash = os.path.join(directory, naming.trash_name(found.stem, found.facts.token))
    fs.rename(found.path, trash)
    # Who pins looks whether the checkpoint is still there, afterwards; who deletes looks for a pin, afterwards.
    if is_pinned(fs, directory, found):
        move_new(fs, trash, found.path)
        trash = ""
    fs.sync_directory(directory)
    return trash or None


def remove_taken(fs: FileSystem, found: Found, trash: str) -> None:
    """Remove what `take_away` took: of a file the data first, so that its manifest tells whose it was."""
    remove_tree(fs, trash)
    if not found.is_directory:
        fs.unlink(found.manifest_path)
