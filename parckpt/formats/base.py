"""What every format speaks: entries going in, a layout of bytes, an index coming out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Protocol
from typing import Literal as OneOf

from parckpt.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from parckpt.core.dtypes import DType

__all__ = [
    "BytesReader",
    "Entry",
    "Extent",
    "FileIndex",
    "FileLayout",
    "Format",
    "IndexedEntry",
    "Literal",
    "RangeReader",
    "refuse",
]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor, or one appended value, as it goes into a file.

    Attributes
    ----------
    name : str
        Name in the file.
    type : str
        The format's own type string.
    shape : tuple of int
        Empty for a 0-d tensor. For strings in ckpt it is ``(0,)``, as stored.
    nbytes : int
        Bytes of content, C order, little endian.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of one entry's content in a file.

    Attributes
    ----------
    entry : int
        Index of the entry: in the sequence given to ``layout()``, or in `FileIndex.entries`.
    start : int
        Byte offset within the entry's content.
    byte_offset : int
        Byte offset in the file.
    nbytes : int
        Length; never 0.
    """

    entry: int
    start: int
    byte_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes of a file that are not content: headers."""

    byte_offset: int
    data: bytes

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return len(self.data)


@dataclass(frozen=True)
class FileLayout:
    """Where each byte of a file comes from, known before any content is read.

    Attributes
    ----------
    nbytes : int
        Size of the whole file, trailer included.
    parts : tuple of Literal or Extent
        In file order, without gaps, covering ``[0, nbytes - trailer_nbytes)``.
    trailer_nbytes : int
        Bytes at the end that ``trailer(crc)`` of the format gives once the crc of all bytes before is known.
    """

    nbytes: int
    parts: tuple[Literal | Extent, ...]
    trailer_nbytes: int = 0

    @property
    def body_nbytes(self) -> int:
        """Bytes before the trailer."""
        return self.nbytes - self.trailer_nbytes

    @property
    def extents(self) -> tuple[Extent, ...]:
        """The parts that are content."""
        return tuple(part for part in self.parts if isinstance(part, Extent))


class RangeReader(Protocol):
    """Random access to the bytes of one file."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        ...

    @property
    def path(self) -> str:
        """Name for error messages."""
        ...

    def read(self, byte_offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `byte_offset`; raises if the file does not have them."""
        ...


@dataclass(frozen=True)
class BytesReader:
    """A `RangeReader` over bytes in memory."""

    data: bytes
    path: str = "<memory>"

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return len(self.data)

    def read(self, byte_offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `byte_offset`."""
        if byte_offset < 0 or nbytes < 0 or byte_offset + nbytes > len(self.data):
            refuse(self.path, byte_offset, "file", f"{nbytes} bytes wanted, the file has {len(self.data)} in all")
        return self.data[byte_offset : byte_offset + nbytes]


@dataclass(frozen=True, slots=True)
class IndexedEntry:
    """One entry found in a file.

    Attributes
    ----------
    name : str
        Name in the file; for a part of a map: ``keys``, ``values`` or ``status``.
    kind : {"tensor", "str", "map"}
        What it is. A string has `text` and no `dtype`; a map has `parts` and nothing else.
    dtype : DType or None
        Element type of a tensor.
    type : str
        The format's own type string; ``"map"`` for a map.
    shape : tuple of int
        Shape of a tensor, ``()`` otherwise.
    extents : tuple of Extent
        Where the content is, ascending by `Extent.start`; empty when there is none.
    text : str or None
        Value of a string.
    parts : tuple of IndexedEntry
        The three tensors of a map: keys, values, status.
    """

    name: str
    kind: OneOf["tensor", "str", "map"]
    dtype: DType | None
    type: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    text: str | None = None
    parts: tuple[IndexedEntry, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of content."""
        return sum(extent.nbytes for extent in self.extents) + sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class FileIndex:
    """What a file holds, read from its headers alone.

    Attributes
    ----------
    format : str
        Name of the format.
    entries : tuple of IndexedEntry
        In file order (of first appearance); names are unique.
    metadata : dict of str to str
        Metadata of the file; empty where the format has none.
    crc : int or None
        The checksum that the file carries, None if it carries none. It is not checked here. It may exceed 32 bits in
        a damaged file and then matches nothing.
    body_nbytes : int
        Bytes before the trailer.
    """

    format: str
    entries: tuple[IndexedEntry, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    crc: int | None = None
    body_nbytes: int = 0


def refuse(path: str, byte_offset: int, where: str, problem: str) -> NoReturn:
    """Raise `FormatError` for byte `byte_offset` of `path`, in the field called `where`."""
    message = f"{path}: byte {byte_offset}: {where}: {problem}"
    raise FormatError(message, path=path, byte_offset=byte_offset, field=where)


class Format(Protocol):
    """One file format, as the engine uses it; see `parckpt.formats.registry`."""

    @property
    def name(self) -> str:
        """``"ckpt"``, ``"safetensors"``."""
        ...

    @property
    def extension(self) -> str:
        """File name extension, with its dot."""
        ...

    @property
    def crc_first(self) -> bool:
        """True if ``layout`` needs the crc itself: contents must be read once before the file can be written."""
        ...

    def entry(self, name: str, dtype: DType, shape: Sequence[int]) -> Entry:
        """Entry for a tensor."""
        ...

    def value_entry(self, name: str, value: Any) -> tuple[Entry, bytes]:
        """Entry and content for an appended value."""
        ...

    def layout(self, entries: Sequence[Entry], *, metadata: Mapping[str, str], crc: int | None) -> FileLayout:
        """Layout of a file. `crc` None: the file carries none; else see `crc_first` (0 will do where it is False)."""
        ...

    def trailer(self, crc: int) -> bytes:
        """The last ``trailer_nbytes`` bytes of a file whose other bytes have this crc."""
        ...

    def read_index(self, reader: RangeReader) -> FileIndex:
        """Read a file's headers."""
        ...
