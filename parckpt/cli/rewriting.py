"""What convert, merge, split and copy share: reading SRC, naming DST, running with a bar, saying what was done."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import typer

from parckpt.cli.options import absolute
from parckpt.cli.output import count, emit, line, progress_bar, size
from parckpt.comm.launch import SELF, resolve
from parckpt.comm.wait import AGREE_TIMEOUT_S, Waiter
from parckpt.core import naming, recut
from parckpt.core.strategy import Strategy
from parckpt.engine import parts
from parckpt.engine.catalog import find_at
from parckpt.engine.copying import Original, open_original
from parckpt.engine.foreign import index_file
from parckpt.engine.group import Group
from parckpt.engine.pins import is_pinned
from parckpt.engine.recast import Target, read_nbytes, rewrite
from parckpt.engine.source import Source, open_source
from parckpt.engine.staging import Modes
from parckpt.errors import ConfigError, LayoutError
from parckpt.formats.base import Format
from parckpt.formats.registry import FORMATS
from parckpt.storage.filesystem import FileSystem, try_stat
from parckpt.strategies import load_strategy

__all__ = [
    "CrcOption",
    "DestinationArgument",
    "FormatOption",
    "Named",
    "SourceArgument",
    "SourceStrategyOption",
    "alone",
    "destination",
    "modes_of",
    "open_checked",
    "run",
    "tell",
]


SourceArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="Step directory, data file, or a directory of `rank_<n>` directories; MindSpore's too.",
        show_default=False,
    ),
]
DestinationArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="DST",
        help="Its new name. If it is a directory already, or ends with a slash: in there, under the name of SRC.",
        show_default=False,
    ),
]
FormatOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="F",
        help="ckpt or safetensors. Default: by the extension of DST, else as SRC.",
        show_default=False,
    ),
]
CrcOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--crc", metavar="", help="Add MindSpore's own checksum to each file, for load_checkpoint(crc_check=True)."
    ),
]
SourceStrategyOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        metavar="FILE",
        help="MindSpore strategy file that says how the rank files of SRC are cut; not for what parckpt wrote.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Named:
    """Where the new checkpoint goes."""

    directory: str
    stem: str
    form: Format


def open_checked(fs: FileSystem, path: str, strategy_file: str | None) -> Source:
    """Open SRC; what has no manifest is read once before, as far as it carries a checksum.

    Raises
    ------
    LayoutError
        Files hold slices, and there is no strategy.
    ConfigError
        It holds what cannot be rewritten, or is one file of a step directory.
    """
    place = absolute(path)
    strategy: Strategy | None = None
    if strategy_file is not None:
        strategy = load_strategy(absolute(strategy_file), filesystem=fs)
    _refuse_part(fs, place)
    try:
        source = open_source(fs, place, check=True, strategy=strategy)
    except LayoutError as error:
        if strategy is not None:
            raise
        raise LayoutError(f"{error.message}: say how with --strategy FILE", **error.facts) from error
    if source.is_foreign:
        _refuse_maps(source)
    return source


def _refuse_part(fs: FileSystem, path: str) -> None:
    """One rank's file of a step directory would become a checkpoint of slices that looks whole."""
    part = parts.find(fs, path)
    if part is not None and part.is_partial:
        raise ConfigError(
            f"{path} has only what rank {part.rank} wrote of a checkpoint: give the whole of it, {part.root}", path=path
        )


def _refuse_maps(source: Source) -> None:
    for file in source.contents.files:
        path = os.path.join(source.root, file.path)
        index, _ = index_file(source.fs, path)
        for item in index.entries:
            if item.kind == "map":
                raise ConfigError(
                    f"{path} holds the map parameter {item.name!r}, which would be lost: only MindSpore can rewrite it",
                    path=path,
                    tensor=item.name,
                )


def destination(source: Source, dst: str, form: str | None, *, integrated: bool) -> Named:
    """Where DST is: directory and name without extension, and the format.

    Raises
    ------
    ConfigError
        The name, the format and the number of files do not fit together.
    """
    path = absolute(dst)
    if form is not None and form not in FORMATS:
        raise ConfigError(f"--format must be {' or '.join(FORMATS)}, not {form!r}", parameter="format")
    stat = try_stat(source.fs, path)
    is_place = dst.endswith("/") or (stat is not None and stat.is_dir and not _is_step(source.fs, path, integrated))
    name = source.facts.stem if is_place else os.path.basename(path)
    told = None if is_place else next((k for k, one in FORMATS.items() if name.endswith(one.extension)), None)
    if told is not None and not integrated:
        raise ConfigError(
            f"{dst} is the name of one file, and there will be a directory with a file for each rank: "
            f"leave {FORMATS[told].extension} out, or ask for one file",
            path=dst,
        )
    if told is not None and form not in (None, told):
        raise ConfigError(f"{dst} says {told}, --format says {form}", parameter="format", path=dst)
    chosen = FORMATS[form or told or source.facts.format]
    stem = name.removesuffix(chosen.extension) if integrated else name
    try:
        naming.check_name(stem)
    except ConfigError as error:
        raise ConfigError(f"no checkpoint can be called {stem!a}: choose another name for DST", path=dst) from error
    return Named(path if is_place else os.path.dirname(path), stem, chosen)


def _is_step(fs: FileSystem, path: str, integrated: bool) -> bool:
    """Whether a directory is a checkpoint, whose name is taken, and not a place for checkpoints."""
    rank_0 = os.path.join(path, naming.rank_directory(0))
    return find_at(fs, path) is not None or (not integrated and try_stat(fs, rank_0) is not None)


def modes_of(fs: FileSystem, root: str, file: str) -> Modes:
    """Who may read the new files: whoever may read the old ones."""
    mode = fs.stat(os.path.join(root, file)).mode & 0o777
    return Modes(mode | 0o600, mode | 0o700 | (mode & 0o444) >> 2)


def alone() -> Group:
    """This process, as a group."""
    return Group(resolve(SELF, os.environ), Waiter(AGREE_TIMEOUT_S))


def run(
    source: Source, named: Named, cut: recut.Cut | None, *, once: bool, crc: bool, as_json: bool, what: str
) -> None:
    """Rewrite, with a progress bar, and say what was done."""
    fs = source.fs
    modes = modes_of(fs, source.root, source.contents.files[0].path)
    target = Target(named.directory, named.stem, named.form, cut, once, crc, modes)
    started = time.monotonic()
    with progress_bar(what, read_nbytes(source, target)) as on_bytes:
        path = rewrite(alone(), source, target, on_bytes=on_bytes)
    seconds = time.monotonic() - started
    tell(fs, open_original(fs, path), source.path, verified=_is_verified(source), seconds=seconds, as_json=as_json)


def _is_verified(source: Source) -> bool:
    """Whether every byte was compared with a checksum: the manifest's, or before with the files' own."""
    paths = [os.path.join(source.root, file.path) for file in source.contents.files]
    return not source.is_foreign or all(index_file(source.fs, path)[0].crc is not None for path in paths)


def tell(fs: FileSystem, made: Original, old: str, *, verified: bool, seconds: float, as_json: bool) -> None:
    """Say what was made."""
    found = find_at(fs, made.path)
    pinned = found is not None and is_pinned(fs, os.path.dirname(made.path), found)
    files, form = len(made.contents.files), made.facts.format
    tensors = len(made.contents.tensors) if found is not None else None
    if as_json:
        content: dict[str, Any] = {
            "source": old,
            "path": made.path,
            "step": made.facts.step if found is not None else None,
            "format": form,
            "integrated": made.facts.integrated,
            "files": files,
            "nbytes": made.nbytes,
            "tensor_count": tensors,
            "verified": verified,
            "pinned": pinned,
            "seconds": round(seconds, 3),
        }
        emit(content)
        return
    what = "" if tensors is None else f"{count(tensors, 'tensor')}, "
    is_long = made.nbytes >= 10**9 and seconds > 0  # of less, the rate is that of starting and syncing
    rate = f"; {seconds:.0f} s, {size(int(made.nbytes / seconds))}/s" if is_long else ""
    line(f"{made.path}: {what}{size(made.nbytes)} in {count(files, f'{form} file')}{rate}")
    if not verified:
        line(f"note: {old} has no checksums: damage in it would not have been noticed", "yellow")
    if pinned:
        line("note: it is pinned, or the run that saves there might delete it (parckpt pin --remove lifts that)")
