"""What commands print: JSON for programs, tables for people, nothing that a file's name could turn into a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

__all__ = ["age", "console", "count", "emit", "facts", "line", "moment", "plain", "progress_bar", "size", "table"]

# Wide enough that no cell is ever cut or folded: a file or a pipe has no edge.
_NO_EDGE = 1_000_000
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_COLORS = {"ok": "green", "sound": "green", "damaged": "bold red", "set aside": "yellow", "no manifest": "yellow"}
_COLORS |= {"unreadable": "bold red", "renamed": "yellow"}
_COLORS |= {"goes": "yellow", "would go": "yellow"}


def emit(content: Mapping[str, Any]) -> None:
    """Print one JSON object; only ASCII, so that any name survives any terminal and any encoding."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or without an edge where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream.isatty()
    return Console(
        file=stream,
        width=None if is_terminal else _NO_EDGE,
        markup=False,
        emoji=False,
        highlight=False,
        force_terminal=None if is_terminal else False,
    )


def plain(text: str) -> str:
    """Text with everything unprintable escaped: names come from disk and may hold terminal commands."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def line(text: str, style: str = "") -> None:
    """Print one line, however long."""
    console().print(Text(plain(text), style=style), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print a table, one line a row. The terminal wraps what is longer than it is wide; nothing is cut or folded."""
    cells = [[Text(column, style="bold") for column in columns], *([_cell(cell) for cell in row] for row in rows)]
    widths = [max(row[k].cell_len for row in cells) for k in range(len(columns))]
    out = console()
    for row in cells:
        shown = Text()
        for column, width, cell in zip(columns, widths, row, strict=True):
            room = " " * (width - cell.cell_len)
            shown.append(room if column in right else "").append_text(cell).append("" if column in right else room)
            shown.append("  ")
        shown.rstrip()
        out.print(shown, soft_wrap=True)


def _cell(text: str) -> Text:
    return Text(plain(text), style=_COLORS.get(text.partition(":")[0].removesuffix(", pinned"), ""))


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one pair a line."""
    found = list(pairs)
    width = max((len(name) for name, _ in found), default=0)
    for name, value in found:
        line(f"{name:<{width}}  {value}")


def size(nbytes: int) -> str:
    """Bytes in decimal units, three digits: ``1.23 GB``."""
    if nbytes < 1000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
        value /= 1000
    raise AssertionError("the last unit takes everything")


def moment(seconds: float | None) -> str:
    """Local time with its offset from UTC; a dash for the unknown."""
    if not seconds:
        return "-"
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    except (OverflowError, ValueError, OSError):
        return "-"


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def age(seconds: float) -> str:
    """A duration in one unit: ``42 s``, ``3.5 h``; of a clock that is ahead, ``-5 s``."""
    if abs(seconds) < 120:
        return f"{seconds:.0f} s"
    for limit, unit, length in ((7200, "min", 60), (172800, "h", 3600)):
        if abs(seconds) < limit:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show bytes done on standard error, if that is a terminal; gives what counts them."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda nbytes: None
        return
    words = TextColumn("{task.description}", markup=False)
    columns = (words, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
