"""Processes are told apart, and only what is certain is called certain."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from parckpt.storage.identity import identify, process_is_alive

pytestmark = pytest.mark.fast


def test_this_process_is_described() -> None:
    me = identify({}, "a1")
    assert (me.pid, me.host, me.attempt, me.job_id, me.cluster) == (os.getpid(), os.uname().nodename, "a1", "", "")
    assert len(me.boot_id) == 36
    assert me.start_time > 0
    assert me.sees_processes_of(me)
    assert not me.sees_processes_of(replace(me, boot_id="x"))
    assert process_is_alive(me.pid, me.start_time) is True


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c", "SLURM_RESTART_COUNT": "12"}, ("c", "7", 12)),
        ({"SLURM_JOB_ID": "7", "PBS_JOBID": "8", "LSB_JOBID": "9"}, ("", "7", 0)),
        ({"SLURM_JOB_ID": "", "PBS_JOBID": "8.server", "LSB_JOBID": "9"}, ("", "8.server", 0)),
        ({"LSB_JOBID": "9", "SLURM_RESTART_COUNT": "-1"}, ("", "9", 0)),
        ({"LSB_JOBID": "9", "SLURM_RESTART_COUNT": "²"}, ("", "9", 0)),
    ],
)
def test_the_batch_system_is_read_from_what_is_given(
    environ: dict[str, str], expected: tuple[str, str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "not this one")
    me = identify(environ, "a")
    assert (me.cluster, me.job_id, me.restart_count) == expected


def test_without_procfs_everything_is_unknown(tmp_path: Path) -> None:
    me = identify({}, "a", proc=str(tmp_path))
    assert (me.boot_id, me.pid_namespace, me.start_time) == ("", "", 0)
    assert not me.sees_processes_of(me)
    assert process_is_alive(me.pid, 5, proc=str(tmp_path)) is None


def test_a_process_dies_as_a_zombie_and_its_number_is_not_its_name() -> None:
    code = "import sys; sys.stdout.write('up'); sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(2) == b"up"
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        start_time = int(fields[19])
        assert process_is_alive(child.pid, start_time) is True
        assert process_is_alive(child.pid, start_time + 1) is False
        assert process_is_alive(child.pid, 0) is None
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
        assert process_is_alive(child.pid, start_time) is False
    assert process_is_alive(child.pid, start_time) is False


def test_a_zombie_with_threads_at_work_is_alive(tmp_path: Path) -> None:
    process = tmp_path / str(os.getpid())
    (process / "task" / "1").mkdir(parents=True)
    (process / "stat").write_text("1 (a (b) Z) Z " + "0 " * 18 + "77 0")
    assert process_is_alive(os.getpid(), 77, proc=str(tmp_path)) is False
    (process / "task" / "2").mkdir()
    assert process_is_alive(os.getpid(), 77, proc=str(tmp_path)) is True
