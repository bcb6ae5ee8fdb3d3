"""Two ranks of MPI that train with MindSpore and save together."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms

import parckpt
from parckpt.testing.mpirun import run

PROGRAM = Path(__file__).parent / "programs" / "train_on_ranks.py"


def test_ranks_train_save_restore_and_train_on(tmp_path: Path) -> None:
    directory = tmp_path / "ckpts"
    done = run(PROGRAM, 2, [str(directory)], mpi="mpich", timeout_s=120, abort_on_error=True).check()
    assert len(set(done.stdout)) == 1
    assert sorted(path.name for path in directory.glob("net-*")) == ["net-1_4", "net-2_4"]
    # MindSpore reads each rank's file, and together they are what is there.
    files = [directory / "net-2_4" / f"rank_{rank}" / "net-2_4.ckpt" for rank in (0, 1)]
    parts = [ms.load_checkpoint(str(path)) for path in files]
    assert not set(parts[0]) & set(parts[1])
    whole = parckpt.load_checkpoint(str(directory / "net-2_4"))
    assert set(whole) == set(parts[0]) | set(parts[1])
    for part in parts:
        assert part
        for name, parameter in part.items():
            assert parameter.asnumpy().tobytes() == whole[name].tobytes()
