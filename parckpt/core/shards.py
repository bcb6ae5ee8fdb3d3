"""Ways to make Shards: from flat ranges, and by putting the ranks' pieces one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from parckpt.core import dtypes
from parckpt.core.layout import Box, range_boxes
from parckpt.core.leaves import Leaf, Shard, plain_array
from parckpt.errors import ConfigError, ConfigTypeError, LayoutError

__all__ = ["STACK_ROW", "flat_shards", "stack_offsets", "stack_row", "stacked"]

# numpy 2 allows 64 dimensions; a row is fixed in size so that one fixed-size allgather tells all ranks everything.
_MAX_NDIM = 64
STACK_ROW = 3 + _MAX_NDIM


def flat_shards(
    data: np.ndarray[Any, Any],
    global_shape: Sequence[int],
    box: Box | tuple[Sequence[int], Sequence[int]] | None,
    start: int,
    stop: int,
) -> list[Shard]:
    """Turn a flat range of a box, as ZeRO and FSDP cut parameters, into Shards.

    Parameters
    ----------
    data : ndarray
        One-dimensional: elements [start, stop) of the box in C order. The Shards' data are views of it, so restoring
        into them fills it.
    global_shape : sequence of int
        Shape of the whole tensor.
    box : Box, (offsets, shape) or None
        The box of the tensor that was flattened; None: the whole tensor.
    start, stop : int
        Elements of the box, half open.

    Returns
    -------
    list of Shard
        At most ``2 * ndim - 1``. For an empty range one Shard without elements, so that the tensor's name and type
        are still known; only a range of a tensor without dimensions gives an empty list.

    Raises
    ------
    ConfigError
        If `data` has not ``stop - start`` elements or the range leaves the box.
    """
    if not plain_array(data) or data.ndim != 1:
        raise ConfigTypeError("flat_shards takes a one-dimensional numpy array")
    if box is None:
        box = Box((0,) * len(global_shape), tuple(global_shape))
    elif not isinstance(box, Box):
        box = Box(tuple(box[0]), tuple(box[1]))
    if not 0 <= start <= stop <= box.size or data.size != stop - start:
        raise ConfigError(
            f"{data.size} elements cannot be the range [{start}, {stop}) of a box of shape {box.shape}, size {box.size}"
        )
    if start == stop:
        shape = box.shape if box.size == 0 else (0, *box.shape[1:])
        return [Shard(data.reshape(shape), global_shape, box.offsets)] if box.shape else []
    shards, position = [], 0
    for part in range_boxes(box.shape, start, stop):
        offsets = [first + inner for first, inner in zip(box.offsets, part.offsets, strict=True)]
        piece = data[position : position + part.size]
        shards.append(Shard(piece.reshape(part.shape), global_shape, offsets))
        position += part.size
    return shards


def stack_offsets(lengths: Sequence[int], rank: int) -> tuple[int, int]:
    """Where rank's piece starts when pieces of these lengths lie one after the other, and how long they are together.

    Returns
    -------
    (offset, total) : tuple of int

    Raises
    ------
    LayoutError
        If a length is negative.
    """
    if any(length < 0 for length in lengths):
        raise LayoutError(f"lengths must not be negative, not {list(lengths)}")
    return sum(lengths[:rank]), sum(lengths)


def stack_row(local: Any, axis: int) -> np.ndarray[Any, Any]:
    """Describe this rank's piece for `stacked`: an int64 row of `STACK_ROW` numbers.

    Raises
    ------
    ConfigError, ConfigTypeError
        If it is not an array or Leaf with a dimension `axis`.
    """
    if not plain_array(local) and not isinstance(local, Leaf):
        raise ConfigTypeError(f"stack takes a numpy array or a Leaf, not {type(local).__name__}")
    ndim = len(local.shape)
    if not -ndim <= axis < ndim:
        raise ConfigError(f"axis {axis} is not one of the {ndim} dimensions")
    if ndim > _MAX_NDIM:
        raise ConfigError(f"{ndim} dimensions are more than {_MAX_NDIM}")
    dtype = local.dtype if isinstance(local, Leaf) else dtypes.from_numpy(local.dtype)
    row = np.zeros(STACK_ROW, np.int64)
    row[:3] = dtype.code, ndim, axis % ndim
    row[3 : 3 + ndim] = local.shape
    return row


def stacked(local: np.ndarray[Any, Any] | Leaf, rows: np.ndarray[Any, Any], rank: int) -> Shard:
    """Make rank's Shard of what all ranks' pieces form together.

    Parameters
    ----------
    local : ndarray or Leaf
        This rank's piece.
    rows : int64 array, (world size, STACK_ROW)
        Every rank's `stack_row`.
    rank : int
        Of `local`.

    Raises
    ------
    LayoutError
        The same on every rank, naming the first rank that differs from rank 0 in dtype, axis or other dimensions.
    """
    rows = np.asarray(rows)
    ndim, axis = int(rows[0, 1]), int(rows[0, 2])
    compared = rows.copy()
    compared[:, 3 + axis] = 0
    differing = np.flatnonzero((compared != compared[0]).any(axis=1))
    if len(differing):
        other = int(differing[0])
        raise LayoutError(
            f"pieces do not stack: rank 0 has {_describe(rows[0])}, rank {other} has {_describe(rows[other])}",
            ranks=[0, other],
        )
    lengths = [int(length) for length in rows[:, 3 + axis]]
    offset, total = stack_offsets(lengths, rank)
    global_shape, offsets = list(local.shape), [0] * ndim
    global_shape[axis], offsets[axis] = total, offset
    return Shard(local, global_shape, offsets)


def _describe(row: np.ndarray[Any, Any]) -> str:
    ndim = int(row[1])
    shape = tuple(int(length) for length in row[3 : 3 + ndim])
    return f"{dtypes.by_code(int(row[0])).name} of shape {shape} along axis {int(row[2])}"
