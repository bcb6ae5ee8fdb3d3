"""``parckpt split``: a file for each rank, cut evenly or by a layout."""

from __future__ import annotations

from typing import Annotated

import typer

from parckpt.cli.failure import guarded
from parckpt.cli.options import DebugOption, JsonOption, absolute
from parckpt.cli.rewriting import (
    CrcOption,
    DestinationArgument,
    FormatOption,
    SourceArgument,
    destination,
    open_checked,
    run,
)
from parckpt.core import recut
from parckpt.core.contents import Contents
from parckpt.core.layoutfile import parse_layout_file
from parckpt.core.mesh import Layout
from parckpt.errors import ConfigError
from parckpt.storage.atomic import read_file
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.strategies import load_strategy

__all__ = ["split"]

_MAX_LAYOUT_NBYTES = 64 << 20


@guarded
def split(
    src: SourceArgument,
    dst: DestinationArgument,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            metavar="N",
            min=1,
            help="Number of files. Without a layout tensors are cut evenly along dimension 0. Default: as many as the "
            "layout has ranks.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            metavar="FILE",
            help="JSON file: mesh_shape, mesh_axes, and under tensors a tensor_map for each name or pattern.",
            show_default=False,
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy", metavar="FILE", help="MindSpore strategy file that says how to cut.", show_default=False
        ),
    ] = None,
    source_strategy: Annotated[
        str | None,
        typer.Option(
            "--source-strategy",
            metavar="FILE",
            help="MindSpore strategy file that says how the rank files of SRC are cut.",
            show_default=False,
        ),
    ] = None,
    remove_redundancy: Annotated[
        bool,
        typer.Option(
            "--remove-redundancy",
            metavar="",
            help="With a layout: what several ranks hold is in the file of one of them only.",
        ),
    ] = False,
    form: FormatOption = None,
    crc: CrcOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a directory with a file for each rank, as that many ranks would have saved it.

    Rank r's file is `rank_<r>/<name>`. By a layout each rank's file holds all that the rank needs, as MindSpore's ranks
    expect when each loads its own; tensors without a layout are whole in every file. Without a layout every element
    is in one file only: enough for parckpt, which restores on any number of ranks anyway.

    DST appears in one act when all of it is on disk; until then, or after an interrupt or an error, there is nothing.
    SRC is only read. A name that is taken is refused, unless by the same step of the same run.
    """
    del debug
    if layout is not None and strategy is not None:
        raise ConfigError("--layout and --strategy both say how to cut: leave one of them out")
    fs = PosixFileSystem()
    source = open_checked(fs, src, source_strategy)
    if layout is None and strategy is None and ranks is None:
        raise ConfigError("say how to cut: --ranks N, --layout FILE or --strategy FILE")
    named = destination(source, dst, form, integrated=False)
    if layout is not None:
        cut = _by_file(fs, source.contents, layout, ranks, remove_redundancy)
    elif strategy is not None:
        cut = _by_strategy(fs, source.contents, strategy, ranks, remove_redundancy)
    else:
        cut = recut.even(source.contents, ranks or 1)
    once = remove_redundancy or (layout is None and strategy is None)
    run(source, named, cut, once=once, crc=crc, as_json=as_json, what="splitting")


def _by_file(fs: FileSystem, contents: Contents, path: str, ranks: int | None, once: bool) -> recut.Cut:
    known = parse_layout_file(read_file(fs, absolute(path), _MAX_LAYOUT_NBYTES), path)
    names = [tensor.name for tensor in contents.tensors]
    unused = known.unused(names)
    if unused:
        raise ConfigError(f"{path}: {unused[0]!r} fits no tensor of this checkpoint", path=path, tensors=unused)
    return recut.by_layout(contents, known.of(names), ranks or known.nranks, once=once)


def _by_strategy(fs: FileSystem, contents: Contents, path: str, ranks: int | None, once: bool) -> recut.Cut:
    known = load_strategy(absolute(path), filesystem=fs)
    if ranks not in (None, known.nranks):
        raise ConfigError(f"--ranks says {ranks}, but {path} is for {known.nranks} ranks: leave --ranks out", path=path)
    here = {tensor.name for tensor in contents.tensors}
    # A strategy of the training names optimizer states that a checkpoint for inference may lack.
    layouts: dict[str, tuple[Layout, ...]] = {name: known.layouts(name) for name in known.names if name in here}
    if not layouts:
        raise ConfigError(f"{path} names none of the tensors of this checkpoint", path=path)
    return recut.by_layout(contents, layouts, known.nranks, once=once, first_rank=known.ranks.start)
