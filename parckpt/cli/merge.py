"""``parckpt merge``: one file with whole tensors from the files of all ranks."""

from __future__ import annotations

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
from parckpt.storage.filesystem import PosixFileSystem

__all__ = ["merge"]


@guarded
def merge(
    src: SourceArgument,
    dst: DestinationArgument,
    form: FormatOption = None,
    strategy: SourceStrategyOption = None,
    crc: CrcOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Put the files of all ranks together: one file, whole tensors.

    What parckpt wrote says itself how it is cut. MindSpore's `rank_<n>` directories need the strategy file of the
    training, merged over the stages if there was a pipeline, unless every file holds whole tensors.

    DST appears in one act when all of it is on disk; until then, or after an interrupt or an error, there is nothing.
    SRC is only read. A name that is taken is refused, unless by the same step of the same run.
    """
    del debug
    source = open_checked(PosixFileSystem(), src, strategy)
    named = destination(source, dst, form, integrated=True)
    run(source, named, None, once=False, crc=crc, as_json=as_json, what="merging")
