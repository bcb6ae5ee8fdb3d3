"""Every code block of README.md and docs/guide.md runs, in the order of the page, in one directory."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import parckpt
from parckpt.cli.main import main
from parckpt.testing.mpirun import ENVIRONMENT, python_of

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120

# These make environments of their own and run this very suite; .ci/run and tests/mpi/test_demo.py are their tests.
OWN_ENVIRONMENT = ("scripts/demo.sh", "scripts/test.sh")

SHIMS = {
    "python": 'exec {python} "$@"',
    "parckpt": 'exec {python} -m parckpt.cli "$@"',
    "mpiexec": 'exec {mpiexec} "$@"',
    # Slurm's launcher, as far as the pages use it: the number of ranks from -n, or from the job's script.
    "srun": """n=4; while :; do case "$1" in --*) shift;; -n) n=$2; shift 2;; *) break;; esac; done
exec {mpiexec} -n $n "$@\"""",
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """Name of the file that the block is, if it says so."""
        match = re.match(r"(?:#!.*\n)?# (\S+\.(?:py|sh))\n", self.text)
        return match[1] if match else None


def blocks(page: str) -> list[Block]:
    """All blocks of a page, whatever their language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = list(re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(fences) * 2 == len(re.findall(r"^```", text, re.MULTILINE)), "a fence is open"
    return [Block(fence[1], fence[2], text[: fence.start()].count("\n") + 1) for fence in fences]


@dataclass
class Terminal:
    """A directory with the commands that the pages call."""

    directory: Path

    def __post_init__(self) -> None:
        python = python_of("mpich")
        shims = self.directory / ".bin"
        shims.mkdir()
        for name, script in SHIMS.items():
            path = shims / name
            path.write_text("#!/bin/bash\n" + script.format(python=python, mpiexec=Path(python).parent / "mpiexec"))
            path.chmod(0o755)
        keep = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
        self.environment = {
            **keep,
            **ENVIRONMENT["mpich"],
            "PATH": f"{shims}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONWARNINGS": "error::UserWarning",
        }

    def run(self, block: Block) -> str:
        """Run or write a block; what it prints."""
        if block.file is not None:
            (self.directory / block.file).write_text(block.text, encoding="utf-8")
            return ""
        if block.language == "python":
            return self._here(block)
        lines = block.text.splitlines()
        if all(line.startswith("parckpt ") for line in lines):
            return "".join(self._parckpt(shlex.split(line, comments=True)[1:]) for line in lines)
        return self._bash(block)

    def _here(self, block: Block) -> str:
        """Run code that needs one process in this one, which has imported everything already."""
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            exec(compile(block.text, f"line {block.line}", "exec"), {"__name__": "__main__"})
        return told.getvalue()

    def _parckpt(self, arguments: list[str]) -> str:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"parckpt {shlex.join(arguments)}: {result.output}"
        return result.output

    def _bash(self, block: Block) -> str:
        done = subprocess.run(
            ["bash", "-ec", block.text],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"line {block.line}:\n{block.text}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(tmp_path)


def test_the_guide(terminal: Terminal) -> None:
    told: list[str] = []
    for block in blocks("docs/guide.md"):
        assert block.language in ("python", "sh"), f"line {block.line}: who runs this?"
        told += terminal.run(block).splitlines()
    starts = [line for line in told if line.startswith("starting after")]
    assert starts == [
        "starting after step 0",
        "starting after step 60",
        "starting after step 0 of 0 ranks",
        "starting after step 40 of 2 ranks",
        "starting after step 0: bias 0, rows of up 501",
        "starting after step 20: bias 10, rows of up 1001",
        "starting after step 40: bias 20, rows of up 501",
    ]
    text = "\n".join(told)
    assert "60 (1000, 64) 0.1" in text
    assert "loop_ckpts/loop-3_10.ckpt\n" in text
    # The newest two, one for each twenty, the best; step 7 and the ephemeral ones are gone.
    assert "[45, 37, 27, 17]\n" in text
    assert "named_ckpts/epoch_3/model_at_20.ckpt\n" in text
    assert "([], [])\n" in text
    assert "the box at offsets (500, 0) of shape (500, 64)\n" in text
    assert "(1000, 64) ['model.weights', 'optimizer.momentum']\nTrue\n" in text
    assert re.search(r"^\(1000, 64\)\n\[2, 1, 0\]$", text, re.MULTILINE)
    assert "wrong_path, and one is required" in text
    assert re.search(r"^40 \[\('.*net-1_60\.ckpt', .*chunk 0", text, re.MULTILINE)
    arrays = parckpt.load_checkpoint(parckpt.latest_checkpoint(terminal.directory / "sharded_ckpts") or "")
    assert arrays["up"].shape == (1001, 64)
    assert np.all(arrays["up"] == 60)
    assert np.all(arrays["down"] == -60)


def test_the_readme(terminal: Terminal) -> None:
    code = [block for block in blocks("README.md") if block.language == "python"]
    (terminal.directory / "train.py").write_text(code[0].text, encoding="utf-8")
    commands = [block for block in blocks("README.md") if block.language == "sh"]
    ran = 0
    for block in commands:
        lines = [line for line in block.text.splitlines() if not line.startswith(OWN_ENVIRONMENT)]
        ran += len(lines)
        terminal.run(Block("sh", "\n".join(lines), block.line))
    assert ran >= 3
    saved = parckpt.inspect(parckpt.latest_checkpoint(terminal.directory / "ckpts") or "")
    assert (saved.step, saved.world_size) == (100, 4)
    terminal.run(Block("python", code[1].text.replace("path =", "import parckpt\npath =", 1), code[1].line))
