"""What the files of a checkpoint hold: tensors, the boxes stored of them, where each box's bytes lie, chunk checksums.

One model for our checkpoints (read from the manifest) and for foreign files (read from their headers). Columns, not
objects, because a large job has millions of boxes; objects are made for the few a caller asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core import dtypes
from parckpt.core.layout import Box
from parckpt.core.tablefile import Column, Table, join_names, split_names
from parckpt.core.tensors import TensorRow
from parckpt.errors import FormatError

__all__ = ["BoxColumns", "Contents", "Extent", "StoredBox", "StoredFile", "box_columns", "chunk_count"]

MAX_NDIM = 64  # numpy's own limit


@dataclass(frozen=True)
class Extent:
    """``nbytes`` of a box's C-order bytes from ``start``, lying at ``byte_offset`` of the file."""

    start: int
    byte_offset: int
    nbytes: int


@dataclass(frozen=True)
class StoredBox:
    """One box of one tensor in one file. ``entry`` is its name in that file."""

    index: int
    tensor: int
    file: int
    entry: str
    box: Box
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class StoredFile:
    """One data file: path relative to the checkpoint, size, and the crc32 of each chunk (None: foreign, unknown)."""

    path: str
    nbytes: int
    chunk_crcs: npt.NDArray[np.uint32] | None


@dataclass(frozen=True)
class BoxColumns:
    """Boxes in columns.

    Attributes
    ----------
    tensor, file : uint32 (n,)
        Index of the tensor and of the file.
    dims : int64 (sum of 2 * ndim,)
        For each box its offsets, then its shape.
    """

    tensor: Column
    file: Column
    dims: Column


def box_columns(rows: Sequence[tuple[int, int, Box]]) -> BoxColumns:
    """Columns of (tensor, file, box) rows."""
    dims = [value for _, _, box in rows for value in (*box.offsets, *box.shape)]
    return BoxColumns(
        np.array([row[0] for row in rows], "<u4"), np.array([row[1] for row in rows], "<u4"), np.array(dims, "<i8")
    )


def chunk_count(nbytes: int, chunk_nbytes: int) -> int:
    """Number of chunks of a file; the last may be short."""
    return -(-nbytes // chunk_nbytes)


@dataclass(frozen=True)
class Contents:
    """Everything a checkpoint's files hold.

    Attributes
    ----------
    integrated : bool
        One file holds all tensors, so per-rank tensors carry their rank in their entry's name.
    box_entry : uint32 (n,)
        0: the entry is named as the tensor; k: it is named ``entry_names[k - 1]``.
    box_extents : uint32 (n,)
        How many extents the box has; they follow each other in the extent columns.
    """

    tensors: tuple[TensorRow, ...]
    files: tuple[StoredFile, ...]
    boxes: BoxColumns
    box_entry: Column
    entry_names: tuple[str, ...]
    box_extents: Column
    extent_start: Column
    extent_byte_offset: Column
    extent_nbytes: Column
    chunk_nbytes: int
    integrated: bool

    @cached_property
    def _dims_at(self) -> Column:
        ndims = np.array([2 * len(tensor.global_shape) for tensor in self.tensors], "<i8")
        return np.concatenate([np.zeros(1, "<i8"), np.cumsum(ndims[self.boxes.tensor])])

    @cached_property
    def _extents_at(self) -> Column:
        return np.concatenate([np.zeros(1, "<i8"), np.cumsum(self.box_extents, dtype="<i8")])

    @cached_property
    def _by_tensor(self) -> tuple[Column, Column]:
        order = np.argsort(self.boxes.tensor, kind="stable")
        return order, np.searchsorted(self.boxes.tensor[order], np.arange(len(self.tensors) + 1))

    @cached_property
    def index(self) -> dict[str, list[int]]:
        """Tensor name to indices; more than one only for per-rank tensors."""
        found: dict[str, list[int]] = {}
        for position, tensor in enumerate(self.tensors):
            found.setdefault(tensor.name, []).append(position)
        return found

    def box(self, index: int) -> StoredBox:
        """The box of a row."""
        tensor = int(self.boxes.tensor[index])
        ndim = len(self.tensors[tensor].global_shape)
        first = int(self._dims_at[index])
        dims = self.boxes.dims[first : first + 2 * ndim].tolist()
        entry = int(self.box_entry[index])
        extents = range(int(self._extents_at[index]), int(self._extents_at[index + 1]))
        return StoredBox(
            index,
            tensor,
            int(self.boxes.file[index]),
            self.entry_names[entry - 1] if entry else self._entry_of(tensor),
            Box(tuple(dims[:ndim]), tuple(dims[ndim:])),
            tuple(
                Extent(int(self.extent_start[k]), int(self.extent_byte_offset[k]), int(self.extent_nbytes[k]))
                for k in extents
            ),
        )

    def geometry(self, tensor: int) -> tuple[Column, Column, Column]:
        """Rows of a tensor's stored boxes, ascending, with their offsets and shapes: int64 (n,), (n, ndim) twice."""
        order, starts = self._by_tensor
        rows = order[int(starts[tensor]) : int(starts[tensor + 1])]
        ndim = len(self.tensors[tensor].global_shape)
        first = self._dims_at[rows][:, None] + np.arange(ndim)
        return rows, self.boxes.dims[first], self.boxes.dims[first + ndim]

    def boxes_of(self, tensor: int) -> Iterator[StoredBox]:
        """All stored boxes of a tensor, in row order."""
        order, starts = self._by_tensor
        for row in order[int(starts[tensor]) : int(starts[tensor + 1])].tolist():
            yield self.box(row)

    def _entry_of(self, tensor: int) -> str:
        row = self.tensors[tensor]
        return row.file_name if self.integrated else row.name

    def columns(self) -> dict[str, Column]:
        """Columns of the on-disk form."""
        names = [t.name for t in self.tensors]
        blob, ends = join_names([*names, *self.entry_names, *(f.path for f in self.files)])
        crcs = [f.chunk_crcs for f in self.files if f.chunk_crcs is not None]
        return {
            "name_bytes": blob,
            "name_ends": ends,
            **tensor_columns(self.tensors),
            "file_nbytes": np.array([f.nbytes for f in self.files], "<u8"),
            "box_tensor": self.boxes.tensor,
            "box_file": self.boxes.file,
            "box_dims": self.boxes.dims,
            "box_entry": self.box_entry,
            "box_extents": self.box_extents,
            "extent_start": self.extent_start,
            "extent_byte_offset": self.extent_byte_offset,
            "extent_nbytes": self.extent_nbytes,
            "chunk_crc": np.concatenate(crcs) if crcs else np.zeros(0, "<u4"),
        }

    @classmethod
    def from_table(cls, table: Table, path: str, *, chunk_nbytes: int, integrated: bool) -> Contents:
        """Check and take over the columns of a manifest.

        Raises
        ------
        FormatError
            If an index, size or place lies outside what it refers to.
        """
        columns = {name: table.column(name, kind, path) for name, kind in _COLUMNS.items()}
        names = split_names(columns["name_bytes"], columns["name_ends"], path)
        ntensors, nfiles = len(columns["tensor_dtype"]), len(columns["file_nbytes"])
        if len(names) < ntensors + nfiles:
            raise FormatError(f"{path}: {len(names)} names are too few", path=path, field="name_ends")
        contents = cls(
            tensors=parse_tensors(columns, names[:ntensors], path),
            files=_parse_files(columns, names[len(names) - nfiles :], chunk_nbytes, path),
            boxes=BoxColumns(columns["box_tensor"], columns["box_file"], columns["box_dims"]),
            box_entry=columns["box_entry"],
            entry_names=tuple(names[ntensors : len(names) - nfiles]),
            box_extents=columns["box_extents"],
            extent_start=columns["extent_start"],
            extent_byte_offset=columns["extent_byte_offset"],
            extent_nbytes=columns["extent_nbytes"],
            chunk_nbytes=chunk_nbytes,
            integrated=integrated,
        )
        contents._check(path)
        return contents

    def _check(self, path: str) -> None:
        check_boxes(self.tensors, self.boxes, len(self.files), path)
        count = len(self.boxes.tensor)
        extents = len(self.extent_start)
        sound = (
            len(self.box_entry) == len(self.box_extents) == count
            and len(self.extent_byte_offset) == len(self.extent_nbytes) == extents
            and int(self.box_extents.sum(dtype="u8")) == extents
            and (not count or int(self.box_entry.max()) <= len(self.entry_names))
        )
        if not sound:
            raise FormatError(f"{path}: the extent columns do not fit the boxes", path=path, field="box_extents")
        self._check_extents(path)

    def _check_extents(self, path: str) -> None:
        """Each extent lies in its file, and a box's extents cover its bytes in order."""
        owner = np.repeat(np.arange(len(self.boxes.tensor)), self.box_extents)
        file_nbytes = np.array([f.nbytes for f in self.files], "<u8")
        room = file_nbytes[self.boxes.file[owner]] if len(owner) else np.zeros(0, "<u8")
        inside = (self.extent_byte_offset <= room) & (self.extent_nbytes <= room - self.extent_byte_offset)
        firsts = self._extents_at[:-1][self.box_extents > 0]
        covered = np.add.reduceat(self.extent_nbytes, firsts) if len(firsts) else np.zeros(0, "<u8")
        wanted = self.box_nbytes()
        expected_start = np.concatenate([np.zeros(1, "<u8"), np.cumsum(self.extent_nbytes)])[:-1]
        if len(firsts):
            expected_start = expected_start - np.repeat(expected_start[firsts], self.box_extents[self.box_extents > 0])
        sound = (
            bool(np.all(inside))
            and bool(np.all(expected_start == self.extent_start))
            and bool(np.all(covered == wanted[self.box_extents > 0]))
            and bool(np.all(wanted[self.box_extents == 0] == 0))
        )
        if not sound:
            raise FormatError(f"{path}: an extent lies outside its file or box", path=path, field="extent_nbytes")

    def box_nbytes(self) -> npt.NDArray[np.uint64]:
        """Bytes of each box."""
        ndims = np.array([len(t.global_shape) for t in self.tensors], "<i8")[self.boxes.tensor]
        itemsize: npt.NDArray[np.uint64] = np.array([t.dtype.itemsize for t in self.tensors], "<u8")[self.boxes.tensor]
        nbytes: npt.NDArray[np.uint64] = itemsize.copy()
        for ndim in np.unique(ndims).tolist():
            rows = np.flatnonzero(ndims == ndim)
            places = self._dims_at[:-1][rows, None] + ndim + np.arange(ndim)
            nbytes[rows] *= np.prod(self.boxes.dims[places].astype("u8"), axis=1, dtype="u8")
        return nbytes


def tensor_columns(tensors: Sequence[TensorRow]) -> dict[str, Column]:
    """Columns of a tensor list, without the names."""
    return {
        "tensor_dtype": np.array([t.dtype.code for t in tensors], "u1"),
        "tensor_rank": np.array([t.per_rank for t in tensors], "<i4"),
        "tensor_ndim": np.array([len(t.global_shape) for t in tensors], "u1"),
        "tensor_dims": np.array([d for t in tensors for d in t.global_shape], "<i8"),
    }


def parse_tensors(columns: dict[str, Column], names: Sequence[str], path: str) -> tuple[TensorRow, ...]:
    """Tensor list of checked columns."""
    ndims = columns["tensor_ndim"].tolist()
    dims = columns["tensor_dims"].tolist()
    codes, ranks = columns["tensor_dtype"].tolist(), columns["tensor_rank"].tolist()
    if not len(ndims) == len(codes) == len(ranks) == len(names) or sum(ndims) != len(dims):
        raise FormatError(f"{path}: the tensor columns differ in length", path=path, field="tensor_dims")
    if any(d < 0 for d in dims) or max(ndims, default=0) > MAX_NDIM:
        raise FormatError(f"{path}: a tensor has an impossible shape", path=path, field="tensor_dims")
    if min(ranks, default=0) < -1:
        raise FormatError(f"{path}: a tensor belongs to rank {min(ranks)}", path=path, field="tensor_rank")
    tensors: list[TensorRow] = []
    position = 0
    for name, code, rank, ndim in zip(names, codes, ranks, ndims, strict=True):
        try:
            dtype = dtypes.by_code(code)
        except KeyError:
            raise FormatError(
                f"{path}: tensor {name!r} has dtype code {code}", path=path, field="tensor_dtype"
            ) from None
        tensors.append(TensorRow(name, dtype, tuple(dims[position : position + ndim]), rank))
        position += ndim
        # Zeros do not count: numpy refuses a shape by the product of the others.
        if math.prod(d or 1 for d in tensors[-1].global_shape) * tensors[-1].dtype.itemsize >= 1 << 63:
            raise FormatError(f"{path}: tensor {name!r} has an impossible size", path=path, field="tensor_dims")
    if len({(t.name, t.per_rank) for t in tensors}) != len(tensors):
        raise FormatError(f"{path}: a tensor is listed twice", path=path, field="name_bytes")
    return tuple(tensors)


def check_boxes(tensors: Sequence[TensorRow], boxes: BoxColumns, nfiles: int, path: str) -> None:
    """Every box refers to a tensor and file that exist and lies inside its tensor; FormatError otherwise."""
    count = len(boxes.tensor)
    if len(boxes.file) != count:
        raise FormatError(f"{path}: the box columns differ in length", path=path, field="box_file")
    if count and (int(boxes.tensor.max()) >= len(tensors) or int(boxes.file.max()) >= nfiles):
        raise FormatError(f"{path}: a box refers to a tensor or file that is not there", path=path, field="box_tensor")
    ndims = np.array([len(t.global_shape) for t in tensors], "<i8")[boxes.tensor] if count else np.zeros(0, "<i8")
    if int(ndims.sum()) * 2 != len(boxes.dims):
        raise FormatError(f"{path}: {len(boxes.dims)} box dimensions do not fit", path=path, field="box_dims")
    starts = np.concatenate([np.zeros(1, "<i8"), np.cumsum(2 * ndims)])
    dims_at = np.concatenate([np.zeros(1, "<i8"), np.cumsum([len(t.global_shape) for t in tensors], dtype="<i8")])
    all_dims = np.array([d for t in tensors for d in t.global_shape], "<i8")
    for ndim in np.unique(ndims).tolist():
        rows = np.flatnonzero(ndims == ndim)
        first = starts[:-1][rows, None] + np.arange(ndim)
        offsets, shapes = boxes.dims[first], boxes.dims[first + ndim]
        limits = all_dims[dims_at[:-1][boxes.tensor[rows], None] + np.arange(ndim)]
        if np.any(offsets < 0) or np.any(shapes < 0) or np.any(offsets > limits) or np.any(shapes > limits - offsets):
            raise FormatError(f"{path}: a box lies outside its tensor", path=path, field="box_dims")


def _parse_files(
    columns: dict[str, Column], names: Sequence[str], chunk_nbytes: int, path: str
) -> tuple[StoredFile, ...]:
    files: list[StoredFile] = []
    position = 0
    crcs = columns["chunk_crc"]
    for name, nbytes in zip(names, columns["file_nbytes"].tolist(), strict=True):
        check_relative(name, path)
        count = chunk_count(nbytes, chunk_nbytes)
        if count > len(crcs) - position:
            raise FormatError(f"{path}: too few chunk checksums for {name}", path=path, field="chunk_crc")
        files.append(StoredFile(name, nbytes, crcs[position : position + count]))
        position += count
    if position != len(crcs):
        raise FormatError(f"{path}: {len(crcs) - position} chunk checksums too many", path=path, field="chunk_crc")
    return tuple(files)


def check_relative(name: str, path: str) -> None:
    """FormatError unless ``name`` is a plain path inside the checkpoint's directory."""
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise FormatError(f"{path}: {name!r} is not a path inside the checkpoint", path=path, field="name_bytes")


_COLUMNS: dict[str, Any] = {
    "name_bytes": "u1",
    "name_ends": "<u8",
    "tensor_dtype": "u1",
    "tensor_rank": "<i4",
    "tensor_ndim": "u1",
    "tensor_dims": "<i8",
    "file_nbytes": "<u8",
    "box_tensor": "<u4",
    "box_file": "<u4",
    "box_dims": "<i8",
    "box_entry": "<u4",
    "box_extents": "<u4",
    "extent_start": "<u8",
    "extent_byte_offset": "<u8",
    "extent_nbytes": "<u8",
    "chunk_crc": "<u4",
}
