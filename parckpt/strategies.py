"""MindSpore's strategy files: read, write, merge those of pipeline stages, and find the ranks that hold the same.

Nothing here is collective.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence

from parckpt.core.checks import text
from parckpt.core.netrules import GRADIENT_SUMS
from parckpt.core.redundancy import mindspore_groups
from parckpt.core.strategy import Strategy
from parckpt.errors import ConfigError, ConfigTypeError, FormatError
from parckpt.formats import strategy as form
from parckpt.storage.atomic import read_file, replace_file
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat

__all__ = [
    "as_strategy",
    "get_ckpt_path_with_strategy",
    "load_strategy",
    "merge_pipeline_strategys",
    "name_of",
    "restore_group_info_list",
    "save_strategy",
]

_NOT_OF_THE_MODEL = (GRADIENT_SUMS, "inputs")


def load_strategy(path: str | os.PathLike[str], *, filesystem: FileSystem | None = None) -> Strategy:
    """Read a strategy file: JSON if its name ends in ``.json``, else protocol buffers.

    Raises
    ------
    ConfigError
        If there is no such file.
    FormatError
        If it is empty or no strategy file.
    """
    name = _path("path", path)
    data = _read(filesystem, name)
    return form.decode_json(data, name) if name.endswith(".json") else form.decode(data, name)


def save_strategy(
    strategy: Strategy, path: str | os.PathLike[str], *, filesystem: FileSystem | None = None, file_mode: int = 0o600
) -> None:
    """Write a strategy file, in the form that its name asks for, in place of what is there; a crash leaves either."""
    if not isinstance(strategy, Strategy):
        raise ConfigTypeError(f"strategy must be a Strategy, not {type(strategy).__name__}", parameter="strategy")
    name = _path("path", path)
    data = form.encode_json(strategy) if name.endswith(".json") else form.encode(strategy)
    replace_file(filesystem or PosixFileSystem(), name, data, file_mode)


def as_strategy(given: Strategy | str | os.PathLike[str] | None, fs: FileSystem) -> Strategy | None:
    """Return what a ``strategy=`` argument means: the strategy itself, or the file that holds it."""
    if given is None or isinstance(given, Strategy):
        return given
    return load_strategy(os.path.abspath(_path("strategy", given)), filesystem=fs)


def name_of(given: Strategy | str | os.PathLike[str] | None) -> str | None:
    """Return what tells one ``strategy=`` argument from another: ranks compare it."""
    if isinstance(given, Strategy):
        return f"<Strategy {hashlib.sha256(form.encode(given)).hexdigest()[:16]}>"
    return None if given is None else str(given)


def merge_pipeline_strategys(
    src_strategy_dirs: str | os.PathLike[str],
    dst_strategy_file: str | os.PathLike[str],
    *,
    filesystem: FileSystem | None = None,
) -> None:
    """Merge the strategy files of pipeline stages into one, in which each name begins with its stage.

    Parameters
    ----------
    src_strategy_dirs : str
        Directory with a file per stage, or per rank: of several files of one stage the first counts. All ``*.ckpt``,
        or all ``*.json``.
    dst_strategy_file : str
        JSON if its name ends in ``.json``.

    Raises
    ------
    ConfigError
        If the directory is not there or holds no files, or two files of one stage differ.
    FormatError
        If a file is none of a stage.
    """
    fs = filesystem or PosixFileSystem()
    directory = _path("src_strategy_dirs", src_strategy_dirs)
    target = _path("dst_strategy_file", dst_strategy_file)
    stat = try_stat(fs, directory)
    if stat is None or not stat.is_dir:
        raise ConfigError(f"there is no directory {directory}", parameter="src_strategy_dirs")
    stages: dict[int, tuple[str, Strategy]] = {}
    for path in _candidates(fs, directory, target):
        strategy = load_strategy(path, filesystem=fs)
        if not strategy.operators or not strategy.tensors:
            raise FormatError(f"{path} names no operators or no tensors", path=path, byte_offset=0, field="strategy")
        known = stages.setdefault(strategy.stage, (path, strategy))
        if known[1].tensors != strategy.tensors:
            raise ConfigError(f"{known[0]} and {path} are both of stage {strategy.stage}, but differ", path=path)
    if not stages:
        raise ConfigError(f"there are no strategy files in {directory}", parameter="src_strategy_dirs")
    save_strategy(_merged([strategy for _, strategy in stages.values()]), target, filesystem=fs)


def _merged(stages: Sequence[Strategy]) -> Strategy:
    tensors = {f"{one.stage}-{name}": tensor for one in stages for name, tensor in one.tensors.items()}
    return Strategy(tensors, 1, tuple(operator for one in stages for operator in one.operators))


def _candidates(fs: FileSystem, directory: str, target: str) -> list[str]:
    """Strategy files, but not an earlier result: that may well lie among them."""
    paths = [os.path.join(directory, name) for name in sorted(fs.listdir(directory)) if not name.startswith(".")]
    found = [path for path in paths if path.endswith((".ckpt", ".json")) and _is_file(fs, path)]
    found = [path for path in found if os.path.abspath(path) != os.path.abspath(target)]
    if len({os.path.splitext(path)[1] for path in found}) > 1:
        raise ConfigError(f"{directory} holds both .ckpt and .json files: which are the strategies?", path=directory)
    return found


def restore_group_info_list(group_info_file_name: str, *, filesystem: FileSystem | None = None) -> list[int]:
    """Return the ranks whose checkpoints a rank can take, from MindSpore's group file.

    Raises
    ------
    ConfigError
        If there is no such file, or its name is no str.
    FormatError
        If it lists no ranks.
    """
    name = text("group_info_file_name", group_info_file_name)
    return form.decode_group(_read(filesystem, name), name)


def get_ckpt_path_with_strategy(
    cur_ckpt_path: str,
    cur_strategy_path: str | Strategy,
    *,
    rank: int | None = None,
    filesystem: FileSystem | None = None,
) -> str | None:
    """Find a checkpoint that holds what this rank needs: its own, or that of a rank with the same pieces.

    Parameters
    ----------
    cur_ckpt_path : str
        With ``rank_<own rank>`` in it.
    cur_strategy_path : str or Strategy
    rank : int, optional
        Own rank; MindSpore asks its communication. Default: from `cur_ckpt_path`.

    Returns
    -------
    str or None
        None if no rank with all the same pieces has its file.
    """
    fs = filesystem or PosixFileSystem()
    path = text("cur_ckpt_path", cur_ckpt_path)
    named = re.findall(r"rank_(\d+)", path)
    own = int(named[-1]) if rank is None and named else rank
    if own is None or (f"rank_{own}" in path and _is_file(fs, path)):
        return path if _is_file(fs, path) else None
    strategy = as_strategy(cur_strategy_path, fs)
    if strategy is None:
        raise ConfigTypeError("cur_strategy_path must be a str or a Strategy", parameter="cur_strategy_path")
    others = [re.sub(r"rank_\d+", f"rank_{other}", path) for other in _twins(strategy, own)]
    return next((other for other in others if _is_file(fs, other)), None)


def _twins(strategy: Strategy, rank: int) -> tuple[int, ...]:
    """Ranks that hold the same as a rank, of every tensor; itself at least."""
    if not strategy.is_merged:  # MindSpore gives each stage its own file, without saying where its ranks begin
        base = rank // strategy.stage_nranks * strategy.stage_nranks
        layouts = [tensor.layout(base) for name, tensor in strategy.tensors.items() if _counts(name)]
    else:
        layouts = [layout for name in strategy.names if _counts(name) for layout in strategy.layouts(name)]
    groups = [set(group) for layout in layouts for group in mindspore_groups(layout) if rank in group]
    return tuple(sorted(set.intersection(*groups))) if groups else (rank,)


def _counts(name: str) -> bool:
    return not name.startswith(_NOT_OF_THE_MODEL)


def _is_file(fs: FileSystem, path: str) -> bool:
    stat = try_stat(fs, path)
    return stat is not None and not stat.is_dir


def _read(filesystem: FileSystem | None, path: str) -> bytes:
    fs = filesystem or PosixFileSystem()
    if not _is_file(fs, path):
        raise ConfigError(f"there is no strategy file {path}", path=path)
    data = read_file(fs, path, form.MAX_NBYTES)
    if not data:
        raise FormatError(f"{path} is empty", path=path, byte_offset=0, field="file")
    return data


def _path(name: str, given: str | os.PathLike[str]) -> str:
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigTypeError(f"{name} must be a str, not {type(given).__name__}", parameter=name)
    return text(name, os.fspath(given))
