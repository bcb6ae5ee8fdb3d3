"""Run a Python program on N real MPI ranks: output by rank, a hard limit that leaves nobody behind, stacks before it.

Environment variables tell which Python (with mpi4py, and its MPI's ``mpiexec`` beside it) is for which MPI:
``PARCKPT_TEST_MPICH_PYTHON`` and ``PARCKPT_TEST_OPENMPI_PYTHON``. For MPICH the present one is the default.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import parckpt
from parckpt.testing.processes import files_in_use, kill_marked, marked
from parckpt.testing.rank import LIMIT_VARIABLE, OUTPUT_VARIABLE

__all__ = ["MPIS", "Mpi", "MpiError", "MpiMissingError", "MpiResult", "python_of", "run"]

Mpi = Literal["mpich", "openmpi"]
MPIS: tuple[Mpi, ...] = ("mpich", "openmpi")

MARK_VARIABLE = "PARCKPT_TEST_RUN"

KILL_AFTER_S = 5.0
"""Between the stacks, which each rank writes by its own clock, and the end of all."""

ENVIRONMENT: dict[Mpi, dict[str, str]] = {
    # Inside a Slurm allocation both launchers would use it; these runs are of this machine.
    "mpich": {"HYDRA_RMK": "user", "HYDRA_LAUNCHER": "fork", "HYDRA_IFACE": "lo"},
    "openmpi": {
        "PRTE_MCA_ras": "^slurm",
        "PRTE_MCA_plm": "^slurm",
        # Containers run as root, and have fewer cores than we have ranks.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        # Silences a harmless error line of windows.
        "OMPI_MCA_osc": "^ucx",
    },
}


class MpiError(AssertionError):
    """A run failed or hit its limit. The message holds each rank's output."""


class MpiMissingError(Exception):
    """The MPI asked for is not installed where it was looked for."""


@dataclass(frozen=True)
class MpiResult:
    """How a run ended.

    Attributes
    ----------
    returncode : int
        Of mpiexec; negative if a signal ended it.
    stdout, stderr : tuple of str
        What each rank wrote, by rank.
    launcher : str
        What mpiexec itself wrote.
    survivors : tuple of int
        Processes that outlived mpiexec and were killed.
    """

    returncode: int
    stdout: tuple[str, ...]
    stderr: tuple[str, ...]
    launcher: str
    survivors: tuple[int, ...]

    def report(self) -> str:
        """All output, by rank."""
        parts = [f"mpiexec ended with {self.returncode}", self.launcher]
        for rank, (out, err) in enumerate(zip(self.stdout, self.stderr, strict=True)):
            parts += [f"--- rank {rank}, stdout:", out, f"--- rank {rank}, stderr:", err]
        return "\n".join(part.rstrip() for part in parts if part.strip())

    def check(self) -> MpiResult:
        """Raise `MpiError` with all output unless the run succeeded."""
        if self.returncode != 0:
            raise MpiError(self.report())
        return self


def python_of(mpi: Mpi) -> Path:
    """Python whose mpi4py uses this MPI.

    Raises
    ------
    MpiMissingError
        If there is none, or no ``mpiexec`` beside it.
    """
    variable = f"PARCKPT_TEST_{mpi.upper()}_PYTHON"
    python = os.environ.get(variable) or (sys.executable if mpi == "mpich" else "")
    if not python:
        raise MpiMissingError(f"{variable} is not set: scripts/test.sh makes an environment and sets it")
    # Not resolved: a virtual environment's python is a link, and its mpiexec lies beside the link.
    found = Path(python).absolute()
    if not found.is_file() or not (found.parent / "mpiexec").is_file():
        raise MpiMissingError(f"no {found.parent / 'mpiexec'} ({variable}={python})")
    return found


def run(
    program: Path | str,
    nranks: int,
    args: Sequence[str] = (),
    *,
    mpi: Mpi = "mpich",
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    abort_on_error: bool = False,
    keep_survivors: bool = False,
) -> MpiResult:
    """Run ``program`` on ``nranks`` ranks and wait for its end.

    Parameters
    ----------
    program : path
        A Python file; it is run as ``__main__`` by an interpreter of `python_of`.
    nranks : int
        Number of ranks.
    args : sequence of str, optional
        Its arguments.
    mpi : {"mpich", "openmpi"}, optional
        Which MPI.
    timeout_s : float, optional
        After this many seconds every rank writes its stacks, and a little later all are killed.
    env : mapping, optional
        More environment variables.
    abort_on_error : bool, optional
        Run as ``python -m mpi4py``: an uncaught exception on one rank ends all, instead of leaving them waiting.
    keep_survivors : bool, optional
        Leave processes alone that are still there when mpiexec has ended: the test waits for them itself.

    Raises
    ------
    MpiError
        If the limit was hit. A failure is returned: see `MpiResult.check`.
    """
    python = python_of(mpi)
    mark = f"{MARK_VARIABLE}={uuid.uuid4().hex}"
    # Short: launchers put sockets below it, whose paths are limited to 108 bytes.
    output = Path(tempfile.mkdtemp(prefix="parckpt-run-"))
    environment = _environment(mpi, mark, output, timeout_s) | dict(env or {})
    command = [str(python.parent / "mpiexec"), "-n", str(nranks), str(python)]
    command += ["-m", "mpi4py"] if abort_on_error else []
    command += ["-m", "parckpt.testing.rank", str(program), *args]
    try:
        with (output / "launcher").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        survivors: list[int] = []
        try:
            process.wait(timeout_s + KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            _kill_and_clean(process, mark)
            result = _result(process, nranks, output, [])
            raise MpiError(f"not done after {timeout_s:g} s: {command}\n{result.report()}") from None
        finally:
            # Also when the wait was interrupted.
            if process.poll() is None or not keep_survivors:
                survivors = kill_marked(mark)
                process.wait()
        return _result(process, nranks, output, survivors)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _environment(mpi: Mpi, mark: str, output: Path, timeout_s: float) -> dict[str, str]:
    name, _, value = mark.partition("=")
    package = str(Path(parckpt.__file__).resolve().parent.parent)
    return {
        **os.environ,
        **ENVIRONMENT[mpi],
        name: value,
        OUTPUT_VARIABLE: str(output),
        LIMIT_VARIABLE: str(timeout_s),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(output),
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")])),
    }


def _kill_and_clean(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill everybody, and remove the shared memory that only they had mapped."""
    theirs = {path for path in files_in_use(marked(mark)) if path.startswith("/dev/shm/")}
    kill_marked(mark)
    process.wait()
    for path in theirs - files_in_use():
        Path(path).unlink(missing_ok=True)


def _result(process: subprocess.Popen[bytes], nranks: int, output: Path, survivors: Sequence[int]) -> MpiResult:
    def texts(name: str) -> tuple[str, ...]:
        files = [output / f"rank-{rank}.{name}" for rank in range(nranks)]
        return tuple(file.read_text(errors="replace") if file.exists() else "" for file in files)

    launcher = (output / "launcher").read_text(errors="replace")
    return MpiResult(process.returncode, texts("stdout"), texts("stderr"), launcher, tuple(survivors))
