"""``parckpt copy``: the same bytes in another directory, verified on the way."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from parckpt.cli.failure import guarded
from parckpt.cli.options import DebugOption, JsonOption, absolute
from parckpt.cli.output import progress_bar
from parckpt.cli.rewriting import SourceArgument, alone, modes_of, tell
from parckpt.engine.copying import copy_checkpoint, open_original
from parckpt.storage.filesystem import PosixFileSystem

__all__ = ["copy"]


@guarded
def copy(
    src: SourceArgument,
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Directory to copy it into; made if it is missing.", show_default=False)
    ],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Copy a checkpoint into another directory, byte for byte, under its name.

    Every chunk is compared with its checksum on the way, which cp does not do: a damaged checkpoint is refused and
    named. Without a manifest only a checksum that MindSpore put into the file can be verified.

    The copy appears in one act when all of it is on disk; until then, or after an interrupt or an error, there is
    nothing. SRC is only read. A name that is taken is refused, unless by the same step of the same run.
    """
    del debug
    fs = PosixFileSystem()
    original = open_original(fs, absolute(src))
    place = absolute(directory)
    modes = modes_of(fs, original.root, original.contents.files[0].path)
    started = time.monotonic()
    with progress_bar("copying", original.nbytes) as on_bytes:
        path = copy_checkpoint(alone(), original, place, modes=modes, on_bytes=on_bytes)
    seconds = time.monotonic() - started
    tell(fs, open_original(fs, path), original.path, verified=original.has_checksums, seconds=seconds, as_json=as_json)
