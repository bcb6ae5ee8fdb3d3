"""Bytes of the caller's arrays, in C order and little-endian, without copying more than needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.dtypes import DType
from parckpt.core.layout import Box, shift, slices
from parckpt.core.state import LocalPiece
from parckpt.core.transfer import Port
from parckpt.errors import ConfigError

__all__ = ["Source", "byte_blocks"]

Array = npt.NDArray[Any]


def byte_blocks(array: Array, dtype: DType, max_nbytes: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the array's bytes in C order as 1-d blocks of at most ``max_nbytes`` (one element at least).

    Blocks of plain memory are views; others are converted one block at a time, so a transposed or byte-swapped
    array of any size costs one block.
    """
    if array.size == 0:
        return
    if array.flags.c_contiguous and array.dtype == dtype.numpy:
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, max_nbytes):
            yield flat[start : start + max_nbytes]
    elif array.nbytes <= max_nbytes or array.ndim == 0:
        yield np.ascontiguousarray(array, dtype.numpy).reshape(-1).view(np.uint8)
    else:
        row_nbytes = array.nbytes // array.shape[0]
        rows = max_nbytes // row_nbytes
        for start in range(0, array.shape[0], rows or 1):
            yield from byte_blocks(array[start : start + rows] if rows else array[start], dtype, max_nbytes)


class Source:
    """One box that this rank holds and will write or send.

    Arrays are used where they lie. A `Leaf` is read whole when first needed and let go by `release`, so only the
    leaves in use take memory.
    """

    def __init__(self, name: str, dtype: DType, piece: LocalPiece) -> None:
        self.name = name
        self.dtype = dtype
        self.piece = piece
        self.box = Box(piece.offsets, piece.shape)
        self._read: Array | None = None
        self._port: Port | None = None

    def array(self) -> Array:
        """The box as an array, whatever its memory order; reads a Leaf."""
        source = self.piece.source
        if isinstance(source, np.ndarray):
            return source
        if source is None:
            raise ConfigError(f"{self.name!r} is a Spec: that has nothing to save")
        if self._read is None:
            out = np.empty(self.piece.shape, self.dtype.numpy)
            source.read_into(out)
            self._read = out
        return self._read

    def port(self) -> Port:
        """The box as a source of rectangles."""
        if self._port is None:
            self._port = Port(self.array(), self.dtype.numpy)
        return self._port

    def flat(self, box: Box) -> npt.NDArray[np.uint8] | None:
        """All bytes of a part of the box as one view, if the array is plain memory and the part is one run of it."""
        array = self.array()
        if box != self.box:
            array = array[slices(shift(box, self.box.offsets), (0,) * len(box.shape))]
        if not array.flags.c_contiguous or array.dtype != self.dtype.numpy:
            return None
        return array.reshape(-1).view(np.uint8)

    def blocks(self, box: Box, max_nbytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Bytes of a part of the box (global coordinates) in C order, as `byte_blocks`."""
        part = self.array()[slices(shift(box, self.box.offsets), (0,) * len(box.shape))] if box != self.box else None
        yield from byte_blocks(self.array() if part is None else part, self.dtype, max_nbytes)

    def release(self) -> None:
        """Forget what was read from a Leaf."""
        self._read = self._port = None
