"""Restore, compare, train three steps, and die by SIGKILL at the n-th call of the third save.

``dying.py directory case rank n``: which rank dies, ``all`` for every one at its own n-th call; n = 0: nobody.
"""

from __future__ import annotations

import os
import signal
import sys

from parckpt.checkpointer import ModelCheckpoint
from parckpt.comm.mpi import wrap
from parckpt.core.config import CheckpointConfig
from parckpt.testing.faulty import Call, FaultyFileSystem
from parckpt.testing.jobs import LAYOUTS, Job, QuickFileSystem


def main() -> None:
    directory, case, who, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    comm = wrap()
    left = -1

    def die(call: Call) -> None:
        nonlocal left
        # The lock's heartbeat comes from a thread, at any time.
        if left > 0 and not call.path.endswith(".lock"):
            left -= 1
            if left == 0:
                print("dies at", call.operation, os.path.basename(call.path))
                os.kill(os.getpid(), signal.SIGKILL)

    layout, form = case.split("-")
    config = CheckpointConfig(save_checkpoint_steps=1, keep_checkpoint_max=2, format=form, **LAYOUTS[layout])
    fs = FaultyFileSystem(QuickFileSystem(), on_call=die)
    with ModelCheckpoint("net", directory, config, comm=comm, filesystem=fs) as ckpt:
        job = Job(comm.rank, comm.size, None, large=False)
        progress = ckpt.restore(job.state)
        if progress.step:
            job.check(progress.step, progress.world_size)
        print("restored", progress.step)
        for step in range(progress.step + 1, progress.step + 4):
            if step == progress.step + 3 and who in ("all", str(comm.rank)):
                left = count
            ckpt.step_end(Job(comm.rank, comm.size, step, large=False).state, step)
            print("published", step)
    comm.free()


main()
