"""A training loop in which rank 1 raises in the third step: ``leaving.py directory``; plain Python, no abort."""

from __future__ import annotations

import sys

import numpy as np

import parckpt


def main() -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=2, integrated_save=False)
    with parckpt.ModelCheckpoint("net", sys.argv[1], config) as ckpt:
        weights = np.zeros(5)
        for step in range(1, 6):
            weights += step
            if step == 3 and ckpt.last_decision is not None and parckpt_rank() == 1:
                raise ZeroDivisionError("the program's own")
            ckpt.step_end({"w": weights}, step)


def parckpt_rank() -> int:
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.Get_rank())


main()
