"""`ckpt_to_safetensors`, `safetensors_to_ckpt`: the same content in the other format; `load_segmented_checkpoints`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parckpt.comm.launch import SELF, resolve
from parckpt.comm.wait import AGREE_TIMEOUT_S
from parckpt.core.checks import boolean, mode
from parckpt.core.layout import whole
from parckpt.core.manifest import Manifest
from parckpt.core.state import State
from parckpt.engine import foreign
from parckpt.engine.catalog import find_at, load_manifest
from parckpt.engine.group import Group
from parckpt.engine.rewrite import OutputSpec, Piece, write_files
from parckpt.engine.rounds import compare_arguments
from parckpt.engine.staging import Modes
from parckpt.errors import ConfigError, ConfigTypeError
from parckpt.formats.registry import FORMATS
from parckpt.loadfile import load_checkpoint
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat
from parckpt.transform.arguments import path_text, processes
from parckpt.transform.reading import group_of, refuse_maps

__all__ = ["ckpt_to_safetensors", "load_segmented_checkpoints", "safetensors_to_ckpt"]


def ckpt_to_safetensors(
    file_path: str,
    save_path: str | None = None,
    name_map: Mapping[str, str] | None = None,
    file_name_regex: str | None = None,
    processes_num: int = 1,
    *,
    comm: Any = None,
    check: bool = True,
    file_mode: int = 0o600,
    dir_mode: int = 0o700,
    agree_timeout_s: float = AGREE_TIMEOUT_S,
    filesystem: FileSystem | None = None,
) -> None:
    """Write the content of ``.ckpt`` files as ``.safetensors`` files of the same names.

    Collective over ``comm`` if that is given: its ranks share the files. Else this process alone.

    Parameters
    ----------
    file_path : str
        A file, or a directory with directories whose names begin with ``rank``.
    save_path : str, optional
        Directory to write to; below it the ``rank`` directories are made again. Default: beside the originals.
    name_map : mapping, optional
        New names of tensors.
    file_name_regex : str, optional
        Convert only files whose names it is found in.
    processes_num : int
        Accepted for compatibility: start MPI ranks.
    check : bool
        Verify the checksums that the files carry, or that our manifests have of them.

    Raises
    ------
    ConfigError, ConfigTypeError
        An argument is impossible; a file holds texts, for which safetensors has no type.
    IntegrityError, FormatError
        A file is damaged, encrypted, or holds hash maps.
    """
    options = _Options(name_map, check, Modes(file_mode, dir_mode), filesystem or PosixFileSystem())
    _convert(
        file_path, save_path, file_name_regex, processes_num, comm, agree_timeout_s, ("ckpt", "safetensors"), options
    )


def safetensors_to_ckpt(
    file_path: str,
    save_path: str | None = None,
    name_map: Mapping[str, str] | None = None,
    file_name_regex: str | None = None,
    processes_num: int = 1,
    *,
    comm: Any = None,
    check: bool = True,
    file_mode: int = 0o600,
    dir_mode: int = 0o700,
    agree_timeout_s: float = AGREE_TIMEOUT_S,
    filesystem: FileSystem | None = None,
) -> None:
    """Write the content of ``.safetensors`` files as ``.ckpt`` files of the same names, tensors sorted by name.

    As `ckpt_to_safetensors`, in the other direction.
    """
    options = _Options(name_map, check, Modes(file_mode, dir_mode), filesystem or PosixFileSystem())
    _convert(
        file_path, save_path, file_name_regex, processes_num, comm, agree_timeout_s, ("safetensors", "ckpt"), options
    )


def load_segmented_checkpoints(
    ckpt_file_dir: str,
    net: State | None = None,
    strict_load: bool = False,
    filter_prefix: str | Sequence[str] | None = None,
    dec_key: bytes | None = None,
    dec_mode: str = "AES-GCM",
    specify_prefix: str | Sequence[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    *,
    comm: Any = None,
    allow_unverified: bool | None = None,
    agree_timeout_s: float = AGREE_TIMEOUT_S,
    filesystem: FileSystem | None = None,
) -> dict[str, Any]:
    """Load all ``.ckpt`` files of a directory, each as `load_checkpoint` does, into one dict. In order of their names.

    Raises
    ------
    ConfigError, ConfigTypeError
        The directory is not there or has no such files; two files differ in what both have.
    """
    fs = filesystem if filesystem is not None else PosixFileSystem()
    with group_of(comm, agree_timeout_s) as group:
        names = group.run(lambda: _segments(fs, ckpt_file_dir))
        # One load after the other is collective: ranks with fewer files would leave the others waiting.
        compare_arguments(group, {"files in ckpt_file_dir": names, "net": "None" if net is None else "a state"})
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    differing: list[str] = []
    for name in names:
        loaded = load_checkpoint(
            os.path.join(ckpt_file_dir, name),
            net,
            strict_load,
            filter_prefix,
            dec_key,
            dec_mode,
            specify_prefix,
            choice_func,
            comm=comm,
            allow_unverified=allow_unverified,
            agree_timeout_s=agree_timeout_s,
            filesystem=filesystem,
        )
        for entry, value in loaded.items():
            if entry in found and net is None and not _same(found[entry], value):
                differing.append(f"{entry!r} differs between {origin[entry]} and {name} in {ckpt_file_dir}")
            origin.setdefault(entry, name)
        found.update(loaded)
    if differing:  # not before the last load: other ranks may be in it
        raise ConfigError(differing[0])
    return found


def _segments(fs: FileSystem, directory: Any) -> list[str]:
    """Names of the files to load."""
    if not isinstance(directory, str):
        raise ConfigTypeError(f"ckpt_file_dir must be a str, not {type(directory).__name__}", parameter="ckpt_file_dir")
    stat = try_stat(fs, directory)
    if stat is None or not stat.is_dir:
        raise ConfigError(f"{directory} is not a directory", parameter="ckpt_file_dir")
    names = [name for name in sorted(fs.listdir(directory)) if name.endswith(".ckpt") and name[0] != "."]
    if not names:
        raise ConfigError(f"{directory} holds no .ckpt files", parameter="ckpt_file_dir")
    return names


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return type(a) is type(b) and bool(np.all(a == b))
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


# -- converting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    """What holds for all files of a call."""

    name_map: Mapping[str, str] | None
    check: bool
    modes: Modes
    fs: FileSystem


def _convert(
    file_path: Any,
    save_path: Any,
    regex: Any,
    processes_num: Any,
    comm: Any,
    agree_timeout_s: float,
    formats: tuple[str, str],
    options: _Options,
) -> None:
    with group_of(comm, agree_timeout_s) as group:

        def tasks() -> list[tuple[str, str]]:
            processes("processes_num", processes_num)
            boolean("check", options.check)
            mode("file_mode", options.modes.file, 0o400)
            mode("dir_mode", options.modes.directory, 0o700)
            _check_names(options.name_map)
            return _tasks(options.fs, file_path, save_path, _pattern(regex), formats)

        todo = group.run(tasks)
        compare_arguments(group, {"file_path": os.path.abspath(file_path), "files": len(todo)})

        def convert_own() -> None:
            for source, target in todo[group.rank :: group.size]:
                _convert_file(options, source, target, formats[1], agree_timeout_s, group)

        group.run(convert_own)


def _check_names(given: Any) -> None:
    if given is None:
        return
    if not isinstance(given, Mapping) or not all(isinstance(word, str) for pair in given.items() for word in pair):
        raise ConfigTypeError("name_map must map str to str", parameter="name_map")


def _pattern(regex: Any) -> re.Pattern[str] | None:
    if regex is None:
        return None
    try:
        return re.compile(regex)
    except (re.error, TypeError) as error:
        raise ConfigError(f"file_name_regex {regex!r} is no regular expression: {error}") from error


def _tasks(
    fs: FileSystem, given: Any, save_path: Any, pattern: re.Pattern[str] | None, formats: tuple[str, str]
) -> list[tuple[str, str]]:
    """Files to read and to write."""
    path = os.path.abspath(path_text("file_path", given))
    before, after = (f".{FORMATS[name].extension.lstrip('.')}" for name in formats)
    if save_path is not None and os.path.splitext(path_text("save_path", save_path))[1]:
        raise ConfigError(f"save_path must be a directory, not {save_path!r}", parameter="save_path")
    stat = try_stat(fs, path)
    if stat is None:
        raise ConfigError(f"file_path {path} does not exist", parameter="file_path")
    target = os.path.abspath(save_path) if save_path else None
    if not stat.is_dir:
        if not path.endswith(before):
            raise ConfigError(f"file_path must end with {before}, not be {path}", parameter="file_path")
        if pattern is not None and not pattern.search(path):
            raise ConfigError(f"file_name_regex does not match {path}", parameter="file_name_regex")
        directory, name = os.path.split(path)
        return [(path, os.path.join(target or directory, name[: -len(before)] + after))]
    ranks = [name for name in sorted(fs.listdir(path)) if name.startswith("rank")]
    ranks = [name for name in ranks if fs.stat(os.path.join(path, name)).is_dir]
    if not ranks:
        raise ConfigError(f"{path} has no directories whose names begin with 'rank'", parameter="file_path")
    found: list[tuple[str, str]] = []
    for rank in ranks:
        directory = os.path.join(path, rank)
        names = [name for name in sorted(fs.listdir(directory)) if name.endswith(before) and name[0] != "."]
        chosen = [name for name in names if pattern is None or pattern.search(name)]
        into = os.path.join(target, rank) if target else directory
        found += [(os.path.join(directory, n), os.path.join(into, n[: -len(before)] + after)) for n in chosen]
    return found


def _convert_file(options: _Options, source: str, target: str, form: str, agree_timeout_s: float, group: Group) -> None:
    """One file, by this process alone."""
    manifest, texts = _open(options, source)
    names = options.name_map or {}
    rows = list(enumerate(manifest.contents.tensors))
    if form == "ckpt":
        rows.sort(key=lambda numbered: numbered[1].name)
    pieces = tuple(Piece(names.get(row.name, row.name), number, whole(row.global_shape)) for number, row in rows)
    texts = {names.get(name, name): value for name, value in texts.items()}
    alone = Group(resolve(SELF, os.environ), group.waiter)
    try:
        spec = OutputSpec(target, pieces, texts)
        write_files(alone, options.fs, manifest, os.path.dirname(source), [spec], FORMATS[form], modes=options.modes)
    finally:
        alone.comm.free()


def _open(options: _Options, path: str) -> tuple[Manifest, dict[str, str]]:
    """What a file holds, with the checksums of our manifest where there is one, and its texts."""
    fs = options.fs
    found = find_at(fs, path)
    manifest = foreign.open_foreign(fs, path, check=options.check and found is None, counters=False)
    index, _ = foreign.index_file(fs, path)
    refuse_maps(path, index)
    texts = {item.name: item.text for item in index.entries if item.text is not None}
    if found is None:
        return foreign.without_checksums(manifest), texts
    known = load_manifest(fs, found).contents.files[0].chunk_crcs
    files = tuple(replace(file, chunk_crcs=known) for file in manifest.contents.files)
    return replace(manifest, contents=replace(manifest.contents, files=files)), texts
