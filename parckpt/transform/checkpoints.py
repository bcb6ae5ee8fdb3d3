"""`transform_checkpoints` and `transform_checkpoint_by_rank`: files of ranks, cut anew for other ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parckpt.comm.outcome import run_on_all
from parckpt.comm.wait import AGREE_TIMEOUT_S
from parckpt.core.checks import boolean, choice, mode, text
from parckpt.core.netrules import GRADIENT_SUMS
from parckpt.core.strategy import Strategy
from parckpt.engine.group import Group
from parckpt.engine.rewrite import OutputSpec, write_files
from parckpt.engine.rounds import compare_arguments
from parckpt.engine.staging import Modes
from parckpt.errors import ConfigError, ConfigTypeError, LayoutError
from parckpt.formats.registry import FORMATS
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat
from parckpt.strategies import name_of
from parckpt.transform.arguments import StrategyLike, path_text, processes, safe_path, strategy_of
from parckpt.transform.files import choose_files
from parckpt.transform.outputs import Recut
from parckpt.transform.reading import Opened, group_of, open_files, open_published, share

__all__ = ["transform_checkpoint_by_rank", "transform_checkpoints"]

# What MindSpore does not count when it decides whether a strategy is a part of another.
_NOT_COMPARED = (GRADIENT_SUMS, "adam_v", "adam_m")


def transform_checkpoints(
    src_checkpoints_dir: str,
    dst_checkpoints_dir: str,
    ckpt_prefix: str,
    src_strategy_file: StrategyLike = None,
    dst_strategy_file: StrategyLike = None,
    process_num: int = 1,
    output_format: str = "ckpt",
    *,
    comm: Any = None,
    check: bool = True,
    file_mode: int = 0o600,
    dir_mode: int = 0o700,
    agree_timeout_s: float = AGREE_TIMEOUT_S,
    filesystem: FileSystem | None = None,
) -> None:
    """Cut the checkpoint of some ranks anew for others: ``<dst>/rank_<n>/<prefix><n>.<format>`` for each of them.

    Collective over ``comm`` if that is given: its ranks share the files to write. Else this process alone. Any number
    of bytes passes through a bounded memory, and each file appears whole or not at all.

    Parameters
    ----------
    src_checkpoints_dir : str
        With ``rank_<n>`` directories, or a checkpoint of ours, whose manifest takes the place of `src_strategy_file`.
        Of several files of a rank the one of the highest epoch and step is taken, with a warning.
    ckpt_prefix : str
        What the new files' names begin with.
    src_strategy_file, dst_strategy_file : str, Strategy or mapping, optional
        How tensors are, and are to be, cut. None: not at all.
    process_num : int
        Accepted for compatibility, and of no effect: start MPI ranks.
    output_format : str
        ``ckpt`` or ``safetensors``, whatever the source is.
    check : bool
        Verify the checksums that the files carry, and that ranks which should hold the same do. False: read once only.

    Raises
    ------
    ConfigError, ConfigTypeError
        An argument is impossible, or files are missing.
    LayoutError
        The files do not fit the strategy, or the strategies each other.
    IntegrityError, FormatError
        A file is damaged.

    Notes
    -----
    If the source strategy is that of one pipeline stage, and the target's names more tensors, the files are called
    ``<prefix><n>_part<stage>.<format>``, as in MindSpore: one call per stage makes all parts, and
    `load_segmented_checkpoints` puts them together.
    """
    job = _Job(filesystem if filesystem is not None else PosixFileSystem(), Modes(file_mode, dir_mode), check)
    with group_of(comm, agree_timeout_s) as group:

        def arguments() -> tuple[str, str, Strategy | None, Strategy | None]:
            source_dir = path_text("src_checkpoints_dir", src_checkpoints_dir)
            target_dir = safe_path("dst_checkpoints_dir", path_text("dst_checkpoints_dir", dst_checkpoints_dir))
            _check_prefix(ckpt_prefix)
            processes("process_num", process_num)
            choice("output_format", output_format, ("ckpt", "safetensors"))
            boolean("check", check)
            mode("file_mode", file_mode, 0o400)
            mode("dir_mode", dir_mode, 0o700)
            stat = try_stat(job.fs, target_dir)
            if stat is not None and not stat.is_dir:
                raise ConfigError(f"{target_dir} is a file, not a directory", parameter="dst_checkpoints_dir")
            source = strategy_of("src_strategy_file", src_strategy_file, job.fs)
            return source_dir, target_dir, source, strategy_of("dst_strategy_file", dst_strategy_file, job.fs)

        source_dir, target_dir, source, target = run_on_all(group.comm, arguments, group.waiter)
        compare_arguments(
            group,
            {
                "src_checkpoints_dir": source_dir,
                "dst_checkpoints_dir": target_dir,
                "ckpt_prefix": ckpt_prefix,
                "src_strategy_file": name_of(source),
                "dst_strategy_file": name_of(target),
                "output_format": output_format,
            },
        )
        opened = share(group, lambda: _open(job, os.path.abspath(source_dir), source, target))
        part = _part(source, target)
        if part == "_part0" and opened.manifest.facts.format == "safetensors":
            part = ""  # as in MindSpore, which knows parts of ckpt files only, and only the first stage of others

        def paths(rank: int) -> str:
            name = f"{ckpt_prefix}{rank}{part}.{output_format}"
            return os.path.join(os.path.abspath(target_dir), f"rank_{rank}", name)

        _write(group, job, opened, Recut(opened, source, target), paths, output_format)


def transform_checkpoint_by_rank(
    rank_id: int,
    checkpoint_files_map: Mapping[int, str],
    save_checkpoint_file_name: str,
    src_strategy_file: StrategyLike = None,
    dst_strategy_file: StrategyLike = None,
    *,
    check: bool = True,
    file_mode: int = 0o600,
    dir_mode: int = 0o700,
    filesystem: FileSystem | None = None,
) -> None:
    """Make the checkpoint of one target rank from the files of the ranks it needs. Not collective.

    Parameters
    ----------
    rank_id : int
    checkpoint_files_map : dict of int to str
        The file of each source rank; those that `rank_list_for_transform` lists are enough.
    save_checkpoint_file_name : str
        Ends in ``.ckpt`` or ``.safetensors``.

    Raises
    ------
    As `transform_checkpoints`.
    """
    job = _Job(filesystem if filesystem is not None else PosixFileSystem(), Modes(file_mode, dir_mode), check)
    _check_by_rank(job.fs, rank_id, checkpoint_files_map, save_checkpoint_file_name)
    source = strategy_of("src_strategy_file", src_strategy_file, job.fs)
    target = strategy_of("dst_strategy_file", dst_strategy_file, job.fs)
    files = dict(checkpoint_files_map)
    if source is None:
        files = {0: files[0]} if 0 in files else files
    form = save_checkpoint_file_name.rpartition(".")[2]
    path = os.path.abspath(save_checkpoint_file_name)
    with group_of(None, AGREE_TIMEOUT_S) as group:
        opened = share(
            group,
            lambda: open_files(job.fs, files, source, named=_names(target), check=check, complete=False),
        )
        recut = Recut(opened, source, target)
        if source is not None:
            _check_needed(files, recut.source_ranks(rank_id), rank_id)
        _write(group, job, opened, recut, lambda rank: path, form, ranks=[rank_id])


@dataclass(frozen=True)
class _Job:
    """What all steps of a call need."""

    fs: FileSystem
    modes: Modes
    check: bool


def _check_prefix(given: Any) -> None:
    prefix = text("ckpt_prefix", given)
    safe_path("ckpt_prefix", prefix or "_")
    if "/" in prefix:
        raise ConfigError(f"ckpt_prefix must not contain '/': {prefix!r}", parameter="ckpt_prefix")


def _check_by_rank(fs: FileSystem, rank: Any, files: Any, target: Any) -> None:
    if not isinstance(files, Mapping):
        raise ConfigTypeError(
            f"checkpoint_files_map must be a dict, not {type(files).__name__}", parameter="checkpoint_files_map"
        )
    if not isinstance(rank, int):
        raise ConfigTypeError(f"rank_id must be an int, not {type(rank).__name__}", parameter="rank_id")
    name = text("save_checkpoint_file_name", target)
    if not name.endswith((".ckpt", ".safetensors")):
        raise ConfigError(f"save_checkpoint_file_name must end with .ckpt, not be {name!r}")
    if not files:
        raise ConfigError("checkpoint_files_map is empty", parameter="checkpoint_files_map")
    for other, path in files.items():
        if try_stat(fs, path_text("checkpoint_files_map", path)) is None:
            raise ConfigError(f"the file {path} of rank {other} does not exist", parameter="checkpoint_files_map")


def _names(target: Strategy | None) -> Sequence[str]:
    return target.names if target is not None else ()


def _open(job: _Job, path: str, source: Strategy | None, target: Strategy | None) -> Opened:
    """Open a directory of ours by its manifest, or choose the files of its ranks."""
    stat = try_stat(job.fs, path)
    published = open_published(job.fs, path) if stat is not None else None
    if published is not None:
        return published
    files, _ = choose_files(job.fs, path)
    if source is None:
        # Not cut: MindSpore reads rank 0 only.
        _check_needed(files, [0], 0)
        return open_files(job.fs, {0: files[0]}, None, named=_names(target), check=job.check)
    if not source.is_merged and _part(source, target):
        files = {rank: files[rank] for rank in files if rank in source.ranks}
    if not files:
        _check_needed(files, source.ranks, 0)
    return open_files(job.fs, files, source, named=_names(target), check=job.check)


def _part(source: Strategy | None, target: Strategy | None) -> str:
    """``_part<stage>`` if the source is one stage of what the target names: its files get only a part of the model."""
    if source is None or target is None or source.is_merged or target.nstages > 1:
        return ""
    ours, theirs = ({n for n in s.names if not n.startswith(_NOT_COMPARED)} for s in (source, target))
    return f"_part{source.stage}" if ours < theirs else ""


def _check_needed(files: Mapping[int, str], ranks: Sequence[int], rank: int) -> None:
    absent = [other for other in sorted(ranks) if other not in files]
    if absent:
        raise ConfigError(f"the files of ranks {absent} are needed for rank {rank}, but are missing", ranks=absent)


def _write(
    group: Group,
    job: _Job,
    opened: Opened,
    recut: Recut,
    path_of: Any,
    form: str,
    *,
    ranks: Sequence[int] | None = None,
) -> None:
    def specs() -> list[OutputSpec]:
        wanted = range(recut.nranks) if ranks is None else ranks
        if any(not 0 <= rank < recut.nranks for rank in wanted):
            raise LayoutError(f"there is no rank {max(wanted)} among the {recut.nranks} of the target strategy")
        return [OutputSpec(path_of(rank), recut.pieces(rank), recut.numbers(rank)) for rank in wanted]

    outputs = run_on_all(group.comm, specs, group.waiter)
    write_files(
        group,
        job.fs,
        opened.manifest,
        opened.root,
        outputs,
        FORMATS[form],
        modes=job.modes,
        manifest_path=opened.manifest_path,
    )
