"""The command line: its commands, its version, its help."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import parckpt
from parckpt.cli.convert import convert
from parckpt.cli.copy import copy
from parckpt.cli.diff import diff
from parckpt.cli.environment import drop_launcher_variables
from parckpt.cli.explain import explain
from parckpt.cli.failure import USAGE, exit_help, report
from parckpt.cli.ls import ls
from parckpt.cli.merge import merge
from parckpt.cli.pin import pin
from parckpt.cli.plan import plan
from parckpt.cli.prune import prune
from parckpt.cli.show import show
from parckpt.cli.split import split
from parckpt.cli.status import status
from parckpt.cli.unlock import unlock
from parckpt.cli.verify import verify

__all__ = ["main"]


class _Commands(TyperGroup):
    """Usage errors as JSON, too, where JSON was asked for."""

    def main(self, *args: Any, **extra: Any) -> Any:
        given = args[0] if args else extra.get("args")
        words = sys.argv[1:] if given is None else given
        if "--json" not in words or not extra.get("standalone_mode", True):
            return super().main(*args, **extra)
        try:
            sys.exit(super().main(*args, **{**extra, "standalone_mode": False}))
        except Exception as error:
            # Typer brings its own copy of click or uses the installed one, by its version: ask for the method.
            if not hasattr(error, "format_message"):
                raise
            report("usage", error.format_message(), as_json=True)
            sys.exit(USAGE)

    def get_help_option(self, ctx: Any) -> Any:
        return _without_type(super().get_help_option(ctx))


class _Command(TyperCommand):
    def get_help_option(self, ctx: Any) -> Any:
        return _without_type(super().get_help_option(ctx))


def _without_type(option: Any) -> Any:
    """That --help is a bool helps nobody."""
    if option is not None:
        option.metavar = ""
    return option


main = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status:\n\n" + "\n\n".join(f"* {number}: {meaning}" for number, meaning in exit_help()),
)
"""The console script; a Typer application."""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"parckpt {parckpt.__version__}")
        raise typer.Exit


@main.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Look after the checkpoints of parallel training jobs.

    Everything here works beside a running job, and inside one: no command uses MPI. Every command takes --json.
    """
    del version
    drop_launcher_variables(os.environ)


main.command("ls", cls=_Command)(ls)
main.command("show", cls=_Command)(show)
main.command("status", cls=_Command)(status)
main.command("explain", cls=_Command)(explain)
main.command("verify", cls=_Command)(verify)
main.command("diff", cls=_Command)(diff)
main.command("convert", cls=_Command)(convert)
main.command("merge", cls=_Command)(merge)
main.command("split", cls=_Command)(split)
main.command("copy", cls=_Command)(copy)
main.command("pin", cls=_Command)(pin)
main.command("prune", cls=_Command)(prune)
main.command("plan", cls=_Command)(plan)
main.command("unlock", cls=_Command)(unlock)
