"""Protocol buffer wire format: varints and fields, written to bytes and read by small pieces of a file.

Only what a ckpt needs, and of that everything the wire format allows: unknown fields and groups are stepped over,
varints may be longer than necessary. Contents are never read, only stepped over by offset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

from parckpt.formats.base import refuse

if TYPE_CHECKING:
    from parckpt.formats.base import RangeReader

__all__ = ["FIXED32", "FIXED64", "LENGTH", "VARINT", "Field", "WireReader", "bytes_field", "length_key", "varint"]

VARINT, FIXED64, LENGTH, _START_GROUP, _END_GROUP, FIXED32 = range(6)

_MAX_VARINT_NBYTES = 10
# Depth at which the protobuf runtimes give up too; nothing we know has groups at all.
_MAX_GROUP_DEPTH = 100
# Headers are read in pieces: this many bytes after a jump over content, doubled while no jump is longer than a piece.
_FIRST_PIECE_NBYTES = 512
_LAST_PIECE_NBYTES = 64 << 10


def varint(value: int) -> bytes:
    """Encode a number in ``[0, 2**64)``."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def length_key(number: int, nbytes: int) -> bytes:
    """What stands before the `nbytes` bytes of length-delimited field `number`."""
    return varint(number << 3 | LENGTH) + varint(nbytes)


def bytes_field(number: int, data: bytes) -> bytes:
    """A whole length-delimited field."""
    return length_key(number, len(data)) + data


class Field(NamedTuple):
    """One field of a message.

    Attributes
    ----------
    number, wire_type : int
        As on the wire.
    start, stop : int
        Byte offsets in the file of its value, without key and length.
    value : int
        Of a varint; 0 for the other types.
    """

    number: int
    wire_type: int
    start: int
    stop: int
    value: int


class WireReader:
    """Reads fields of a file through a small window.

    Parameters
    ----------
    reader : RangeReader
        The file. Everything refused is a `FormatError` with its path.
    """

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self._nbytes = reader.nbytes
        self._window = b""
        self._start = 0
        self._piece_nbytes = _FIRST_PIECE_NBYTES

    def refuse(self, byte_offset: int, where: str, problem: str) -> NoReturn:
        """Raise `FormatError`."""
        refuse(self._reader.path, byte_offset, where, problem)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)`` of the file; the caller has bounded the length."""
        if not (self._start <= start and stop <= self._start + len(self._window)):
            if stop - start > _FIRST_PIECE_NBYTES:
                return self._reader.read(start, stop - start)
            self._move(start)
        return self._window[start - self._start : stop - self._start]

    def varint(self, offset: int, stop: int, where: str) -> tuple[int, int]:
        """Value of the varint at `offset`, which must end by `stop`, and the offset behind it."""
        at = offset - self._start
        if not 0 <= at <= len(self._window) - _MAX_VARINT_NBYTES:
            self._move(offset)
            at = 0
        window = self._window
        limit = min(len(window), at + _MAX_VARINT_NBYTES, stop - self._start)
        value = shift = 0
        for index in range(at, limit):
            byte = window[index]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 1 << 64:
                    self.refuse(offset, where, "varint has more than 64 bits")
                return value, self._start + index + 1
            shift += 7
        if limit == at + _MAX_VARINT_NBYTES:
            self.refuse(offset, where, "varint has more than 10 bytes")
        self.refuse(offset, where, "ends inside a varint")

    def field(self, offset: int, stop: int, message: str) -> Field:
        """The field at `offset` of a message that ends at `stop`. Its value ends by `stop` too."""
        key, start = self.varint(offset, stop, message)
        number, wire_type = key >> 3, key & 7
        if number == 0 or key >= 1 << 32:
            self.refuse(offset, message, f"illegal field number {number}")
        if wire_type == VARINT:
            value, end = self.varint(start, stop, message)
            return Field(number, wire_type, start, end, value)
        if wire_type == LENGTH:
            nbytes, start = self.varint(start, stop, message)
        elif wire_type in (FIXED32, FIXED64):
            nbytes = 4 if wire_type == FIXED32 else 8
        elif wire_type == _START_GROUP:
            return Field(number, wire_type, start, self._end_of_group(offset, stop, message), 0)
        else:
            self.refuse(offset, message, f"illegal wire type {wire_type}")
        if nbytes > stop - start:
            self.refuse(offset, message, f"field {number} has {nbytes} bytes where {stop - start} are left")
        return Field(number, wire_type, start, start + nbytes, 0)

    def _end_of_group(self, offset: int, stop: int, message: str) -> int:
        open_groups: list[int] = []
        at = offset
        while True:
            key, behind = self.varint(at, stop, message)
            number, wire_type = key >> 3, key & 7
            if wire_type == _START_GROUP and number and len(open_groups) < _MAX_GROUP_DEPTH:
                open_groups.append(number)
            elif wire_type == _END_GROUP and number == open_groups[-1]:
                open_groups.pop()
            elif wire_type in (_START_GROUP, _END_GROUP):
                self.refuse(at, message, "groups do not nest")
            else:
                behind = self.field(at, stop, message).stop
            at = behind
            if not open_groups:
                return at

    def _move(self, start: int) -> None:
        behind = self._start + len(self._window)
        if self._window and self._start <= start <= behind + self._piece_nbytes:
            self._piece_nbytes = min(2 * self._piece_nbytes, _LAST_PIECE_NBYTES)
        else:
            self._piece_nbytes = _FIRST_PIECE_NBYTES
        self._window = self._reader.read(start, min(self._piece_nbytes, self._nbytes - start))
        self._start = start
