"""What docs/cli.md shows of the terminal is what the commands print.

With PARCKPT_WRITE_DOCS=1 in the environment this writes the present output into the page, and fails.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.cli.failure import status_of_code
from parckpt.errors import classes_by_code
from parckpt.testing.clock import ManualClock

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
_BLOCK = re.compile(r"(<!-- terminal -->\n```\n)(.*?)(?=```\n)", re.DOTALL)
_FILE = re.compile(r"<!-- (?P<name>[\w.]+\.json) -->\n```json\n(?P<content>.*?)```\n", re.DOTALL)


def prepare(directory: Path, page: str) -> None:
    """What the commands of the page find: a run of four saves, and the files that the page itself shows."""
    for match in _FILE.finditer(page):
        (directory / match["name"]).write_text(match["content"], encoding="utf-8")
    clock = ManualClock(1710030200.0)
    config = parckpt.CheckpointConfig(save_checkpoint_steps=100, keep_checkpoint_max=10)
    embed = np.zeros((512, 1024), "f4")
    options: dict[str, Any] = {"comm": parckpt.SELF, "clock": clock}
    with parckpt.ModelCheckpoint("llama", directory / "ckpts", config, **options) as checkpoints:
        for step in range(100, 401, 100):
            clock.advance(2000.0)
            embed[:3, 7] += np.float32(step) / 100
            embed[step, 0] = np.nan
            state = {"embed.weight": embed, "norm": np.ones(1024, "f4"), "lr": 1 / step}
            checkpoints.step_end(state, step)


def shown(page: str, run: Callable[[list[str]], str]) -> str:
    """The page with every command's present output."""

    def renew(match: re.Match[str]) -> str:
        commands = [line for line in match[2].splitlines() if line.startswith("$ ")]
        return match[1] + "\n".join(f"{line}\n{run(shlex.split(line)[2:])}" for line in commands)

    return _BLOCK.sub(renew, page)


@pytest.fixture(autouse=True)
def _in_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setattr("parckpt.cli.prune._has_terminal", lambda: True)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_the_page_shows_what_is_printed(call: Any, tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    prepare(tmp_path, page)
    present = shown(page, lambda words: call(*words, stdin="y\n").out.replace(str(tmp_path), "/scratch"))
    if os.environ.get("PARCKPT_WRITE_DOCS"):
        PAGE.write_text(present, encoding="utf-8")
    assert page.count("<!-- terminal -->") >= 4
    assert present == page


def test_every_code_of_an_error_stands_beside_its_exit_status() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Exit status")[1].split("## JSON")[0]
    told = {
        code: int(status)
        for status, codes in re.findall(r"^\| (\d+) \|.*\|(.*)\|$", section, re.MULTILINE)
        for code in re.findall(r"`([\w-]+)`", codes)
    }
    assert (told.pop("usage"), told.pop("interrupted")) == (2, 130)  # no error classes
    assert told == {code: status_of_code(code) for code in classes_by_code()}
