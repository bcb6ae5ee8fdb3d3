"""Transform functions on real ranks: the files are shared, and what goes wrong goes wrong on all."""

from __future__ import annotations

from pathlib import Path

from parckpt.testing.mpirun import Mpi, run


def test_three_ranks_share_the_files_of_four(mpi: Mpi, programs: Path, tmp_path: Path) -> None:
    result = run(programs / "transforming.py", 3, [str(tmp_path)], mpi=mpi, timeout_s=90, abort_on_error=True).check()
    assert result.stdout == ("same: True, told: rank_1/net-1_2.ckpt\n",) * 3
    assert sorted(path.name for path in (tmp_path / "files").rglob("*.ckpt")) == ["p0.ckpt", "p1.ckpt", "p2.ckpt"]
    assert len(list((tmp_path / "unified").glob("part*.safetensors"))) == 2
