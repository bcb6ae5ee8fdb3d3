"""Functions on one checkpoint or one directory: save, load, open, list. Collective only where ``comm`` is given."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.comm.launch import SELF, launched_by, resolve
from parckpt.comm.wait import SystemClock, Waiter
from parckpt.core import appended, values
from parckpt.core.contents import Contents
from parckpt.core.flat import FlatState
from parckpt.core.layout import Box
from parckpt.core.manifest import Facts, Manifest
from parckpt.core.state import State, flatten
from parckpt.core.target import Selection
from parckpt.engine import foreign
from parckpt.engine.catalog import Found, find_at, load_manifest, scan
from parckpt.engine.group import Group
from parckpt.engine.local import LocalState
from parckpt.engine.planning import check_replicas, make_plan, node_numbers
from parckpt.engine.reading import read_box
from parckpt.engine.restorer import Request, Restorer
from parckpt.engine.saver import Saver, Ticket
from parckpt.engine.staging import Modes
from parckpt.engine.sweep import recover
from parckpt.errors import (
    CheckpointNotFoundError,
    ConfigError,
    ConfigTypeError,
    IntegrityError,
    StateWarning,
)
from parckpt.formats.registry import FORMATS
from parckpt.signals import deferred_interrupt
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat
from parckpt.storage.identity import identify
from parckpt.storage.lock import Lock

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "inspect",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
]

_TIMEOUT_S = 1800.0
_LOCK_STALE_S = 600.0

Array = npt.NDArray[Any]


# -- saving -------------------------------------------------------------------------------------------------------


def save_checkpoint(
    save_obj: Any,
    ckpt_file_name: str | os.PathLike[str],
    integrated_save: bool = True,
    async_save: bool | str = False,
    append_dict: Mapping[str, Any] | None = None,
    enc_key: bytes | None = None,
    enc_mode: str = "AES-GCM",
    choice_func: Callable[[str], bool] | None = None,
    crc_check: bool = False,
    format: str = "ckpt",
    *,
    comm: Any = None,
    remove_redundancy: bool = False,
    split_replicas: bool | None = None,
    replica_check: bool = True,
    file_mode: int = 0o600,
    dir_mode: int = 0o700,
    agree_timeout_s: float = _TIMEOUT_S,
    filesystem: FileSystem | None = None,
) -> None:
    """Save a state under a name; what had the name is replaced only when the new one is durable.

    Without ``comm`` this process saves alone, whatever launched it; with ``comm`` the call is collective.

    Parameters
    ----------
    save_obj : mapping, callable, object with ``state_dict()``, or list of ``{"name": ..., "data": ...}``
    ckpt_file_name : str or path-like
        The format's extension is added if it is missing. Several files (``integrated_save=False`` or
        ``remove_redundancy=True`` with ``comm``) become a directory of this name without the extension.
    append_dict : mapping, optional
        Values to store beside the tensors.
    choice_func : callable, optional
        Tensors whose name it maps to False are left out.
    crc_check : bool
        Add MindSpore's checksum. Our own are always on.
    format : {"ckpt", "safetensors"}

    Raises
    ------
    ConfigError
        Impossible arguments; `Shard` or `PerRank` in a launched world without ``comm``.
    LockedError
        Another process is saving under this name.
    ParckptError
        The save failed; the previous file is untouched.
    """
    _refuse_unimplemented(async_save, enc_key)
    form = _form(format)
    fs = filesystem if filesystem is not None else PosixFileSystem()
    path = _file_path(ckpt_file_name, form.extension)
    group = Group(resolve(SELF if comm is None else comm, os.environ), Waiter(agree_timeout_s))
    try:
        with deferred_interrupt():
            several = comm is not None and (remove_redundancy or not integrated_save)
            saving = _Saving(
                group,
                fs,
                path,
                form,
                integrated=not several,
                remove_redundancy=remove_redundancy,
                split_replicas=remove_redundancy if split_replicas is None else split_replicas,
                crc_check=crc_check,
                replica_check=replica_check,
                modes=Modes(file_mode, dir_mode),
            )
            saving.run(lambda: _flat_to_save(save_obj, choice_func, comm), dict(append_dict or {}))
    finally:
        group.comm.free()


@dataclass(frozen=True)
class _Saving:
    """One `save_checkpoint` call."""

    group: Group
    fs: FileSystem
    path: str
    form: Any
    integrated: bool
    remove_redundancy: bool
    split_replicas: bool
    crc_check: bool
    replica_check: bool
    modes: Modes

    def run(self, flatten_state: Callable[[], FlatState], append: dict[str, Any]) -> None:
        directory, name = os.path.split(self.path)
        stem = name[: -len(self.form.extension)]
        locals_: list[LocalState] = []
        locks: list[Lock] = []
        try:
            self._agreed(lambda: locals_.append(LocalState.of(flatten_state())))
            local = locals_[0]
            planned = make_plan(
                self.group,
                local,
                node_numbers(self.group),
                integrated=self.integrated,
                remove_redundancy=self.remove_redundancy,
                split_replicas=self.split_replicas,
            )
            if self.replica_check:
                check_replicas(self.group, local, planned)
            attempt = self.group.bcast(secrets.token_bytes(16) if self.group.is_root else None).hex()
            saver = Saver(
                self.group,
                self.fs,
                SystemClock(),
                directory,
                self.form,
                crc_check=self.crc_check,
                modes=self.modes,
                check=lambda: locks[0].check(),
            )
            strings = {leaf.name: leaf.value for leaf in local.flat.values if isinstance(leaf.value, str)}
            ticket = Ticket(self._facts(stem, attempt, append), True, appended.settle({**strings, **append}, 0, 0))
            self._on_root(lambda: self._begin(directory, stem, attempt, locks, saver, planned, ticket))
            saver.save(local, planned, ticket)
        finally:
            for lock in locks:
                lock.release()

    def _begin(
        self, directory: str, stem: str, attempt: str, locks: list[Lock], saver: Saver, planned: Any, ticket: Ticket
    ) -> None:
        identity = identify(os.environ, attempt)
        locks.append(
            Lock.acquire(self.fs, directory, stem, identity, SystemClock(), _LOCK_STALE_S, mode=self.modes.file)
        )
        recover(self.fs, directory, lambda other: other == stem, locks[0].check, self.modes)
        try:
            saver.begin(planned, ticket)
        except Exception as error:
            saver.reject(saver.staging(ticket), error)
            raise

    def _facts(self, stem: str, attempt: str, append: Mapping[str, Any]) -> Facts:
        step = append.get("step_num", 0)
        epoch = append.get("epoch_num", 0)
        return Facts(
            stem=stem,
            token=attempt[:16],
            attempt=attempt,
            run_id=attempt,
            family=stem,
            prefix=stem,
            sequence=1,
            step=step if type(step) is int and step >= 0 else 0,
            epoch=epoch if type(epoch) is int and epoch >= 0 else 0,
            step_in_epoch=0,
            world_size=self.group.size,
            format=self.form.name,
            integrated=self.integrated,
            created=SystemClock().wall(),
            reason="save_checkpoint",
            remove_redundancy=self.remove_redundancy,
            crc_check=self.crc_check,
        )

    def _on_root(self, step: Callable[[], None]) -> None:
        self._agreed(step if self.group.is_root else lambda: None)

    def _agreed(self, step: Callable[[], None]) -> None:
        error: Exception | None = None
        try:
            step()
        except Exception as problem:  # the other ranks wait for the outcome
            error = problem
        if self.group.size == 1 and error is not None:
            raise error
        self.group.agree(error)


def _flat_to_save(save_obj: Any, choice_func: Callable[[str], bool] | None, comm: Any) -> FlatState:
    flat = flatten(_as_state(save_obj), writable=False)
    if comm is None:
        _refuse_parts(flat)
    if choice_func is None:
        return flat
    tensors = tuple(leaf for leaf in flat.tensors if choice_func(leaf.name))
    plain = tuple(leaf for leaf in flat.values if choice_func(leaf.name))
    return replace(flat, tensors=tensors, values=plain)


def _refuse_parts(flat: FlatState) -> None:
    variable, size = launched_by(os.environ)
    if size == 1:
        return
    parts = [leaf.name for leaf in flat.tensors if leaf.split or leaf.per_rank]
    parts += [leaf.name for leaf in flat.values if leaf.per_rank]
    if parts:
        raise ConfigError(
            f"{parts[0]!r} is a Shard or PerRank, and {variable}={size} says that there are other ranks: "
            "pass comm=MPI.COMM_WORLD to save all of them together, or comm=parckpt.SELF for this process alone"
        )


def _as_state(save_obj: Any) -> State:
    if isinstance(save_obj, list):
        state: dict[str, Any] = {}
        for item in save_obj:
            if not isinstance(item, Mapping) or not isinstance(item.get("name"), str) or "data" not in item:
                raise ConfigTypeError("a list to save must hold {'name': str, 'data': array} items")
            state[item["name"]] = item["data"]
        return state
    if isinstance(save_obj, Mapping):
        return save_obj
    if hasattr(save_obj, "state_dict"):
        found: State = save_obj.state_dict()
        return found
    if callable(save_obj):
        return save_obj  # type: ignore[no-any-return]  # flatten checks what it returns
    raise ConfigTypeError(f"save_obj must be a mapping, a callable or have state_dict(), not {type(save_obj).__name__}")


def _file_path(name: str | os.PathLike[str], extension: str) -> str:
    path = os.fspath(name)
    if not isinstance(path, str):
        raise ConfigTypeError(f"ckpt_file_name must be a str, not {type(name).__name__}")
    if not os.path.basename(path):
        raise ConfigError(f"ckpt_file_name {path!r} has no file name")
    path = path if path.endswith(extension) else path + extension
    if os.path.basename(path) == extension:
        raise ConfigError(f"ckpt_file_name {path!r} has no name before the extension")
    return os.path.abspath(path)


def _form(name: Any) -> Any:
    if name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {name!r}", parameter="format")
    return FORMATS[name]


def _refuse_unimplemented(async_save: Any, key: Any) -> None:
    if async_save:
        raise NotImplementedError("async_save is not implemented yet")
    if key is not None:
        raise NotImplementedError("encryption is not implemented yet")


# -- loading ------------------------------------------------------------------------------------------------------


def load_checkpoint(
    ckpt_file_name: str | os.PathLike[str],
    net: State | None = None,
    strict_load: bool = False,
    filter_prefix: str | Sequence[str] | None = None,
    dec_key: bytes | None = None,
    dec_mode: str = "AES-GCM",
    specify_prefix: str | Sequence[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    crc_check: bool = False,
    remove_redundancy: bool = False,
    format: str | None = None,
    *,
    comm: Any = None,
    allow_unverified: bool | None = None,
    agree_timeout_s: float = _TIMEOUT_S,
    filesystem: FileSystem | None = None,
) -> dict[str, Any]:
    """Load one file or step directory, ours or MindSpore's.

    Parameters
    ----------
    net : mapping or callable, optional
        A state to fill in place; with ``comm`` each rank gets just its boxes. Without it full arrays are returned.
    strict_load : bool
        Refuse other element types instead of converting them.
    filter_prefix, specify_prefix : str or list of str, optional
        Drop, or keep only, names that begin so.
    crc_check : bool
        Verify MindSpore's own checksum, and refuse a file without one.
    format : str, optional
        Default: by the extension.
    allow_unverified : bool, optional
        A file without a manifest cannot be verified. None: warn, but refuse in a directory where parckpt has
        published; True: say nothing; False: refuse.

    Returns
    -------
    dict
        Arrays by name; strings as ``str``; MindSpore's map parameters as [keys, values, status].

    Raises
    ------
    CheckpointNotFoundError, FormatError, IntegrityError, StateMismatchError
    """
    del dec_mode, remove_redundancy  # of no effect without a key; what is missing in a rank's file is in the others'
    _refuse_unimplemented(False, dec_key)
    fs = filesystem if filesystem is not None else PosixFileSystem()
    path = os.path.abspath(os.fspath(ckpt_file_name))
    keep = _chooser(filter_prefix, specify_prefix, choice_func)
    group = Group(resolve(SELF if comm is None else comm, os.environ), Waiter(agree_timeout_s))
    try:
        with deferred_interrupt():
            loading = _Loading(group, fs, path, keep, strict_load, crc_check, format)
            return loading.run(net, allow_unverified)
    finally:
        group.comm.free()


@dataclass(frozen=True)
class _Loading:
    """One `load_checkpoint` call."""

    group: Group
    fs: FileSystem
    path: str
    keep: Callable[[str], bool]
    strict_load: bool
    crc_check: bool
    format: str | None

    def run(self, net: State | None, allow_unverified: bool | None) -> dict[str, Any]:
        flats: list[FlatState | None] = []
        error: Exception | None = None
        try:
            flats.append(None if net is None else flatten(_as_state(net), writable=True))
            self._check(allow_unverified)
        except Exception as problem:  # the other ranks wait for the outcome
            if self.group.size == 1:
                raise
            error = problem
        self.group.agree(error)
        flat = flats[0]
        if flat is None and self.group.size == 1 and _is_foreign_file(self.fs, self.path):
            return foreign.load_all(self.fs, self.path, self.format, self.keep)
        if flat is not None:
            flat = replace(flat, tensors=tuple(leaf for leaf in flat.tensors if self.keep(leaf.name)))
        restorer = Restorer(
            self.group, self.fs, os.path.dirname(self.path), "", nothing_found=lambda: None, may_mark=False
        )
        selection = Selection(strict=False, cast=not self.strict_load)
        restored = restorer.restore(flat, Request(selection, path=self.path, fallback=False))
        progress = restored.progress
        if flat is not None:
            return {leaf.name: _one(leaf.pieces) for leaf in flat.tensors if leaf.name not in progress.missing}
        found = dict(progress.state)
        found.update({name: _as_loaded(value) for name, value in {**progress.values, **progress.append_dict}.items()})
        return {name: value for name, value in found.items() if self.keep(name)}

    def _check(self, allow_unverified: bool | None) -> None:
        stat = try_stat(self.fs, self.path)
        if stat is None:
            raise CheckpointNotFoundError(f"there is no checkpoint at {self.path}", path=self.path)
        found = find_at(self.fs, self.path)
        if found is None and not allow_unverified:
            self._unverified(allow_unverified)
        if self.crc_check:
            self._check_crc(found, stat.is_dir)

    def _unverified(self, allow: bool | None) -> None:
        """A deleted manifest must not turn a verified checkpoint into one that anybody could have changed."""
        directory = os.path.dirname(self.path)
        if allow is False or scan(self.fs, directory):
            raise IntegrityError(
                f"{self.path} has no manifest, so nothing in it can be verified"
                + ("; parckpt has published in this directory" if allow is None else "")
                + ": pass allow_unverified=True to load it all the same",
                path=self.path,
            )
        if self.group.is_root:
            message = f"{self.path} has no manifest: it is loaded without verification"
            warnings.warn(message, StateWarning, stacklevel=6)

    def _check_crc(self, found: Found | None, is_dir: bool) -> None:
        if not self.group.is_root:
            return
        manifest = load_manifest(self.fs, found) if found is not None else None
        if manifest is None:
            manifest = foreign.open_foreign(self.fs, self.path)
        root = self.path if is_dir else os.path.dirname(self.path)
        for file in manifest.contents.files:
            path = os.path.join(root, file.path if is_dir else os.path.basename(self.path))
            index, _ = foreign.index_file(self.fs, path, self.format)
            foreign.verify_crc(self.fs, path, index, required=True)


def _is_foreign_file(fs: FileSystem, path: str) -> bool:
    stat = try_stat(fs, path)
    return stat is not None and not stat.is_dir and find_at(fs, path) is None


def _one(pieces: Sequence[Any]) -> Any:
    sources = [piece.source for piece in pieces]
    return sources[0] if len(sources) == 1 else sources


def _as_loaded(value: Any) -> Any:
    """Numbers become 0-d arrays, as in MindSpore; what arrays cannot hold stays what it is."""
    return np.asarray(value) if isinstance(value, (bool, int, float, np.generic)) and _fits(value) else value


def _fits(value: Any) -> bool:
    return not isinstance(value, int) or -(2**63) <= value < 2**64


def _chooser(
    filter_prefix: str | Sequence[str] | None,
    specify_prefix: str | Sequence[str] | None,
    choice_func: Callable[[str], bool] | None,
) -> Callable[[str], bool]:
    dropped, kept = _prefixes("filter_prefix", filter_prefix), _prefixes("specify_prefix", specify_prefix)
    if dropped or kept:
        return lambda name: not name.startswith(dropped or ("\0",)) and (not kept or name.startswith(kept))
    return choice_func if choice_func is not None else lambda name: True


def _prefixes(name: str, given: str | Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    prefixes = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(prefix, str) for prefix in prefixes):
        raise ConfigTypeError(f"{name} must be a str or a list of str", parameter=name)
    if not all(prefixes):
        raise ConfigError(f"{name} must not be empty", parameter=name)
    return prefixes


# -- looking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known of a checkpoint without reading its data.

    Attributes
    ----------
    path : str
    step, epoch, step_in_epoch, sequence : int
    prefix, format, reason, kind : str
    created : float
        Wall clock, seconds since the epoch.
    world_size, nbytes, tensors : int
        Ranks that saved it, bytes of its data files, number of tensors.
    integrated, consistent : bool
    problem : str or None
        Why it cannot be loaded, as far as that is seen without reading data.
    """

    path: str
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    sequence: int = 0
    prefix: str = ""
    format: str = ""
    reason: str = ""
    kind: str = ""
    created: float = 0.0
    world_size: int = 0
    nbytes: int = 0
    tensors: int = 0
    integrated: bool = True
    consistent: bool = True
    problem: str | None = None


def list_checkpoints(
    directory: str | os.PathLike[str], *, prefix: str | None = None, filesystem: FileSystem | None = None
) -> list[CheckpointInfo]:
    """List the published checkpoints of a directory, newest first; unreadable ones last. Not collective."""
    fs = filesystem if filesystem is not None else PosixFileSystem()
    return [_info(found) for found in scan(fs, os.path.abspath(os.fspath(directory)), prefix)]


def latest_checkpoint(
    directory: str | os.PathLike[str], *, prefix: str | None = None, filesystem: FileSystem | None = None
) -> str | None:
    """Path of the newest checkpoint that restore would try first; None if there is none. Not collective."""
    usable = [
        info
        for info in list_checkpoints(directory, prefix=prefix, filesystem=filesystem)
        if info.problem is None and info.consistent
    ]
    return usable[0].path if usable else None


def inspect(path: str | os.PathLike[str], *, filesystem: FileSystem | None = None) -> CheckpointInfo:
    """What is known of the checkpoint at a path. Not collective; reads kilobytes.

    Raises
    ------
    CheckpointNotFoundError
        If there is none, or it has no manifest.
    """
    fs = filesystem if filesystem is not None else PosixFileSystem()
    absolute = os.path.abspath(os.fspath(path))
    found = find_at(fs, absolute) if try_stat(fs, absolute) is not None else None
    if found is None:
        raise CheckpointNotFoundError(f"there is no checkpoint with a manifest at {absolute}", path=absolute)
    return _info(found)


def _info(found: Found) -> CheckpointInfo:
    facts = found.facts
    if facts is None:
        return CheckpointInfo(found.path, problem=found.error.message if found.error is not None else "unreadable")
    problem: str | None = found.error.message if found.error is not None else None
    if found.set_aside is not None:
        problem = f"set aside: {found.set_aside}"
    return CheckpointInfo(
        path=found.path,
        step=facts.step,
        epoch=facts.epoch,
        step_in_epoch=facts.step_in_epoch,
        sequence=facts.sequence,
        prefix=facts.prefix,
        format=facts.format,
        reason=facts.reason,
        kind=facts.kind,
        created=facts.created,
        world_size=facts.world_size,
        nbytes=facts.nbytes,
        tensors=facts.tensor_count,
        integrated=facts.integrated,
        consistent=facts.consistent,
        problem=problem,
    )


def open_checkpoint(
    path: str | os.PathLike[str], dec_key: bytes | None = None, *, filesystem: FileSystem | None = None
) -> Checkpoint:
    """Open a file or step directory lazily: only what is indexed is read, and verified. Not collective."""
    _refuse_unimplemented(False, dec_key)
    fs = filesystem if filesystem is not None else PosixFileSystem()
    absolute = os.path.abspath(os.fspath(path))
    if try_stat(fs, absolute) is None:
        raise CheckpointNotFoundError(f"there is no checkpoint at {absolute}", path=absolute)
    found = find_at(fs, absolute)
    if found is not None:
        return Checkpoint(fs, found.path, found.root, load_manifest(fs, found))
    manifest = foreign.without_checksums(foreign.open_foreign(fs, absolute))
    stat = try_stat(fs, absolute)
    root = absolute if stat is not None and stat.is_dir else os.path.dirname(absolute)
    return Checkpoint(fs, absolute, root, manifest)


class Checkpoint(Mapping[str, "StoredArray"]):
    """The tensors of one checkpoint by name; nothing is read before it is indexed.

    Attributes
    ----------
    path : str
    step : int
    values, append_dict : dict
        Plain values, decoded.
    """

    def __init__(self, fs: FileSystem, path: str, root: str, manifest: Manifest) -> None:
        self.path = path
        self._fs, self._root, self._manifest = fs, root, manifest
        facts = manifest.facts
        self.step = facts.step
        self.values_by_name = {name: values.decode(value) for name, value in facts.values.items()}
        self.append_dict = {name: appended.decode(value) for name, value in facts.append.items()}
        contents = manifest.contents
        self._rows = {tensor.file_name: row for row, tensor in enumerate(contents.tensors)}

    def __getitem__(self, name: str) -> StoredArray:
        return StoredArray(self._fs, self._root, self._manifest.contents, self._rows[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: step {self.step}, {len(self)} tensors>"


class StoredArray:
    """One stored tensor: ``c["w"][2:5]`` reads and verifies just the chunks that hold those rows."""

    def __init__(self, fs: FileSystem, root: str, contents: Contents, row: int) -> None:
        self._fs, self._root, self._contents, self._row = fs, root, contents, row

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape."""
        return self._contents.tensors[self._row].global_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self._contents.tensors[self._row].dtype.numpy

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        array: Array = self[...]
        return array if dtype is None else array.astype(dtype)

    def __getitem__(self, index: Any) -> Any:
        """Read a part: integers, slices and ``...``, as in NumPy."""
        offsets, shape, rest = _bounding(self.shape, index)
        array = read_box(self._fs, self._root, self._contents, self._row, Box(offsets, shape))
        return array[rest]

    def __repr__(self) -> str:
        return f"<StoredArray {self._contents.tensors[self._row].name}: {self.dtype}{list(self.shape)}>"


def _bounding(shape: tuple[int, ...], index: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
    """The box that holds everything an index asks for, and the index into that box."""
    items = list(index) if isinstance(index, tuple) else [index]
    if sum(item is Ellipsis for item in items) > 1 or len([i for i in items if i is not Ellipsis]) > len(shape):
        raise IndexError(f"index {index!r} does not fit shape {shape}")
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    items += [slice(None)] * (len(shape) - len(items))
    offsets: list[int] = []
    lengths: list[int] = []
    rest: list[Any] = []
    for item, length in zip(items, shape, strict=True):
        if isinstance(item, slice):
            start, stop, step = item.indices(length)
            chosen = range(start, stop, step)
            low, high = (min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1]) + 1) if len(chosen) else (0, 0)
            offsets.append(low)
            lengths.append(high - low)
            rest.append(slice(None, None, step))
        elif isinstance(item, (int, np.integer)) and not isinstance(item, bool):
            position = int(item) + length if item < 0 else int(item)
            if not 0 <= position < length:
                raise IndexError(f"index {item} is out of range for a dimension of {length}")
            offsets.append(position)
            lengths.append(1)
            rest.append(0)
        else:
            raise TypeError(f"only integers, slices and ... can index a stored array, not {item!r}")
    return tuple(offsets), tuple(lengths), tuple(rest)
