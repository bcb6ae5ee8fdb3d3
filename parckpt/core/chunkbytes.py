"""How many bytes of a part of a stored box lie in each chunk of its file, without looking at each element."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.contents import Extent, StoredBox
from parckpt.core.layout import Box, shift

__all__ = ["bytes_by_chunk"]

Ints = npt.NDArray[np.int64]


def bytes_by_chunk(stored: StoredBox, part: Box, itemsize: int, chunk_nbytes: int) -> dict[int, int]:
    """How many bytes of a part lie in each chunk of the file; chunks without any are left out."""
    local = shift(part, stored.box.offsets)
    run = _linear_run(stored.box.shape, local, itemsize)
    found: dict[int, int] = {}
    for extent in stored.extents:
        if run is None:
            chunks, sizes = _scattered(stored.box.shape, local, itemsize, extent, chunk_nbytes)
        else:
            chunks, sizes = _contiguous(run, extent, chunk_nbytes)
        for chunk, nbytes in zip(chunks, sizes, strict=True):
            if nbytes:
                found[chunk] = found.get(chunk, 0) + nbytes
    return found


def _linear_run(shape: tuple[int, ...], part: Box, itemsize: int) -> tuple[int, int] | None:
    """Byte range of a part in the box's C order, None if it is not one run."""
    axis = next((k for k, extent in enumerate(part.shape) if extent != 1), len(shape))
    if part.shape[axis + 1 :] != shape[axis + 1 :]:
        return None
    start = 0
    for offset, extent in zip(part.offsets, shape, strict=True):
        start = start * extent + offset
    return start * itemsize, (start + part.size) * itemsize


def _contiguous(run: tuple[int, int], extent: Extent, chunk_nbytes: int) -> tuple[range, list[int]]:
    move = extent.byte_offset - extent.start
    first = max(run[0] + move, extent.byte_offset)
    last = min(run[1] + move, extent.byte_offset + extent.nbytes)
    if first >= last:
        return range(0), []
    chunks = range(first // chunk_nbytes, (last - 1) // chunk_nbytes + 1)
    return chunks, [min(last, (k + 1) * chunk_nbytes) - max(first, k * chunk_nbytes) for k in chunks]


def _scattered(
    shape: tuple[int, ...], part: Box, itemsize: int, extent: Extent, chunk_nbytes: int
) -> tuple[range, list[Any]]:
    if not extent.nbytes:
        return range(0), []
    first, last = extent.byte_offset, extent.byte_offset + extent.nbytes
    chunks = range(first // chunk_nbytes, (last - 1) // chunk_nbytes + 1)
    cuts = np.arange(chunks.start, chunks.stop + 1, dtype=np.int64) * chunk_nbytes
    positions = np.clip(cuts, first, last) - extent.byte_offset + extent.start
    return chunks, np.diff(_bytes_before(shape, part, itemsize, positions)).tolist()


def _bytes_before(shape: tuple[int, ...], part: Box, itemsize: int, positions: Ints) -> Ints:
    """How many bytes of a part come before each byte position of the box's C order."""
    rest = positions
    total = np.zeros(len(positions), np.int64)
    inside = np.ones(len(positions), bool)  # so far the position's coordinates lie in the part's ranges
    box_inner = itemsize * int(np.prod(shape, dtype=np.int64))
    part_inner = itemsize * part.size
    for extent, offset, length in zip((*shape, itemsize), (*part.offsets, 0), (*part.shape, itemsize), strict=True):
        box_inner //= extent
        part_inner //= length
        index, rest = rest // box_inner, rest % box_inner
        total += inside * np.clip(index - offset, 0, length) * part_inner
        inside &= (index >= offset) & (index < offset + length)
    return total
