"""The file behind a lock: its content, and the few ways it may come, be read and go.

One JSON object, padded with spaces to a fixed length, so that its holder can rewrite the heartbeat in place. Whoever
removes it moves it aside first and looks again, because between judging a lock and removing it somebody else may have
put a new one there.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

from parckpt.core.naming import lock_name
from parckpt.errors import CheckpointExistsError, StorageError
from parckpt.storage import atomic
from parckpt.storage.filesystem import FileSystem, opened
from parckpt.storage.identity import Identity

__all__ = [
    "LockFile",
    "LockRecord",
    "create",
    "debris",
    "decode",
    "encode",
    "lock_path",
    "read",
    "read_open",
    "remove_if",
]

_VERSION = 1
_UNIT_NBYTES = 1024  # records are padded to a multiple of this
_SLACK_NBYTES = 64  # at least so much padding: another heartbeat may take more digits
_MAX_NBYTES = 64 << 10  # longer than any record; what is longer is not ours
_MAX_TEXT = 1024  # characters per field: hosts have 64, job ids far less
_MAX_TIME = 2.5e11  # seconds since the epoch that a date can show
_MAX_INT = 1 << 63


@dataclass(frozen=True)
class LockRecord:
    """What a lock says.

    Attributes
    ----------
    token : str
        Random, different for every lock ever taken.
    identity : Identity
        Who holds it.
    since, heartbeat : float
        Seconds since the epoch by the holder's clock: when it was taken, and last refreshed.
    """

    token: str
    identity: Identity
    since: float
    heartbeat: float


@dataclass(frozen=True)
class LockFile:
    """A lock as found: ``raw`` bytes, ``mtime``, and the record, None if the bytes are none (half written, damaged)."""

    raw: bytes
    mtime: float
    record: LockRecord | None


def lock_path(directory: str, prefix: str) -> str:
    """Path of the lock of one prefix in one directory."""
    return os.path.join(directory, lock_name(prefix))


def encode(record: LockRecord) -> bytes:
    """Return the content of the file; records that differ in the heartbeat alone have equal lengths."""
    content = {"version": _VERSION, "token": record.token, "since": record.since, "heartbeat": record.heartbeat}
    text = json.dumps(content | asdict(record.identity)).encode("ascii")
    nbytes = -(-(len(text) + _SLACK_NBYTES) // _UNIT_NBYTES) * _UNIT_NBYTES
    return text.ljust(nbytes - 1) + b"\n"


def decode(raw: bytes) -> LockRecord | None:
    """Read the content of the file; None for anything but a whole record."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        return None
    kinds = {"str": _is_text, "int": _is_count}
    who: dict[str, Any] = {field.name: content.get(field.name) for field in fields(Identity)}
    if not all(kinds[str(field.type)](who[field.name]) for field in fields(Identity)) or not who["pid"]:
        return None
    token: Any = content.get("token")
    since: Any = content.get("since")
    heartbeat: Any = content.get("heartbeat")
    if not (_is_text(token) and _is_time(since) and _is_time(heartbeat)):
        return None
    return LockRecord(token, Identity(**who), float(since), float(heartbeat))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_INT


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < _MAX_TIME  # not-a-number compares false


def read(fs: FileSystem, path: str) -> LockFile | None:
    """Read a lock; None if there is none."""
    try:
        with opened(fs, path, os.O_RDONLY) as fd:
            return read_open(fs, fd)
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def read_open(fs: FileSystem, fd: int) -> LockFile:
    """Read the lock that is open as ``fd``."""
    mtime = fs.stat_open(fd).mtime
    raw = bytearray(_MAX_NBYTES)
    done = 0
    while done < len(raw):
        count = fs.pread_into(fd, memoryview(raw)[done:], done)
        if count == 0:
            break
        done += count
    content = bytes(raw[:done])
    return LockFile(content, mtime, decode(content))


def create(fs: FileSystem, path: str, raw: bytes, mode: int) -> bool:
    """Put a lock at ``path``, whole and durable; False if there is one.

    A second name for a complete file is the one way in which nobody can see a half-written lock. Where the file system
    has no links it is written in place; a reader that comes in between takes it for a damaged one: that counts as held.
    """
    made = _create_by_link(fs, path, raw, mode)
    if made is None:
        try:
            atomic.write_file(fs, path, raw, mode)
            made = True
        except CheckpointExistsError:
            made = False
    return made and _make_durable(fs, path, raw)


def _create_by_link(fs: FileSystem, path: str, raw: bytes, mode: int) -> bool | None:
    """As `create`, but not durable yet; None where links are refused."""
    temp = atomic.temp_path(path)
    atomic.write_file(fs, temp, raw, mode)
    try:
        fs.link(temp, path)
    except StorageError as error:
        if error.errno in atomic.LINK_REFUSED:
            return None
        if error.errno != errno.EEXIST:
            raise
        # NFS repeats a request whose answer was lost: the name that is taken may be taken by us.
        found = read(fs, path)
        return found is not None and found.raw == raw
    finally:
        with suppress(StorageError):
            fs.unlink(temp)
    return True


def _make_durable(fs: FileSystem, path: str, raw: bytes) -> bool:
    try:
        fs.sync_directory(os.path.dirname(path) or ".")
    except StorageError:
        # Not taken, then: left behind, it would look like one that its living holder wants.
        with suppress(StorageError):
            remove_if(fs, path, lambda found: found.raw == raw)
        raise
    return True


def remove_if(fs: FileSystem, path: str, unwanted: Callable[[LockFile], bool]) -> bool:
    """Remove the lock if what is removed is what was meant.

    It is moved to a name that is ours alone and looked at there; another one is put back, without replacing a third
    that may have come meanwhile. A crash in between leaves no lock but `debris`, from which a living holder recovers.
    """
    aside = f"{path}.aside-{secrets.token_hex(8)}"
    try:
        fs.rename(path, aside)
        found = read(fs, aside)
        if found is not None and unwanted(found):
            fs.unlink(aside)
            return True
    except StorageError as error:
        if error.errno == errno.ENOENT:  # of `path`: gone already; of `aside`: its holder took it back
            return False
        with suppress(StorageError, CheckpointExistsError):
            atomic.move_new(fs, aside, path)
        raise
    if found is not None:
        put_back(fs, aside, path)
    return False


def put_back(fs: FileSystem, aside: str, path: str) -> None:
    """Return a lock that was moved aside by mistake, unless its place is taken: then it is lost."""
    try:
        atomic.move_new(fs, aside, path)
    except CheckpointExistsError:
        with suppress(StorageError):
            fs.unlink(aside)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise


def debris(fs: FileSystem, path: str, kinds: str = "aside|temp") -> Iterator[tuple[str, LockFile]]:
    """Give what others left beside the lock at ``path``, or are just working with."""
    directory, name = os.path.split(path)
    pattern = re.compile(rf"{re.escape(name)}\.(?:{kinds})-[0-9a-f]{{16}}")
    for found_name in fs.listdir(directory or "."):
        if pattern.fullmatch(found_name):
            found_path = os.path.join(directory, found_name)
            found = read(fs, found_path)
            if found is not None:
                yield found_path, found
