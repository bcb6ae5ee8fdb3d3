"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

import os
from typing import Annotated, TypeAlias

import typer

from parckpt.errors import ConfigError

__all__ = ["STALE_S", "DebugOption", "DirectoryArgument", "JsonOption", "PrefixOption", "absolute"]

STALE_S = 600.0
"""Seconds without a heartbeat after which a holder counts as gone: the default of ``lock_stale_s``."""

DirectoryArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="DIR", help="Directory that a job saves its checkpoints to.")
]
JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON object on standard output, errors included.")
]
DebugOption: TypeAlias = Annotated[
    bool, typer.Option("--debug", metavar="", help="After an error, show where it came from.")
]
PrefixOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        metavar="P",
        help="Only this prefix, as given to ModelCheckpoint; P_1, P_2, ... belong to it.",
        show_default=False,
    ),
]


def absolute(path: str) -> str:
    """The absolute form of a path that a user gave.

    Raises
    ------
    ConfigError
        If it is empty: most often a variable that was not set, and never meant to be the current directory.
    """
    if not path:
        raise ConfigError("a path is empty; the current directory is .", parameter="path")
    return os.path.abspath(path)
