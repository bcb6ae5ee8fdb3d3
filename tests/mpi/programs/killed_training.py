"""Run the example's training, and kill every process of the job when rank 0 says that a given step was made.

Arguments: step (0: never), then those of the example.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

from parckpt.testing.mpirun import MARK_VARIABLE
from parckpt.testing.processes import kill_marked

TRAIN = Path(__file__).resolve().parents[3] / "examples" / "digits" / "train.py"


class DeadlyOutput:
    """Standard output that ends the job after one line."""

    def __init__(self, step: str) -> None:
        self.inner, self.start = sys.stdout, f"step {step} "

    def write(self, text: str) -> int:
        written = self.inner.write(text)
        if text.startswith(self.start):
            self.inner.flush()
            kill_marked(f"{MARK_VARIABLE}={os.environ[MARK_VARIABLE]}")  # the launcher too, but not the caller
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def flush(self) -> None:
        self.inner.flush()


sys.stdout = DeadlyOutput(sys.argv[1])  # type: ignore[assignment]
sys.argv = [str(TRAIN), *sys.argv[2:]]
runpy.run_path(str(TRAIN), run_name="__main__")
