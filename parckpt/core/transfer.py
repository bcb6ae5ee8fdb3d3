"""Which bytes of a file go to or come from which part of an array.

A stored box is one run of C-order bytes in a file (or a few runs, `Extent`). A rank holds, or wants, some other box of
the same tensor. `copies` says, for any byte range of the file, which rectangles to copy between the two. Ranges may
begin and end anywhere, also inside an element, because chunks do not know about elements: so shapes get a last
dimension counted in bytes, and everything is done in bytes.

Saving uses it from arrays to the file, restoring from the file to arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.contents import Extent
from parckpt.core.layout import Box, byte_box, intersect, range_boxes, shift, slices

__all__ = ["Copy", "Port", "copies", "extract", "insert"]

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Copy:
    """One rectangle of bytes.

    Attributes
    ----------
    position : int
        First byte, in the file window, of the run that contains the rectangle.
    shape : tuple of int
        The run seen as an array of bytes (last dimension: bytes of an element).
    run_index, array_index : tuple of slice
        The rectangle in the run, and in the byte view of the held array.
    nbytes : int
        Bytes in the rectangle.
    """

    position: int
    shape: tuple[int, ...]
    run_index: tuple[slice, ...]
    array_index: tuple[slice, ...]
    nbytes: int

    @property
    def rectangle(self) -> tuple[int, ...]:
        """Shape of the rectangle, in bytes along the last dimension."""
        return tuple(index.stop - index.start for index in self.run_index)


def copies(
    stored: Box, extents: Sequence[Extent], itemsize: int, window: tuple[int, int], held: Box, *, flat: bool
) -> list[Copy]:
    """Rectangles that a file window and a held box have in common.

    Parameters
    ----------
    stored, held : Box
        Boxes of one tensor, in elements.
    extents : sequence of Extent
        Where the stored box's bytes lie in the file.
    itemsize : int
        Bytes per element.
    window : (int, int)
        Half-open byte range of the file.
    flat : bool
        The held array is plain memory (`Port.flat`): equal boxes may then be copied as ranges of flat bytes.

    Returns
    -------
    list of Copy
        In file order; empty if there is nothing in common.
    """
    common = intersect(stored, held)
    if common is None:
        return []
    inner = byte_box(shift(common, stored.offsets), itemsize)
    if flat and held == stored:
        return _runs(stored, extents, itemsize, window)
    byte_shape = (*stored.shape, itemsize)
    # From the byte view's local coordinates in the stored box to those in the held array.
    move = tuple(h - s for h, s in zip((*held.offsets, 0), (*stored.offsets, 0), strict=True))
    found: list[Copy] = []
    for extent, first, last in _overlaps(extents, window):
        position = first - window[0]
        start = extent.start + first - extent.byte_offset
        for run in range_boxes(byte_shape, start, start + last - first):
            part = intersect(run, inner)
            if part is not None:
                size = _size(part.shape)
                found.append(Copy(position, run.shape, slices(part, run.offsets), slices(part, move), size))
            position += _size(run.shape)
    return found


def _runs(box: Box, extents: Sequence[Extent], itemsize: int, window: tuple[int, int]) -> list[Copy]:
    """The common case, held box equal to stored box: plain ranges of the flat array."""
    found: list[Copy] = []
    for extent, first, last in _overlaps(extents, window):
        start, nbytes = extent.start + first - extent.byte_offset, last - first
        found.append(Copy(first - window[0], (nbytes,), (slice(0, nbytes),), (slice(start, start + nbytes),), nbytes))
    return found


def _overlaps(extents: Sequence[Extent], window: tuple[int, int]) -> list[tuple[Extent, int, int]]:
    found = []
    for extent in extents:
        first, last = max(extent.byte_offset, window[0]), min(extent.byte_offset + extent.nbytes, window[1])
        if first < last:
            found.append((extent, first, last))
    return found


def _size(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


class Port:
    """One held array as the place bytes come from (`push`) or go to (`pull`), whatever its memory order.

    Parameters
    ----------
    array : ndarray
        Elements of the held box; kept by reference, never copied as a whole.
    dtype : numpy.dtype
        The stored, little-endian type; the array may be byte-swapped or strided.
    """

    def __init__(self, array: npt.NDArray[Any], dtype: np.dtype[Any]) -> None:
        self.array = array
        self.dtype = dtype
        #: Plain memory can be addressed as flat bytes; `copies` needs to know.
        self.flat = bool(array.flags.c_contiguous) and array.dtype == dtype
        self._bytes: Bytes | None = _byte_view(array) if self.flat else None

    def push(self, copy: Copy, window: Bytes) -> None:
        """Copy a rectangle from the array into the file window (1-d bytes)."""
        if self._bytes is not None:
            _run(copy, window)[copy.run_index] = self._select(copy)
        else:
            packed = np.empty(copy.nbytes, np.uint8)
            self.load(copy, packed)
            insert(copy, window, packed)

    def pull(self, copy: Copy, window: Bytes) -> None:
        """Copy a rectangle from the file window (1-d bytes) into the array."""
        if self._bytes is not None:
            self._select(copy)[...] = _run(copy, window)[copy.run_index]
        else:
            self.store(copy, extract(copy, window))

    def load(self, copy: Copy, packed: Bytes) -> None:
        """Copy a rectangle from the array into ``copy.nbytes`` contiguous bytes."""
        target = packed.reshape(copy.rectangle)
        if self._bytes is not None:
            target[...] = self._select(copy)
        else:
            elements = np.ascontiguousarray(self.array[copy.array_index[:-1]], self.dtype)
            target[...] = _byte_view(elements)[..., copy.array_index[-1]]

    def store(self, copy: Copy, packed: Bytes) -> None:
        """Copy ``copy.nbytes`` contiguous bytes into a rectangle of the array."""
        source = packed.reshape(copy.rectangle)
        if self._bytes is not None:
            self._select(copy)[...] = source
        else:
            # Chunks may cut through an element, so the elements are read, patched and put back.
            elements = np.array(self.array[copy.array_index[:-1]], self.dtype, order="C")
            _byte_view(elements)[..., copy.array_index[-1]] = source
            self.array[copy.array_index[:-1]] = elements

    def _select(self, copy: Copy) -> Bytes:
        assert self._bytes is not None
        view = self._bytes.reshape(-1) if len(copy.array_index) != self._bytes.ndim else self._bytes
        return view[copy.array_index]


def insert(copy: Copy, window: Bytes, packed: Bytes) -> None:
    """Copy ``copy.nbytes`` contiguous bytes into their rectangle of the file window."""
    _run(copy, window)[copy.run_index] = packed.reshape(copy.rectangle)


def extract(copy: Copy, window: Bytes) -> Bytes:
    """The bytes of a rectangle of the file window, contiguous; a view where they lie so."""
    return np.ascontiguousarray(_run(copy, window)[copy.run_index]).reshape(-1)


def _run(copy: Copy, window: Bytes) -> Bytes:
    return window[copy.position : copy.position + _size(copy.shape)].reshape(copy.shape)


def _byte_view(array: npt.NDArray[Any]) -> Bytes:
    """Bytes of a C-contiguous array, shape ``(*shape, itemsize)``; shares memory."""
    return array.reshape(-1).view(np.uint8).reshape(*array.shape, array.dtype.itemsize)
