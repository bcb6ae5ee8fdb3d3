"""``parckpt status``: who is at work in a directory, what was left behind, what a restart would find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parckpt.cli.failure import guarded
from parckpt.cli.ls import checkpoint_row, state_text, unreadable_status
from parckpt.cli.options import STALE_S, DebugOption, DirectoryArgument, JsonOption, PrefixOption, absolute
from parckpt.cli.output import age, count, emit, line, moment, size, table
from parckpt.comm.wait import SystemClock
from parckpt.engine.catalog import Found, scan
from parckpt.engine.survey import Debris, Holder, debris, foreign_entries, holder_of, owns, run_files
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.storage.lock import find_locks

__all__ = ["holder_row", "holder_text", "status"]

_FATES = {
    "publish": "will be published",
    "remove": "will be removed",
    "restore": "will be put back",
    "keep": "stays",
    "in progress": "in progress",
}


@guarded
def status(
    directory: DirectoryArgument = ".",
    prefix: PrefixOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Show who is at work in a directory and what a restart would find.

    For each prefix: who holds the lock (alive? last heard of?), the newest checkpoint, what the run file says. Then
    what interrupted saves left, with what the next start of that prefix will do with each, and the free space.

    Takes no lock and changes nothing. Exit status 6, or 10, if something was unreadable.
    """
    del debug
    fs = PosixFileSystem()
    path = absolute(directory)
    now = SystemClock().wall()
    published = scan(fs, path, tolerant=True)
    holders = {name: holder for name in find_locks(fs, path) if (holder := holder_of(fs, path, name, now, STALE_S))}
    left = debris(
        fs,
        path,
        lambda stem, family: any(
            h.replaceable is None and (h.prefix == stem or owns(h.prefix, stem, family)) for h in holders.values()
        ),
    )
    content: dict[str, Any] = {
        "directory": path,
        "free_nbytes": fs.free_nbytes(path),
        "prefixes": _prefixes(fs, path, published, holders, prefix),
        "debris": [_debris_row(item, now) for item in left if prefix is None or owns(prefix, item.stem, item.family)],
        "foreign": len(foreign_entries(fs, path, published)),
    }
    if as_json:
        emit(content)
    else:
        _print(content)
    return unreadable_status([row for prefix_row in content["prefixes"] for row in prefix_row["unreadable"]])


def _prefixes(
    fs: FileSystem, path: str, published: list[Found], holders: Mapping[str, Holder], wanted: str | None
) -> list[dict[str, Any]]:
    runs = run_files(fs, path)
    families: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted({*holders, *runs})}
    unknown: list[dict[str, Any]] = []
    for found in published:  # newest first
        owner = found.facts.family if found.facts else next((name for name in families if owns(name, found.stem)), None)
        row = checkpoint_row(fs, found)
        (unknown if owner is None else families.setdefault(owner, [])).append(row)
    rows = [_prefix_row(name, rows, holders.get(name), runs.get(name, {})) for name, rows in families.items()]
    if unknown:
        rows.append(_prefix_row(None, unknown, None, {}))
    return [row for row in rows if wanted is None or row["prefix"] == wanted]


def _prefix_row(
    name: str | None, rows: list[dict[str, Any]], holder: Holder | None, run: Mapping[str, Any] | None
) -> dict[str, Any]:
    usable = [row for row in rows if row["state"] == "ok" and row["consistent"]]
    return {
        "prefix": name,
        "checkpoints": len(rows),
        "unusable": len(rows) - len(usable),
        "nbytes": sum(row["nbytes"] or 0 for row in rows),
        "newest": usable[0] if usable else None,
        "pinned": [row["name"] for row in rows if row["pinned"]],
        "unreadable": [row for row in rows if row["state"] == "unreadable"],
        "lock": holder_row(holder) if holder is not None else None,
        "run_file": {"state": "unreadable"} if run is None else dict(run) or None,
    }


def holder_row(holder: Holder) -> dict[str, Any]:
    """A lock's holder for JSON."""
    return {
        "prefix": holder.prefix,
        "readable": holder.readable,
        "host": holder.host,
        "pid": holder.pid,
        "job_id": holder.job_id,
        "cluster": holder.cluster,
        "restart_count": holder.restart_count,
        "since": holder.since,
        "heartbeat": holder.heartbeat,
        "heartbeat_age_s": round(holder.heartbeat_age_s, 3),
        "alive": holder.alive,
        "next_start": "refused" if holder.replaceable is None else "takes over",
        "why": holder.replaceable,
    }


def holder_text(row: Mapping[str, Any]) -> str:
    """A lock's holder in words."""
    if not row["readable"]:
        return f"the lock file is unreadable; last changed {age(row['heartbeat_age_s'])} ago"
    job = f", job {row['job_id']}" if row["job_id"] else ""
    alive = {True: "alive", False: "gone", None: "cannot be seen from this machine"}[row["alive"]]
    heard = f"last heard of {age(row['heartbeat_age_s'])} ago"
    return f"process {row['pid']} on {row['host']}{job}: {alive}, since {moment(row['since'])}, {heard}"


def _debris_row(item: Debris, now: float) -> dict[str, Any]:
    return {
        "name": item.name,
        "kind": item.kind,
        "stem": item.stem,
        "fate": item.fate,
        "why": item.reason,
        "nbytes": item.nbytes,
        "age_s": round(now - item.mtime, 3),
    }


def _print(content: dict[str, Any]) -> None:
    line(f"{content['directory']}: {size(content['free_nbytes'])} free")
    for row in content["prefixes"]:
        line("")
        _print_prefix(row)
    if not content["prefixes"]:
        line("nothing of parckpt's is here" if not content["debris"] else "no checkpoints are here")
    if content["foreign"]:
        line("")
        what = f"{content['foreign']} without a manifest, or renamed"
        line(f"{what} (parckpt ls lists them); a restart does not consider those")
    if content["debris"]:
        line("")
        table(
            ("left behind", "size", "age", "next start", "why"),
            [
                (row["name"], size(row["nbytes"]), age(row["age_s"]), _FATES[row["fate"]], row["why"])
                for row in content["debris"]
            ],
            right=("size", "age"),
        )


def _print_prefix(row: dict[str, Any]) -> None:
    name = "unknown prefix" if row["prefix"] is None else f"prefix {row['prefix']!r}"
    bad = f", {row['unusable']} of them not usable (parckpt ls says why)" if row["unusable"] else ""
    line(f"{name}: {count(row['checkpoints'], 'checkpoint')}, {size(row['nbytes'])}{bad}", "bold")
    newest = row["newest"]
    if newest is not None:
        line(
            f"  newest  {newest['name']}, step {newest['step']}, {moment(newest['created'])}, {size(newest['nbytes'])}"
        )
    else:
        line("  newest  none that could be restored")
    if row["pinned"]:
        line(f"  pinned  {', '.join(row['pinned'])}")
    for one in row["unreadable"]:
        line(f"  {one['name']}: {state_text(one)}", "bold red")
    _print_lock(row["lock"])
    run = row["run_file"]
    if run is not None:
        told = f"has published, first at step {run.get('step')}" if run.get("published") else "has not published yet"
        line(f"  run     {'the run file is unreadable' if run.get('state') == 'unreadable' else told}")


def _print_lock(lock: dict[str, Any] | None) -> None:
    if lock is None:
        line("  lock    free")
        return
    line(f"  lock    {holder_text(lock)}")
    if lock["why"] is not None:
        line(f"          the next start takes it over: {lock['why']}")
    else:
        line(f"          another start is refused; without a sign of life it is free after {age(STALE_S)}")
