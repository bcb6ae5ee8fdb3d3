"""`load_checkpoint`: one file or step directory, ours or MindSpore's, whole or just this rank's boxes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parckpt.comm.launch import SELF, resolve
from parckpt.comm.wait import Waiter
from parckpt.core.flat import FlatState
from parckpt.core.state import State, flatten
from parckpt.core.strategy import Strategy
from parckpt.core.target import Selection
from parckpt.engine import foreign, notyet
from parckpt.engine.catalog import Found, find_at, load_manifest, scan
from parckpt.engine.group import Group
from parckpt.engine.local import as_state
from parckpt.engine.restorer import Request, Restored, Restorer
from parckpt.engine.rounds import compare_arguments
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
from parckpt.strategies import as_strategy, name_of

__all__ = ["load_checkpoint"]

_TIMEOUT_S = 1800.0


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
    strategy: Strategy | str | os.PathLike[str] | None = None,
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
    strategy : Strategy or str, optional
        MindSpore's strategy, or its file: how the ``rank_<n>`` files of a directory fit together. Not used for what
        has a manifest, and for a single file.

    Returns
    -------
    dict
        Arrays by name; strings as ``str``; MindSpore's map parameters as [keys, values, status]. What belongs to one
        rank is called ``<name>@rank_<r>``.

    Raises
    ------
    CheckpointNotFoundError, FormatError, IntegrityError, StateMismatchError
    """
    del dec_mode, remove_redundancy  # of no effect without a key; what is missing in a rank's file is in the others'
    notyet.refuse(enc_key=dec_key)
    fs = filesystem if filesystem is not None else PosixFileSystem()
    path = os.fspath(ckpt_file_name)
    if not isinstance(path, str):
        raise ConfigTypeError(f"ckpt_file_name must be a str, not {type(path).__name__}")
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {format!r}", parameter="format")
    keep = _chooser(filter_prefix, specify_prefix, choice_func)
    group = Group(resolve(SELF if comm is None else comm, os.environ), Waiter(agree_timeout_s))
    try:
        with deferred_interrupt():
            loading = _Loading(group, fs, os.path.abspath(path), keep, strict_load, crc_check, format, strategy)
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
    strategy: Strategy | str | os.PathLike[str] | None

    def run(self, net: State | None, allow_unverified: bool | None) -> dict[str, Any]:
        flats: list[FlatState | None] = []
        strategy: Strategy | None = None
        error: Exception | None = None
        try:
            flats.append(None if net is None else flatten(as_state(net), writable=True))
            strategy = as_strategy(self.strategy, self.fs) if self.group.is_root else None
            self._check(allow_unverified, strategy)
        except Exception as problem:  # the other ranks wait for the outcome
            if self.group.size == 1:
                raise
            error = problem
        self.group.agree(error)
        given = {"ckpt_file_name": self.path, "strict_load": self.strict_load, "crc_check": self.crc_check}
        given["strategy"] = name_of(self.strategy)
        compare_arguments(self.group, given)
        flat = flats[0]
        if flat is None and self.group.size == 1 and _is_foreign_file(self.fs, self.path):
            return foreign.load_all(self.fs, self.path, self.format, self.keep)
        restorer = Restorer(
            self.group, self.fs, os.path.dirname(self.path), "", nothing_found=lambda: None, may_mark=False
        )
        selection = Selection(strict=False, cast=not self.strict_load, choose=self.keep)
        request = Request(selection, path=self.path, allow_inconsistent=True, form=self.format, strategy=strategy)
        restored = restorer.restore(flat, request)
        return self._everything(restored) if flat is None else self._of_state(flat, restored)

    def _everything(self, restored: Restored) -> dict[str, Any]:
        """Whole tensors, then what else the file holds; what belongs to one rank as ``<name>@rank_<r>``."""
        progress = restored.progress
        found: dict[str, Any] = dict(progress.state)
        plain: dict[str, Any] = {**progress.values, **progress.append_dict}
        for name, by_rank in progress.per_rank.items():
            labels = [f"{name}@rank_{rank}" for rank in restored.owners[name]]
            plain.update({label: by_rank[place] for place, label in enumerate(labels) if self.keep(label)})
        found.update({name: _as_loaded(value) for name, value in plain.items() if self.keep(name)})
        return found

    def _of_state(self, flat: FlatState, restored: Restored) -> dict[str, Any]:
        """The arrays that were filled, by name; allocated ones where the state has a `Spec`."""
        names = [leaf.name for leaf in flat.tensors if self.keep(leaf.name)]
        held = {leaf.name: _one(leaf.pieces) for leaf in flat.tensors}
        missing = set(restored.progress.missing)
        return {name: restored.arrays.get(name, held[name]) for name in names if name not in missing}

    def _check(self, allow_unverified: bool | None, strategy: Strategy | None) -> None:
        stat = try_stat(self.fs, self.path)
        if stat is None:
            raise CheckpointNotFoundError(f"there is no checkpoint at {self.path}", path=self.path)
        found = find_at(self.fs, self.path)
        if found is None and not allow_unverified:
            self._unverified(allow_unverified)
        if self.crc_check:
            self._check_crc(found, stat.is_dir, strategy if stat.is_dir else None)

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
            warnings.warn(message, StateWarning, stacklevel=5)

    def _check_crc(self, found: Found | None, is_dir: bool, strategy: Strategy | None) -> None:
        if not self.group.is_root:
            return
        manifest = load_manifest(self.fs, found) if found is not None else None
        if manifest is None:
            manifest = foreign.open_foreign(self.fs, self.path, check=False, form=self.format, strategy=strategy)
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
