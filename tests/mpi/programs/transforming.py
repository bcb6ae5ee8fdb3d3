"""Transform the files of four ranks on any number of real ones; load the result; fail together."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import parckpt
from parckpt import Layout
from parckpt.comm.mpi import wrap
from parckpt.testing.foreign import piece_of, put

FULL = {"w": np.arange(144, dtype=np.float32).reshape(12, 12), "b": np.arange(12, dtype=np.int64)}
FOUR = {"w": Layout((2, 2), None, (1, 0)), "b": Layout((4,), None, (-1,))}


def main() -> None:
    root, comm = Path(sys.argv[1]), wrap()
    source, unified, files = (str(root / name) for name in ("source", "unified", "files"))
    if comm.rank == 0:
        for rank in range(4):
            pieces = {name: piece_of(array, FOUR[name], rank) for name, array in FULL.items()}
            put(root / "source" / f"rank_{rank}" / "net-1_2.ckpt", pieces, crc=True)
    ours = {name: Layout((comm.size,), None, (0,)) for name in FULL}
    parckpt.transform_checkpoints(source, files, "p", FOUR, ours, comm=comm)
    parckpt.unified_safetensors(source, FOUR, unified, part_nbytes=400, comm=comm)
    expected = {name: piece_of(array, ours[name], comm.rank) for name, array in FULL.items()}
    net = {name: np.zeros_like(array) for name, array in expected.items()}
    parckpt.load_distributed_checkpoint(
        net, predict_strategy=ours, format="safetensors", unified_safetensors_dir=unified, comm=comm
    )
    own = parckpt.load_checkpoint(
        str(root / "files" / f"rank_{comm.rank}" / f"p{comm.rank}.ckpt"), allow_unverified=True
    )
    same = all(np.array_equal(net[name], own[name]) and np.array_equal(own[name], expected[name]) for name in FULL)
    if comm.rank == 0:
        path = root / "source" / "rank_1" / "net-1_2.ckpt"
        path.write_bytes(path.read_bytes().replace(np.float32(6).tobytes(), np.float32(7).tobytes()))
    try:
        parckpt.transform_checkpoints(source, files, "q", FOUR, ours, comm=comm)
        told = "nothing"
    except parckpt.ChecksumError as error:
        told = "rank_1/net-1_2.ckpt" if "rank_1/net-1_2.ckpt" in str(error) else str(error)
    print(f"same: {same}, told: {told}", flush=True)


if __name__ == "__main__":
    main()
