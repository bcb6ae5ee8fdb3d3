"""``parckpt convert``: the same checkpoint in another format, in one file or in several."""

from __future__ import annotations

from typing import Annotated

import typer

from parckpt.cli.failure import guarded
from parckpt.cli.options import DebugOption, JsonOption
from parckpt.cli.rewriting import (
    CrcOption,
    DestinationArgument,
    FormatOption,
    SourceArgument,
    SourceStrategyOption,
    destination,
    open_checked,
    run,
)
from parckpt.core import recut
from parckpt.errors import ConfigError
from parckpt.storage.filesystem import PosixFileSystem

__all__ = ["convert"]


@guarded
def convert(
    src: SourceArgument,
    dst: DestinationArgument,
    form: FormatOption = None,
    integrated: Annotated[
        bool | None,
        typer.Option(
            "--integrated/--per-rank",
            metavar="",
            help="One file with whole tensors, or a directory with a file for each rank. Default: as SRC, but one "
            "file if DST has an extension.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            metavar="N",
            min=1,
            help="As many files, tensors cut evenly along dimension 0.",
            show_default=False,
        ),
    ] = None,
    strategy: SourceStrategyOption = None,
    crc: CrcOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint once more, in another format or with other files.

    Tensors, plain values and the place in the run stay what they are: the new one restores like the old one. Every
    chunk is verified before any of it is used, and memory stays below 300 MiB, whatever the size.

    DST appears in one act when all of it is on disk; until then, or after an interrupt or an error, there is nothing.
    SRC is only read. A name that is taken is refused, unless by the same step of the same run.
    """
    del debug
    source = open_checked(PosixFileSystem(), src, strategy)
    several = "/" in source.contents.files[0].path
    if ranks is not None and integrated:
        raise ConfigError("--ranks asks for several files, --integrated for one: leave one of them out")
    has_extension = dst.endswith((".ckpt", ".safetensors"))
    one = integrated if integrated is not None else ranks is None and (has_extension or not several)
    if not one and ranks is None and not several:
        raise ConfigError("SRC is one file: say with --ranks how many to make of it")
    named = destination(source, dst, form, integrated=one)
    cut = None if one else recut.as_stored(source.contents) if ranks is None else recut.even(source.contents, ranks)
    # Of rank files without a manifest each box is taken from one of them.
    once = cut is not None and (ranks is not None or source.is_foreign or source.facts.remove_redundancy)
    run(source, named, cut, once=once, crc=crc, as_json=as_json, what="converting")
