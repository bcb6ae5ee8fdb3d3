"""How many bytes of a part of a stored box lie in each chunk of its file, without looking at each element."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parckpt.core.contents import Extent, StoredBox
from parckpt.core.layout import Box, shift

__all__ = ["bytes_by_chunk"]

Ints = npt.NDArray[np.int64]


def bytes_by_chunk(parts: Sequence[tuple[StoredBox, Box, int]], chunk_nbytes: int) -> list[dict[int, int]]:
    """Count the bytes of each part in each chunk of its file; chunks without any are left out.

    Parameters
    ----------
    parts : sequence of (StoredBox, Box, int)
        A stored box, a part of it (global coordinates), and bytes per element.
    """
    found: list[dict[int, int]] = [{} for _ in parts]
    scattered: dict[int, list[_Run]] = {}
    for number, (stored, part, itemsize) in enumerate(parts):
        local = shift(part, stored.box.offsets)
        run = _linear_run(stored.box.shape, local, itemsize)
        for extent in stored.extents:
            if run is not None:
                _add(found[number], *_contiguous(run, extent, chunk_nbytes))
            elif extent.nbytes:
                item = _Run(number, stored.box.shape, local, itemsize, extent)
                scattered.setdefault(len(local.shape), []).append(item)
    for runs in scattered.values():
        for item, chunks, sizes in _scattered(runs, chunk_nbytes):
            _add(found[item.part], chunks, sizes)
    return found


@dataclass(frozen=True)
class _Run:
    """One extent of a stored box, and a part (in the box's coordinates) that is scattered over it."""

    part: int
    shape: tuple[int, ...]
    local: Box
    itemsize: int
    extent: Extent


def _add(found: dict[int, int], chunks: Iterable[int], sizes: Iterable[int]) -> None:
    for chunk, nbytes in zip(chunks, sizes, strict=True):
        if nbytes:
            found[chunk] = found.get(chunk, 0) + nbytes


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


def _scattered(runs: Sequence[_Run], chunk_nbytes: int) -> Iterator[tuple[_Run, range, list[int]]]:
    """Bytes by chunk of many parts of one number of dimensions at once: there may be one for each wanted tensor."""
    first = np.array([run.extent.byte_offset for run in runs], np.int64)
    last = first + np.array([run.extent.nbytes for run in runs], np.int64)
    start = np.array([run.extent.start for run in runs], np.int64)
    chunk = first // chunk_nbytes
    counts = (last - 1) // chunk_nbytes + 1 - chunk
    ends = np.cumsum(counts + 1)
    which = np.repeat(np.arange(len(runs)), counts + 1)
    cuts = (np.arange(len(which)) - (ends - counts - 1)[which] + chunk[which]) * chunk_nbytes
    positions = np.clip(cuts, first[which], last[which]) + (start - first)[which]
    sizes = np.diff(_bytes_before(runs, which, positions)).tolist()
    for run, begin, count, end in zip(runs, chunk.tolist(), counts.tolist(), ends.tolist(), strict=True):
        yield run, range(begin, begin + count), sizes[end - count - 1 : end - 1]


def _bytes_before(runs: Sequence[_Run], which: Ints, positions: Ints) -> Ints:
    """How many bytes of its part come before each byte position of a box's C order."""
    shapes = np.array([(*run.shape, run.itemsize) for run in runs], np.int64)
    offsets = np.array([(*run.local.offsets, 0) for run in runs], np.int64)
    lengths = np.array([(*run.local.shape, run.itemsize) for run in runs], np.int64)
    box_inner, part_inner = shapes.prod(axis=1), lengths.prod(axis=1)
    rest = positions
    total = np.zeros(len(positions), np.int64)
    inside = np.ones(len(positions), bool)  # so far the position's coordinates lie in the part's ranges
    for axis in range(shapes.shape[1]):
        box_inner, part_inner = box_inner // shapes[:, axis], part_inner // lengths[:, axis]
        offset, length = offsets[which, axis], lengths[which, axis]
        index, rest = np.divmod(rest, box_inner[which])
        total += inside * np.clip(index - offset, 0, length) * part_inner[which]
        inside &= (index >= offset) & (index < offset + length)
    return total
