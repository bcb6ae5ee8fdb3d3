"""Choosing a checkpoint and filling the state from it, on all ranks together.

A checkpoint is left for an older one only on proof of damage. Everything else (a wrong state, a refused file, a newer
format) raises, and a fresh start is an answer only where nothing was ever published.
"""

from __future__ import annotations

import json
import logging
import os
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
from parckpt.engine.catalog import Found, find_at, load_manifest, scan
from parckpt.engine.exchange import restore_arrays
from parckpt.engine.filling import Filling, make_filling
from parckpt.engine.group import Group
from parckpt.engine.progress import PerRankArrays, Progress
from parckpt.engine.reading import read_box
from parckpt.errors import (
    CheckpointGoneError,
    CheckpointNotFoundError,
    FormatError,
    IntegrityError,
    ParckptError,
    StorageError,
    UnsupportedVersionError,
)
from parckpt.storage.atomic import write_file
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["Request", "Restored", "Restorer"]

log = logging.getLogger("parckpt")


@dataclass(frozen=True)
class Request:
    """What `restore` was asked for."""

    selection: Selection = field(default_factory=Selection)
    step: int | None = None
    path: str | None = None
    fallback: bool = True
    atomic: bool = False
    min_step: int | None = None
    allow_inconsistent: bool = False


@dataclass(frozen=True)
class Restored:
    """Progress, and the facts of what was restored (None for a fresh start)."""

    progress: Progress
    facts: Facts | None
    is_foreign: bool = False


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
    """Restores of one directory and family.

    Parameters
    ----------
    nothing_found : callable
        Root, when there is no checkpoint: returns if a fresh start is right, raises if not.
    may_mark : bool
        Whether damaged checkpoints may be set aside (the lock is held).
    """

    def __init__(
        self,
        group: Group,
        fs: FileSystem,
        directory: str,
        family: str,
        *,
        nothing_found: Callable[[], None],
        may_mark: bool,
    ) -> None:
        self.group, self.fs, self.directory, self.family = group, fs, directory, family
        self._nothing_found, self._may_mark = nothing_found, may_mark
        self._skipped: list[tuple[str, str]] = []
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
            The same on all ranks. ``state_touched`` lists tensors that were overwritten already.
        """
        self._skipped, self._touched = [], set()
        candidates = self._agreed(lambda: self._candidates(request)) if self.group.is_root else self._agreed(list)
        while True:
            choice = self._choose(candidates, request)
            if choice.manifest is None:
                return self._fresh(flat)
            try:
                return self._fill(flat, request, choice, choice.manifest)
            except (IntegrityError, CheckpointGoneError) as error:
                self._give_up_on(choice, error, request)

    def _agreed(self, step: Callable[[], Any]) -> Any:
        """Run something on this rank and raise on all ranks if it fails on any."""
        result, error = None, None
        try:
            result = step()
        except Exception as problem:  # the other ranks wait for the outcome
            error = problem
        self.group.agree(error)
        return result

    # -- choosing, on root ---------------------------------------------------------------------------------------

    def _candidates(self, request: Request) -> list[Found]:
        """Checkpoints to try, best first."""
        if request.path is not None:
            stat = try_stat(self.fs, request.path)
            if stat is None:
                raise CheckpointNotFoundError(f"there is no checkpoint at {request.path}", path=request.path)
            return [find_at(self.fs, request.path) or _foreign_at(request.path, stat.is_dir)]
        everything = scan(self.fs, self.directory, self.family)
        usable = [one for one in everything if self._usable(one, request)]
        if request.step is not None:
            usable = [one for one in usable if one.facts is not None and one.facts.step == request.step]
            if not usable:
                steps = sorted({one.facts.step for one in everything if one.facts is not None})
                raise CheckpointNotFoundError(
                    f"no usable checkpoint of step {request.step} of {self.family!r} in {self.directory}; "
                    f"there are steps {steps}{self._reasons()}",
                    step=request.step,
                    steps=steps,
                )
        if everything and not usable:
            raise self._nothing_usable()
        if not everything:
            if request.min_step is not None:
                raise CheckpointNotFoundError(
                    f"no checkpoint at or after step {request.min_step} in {self.directory}", min_step=request.min_step
                )
            self._nothing_found()
        return usable

    def _usable(self, found: Found, request: Request) -> bool:
        facts = found.facts
        if found.set_aside is not None:
            self._skipped.append((found.path, f"set aside: {found.set_aside}"))
        elif facts is not None and not facts.consistent and not request.allow_inconsistent:
            self._skipped.append(
                (found.path, "not known to be one step of all ranks (allow_inconsistent=True takes it)")
            )
        elif facts is not None and request.min_step is not None and facts.step < request.min_step:
            self._skipped.append((found.path, f"step {facts.step} is before min_step={request.min_step}"))
        else:
            return True
        return False

    def _choose(self, candidates: list[Found] | None, request: Request) -> _Choice:
        """Root takes the next candidate whose manifest holds; all ranks get it."""
        payload: list[bytes] = []

        def step() -> None:
            if self.group.is_root:
                assert candidates is not None
                payload.append(self._next(candidates, request))

        self._agreed(step)
        data = self.group.bcast(payload[0] if payload else None)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if header["fresh"]:
            return _Choice(header, None)
        manifest = Manifest.decode(data[8 + length :], header["path"])
        if header["foreign"]:
            manifest = foreign.without_checksums(manifest)
        return _Choice(header, manifest)

    def _next(self, candidates: list[Found], request: Request) -> bytes:
        tried = bool(candidates)
        while candidates:
            found = candidates.pop(0)
            try:
                is_foreign = found.stem == _FOREIGN
                manifest = foreign.open_foreign(self.fs, found.path) if is_foreign else load_manifest(self.fs, found)
            except (IntegrityError, CheckpointGoneError) as error:
                self._skip(found, error, request)
                continue
            except UnsupportedVersionError:
                raise
            except FormatError as error:
                if found.stem == _FOREIGN:
                    raise
                self._skip(found, error, request)
                continue
            return _packed(
                {
                    "fresh": False,
                    "foreign": is_foreign,
                    "path": found.path,
                    "root": found.root,
                    "manifest_path": found.manifest_path or None,
                },
                manifest,
            )
        if tried or self._skipped:
            raise self._nothing_usable()
        return _packed({"fresh": True}, None)

    def _skip(self, found: Found, error: ParckptError, request: Request) -> None:
        if not request.fallback:
            raise error
        self._skipped.append((found.path, error.message))
        log.warning("skipping %s: %s", found.path, error.message)

    def _nothing_usable(self) -> ParckptError:
        return IntegrityError(
            f"none of the checkpoints of {self.family!r} in {self.directory} can be loaded{self._reasons()}",
            skipped=[list(item) for item in self._skipped],
        )

    def _reasons(self) -> str:
        return "".join(f"\n  {path}: {why}" for path, why in self._skipped)

    # -- filling, on all ranks -----------------------------------------------------------------------------------

    def _fill(self, flat: FlatState | None, request: Request, choice: _Choice, manifest: Manifest) -> Restored:
        facts, contents = manifest.facts, manifest.contents
        state: list[FlatState] = []
        matched: list[Matched] = []
        filling: list[Filling] = []

        def prepare() -> None:
            state.append(flat if flat is not None else _everything(contents))
            matched.append(
                match(
                    state[0],
                    contents,
                    facts.values,
                    facts.per_rank_values,
                    saved_world_size=facts.world_size,
                    rank=self.group.rank,
                    world_size=self.group.size,
                    selection=request.selection,
                )
            )

        def allocate() -> None:
            if error := matched[0].error(choice.path, request.selection.strict):
                raise error
            filling.append(make_filling(contents, matched[0], atomic=request.atomic))

        self._agreed(prepare)
        named = self.group.allgather_distinct(np.array(matched[0].named, "<i8").tobytes())[0]
        extra = unexpected(contents, np.frombuffer(b"".join(named), "<i8").tolist(), request.selection)
        matched[0] = replace(matched[0], unexpected=() if flat is None else extra)
        self._agreed(allocate)
        wants = self._exchange_wants(contents, filling[0].wants)
        plan = plan_reads(contents, wants)
        outcome = restore_arrays(
            self.group, self.fs, choice.root, contents, plan, filling[0].ports, manifest_path=choice.manifest_path
        )
        if not request.atomic:
            self._touched |= set(outcome.touched)
        self.group.agree(outcome.error)
        rebuilt = self._agreed(
            lambda: filling[0].finish(state[0], matched[0], facts.per_rank_values, self.group.rank, self.group.size)
        )
        self._share_skipped()
        return Restored(self._progress(choice, manifest, matched[0], rebuilt), facts, bool(choice.header["foreign"]))

    def _exchange_wants(self, contents: Contents, wants: Sequence[Want]) -> list[list[Want]]:
        numbers = [n for want in wants for n in (want.tensor, *want.box.offsets, *want.box.shape)]
        distinct, index = self.group.allgather_distinct(np.array(numbers, "<i8").tobytes())
        parsed = [_parse_wants(contents, np.frombuffer(data, "<i8").tolist()) for data in distinct]
        return [parsed[which] for which in index.tolist()]

    def _give_up_on(self, choice: _Choice, error: ParckptError, request: Request) -> None:
        """Damage was proved while reading: set the checkpoint aside and let the loop go on, or raise."""
        if not request.fallback or request.path is not None:
            self._raise(error)
        self._skipped.append((choice.path, error.message))
        if self.group.is_root:
            log.warning("%s is damaged, trying an older one: %s", choice.path, error.message)
            manifest = choice.manifest
            if self._may_mark and manifest is not None and not isinstance(error, CheckpointGoneError):
                self._set_aside(manifest.facts, error.message)

    def _raise(self, error: ParckptError) -> None:
        touched = self._all_touched()
        if touched:
            error.facts["state_touched"] = touched
        raise error

    def _all_touched(self) -> list[str]:
        reports = self.group.allgather(json.dumps(sorted(self._touched)).encode("utf-8"))
        return sorted({name for report in reports for name in json.loads(report)})

    @property
    def touched(self) -> bool:
        """Whether a failed restore has overwritten some of this rank's arrays."""
        return bool(self._touched)

    def _set_aside(self, facts: Facts, reason: str) -> None:
        mark = os.path.join(self.directory, f".{facts.stem}.bad-{facts.token}")
        try:
            if try_stat(self.fs, mark) is None:
                write_file(self.fs, mark, reason.encode("utf-8", "replace"))
                self.fs.sync_directory(self.directory)
        except StorageError as error:
            log.warning("%s could not be marked as damaged: %s", facts.stem, error)

    def _share_skipped(self) -> None:
        """Root alone saw the manifests that were skipped; all ranks' Progress say the same."""
        data = self.group.bcast(json.dumps(self._skipped).encode("utf-8") if self.group.is_root else None)
        self._skipped = [(path, why) for path, why in json.loads(data)]

    def _fresh(self, flat: FlatState | None) -> Restored:
        self._share_skipped()
        state = flat.rebuild({}, {}) if flat is not None else None
        return Restored(Progress(state=state, skipped=list(self._skipped)), None)

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
            skipped=list(self._skipped),
        )


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


_FOREIGN = "\0foreign"


def _foreign_at(path: str, is_dir: bool) -> Found:
    return Found(path, "", path if is_dir else os.path.dirname(path) or ".", _FOREIGN, None)


def _packed(header: Mapping[str, Any], manifest: Manifest | None) -> bytes:
    text = json.dumps(header).encode("utf-8")
    return len(text).to_bytes(8, "little") + text + (b"" if manifest is None else manifest.encode())


def _everything(contents: Contents) -> FlatState:
    """A state that wants every shared tensor, whole."""
    specs = {t.name: Spec(t.global_shape, t.dtype) for t in contents.tensors if t.per_rank < 0}
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
