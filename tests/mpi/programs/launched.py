"""What `comm=None` means under mpiexec: ``launched.py directory``."""

from __future__ import annotations

import sys

import numpy as np


def main() -> None:
    import parckpt

    assert "mpi4py" not in sys.modules
    from mpi4py import MPI

    rank, size, directory = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), sys.argv[1]
    if rank == 0:
        parckpt.save_checkpoint({"w": np.full(3, 7.0)}, f"{directory}/of_root")
    MPI.COMM_WORLD.Barrier()
    assert parckpt.load_checkpoint(f"{directory}/of_root.ckpt")["w"].tolist() == [7.0] * 3
    part = {"w": parckpt.Shard(np.full(2, rank), (2 * size,), (2 * rank,))}
    try:
        parckpt.save_checkpoint(part, f"{directory}/of_{rank}")
    except parckpt.ConfigError as error:
        print(error)
    # The world, without being told so.
    with parckpt.ModelCheckpoint("net", f"{directory}/run") as ckpt:
        ckpt.step_end(part, 1)
    # Each rank for itself, on purpose.
    with parckpt.ModelCheckpoint("net", f"{directory}/own_{rank}", comm=parckpt.SELF) as ckpt:
        ckpt.step_end({"w": np.arange(rank + 1)}, 1)
    # Half of the world, as mpi4py sees it.
    half = MPI.COMM_WORLD.Split(rank % 2)
    parckpt.save_checkpoint({"w": np.arange(3)}, f"{directory}/half_{rank % 2}", comm=half)
    half.Free()
    print("done")


main()
