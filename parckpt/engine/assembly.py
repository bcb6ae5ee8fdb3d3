"""What the files of a foreign checkpoint hold together: boxes of whole tensors, each taken from one file.

Without a strategy a tensor is what its file holds of it, and all files that hold it must hold the same: slices cannot
be told from replicas. With one, each rank's entry is a box.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parckpt.core import naming, values
from parckpt.core.contents import Contents, StoredFile, box_columns, chunk_count
from parckpt.core.crc import crc32
from parckpt.core.layout import Box, tiling_problem, whole
from parckpt.core.manifest import CHUNK_NBYTES, Facts, Manifest
from parckpt.core.mesh import Layout
from parckpt.core.netrules import GRADIENT_SUMS
from parckpt.core.strategy import Strategy
from parckpt.core.tensors import TensorRow
from parckpt.errors import LayoutError
from parckpt.formats.base import FileIndex, IndexedEntry
from parckpt.storage.direct import InputFile
from parckpt.storage.filesystem import FileSystem

__all__ = ["Assembly", "RankFile", "blocks"]

log = logging.getLogger("parckpt")

# MindSpore's appended counters are facts of the run, not tensors of the model.
_COUNTERS = ("epoch_num", "step_num")


@dataclass(frozen=True)
class RankFile:
    """One file, with its index; ``path`` is relative to the checkpoint."""

    rank: int
    path: str
    index: FileIndex
    nbytes: int


@dataclass(frozen=True)
class _Held:
    """An entry of one file."""

    file: RankFile
    item: IndexedEntry


@dataclass
class _Tensor:
    """One tensor: its row, and by box the entry that is used."""

    row: TensorRow
    boxes: dict[Box, _Held]


class Assembly:
    """Puts the entries of all files together.

    Parameters
    ----------
    root : str
        What the files' paths are relative to.
    strategy : Strategy, optional
    check : bool
        Whether replicas that the strategy promises are compared. What it does not name is compared in any case.
    complete : bool
        Whether every part of every tensor must be in some file.
    counters : bool
        Whether MindSpore's counters are facts of the run; False: tensors like any other.
    """

    def __init__(
        self,
        fs: FileSystem,
        root: str,
        files: Sequence[RankFile],
        *,
        strategy: Strategy | None,
        check: bool,
        complete: bool = True,
        counters: bool = True,
    ) -> None:
        self._facts = _COUNTERS if counters else ()
        self._fs, self._root, self._files, self._check, self._complete = fs, root, files, check, complete
        self._layouts = _layouts(strategy, files) if strategy is not None else {}
        self._has_strategy = strategy is not None
        self._tensors: dict[str, _Tensor] = {}
        self._append: dict[str, Any] = {}
        self._unlike: dict[str, list[int]] = {}
        self._crcs: dict[int, int] = {}  # by identity of the entry; the files hold on to them

    def manifest(self, path: str) -> Manifest:
        """Describe the checkpoint at `path`. Only headers are read, and what has to be compared.

        Raises
        ------
        LayoutError
            If files contradict each other or the strategy, or a part of a tensor is in none of them.
        """
        for file in self._files:
            for item in file.index.entries:
                self._add(_Held(file, item))
        for name in self._layouts.keys() & self._tensors.keys() if self._complete else ():
            self._check_tiling(self._tensors[name])
        if self._unlike:
            told = ", ".join(f"{name} (ranks {_shown(ranks)})" for name, ranks in sorted(self._unlike.items()))
            log.warning("%s: differ from the first rank's, which are taken: %s", path, told)
        return Manifest(_facts(path, self._files, self._append), self._contents())

    def _add(self, held: _Held) -> None:
        item = held.item
        if item.kind == "str":
            self._add_fact(held, values.encode(item.text))
        elif item.kind == "tensor" and item.name in self._facts and item.shape == ():
            self._add_fact(held, self._counter(held))
        elif item.kind == "tensor" and item.dtype is not None:
            layouts = self._layouts.get(item.name)
            if layouts is None:
                self._add_whole(held)
            else:
                self._add_box(held, layouts)

    def _add_fact(self, held: _Held, value: Any) -> None:
        name = held.item.name
        if name not in self._append:
            self._append[name] = value
        elif self._append[name] != value:
            if name == "step_num" and held.item.kind == "tensor":
                raise LayoutError(
                    f"{held.file.path} is of step {values.decode(value)} and {self._files[0].path} of step "
                    f"{values.decode(self._append[name])}: they do not belong together",
                    ranks=[self._files[0].rank, held.file.rank],
                )
            self._unlike.setdefault(name, []).append(held.file.rank)

    def _counter(self, held: _Held) -> Any:
        assert held.item.dtype is not None
        with InputFile(self._fs, self._path(held), direct=False) as source:
            content = b"".join(blocks(source, held.item.extents))
        return values.encode(np.frombuffer(content, held.item.dtype.numpy)[0].item())

    def _add_whole(self, held: _Held) -> None:
        """A tensor that no strategy names: the same in all files, or a rank's own number."""
        box = whole(held.item.shape)
        tensor = self._tensors.get(held.item.name)
        if tensor is None:
            self._start(held, held.item.shape).boxes[box] = held
            return
        first = next(iter(tensor.boxes.values()))
        if self._same(first, held):
            return
        own = self._has_strategy and math.prod(first.item.shape) == math.prod(held.item.shape) == 1
        if own or held.item.name.startswith(GRADIENT_SUMS):
            self._unlike.setdefault(held.item.name, []).append(held.file.rank)
            return
        reason = "the strategy does not name it" if self._has_strategy else "without a layout nobody knows how they fit"
        raise LayoutError(
            f"{held.item.name!r} differs between {first.file.path} and {held.file.path}: these are slices, and "
            f"{reason}{'' if self._has_strategy else ' together'}",
            tensor=held.item.name,
            ranks=[first.file.rank, held.file.rank],
        )

    def _add_box(self, held: _Held, layouts: Sequence[Layout]) -> None:
        """A rank's piece of a tensor that the strategy names."""
        item, rank = held.item, held.file.rank
        layout = next((layout for layout in layouts if rank in layout.ranks), None)
        if layout is None:
            # Its own stages hold all of it, which is checked; what another one has of it may be out of date.
            log.info("%s: %r is of another pipeline stage and not used", held.file.path, item.name)
            return
        shape = self._global_shape(held, layout)
        tensor = self._tensors.get(item.name) or self._start(held, shape)
        if (tensor.row.global_shape, tensor.row.dtype) != (shape, item.dtype):
            first = next(iter(tensor.boxes.values()))
            raise LayoutError(
                f"{item.name!r}: by the strategy {first.file.path} holds a part of {_kind(tensor.row)}, but "
                f"{held.file.path} one of {_kind(TensorRow(item.name, item.dtype, shape))}",  # type: ignore[arg-type]
                tensor=item.name,
                ranks=[first.file.rank, rank],
            )
        box = layout.box(shape, rank)
        known = tensor.boxes.setdefault(box, held)
        if known is held or not self._check or self._same(known, held):
            return
        if not item.name.startswith(GRADIENT_SUMS):
            raise LayoutError(
                f"{item.name!r} differs between {known.file.path} and {held.file.path}, which hold the same part of "
                "it by the strategy",
                tensor=item.name,
                ranks=[known.file.rank, rank],
            )
        self._unlike.setdefault(item.name, []).append(rank)

    def _global_shape(self, held: _Held, layout: Layout) -> tuple[int, ...]:
        try:
            return layout.global_shape(held.item.shape)
        except LayoutError as error:
            raise LayoutError(
                f"{held.item.name!r} in {held.file.path} does not fit the strategy: {error.message}",
                tensor=held.item.name,
                ranks=[held.file.rank],
            ) from error

    def _start(self, held: _Held, shape: tuple[int, ...]) -> _Tensor:
        assert held.item.dtype is not None
        found = self._tensors[held.item.name] = _Tensor(TensorRow(held.item.name, held.item.dtype, shape), {})
        return found

    def _check_tiling(self, tensor: _Tensor) -> None:
        """Every element is in some file."""
        shape = tensor.row.global_shape
        boxes = [box for box in tensor.boxes if not box.is_empty] or list(tensor.boxes)[:1]
        size = (len(boxes), len(shape))
        offsets = np.array([box.offsets for box in boxes], "<i8").reshape(size)
        problem = tiling_problem(shape, offsets, np.array([box.shape for box in boxes], "<i8").reshape(size))
        if problem is None:
            return
        name, gap = tensor.row.name, problem.box
        there = {file.rank for file in self._files}
        holders = [
            rank
            for layout in self._layouts[name]
            for rank in layout.ranks
            if gap is None or layout.box(shape, rank) == gap
        ]
        absent = [rank for rank in holders if rank not in there]
        more = f"; the files of ranks {_shown(absent)} are missing" if absent else ""
        raise LayoutError(
            f"{name!r}: {gap or 'a part'} is in no file; by the strategy ranks {_shown(holders)} hold it{more}",
            tensor=name,
            ranks=holders,
        )

    def _path(self, held: _Held) -> str:
        return os.path.join(self._root, held.file.path)

    def _same(self, a: _Held, b: _Held) -> bool:
        if (a.item.type, a.item.shape) != (b.item.type, b.item.shape):
            return False
        return self._crc(a) == self._crc(b)

    def _crc(self, held: _Held) -> int:
        """Checksum of an entry; remembered, since one entry is compared with those of many ranks."""
        known = self._crcs.get(id(held.item))
        if known is None:
            known = 0
            with InputFile(self._fs, self._path(held)) as source:
                for block in blocks(source, held.item.extents):
                    known = crc32(block, known)
            self._crcs[id(held.item)] = known
        return known

    def _contents(self) -> Contents:
        numbers = {id(file): number for number, file in enumerate(self._files)}
        rows = [
            (tensor, numbers[id(held.file)], box, held.item)
            for tensor, one in enumerate(self._tensors.values())
            for box, held in one.boxes.items()
        ]
        extents = [extent for *_, item in rows for extent in item.extents]
        return Contents(
            tensors=tuple(tensor.row for tensor in self._tensors.values()),
            files=tuple(_stored(file) for file in self._files),
            boxes=box_columns([(tensor, file, box) for tensor, file, box, _ in rows]),
            box_entry=np.zeros(len(rows), "<u4"),
            entry_names=(),
            box_extents=np.array([len(item.extents) for *_, item in rows], "<u4"),
            extent_start=np.array([e.start for e in extents], "<u8"),
            extent_byte_offset=np.array([e.byte_offset for e in extents], "<u8"),
            extent_nbytes=np.array([e.nbytes for e in extents], "<u8"),
            chunk_nbytes=CHUNK_NBYTES,
            integrated=True,
        )


def blocks(source: InputFile, extents: Iterable[Any]) -> Iterator[bytes]:
    """The content of an entry, in chunks."""
    for extent in extents:
        for start in range(0, extent.nbytes, CHUNK_NBYTES):
            yield source.read(extent.byte_offset + start, min(CHUNK_NBYTES, extent.nbytes - start))


def _stored(file: RankFile) -> StoredFile:
    return StoredFile(file.path, file.nbytes, np.zeros(chunk_count(file.nbytes, CHUNK_NBYTES), "<u4"))


def _layouts(strategy: Strategy, files: Sequence[RankFile]) -> Mapping[str, tuple[Layout, ...]]:
    """The layouts of the tensors that the files hold.

    Raises
    ------
    LayoutError
        If the strategy is another job's.
    """
    ranks = strategy.ranks
    strangers = [file.rank for file in files if file.rank not in ranks]
    if strangers:
        stages = "" if strategy.is_merged else "; of pipeline stages all files have to be merged into one strategy"
        raise LayoutError(
            f"the strategy is for ranks {ranks.start} to {ranks.stop - 1}, but there are files of ranks "
            f"{_shown(strangers)}{stages}",
            ranks=strangers,
        )
    held = {item.name for file in files for item in file.index.entries}
    found = {name: strategy.layouts(name) for name in strategy.names if name in held}
    if not found and strategy.names:
        raise LayoutError("none of the tensors that the strategy names is in the files: it is another model's")
    return found


def _shown(ranks: Sequence[int]) -> str:
    listed = ", ".join(str(rank) for rank in ranks[:8])
    return f"[{listed}{', ...' if len(ranks) > 8 else ''}]"


def _kind(row: TensorRow) -> str:
    return f"{row.dtype.name}{list(row.global_shape)}"


def _facts(path: str, files: Sequence[RankFile], append: dict[str, Any]) -> Facts:
    stem_text = os.path.splitext(os.path.basename(files[0].path))[0]
    stem = naming.parse_stem(stem_text)
    step = append.get("step_num", 0)
    return Facts(
        stem=stem_text,
        token="",
        attempt="",
        run_id="",
        family=stem.prefix if stem else stem_text,
        prefix=stem.prefix if stem else stem_text,
        sequence=0,
        step=step if isinstance(step, int) and step >= 0 else 0,
        epoch=stem.epoch if stem else 0,
        step_in_epoch=stem.step_in_epoch if stem else 0,
        world_size=len(files),
        format=files[0].index.format,
        integrated=True,
        created=0.0,
        reason="foreign",
        append=append,
    )
