"""A process that was promised others: ``alone.py directory``. Prints what it was told."""

from __future__ import annotations

import sys

import numpy as np

import parckpt


def main() -> None:
    directory = sys.argv[1]
    assert "mpi4py" not in sys.modules
    state = {"w": np.arange(3.0)}
    try:
        parckpt.ModelCheckpoint("net", directory)
    except parckpt.ConfigError as error:
        print(error)
    with parckpt.ModelCheckpoint("net", directory, comm=parckpt.SELF) as ckpt:
        ckpt.step_end(state, 1)
    # Alone is what this function means without comm; parts of something are not.
    parckpt.save_checkpoint(state, f"{directory}/one")
    for parts in ({"w": parckpt.Shard(np.zeros(1), (2,), (0,))}, {"w": parckpt.PerRank(1)}):
        try:
            parckpt.save_checkpoint(parts, f"{directory}/parts")
        except parckpt.ConfigError as error:
            print(error)
    parckpt.save_checkpoint({"w": parckpt.PerRank(1)}, f"{directory}/own", comm=parckpt.SELF)


main()
