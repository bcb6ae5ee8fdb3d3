"""Filling the state from a checkpoint, on all ranks together; from an older one where the newest is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from parckpt.core import appended, values
from parckpt.core.contents import Contents
from parckpt.core.flat import FlatState
from parckpt.core.layout import Box, whole
from parckpt.core.leaves import Spec
from parckpt.core.manifest import Facts, Manifest
from parckpt.core.readplan import Want, plan_reads
from parckpt.core.state import flatten
from parckpt.core.target import Matched, Selection, match, unexpected
from parckpt.engine import foreign
from parckpt.engine.choosing import Candidate, Chooser, Request
from parckpt.engine.exchange import restore_arrays
from parckpt.engine.filling import Filling, make_filling
from parckpt.engine.group import Group
from parckpt.engine.progress import PerRankArrays, Progress
from parckpt.engine.reading import read_box
from parckpt.errors import (
    CheckpointGoneError,
    IntegrityError,
    ParckptError,
    StateMismatchError,
    TimeoutExpiredError,
)
from parckpt.storage.filesystem import FileSystem

__all__ = ["Request", "Restored", "Restorer"]


@dataclass(frozen=True)
class Restored:
    """What a restore did.

    Attributes
    ----------
    facts : Facts or None
        Of what was restored, if it is of this directory and family: the run then goes on as that one. None for a fresh
        start and for what came from elsewhere.
    arrays : mapping
        What was allocated, by name of the state: an array, or a list of them.
    owners : mapping
        The old ranks that the values of ``progress.per_rank`` belong to, by name.
    """

    progress: Progress
    facts: Facts | None
    arrays: Mapping[str, Any] = field(default_factory=dict)
    owners: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Choice:
    """What root offers the ranks: a checkpoint, or a fresh start."""

    header: Mapping[str, Any]
    manifest: Manifest | None

    @property
    def root(self) -> str:
        return str(self.header["root"])

    @property
    def path(self) -> str:
        return str(self.header["path"])

    @property
    def manifest_path(self) -> str | None:
        found: str | None = self.header["manifest_path"]
        return found


class Restorer:
    """Restores of one run's directories and family.

    Parameters
    ----------
    directories : callable
        Those to look into; asked on root only.
    any_name : bool
        As `scan`.
    nothing_found : callable
        Root, when there is no checkpoint: returns if a fresh start is right, raises if not.
    may_mark : bool
        Whether damaged checkpoints may be set aside (the lock is held).
    """

    def __init__(
        self,
        group: Group,
        fs: FileSystem,
        directories: Callable[[], Sequence[str]],
        family: str,
        *,
        any_name: bool = False,
        nothing_found: Callable[[], None],
        may_mark: bool,
    ) -> None:
        self.group, self.fs, self.directories, self.family = group, fs, directories, family
        self._any_name, self._nothing_found, self._may_mark = any_name, nothing_found, may_mark
        self._touched: set[str] = set()

    def restore(self, flat: FlatState | None, request: Request) -> Restored:
        """Fill the state from the newest checkpoint that is whole. Collective.

        Parameters
        ----------
        flat : FlatState or None
            None: allocate every tensor, whole, on every rank.

        Raises
        ------
        ParckptError
            The same on all ranks. Its fact ``state_touched`` lists the tensors that were overwritten already.
        """
        self._touched = set()
        try:
            return self._restore(flat, request)
        except TimeoutExpiredError as error:
            _tell_touched(error, sorted(self._touched))  # there is nobody left to ask
            raise
        except ParckptError as error:
            _tell_touched(error, self._all_touched())
            raise

    def _restore(self, flat: FlatState | None, request: Request) -> Restored:
        chooser = self._agreed(lambda: self._chooser(request) if self.group.is_root else None)
        while True:
            choice = self._choose(chooser)
            if choice.manifest is None:
                return Restored(Progress(state=None if flat is None else flat.rebuild({}, {})), None)
            try:
                return self._fill(flat, request, choice, choice.manifest)
            except (IntegrityError, CheckpointGoneError) as error:
                if choice.header["final"]:
                    raise
                if chooser is not None:
                    chooser.pass_over(choice.path, choice.manifest.facts, error)

    def _chooser(self, request: Request) -> Chooser:
        return Chooser(
            self.fs,
            self.directories,
            self.family,
            request,
            any_name=self._any_name,
            nothing_found=self._nothing_found,
            may_mark=self._may_mark,
        )

    def _agreed(self, step: Callable[[], Any]) -> Any:
        """Run something on this rank and raise on all ranks if it fails on any."""
        result, error = None, None
        try:
            result = step()
        except Exception as problem:  # the other ranks wait for the outcome
            error = problem
        self.group.agree(error)
        return result

    # -- choosing -------------------------------------------------------------------------------------------------

    def _choose(self, chooser: Chooser | None) -> _Choice:
        """Root, which has the chooser, takes the next candidate; all ranks get its manifest."""
        payload = self._agreed(lambda: None if chooser is None else _packed(chooser.next(), chooser))
        data = self.group.bcast(payload)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if header["fresh"]:
            return _Choice(header, None)
        manifest = Manifest.decode(data[8 + length :], header["path"])
        return _Choice(header, foreign.without_checksums(manifest) if header["foreign"] else manifest)

    # -- filling --------------------------------------------------------------------------------------------------

    def _fill(self, flat: FlatState | None, request: Request, choice: _Choice, manifest: Manifest) -> Restored:
        facts, contents = manifest.facts, manifest.contents
        state: FlatState = self._agreed(lambda: flat or _everything(contents, request.selection))
        matched = self._match(state, request.selection, choice, manifest, is_open=flat is None)
        filling: Filling = self._agreed(lambda: make_filling(contents, matched, atomic=request.atomic))
        plan = plan_reads(contents, self._exchange_wants(contents, filling.wants))
        outcome = restore_arrays(
            self.group, self.fs, choice.root, contents, plan, filling.ports, manifest_path=choice.manifest_path
        )
        self._touched |= filling.overwritten(outcome.touched)
        self.group.agree(outcome.error)
        self._agreed(lambda: filling.settle(matched, facts.per_rank_values, self.group.rank, self.group.size))
        self._touched |= filling.names
        rebuilt = self._agreed(lambda: filling.finish(state))
        progress = self._progress(choice, manifest, matched, rebuilt)
        return Restored(
            progress, facts if self._is_ours(choice, facts) else None, filling.arrays, _owners(facts, contents)
        )

    def _match(
        self, state: FlatState, selection: Selection, choice: _Choice, manifest: Manifest, *, is_open: bool
    ) -> Matched:
        """Compare the state with the checkpoint; what no rank has is unexpected, unless the state ``is_open``."""
        facts, contents = manifest.facts, manifest.contents
        matched: Matched = self._agreed(
            lambda: match(
                state,
                contents,
                facts.values,
                facts.per_rank_values,
                saved_world_size=facts.world_size,
                rank=self.group.rank,
                world_size=self.group.size,
                selection=selection,
            )
        )
        named = self.group.allgather_distinct(np.array(matched.named, "<i8").tobytes())[0]

        def check() -> Matched:
            known = np.frombuffer(b"".join(named), "<i8").tolist()
            found = replace(matched, unexpected=() if is_open else unexpected(contents, known, selection))
            if error := found.error(choice.path, selection.strict):
                raise error
            return found

        checked: Matched = self._agreed(check)
        return checked

    def _exchange_wants(self, contents: Contents, wants: Sequence[Want]) -> list[list[Want]]:
        numbers = [n for want in wants for n in (want.tensor, *want.box.offsets, *want.box.shape)]
        distinct, index = self.group.allgather_distinct(np.array(numbers, "<i8").tobytes())
        parsed = [_parse_wants(contents, np.frombuffer(data, "<i8").tolist()) for data in distinct]
        return [parsed[which] for which in index.tolist()]

    def _is_ours(self, choice: _Choice, facts: Facts) -> bool:
        """Whether the run goes on as the restored one: not with a name and number of another directory's run."""
        elsewhere = choice.header["foreign"] or not choice.header["here"]
        return not elsewhere and facts.family == self.family

    def _all_touched(self) -> list[str]:
        reports = self.group.allgather(json.dumps(sorted(self._touched)).encode("utf-8"))
        return sorted({name for report in reports for name in json.loads(report)})

    def _progress(self, choice: _Choice, manifest: Manifest, matched: Matched, rebuilt: Any) -> Progress:
        facts = manifest.facts
        return Progress(
            step=facts.step,
            epoch=facts.epoch,
            step_in_epoch=facts.step_in_epoch,
            path=choice.path,
            prefix=facts.prefix,
            reason=facts.reason,
            consistent=facts.consistent,
            world_size=facts.world_size,
            append_dict={name: appended.decode(value) for name, value in facts.append.items()},
            values={name: values.decode(value) for name, value in facts.values.items()},
            per_rank=per_rank_mapping(self.fs, choice.root, manifest, choice.manifest_path),
            state=rebuilt,
            missing=list(matched.missing),
            skipped=[(path, why) for path, why in choice.header["skipped"]],
        )


def _tell_touched(error: ParckptError, names: list[str]) -> None:
    """Say in an error what is left of the state."""
    if names:
        error.facts["state_touched"] = names
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        error.message += f"; overwritten already: {', '.join(names[:8])}{more}"
    elif isinstance(error, StateMismatchError):
        error.message += "; nothing was changed"


def _owners(facts: Facts, contents: Contents) -> dict[str, list[int]]:
    found = {name: sorted(int(rank) for rank in by_rank) for name, by_rank in facts.per_rank_values.items()}
    for name, rows in contents.index.items():
        ranks = sorted(contents.tensors[row].per_rank for row in rows if contents.tensors[row].per_rank >= 0)
        if ranks:
            found[name] = ranks
    return found


def per_rank_mapping(
    fs: FileSystem, root: str, manifest: Manifest, manifest_path: str | None
) -> dict[str, Sequence[Any]]:
    """Every rank's value of each per-rank leaf; arrays are read when asked for."""
    found: dict[str, Sequence[Any]] = {}
    for name, by_rank in manifest.facts.per_rank_values.items():
        found[name] = [values.decode(by_rank[key]) for key in sorted(by_rank, key=int)]
    contents = manifest.contents
    for name, rows in contents.index.items():
        rows = [row for row in rows if contents.tensors[row].per_rank >= 0]
        if rows:
            rows.sort(key=lambda row: contents.tensors[row].per_rank)
            found[name] = PerRankArrays(_reader(fs, root, contents, rows, manifest_path), len(rows))
    return found


def _reader(
    fs: FileSystem, root: str, contents: Contents, rows: list[int], manifest_path: str | None
) -> Callable[[int], Any]:
    def read(rank: int) -> Any:
        row = rows[rank]
        box = whole(contents.tensors[row].global_shape)
        return read_box(fs, root, contents, row, box, manifest_path=manifest_path)

    return read


def _packed(candidate: Candidate | None, chooser: Chooser) -> bytes:
    header: dict[str, Any] = {
        "fresh": candidate is None,
        "skipped": chooser.skipped,
        "final": chooser.request.is_final,
    }
    if candidate is not None:
        found = candidate.found
        header |= {
            "foreign": candidate.is_foreign,
            "here": chooser.is_here(found.path),
            "path": found.path,
            "root": found.root,
            "manifest_path": found.manifest_path or None,
        }
    text = json.dumps(header).encode("utf-8")
    return len(text).to_bytes(8, "little") + text + (b"" if candidate is None else candidate.manifest.encode())


def _everything(contents: Contents, selection: Selection) -> FlatState:
    """A state that wants every selected shared tensor, whole."""
    named = {selection.mapped(tensor.name): tensor for tensor in contents.tensors if tensor.per_rank < 0}
    specs = {name: Spec(t.global_shape, t.dtype) for name, t in named.items() if selection.takes(name)}
    return flatten(specs, writable=True)


def _parse_wants(contents: Contents, numbers: list[int]) -> list[Want]:
    wants: list[Want] = []
    position = 0
    while position < len(numbers):
        tensor = numbers[position]
        ndim = len(contents.tensors[tensor].global_shape)
        dims = numbers[position + 1 : position + 1 + 2 * ndim]
        wants.append(Want(tensor, Box(tuple(dims[:ndim]), tuple(dims[ndim:]))))
        position += 1 + 2 * ndim
    return wants
