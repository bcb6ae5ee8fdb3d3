"""`unified_safetensors`: the files of all ranks as a few files of whole tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from parckpt.comm.wait import AGREE_TIMEOUT_S
from parckpt.core.checks import boolean, count, mode, text
from parckpt.core.layout import whole
from parckpt.core.netrules import GRADIENT_SUMS
from parckpt.core.strategy import Strategy
from parckpt.engine.group import Group
from parckpt.engine.keeper import make_directory
from parckpt.engine.rewrite import OutputSpec, Piece, write_files
from parckpt.engine.rounds import compare_arguments
from parckpt.engine.staging import Modes
from parckpt.errors import ConfigError, ConfigTypeError
from parckpt.formats.registry import FORMATS
from parckpt.storage.atomic import replace_file
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat
from parckpt.strategies import name_of
from parckpt.transform.arguments import StrategyLike, path_text, processes, strategy_of
from parckpt.transform.files import choose_files
from parckpt.transform.reading import Opened, group_of, open_files, open_published, share

__all__ = ["HYPER_PARAMETERS", "NAME_MAP", "PART_NBYTES", "unified_safetensors"]

NAME_MAP = "param_name_map.json"
HYPER_PARAMETERS = "hyper_param.safetensors"

PART_NBYTES = 3 << 30
"""Tensor bytes that decide the number of files, as in MindSpore; a single tensor may be larger."""


def unified_safetensors(
    src_dir: str,
    src_strategy_file: StrategyLike,
    dst_dir: str,
    merge_with_redundancy: bool = True,
    file_suffix: str | None = None,
    max_process_num: int = 64,
    choice_func: Callable[[str], bool | str] | None = None,
    split_dst_file: Sequence[int] = (),
    *,
    comm: Any = None,
    check: bool = True,
    part_nbytes: int = PART_NBYTES,
    file_mode: int = 0o600,
    dir_mode: int = 0o700,
    agree_timeout_s: float = AGREE_TIMEOUT_S,
    filesystem: FileSystem | None = None,
) -> None:
    """Merge the files of all ranks into ``part<i>.safetensors``, with `NAME_MAP` saying which tensor is where.

    Collective over ``comm`` if that is given: its ranks share the files to write. Else this process alone.

    Parameters
    ----------
    src_dir : str
        With ``rank_<n>`` directories of either format, or a step directory of ours.
    src_strategy_file : str, Strategy or mapping
        How tensors are cut. None is possible for what has a manifest, and for one rank.
    merge_with_redundancy : bool
        Accepted for compatibility: files with and without replicas are told apart by what they hold.
    file_suffix : str, optional
        What the names of the files meant end with, before the extension.
    max_process_num : int
        Accepted for compatibility: start MPI ranks.
    choice_func : callable, optional
        Gets a name; returns False to leave the tensor out, or the name to give it.
    split_dst_file : (int, int), optional
        (k, n): write the k-th of n shares of the files only; the first comes with the map and `HYPER_PARAMETERS`.
    part_nbytes : int
        Tensor bytes a file should have.

    Raises
    ------
    ConfigError, ConfigTypeError, LayoutError, FormatError, IntegrityError
        As `transform_checkpoints`.

    Notes
    -----
    What the strategy does not name goes into `HYPER_PARAMETERS`, as rank 0 has it. Accumulated gradients
    (``accu_grads*``) and what `choice_func` refuses are in no file.
    """
    fs = filesystem if filesystem is not None else PosixFileSystem()
    modes = Modes(file_mode, dir_mode)
    with group_of(comm, agree_timeout_s) as group:

        def arguments() -> tuple[str, str, Strategy | None]:
            strategy = strategy_of("src_strategy_file", src_strategy_file, fs)
            target, source = path_text("dst_dir", dst_dir), path_text("src_dir", src_dir)
            _check_places(fs, source, target)
            boolean("merge_with_redundancy", merge_with_redundancy)
            if file_suffix is not None:
                text("file_suffix", file_suffix)
            processes("max_process_num", max_process_num)
            count("part_nbytes", part_nbytes, least=1)
            mode("file_mode", file_mode, 0o400)
            mode("dir_mode", dir_mode, 0o700)
            if choice_func is not None and not callable(choice_func):
                raise ConfigTypeError("choice_func must be callable", parameter="choice_func")
            _check_share(split_dst_file)
            return os.path.abspath(source), os.path.abspath(target), strategy

        source, target, strategy = group.run(arguments)
        given = {"src_dir": source, "dst_dir": target, "src_strategy_file": name_of(strategy)}
        compare_arguments(group, {**given, "split_dst_file": list(split_dst_file), "part_nbytes": part_nbytes})
        opened = share(group, lambda: _open(fs, source, strategy, file_suffix, check))
        named = _choose(group, opened, strategy, choice_func)
        cut = frozenset(_named(opened, strategy))
        job = _Job(opened, target, named, cut, part_nbytes, tuple(split_dst_file))
        outputs = group.run(job.outputs)
        form = FORMATS["safetensors"]
        group.run(lambda: make_directory(fs, target, modes.directory) if group.is_root else None)
        write_files(
            group, fs, opened.manifest, opened.root, outputs, form, modes=modes, manifest_path=opened.manifest_path
        )
        if job.is_first:
            # Last, so that whoever finds the map finds what it names.
            path, data = os.path.join(target, NAME_MAP), json.dumps(job.name_map(), indent=4).encode("utf-8")
            group.run(lambda: replace_file(fs, path, data, modes.file) if group.is_root else None)


def _check_places(fs: FileSystem, source: str, target: str) -> None:
    stat = try_stat(fs, target)
    if stat is not None and not stat.is_dir:
        raise ConfigError(f"dst_dir {target} is a file, not a directory", parameter="dst_dir")
    stat = try_stat(fs, source)
    if stat is None or not stat.is_dir:
        raise ConfigError(f"src_dir {source} is not a directory", parameter="src_dir")


def _check_share(given: Any) -> None:
    if not isinstance(given, (tuple, list)):
        raise ConfigTypeError(f"split_dst_file must be a tuple, not {type(given).__name__}", parameter="split_dst_file")
    if given and not (len(given) == 2 and all(type(n) is int for n in given) and 1 <= given[0] <= given[1]):
        raise ConfigError(f"split_dst_file must be (k, n) with 1 <= k <= n, not {given}", parameter="split_dst_file")


def _open(fs: FileSystem, source: str, strategy: Strategy | None, suffix: str | None, check: bool) -> Opened:
    published = open_published(fs, source)
    if published is not None:
        return published
    files, _ = choose_files(fs, source, suffix=suffix)
    if strategy is None and len(files) > 1:
        raise ConfigError(
            f"{source} has the files of {len(files)} ranks: src_strategy_file has to say how tensors are cut",
            parameter="src_strategy_file",
        )
    if strategy is not None and not strategy.is_merged:
        files = {rank: path for rank, path in files.items() if rank in strategy.ranks or not strategy.stage}
    return open_files(fs, files, strategy, check=check)


def _choose(
    group: Group, opened: Opened, strategy: Strategy | None, choose: Callable[[str], bool | str] | None
) -> list[tuple[str, str]]:
    """Tensors to write, with the names they get; root asks, all ranks get the answer. Collective."""

    def ask() -> bytes | None:
        if not group.is_root:
            return None
        found: dict[str, str] = {}
        taken: set[str] = set()
        for name in _tensors(opened, strategy):
            answer = True if choose is None else choose(name)
            if not isinstance(answer, (bool, str)):
                raise ConfigError(
                    f"choice_func must return a bool or a str, not {answer!r} for {name!r}", parameter="choice_func"
                )
            new = answer if isinstance(answer, str) else name
            if answer is False:
                continue
            if new in taken:
                raise ConfigError(f"choice_func gives two tensors the name {new!r}", parameter="choice_func")
            found[name] = new
            taken.add(new)
        if not found:
            raise ConfigError("no tensor is left to write", parameter="src_strategy_file")
        return json.dumps(list(found.items())).encode("utf-8")

    return [(name, new) for name, new in json.loads(group.bcast(group.run(ask)))]


def _tensors(opened: Opened, strategy: Strategy | None) -> list[str]:
    """What goes into the parts, in the order of the ranks' files."""
    named = _named(opened, strategy)
    ordered = dict.fromkeys(name for rank in sorted(opened.names) for name in opened.names[rank])
    return [name for name in ordered if name in named and not name.startswith(GRADIENT_SUMS)]


def _named(opened: Opened, strategy: Strategy | None) -> Collection[str]:
    """Tensors of which is known how they are cut."""
    if strategy is not None and opened.manifest_path is None:
        return strategy.stages.keys()
    return {name for names in opened.names.values() for name in names}


@dataclass(frozen=True)
class _Job:
    """What is written: pure."""

    opened: Opened
    target: str
    named: Sequence[tuple[str, str]]
    cut: frozenset[str]
    part_nbytes: int
    share: tuple[int, ...]

    @property
    def is_first(self) -> bool:
        """Whether this call writes what there is one of."""
        return not self.share or self.share[0] == 1

    @cached_property
    def _rows(self) -> Mapping[str, int]:
        rows = enumerate(self.opened.contents.tensors)
        return {row.name: number for number, row in rows if row.per_rank < 0}

    def _nbytes(self) -> dict[str, int]:
        tensors, rows = self.opened.contents.tensors, self._rows
        found = {name: tensors[rows[name]] for name, _ in self.named}
        return {name: math.prod(row.global_shape) * row.dtype.itemsize for name, row in found.items()}

    def _parts(self) -> list[list[str]]:
        """Largest first into the smallest file, ties to the first, as MindSpore does."""
        nbytes = self._nbytes()
        count = max(1, min(len(nbytes), -(-sum(nbytes.values()) // self.part_nbytes)))
        parts: list[list[str]] = [[] for _ in range(count)]
        filled = [0] * count
        for name in sorted(nbytes, key=lambda name: -nbytes[name]):
            least = filled.index(min(filled))
            parts[least].append(name)
            filled[least] += nbytes[name]
        return parts

    def name_map(self) -> dict[str, Any]:
        """Content of `NAME_MAP`."""
        new = dict(self.named)
        where = {new[name]: _part_name(k) for k, names in enumerate(self._parts()) for name in names}
        return {"metadata": {"total_size": sum(self._nbytes().values())}, "weight_map": where}

    def outputs(self) -> list[OutputSpec]:
        """Files of this call's share."""
        parts, new = self._parts(), dict(self.named)
        chosen = range(len(parts))
        if self.share:
            k, n = self.share
            length, longer = divmod(len(parts), n)
            start = length * (k - 1) + min(k - 1, longer)
            chosen = range(start, start + length + (k <= longer))
        metadata = {"remove_redundancy": "False"} if self.opened.flagged else {}
        found = [
            OutputSpec(
                os.path.join(self.target, _part_name(part)),
                tuple(self._piece(name, new[name]) for name in parts[part]),
                metadata=metadata,
            )
            for part in chosen
        ]
        return [*found, *self._hyper_parameters()] if self.is_first else found

    def _hyper_parameters(self) -> list[OutputSpec]:
        """What the strategy does not name, as rank 0 has it."""
        first = min(self.opened.names)
        names = [name for name in self.opened.names[first] if name not in self.cut]
        numbers = self.opened.numbers.get(first, {})
        if not names and not numbers:
            return []
        path = os.path.join(self.target, HYPER_PARAMETERS)
        return [OutputSpec(path, tuple(self._piece(name, name) for name in names), numbers)]

    def _piece(self, name: str, new: str) -> Piece:
        row = self._rows[name]
        return Piece(new, row, whole(self.opened.contents.tensors[row].global_shape))


def _part_name(number: int) -> str:
    return f"part{number}.safetensors"
