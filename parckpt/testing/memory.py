"""A file system in memory that knows what is durable: `crash` keeps only what a loss of power may keep.

The model, stricter than most real file systems but never more lenient:

- File content and size are durable after ``fsync``. Of pages written since, each may or may not have reached the disk,
  and the size may be the old one, the new one or one between.
- A change of names (create, link, rename, unlink, mkdir, rmdir) is atomic, and durable after ``sync_directory`` of a
  directory it touches. Until then it may or may not survive, alone: only changes of one name keep their order.
- Syncing a file says nothing about its name, and syncing a directory nothing about the content of its files.
- After a failed ``fsync`` the pages count as clean, as in Linux: the next one succeeds and the bytes are not on disk.

Not modelled: symbolic links, time stamps of access, and modes after a crash (they are kept).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["PAGE_NBYTES", "Change", "Disk", "Inode"]

PAGE_NBYTES = 4096


@dataclass
class Inode:
    """One file or directory: what the processes see and what the disk holds."""

    number: int
    is_dir: bool
    mode: int
    mtime: float
    data: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    dirty: set[int] = field(default_factory=set)
    names: dict[str, int] = field(default_factory=dict)
    durable_names: dict[str, int] = field(default_factory=dict)
    nopen: int = 0
    bad_bytes: dict[int, int] = field(default_factory=dict)  # byte offset -> errno of a read; -1: every offset

    def write(self, data: memoryview, byte_offset: int) -> None:
        """Change content, in memory only."""
        self.resize(max(len(self.data), byte_offset + len(data)))
        self.data[byte_offset : byte_offset + len(data)] = data
        self.dirty.update(_pages(byte_offset, byte_offset + len(data)))

    def resize(self, nbytes: int) -> None:
        """Cut, or extend with zeros."""
        old = len(self.data)
        if nbytes < old:
            del self.data[nbytes:]
        else:
            self.data.extend(bytes(nbytes - old))
        self.dirty.update(_pages(min(old, nbytes), max(old, nbytes)))

    def sync(self) -> None:
        """Make the dirty pages and the size durable."""
        self._store(self.dirty, len(self.data))
        self.dirty.clear()

    def lose_dirty(self) -> None:
        """Take the dirty pages for clean without storing them: what a failed sync does."""
        self.dirty.clear()

    def survive(self, rng: random.Random) -> None:
        """Store some of what is dirty, as a loss of power at any moment might."""
        sizes = sorted((len(self.durable), len(self.data)))
        nbytes = rng.choice([sizes[0], sizes[1], rng.randint(*sizes)]) if self.dirty else sizes[0]
        self._store({page for page in sorted(self.dirty) if rng.random() < 0.5}, nbytes)

    def _store(self, pages: Iterable[int], nbytes: int) -> None:
        del self.durable[nbytes:]
        self.durable.extend(bytes(nbytes - len(self.durable)))
        for page in pages:
            start, stop = page * PAGE_NBYTES, min((page + 1) * PAGE_NBYTES, nbytes, len(self.data))
            if start < stop:
                self.durable[start:stop] = self.data[start:stop]


def _pages(start: int, stop: int) -> range:
    return range(start // PAGE_NBYTES, -(-stop // PAGE_NBYTES))


@dataclass(frozen=True)
class Change:
    """One atomic change of names: (directory, name) -> inode, None for a name that goes."""

    entries: tuple[tuple[int, str, int | None], ...]

    def touches(self, directory: int) -> bool:
        """Whether syncing ``directory`` makes this durable."""
        return any(entry[0] == directory for entry in self.entries)


class Disk:
    """Inodes, and the changes of names that no sync has covered yet."""

    ROOT = 1

    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {self.ROOT: Inode(self.ROOT, True, 0o755, 0.0)}
        self.pending: list[Change] = []
        self._last = self.ROOT

    def new(self, is_dir: bool, mode: int, mtime: float) -> Inode:
        """Make an inode that has no name yet."""
        self._last += 1
        return self.inodes.setdefault(self._last, Inode(self._last, is_dir, mode, mtime))

    def change(self, *entries: tuple[int, str, int | None]) -> None:
        """Change names, visibly at once, durably later."""
        _apply(entries, {number: inode.names for number, inode in self.inodes.items()})
        self.pending.append(Change(entries))

    def sync_names(self, directory: int) -> None:
        """Make every pending change that touches ``directory`` durable, with the earlier changes of the same names."""
        chosen = {index for index, change in enumerate(self.pending) if change.touches(directory)}
        self._store(chosen)

    def _store(self, chosen: set[int]) -> None:
        chosen = set(self._with_earlier(chosen))
        tables = {number: inode.durable_names for number, inode in self.inodes.items()}
        for index in sorted(chosen):
            _apply(self.pending[index].entries, tables)
        self.pending = [change for index, change in enumerate(self.pending) if index not in chosen]
        self.collect()

    def _with_earlier(self, chosen: set[int]) -> Iterator[int]:
        """Close a choice: no change of a name without the earlier changes of that name."""
        needed: set[tuple[int, str]] = set()
        for index in reversed(range(len(self.pending))):
            keys = {entry[:2] for entry in self.pending[index].entries}
            if index in chosen or keys & needed:
                needed |= keys
                yield index

    def after_crash(self, seed: int, keep: Literal["all", "none"] | None) -> Disk:
        """Return what is found at the next start; this disk stays as it is."""
        other = Disk()
        other.inodes = {number: _copy(inode) for number, inode in self.inodes.items()}
        other.pending, other._last = list(self.pending), self._last
        rng = random.Random(seed)
        if keep == "all":
            chosen = set(range(len(other.pending)))
        else:
            chosen = {index for index in range(len(other.pending)) if keep is None and rng.random() < 0.5}
        other._store(chosen)
        other.pending = []
        for inode in other.inodes.values():
            if keep == "all":
                inode.sync()
            elif keep is None:
                inode.survive(rng)
            inode.data, inode.names = bytearray(inode.durable), dict(inode.durable_names)
            inode.dirty = set()
        other._drop_unreachable()
        return other

    def sync_all(self) -> None:
        """Make everything durable: the state a test starts from."""
        self._store(set(range(len(self.pending))))
        for inode in self.inodes.values():
            inode.sync()

    def collect(self) -> None:
        """Free what has no name, no open descriptor and no durable name."""
        used = {self.ROOT} | {number for number, inode in self.inodes.items() if inode.nopen}
        for change in self.pending:
            # The directory too: it may be gone by now, and its changes still wait.
            used.update(number for entry in change.entries for number in (entry[0], entry[2]) if number is not None)
        for inode in self.inodes.values():
            used.update(inode.names.values(), inode.durable_names.values())
        self.inodes = {number: inode for number, inode in self.inodes.items() if number in used}

    def visible_nbytes(self) -> int:
        """Sum of the sizes of all files that have a name or are open."""
        seen = {number for inode in self.inodes.values() for number in inode.names.values()}
        return sum(len(inode.data) for number, inode in self.inodes.items() if number in seen or inode.nopen)

    def _drop_unreachable(self) -> None:
        seen: set[int] = set()
        todo = [self.ROOT]
        while todo:
            number = todo.pop()
            if number not in seen:
                seen.add(number)
                todo.extend(self.inodes[number].names.values())
        self.inodes = {number: inode for number, inode in self.inodes.items() if number in seen}


def _apply(entries: Iterable[tuple[int, str, int | None]], tables: dict[int, dict[str, int]]) -> None:
    for directory, name, number in entries:
        if number is None:
            tables[directory].pop(name, None)
        else:
            tables[directory][name] = number


def _copy(inode: Inode) -> Inode:
    return Inode(
        inode.number,
        inode.is_dir,
        inode.mode,
        inode.mtime,
        data=bytearray(inode.data),
        durable=bytearray(inode.durable),
        dirty=set(inode.dirty),
        names=dict(inode.names),
        durable_names=dict(inode.durable_names),
        bad_bytes=dict(inode.bad_bytes),
    )
