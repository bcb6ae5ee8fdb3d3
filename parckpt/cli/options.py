"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

__all__ = ["STALE_S", "DebugOption", "DirectoryArgument", "JsonOption", "PrefixOption"]

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
