"""``parckpt plan``: what saving a state would come to, before there is a job."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
import typer

from parckpt.cli.failure import guarded
from parckpt.cli.options import DebugOption, JsonOption, absolute
from parckpt.cli.output import count, emit, line, progress_bar, size, table
from parckpt.comm.wait import SystemClock
from parckpt.core.layout import Box
from parckpt.core.outline import Outline
from parckpt.core.outlinefile import parse_outline
from parckpt.core.tensors import TensorRow
from parckpt.engine.measuring import MEASURE_NBYTES, measure_rate
from parckpt.engine.outlook import WAYS, Outlook, Speed, look_ahead
from parckpt.engine.source import Source, open_source
from parckpt.errors import ConfigError, FormatError, ParckptError
from parckpt.storage.atomic import read_file
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.strategies import load_strategy

__all__ = ["plan"]

_MAX_LINES = 64  # of nodes, ranks or boxes for people; JSON has them all
_MAX_DESCRIPTION_NBYTES = 64 << 20
_GB = 1_000_000_000


@guarded
def plan(
    state: Annotated[
        str,
        typer.Argument(
            metavar="STATE",
            help="A checkpoint, or a .json file that describes tensors (- reads one from standard input).",
            show_default=False,
        ),
    ],
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", metavar="N", min=1, help="Ranks of the job; else as STATE says.", show_default=False),
    ] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(
            "--ranks-per-node", metavar="K", min=1, help="Ranks on each node; else all are on one.", show_default=False
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy", metavar="FILE", help="MindSpore's strategy file: how tensors are cut.", show_default=False
        ),
    ] = None,
    sharded: Annotated[
        bool,
        typer.Option("--sharded", metavar="", help="Cut every tensor along its first dimension over all ranks."),
    ] = False,
    integrated: Annotated[
        bool, typer.Option("--integrated", metavar="", help="Details of one integrated file.")
    ] = False,
    per_rank: Annotated[
        bool, typer.Option("--per-rank", metavar="", help="Details of a file per rank with all that it holds.")
    ] = False,
    remove_redundancy: Annotated[
        bool,
        typer.Option("--remove-redundancy", metavar="", help="Details of every replica stored once (the default)."),
    ] = False,
    ownership: Annotated[
        Literal["parckpt", "mindspore"],
        typer.Option("--ownership", help="Whose rule says which replica is stored."),
    ] = "parckpt",
    boxes: Annotated[bool, typer.Option("--boxes", metavar="", help="List every box that every rank writes.")] = False,
    rate: Annotated[
        float | None, typer.Option("--rate", metavar="GB/s", help="What one node writes.", show_default=False)
    ] = None,
    total_rate: Annotated[
        float | None,
        typer.Option("--total-rate", metavar="GB/s", help="What all nodes write together.", show_default=False),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            "--measure", metavar="DIR", help="Find out --rate by writing 0.5 GB to DIR now.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what saving a state would come to: who writes what, bytes per rank and node, seconds.

    Compares the ways to save (integrated, per rank, without redundancy), then shows one of them node by node and rank
    by rank, as a job with these ranks would plan it. No job is needed, and no data is read.

    A checkpoint that was saved per rank is planned as its files lie. Otherwise it says nothing of layouts: every
    tensor is taken to be whole on every rank (data parallel), unless --strategy or --sharded says how it is cut. In a
    description, tensor_map says so (docs/cli.md has an example).

    Seconds are those of writing, at --rate or as measured; without either they are not known.
    """
    del debug
    fs = PosixFileSystem()
    chosen = _chosen(integrated, per_rank, remove_redundancy)
    _check_rates(rate, total_rate, measure)
    if strategy is not None and sharded:
        raise ConfigError("--strategy and --sharded exclude each other: leave one of them out")
    outline = _outline(fs, state, ranks, strategy, sharded)
    nranks = ranks if ranks is not None else outline.job_nranks
    each = min(ranks_per_node or nranks, nranks)
    described = outline.describe(nranks)
    looks = [look_ahead(*described, each, way, ownership=ownership) for way in WAYS]
    if rate is None and measure is not None:
        rate = _measure(fs, absolute(measure))
    speed = Speed(rate * _GB if rate else None, total_rate * _GB if total_rate else None)
    basis = _basis(speed, measure)
    result = _Result(state, outline, nranks, each, looks, looks[chosen], speed, basis)
    if as_json:
        emit(_content(result, boxes))
    else:
        _print(result, boxes)


@dataclass(frozen=True)
class _Result:
    state: str
    outline: Outline
    nranks: int
    ranks_per_node: int
    looks: Sequence[Outlook]
    chosen: Outlook
    speed: Speed
    basis: str

    @property
    def nnodes(self) -> int:
        return -(-self.nranks // self.ranks_per_node)

    def seconds(self, look: Outlook) -> float | None:
        return self.speed.seconds(look.fullest_node, look.nbytes)


def _chosen(integrated: bool, per_rank: bool, remove_redundancy: bool) -> int:
    if integrated + per_rank + remove_redundancy > 1:
        raise ConfigError("--integrated, --per-rank and --remove-redundancy exclude each other: leave one")
    return 0 if integrated else 1 if per_rank else 2


def _check_rates(rate: float | None, total_rate: float | None, measure: str | None) -> None:
    for name, value in (("--rate", rate), ("--total-rate", total_rate)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be a positive number of GB/s, not {value:g}")
    if rate is not None and measure is not None:
        raise ConfigError("--rate and --measure exclude each other: leave one of them out")


def _outline(fs: FileSystem, state: str, ranks: int | None, strategy: str | None, sharded: bool) -> Outline:
    if state == "-" or state.endswith(".json"):
        data = sys.stdin.buffer.read(_MAX_DESCRIPTION_NBYTES) if state == "-" else _read(fs, state)
        outline = parse_outline(data, "standard input" if state == "-" else state)
    else:
        source = _open(fs, absolute(state))
        facts = source.facts
        as_cut = not facts.integrated and ranks in (None, facts.world_size) and strategy is None and not sharded
        outline = Outline.of_contents(source.contents, as_stored=as_cut)
    if strategy is not None:
        return outline.with_strategy(load_strategy(absolute(strategy), filesystem=fs))
    return outline.cut_evenly(ranks or outline.job_nranks) if sharded else outline


def _open(fs: FileSystem, path: str) -> Source:
    try:
        return open_source(fs, path)
    except FormatError as error:
        try:
            load_strategy(path, filesystem=fs)
        except ParckptError:
            raise error from None
        said = f"{path} is a strategy file, which has no shapes: give a checkpoint or a description, and this one to"
        raise ConfigError(f"{said} --strategy") from error


def _read(fs: FileSystem, path: str) -> bytes:
    return read_file(fs, absolute(path), _MAX_DESCRIPTION_NBYTES)


def _measure(fs: FileSystem, directory: str) -> float:
    with progress_bar("measuring", MEASURE_NBYTES) as on_written:
        return measure_rate(fs, directory, SystemClock(), MEASURE_NBYTES, on_written).per_second / _GB


def _basis(speed: Speed, measure: str | None) -> str:
    if speed.node is None and speed.total is None:
        return "seconds are not known: --rate or --measure says how fast a node writes"
    parts = []
    if speed.node is not None:
        how = f"measured in {measure} by one process on this machine" if measure is not None else "as given by --rate"
        parts.append(f"{size(round(speed.node))}/s a node, {how}")
    if speed.total is not None:
        parts.append(f"{size(round(speed.total))}/s together, as given by --total-rate")
    return f"seconds are those of writing, at {' and '.join(parts)}"


# -- for programs -------------------------------------------------------------------------------------------------


def _content(result: _Result, boxes: bool) -> dict[str, Any]:
    chosen = result.chosen
    counts = np.diff(chosen.plan.row_start).tolist()
    content: dict[str, Any] = {
        "state": result.state,
        "tensor_count": len(result.outline.tensors),
        "nbytes": result.outline.nbytes,
        "held_nbytes": result.looks[1].nbytes,
        "ranks": result.nranks,
        "ranks_per_node": result.ranks_per_node,
        "nodes": result.nnodes,
        "ways": [_way_row(result, look) for look in result.looks],
        "chosen": chosen.way.name,
        "seconds_rest_on": result.basis,
        "node_rate": result.speed.node,
        "total_rate": result.speed.total,
        "by_node": [
            {"node": node, "ranks": list(_ranks_of(result, node)), "nbytes": nbytes}
            for node, nbytes in enumerate(chosen.written_by_node.tolist())
        ],
        "by_rank": [
            {"rank": rank, "node": rank // result.ranks_per_node, "nbytes": nbytes, "boxes": counts[rank]}
            for rank, nbytes in enumerate(chosen.rank_nbytes.tolist())
        ],
    }
    if boxes:
        content["boxes"] = [
            {
                "rank": rank,
                "tensor": row.file_name,
                "offsets": list(box.offsets),
                "shape": list(box.shape),
                "nbytes": _nbytes(row, box),
            }
            for rank, row, box in _boxes(chosen)
        ]
    return content


def _way_row(result: _Result, look: Outlook) -> dict[str, Any]:
    return {
        "name": look.way.name,
        "options": look.way.options,
        "files": look.nfiles,
        "nbytes": look.nbytes,
        "fullest_rank_nbytes": look.fullest_rank,
        "fullest_node_nbytes": look.fullest_node,
        "seconds": result.seconds(look),
    }


def _ranks_of(result: _Result, node: int) -> tuple[int, int]:
    """First and last rank of a node."""
    first = node * result.ranks_per_node
    return first, min(first + result.ranks_per_node, result.nranks) - 1


def _boxes(look: Outlook) -> Iterator[tuple[int, TensorRow, Box]]:
    for rank in range(look.plan.world_size):
        for tensor, box in look.plan.boxes_of(rank):
            yield rank, look.plan.tensors[tensor], box


def _nbytes(row: TensorRow, box: Box) -> int:
    return box.size * row.dtype.itemsize


# -- for people ---------------------------------------------------------------------------------------------------


def _print(result: _Result, boxes: bool) -> None:
    nodes = f"{count(result.nranks, 'rank')} on {count(result.nnodes, 'node')}"
    line(f"{count(len(result.outline.tensors), 'tensor')}, {size(result.outline.nbytes)}; {nodes}")
    line("")
    _print_ways(result)
    line("")
    chosen = result.chosen
    line(f"{chosen.way.name} ({chosen.way.options})", "bold")
    if chosen.way.integrated:
        line("rank 0 writes the file; the others send their part to it")
    else:
        _print_nodes(result)
    _print_ranks(result)
    if boxes:
        _print_boxes(chosen)


def _print_ways(result: _Result) -> None:
    rows = []
    for look in result.looks:
        seconds = result.seconds(look)
        cells = (size(look.nbytes), size(look.fullest_rank), size(look.fullest_node))
        rows.append((look.way.name, str(look.nfiles), *cells, _seconds_text(seconds)))
    heads = ("way to save", "files", "written", "fullest rank", "fullest node", "seconds")
    table(heads, rows, right=heads[1:])
    line(result.basis)


def _seconds_text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}" if seconds >= 0.05 else "< 0.1"


def _print_nodes(result: _Result) -> None:
    rows = [
        (str(node), "{}-{}".format(*_ranks_of(result, node)), size(nbytes))
        for node, nbytes in enumerate(result.chosen.written_by_node.tolist())
    ]
    if len(rows) > 1:
        line("")
        table(("node", "ranks", "writes"), rows[:_MAX_LINES], right=("node", "ranks", "writes"))
        _print_rest(rows, "node")


def _print_ranks(result: _Result) -> None:
    chosen = result.chosen
    verb = "sends" if chosen.way.integrated else "writes"
    rows = []
    for rank, nbytes in enumerate(chosen.rank_nbytes.tolist()[:_MAX_LINES]):
        own = chosen.plan.boxes_of(rank)
        rows.append((str(rank), str(rank // result.ranks_per_node), size(nbytes), str(len(own)), _largest(chosen, own)))
    line("")
    heads = ("rank", "node", verb, "boxes", "the largest")
    table(heads, rows, right=heads[:4])
    _print_rest(chosen.rank_nbytes.tolist(), "rank")


def _largest(look: Outlook, own: Sequence[tuple[int, Box]]) -> str:
    if not own:
        return "-"
    itemsize = look.plan.tensors.itemsize
    tensor, box = max(own, key=lambda one: one[1].size * int(itemsize[one[0]]))
    row = look.plan.tensors[tensor]
    return f"{row.file_name} {_box_text(box, row.global_shape)}"


def _box_text(box: Box, shape: Sequence[int]) -> str:
    """As a slice: ``[0:512, :]``; a whole tensor by its shape."""
    if box.shape == tuple(shape):
        return "x".join(map(str, shape)) or "scalar"
    parts = [
        ":" if length == extent else f"{first}:{first + length}"
        for first, length, extent in zip(box.offsets, box.shape, shape, strict=True)
    ]
    return f"[{', '.join(parts)}]"


def _print_boxes(look: Outlook) -> None:
    rows = [
        (str(rank), row.file_name, _box_text(box, row.global_shape), size(_nbytes(row, box)))
        for rank, row, box in islice(_boxes(look), _MAX_LINES)
    ]
    line("")
    table(("rank", "tensor", "box", "size"), rows, right=("rank", "size"))
    _print_rest(range(len(look.plan.row_piece)), "box")


def _print_rest(rows: Sequence[Any], noun: str) -> None:
    if len(rows) > _MAX_LINES:
        line(f"and {len(rows) - _MAX_LINES} more (--json has every {noun})")
