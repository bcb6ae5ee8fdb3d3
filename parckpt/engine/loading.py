"""One call of `load_checkpoint`: what was asked for, where it is, how far it can be trusted, and what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parckpt.comm.launch import SELF, resolve
from parckpt.core import netfill, netrules
from parckpt.core.flat import FlatState
from parckpt.core.leaves import Leaf
from parckpt.core.state import State, flatten
from parckpt.core.target import Selection
from parckpt.engine import foreign
from parckpt.engine.catalog import find_at
from parckpt.engine.group import Group
from parckpt.engine.loadargs import Arguments
from parckpt.engine.local import as_state
from parckpt.engine.restorer import Request, Restored, Restorer
from parckpt.engine.rounds import compare_arguments
from parckpt.engine.trust import Trust
from parckpt.errors import ConfigError
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["Loading", "as_loaded", "complaints", "load_own"]


@dataclass(frozen=True)
class Loading:
    """One `load_checkpoint` call.

    Attributes
    ----------
    said : list of str
        What to warn about, on root; filled as it is found.
    """

    group: Group
    fs: FileSystem
    arguments: Arguments
    said: list[str]

    def run(self, net: State | None) -> dict[str, Any]:
        """Load. Collective."""
        arguments = self.arguments
        flat = self.group.run(lambda: self._begin(net))
        given = {
            "ckpt_file_name": arguments.path,
            "strict_load": arguments.strict,
            "crc_check": arguments.crc_check,
            "strategy": arguments.strategy_name,
        }
        compare_arguments(self.group, given)
        if flat is None and self.group.size == 1 and _is_foreign_file(self.fs, arguments.path):
            return self._not_empty(foreign.load_all(self.fs, arguments.path, arguments.format, arguments.keep))
        restorer = Restorer(
            self.group,
            self.fs,
            lambda: (os.path.dirname(arguments.path),),
            "",
            nothing_found=lambda: None,
            may_mark=False,
        )
        if flat is None:
            selection = Selection(strict=False, choose=arguments.keep)
            return self._not_empty(self._everything(restorer.restore(None, self._request(selection))))
        return self._fill(restorer, flat)

    def _begin(self, net: State | None) -> FlatState | None:
        flat = None if net is None else flatten(as_state(net), writable=True)
        Trust(self.fs, self.arguments, self.group.is_root, self.said).check()
        return flat

    def _request(self, selection: Selection) -> Request:
        arguments = self.arguments
        return Request(
            selection,
            path=arguments.path,
            allow_inconsistent=True,
            form=arguments.format,
            strategy=arguments.strategy,
        )

    def _everything(self, restored: Restored) -> dict[str, Any]:
        """Whole tensors, then what else the file holds; what belongs to one rank as ``<name>@rank_<r>``."""
        progress = restored.progress
        found: dict[str, Any] = dict(progress.state)
        plain: dict[str, Any] = {**progress.values, **progress.append_dict}
        for name, by_rank in progress.per_rank.items():
            labels = [f"{name}@rank_{rank}" for rank in restored.owners[name]]
            plain.update({label: by_rank[place] for place, label in enumerate(labels) if self.arguments.keep(label)})
        found.update({name: as_loaded(value) for name, value in plain.items() if self.arguments.keep(name)})
        return found

    def _not_empty(self, found: dict[str, Any]) -> dict[str, Any]:
        if not found:
            raise _nothing_left(self.arguments.path)
        return found

    # -- into a state -------------------------------------------------------------------------------------------------

    def _fill(self, restorer: Restorer, flat: FlatState) -> dict[str, Any]:
        """Fill a state; its arrays by name, allocated ones where it has a `Spec`."""
        pairing = _Pairing(self.arguments)
        selection = Selection(
            strict=False,
            cast=netrules.never if self.arguments.strict else netrules.converts,
            pair=pairing.pair,
            trailing_ones=True,
        )
        restored = restorer.restore(flat, self._request(selection))
        kept = [name for name in restored.progress.append_dict if self.arguments.keep(name)]
        self.group.run(lambda: pairing.check(kept))
        missing = set(restored.progress.missing)
        lacking = [name for name in restored.progress.missing if self.arguments.keep(name)]
        self.said.extend(complaints(self.group, netrules.not_loaded(lacking, {}), pairing.renamed))
        held = {leaf.name: _one(leaf.pieces) for leaf in flat.tensors}
        return {
            leaf.name: restored.arrays.get(leaf.name, held[leaf.name])
            for leaf in flat.tensors
            if leaf.name not in missing
        }


def complaints(group: Group, missing: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """Root: what is to be said of the names that any rank did not find, or found elsewhere. Collective."""
    lacking: dict[str, None] = {}
    together: dict[str, str] = {}
    for data in group.allgather_distinct(json.dumps([list(missing), dict(renamed)]).encode("utf-8"))[0]:
        names, theirs = json.loads(data)
        lacking.update(dict.fromkeys(names))
        together.update(theirs)
    return netfill.complaints(list(lacking), together) if group.is_root else []


def load_own(group: Group, fs: FileSystem, arguments: Arguments, said: list[str]) -> dict[str, Any] | None:
    """Load every rank's own file; None where some rank named a directory, which has what all need. Collective."""
    is_dir = group.run(lambda: (stat := try_stat(fs, arguments.path)) is not None and stat.is_dir)
    if group.reduce_max(np.array([is_dir], np.int64))[0]:
        return None
    alone = Group(resolve(SELF, {}), group.waiter)
    heard: list[str] = []
    loaded = group.run(lambda: Loading(alone, fs, arguments, heard).run(None))
    said += heard if group.is_root else []
    return loaded


@dataclass
class _Pairing:
    """The names of the state and those of the file, of which some are not wanted."""

    arguments: Arguments
    chosen: int = 0
    renamed: dict[str, str] = field(default_factory=dict)

    def pair(self, wanted: Sequence[str], stored: Sequence[str]) -> dict[str, str]:
        kept = [name for name in stored if self.arguments.keep(name)]
        if self.arguments.format == "safetensors" or self.arguments.path.endswith(".safetensors"):
            kept.sort()  # between several prefixes the order decides, and MindSpore has these by name
        self.chosen += len(kept)
        pairs = netrules.pair(wanted, kept, strict=self.arguments.strict)
        self.renamed.update({name: found for name, found in pairs.items() if name != found})
        return pairs

    def check(self, others: Sequence[str]) -> None:
        if not self.chosen and not others:
            raise _nothing_left(self.arguments.path)


def _nothing_left(path: str) -> ConfigError:
    return ConfigError(
        f"nothing of {path} is left to load: it is empty, or filter_prefix, specify_prefix or choice_func drop it all",
        path=path,
    )


def _is_foreign_file(fs: FileSystem, path: str) -> bool:
    stat = try_stat(fs, path)
    return stat is not None and not stat.is_dir and find_at(fs, path) is None


def _one(pieces: Sequence[Any]) -> Any:
    """What the caller handed in for a tensor, in the form in which it was handed in."""
    sources = [_as_given(piece.source) for piece in pieces]
    return sources[0] if len(sources) == 1 else sources


def _as_given(source: Any) -> Any:
    return source.origin if isinstance(source, Leaf) and source.origin is not None else source


def as_loaded(value: Any) -> Any:
    """Numbers become 0-d arrays, as in MindSpore; what arrays cannot hold stays what it is."""
    return np.asarray(value) if isinstance(value, (bool, int, float, np.generic)) and _fits(value) else value


def _fits(value: Any) -> bool:
    return not isinstance(value, int) or -(2**63) <= value < 2**64
