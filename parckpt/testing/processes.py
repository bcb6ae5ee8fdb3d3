"""Processes of one test run, found by a mark in their environment: whatever group or session they have moved to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["files_in_use", "kill_marked", "marked", "sweep"]

DEBRIS_PATTERNS = (
    "/dev/shm/mpich_shm_*",
    "/dev/shm/sm_segment.*",
    "/tmp/hydra_hwloc_xmlfile_*",
)
"""What killed ranks and launchers leave behind."""


def marked(mark: str) -> list[int]:
    """Ids of the living processes whose environment, as they were started with it, contains ``mark``."""
    needle = mark.encode()
    found = []
    for entry in _processes():
        try:
            environment = (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            # Ended meanwhile, or somebody else's.
            continue
        if needle in environment.split(b"\0") and state != "Z":
            found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def kill_marked(mark: str, limit_s: float = 10.0) -> list[int]:
    """Kill all processes with the mark, and those they start meanwhile; return whom it met."""
    met: set[int] = set()
    deadline = time.monotonic() + limit_s
    while (alive := marked(mark)) and time.monotonic() < deadline:
        met.update(alive)
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    return sorted(met)


def files_in_use(pids: Iterable[int] | None = None) -> set[str]:
    """Paths that processes (all that can be looked into, by default) have mapped or open."""
    paths: set[str] = set()
    entries = _processes() if pids is None else (Path(f"/proc/{pid}") for pid in pids)
    for entry in entries:
        try:
            lines = (entry / "maps").read_text(errors="replace").splitlines()
            paths.update(line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and "/" in line)
            paths.update(str(link.readlink()) for link in (entry / "fd").iterdir())
        except OSError:
            continue
    return paths


def sweep(since: float, min_age_s: float = 5.0) -> list[str]:
    """Remove what killed ranks left: our own files, made since ``since`` (wall clock), that no process uses.

    Another run on this machine may have just made a file that it has not mapped yet: what is younger than ``min_age_s``
    is looked at again when it is that old.
    """
    found = {path: status for path, status in _debris() if status.st_mtime >= since}
    youngest = max((status.st_mtime for status in found.values()), default=0.0)
    time.sleep(max(0.0, min(youngest + min_age_s - time.time(), min_age_s)))
    used = files_in_use()
    removed = [path for path in found if str(path) not in used]
    for path in removed:
        path.unlink(missing_ok=True)
    return [str(path) for path in removed]


def _debris() -> Iterator[tuple[Path, os.stat_result]]:
    for pattern in DEBRIS_PATTERNS:
        directory, _, name = pattern.rpartition("/")
        for path in Path(directory).glob(name):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if status.st_uid == os.getuid():
                yield path, status


def _processes() -> Iterator[Path]:
    return (entry for entry in Path("/proc").iterdir() if entry.name.isdigit())
