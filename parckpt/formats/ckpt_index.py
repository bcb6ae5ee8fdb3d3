"""Reading the headers of a ``ckpt`` file: every variant that the wire format allows, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parckpt.core import dtypes
from parckpt.formats.base import Extent, FileIndex, IndexedEntry
from parckpt.formats.ckpt_messages import CHECKPOINT_VALUE, MAP_PARTS, TEXT_TYPE, read_value
from parckpt.formats.entries import content_nbytes
from parckpt.formats.wire import WireReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parckpt.core.dtypes import DType
    from parckpt.formats.base import RangeReader
    from parckpt.formats.ckpt_messages import TensorMessage, ValueMessage

__all__ = ["FORMAT", "MAX_TEXT_NBYTES", "read_index"]

FORMAT = "ckpt"

TRAILER_MAGIC = b"crc_num"
TRAILER_NBYTES = len(TRAILER_MAGIC) + 10

# Strings are read with the headers, so they are bounded: 16 million characters.
MAX_TEXT_NBYTES = 64 << 20


def read_index(reader: RangeReader) -> FileIndex:
    """Read what a ckpt file holds, without its contents.

    Not collective. Reads the message headers, in pieces of 512 bytes or more, and strings up to `MAX_TEXT_NBYTES`.
    A file cut exactly between two messages cannot be told from a whole one: only a manifest or the crc can.

    Parameters
    ----------
    reader : RangeReader
        The file, decrypted.

    Returns
    -------
    FileIndex
        With the crc of the trailer, if there is one; the caller compares it with the crc of ``[0, body_nbytes)``.

    Raises
    ------
    FormatError
        With ``path``, ``byte_offset`` and ``field``.
    """
    wire = WireReader(reader)
    body_nbytes, crc = _trailer(wire, reader.nbytes)
    entries: dict[str, IndexedEntry] = {}
    positions: dict[str, int] = {}
    run: list[ValueMessage] = []  # neighbours of one tag: slices of one entry
    at = 0
    # A trailer may also be the end of a tensor that happens to look like one. Messages say where they end, and no
    # message can begin as a trailer does, so walking there decides it.
    while at not in (body_nbytes, reader.nbytes):
        item = wire.field(at, reader.nbytes, "checkpoint")
        at = item.stop
        if item.number != CHECKPOINT_VALUE:
            continue
        value = read_value(wire, item)
        if run and run[0].tag != value.tag:
            _add(wire, entries, positions, run)
            run = []
        run.append(value)
    if run:
        _add(wire, entries, positions, run)
    return FileIndex(FORMAT, tuple(entries.values()), {}, crc if at == body_nbytes else None, at)


def _trailer(wire: WireReader, nbytes: int) -> tuple[int, int | None]:
    """Where the body ends if the last bytes are a trailer, and the crc in it."""
    body_nbytes = nbytes - TRAILER_NBYTES
    if body_nbytes >= 0:
        data = wire.read(body_nbytes, nbytes)
        if data.startswith(TRAILER_MAGIC):
            return body_nbytes, int.from_bytes(data[len(TRAILER_MAGIC) :], "big")
    return nbytes, None


def _add(
    wire: WireReader, entries: dict[str, IndexedEntry], positions: dict[str, int], run: Sequence[ValueMessage]
) -> None:
    """Add the entry that a run of slices makes. The last of a name wins, at the place of the first, as in a dict."""
    name = run[0].tag or ""
    index = positions.setdefault(name, len(positions))
    for value in run:
        if value.is_map != run[0].is_map:
            wire.refuse(value.offset, "checkpoint.value", f"{name!r} is a tensor in one slice, a map in the next")
    if run[0].is_map:
        entries[name] = _map_entry(wire, index, name, run)
    else:
        entries[name] = _tensor_entry(wire, index, name, [value.tensors[0] for value in run])


def _tensor_entry(wire: WireReader, index: int, name: str, slices: Sequence[TensorMessage]) -> IndexedEntry:
    first = slices[0]
    for other in slices:
        if other.dims != first.dims or other.type != first.type:
            wire.refuse(other.offset, first.where, f"{name!r}: dims or type differ from those of the slice before")
    extents = _extents(index, slices)
    total = sum(extent.nbytes for extent in extents)
    if first.type == TEXT_TYPE:
        text = _read_text(wire, name, first, extents, total)
        return IndexedEntry(name, "str", None, TEXT_TYPE, (), extents, text)
    dtype = _known(wire, name, first, dtypes.by_ckpt(first.type))
    shape, expected = _checked_shape(wire, name, first, dtype)
    if shape == (0,) and total == dtype.itemsize:
        shape, expected = (), total  # how older files write a 0-d tensor
    if total != expected:
        problem = f"{name!r} has {total} bytes, expected {expected} for {first.type} of shape {shape}"
        wire.refuse(first.offset, f"{first.where}.tensor_content", problem)
    return IndexedEntry(name, "tensor", dtype, first.type, shape, extents)


def _map_entry(wire: WireReader, index: int, name: str, run: Sequence[ValueMessage]) -> IndexedEntry:
    columns = zip(*(value.tensors for value in run), strict=True)
    parts = tuple(_map_part(wire, index, part, list(slices)) for part, slices in zip(MAP_PARTS, columns, strict=True))
    if len({part.shape[0] for part in parts}) != 1:
        shapes = ", ".join(f"{part.name} {part.shape}" for part in parts)
        wire.refuse(run[0].offset, "value.maptensor", f"lengths of {name!r} differ: {shapes}")
    return IndexedEntry(name, "map", None, "map", (), (), None, parts)


def _map_part(wire: WireReader, index: int, part: str, slices: Sequence[TensorMessage]) -> IndexedEntry:
    first = slices[0]
    dtype = _known(wire, part, first, _map_dtype(first.type))
    rows = 0
    for item in slices:
        shape, expected = _checked_shape(wire, part, item, dtype)
        if not shape or item.dims[1:] != first.dims[1:] or item.type != first.type:
            wire.refuse(item.offset, item.where, f"{part}: slice of shape {shape} does not continue the first one")
        if item.nbytes != expected:
            problem = f"{part} has {item.nbytes} bytes, expected {expected} for {item.type} of shape {shape}"
            wire.refuse(item.offset, f"{item.where}.tensor_content", problem)
        rows += shape[0]
    return IndexedEntry(part, "tensor", dtype, first.type, (rows, *first.dims[1:]), _extents(index, slices))


def _map_dtype(name: str) -> DType | None:
    # Maps carry NumPy's names where tensors have MindSpore's.
    try:
        return dtypes.by_name(name)
    except KeyError:
        return None


def _known(wire: WireReader, name: str, tensor: TensorMessage, dtype: DType | None) -> DType:
    if dtype is None:
        wire.refuse(tensor.offset, f"{tensor.where}.tensor_type", f"{name!r} has unknown type {tensor.type!r}")
    return dtype


def _checked_shape(wire: WireReader, name: str, tensor: TensorMessage, dtype: DType) -> tuple[tuple[int, ...], int]:
    shape = tuple(tensor.dims)
    nbytes = content_nbytes(shape, dtype.itemsize)
    if nbytes is None:
        wire.refuse(tensor.offset, f"{tensor.where}.dims", f"{name!r} has impossible shape {shape}")
    return shape, nbytes


def _extents(index: int, slices: Sequence[TensorMessage]) -> tuple[Extent, ...]:
    extents = []
    start = 0
    for item in slices:
        nbytes = item.nbytes
        if nbytes:
            extents.append(Extent(index, start, item.start, nbytes))
            start += nbytes
    return tuple(extents)


def _read_text(wire: WireReader, name: str, tensor: TensorMessage, extents: Sequence[Extent], total: int) -> str:
    where = f"{tensor.where}.tensor_content"
    if tensor.dims not in ([], [0]):
        wire.refuse(tensor.offset, f"{tensor.where}.dims", f"string {name!r} has dims {tensor.dims}, expected [0]")
    if total == 0 or total % 4 or total > MAX_TEXT_NBYTES:
        problem = f"string {name!r} has {total} bytes, expected a multiple of 4 from 4 to {MAX_TEXT_NBYTES}"
        wire.refuse(tensor.offset, where, problem)
    data = b"".join(wire.read(extent.byte_offset, extent.byte_offset + extent.nbytes) for extent in extents)
    if data == bytes(4):
        return ""
    try:
        return data.decode("utf-32-le", "surrogatepass")
    except UnicodeDecodeError as error:
        wire.refuse(tensor.offset, where, f"string {name!r} is not UTF-32: {error}")
