"""What is to be transformed: opened by rank 0, known to all ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parckpt.comm.launch import SELF, resolve
from parckpt.comm.outcome import run_on_all
from parckpt.comm.wait import Waiter
from parckpt.core import appended
from parckpt.core.contents import Contents
from parckpt.core.manifest import Manifest
from parckpt.core.strategy import Strategy
from parckpt.engine import foreign
from parckpt.engine.assembly import blocks
from parckpt.engine.catalog import find_at, load_manifest
from parckpt.engine.group import Group
from parckpt.errors import FormatError
from parckpt.formats.base import FileIndex, IndexedEntry
from parckpt.signals import deferred_interrupt
from parckpt.storage.direct import InputFile
from parckpt.storage.filesystem import FileSystem

__all__ = ["Opened", "group_of", "open_files", "open_published", "refuse_maps", "share"]


@dataclass(frozen=True)
class Opened:
    """A checkpoint to transform.

    Attributes
    ----------
    root : str
        Directory that the manifest's files are relative to.
    names : mapping of int to sequence of str
        For each rank with a file (from 0 in its strategy), the tensors in it, in the file's order.
    numbers : mapping of int to mapping
        For each rank its single values that no strategy names (counters, texts, learning rates): values or arrays.
    flagged : bool
        Whether the files say if replicas were left out (safetensors only).
    manifest_path : str or None
        None: it has no manifest.
    """

    manifest: Manifest
    root: str
    names: Mapping[int, Sequence[str]]
    numbers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    flagged: bool = False
    manifest_path: str | None = None

    @property
    def contents(self) -> Contents:
        """What the files hold."""
        return self.manifest.contents

    def encode(self) -> bytes:
        """The bytes that `decode` makes the same of."""
        header = {
            "root": self.root,
            "names": list(self.names.items()),
            "numbers": [
                (rank, {name: appended.encode(value) for name, value in found.items()})
                for rank, found in self.numbers.items()
            ],
            "flagged": self.flagged,
            "manifest_path": self.manifest_path,
        }
        text = json.dumps(header).encode("utf-8")
        return len(text).to_bytes(8, "little") + text + self.manifest.encode()

    @classmethod
    def decode(cls, data: bytes) -> Opened:
        """Undo `encode`."""
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        manifest = Manifest.decode(data[8 + length :], header["root"])
        known = header["manifest_path"] is not None
        return cls(
            manifest if known else foreign.without_checksums(manifest),
            header["root"],
            dict(header["names"]),
            {
                rank: {name: appended.decode(value) for name, value in found.items()}
                for rank, found in header["numbers"]
            },
            header["flagged"],
            header["manifest_path"],
        )


@contextmanager
def group_of(comm: Any, agree_timeout_s: float) -> Iterator[Group]:
    """A group for one call, of `comm`'s ranks or of this process alone; interrupts wait until it is over."""
    group = Group(resolve(SELF if comm is None else comm, os.environ), Waiter(agree_timeout_s))
    try:
        with deferred_interrupt():
            yield group
    finally:
        group.comm.free()


def share(group: Group, opening: Callable[[], Opened]) -> Opened:
    """Root opens; all ranks get what it found, or its error. Collective."""
    payload = run_on_all(group.comm, lambda: opening().encode() if group.is_root else None, group.waiter)
    return Opened.decode(group.bcast(payload))


def open_published(fs: FileSystem, path: str) -> Opened | None:
    """A step directory or file of ours: its manifest knows more than any strategy. None if there is no manifest."""
    found = find_at(fs, path)
    if found is None:
        return None
    manifest = load_manifest(fs, found)
    names = [row.name for row in manifest.contents.tensors if row.per_rank < 0]
    append = {name: appended.decode(value) for name, value in manifest.facts.append.items()}
    return Opened(manifest, found.root, {0: names}, {0: append}, manifest_path=found.manifest_path)


def open_files(
    fs: FileSystem,
    files: Mapping[int, str],
    strategy: Strategy | None,
    *,
    named: Iterable[str] | None = (),
    check: bool = True,
    complete: bool = True,
) -> Opened:
    """Open the files of ranks, as cut by a strategy. Not collective.

    Parameters
    ----------
    files : mapping of int to str
        By rank.
    named : iterable of str
        Tensors that another strategy names: they are tensors, even if they have one element only. None: all are.
    check, complete : bool
        As `foreign.open_foreign`.

    Raises
    ------
    FormatError
        A file is damaged, or holds a map, which no other file can take.
    ChecksumError, LayoutError
    """
    absolute = {rank: os.path.abspath(path) for rank, path in files.items()}
    root = os.path.commonpath([os.path.dirname(path) for path in absolute.values()])
    manifest = foreign.open_foreign(fs, root, check=check, strategy=strategy, files=absolute, complete=complete)
    tensors = None if named is None else {*(strategy.names if strategy is not None else ()), *named}
    names: dict[int, list[str]] = {}
    numbers: dict[int, dict[str, Any]] = {}
    flagged = False
    for rank, path in absolute.items():
        index, _ = foreign.index_file(fs, path)
        refuse_maps(path, index)
        flagged |= "remove_redundancy" in index.metadata
        singles = [item for item in index.entries if _is_single(item, tensors)]
        single_names = {item.name for item in singles}
        names[rank] = [item.name for item in index.entries if item.name not in single_names]
        with InputFile(fs, path, direct=False) as source:
            numbers[rank] = {item.name: _value(source, item) for item in singles}
    # A strategy of one pipeline stage speaks of its ranks from 0, wherever they begin in the job.
    first = strategy.ranks.start if strategy is not None else 0
    return Opened(
        manifest,
        root,
        {rank - first: found for rank, found in names.items()},
        {rank - first: found for rank, found in numbers.items()},
        flagged,
    )


def _is_single(item: IndexedEntry, tensors: Container[str] | None) -> bool:
    """Whether an entry is a value beside the tensors; a counter is one always, as `foreign.open_foreign` has it."""
    if item.kind == "str" or (item.shape == () and item.name in ("epoch_num", "step_num")):
        return True
    return (
        tensors is not None
        and item.name not in tensors
        and item.kind == "tensor"
        and all(extent == 1 for extent in item.shape)
    )


def _value(source: InputFile, item: IndexedEntry) -> Any:
    if item.kind == "str":
        return item.text
    assert item.dtype is not None
    content = b"".join(blocks(source, item.extents))
    return np.frombuffer(content, item.dtype.numpy).reshape(item.shape)


def refuse_maps(path: str, index: FileIndex) -> None:
    found = next((item.name for item in index.entries if item.kind == "map"), None)
    if found is not None:
        raise FormatError(
            f"{path} holds the hash map {found!r}, which cannot be transformed", path=path, byte_offset=0, field=found
        )
