"""The harness itself: what hangs is shown and killed, what fails is reported, nobody is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from parckpt.testing.mpirun import Mpi, MpiError, MpiMissingError, python_of, run


def _gone(directory: Path, pattern: str) -> bool:
    pids = [path.read_text() for path in directory.glob(pattern)]
    assert pids, f"no {pattern} was written"
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return not any(state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z" for state in states)


def test_a_hang_is_shown_and_killed(mpi: Mpi, programs: Path, tmp_path: Path) -> None:
    with pytest.raises(MpiError, match=r"(?s)not done after 3 s.*before 0.*stuck_here") as caught:
        run(programs / "misbehaving.py", 2, ["hang", str(tmp_path)], mpi=mpi, timeout_s=3)
    assert str(caught.value).count("Timeout (") == 2
    assert _gone(tmp_path, "pid-*")


def test_helpers_do_not_outlive_a_run(mpi: Mpi, programs: Path, tmp_path: Path) -> None:
    result = run(programs / "misbehaving.py", 2, ["helper", str(tmp_path)], mpi=mpi).check()
    helpers = {int(path.read_text()) for path in tmp_path.glob("helper-*")}
    assert len(helpers) == 2
    assert helpers <= set(result.survivors)
    assert _gone(tmp_path, "helper-*")


def test_an_exception_is_reported(mpi: Mpi, programs: Path, tmp_path: Path) -> None:
    result = run(programs / "misbehaving.py", 2, ["raise", str(tmp_path)], mpi=mpi, abort_on_error=True)
    assert result.returncode != 0
    assert "ZeroDivisionError: on rank 1" in result.stderr[1]
    with pytest.raises(MpiError, match="ZeroDivisionError: on rank 1"):
        result.check()
    assert _gone(tmp_path, "pid-*")


def test_a_missing_mpi_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PARCKPT_TEST_OPENMPI_PYTHON", raising=False)
    with pytest.raises(MpiMissingError, match="PARCKPT_TEST_OPENMPI_PYTHON is not set"):
        python_of("openmpi")
    monkeypatch.setenv("PARCKPT_TEST_MPICH_PYTHON", str(tmp_path / "python"))
    with pytest.raises(MpiMissingError, match=str(tmp_path / "mpiexec")):
        python_of("mpich")
