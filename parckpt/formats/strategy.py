"""MindSpore's strategy files: protocol buffers, or JSON with the same fields. Bytes to model and back.

The messages, with field numbers (all fields but the repeated ones are required):

* file: 1 current_stage, 2 repeated operator, 3 repeated layout
* operator: 1 node name, 2 {1 stage, 2 repeated {1 repeated extent}}
* layout: 1 tensor name, 2 {1 mesh, 2 tensor map, 3 split shape, 4 offsets, each repeated {1 repeated number};
  5 field, 6 optimizer shard step, 7 optimizer shard size}
* group file: 1 repeated group, 2 {1 repeated rank}: the ranks whose files hold what this rank needs

A tensor map of several messages has one per dimension, with all mesh axes that cut it; else its one message has one
number per dimension. Empty messages do not count: written behind a single one they tell the first case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from parckpt.core.strategy import Operator, Strategy, TensorStrategy
from parckpt.errors import FormatError
from parckpt.formats.base import BytesReader, refuse
from parckpt.formats.wire import LENGTH, VARINT, Field, WireReader, bytes_field, varint

__all__ = ["MAX_NBYTES", "decode", "decode_group", "decode_json", "encode", "encode_group", "encode_json"]

MAX_NBYTES = 256 << 20
"""What a strategy file may have: millions of tensors."""

# As in numpy: what has more dimensions is damage.
_MAX_NDIM = 64

_Map = tuple[int | tuple[int, ...], ...]


def decode(data: bytes, path: str) -> Strategy:
    """Read a strategy file.

    Raises
    ------
    FormatError
        If it is none.
    """
    reader = _Reader(data, path)
    tensors: dict[str, TensorStrategy] = {}
    operators: list[Operator] = []
    stage: int | None = None
    for item in reader.fields(0, len(data), "strategy"):
        if item.number == 1:
            stage = reader.number(item, "current_stage") & 0xFFFFFFFF
        elif item.number == 2:
            operators.append(reader.operator(item))
        elif item.number == 3:
            name, tensor = reader.layout(item)
            tensors[name] = tensor
    if stage is None:
        refuse(path, 0, "strategy", "current_stage is missing: this is no strategy file")
    return Strategy(tensors, stage, tuple(operators))


def encode(strategy: Strategy) -> bytes:
    """Return the bytes of a strategy file, as MindSpore would write it."""
    parts = [_number(1, strategy.current_stage)]
    for operator in strategy.operators:
        dims = b"".join(bytes_field(2, _numbers(dims)) for dims in operator.strategies)
        inner = _number(1, operator.stage) + dims
        parts.append(bytes_field(2, bytes_field(1, operator.node_name.encode()) + bytes_field(2, inner)))
    for name, tensor in strategy.tensors.items():
        parts.append(bytes_field(3, bytes_field(1, name.encode()) + bytes_field(2, _layout(tensor))))
    return b"".join(parts)


def decode_group(data: bytes, path: str) -> list[int]:
    """Read the ranks of a group file.

    Raises
    ------
    FormatError
        If it is none, or lists no ranks.
    """
    reader = _Reader(data, path)
    for item in reader.fields(0, len(data), "group"):
        if item.number == 2:
            ranks = [rank & 0xFFFFFFFF for rank in reader.numbers(item, "ckpt_restore_rank_list", limit=len(data))]
            if ranks:
                return ranks
    refuse(path, 0, "group", "there is no list of ranks to restore from")


def encode_group(ranks: Sequence[int]) -> bytes:
    """Return the bytes of a group file."""
    return bytes_field(2, _numbers(ranks))


def _layout(tensor: TensorStrategy) -> bytes:
    nested = any(isinstance(entry, tuple) for entry in tensor.tensor_map)
    if nested:
        maps = [(entry if isinstance(entry, tuple) else (entry,)) or (-1,) for entry in tensor.tensor_map]
        maps += [()] if len(maps) == 1 else []
    else:
        maps = [tuple(entry for entry in tensor.tensor_map if isinstance(entry, int))]
    return b"".join(
        [
            bytes_field(1, _numbers(tensor.dev_matrix)),
            *(bytes_field(2, _numbers(entries)) for entries in maps),
            bytes_field(3, _numbers(tensor.param_split_shape)),
            bytes_field(4, _numbers(tensor.indices_offset)),
            _number(5, tensor.field),
            _number(6, tensor.opt_weight_shard_step),
            _number(7, tensor.opt_weight_shard_size),
        ]
    )


def _number(number: int, value: int) -> bytes:
    return varint(number << 3 | VARINT) + varint(value % (1 << 64))


def _numbers(values: Sequence[int]) -> bytes:
    return b"".join(_number(1, value) for value in values)


class _Reader:
    """Reads the messages of one file."""

    def __init__(self, data: bytes, path: str) -> None:
        self._data, self._path = data, path
        self._wire = WireReader(BytesReader(data, path))

    def fields(self, start: int, stop: int, where: str) -> Iterator[Field]:
        while start < stop:
            item = self._wire.field(start, stop, where)
            yield item
            start = item.stop

    def number(self, item: Field, where: str) -> int:
        if item.wire_type != VARINT:
            refuse(self._path, item.start, where, "is not a number")
        return item.value

    def signed(self, item: Field, where: str) -> int:
        value = self.number(item, where) & 0xFFFFFFFF
        return value - (1 << 32) if value >> 31 else value

    def text(self, item: Field, where: str) -> str:
        self._is_message(item, where)
        try:
            return self._data[item.start : item.stop].decode("utf-8")
        except UnicodeDecodeError:
            refuse(self._path, item.start, where, "is not UTF-8")

    def numbers(self, message: Field, where: str, *, limit: int = _MAX_NDIM) -> list[int]:
        """The numbers of a message of nothing else; 64 bits, unsigned."""
        self._is_message(message, where)
        found: list[int] = []
        for item in self.fields(message.start, message.stop, where):
            if item.number != 1:
                continue
            if item.wire_type == LENGTH:  # packed
                at = item.start
                while at < item.stop:
                    value, at = self._wire.varint(at, item.stop, where)
                    found.append(value)
            else:
                found.append(self.number(item, where))
            if len(found) > limit:
                refuse(self._path, item.start, where, f"more than {limit} numbers")
        return found

    def operator(self, message: Field) -> Operator:
        self._is_message(message, "operator")
        name: str | None = None
        stage: int | None = None
        strategies: list[tuple[int, ...]] = []
        for item in self.fields(message.start, message.stop, "operator"):
            if item.number == 1:
                name = self.text(item, "node_name")
            elif item.number == 2:
                self._is_message(item, "parallel_strategys")
                for part in self.fields(item.start, item.stop, "parallel_strategys"):
                    if part.number == 1:
                        stage = self.number(part, "stage") & 0xFFFFFFFF
                    elif part.number == 2:
                        extents = self.numbers(part, "parallel_strategy", limit=len(self._data))
                        strategies.append(tuple(extent & 0xFFFFFFFF for extent in extents))
        if name is None or stage is None:
            refuse(self._path, message.start, "operator", "a name or a stage is missing")
        return Operator(name, stage, tuple(strategies))

    def layout(self, message: Field) -> tuple[str, TensorStrategy]:
        self._is_message(message, "layout")
        name: str | None = None
        tensor: TensorStrategy | None = None
        for item in self.fields(message.start, message.stop, "layout"):
            if item.number == 1:
                name = self.text(item, "param_name")
            elif item.number == 2:
                tensor = self._tensor(item)
        if name is None or tensor is None:
            refuse(self._path, message.start, "layout", "a name or a layout is missing")
        return name, tensor

    def _tensor(self, message: Field) -> TensorStrategy:
        self._is_message(message, "parallel_layouts")
        lists: dict[int, list[list[int]]] = {1: [], 2: [], 3: [], 4: []}
        scalars: dict[int, int] = {}
        for item in self.fields(message.start, message.stop, "parallel_layouts"):
            if item.number in lists:
                lists[item.number].append(self.numbers(item, _FIELDS[item.number], limit=_limit(item.number)))
            elif item.number in (5, 6, 7):
                scalars[item.number] = self.signed(item, _FIELDS[item.number])
        missing = [_FIELDS[number] for number in _REQUIRED if not (lists.get(number) or number in scalars)]
        if missing:
            refuse(self._path, message.start, "parallel_layouts", f"{', '.join(missing)} missing")
        mesh = tuple(extent & 0xFFFFFFFF for extent in lists[1][0])
        if not all(mesh):
            refuse(self._path, message.start, "dev_matrix", f"{mesh} has an empty axis")
        maps = [[_signed(number, 32) for number in numbers] for numbers in lists[2]]
        if len(maps) > _MAX_NDIM:
            refuse(self._path, message.start, "tensor_map", f"more than {_MAX_NDIM} dimensions")
        split, offset = (
            [_signed(number, 64) for number in found[0]] if found else [] for found in (lists[3], lists[4])
        )
        if any(number < -1 for numbers in maps for number in numbers) or scalars[6] < 0 or scalars[7] < -1:
            refuse(self._path, message.start, "parallel_layouts", "a negative number that is not -1")
        return TensorStrategy(mesh, _tensor_map(maps), tuple(split), tuple(offset), scalars[5], scalars[6], scalars[7])

    def _is_message(self, item: Field, where: str) -> None:
        if item.wire_type != LENGTH:
            refuse(self._path, item.start, where, "is not a message")


_FIELDS = {
    1: "dev_matrix",
    2: "tensor_map",
    3: "param_split_shape",
    4: "indices_offset",
    5: "field",
    6: "opt_weight_shard_step",
    7: "opt_weight_shard_size",
}
_REQUIRED = (1, 2, 5, 6, 7)


def _limit(number: int) -> int:
    return _MAX_NDIM if number in (1, 2) else 1 << 20  # split shapes have one number per piece


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _tensor_map(maps: list[list[int]]) -> _Map:
    """One list with a number per dimension, or a list per dimension."""
    if len(maps) == 1:
        return tuple(maps[0])
    return tuple(numbers[0] if len(numbers) == 1 else tuple(numbers) for numbers in maps if numbers)


def decode_json(data: bytes, path: str) -> Strategy:
    """Read a strategy file in its JSON form.

    Raises
    ------
    FormatError
        If it is none.
    """
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}", path=path, byte_offset=0, field="strategy") from error
    check = _Json(path)
    top = check.mapping(content, "the file")
    layouts = check.mapping(top.get("parallel_layout_item", {}), "parallel_layout_item")
    operators = check.mapping(top.get("parallel_strategy_item", {}), "parallel_strategy_item")
    return Strategy(
        {name: check.tensor(item, name) for name, item in layouts.items()},
        check.integer(top.get("current_stage", 1), "current_stage"),
        tuple(check.operator(name, item) for name, item in operators.items()),
    )


def encode_json(strategy: Strategy) -> bytes:
    """Return the bytes of a strategy file in its JSON form."""
    content = {
        "current_stage": strategy.current_stage,
        "parallel_layout_item": {
            name: {
                "dev_matrix": list(tensor.dev_matrix),
                "field": tensor.field,
                "indices_offset": list(tensor.indices_offset),
                "opt_weight_shard_size": tensor.opt_weight_shard_size,
                "opt_weight_shard_step": tensor.opt_weight_shard_step,
                "param_split_shape": list(tensor.param_split_shape),
                "tensor_map": [list(entry) if isinstance(entry, tuple) else entry for entry in tensor.tensor_map],
            }
            for name, tensor in strategy.tensors.items()
        },
        "parallel_strategy_item": {
            operator.node_name: {
                "parallel_strategy": [list(extents) for extents in operator.strategies],
                "stage": operator.stage,
            }
            for operator in strategy.operators
        },
    }
    return json.dumps(content).encode("utf-8")


class _Json:
    """Checks of what a JSON file holds."""

    def __init__(self, path: str) -> None:
        self._path = path

    def refuse(self, where: str, expected: str, found: Any) -> FormatError:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return FormatError(
            f"{self._path}: {where} must be {expected}, not {shown}", path=self._path, byte_offset=0, field=where
        )

    def mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.refuse(where, "an object", value)
        return value

    def integer(self, value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not -(1 << 63) <= value < 1 << 63:
            raise self.refuse(where, "an integer", value)
        return value

    def sequence(self, value: Any, where: str, limit: int = _MAX_NDIM) -> list[Any]:
        if not isinstance(value, list) or len(value) > limit:
            raise self.refuse(where, f"a list of at most {limit} items", value)
        return value

    def integers(self, value: Any, where: str, limit: int = _MAX_NDIM) -> tuple[int, ...]:
        return tuple(self.integer(item, where) for item in self.sequence(value, where, limit))

    def tensor(self, value: Any, name: str) -> TensorStrategy:
        item = self.mapping(value, name)
        get: Callable[[str], Any] = item.get
        mesh = self.integers(get("dev_matrix"), f"{name}: dev_matrix")
        if any(extent < 1 for extent in mesh):
            raise self.refuse(f"{name}: dev_matrix", "a list of positive integers", list(mesh))
        entries = [
            self.integers(entry, f"{name}: tensor_map")
            if isinstance(entry, list)
            else self.integer(entry, f"{name}: tensor_map")
            for entry in self.sequence(get("tensor_map"), f"{name}: tensor_map")
        ]
        axes = [axis for entry in entries for axis in (entry if isinstance(entry, tuple) else (entry,))]
        if any(axis < -1 for axis in axes):
            raise self.refuse(f"{name}: tensor_map", "a list of numbers from -1", axes)
        scalars = [self.integer(get(_FIELDS[number]), f"{name}: {_FIELDS[number]}") for number in (5, 6, 7)]
        if scalars[1] < 0 or scalars[2] < -1:
            raise self.refuse(f"{name}: opt_weight_shard_step and opt_weight_shard_size", "0, -1 or more", scalars[1:])
        return TensorStrategy(
            mesh,
            tuple(e[0] if isinstance(e, tuple) and len(e) == 1 else e for e in entries),
            self.integers(item.get("param_split_shape", []), f"{name}: param_split_shape", 1 << 20),
            self.integers(item.get("indices_offset", []), f"{name}: indices_offset", 1 << 20),
            *scalars,
        )

    def operator(self, name: str, value: Any) -> Operator:
        item = self.mapping(value, name)
        given = self.sequence(item.get("parallel_strategy", []), f"{name}: parallel_strategy", 1 << 20)
        extents = [self.integers(entry, f"{name}: parallel_strategy", 1 << 20) for entry in given]
        return Operator(name, self.integer(item.get("stage", 0), f"{name}: stage"), tuple(extents))
