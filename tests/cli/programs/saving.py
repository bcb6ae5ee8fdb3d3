"""One process that saves two steps, and can die or stay at a chosen act of the second: saving.py DIR HOW."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

import parckpt
from parckpt.engine.staging import Staging


def _die(*args: Any, **options: Any) -> None:
    os._exit(9)


def _stay(*args: Any, **options: Any) -> None:
    print("waiting", flush=True)
    sys.stdin.read()
    os._exit(0)


def main(directory: str, how: str) -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1, integrated_save=False)
    state = {"w": np.arange(4.0)}
    with parckpt.ModelCheckpoint("run", directory, config) as checkpoints:
        first = checkpoints.restore(state).step + 1
        for step in (first, first + 1):
            if step > first and how == "die-before-publish":
                Staging.publish_directory = _die  # type: ignore[method-assign, assignment]
            elif step > first and how == "die-before-record":
                Staging.record = _die  # type: ignore[method-assign, assignment]
            elif step > first and how == "stay":
                Staging.publish_directory = _stay  # type: ignore[method-assign, assignment]
            state["w"] += 1
            checkpoints.step_end(state, step)


if __name__ == "__main__":
    main(*sys.argv[1:])
