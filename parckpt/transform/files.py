"""Which file of each ``rank_<n>`` directory is meant, when a caller names the directory above them only.

MindSpore guesses: the name that sorts last (ckpt), or that with the highest last two numbers (safetensors), in each
directory on its own and without a word. Here it is the latest name that all ranks have (`engine.rankfiles`); where
they have none in common, the second rule. The choice is said, and files of different steps are never put together.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence

from parckpt.core import naming
from parckpt.engine.rankfiles import latest_of_all
from parckpt.errors import ConfigError, StateWarning
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["choose_files", "rank_directories"]

_FORMATS = ("ckpt", "safetensors")

# What MindSpore takes a suffix of numbers for: task, epoch and step; epoch and step; step.
_SUFFIXES = ((r"_?\d+-\d+_\d+", "_"), (r"-?\d+_\d+", "-"), (r"_?\d+", "_"))


def choose_files(fs: FileSystem, directory: str, *, suffix: str | None = None) -> tuple[dict[int, str], str]:
    """Choose a file for each rank, and say with a `StateWarning` where there was a choice. Not collective.

    Parameters
    ----------
    directory : str
        With ``rank_<n>`` directories; or one data file, of rank 0.
    suffix : str, optional
        What names end with, before the extension.

    Returns
    -------
    files : dict of int to str
        Paths by rank, ascending.
    format : str
        ``ckpt`` or ``safetensors``.

    Raises
    ------
    ConfigError
        Nothing is there, both formats are, or the choice is not clear.
    """
    stat = try_stat(fs, directory)
    if stat is not None and not stat.is_dir and directory.endswith(_FORMATS):
        return {0: directory}, directory.rpartition(".")[2]
    listed = {rank: _listed(fs, path) for rank, path in rank_directories(fs, directory).items()}
    kinds = {os.path.splitext(name)[1][1:] for names in listed.values() for name in names}
    if not kinds:
        raise ConfigError(f"{directory} has no rank_<n> directories with checkpoint files", path=directory)
    if len(kinds) > 1:
        raise ConfigError(f"{directory} holds both .ckpt and .safetensors files: which are meant?", path=directory)
    form = kinds.pop()
    present = {rank: names for rank, names in listed.items() if names}
    together = latest_of_all(present) if suffix is None else None
    files: dict[int, str] = {}
    for rank, names in listed.items():
        path = os.path.join(directory, naming.rank_directory(rank))
        found = names if suffix is None else [name for name in names if name.endswith(f"{suffix}.{form}")]
        if not found and suffix is not None:
            raise ConfigError(f"no .{form} file in {path} has a name that ends with {suffix!r}", path=path)
        if found:
            name = together[rank] if together is not None else _one(path, found, suffix, form)
            files[rank] = os.path.join(path, name)
    _check_together(files)
    _tell(files, {rank: names for rank, names in listed.items() if suffix is None and len(names) > 1})
    return files, form


def rank_directories(fs: FileSystem, directory: str) -> dict[int, str]:
    """The ``rank_<n>`` directories of a directory, ascending; none if it is not there."""
    stat = try_stat(fs, directory)
    if stat is None or not stat.is_dir:
        return {}
    named = {rank: name for name in fs.listdir(directory) if (rank := naming.parse_rank_directory(name)) is not None}
    paths = {rank: os.path.join(directory, named[rank]) for rank in sorted(named)}
    return {rank: path for rank, path in paths.items() if fs.stat(path).is_dir}


def _listed(fs: FileSystem, directory: str) -> list[str]:
    extensions = tuple(f".{form}" for form in _FORMATS)
    names = [name for name in sorted(fs.listdir(directory)) if name.endswith(extensions) and not name.startswith(".")]
    return [name for name in names if not fs.stat(os.path.join(directory, name)).is_dir]


def _one(directory: str, names: Sequence[str], suffix: str | None, form: str) -> str:
    """The name that is meant, of those in one directory."""
    if suffix is None or len(names) == 1:
        return max(names, key=lambda name: _order(os.path.basename(directory), name))
    pattern = next((mark for words, mark in _SUFFIXES if re.fullmatch(words, suffix)), None)
    if pattern is None:
        raise _unclear(directory, names, suffix)
    whole = suffix if suffix[0] in "_-" else pattern + suffix
    found = [name for name in names if name.endswith(f"{whole}.{form}")]
    if pattern == "_" and "-" in suffix:  # "_1-10_100" is the second task's, not that of "net_rank_1-10_100"
        found = [name for name in found if not name.endswith(f"rank{whole}.{form}")]
    shortest = [name for name in found if len(name) == min(map(len, found))]
    if len(shortest) != 1:
        raise _unclear(directory, found or names, suffix)
    if len(found) > 1:
        warnings.warn(f"{directory}: of {', '.join(found)} the shortest name is taken", StateWarning, stacklevel=2)
    return shortest[0]


def _unclear(directory: str, names: Sequence[str], suffix: str) -> ConfigError:
    return ConfigError(
        f"{directory}: the names of {', '.join(names)} all end with {suffix!r}; give the longest ending that only the "
        "files meant have",
        parameter="file_suffix",
        path=directory,
    )


def _order(directory: str, name: str) -> tuple[list[int], str]:
    """The last two numbers, of which the first is the rank where the name has one only."""
    return [int(number) for number in re.findall(r"\d+", f"{directory}/{os.path.splitext(name)[0]}")[-2:]], name


def _check_together(files: dict[int, str]) -> None:
    """Files of different steps make a model that never was."""
    first: tuple[int, tuple[int, int]] | None = None
    for rank, path in files.items():
        stem = naming.parse_stem(os.path.splitext(os.path.basename(path))[0])
        if stem is None:
            continue
        at = (stem.epoch, stem.step_in_epoch)
        if first is not None and first[1] != at:
            raise ConfigError(
                f"the newest file of rank {first[0]} is {files[first[0]]}, that of rank {rank} is {path}: epoch and "
                "step differ, so they do not belong together",
                ranks=[first[0], rank],
            )
        first = first or (rank, at)


def _tell(files: dict[int, str], several: dict[int, list[str]]) -> None:
    if several:
        rank = min(several)
        others = ", ".join(name for name in several[rank] if name != os.path.basename(files[rank]))
        warnings.warn(
            f"{files[rank]} is taken for rank {rank}, not {others}; for {len(several)} ranks there was such a choice",
            StateWarning,
            stacklevel=2,
        )
