"""``parckpt verify``: read everything and compare it with its checksums."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from parckpt.cli.failure import DAMAGED, UNVERIFIED, guarded, status_of_code
from parckpt.cli.options import DebugOption, JsonOption, PrefixOption, absolute
from parckpt.cli.output import count, emit, line, progress_bar, size
from parckpt.core import naming
from parckpt.engine.catalog import Found, find_at, scan
from parckpt.engine.survey import Foreign, data_files, foreign_entries, owns, total_nbytes
from parckpt.engine.verify import Finding, Report, verify_checkpoint, verify_files
from parckpt.errors import CheckpointGoneError, CheckpointNotFoundError
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat

__all__ = ["verify"]

_MAX_LINES = 20  # of findings for people; JSON has them all
_MAX_TENSORS = 8
_STYLES = {"sound": "green", "damaged": "bold red", "unreadable": "bold red", "unverified": "yellow"}


@guarded
def verify(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="One checkpoint (step directory or data file), or a directory: then everything in it.",
            show_default=False,
        ),
    ],
    prefix: PrefixOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Read everything and compare it with its checksums.

    Names the damaged file, chunk and tensors. Checks the manifest's digest, that nothing is missing, sizes, the crc32
    of every 4 MiB chunk, that the files' own headers agree with the manifest, and MindSpore's crc where there is one.
    Without a manifest only headers and MindSpore's crc can be checked.

    Exit status 0: all sound. 5: something is damaged. 6: something could not be read. 9: something has no checksum.
    """
    del debug
    fs = PosixFileSystem()
    place = absolute(path)
    jobs = _jobs(fs, place, prefix)
    started = time.monotonic()
    reports: list[Report] = []
    gone: list[str] = []
    with progress_bar("verifying", sum(_expected_nbytes(fs, job) for job in jobs)) as on_read:
        for job in jobs:
            try:
                reports.append(_run(fs, job, on_read))
            except CheckpointGoneError:
                if len(jobs) == 1:
                    raise
                gone.append(job.path)  # retention of a running job: it was not damaged
    seconds = time.monotonic() - started
    status = _status(reports)
    if as_json:
        emit(_content(place, reports, gone, seconds, status))
    else:
        for report in reports:
            _print(report)
        for name in gone:
            line(f"{name}: deleted while it was being read")
        _print_summary(reports, seconds)
    return status


def _jobs(fs: FileSystem, path: str, prefix: str | None) -> list[Found | Foreign]:
    """What to verify: one checkpoint, or all of a directory."""
    stat = fs.stat(path)
    found = find_at(fs, path)
    if found is not None:
        return [found]
    rank_0 = os.path.join(path, naming.rank_directory(0))
    if not stat.is_dir or try_stat(fs, rank_0) is not None:
        return [Foreign(os.path.basename(path), path, stat.is_dir, 0, total_nbytes(fs, path), stat.mtime)]
    published = scan(fs, path, tolerant=True)
    foreign = [e for e in foreign_entries(fs, path, published) if prefix is None or owns(prefix, e.stem)]
    jobs: list[Found | Foreign] = [*(scan(fs, path, prefix, tolerant=True) if prefix is not None else published)]
    # What was renamed has a manifest to verify it by.
    jobs += [(find_at(fs, entry.path) if entry.renamed is not None else None) or entry for entry in foreign]
    if not jobs:
        raise CheckpointNotFoundError(f"there are no checkpoints in {path}", path=path)
    return jobs


def _expected_nbytes(fs: FileSystem, job: Found | Foreign) -> int:
    if isinstance(job, Foreign):
        return job.nbytes
    return job.facts.nbytes if job.facts is not None else 0


def _run(fs: FileSystem, job: Found | Foreign, on_read: Any) -> Report:
    if isinstance(job, Foreign):
        return verify_files(fs, job.path, data_files(fs, job.path), on_read)
    return verify_checkpoint(fs, job, on_read)


def _status(reports: list[Report]) -> int:
    verdicts = {report.verdict for report in reports}
    if "damaged" in verdicts:
        return DAMAGED
    for report in reports:
        for finding in report.findings:
            if finding.severity == "unreadable":
                return status_of_code(finding.code)
    return UNVERIFIED if "unverified" in verdicts else 0


def _content(path: str, reports: list[Report], gone: list[str], seconds: float, status: int) -> dict[str, Any]:
    verdicts = [report.verdict for report in reports]
    return {
        "path": path,
        "exit_status": status,
        "nbytes": sum(report.nbytes for report in reports),
        "seconds": round(seconds, 3),
        "counts": {name: verdicts.count(name) for name in ("sound", "damaged", "unreadable", "unverified")},
        "gone": gone,
        "checkpoints": [
            {
                "path": report.path,
                "verdict": report.verdict,
                "has_manifest": report.has_manifest,
                "step": report.step,
                "format": report.format,
                "files": report.files,
                "chunks": report.chunks,
                "nbytes": report.nbytes,
                "files_without_checksum": report.files_without_checksum,
                "findings": [asdict(finding) for finding in report.findings],
                "findings_omitted": report.omitted,
            }
            for report in reports
        ],
    }


def _print(report: Report) -> None:
    bare = f"{report.files_without_checksum} of {count(report.files, 'file')}"
    notes = {
        "sound": "" if report.has_manifest else ", by its own crc: it has no manifest",
        "unverified": f": {bare} without a checksum; headers are fine",
    }
    read = f" ({size(report.nbytes)}, {count(report.chunks, 'chunk')})" if report.verdict in notes else ""
    line(f"{report.path}: {report.verdict}{notes.get(report.verdict, '')}{read}", _STYLES[report.verdict])
    for finding in report.findings[:_MAX_LINES]:
        line(f"  {_finding_text(finding)}")
    hidden = len(report.findings) - _MAX_LINES + report.omitted
    if hidden > 0:
        line(f"  and {hidden} more (--json lists {'them' if not report.omitted else 'the first 1000'})")


def _finding_text(finding: Finding) -> str:
    names = [repr(name) for name in finding.tensors]
    more = f" and {len(names) - _MAX_TENSORS} more" if len(names) > _MAX_TENSORS else ""
    # A damaged chunk's message names the tensors already.
    held = f" (held: {', '.join(names[:_MAX_TENSORS])}{more})" if names and finding.chunk is None else ""
    head = {"damage": "", "unreadable": "not readable: ", "note": "note: "}[finding.severity]
    return head + finding.message + held


def _print_summary(reports: list[Report], seconds: float) -> None:
    verdicts = [report.verdict for report in reports]
    counts = [f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts)]
    nbytes = sum(report.nbytes for report in reports)
    rate = f", {size(int(nbytes / seconds))}/s" if seconds > 0 else ""
    line(f"{', '.join(counts) or 'nothing left to verify'}; read {size(nbytes)} in {seconds:.1f} s{rate}")
