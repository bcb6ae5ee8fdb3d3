"""``parckpt diff``: what is not the same in two checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from parckpt.cli.failure import DIFFERENT, guarded
from parckpt.cli.options import DebugOption, JsonOption, absolute
from parckpt.cli.output import count, emit, facts, line, progress_bar, size, table
from parckpt.core import naming
from parckpt.core.difference import Delta, Element
from parckpt.core.strategy import Strategy
from parckpt.core.tensors import TensorRow
from parckpt.engine.comparing import Comparison, TensorDifference, ValueDifference, comparable_nbytes, compare
from parckpt.engine.source import Source, open_source
from parckpt.errors import ConfigError
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat
from parckpt.strategies import load_strategy

__all__ = ["diff"]

_KINDS = {"values": "in values", "type": "in shape or type"}
_MAX_LINES = 100  # of tensors and values for people; JSON has them all


@guarded
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A step directory or data file; MindSpore's too.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another; format and number of ranks may differ.")],
    values: Annotated[
        bool, typer.Option("--values", metavar="", help="Show the first elements that differ, of every tensor.")
    ] = False,
    headers: Annotated[
        bool, typer.Option("--headers", metavar="", help="Compare names, shapes and types only; reads no data.")
    ] = False,
    read_all: Annotated[
        bool, typer.Option("--read-all", metavar="", help="Trust no checksums: read both in full.")
    ] = False,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            metavar="FILE",
            help="MindSpore's strategy file: how `rank_<n>` directories without a manifest are cut.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Say what is not the same in two checkpoints.

    Compares names, shapes, types, every element and the plain values, whatever format, layout or number of ranks they
    were saved with. Of each tensor that differs: how many elements, the largest difference and where. Elements differ
    when their bits do.

    What lies at the same place in chunks of equal checksums is equal and not read again; so two neighbouring steps of
    one run take little time if little changed. This is no verify: what is skipped is not looked at.

    Exit status 0: no difference. 1: they differ. 5: one of them is damaged.
    """
    del debug
    if headers and (values or read_all):
        raise ConfigError(f"--headers compares no elements: leave out --{'values' if values else 'read-all'}")
    fs = PosixFileSystem()
    cut = load_strategy(absolute(strategy), filesystem=fs) if strategy is not None else None
    left, right = (_open(fs, absolute(path), cut) for path in (a, b))
    total = 0 if headers else comparable_nbytes(left, right)
    with progress_bar("comparing", total) as on_done:
        found = compare(left, right, headers_only=headers, read_all=read_all, on_done=on_done)
    if as_json:
        emit(_content(left, right, found, headers))
    else:
        _print(left, right, found, headers, values)
    return 0 if found.is_equal else DIFFERENT


def _open(fs: FileSystem, path: str, strategy: Strategy | None) -> Source:
    """A strategy is for what does not know itself how it is cut."""
    stat = try_stat(fs, path)
    is_bare = stat is not None and stat.is_dir and try_stat(fs, os.path.join(path, naming.MANIFEST)) is None
    return open_source(fs, path, strategy=strategy if is_bare else None)


# -- for programs -------------------------------------------------------------------------------------------------


def _content(a: Source, b: Source, found: Comparison, headers: bool) -> dict[str, Any]:
    return {
        "a": _source_row(a),
        "b": _source_row(b),
        "equal": found.is_equal,
        "headers_only": headers,
        "tensor_count": found.tensors,
        "tensors": [_tensor_row(one) for one in found.tensor_differences],
        "values": [_value_row(one) for one in found.value_differences],
        "not_compared": found.not_compared,
        "nbytes_read": found.nbytes_read,
        "nbytes_skipped": found.nbytes_skipped,
    }


def _source_row(source: Source) -> dict[str, Any]:
    own = source.facts
    return {
        "path": source.path,
        "has_manifest": not source.is_foreign,
        "step": None if source.is_foreign else own.step,
        "format": own.format,
        "ranks": own.world_size,
        "nbytes": sum(file.nbytes for file in source.contents.files),
        "tensor_count": len(source.contents.tensors),
    }


def _tensor_row(one: TensorDifference) -> dict[str, Any]:
    row: dict[str, Any] = {"name": one.name, "kind": one.kind, "a": _type_row(one.a), "b": _type_row(one.b)}
    if one.delta is not None and one.a is not None:
        row["elements"] = math.prod(one.a.global_shape)
        row["differing"] = one.delta.differing
        row["nonfinite"] = one.delta.nonfinite
        row["largest"] = _jsonable(one.delta.largest)
        row["largest_at"] = None if one.delta.largest_at is None else _element_row(one.delta.largest_at)
        row["examples"] = [_element_row(element) for element in one.delta.examples]
    return row


def _type_row(row: TensorRow | None) -> dict[str, Any] | None:
    return None if row is None else {"dtype": row.dtype.name, "shape": list(row.global_shape)}


def _element_row(element: Element) -> dict[str, Any]:
    return {"index": list(element.index), "a": _jsonable(element.a), "b": _jsonable(element.b)}


def _value_row(one: ValueDifference) -> dict[str, Any]:
    sides = {"a": repr(one.a) if one.in_a else None, "b": repr(one.b) if one.in_b else None}
    return {"kind": one.group, "name": one.name, **sides}


def _jsonable(value: Any) -> Any:
    """JSON has no NaN, no infinity and no complex numbers: those are text."""
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


# -- for people ---------------------------------------------------------------------------------------------------


def _print(a: Source, b: Source, found: Comparison, headers: bool, values: bool) -> None:
    facts([("A", _source_text(a)), ("B", _source_text(b))])
    rows = list(_rows(found, values))
    if rows:
        line("")
        table(("name", "", "difference"), [(row.name, row.mark, row.text) for row in rows[:_MAX_LINES]])
    if len(rows) > _MAX_LINES:
        line(f"and {len(rows) - _MAX_LINES} more lines (--json has all)")
    line("")
    for sentence in found.not_compared:
        line(f"not compared: {sentence}", "yellow")
    _print_summary(found, headers)


def _source_text(source: Source) -> str:
    own = source.facts
    step = "no manifest" if source.is_foreign else f"step {own.step}"
    nbytes = sum(file.nbytes for file in source.contents.files)
    kinds = f"{own.format}, {count(own.world_size, 'rank')}" if not source.is_foreign else own.format
    return f"{source.path}  ({step}, {kinds}, {count(len(source.contents.tensors), 'tensor')}, {size(nbytes)})"


@dataclass(frozen=True)
class _Row:
    name: str
    mark: str
    text: str


def _rows(found: Comparison, values: bool) -> Iterator[_Row]:
    for one in found.tensor_differences:
        yield _Row(one.name, *_difference_text(one))
        if values and one.delta is not None:
            for element in one.delta.examples:
                yield _Row("", "", f"  {_index_text(element)}: {_pair_text(element)}")
    for value in found.value_differences:
        in_a, in_b = (repr(value.a) if value.in_a else "not there"), (repr(value.b) if value.in_b else "not there")
        yield _Row(value.name, value.group, f"A {in_a}, B {in_b}")


def _difference_text(one: TensorDifference) -> tuple[str, str]:
    a, b = one.a, one.b
    if a is None or b is None:
        there = a if a is not None else b
        assert there is not None
        return one.kind, _type_text(there)
    if one.delta is None:
        return "type", f"A {_type_text(a)}, B {_type_text(b)}"
    return "values", _delta_text(one.delta, math.prod(a.global_shape))


def _type_text(row: TensorRow) -> str:
    return f"{row.dtype.name} {'x'.join(map(str, row.global_shape)) or 'scalar'}"


def _delta_text(delta: Delta, elements: int) -> str:
    share = f"{delta.differing} of {count(elements, 'element')}"
    if delta.differing == elements and elements > 1:
        share = f"all {elements} elements"
    parts = [f"{share} {'differs' if elements == 1 else 'differ'}"]
    if delta.largest_at is not None:
        most = f"{delta.largest:.6g}" if isinstance(delta.largest, float) else str(delta.largest)
        parts.append(f"largest difference {most} at {_index_text(delta.largest_at)} ({_pair_text(delta.largest_at)})")
    if delta.nonfinite:
        parts.append(f"{delta.nonfinite} with NaN or infinity")
    return ", ".join(parts)


def _index_text(element: Element) -> str:
    return f"[{', '.join(map(str, element.index))}]"


def _pair_text(element: Element) -> str:
    return f"A {element.a!r}, B {element.b!r}"


def _print_summary(found: Comparison, headers: bool) -> None:
    what = " in names, shapes and types" if headers else ""
    kinds = [one.kind for one in found.tensor_differences]
    counts = ", ".join(f"{kinds.count(kind)} {_KINDS.get(kind, kind)}" for kind in dict.fromkeys(kinds))
    tensors = f"{len(kinds)} of {count(found.tensors, 'tensor')}" + (f" ({counts})" if counts else "")
    read = f"; read {size(found.nbytes_read)}" if not headers else "; read no data"
    if found.nbytes_skipped:
        read += f", {size(found.nbytes_skipped)} of tensors known to be equal by checksums"
    if found.is_equal:
        line(f"no difference{what} ({count(found.tensors, 'tensor')}){read}", "green")
    else:
        line(f"they differ: {tensors}, {count(len(found.value_differences), 'plain value')}{read}", "bold")
