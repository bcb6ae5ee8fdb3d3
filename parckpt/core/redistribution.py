"""Which source ranks MindSpore reads for one target rank, when a tensor passes from one cut to another.

MindSpore moves a tensor between layouts as its runtime would: gather along device axes, then cut. What it reads is
therefore not the least set of ranks that covers the target's box, but all ranks that differ from the target only in
axes that are gathered. Scripts build their file maps from this list, so it is the same here.

Source: the observed lists of ``rank_list_for_transform`` over random layouts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from parckpt.errors import LayoutError

__all__ = ["Cut", "needed_ranks"]


@dataclass(frozen=True)
class Cut:
    """How one tensor is cut over the ranks of one pipeline stage.

    Attributes
    ----------
    mesh : tuple of int
        Device matrix; ranks are row-major over it.
    axes : tuple of tuple of int
        For each tensor dimension the mesh axes, counted from the right, that cut it; first is major.
    shard_step, shard_size : int
        Optimizer sharding of dimension 0, as in strategy files (size 0: none; -1: over all replicas).
    """

    mesh: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    shard_step: int = 0
    shard_size: int = 0

    @property
    def nranks(self) -> int:
        """Ranks of the mesh."""
        return math.prod(self.mesh)

    def digits(self) -> list[list[_Digit]]:
        """For each tensor dimension the digits of the rank number that cut it, most significant first.

        Raises
        ------
        LayoutError
            If the replicas cannot be divided by the optimizer sharding.
        """
        found = [[d for axis in axes for d in self._axis(axis)] for axes in self.axes]
        if self.shard_step and self.shard_size and found:
            found[0] = found[0] + self._shard_digits()
        return found

    def _axis(self, axis: int) -> list[_Digit]:
        if axis < 0:
            return []
        place = len(self.mesh) - 1 - axis
        digit = _Digit(math.prod(self.mesh[place + 1 :]), self.mesh[place])
        return [digit] if digit.size > 1 else []

    def _shard_digits(self) -> list[_Digit]:
        """Digits of the rank's place among the replicas of its slice, as far as `shard_size` of them take part."""
        used = {axis for axes in self.axes for axis in axes if axis >= 0}
        free = [d for axis in range(len(self.mesh)) if axis not in used for d in self._axis(axis)]
        left = self.shard_size if self.shard_size > 0 else math.prod(d.size for d in free)
        taken: list[_Digit] = []
        for digit in free:  # the least significant first
            if left == 1:
                break
            size = min(left, digit.size)
            if left % size or digit.size % size:
                break
            taken.insert(0, _Digit(digit.stride, size))
            left //= size
        if left != 1:
            raise LayoutError(
                f"the replicas on a mesh of {self.mesh} cut along its axes {self.axes} (from the right) cannot be "
                f"divided into optimizer shards of {self.shard_size} ranks"
            )
        return taken


@dataclass(frozen=True)
class _Digit:
    """A digit of the rank number: ``rank // stride % size``."""

    stride: int
    size: int


def needed_ranks(source: Cut, target: Cut, rank: int) -> set[int]:
    """Source ranks (within their stage) that MindSpore reads for target rank ``rank`` (within its stage).

    Raises
    ------
    LayoutError
        If neither number of ranks is a multiple of the other, as MindSpore demands.
    """
    most, least = max(source.nranks, target.nranks), min(source.nranks, target.nranks)
    if most % least:
        raise LayoutError(f"{source.nranks} ranks cannot be mapped to {target.nranks}: neither divides the other")
    gathered = _gathered(source.digits(), target.digits())
    lost = [digit.stride * (rank // digit.stride % digit.size) for digit in gathered]
    places = [range(0, digit.stride * digit.size, digit.stride) for digit in gathered]
    base = rank - sum(lost)
    return {(base + sum(offsets)) % source.nranks for offsets in itertools.product(*places)}


def _gathered(source: list[list[_Digit]], target: list[list[_Digit]]) -> set[_Digit]:
    """Digits of the source that are not where the target has them; all of them if the two have no common digits."""
    width = max(len(source), len(target))
    source = source + [[] for _ in range(width - len(source))]
    target = target + [[] for _ in range(width - len(target))]
    refined = _refine(source, target)
    if refined is None:
        return {digit for digits in source for digit in digits}
    found: set[_Digit] = set()
    for ours, theirs in zip(*refined, strict=True):
        for place, digit in enumerate(ours):
            if place >= len(theirs) or theirs[place] != digit:
                found.add(digit)
    return found


def _refine(
    source: list[list[_Digit]], target: list[list[_Digit]]
) -> tuple[list[list[_Digit]], list[list[_Digit]]] | None:
    """Split digits until both sides are made of the same ones, cut at the same places; None if that is impossible."""
    while True:
        marks = sorted({m for d in _all(source, target) for m in (d.stride, d.stride * d.size)})
        if any(b % a for a, b in itertools.pairwise(marks)):
            return None
        pair = [[_split_all(digits, marks) for digits in side] for side in (source, target)]
        aligned = [_align(ours, theirs) for ours, theirs in zip(*pair, strict=True)]
        if any(entry is None for entry in aligned):
            return None
        fine = [[entry[side] for entry in aligned if entry is not None] for side in (0, 1)]
        if fine == [source, target]:
            return source, target
        source, target = fine


def _all(*sides: list[list[_Digit]]) -> Iterator[_Digit]:
    return (digit for side in sides for digits in side for digit in digits)


def _split_all(digits: Iterable[_Digit], marks: Sequence[int]) -> list[_Digit]:
    return [part for digit in digits for part in _split(digit, marks)]


def _split(digit: _Digit, marks: Sequence[int]) -> list[_Digit]:
    inside = [m for m in marks if digit.stride <= m <= digit.stride * digit.size]
    return [_Digit(low, high // low) for low, high in reversed(list(itertools.pairwise(inside)))]


def _align(ours: list[_Digit], theirs: list[_Digit]) -> tuple[list[_Digit], list[_Digit]] | None:
    """Cut two lists of digits where either begins a new one, as parts of one tensor dimension."""
    marks = sorted({*_ends(ours), *_ends(theirs)})
    if any(b % a for a, b in itertools.pairwise(marks)):
        return None
    return _cut_at(ours, marks), _cut_at(theirs, marks)


def _ends(digits: list[_Digit]) -> list[int]:
    return [1, *itertools.accumulate((d.size for d in digits), lambda a, b: a * b)]


def _cut_at(digits: list[_Digit], marks: Sequence[int]) -> list[_Digit]:
    found: list[_Digit] = []
    for begin, digit in zip(_ends(digits)[:-1], digits, strict=True):
        inside = [m // begin for m in marks if begin <= m <= begin * digit.size]
        for low, high in itertools.pairwise(inside):
            # The most significant part comes first: `low` is how many parts precede it in significance.
            found.append(_Digit(digit.stride * (digit.size // high), high // low))
    return found
