"""`load_distributed_checkpoint`: files of training ranks, or unified ones, for the ranks of another job."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parckpt.comm.launch import launched_by
from parckpt.core.checks import boolean, choice, decryption, mode, text
from parckpt.core.flat import FlatState
from parckpt.core.layout import Box, whole
from parckpt.core.netfill import complaints
from parckpt.core.state import State, flatten
from parckpt.core.strategy import Strategy
from parckpt.engine import notyet
from parckpt.engine.group import Group
from parckpt.engine.local import as_state
from parckpt.engine.rewrite import OutputSpec, Piece, write_files
from parckpt.engine.source import BoxReading, Source
from parckpt.engine.staging import Modes
from parckpt.errors import ConfigError, ConfigTypeError, FormatError, StateWarning
from parckpt.formats.registry import FORMATS
from parckpt.netload import fill_net
from parckpt.storage.atomic import read_file
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat
from parckpt.transform.arguments import StrategyLike, path_text, processes, strategy_of
from parckpt.transform.outputs import Recut
from parckpt.transform.reading import TIMEOUT_S, Opened, group_of, open_files, share
from parckpt.transform.unified import HYPER_PARAMETERS, NAME_MAP

__all__ = ["load_distributed_checkpoint"]

_MAX_MAP_NBYTES = 256 << 20


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
    agree_timeout_s: float = TIMEOUT_S,
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
            if network is None and dst_safetensors_dir is None and not return_param_dict:
                raise ConfigError(
                    "network and dst_safetensors_dir are both None: there is nowhere to load to", parameter="network"
                )
            names = _check_name_map(name_map)
            predict = strategy_of("predict_strategy", predict_strategy, fs)
            rank = _check_rank(rank_id, predict, network is None and not return_param_dict, comm is None)
            train = strategy_of("train_strategy_filename", train_strategy_filename, fs)
            if train is not None and files is not None and len(files) != train.nranks:
                raise ConfigError(
                    f"the training strategy is for {train.nranks} devices, but there are {len(files)} files",
                    parameter="checkpoint_filenames",
                )
            return _Arguments(files, train, predict, rank, names)

        found = group.run(arguments)

        def opening() -> Opened:
            if found.files is not None:
                return open_files(fs, found.files, found.train, named=_names(found.predict), check=check)
            assert unified_safetensors_dir is not None
            return _open_unified(fs, os.path.abspath(unified_safetensors_dir), found.names, check)

        opened = share(group, opening)
        loading = _Loading(group, fs, opened, Recut(opened, found.train, found.predict), found)
        said += loading.absent() if group.is_root else []
        if network is None and not return_param_dict:
            assert dst_safetensors_dir is not None
            loading.write(os.path.abspath(path_text("dst_safetensors_dir", dst_safetensors_dir)), output_format, modes)
            result: Any = True
        else:
            arrays = group.run(lambda: loading.arrays(network))
            result = arrays
            if network is not None and not return_param_dict:
                fill = fill_net(group, network, arrays, strict_load, False, alone=comm is None)
                said += complaints(fill.param_not_load, fill.renamed)
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


# -- unified files ----------------------------------------------------------------------------------------------------


def _open_unified(fs: FileSystem, directory: str, names: Mapping[str, str], check: bool) -> Opened:
    """Open what `unified_safetensors` has written, by its map; or the one file of a directory."""
    stat = try_stat(fs, directory)
    if stat is None or not stat.is_dir:
        raise ConfigError(f"{directory} is not a directory", parameter="unified_safetensors_dir")
    present = sorted(name for name in fs.listdir(directory) if name.endswith(".safetensors") and name[0] != ".")
    hyper = [name for name in present if name == HYPER_PARAMETERS]
    where = _weight_map(fs, directory) if NAME_MAP in fs.listdir(directory) else None
    if where is None and len(present) - len(hyper) != 1:
        raise ConfigError(
            f"{directory} has {len(present) - len(hyper)} .safetensors files, but no {NAME_MAP} says what is where",
            parameter="unified_safetensors_dir",
        )
    parts = sorted(set(where.values())) if where is not None else [name for name in present if name not in hyper]
    for name in parts:
        if name not in present:
            raise ConfigError(f"{directory}: {NAME_MAP} names {name}, which is not there", path=directory)
    files = {rank: os.path.join(directory, name) for rank, name in enumerate([*parts, *hyper])}
    return _in_order(open_files(fs, files, None, named=None, check=check), len(parts), where, names, directory)


def _weight_map(fs: FileSystem, directory: str) -> dict[str, str]:
    """Tensor to file; hostile, as all that comes from disk."""
    path = os.path.join(directory, NAME_MAP)
    try:
        found = json.loads(read_file(fs, path, _MAX_MAP_NBYTES))
        where = found.get("weight_map", found)
        if not where or not all(isinstance(word, str) for pair in where.items() for word in pair):
            raise ValueError("no mapping of names to files")
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is no map of tensors: {error}", path=path, byte_offset=0, field="map") from error
    for name in where.values():
        if os.path.basename(name) != name or name.startswith("."):
            raise FormatError(f"{path}: {name!r} is no file beside it", path=path, byte_offset=0, field="map")
    return dict(where)


def _in_order(
    opened: Opened, parts: int, where: Mapping[str, str] | None, names: Mapping[str, str], directory: str
) -> Opened:
    """The tensors under the network's names, in the map's order; what is in parts but not in the map is left out."""
    listed = [name for part in range(parts) for name in opened.names[part]]
    hyper = [name for part in range(parts, len(opened.names)) for name in opened.names[part]]
    if where is not None:
        stored = [names.get(name, name) for name in where]
        absent = sorted(set(stored) - set(listed) - {n for k in range(parts) for n in opened.numbers.get(k, {})})
        if absent:
            raise FormatError(
                f"{directory}: {NAME_MAP} names {absent[0]!r}, but no file has it",
                path=directory,
                byte_offset=0,
                field=absent[0],
            )
        listed = [name for name in stored if name in set(listed)]
    back = {stored: own for own, stored in names.items()}
    rows = tuple(replace(row, name=back.get(row.name, row.name)) for row in opened.contents.tensors)
    if len({row.name for row in rows}) != len(rows):
        raise ConfigError("name_map gives two tensors one name", parameter="name_map")
    manifest = replace(opened.manifest, contents=replace(opened.contents, tensors=rows))
    singles = {back.get(name, name): value for found in opened.numbers.values() for name, value in found.items()}
    listed, hyper = ([back.get(name, name) for name in found] for found in (listed, hyper))
    return Opened(manifest, opened.root, {0: [*listed, *hyper], 1: hyper}, {0: singles})


# -- loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loading:
    """What one call loads."""

    group: Group
    fs: FileSystem
    opened: Opened
    recut: Recut
    arguments: _Arguments

    def absent(self) -> list[str]:
        """Say which tensors the target strategy names and no file has."""
        predict = self.arguments.predict
        if predict is None:
            return []
        present = {row.name for row in self.opened.contents.tensors}
        present |= {name for found in self.opened.numbers.values() for name in found}
        missing = [name for name in predict.names if name not in present]
        shown = f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}"
        return [f"predict_strategy names tensors that no file has: {shown}"] if missing else []

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """What a rank gets: of unified files only what the target strategy names, in its order, and what none names."""
        found = self.recut.pieces(rank)
        predict = self.arguments.predict
        if predict is None or self.arguments.files is not None:
            return found
        places = {name: place for place, name in enumerate(predict.names)}
        hyper = set(self.opened.names.get(1, ()))
        kept = [piece for piece in found if piece.name in places]
        return (*sorted(kept, key=lambda piece: places[piece.name]), *(p for p in found if p.name in hyper))

    def write(self, directory: str, output_format: str, modes: Modes) -> None:
        """One file for each rank, or for one. Collective."""
        rank = self.arguments.rank
        ranks = range(self.recut.nranks) if rank is None else [rank]

        def specs() -> list[OutputSpec]:
            paths = {r: os.path.join(directory, f"rank_{r}", f"net.{output_format}") for r in ranks}
            return [OutputSpec(path, self.pieces(r), self.recut.numbers(r)) for r, path in paths.items()]

        outputs = self.group.run(specs)
        form, opened = FORMATS[output_format], self.opened
        write_files(self.group, self.fs, opened.manifest, opened.root, outputs, form, modes=modes)

    def arrays(self, network: State | None) -> dict[str, Any]:
        """This rank's arrays. Not collective."""
        rank = self.arguments.rank if self.arguments.rank is not None else self.group.rank
        rank = rank if self.arguments.predict is not None else 0
        pieces = self.pieces(rank)
        if network is not None and self.arguments.predict is None:
            pieces = _own_boxes(pieces, flatten(as_state(network), writable=True))
        source = Source(self.fs, self.opened.root, self.opened.root, self.opened.manifest, None)
        with BoxReading(source).start([(piece.tensor, piece.box) for piece in pieces]) as batch:
            found = dict(zip((piece.name for piece in pieces), batch.arrays(), strict=True))
        return {**found, **self.recut.numbers(rank)}


def _own_boxes(pieces: Sequence[Piece], flat: FlatState) -> tuple[Piece, ...]:
    """Read only what a leaf of the same name and shape holds."""
    boxes: dict[tuple[str, tuple[int, ...]], Box] = {}
    for leaf in flat.tensors:
        if not leaf.per_rank:
            found = [Box(tuple(piece.offsets), tuple(piece.shape)) for piece in leaf.pieces]
            if len(found) == 1:
                boxes[leaf.name, tuple(leaf.global_shape)] = found[0]
    return tuple(
        replace(piece, box=boxes.get((piece.name, piece.box.shape), piece.box))
        if piece.box == whole(piece.box.shape)
        else piece
        for piece in pieces
    )
