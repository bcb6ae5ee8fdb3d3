"""The leaves of a state: what a rank can hand in besides plain arrays and plain values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parckpt.core import dtypes
from parckpt.core.adapting import as_leaf
from parckpt.core.dtypes import DType
from parckpt.errors import ConfigError, ConfigTypeError, InternalError

__all__ = ["Leaf", "OnResize", "PerRank", "Shard", "Spec", "as_dtype", "plain_array", "set_stacker"]

OnResize = str | Callable[[list[Any], int, int], Any]


def as_dtype(value: Any) -> DType:
    """Look up anything that names an element type: a table row, a canonical name, a numpy dtype.

    Raises
    ------
    ConfigTypeError
        If it names none, or one that no format can hold.
    """
    if isinstance(value, DType):
        return value
    if isinstance(value, str):
        try:
            return dtypes.by_name(value)
        except KeyError:
            pass  # "f4" and "<i8" are numpy's words, not ours
    if value is None:  # numpy reads None as float64
        raise ConfigTypeError("a dtype is needed, not None")
    try:
        found = np.dtype(value)
    except TypeError as error:
        raise ConfigTypeError(f"{value!r} is not a dtype") from error
    return dtypes.from_numpy(found)


def plain_array(value: Any) -> bool:
    """True for an ndarray (or memmap) whose elements are all there is to it.

    Subclasses carry more (a mask, a unit), which a checkpoint would lose without a word.
    """
    return type(value) is np.ndarray or type(value) is np.memmap


def _lengths(value: Any, what: str) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise ConfigTypeError(f"{what} must be a sequence of integers, not {type(value).__name__}")
    try:
        if any(isinstance(item, (bool, np.bool_)) for item in value):
            raise TypeError
        return tuple(operator.index(item) for item in value)
    except TypeError as error:
        raise ConfigTypeError(f"{what} must hold integers, not {value!r}") from error


def _extents(value: Any, what: str) -> tuple[int, ...]:
    lengths = _lengths(value, what)
    if any(length < 0 for length in lengths):
        raise ConfigError(f"{what} must not be negative, not {lengths}")
    return lengths


@dataclass(frozen=True, eq=False)
class Leaf:
    """An array that lives elsewhere: on a device, or in an immutable object.

    Parameters
    ----------
    shape : sequence of int
        In elements.
    dtype : dtype or str
        Any element type of `parckpt.core.dtypes`, also by name (``"bfloat16"``, ``"int4"``).
    read_into : callable
        ``read_into(out)`` fills `out`, a C-contiguous little-endian ndarray of that shape and dtype. It must not keep
        `out`. Called from the thread that asked for the save, while training waits.
    write_from : callable, optional
        ``write_from(array)`` takes over the values of `array`, which is read-only and must not be kept. Without it the
        leaf can be saved but not restored.
    origin : object, optional
        What the leaf stands for; `load_checkpoint` gives it back in the leaf's place.
    """

    shape: tuple[int, ...]
    dtype: DType
    read_into: Callable[[np.ndarray[Any, Any]], object]
    write_from: Callable[[np.ndarray[Any, Any]], object] | None
    origin: Any

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        read_into: Callable[[np.ndarray[Any, Any]], object],
        write_from: Callable[[np.ndarray[Any, Any]], object] | None = None,
        *,
        origin: Any = None,
    ) -> None:
        if not callable(read_into):
            raise ConfigTypeError(f"read_into must be callable, not {type(read_into).__name__}")
        if write_from is not None and not callable(write_from):
            raise ConfigTypeError(f"write_from must be callable, not {type(write_from).__name__}")
        object.__setattr__(self, "shape", _extents(shape, "shape"))
        object.__setattr__(self, "dtype", as_dtype(dtype))
        object.__setattr__(self, "read_into", read_into)
        object.__setattr__(self, "write_from", write_from)
        object.__setattr__(self, "origin", origin)


@dataclass(frozen=True, eq=False)
class Spec:
    """A tensor that `restore` shall allocate.

    Parameters
    ----------
    shape : sequence of int
        Of what this rank wants, in elements.
    dtype : dtype or str
        Element type wanted.
    global_shape, offsets : sequence of int, optional
        Both or none. Given, the wanted box starts at `offsets` in a tensor of `global_shape`; else it is the whole.
    """

    shape: tuple[int, ...]
    dtype: DType
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    split: bool

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        global_shape: Sequence[int] | None = None,
        offsets: Sequence[int] | None = None,
    ) -> None:
        own = _extents(shape, "shape")
        if (global_shape is None) != (offsets is None):
            raise ConfigError("global_shape and offsets go together: give both or none")
        split = global_shape is not None
        object.__setattr__(self, "shape", own)
        object.__setattr__(self, "dtype", as_dtype(dtype))
        object.__setattr__(self, "global_shape", _extents(global_shape, "global_shape") if split else own)
        object.__setattr__(self, "offsets", _lengths(offsets, "offsets") if split else (0,) * len(own))
        object.__setattr__(self, "split", split)
        _check_ndim(own, self.global_shape, self.offsets)


@dataclass(frozen=True, eq=False)
class Shard:
    """One half-open box of a tensor, held by this rank.

    Parameters
    ----------
    data : ndarray, Leaf, or a framework's array
        The box's elements. Kept by reference: restoring fills it in place. A framework's array becomes a `Leaf`.
    global_shape : sequence of int
        Shape of the whole tensor, in elements.
    offsets : sequence of int
        Where the box starts in it, one per dimension.

    Raises
    ------
    ConfigError, ConfigTypeError
        For wrong types and dimension counts. That the box lies inside the tensor is checked when all ranks plan
        together, so that all of them raise the same `LayoutError`.
    """

    data: np.ndarray[Any, Any] | Leaf
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def __init__(self, data: np.ndarray[Any, Any] | Leaf, global_shape: Sequence[int], offsets: Sequence[int]) -> None:
        if not plain_array(data) and not isinstance(data, Leaf):
            data = as_leaf(data) or data
        if not plain_array(data) and not isinstance(data, Leaf):
            raise ConfigTypeError(f"a Shard holds a numpy array or a Leaf, not {type(data).__name__}")
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "global_shape", _extents(global_shape, "global_shape"))
        object.__setattr__(self, "offsets", _lengths(offsets, "offsets"))
        _check_ndim(self.shape, self.global_shape, self.offsets)

    @property
    def shape(self) -> tuple[int, ...]:
        """Local shape, in elements."""
        return tuple(self.data.shape)

    @property
    def dtype(self) -> DType:
        """Element type; ConfigTypeError if no format can hold it."""
        return self.data.dtype if isinstance(self.data, Leaf) else dtypes.from_numpy(self.data.dtype)

    @classmethod
    def stack(cls, local: np.ndarray[Any, Any] | Leaf, comm: Any, axis: int = 0) -> Shard:
        """Make this rank's Shard of the tensor that all ranks' pieces form when put one after the other along `axis`.

        Collective over `comm`; call from the thread that owns MPI.

        Parameters
        ----------
        local : ndarray or Leaf
            This rank's piece; its length along `axis` may differ between ranks, and be 0.
        comm : communicator
            As for `ModelCheckpoint`.
        axis : int
            Counted from the end if negative.

        Raises
        ------
        LayoutError
            On all ranks, if dtypes or the other dimensions differ.
        """
        if _stacker is None:
            raise InternalError("Shard.stack needs parckpt.sharding to be imported")
        return _stacker(local, comm, axis)


# The method belongs here for its users, its communication does not: parckpt.sharding hands it in when it is imported.
_stacker: Callable[[Any, Any, int], Shard] | None = None


def set_stacker(stacker: Callable[[Any, Any, int], Shard]) -> None:
    """Say what `Shard.stack` calls."""
    global _stacker
    _stacker = stacker


@dataclass(frozen=True, eq=False)
class PerRank:
    """A leaf, or a mapping or list of leaves, that belongs to this rank alone.

    Parameters
    ----------
    value : array, Leaf, plain value, or a mapping or sequence of them
        No Shards: those are parts of something all ranks share.
    on_resize : {"error", "keep"} or callable
        What restore does when the number of ranks is not the saved one. ``"error"``: refuse, naming the leaf.
        ``"keep"``: leave the value as it is. A callable gets ``(all_values, rank, size)``, the saved value of every
        old rank in rank order plus this rank and the new size, and returns this rank's value.
    """

    value: Any
    on_resize: OnResize = "error"

    def __post_init__(self) -> None:
        if isinstance(self.on_resize, str):
            if self.on_resize not in ("error", "keep"):
                raise ConfigError(f'on_resize must be "error", "keep" or a callable, not {self.on_resize!r}')
        elif not callable(self.on_resize):
            raise ConfigTypeError(f"on_resize must be a string or a callable, not {type(self.on_resize).__name__}")


def _check_ndim(shape: tuple[int, ...], global_shape: tuple[int, ...], offsets: tuple[int, ...]) -> None:
    if len(global_shape) != len(shape) or len(offsets) != len(shape):
        raise ConfigError(
            f"shape {shape}, global_shape {global_shape} and offsets {offsets} must have equally many dimensions"
        )
