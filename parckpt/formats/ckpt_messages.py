"""The messages of a ``ckpt`` file, parsed one Value at a time.

Fields come in any order. Of a singular field given twice the last counts, of a oneof the last kind; a message given
twice is merged: the rules of protocol buffers. Required fields are required here, though MindSpore's loader is laxer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parckpt.formats.entries import MAX_NAME_NBYTES, MAX_NDIM
from parckpt.formats.wire import LENGTH, VARINT

if TYPE_CHECKING:
    from parckpt.formats.wire import Field, WireReader

__all__ = ["MAP_PARTS", "TensorMessage", "ValueMessage", "read_value"]

# Field numbers of MindSpore's messages.
CHECKPOINT_VALUE = 1
VALUE_TAG, VALUE_TENSOR, VALUE_MAP = 1, 2, 3
TENSOR_DIMS, TENSOR_TYPE, TENSOR_CONTENT = 1, 2, 3
MAP_TENSOR = 1

TEXT_TYPE = "str"
MAP_PARTS = ("keys", "values", "status")
# Far above the longest type string there is.
_MAX_TYPE_NBYTES = 64


@dataclass(slots=True)
class TensorMessage:
    """One TensorProto.

    Attributes
    ----------
    offset : int
        Where it begins in the file.
    where : str
        Name of its field, for errors.
    dims : list of int
        As stored; may be negative.
    type : str
        ``tensor_type``.
    start, stop : int
        Byte offsets of its content in the file.
    """

    offset: int
    where: str
    dims: list[int] = field(default_factory=list)
    type: str = ""
    start: int = -1
    stop: int = -1

    @property
    def nbytes(self) -> int:
        """Bytes of content."""
        return self.stop - self.start


@dataclass(slots=True)
class ValueMessage:
    """One Value: a tensor or the three tensors of a map, or a slice of either."""

    offset: int
    tag: str | None = None
    is_map: bool = False
    tensors: list[TensorMessage] = field(default_factory=list)


def read_value(wire: WireReader, item: Field) -> ValueMessage:
    """Parse the Value in field `item` of a Checkpoint message.

    Raises
    ------
    FormatError
        If it does not follow the schema, or a required field is missing.
    """
    where = "checkpoint.value"
    _expect(wire, item, LENGTH, where)
    value = ValueMessage(item.start)
    at = item.start
    while at < item.stop:
        inner = wire.field(at, item.stop, where)
        if inner.number == VALUE_TAG:
            _expect(wire, inner, LENGTH, "value.tag")
            value.tag = _text(wire, inner, MAX_NAME_NBYTES, "value.tag")
        elif inner.number in (VALUE_TENSOR, VALUE_MAP):
            is_map = inner.number == VALUE_MAP
            _expect(wire, inner, LENGTH, "value.maptensor" if is_map else "value.tensor")
            if is_map != value.is_map:  # a oneof: the later kind replaces the earlier
                value.is_map, value.tensors = is_map, []
            if is_map:
                _read_map(wire, inner, value.tensors)
            else:
                # A message field given twice is merged, so the second goes on where the first stopped.
                value.tensors = value.tensors or [TensorMessage(inner.start, "value.tensor")]
                _read_tensor(wire, inner, value.tensors[0])
        at = inner.stop
    if value.tag is None:
        wire.refuse(item.start, "value.tag", "missing")
    if len(value.tensors) != (len(MAP_PARTS) if value.is_map else 1):
        where = "value.maptensor" if value.is_map else "value.tensor"
        wire.refuse(item.start, where, f"{value.tag!r} has {len(value.tensors)} tensors")
    for tensor in value.tensors:
        if not tensor.type:
            wire.refuse(tensor.offset, f"{tensor.where}.tensor_type", f"missing in {value.tag!r}")
        if tensor.start < 0:
            wire.refuse(tensor.offset, f"{tensor.where}.tensor_content", f"missing in {value.tag!r}")
    return value


def _read_map(wire: WireReader, item: Field, tensors: list[TensorMessage]) -> None:
    at = item.start
    while at < item.stop:
        inner = wire.field(at, item.stop, "value.maptensor")
        if inner.number == MAP_TENSOR:
            _expect(wire, inner, LENGTH, "maptensor.tensor")
            if len(tensors) == len(MAP_PARTS):
                wire.refuse(at, "maptensor.tensor", f"more than {len(MAP_PARTS)} tensors")
            tensors.append(TensorMessage(inner.start, "maptensor.tensor"))
            _read_tensor(wire, inner, tensors[-1])
        at = inner.stop


def _read_tensor(wire: WireReader, item: Field, tensor: TensorMessage) -> None:
    where = tensor.where
    at = item.start
    while at < item.stop:
        inner = wire.field(at, item.stop, where)
        if inner.number == TENSOR_DIMS:
            _read_dims(wire, inner, tensor)
        elif inner.number == TENSOR_TYPE:
            _expect(wire, inner, LENGTH, f"{where}.tensor_type")
            tensor.type = _text(wire, inner, _MAX_TYPE_NBYTES, f"{where}.tensor_type")
        elif inner.number == TENSOR_CONTENT:
            _expect(wire, inner, LENGTH, f"{where}.tensor_content")
            tensor.start, tensor.stop = inner.start, inner.stop
        at = inner.stop


def _read_dims(wire: WireReader, item: Field, tensor: TensorMessage) -> None:
    where = f"{tensor.where}.dims"
    if item.wire_type == VARINT:
        tensor.dims.append(_signed(item.value))
    else:
        _expect(wire, item, LENGTH, where)
        at = item.start
        while at < item.stop and len(tensor.dims) <= MAX_NDIM:
            value, at = wire.varint(at, item.stop, where)
            tensor.dims.append(_signed(value))
    if len(tensor.dims) > MAX_NDIM:
        wire.refuse(item.start, where, f"more than {MAX_NDIM} dimensions")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _expect(wire: WireReader, item: Field, wire_type: int, where: str) -> None:
    if item.wire_type != wire_type:
        wire.refuse(item.start, where, f"wire type {item.wire_type}, expected {wire_type}")


def _text(wire: WireReader, item: Field, max_nbytes: int, where: str) -> str:
    nbytes = item.stop - item.start
    if nbytes > max_nbytes:
        wire.refuse(item.start, where, f"{nbytes} bytes long, at most {max_nbytes} are taken")
    try:
        return wire.read(item.start, item.stop).decode()
    except UnicodeDecodeError as error:
        wire.refuse(item.start, where, f"not UTF-8: {error}")
