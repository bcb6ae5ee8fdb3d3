"""What the ranks of a job would hold, without a job: names, shapes, element types and layouts. For planning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from parckpt.core import naming
from parckpt.core.contents import Contents
from parckpt.core.describe import Description, Held, describe
from parckpt.core.dtypes import DType
from parckpt.core.layout import Box, whole
from parckpt.core.mesh import Layout
from parckpt.core.strategy import Strategy
from parckpt.core.tensors import TensorRow
from parckpt.errors import LayoutError

__all__ = ["Outline", "OutlineTensor"]


@dataclass(frozen=True)
class OutlineTensor:
    """One tensor.

    Attributes
    ----------
    layouts : tuple of Layout
        Who holds which part; several for a tensor of several pipeline stages. Empty: every rank holds all of it.
    boxes : tuple of (int, Box)
        Instead of layouts: rank and box, of a checkpoint that was cut by nobody knows what.
    per_rank : bool
        Every rank has one of its own.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    layouts: tuple[Layout, ...] = ()
    boxes: tuple[tuple[int, Box], ...] = ()
    per_rank: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check_layouts(self) -> None:
        """Raise LayoutError, with the tensor's name, if a layout does not fit its shape."""
        for layout in self.layouts:
            try:
                layout.box(self.shape, layout.first_rank)
            except LayoutError as error:
                raise LayoutError(f"{self.name!r}: {error.message}", tensor=self.name) from error

    @cached_property
    def boxes_of(self) -> Mapping[int, tuple[Box, ...]]:
        """Of `boxes`, those of each rank."""
        found: dict[int, tuple[Box, ...]] = {}
        for rank, box in self.boxes:
            found[rank] = (*found.get(rank, ()), box)
        return found


@dataclass(frozen=True)
class Outline:
    """The state of a job.

    Attributes
    ----------
    nranks : int
        Ranks that it speaks of. In a larger job it repeats: rank ``nranks + r`` holds what rank ``r`` does.
    job_nranks : int
        Ranks of the job that is meant, where nobody says otherwise.
    """

    tensors: tuple[OutlineTensor, ...]
    nranks: int = 1
    job_nranks: int = 1
    _shared: dict[tuple[Layout, tuple[int, ...], int], Box] = field(default_factory=dict, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each counted once; those that every rank has of its own, for one rank."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def check_ranks(self, nranks: int) -> None:
        """Raise LayoutError unless a job of so many ranks can hold this state."""
        if nranks % self.nranks:
            raise LayoutError(
                f"the layout is one of {self.nranks} ranks: {nranks} ranks are no multiple of that, "
                "so nobody knows what the others hold"
            )

    def with_strategy(self, strategy: Strategy) -> Outline:
        """The same tensors, cut as a strategy says; those it does not name are whole on every rank.

        Raises
        ------
        LayoutError
            If it names none of them, or does not fit their shapes.
        """
        nranks = strategy.ranks.stop
        if not set(strategy.names) & {tensor.name for tensor in self.tensors}:
            raise LayoutError(f"the strategy names none of the tensors; its first is {strategy.names[0]!r}")
        tensors = tuple(replace(one, layouts=strategy.layouts(one.name), boxes=()) for one in self.tensors)
        for one in tensors:
            one.check_layouts()
        return Outline(tensors, nranks, nranks)

    def cut_evenly(self, nranks: int) -> Outline:
        """The same tensors, each cut along its first dimension over all ranks."""
        layout = Layout((nranks,), None, (0,))
        cut = tuple(
            replace(one, layouts=(layout,) if one.shape and not one.per_rank else (), boxes=()) for one in self.tensors
        )
        return Outline(cut, nranks, nranks)

    @classmethod
    def of_contents(cls, contents: Contents, *, as_stored: bool) -> Outline:
        """Return the outline of a checkpoint.

        Parameters
        ----------
        as_stored : bool
            Ranks hold what is in their files. Else: everything is whole on every rank.
        """
        rows: list[tuple[TensorRow, tuple[tuple[int, Box], ...]]]
        if as_stored:
            owner = [naming.parse_rank_directory(file.path.split("/")[0]) or 0 for file in contents.files]
            rows = [
                (row, tuple((owner[box.file], box.box) for box in contents.boxes_of(number)))
                for number, row in enumerate(contents.tensors)
            ]
            nranks = max(owner, default=0) + 1
        else:
            first = {row.name: row for row in reversed(contents.tensors)}
            rows = [(row, ()) for row in contents.tensors if first[row.name] is row]
            nranks = 1
        tensors = [OutlineTensor(r.name, r.dtype, r.global_shape, (), boxes, r.per_rank >= 0) for r, boxes in rows]
        return cls(tuple(tensors), nranks, nranks)

    def describe(self, nranks: int) -> tuple[list[Description], npt.NDArray[np.int64]]:
        """What the ranks of a job hold: distinct descriptions, and which of them is each rank's."""
        self.check_ranks(nranks)
        distinct: dict[bytes, int] = {}
        found: list[Description] = []
        index: list[int] = []
        for rank in range(self.nranks):
            description = describe(self.held(rank), [])
            key = description.pack()
            if key not in distinct:
                distinct[key] = len(found)
                found.append(description)
            index.append(distinct[key])
        return found, np.tile(np.array(index, np.int64), nranks // self.nranks)

    def held(self, rank: int) -> list[Held]:
        """The boxes that a rank holds."""
        return [
            Held(one.name, one.dtype, one.shape, box.offsets, box.shape, one.per_rank, not one.per_rank)
            for one in self.tensors
            for box in self._boxes(one, rank)
        ]

    def _boxes(self, tensor: OutlineTensor, rank: int) -> Sequence[Box]:
        if tensor.boxes:
            return tensor.boxes_of.get(rank, ())
        if not tensor.layouts:
            return (whole(tensor.shape),)
        return [self._box(layout, tensor.shape, rank) for layout in tensor.layouts if rank in layout.ranks]

    def _box(self, layout: Layout, shape: tuple[int, ...], rank: int) -> Box:
        # A thousand layers have a handful of different shapes and layouts.
        key = layout, shape, rank
        if key not in self._shared:
            self._shared[key] = layout.box(shape, rank)
        return self._shared[key]
