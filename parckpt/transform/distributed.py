"""`load_distributed_checkpoint`: files of training ranks, or unified ones, for the ranks of another job."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parckpt.comm.launch import launched_by
from parckpt.comm.wait import AGREE_TIMEOUT_S
from parckpt.core.checks import boolean, choice, decryption, mode, text
from parckpt.core.state import State
from parckpt.core.strategy import Strategy
from parckpt.engine import notyet
from parckpt.engine.loading import complaints
from parckpt.engine.rounds import compare_arguments
from parckpt.engine.staging import Modes
from parckpt.errors import ConfigError, ConfigTypeError, StateWarning
from parckpt.netload import fill_net
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat
from parckpt.strategies import name_of
from parckpt.transform.arguments import StrategyLike, path_text, processes, strategy_of
from parckpt.transform.loading import Loading
from parckpt.transform.outputs import Recut
from parckpt.transform.reading import Opened, group_of, open_files, share
from parckpt.transform.unifiedfiles import open_unified

__all__ = ["load_distributed_checkpoint"]


def load_distributed_checkpoint(
    network: State | None,
    checkpoint_filenames: Sequence[str] | None = None,
    predict_strategy: StrategyLike = None,
    train_strategy_filename: StrategyLike = None,
    strict_load: bool = False,
    dec_key: bytes | None = None,
    dec_mode: str = "AES-GCM",
    format: str = "ckpt",
    unified_safetensors_dir: str | None = None,
    dst_safetensors_dir: str | None = None,
    rank_id: int | None = None,
    output_format: str = "safetensors",
    name_map: Mapping[str, str] | None = None,
    max_process_num: int = 64,
    return_param_dict: bool = False,
    *,
    comm: Any = None,
    check: bool = True,
    file_mode: int = 0o600,
    dir_mode: int = 0o700,
    agree_timeout_s: float = AGREE_TIMEOUT_S,
    filesystem: FileSystem | None = None,
) -> Any:
    """Give each rank of a job its pieces of a checkpoint that other ranks, or `unified_safetensors`, wrote.

    Collective over ``comm`` if that is given, else this process alone.

    Parameters
    ----------
    network : state or None
        What to fill in place: each rank gets its pieces only. None: files are written instead, or arrays returned.
    checkpoint_filenames : list of str, optional
        With ``format="ckpt"``: the file of each training rank.
    predict_strategy : str, Strategy or mapping, optional
        How the tensors of `network`, or of the files to write, are cut. None: whole; `Shard` leaves get their boxes.
    train_strategy_filename : str, Strategy or mapping, optional
        With ``format="ckpt"``: how the files are cut. None: not at all.
    strict_load : bool
        As `load_param_into_net`.
    unified_safetensors_dir : str, optional
        With ``format="safetensors"``: where `unified_safetensors` has written.
    dst_safetensors_dir : str, optional
        Without `network`: files go to ``<dir>/rank_<n>/net.<output_format>``.
    rank_id : int, optional
        Rank whose pieces are wanted. Default: with `network` this process' rank in ``comm``; without, all ranks.
    name_map : mapping, optional
        Name in the network to name in the files.
    max_process_num : int
        Accepted for compatibility: start MPI ranks.
    return_param_dict : bool
        Return this rank's arrays by name, and fill nothing.

    Returns
    -------
    True, or the lists of `load_param_into_net`, or a dict
        As in MindSpore: True from ckpt files and where files were written, else the two lists.

    Raises
    ------
    ConfigError, ConfigTypeError, LayoutError, FormatError, IntegrityError
        As `transform_checkpoints`.
    StateMismatchError
        The network's tensors have other shapes or types; nothing was changed.
    """
    fs = filesystem if filesystem is not None else PosixFileSystem()
    modes = Modes(file_mode, dir_mode)
    writes = network is None and not return_param_dict
    said: list[str] = []
    with group_of(comm, agree_timeout_s) as group:

        def arguments() -> _Arguments:
            choice("format", format, ("ckpt", "safetensors"))
            choice("output_format", output_format, ("ckpt", "safetensors"))
            boolean("strict_load", strict_load)
            boolean("return_param_dict", return_param_dict)
            processes("max_process_num", max_process_num)
            mode("file_mode", file_mode, 0o400)
            mode("dir_mode", dir_mode, 0o700)
            key, cipher = decryption(dec_key, dec_mode)
            if format == "safetensors":
                given = (checkpoint_filenames, train_strategy_filename, key)
                _check_unified(unified_safetensors_dir, given, strict_load, cipher)
                files = None
            else:
                files = _check_files(fs, checkpoint_filenames)
                notyet.refuse(enc_key=key)
            if writes and dst_safetensors_dir is None:
                raise ConfigError(
                    "network and dst_safetensors_dir are both None: there is nowhere to load to", parameter="network"
                )
            names = _check_name_map(name_map)
            predict = strategy_of("predict_strategy", predict_strategy, fs)
            rank = _check_rank(rank_id, predict, writes, comm is None)
            train = strategy_of("train_strategy_filename", train_strategy_filename, fs)
            if train is not None and files is not None and len(files) != train.nranks:
                raise ConfigError(
                    f"the training strategy is for {train.nranks} devices, but there are {len(files)} files",
                    parameter="checkpoint_filenames",
                )
            target = path_text("dst_safetensors_dir", dst_safetensors_dir) if writes else None
            return _Arguments(files, train, predict, rank, names, target)

        found = group.run(arguments)
        # Which of its ways the call takes must be the same on all ranks, or they would wait in different ones.
        compare_arguments(
            group,
            {
                "network": "None" if network is None else "a state",
                "format": format,
                "predict_strategy": name_of(found.predict),
                "train_strategy_filename": name_of(found.train),
                "dst_safetensors_dir": found.target and os.path.abspath(found.target),
                "output_format": output_format,
                "return_param_dict": return_param_dict,
            },
        )

        def opening() -> Opened:
            if found.files is not None:
                return open_files(fs, found.files, found.train, named=_names(found.predict), check=check)
            assert unified_safetensors_dir is not None
            return open_unified(fs, os.path.abspath(unified_safetensors_dir), found.names, check)

        opened = share(group, opening)
        recut = Recut(opened, found.train, found.predict)
        loading = Loading(group, fs, opened, recut, found.predict, found.rank, unified=found.files is None)
        said += loading.absent() if group.is_root else []
        if found.target is not None:
            loading.write(os.path.abspath(found.target), output_format, modes)
            result: Any = True
        else:
            arrays = group.run(lambda: loading.arrays(network))
            result = arrays
            if network is not None and not return_param_dict:
                fill = fill_net(group, network, arrays, strict_load, False, alone=comm is None)
                said += complaints(group, fill.param_not_load, fill.renamed)
                result = True if format == "ckpt" else (fill.param_not_load, fill.ckpt_not_load)
    for message in said:
        warnings.warn(message, StateWarning, stacklevel=2)
    return result


@dataclass(frozen=True)
class _Arguments:
    """Checked."""

    files: Mapping[int, str] | None
    train: Strategy | None
    predict: Strategy | None
    rank: int | None
    names: Mapping[str, str]
    target: str | None


def _names(strategy: Strategy | None) -> Sequence[str]:
    return strategy.names if strategy is not None else ()


# -- arguments --------------------------------------------------------------------------------------------------------


def _check_unified(directory: Any, given: tuple[Any, ...], strict: bool, cipher: str) -> None:
    if directory is None:
        raise ConfigError(
            "unified_safetensors_dir must be given with format='safetensors'", parameter="unified_safetensors_dir"
        )
    text("unified_safetensors_dir", directory)
    names = ("checkpoint_filenames", "train_strategy_filename", "dec_key")
    for name, value in zip(names, given, strict=True):
        if value is not None:
            raise ConfigError(f"{name} must be None with format='safetensors'", parameter=name)
    if strict or cipher != "AES-GCM":
        raise ConfigError("strict_load and dec_mode must be left alone with format='safetensors'")


def _check_files(fs: FileSystem, given: Any) -> dict[int, str]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigTypeError(
            f"checkpoint_filenames must be a list of str, not {type(given).__name__}",
            parameter="checkpoint_filenames",
        )
    for index, path in enumerate(given):
        is_name = isinstance(path, str) and path.endswith((".ckpt", ".safetensors"))
        stat = try_stat(fs, path) if is_name else None
        if stat is None or stat.is_dir or stat.nbytes == 0:
            raise ConfigError(
                f"checkpoint_filenames[{index}] must be a file ending in .ckpt that is there and not empty, not "
                f"{path!r}",
                parameter="checkpoint_filenames",
            )
    if not given:
        raise ConfigError("checkpoint_filenames is empty", parameter="checkpoint_filenames")
    return dict(enumerate(given))


def _check_name_map(given: Any) -> Mapping[str, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(word, str) for pair in given.items() for word in pair):
        raise ConfigTypeError("name_map must map str to str", parameter="name_map")
    return given


def _check_rank(rank: Any, predict: Strategy | None, writes: bool, alone: bool) -> int | None:
    if rank is None:
        if alone and not writes and predict is not None and launched_by(os.environ)[1] > 1:
            raise ConfigError(
                "predict_strategy cuts by rank, and without comm nobody knows which rank this is: pass comm or rank_id",
                parameter="rank_id",
            )
        return None
    if type(rank) is not int:
        raise ConfigTypeError(f"rank_id must be an int, not {type(rank).__name__}", parameter="rank_id")
    if rank < 0 or (predict is not None and rank >= predict.nranks):
        raise ConfigError(f"rank_id: there is no rank {rank} in predict_strategy", parameter="rank_id")
    return rank
