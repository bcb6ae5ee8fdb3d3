"""Which ranks belong together: what the launcher says, what MPI says, and what the caller says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import parckpt
from parckpt.comm.launch import LAUNCHER_VARIABLES
from parckpt.testing.mpirun import ENVIRONMENT, Mpi, python_of, run


def _plain(mpi: Mpi, program: Path, directory: Path, **promised: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment |= ENVIRONMENT[mpi] | promised
    environment["PYTHONPATH"] = str(Path(parckpt.__file__).parent.parent)
    command = [str(python_of(mpi)), str(program), str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("variable", ["PMI_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"])
def test_a_lonely_world_is_refused(mpi: Mpi, variable: str, programs: Path, tmp_path: Path) -> None:
    """As under `srun --mpi=none`: four processes, each of which MPI takes for the only one."""
    told = _plain(mpi, programs / "alone.py", tmp_path, **{variable: "4"}).splitlines()
    assert len(told) == 3
    assert f"{variable}=4" in told[0]
    assert "one rank" in told[0]
    assert "comm=parckpt.SELF" in told[0]
    for line in told[1:]:
        assert line.startswith("'w' is a Shard or PerRank")
        assert f"{variable}=4" in line
    assert sorted(one.step for one in parckpt.list_checkpoints(tmp_path, prefix="net")) == [1]


def test_one_process_needs_no_mpi(programs: Path, tmp_path: Path) -> None:
    code = (
        "import sys, numpy, parckpt\n"
        "with parckpt.ModelCheckpoint('net', sys.argv[1]) as ckpt: ckpt.step_end({'w': numpy.ones(3)}, 1)\n"
        "assert parckpt.load_checkpoint(ckpt.latest_ckpt_file_name)['w'].sum() == 3\n"
        "print('mpi4py' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment["PYTHONPATH"] = str(Path(parckpt.__file__).parent.parent)
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_under_mpiexec(mpi: Mpi, programs: Path, tmp_path: Path) -> None:
    result = run(programs / "launched.py", 4, [str(tmp_path)], mpi=mpi, timeout_s=60).check()
    for out in result.stdout:
        told, done = out.splitlines()
        assert "is a Shard or PerRank" in told
        assert "comm=MPI.COMM_WORLD" in told
        assert done == "done"
    assert parckpt.inspect(parckpt.list_checkpoints(tmp_path / "run")[0].path).world_size == 4
    assert parckpt.inspect(tmp_path / "half_1.ckpt").world_size == 2
    assert parckpt.inspect(tmp_path / "of_root.ckpt").world_size == 1
    assert [parckpt.list_checkpoints(tmp_path / f"own_{rank}")[0].world_size for rank in range(4)] == [1] * 4
