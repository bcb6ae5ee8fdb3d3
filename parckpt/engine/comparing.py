"""Two checkpoints compared, whatever their formats and layouts. Nothing is changed; not collective, takes no lock.

Data streams through in batches, so memory depends neither on the size of the checkpoints nor on how much differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from parckpt.core import appended
from parckpt.core.contents import Contents, StoredBox
from parckpt.core.cover import Cover
from parckpt.core.difference import Delta, slabs
from parckpt.core.layout import Box, whole
from parckpt.core.tensors import TensorRow
from parckpt.engine.source import BoxReading, Source

__all__ = ["Comparison", "TensorDifference", "ValueDifference", "comparable_nbytes", "compare"]

_BATCH_NBYTES = 32 << 20  # of each side
_SLAB_NBYTES = 4 << 20

Kind = Literal["only in A", "only in B", "type", "values"]
OnDone = Callable[[int], None]


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both.

    Attributes
    ----------
    kind : str
        ``type``: shape or element type differ, so elements were not compared.
    a, b : TensorRow or None
        The tensor in either; None where it is missing.
    delta : Delta or None
        Of ``values``: which elements differ.
    """

    name: str
    kind: Kind
    a: TensorRow | None
    b: TensorRow | None
    delta: Delta | None = None


@dataclass(frozen=True)
class ValueDifference:
    """A plain value that is not the same in both.

    Attributes
    ----------
    group : str
        ``value`` (of the state), ``per-rank value`` or ``appended`` (of ``append_dict``).
    in_a, in_b : bool
        Whether it is there.
    a, b : object
        The values, decoded; None where it is missing.
    """

    group: str
    name: str
    in_a: bool
    in_b: bool
    a: Any
    b: Any


@dataclass
class Comparison:
    """What comparing two checkpoints found.

    Attributes
    ----------
    tensors : int
        Tensors that are in at least one of them.
    not_compared : list of str
        Names of which the files do not say enough: a sentence for each.
    nbytes_read, nbytes_skipped : int
        Bytes read from both, and bytes of tensors that were known to be equal by their chunks' checksums.
    """

    tensors: int = 0
    tensor_differences: list[TensorDifference] = field(default_factory=list)
    value_differences: list[ValueDifference] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    nbytes_read: int = 0
    nbytes_skipped: int = 0

    @property
    def is_equal(self) -> bool:
        """Whether no difference was found."""
        return not self.tensor_differences and not self.value_differences


def compare(
    a: Source,
    b: Source,
    *,
    headers_only: bool = False,
    read_all: bool = False,
    on_done: OnDone = lambda nbytes: None,
) -> Comparison:
    """Compare names, shapes, element types, elements and plain values.

    Parameters
    ----------
    headers_only : bool
        Elements are not compared, and no data is read.
    read_all : bool
        Also read what must be equal because both have it in chunks of equal checksums.
    on_done : callable
        Called with the number of bytes of tensors that were settled since the last call; see `comparable_nbytes`.

    Raises
    ------
    IntegrityError
        If something that has to be read is damaged, in either.
    CheckpointGoneError, StorageError
    """
    found = Comparison()
    pairs = _match(a, b, found)
    _compare_values(a, b, found)
    if not headers_only:
        found.tensor_differences += _Comparing(a, b, found, read_all, on_done).run(pairs)
    return found


def comparable_nbytes(a: Source, b: Source) -> int:
    """Bytes of the tensors whose elements can be compared."""
    return sum(pair.row.nbytes for pair in _match(a, b, Comparison()))


@dataclass(frozen=True)
class _Pair:
    """A tensor of the same shape and type in both."""

    name: str
    a: int
    b: int
    row: TensorRow


def _match(a: Source, b: Source, found: Comparison) -> list[_Pair]:
    """Pairs to compare, in A's order; what has no partner goes to ``found``."""
    left = {row.file_name: number for number, row in enumerate(a.contents.tensors)}
    right = {row.file_name: number for number, row in enumerate(b.contents.tensors)}
    found.tensors = len(left.keys() | right.keys())
    pairs: list[_Pair] = []
    for name, number in left.items():
        row = a.contents.tensors[number]
        if name not in right:
            _note_missing(found, name, row, "only in A", a, b)
            continue
        other = b.contents.tensors[right[name]]
        if (row.dtype, row.global_shape) != (other.dtype, other.global_shape):
            found.tensor_differences.append(TensorDifference(name, "type", row, other))
        else:
            pairs.append(_Pair(name, number, right[name], row))
    for name, number in right.items():
        if name not in left:
            _note_missing(found, name, b.contents.tensors[number], "only in B", b, a)
    return pairs


def _note_missing(found: Comparison, name: str, row: TensorRow, kind: Kind, source: Source, other: Source) -> None:
    if source.is_foreign and name in other.facts.append:
        # A file keeps appended numbers as tensors, rounded to 32 bits; which ones they are, only a manifest says.
        found.not_compared.append(f"appended {name!r}: without a manifest its exact value is not known")
        return
    rows = (row, None) if kind == "only in A" else (None, row)
    found.tensor_differences.append(TensorDifference(name, kind, *rows))


def _compare_values(a: Source, b: Source, found: Comparison) -> None:
    foreign = a.is_foreign or b.is_foreign
    if foreign and (a.facts.values or b.facts.values or a.facts.per_rank_values or b.facts.per_rank_values):
        found.not_compared.append("plain values of the state: only manifests hold them, and one is missing")
    groups: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = []
    if not foreign:
        groups.append(("value", a.facts.values, b.facts.values))
        groups.append(("per-rank value", _by_rank(a.facts.per_rank_values), _by_rank(b.facts.per_rank_values)))
    groups.append(("appended", a.facts.append, b.facts.append))
    as_tensors = {row.file_name for side in (a, b) if side.is_foreign for row in side.contents.tensors}
    for group, left, right in groups:
        for name in dict.fromkeys([*left, *right]):
            in_both = name in left and name in right
            differs = left[name] != right[name] if in_both else not (group == "appended" and name in as_tensors)
            if differs:
                found.value_differences.append(_value_difference(group, name, left, right))


def _value_difference(group: str, name: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> ValueDifference:
    decoded = [appended.decode(side[name]) if name in side else None for side in (left, right)]
    return ValueDifference(group, name, name in left, name in right, *decoded)


def _by_rank(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name} [rank {rank}]": value for name, found in values.items() for rank, value in found.items()}


@dataclass(frozen=True, eq=False)
class _EqualRanges:
    """Which bytes of a box are known to be equal in both, because whole chunks are: same place, same checksum."""

    box: StoredBox
    chunk_nbytes: int
    equal: npt.NDArray[np.bool_]  # by chunk of the file

    @classmethod
    def of(cls, a: Contents, box: StoredBox, b: Contents, other: StoredBox) -> _EqualRanges | None:
        """None where one of them has no checksums."""
        left, right = a.files[box.file], b.files[other.file]
        if left.chunk_crcs is None or right.chunk_crcs is None or a.chunk_nbytes != b.chunk_nbytes:
            return None
        # A last chunk that is shorter in one of them holds other bytes.
        whole_chunks = max(len(left.chunk_crcs), len(right.chunk_crcs))
        if left.nbytes != right.nbytes:
            whole_chunks = min(left.nbytes, right.nbytes) // a.chunk_nbytes
        equal = np.zeros(max(len(left.chunk_crcs), len(right.chunk_crcs)), np.bool_)
        equal[:whole_chunks] = left.chunk_crcs[:whole_chunks] == right.chunk_crcs[:whole_chunks]
        return cls(box, a.chunk_nbytes, equal)

    def holds(self, first: int, last: int) -> bool:
        """Whether all bytes ``[first, last)`` of the box, in its C order, lie in such chunks."""
        for extent in self.box.extents:
            begin, end = max(first, extent.start), min(last, extent.start + extent.nbytes)
            if begin < end:
                shift = extent.byte_offset - extent.start
                chunks = slice((begin + shift) // self.chunk_nbytes, -(-(end + shift) // self.chunk_nbytes))
                if not self.equal[chunks].all():
                    return False
        return True


class _Comparing:
    """The elements of all pairs."""

    def __init__(self, a: Source, b: Source, found: Comparison, read_all: bool, on_done: OnDone) -> None:
        self._a, self._b, self._found, self._on_done = a, b, found, on_done
        self._read_all = read_all
        self._deltas: dict[str, Delta] = {}

    def run(self, pairs: list[_Pair]) -> Iterator[TensorDifference]:
        """Compare; yields what differs, in the order of the pairs."""
        left, right = BoxReading(self._a), BoxReading(self._b)
        for batch in self._batches(pairs):
            self._compare(left, right, batch)
        self._found.nbytes_read += left.nbytes + right.nbytes
        for pair in pairs:
            delta = self._deltas.get(pair.name)
            if delta is not None and delta.differing:
                yield TensorDifference(pair.name, "values", pair.row, pair.row, delta)

    def _compare(self, left: BoxReading, right: BoxReading, batch: list[tuple[_Pair, Box]]) -> None:
        # A function of its own, so that the arrays are gone before the next batch begins.
        with (
            left.start([(pair.a, box) for pair, box in batch]) as first,
            right.start([(pair.b, box) for pair, box in batch]) as second,
        ):
            for (pair, box), one, other in zip(batch, first.arrays(), second.arrays(), strict=True):
                self._deltas.setdefault(pair.name, Delta()).add(one, other, box)
                self._on_done(one.nbytes)

    def _batches(self, pairs: list[_Pair]) -> Iterator[list[tuple[_Pair, Box]]]:
        batch: list[tuple[_Pair, Box]] = []
        room = _BATCH_NBYTES
        for pair in pairs:
            for box in self._boxes(pair):
                nbytes = box.size * pair.row.dtype.itemsize
                if batch and nbytes > room:
                    yield batch
                    batch, room = [], _BATCH_NBYTES
                batch.append((pair, box))
                room -= nbytes
        if batch:
            yield batch

    def _boxes(self, pair: _Pair) -> Iterator[Box]:
        """What has to be compared of a pair, in an order that finds it in one piece in each file.

        Where both have the same boxes, box after box. Where not, in the C order of the whole tensor: whole rows are
        one stretch of every file, however either is cut.
        """
        itemsize = pair.row.dtype.itemsize
        whole_box = whole(pair.row.global_shape)
        parts = list(Cover(self._a.contents, pair.a, {}).parts(0, whole_box))
        partners: dict[Box, list[StoredBox]] = {}
        for one in self._b.contents.boxes_of(pair.b):
            partners.setdefault(one.box, []).append(one)
        if not all(stored.box == part and part in partners for stored, part in parts):
            yield from (box for box, _ in slabs(whole_box, _SLAB_NBYTES // itemsize))
            return
        for stored, part in parts:
            equal = None if self._read_all else self._equal_ranges(stored, partners[part])
            for box, start in slabs(part, _SLAB_NBYTES // itemsize):
                if equal is not None and equal.holds(start * itemsize, (start + box.size) * itemsize):
                    self._found.nbytes_skipped += box.size * itemsize
                    self._on_done(box.size * itemsize)
                else:
                    yield box

    def _equal_ranges(self, stored: StoredBox, partners: list[StoredBox]) -> _EqualRanges | None:
        """Where B has a box at the same place of a file as A, its bytes in chunks of equal checksums."""
        for partner in partners:
            if partner.extents == stored.extents:
                return _EqualRanges.of(self._a.contents, stored, self._b.contents, partner)
        return None
