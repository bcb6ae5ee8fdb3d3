"""Checkpoints written by hand, as files and `Contents`, without the engine's own saving."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.contents import Contents, StoredFile, box_columns, chunk_count
from parckpt.core.crc import crc32
from parckpt.core.dtypes import DType
from parckpt.core.layout import Box, slices
from parckpt.core.tensors import TensorRow
from parckpt.formats.registry import FORMATS
from parckpt.storage.atomic import write_file
from parckpt.storage.filesystem import FileSystem, try_stat
from parckpt.testing.files import assemble

__all__ = ["random_array", "store"]

Array = npt.NDArray[Any]


def random_array(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...]) -> Array:
    """An array of random bits; NaNs with payloads included."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    bits = rng.integers(0, 2 if dtype.name == "bool" else 256, nbytes, dtype=np.uint8)
    return bits.view(dtype.numpy).reshape(shape)


def store(
    fs: FileSystem,
    root: str,
    tensors: Sequence[tuple[TensorRow, Array]],
    files: Sequence[Sequence[tuple[int, Box]]],
    *,
    form: str = "ckpt",
    chunk_nbytes: int = 4 << 20,
    checksums: bool = True,
) -> Contents:
    """Write data files and describe them.

    Parameters
    ----------
    root : str
        Directory to write to; its parent exists.
    tensors : sequence of (TensorRow, ndarray)
        Every tensor, whole.
    files : sequence of sequence of (int, Box)
        For each file the tensor and box of each of its entries, at least one box of a tensor per file.
    checksums : bool
        False: as with foreign files, nothing is known of their chunks.
    """
    _mkdir(fs, root)
    rows: list[tuple[int, int, Box]] = []
    extents: list[tuple[int, int, int]] = []
    counts: list[int] = []
    stored: list[StoredFile] = []
    for number, boxes in enumerate(files):
        entries = [FORMATS[form].entry(f"e{k}", tensors[t][0].dtype, box.shape) for k, (t, box) in enumerate(boxes)]
        layout = FORMATS[form].layout(entries, metadata={}, crc=None)
        pieces = [tensors[t][1][slices(box, (0,) * len(box.shape))] for t, box in boxes]
        data = assemble(layout, [np.ascontiguousarray(piece).tobytes() for piece in pieces], FORMATS[form])
        path = f"rank_{number}/data.{form}"
        _mkdir(fs, os.path.join(root, f"rank_{number}"))
        write_file(fs, os.path.join(root, path), data)
        crcs = [crc32(data[start : start + chunk_nbytes]) for start in range(0, len(data), chunk_nbytes)]
        assert len(crcs) == chunk_count(len(data), chunk_nbytes)
        stored.append(StoredFile(path, len(data), np.array(crcs, "<u4") if checksums else None))
        for entry, (tensor, box) in enumerate(boxes):
            found = [(e.start, e.byte_offset, e.nbytes) for e in layout.extents if e.entry == entry]
            rows.append((tensor, number, box))
            extents += found
            counts.append(len(found))
    columns = np.array(extents, "<u8").reshape(-1, 3)
    return Contents(
        tensors=tuple(row for row, _ in tensors),
        files=tuple(stored),
        boxes=box_columns(rows),
        box_entry=np.zeros(len(rows), "<u4"),
        entry_names=(),
        box_extents=np.array(counts, "<u4"),
        extent_start=np.ascontiguousarray(columns[:, 0]),
        extent_byte_offset=np.ascontiguousarray(columns[:, 1]),
        extent_nbytes=np.ascontiguousarray(columns[:, 2]),
        chunk_nbytes=chunk_nbytes,
        integrated=False,
    )


def _mkdir(fs: FileSystem, path: str) -> None:
    if try_stat(fs, path) is None:
        fs.mkdir(path)
