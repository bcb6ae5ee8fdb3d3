"""Checkpoints to look at, and ways to call the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import parckpt
from parckpt.cli.main import main
from parckpt.testing.world import run_world

TESTS = Path(__file__).parent.parent
PROGRAM = TESTS / "cli" / "programs" / "saving.py"


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as the one object it must be."""
        return json.loads(self.out)


Call = Callable[..., Outcome]


@pytest.fixture
def call() -> Call:
    """Run a command in this process."""

    def run(*words: Any, stdin: str | None = None) -> Outcome:
        result = CliRunner().invoke(main, [str(word) for word in words], input=stdin)
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def spawn() -> Call:
    """Run a command as a process, without a terminal."""

    def run(*words: Any, env: Mapping[str, str] | None = None, module: str = "parckpt.cli") -> Outcome:
        command = [sys.executable, "-m", module, *map(str, words)]
        environ = {**os.environ, **(env or {})}
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environ, timeout=120, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def golden() -> Path:
    """Files that MindSpore wrote."""
    return TESTS / "data" / "golden"


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    modes: dict[str, dict[str, Any]] = {
        "one": {},
        "ranks": {"integrated_save": False},
        "owners": {"remove_redundancy": True, "format": "safetensors", "crc_check": True},
    }
    for prefix, options in modes.items():
        run_world(2, lambda comm, rank, p=prefix, o=options: _train(comm, rank, root, p, o))
    parckpt.save_checkpoint({"w": np.arange(3.0)}, root / "single", append_dict={"epoch_num": 3})
    return root


def _train(comm: Any, rank: int, root: Path, prefix: str, options: Mapping[str, Any]) -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=2, keep_checkpoint_max=2, **options)
    part = np.arange(21.0, dtype="f4").reshape(3, 7) + rank
    # Two chunks and a bit, so that damage has a place.
    state = {
        "model": {"w": parckpt.Shard(part, (6, 7), (3 * rank, 0)), "big": np.zeros(1_200_000)},
        "count": np.array(7),
        "lr": 0.5,
        "nan": float("nan"),
        "position": parckpt.PerRank(10 * rank, on_resize="keep"),
        "own": parckpt.PerRank(np.arange(rank + 1), on_resize="keep"),
    }
    with parckpt.ModelCheckpoint(prefix, root, config, comm=comm, steps_per_epoch=3) as checkpoints:
        checkpoints.restore(state)
        for step in range(1, 6):
            state["model"]["big"] += 1  # type: ignore[index]
            checkpoints.step_end(state, step)


@pytest.fixture
def published(_pristine: Path, tmp_path: Path) -> Path:
    """A directory with checkpoints of every layout, to be damaged at will."""
    directory = tmp_path / "ckpts"
    shutil.copytree(_pristine, directory)
    return directory


def run_saving(directory: Path, how: str) -> int:
    """Run the saving program to its end; returns its status."""
    command = [sys.executable, str(PROGRAM), str(directory), how]
    return subprocess.run(command, timeout=120, capture_output=True, check=False).returncode


@pytest.fixture
def crashed(tmp_path: Path) -> Callable[[str], Path]:
    """A directory in which a run died at a chosen act."""

    def make(how: str) -> Path:
        directory = tmp_path / "crashed"
        assert run_saving(directory, how) == 9
        return directory

    return make


@pytest.fixture
def finish() -> Callable[[Path], None]:
    """Start the run again, and let it end well."""

    def run(directory: Path) -> None:
        assert run_saving(directory, "well") == 0

    return run


@pytest.fixture
def alive(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A directory in which a living process is about to publish, and its pid."""
    directory = tmp_path / "alive"
    command = [sys.executable, str(PROGRAM), str(directory), "stay"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "waiting\n"
            yield directory, process.pid
        finally:
            process.kill()
