"""Which entries the file of each target rank gets: names in MindSpore's order, and the box of each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from parckpt.core.layout import Box, whole
from parckpt.core.strategy import Strategy, TensorStrategy
from parckpt.engine.rewrite import Piece
from parckpt.errors import LayoutError
from parckpt.transform.ranks import by_stage, needed
from parckpt.transform.reading import Opened

__all__ = ["Recut"]


class Recut:
    """Entries of target ranks. Pure.

    A tensor that the target strategy does not name is not cut there, and one that the source strategy does not name
    was not cut here: MindSpore copies some rank's slice in these cases, whatever it is a slice of.
    """

    def __init__(self, opened: Opened, source: Strategy | None, target: Strategy | None) -> None:
        self._opened, self._source, self._target = opened, source, target
        self._target_stages = by_stage(target) if target is not None else {}
        self._is_published = opened.manifest_path is not None

    @property
    def nranks(self) -> int:
        """Number of target ranks."""
        return self._target.nranks if self._target is not None else 1

    @cached_property
    def _rows(self) -> Mapping[str, int]:
        rows = enumerate(self._opened.contents.tensors)
        return {row.name: number for number, row in rows if row.per_rank < 0}

    def source_ranks(self, rank: int) -> list[int]:
        """Source ranks that a target rank needs, descending, as MindSpore lists them; all, where it cannot do it."""
        if self._source is None or self._is_published:
            return [0]
        try:
            return needed(rank, self._source, self._target)
        except LayoutError:
            return list(range(self._source.nranks - 1, -1, -1))

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """Tensors of a target rank: first those that both strategies name, then the others."""
        stage = rank // self._target.stage_nranks if self._target is not None else 0
        both: list[Piece] = []
        others: list[Piece] = []
        for name in self._names(rank):
            row = self._rows[name]
            stages = self._target_stages.get(name)
            if stages is not None and stage not in stages:
                continue
            tensor = stages[stage] if stages is not None else None
            known = self._source is None or self._is_published or name in self._source.stages
            is_named = known and (tensor is not None or self._target is None)
            (both if is_named else others).append(Piece(name, row, self._box(row, tensor, rank)))
        return tuple(both + others)

    def numbers(self, rank: int) -> dict[str, Any]:
        """Single values of a target rank: those of the source rank with its number, stage by stage."""
        by_rank = self._opened.numbers
        found: dict[str, Any] = {}
        for other in self._counterparts(rank):
            found.update((name, value) for name, value in by_rank.get(other, {}).items() if name not in found)
        return {name: value for name, value in found.items() if self._holds(name, rank)}

    def _counterparts(self, rank: int) -> Iterable[int]:
        """Source ranks in the order in which their values are taken: the lowest stage's counts."""
        if self._source is None or self._is_published:
            return (0,)
        size = self._source.stage_nranks
        local = (rank % self._target.stage_nranks if self._target is not None else rank) % size
        return [other for other in sorted(self.source_ranks(rank)) if other % size == local]

    def _holds(self, name: str, rank: int) -> bool:
        stages = self._target_stages.get(name)
        return stages is None or self._target is None or rank // self._target.stage_nranks in stages

    def _names(self, rank: int) -> Iterable[str]:
        """In the order of the needed files; then cut tensors that only other files have, as replicas."""
        ordered: dict[str, None] = {}
        for other in self.source_ranks(rank):
            ordered.update(dict.fromkeys(self._opened.names.get(other, ())))
        ordered.update(self._cut_names)
        return [name for name in ordered if name in self._rows]

    @cached_property
    def _cut_names(self) -> Mapping[str, None]:
        """In the order of all files; made once, as there may be thousands of ranks on both sides."""
        cut = self._source.stages if self._source is not None else {}
        return dict.fromkeys(name for names in self._opened.names.values() for name in names if name in cut)

    def _box(self, row: int, tensor: TensorStrategy | None, rank: int) -> Box:
        shape = self._opened.contents.tensors[row].global_shape
        if tensor is None or self._target is None:
            return whole(shape)
        name = self._opened.contents.tensors[row].name
        try:
            layout = tensor.layout()
            _check_even(name, shape, layout.global_shape((1,) * len(shape)))
            return layout.box(shape, rank % self._target.stage_nranks)
        except LayoutError as error:
            raise LayoutError(f"{name!r} does not fit the target strategy: {error.message}", tensor=name) from error


def _check_even(name: str, shape: Sequence[int], parts: Sequence[int]) -> None:
    """MindSpore can only load slices of one shape."""
    for length, count in zip(shape, parts, strict=True):
        if length % count:
            raise LayoutError(f"its shape {tuple(shape)} cannot be cut evenly into {tuple(parts)} parts", tensor=name)
