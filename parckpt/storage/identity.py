"""Who a process is: its job, host and life, told apart from every other process that ever was.

Not collective. Reads /proc; where there is none (not Linux) the fields stay empty, which means "unknown".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Identity", "Liveness", "identify", "process_is_alive"]

# Of Slurm, PBS and LSF, in this order.
_JOB_ID_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")

Liveness: TypeAlias = Callable[[int, int], "bool | None"]
"""(pid, start time) -> whether that process of this host is alive; None where that cannot be told."""


@dataclass(frozen=True)
class Identity:
    """One process of one job.

    Attributes
    ----------
    cluster, job_id : str
        Empty outside a batch system.
    restart_count : int
        How often the batch system has restarted the job.
    host, boot_id : str
        Name of the machine, and the kernel's random id of its present run.
    pid_namespace : str
        In which ``pid`` means something: containers of one host share name and boot id, but not processes.
    pid, start_time : int
        Process, and when it started, in clock ticks since boot: pids are used again. 0: unknown.
    attempt : str
        Random id of the attempt, equal on all its ranks.
    """

    cluster: str
    job_id: str
    restart_count: int
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_time: int
    attempt: str

    def is_later_start_of(self, other: Identity) -> bool:
        """Whether this is the same batch job as ``other``, started again since."""
        same_job = bool(self.job_id) and (self.cluster, self.job_id) == (other.cluster, other.job_id)
        return same_job and self.restart_count > other.restart_count

    def sees_processes_of(self, other: Identity) -> bool:
        """Whether a pid means the same to both: same run of the same machine, same container."""
        places = [(who.host, who.boot_id, who.pid_namespace) for who in (self, other)]
        return places[0] == places[1] and all(places[0])


def identify(environ: Mapping[str, str], attempt: str, proc: str = "/proc") -> Identity:
    """Describe the calling process.

    Parameters
    ----------
    environ : mapping
        The environment, for what the batch system says.
    attempt : str
        Id that the caller chose.
    proc : str
        Where procfs is mounted.
    """
    restarts = environ.get("SLURM_RESTART_COUNT", "")
    pid = os.getpid()
    stat = _process_stat(pid, proc)
    return Identity(
        cluster=environ.get("SLURM_CLUSTER_NAME", ""),
        job_id=next((environ[name] for name in _JOB_ID_VARIABLES if environ.get(name)), ""),
        restart_count=int(restarts) if restarts.isascii() and restarts.isdigit() else 0,
        host=os.uname().nodename,
        boot_id=_boot_id(proc),
        pid_namespace=_pid_namespace(proc),
        pid=pid,
        start_time=stat[1] if stat else 0,
        attempt=attempt,
    )


def process_is_alive(pid: int, start_time: int, proc: str = "/proc") -> bool | None:
    """Tell whether the process that got ``pid`` at ``start_time`` still runs; None where that cannot be told.

    Asks the kernel by signal 0 first: /proc may hide the processes of other users.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # it exists, or the number is none: /proc decides
    stat = _process_stat(pid, proc)
    if stat is None or not start_time:
        return None
    state, found_start_time = stat
    if found_start_time != start_time:
        return False
    return not (state in "ZX" and _has_ended(pid, proc))


def _has_ended(pid: int, proc: str) -> bool:
    """Whether a zombie is alone: a killed process shows as one while its other threads still finish a write."""
    try:
        return len(os.listdir(f"{proc}/{pid}/task")) <= 1
    except OSError:
        return False


def _process_stat(pid: int, proc: str) -> tuple[str, int] | None:
    """State letter and start time of a process, from proc(5) ``stat``."""
    try:
        with open(f"{proc}/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The second field is the command in parentheses, which may itself hold spaces and parentheses.
            fields = file.read().rpartition(")")[2].split()
        return fields[0], int(fields[22 - 3])
    except (OSError, ValueError, IndexError):
        return None


def _boot_id(proc: str) -> str:
    try:
        with open(f"{proc}/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""


def _pid_namespace(proc: str) -> str:
    try:
        return os.readlink(f"{proc}/self/ns/pid")
    except OSError:
        return ""
