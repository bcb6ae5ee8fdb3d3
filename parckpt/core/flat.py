"""A state as flat lists: what planning, writing and reading work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parckpt.core.dtypes import DType
from parckpt.core.leaves import Leaf, OnResize, PerRank

__all__ = ["Builder", "FlatState", "LocalPiece", "TensorLeaf", "ValueLeaf"]

Builder = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class LocalPiece:
    """One box of a tensor on this rank; `source` is None where restore shall allocate it."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    source: np.ndarray[Any, Any] | Leaf | None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class TensorLeaf:
    """One tensor as this rank holds it.

    Attributes
    ----------
    split : bool
        True: the user stated boxes (Shards); False: a plain array, which is the whole tensor.
    several : bool
        True: the user gave a sequence of Shards, so the restored form is a list, also of one piece.
    """

    name: str
    dtype: DType
    global_shape: tuple[int, ...]
    pieces: tuple[LocalPiece, ...]
    split: bool = False
    several: bool = False
    per_rank: bool = False
    on_resize: OnResize = "error"

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces of this rank."""
        return sum(piece.size for piece in self.pieces) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class ValueLeaf:
    """One plain value.

    Attributes
    ----------
    container, key
        ``container[key]`` is where it came from; `container` is None if that cannot be assigned to.
    wrapped : bool
        True if what stands there is a `PerRank` of the value.
    """

    name: str
    value: Any
    per_rank: bool = False
    on_resize: OnResize = "error"
    container: MutableMapping[Any, Any] | MutableSequence[Any] | None = None
    key: Any = None
    wrapped: bool = False

    @property
    def may_be_no_shards(self) -> bool:
        """True for an empty sequence: also what a rank that holds no Shard of some tensor hands in."""
        return isinstance(self.value, (list, tuple)) and not self.value

    def write_back(self, value: Any) -> bool:
        """Put a restored value where the old one was; False if nothing there can be changed.

        A list stays the same object (others may refer to it) and gets new items.
        """
        if type(self.value) is list and type(value) is list:
            self.value[:] = value
            return True
        if self.container is None:
            return False
        self.container[self.key] = PerRank(value, self.on_resize) if self.wrapped else value
        return True


@dataclass(frozen=True, eq=False)
class FlatState:
    """All leaves of one state, in the order of its mappings and sequences."""

    tensors: tuple[TensorLeaf, ...]
    values: tuple[ValueLeaf, ...]
    _build: Builder

    def rebuild(self, arrays: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
        """Copy the nested structure with new leaves.

        Parameters
        ----------
        arrays : mapping
            Tensor name to its array, or list of arrays for a sequence of Shards. Tensors it lacks stay the objects
            that were handed in.
        values : mapping
            Value name to value; those it lacks stay as they are.

        Returns
        -------
        dict
            New dicts, lists and tuples; `PerRank` wrappers are gone, int keys are ints again.
        """
        return self._build(arrays, values)
