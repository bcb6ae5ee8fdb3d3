"""Which files of a directory without a manifest belong together: one of each ``rank_<n>`` directory.

MindSpore's tools take, in each directory, the file whose name sorts last, whatever the others hold. Here all ranks must
have the name: a job that died while it saved leaves newer files of some ranks only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from parckpt.core import naming
from parckpt.errors import CheckpointNotFoundError, ConfigError, FormatError
from parckpt.formats.registry import FORMATS
from parckpt.storage.filesystem import FileSystem

__all__ = ["given_files", "latest_of_all", "rank_files"]


def rank_files(fs: FileSystem, path: str, *, partial: bool = False) -> dict[int, str]:
    """Find one file of each ``rank_<n>`` directory: those of the latest name that all of them have (`latest_of_all`).

    Parameters
    ----------
    partial : bool
        Directories of some ranks may be missing: others may hold the same.

    Returns
    -------
    dict of int to str
        Paths relative to `path`, by rank, ascending.

    Raises
    ------
    CheckpointNotFoundError
        If there are no such directories.
    FormatError
        If ranks are missing, or have no file in common.
    """
    ranks = sorted(rank for name in fs.listdir(path) if (rank := naming.parse_rank_directory(name)) is not None)
    if not ranks:
        raise CheckpointNotFoundError(f"{path} has neither a manifest nor rank_<n> directories", path=path)
    if not partial and ranks != list(range(len(ranks))):
        there = set(ranks)
        # Not all of them: the highest number is whatever somebody called a directory.
        missing = list(islice((rank for rank in range(ranks[-1]) if rank not in there), 9))
        shown = f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}"
        raise FormatError(f"{path}: the directories of ranks [{shown}] are missing", path=path, field="rank")
    listed = {rank: _listed(fs, os.path.join(path, naming.rank_directory(rank))) for rank in ranks}
    chosen = latest_of_all(listed)
    if chosen is None:
        raise FormatError(
            f"{path}: no file name is in all of its {len(ranks)} rank directories", path=path, field="rank"
        )
    return {rank: f"{naming.rank_directory(rank)}/{name}" for rank, name in chosen.items()}


def given_files(path: str, files: Sequence[str] | Mapping[int, str]) -> dict[int, str]:
    """Return files that a caller named, by rank, relative to `path`.

    Raises
    ------
    ConfigError
        If one does not lie in `path`.
    """
    by_rank = dict(files) if isinstance(files, Mapping) else dict(enumerate(files))
    found: dict[int, str] = {}
    for rank, name in sorted(by_rank.items()):
        relative = os.path.relpath(os.path.join(path, name), path)
        if relative.split(os.sep)[0] in (os.pardir, os.curdir):
            raise ConfigError(f"the file of rank {rank}, {name}, does not lie in {path}", path=path, ranks=[rank])
        found[rank] = relative
    return found


def _listed(fs: FileSystem, directory: str) -> set[str]:
    known = {f".{naming.EXTENSIONS[name]}" for name in FORMATS}
    return {name for name in fs.listdir(directory) if os.path.splitext(name)[1] in known and not name.startswith(".")}


def latest_of_all(listed: Mapping[int, Iterable[str]]) -> dict[int, str] | None:
    """The latest of the names that all ranks have, by rank; None if there is none.

    Names that differ in nothing but their own rank, at the end or after the word rank, count as one. The last two
    numbers say which is later: epoch and step.
    """
    for key in (_whole, _without_last, _without_marked):
        chosen = _common({rank: {key(name, rank): name for name in names} for rank, names in listed.items()})
        if chosen is not None:
            return chosen
    return None


def _whole(name: str, rank: int) -> str:
    return name


def _without_last(name: str, rank: int) -> str:
    """``out12.ckpt`` of rank 12 is ``out.ckpt``; one that does not end with the rank, or with a step, is its own."""
    stem, extension = os.path.splitext(name)
    match = re.fullmatch(rf"(.*?)0*{rank}", stem, re.DOTALL) if naming.parse_stem(stem) is None else None
    return match[1] + extension if match else f"{rank}/{name}"


def _without_marked(name: str, rank: int) -> str:
    """``net_rank_12-1_100.ckpt`` of rank 12 is ``net_rank-1_100.ckpt``."""
    return re.sub(rf"rank_?{rank}(?!\d)", "rank", name)


def _common(listed: Mapping[int, Mapping[str, str]]) -> dict[int, str] | None:
    """The latest of the keys that all ranks have."""
    common = set.intersection(*(set(names) for names in listed.values()))
    if not common:
        return None
    latest = max(common, key=_order)
    return {rank: names[latest] for rank, names in listed.items()}


def _order(name: str) -> tuple[list[int], str]:
    numbers = [int(number) for number in re.findall(r"\d+", os.path.splitext(name)[0])[-2:]]
    return [0] * (2 - len(numbers)) + numbers, name
