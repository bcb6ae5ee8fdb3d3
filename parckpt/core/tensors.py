"""The tensors of a checkpoint as a table, cheap for millions of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from parckpt.core.dtypes import DType, by_code
from parckpt.core.layout import Box

__all__ = ["TensorRow", "TensorTable", "expand"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a checkpoint.

    Attributes
    ----------
    name : str
    dtype : DType
    global_shape : tuple of int
    per_rank : int
        The rank it belongs to, or -1 for a tensor of the whole job.
    """

    name: str
    dtype: DType
    global_shape: tuple[int, ...]
    per_rank: int = -1

    @property
    def file_name(self) -> str:
        """Its name in a file that holds the tensors of all ranks."""
        return self.name if self.per_rank < 0 else f"{self.name}@rank_{self.per_rank}"

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.global_shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class TensorTable(Sequence[TensorRow]):
    """Tensors in order of first appearance over ranks 0, 1, 2, ...

    Attributes
    ----------
    names : tuple of str
        Distinct names.
    name : int64 array
        Index into `names` of each tensor.
    dtype, ndim : uint8 array
        Table code of the element type, and number of dimensions.
    shapes : int64 array of shape (tensors, widest ndim)
        Global shapes, padded with 1.
    per_rank : int64 array
        Rank each belongs to, or -1.
    """

    names: tuple[str, ...]
    name: Ints
    dtype: npt.NDArray[np.uint8]
    ndim: npt.NDArray[np.uint8]
    shapes: Ints
    per_rank: Ints

    def __len__(self) -> int:
        return len(self.name)

    @overload
    def __getitem__(self, index: int) -> TensorRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TensorRow]: ...
    def __getitem__(self, index: int | slice) -> TensorRow | Sequence[TensorRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self.names[int(self.name[index])]
        return TensorRow(name, by_code(int(self.dtype[index])), self.global_shape(index), int(self.per_rank[index]))

    @property
    def itemsize(self) -> Ints:
        """Bytes per element of each tensor."""
        sizes = np.zeros(256, dtype=np.int64)
        for code in np.unique(self.dtype).tolist():
            sizes[code] = by_code(code).itemsize
        found: Ints = sizes[self.dtype]
        return found

    @property
    def sizes(self) -> Ints:
        """Elements of each tensor."""
        found: Ints = self.shapes.prod(axis=1)
        return found

    def global_shape(self, tensor: int) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self.shapes[tensor, : self.ndim[tensor]].tolist())

    def box(self, tensor: int, offsets: Ints, shape: Ints) -> Box:
        """Make a `Box` of one tensor from padded columns."""
        ndim = int(self.ndim[tensor])
        return Box(tuple(offsets[:ndim].tolist()), tuple(shape[:ndim].tolist()))


def expand(starts: Ints, stops: Ints) -> Ints:
    """Concatenate ``range(start, stop)`` of all pairs."""
    counts = stops - starts
    ends = np.cumsum(counts)
    found: Ints = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
    return found
