"""Which checkpoint root offers to the ranks, best first, and why others are passed over.

A checkpoint is passed over only on proof of damage, or because the caller's conditions exclude it. Everything else (a
refused file, a newer format) raises, and a fresh start is an answer only where nothing was ever published. Root only;
nothing here is collective.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from parckpt.core import naming
from parckpt.core.manifest import Facts, Manifest
from parckpt.core.strategy import Strategy
from parckpt.core.target import Selection
from parckpt.engine import foreign
from parckpt.engine.catalog import Found, find_at, load_manifest, newest_first, scan
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

__all__ = ["Candidate", "Chooser", "Request"]

log = logging.getLogger("parckpt")


@dataclass(frozen=True)
class Request:
    """What `restore` was asked for.

    Of files without a manifest: ``form`` is their format, by default by the extension; ``strategy`` (root's alone
    counts) says how those of several ranks fit together.
    """

    selection: Selection = field(default_factory=Selection)
    step: int | None = None
    path: str | None = None
    fallback: bool = True
    atomic: bool = False
    min_step: int | None = None
    allow_inconsistent: bool = False
    form: str | None = None
    strategy: Strategy | None = None

    @property
    def is_final(self) -> bool:
        """Whether damage is an error instead of a reason to take another checkpoint."""
        return self.path is not None or not self.fallback

    def objection(self, facts: Facts) -> str | None:
        """Why a checkpoint is not what was asked for."""
        if self.step is not None and facts.step != self.step:
            return f"it is of step {facts.step}, not of step {self.step}"
        if not facts.consistent and not self.allow_inconsistent:
            return "not known to be one step of all ranks (allow_inconsistent=True takes it)"
        return None


@dataclass(frozen=True)
class Candidate:
    """A checkpoint whose manifest and file sizes are right."""

    found: Found
    manifest: Manifest
    is_foreign: bool


class Chooser:
    """The candidates of one restore.

    Parameters
    ----------
    directories : callable
        Those to look into, the first one first.
    family : str
        The prefix as the user gave it.
    any_name : bool
        As `scan`.
    nothing_found : callable
        Called when there is no checkpoint: returns if a fresh start is right, raises if not.
    may_mark : bool
        Whether damaged checkpoints may be set aside (the lock is held).

    Attributes
    ----------
    skipped : list of (str, str)
        Paths that were passed over, and why.
    """

    def __init__(
        self,
        fs: FileSystem,
        directories: Callable[[], Sequence[str]],
        family: str,
        request: Request,
        *,
        any_name: bool = False,
        nothing_found: Callable[[], None],
        may_mark: bool,
    ) -> None:
        self.fs, self.family, self.request = fs, family, request
        self.directories = tuple(directories())
        self._any_name, self._nothing_found, self._may_mark = any_name, nothing_found, may_mark
        self.skipped: list[tuple[str, str]] = []
        self._candidates: list[Found] | None = None

    def next(self) -> Candidate | None:
        """The best one that is left; None for a fresh start.

        Raises
        ------
        CheckpointNotFoundError
            What was asked for is not there, or something was published here and is gone; or the newest is before
            `Request.min_step`: then the directory is not what the caller knows, and no other one of it will do.
        IntegrityError
            There are checkpoints, and all were passed over.
        UnsupportedVersionError, StorageError
            Prove no damage.
        """
        if self._candidates is None:
            self._candidates = self._at_path(self.request.path) if self.request.path is not None else self._listed()
            if not self._candidates and not self.skipped:
                return None
        while self._candidates:
            found = self._candidates.pop(0)
            try:
                return self._open(found)
            except UnsupportedVersionError:
                raise
            except (IntegrityError, FormatError, CheckpointGoneError) as error:
                self.pass_over(found.path, found.facts, error)
        raise self._nothing_usable()

    def pass_over(self, path: str, facts: Facts | None, error: ParckptError) -> None:
        """Go on without a damaged or deleted checkpoint, or raise where the caller wants this one or none.

        Parameters
        ----------
        facts : Facts or None
            Its facts, if they are known: only then it can be marked.
        """
        if self.request.is_final:
            raise error
        self.skipped.append((path, error.message))
        log.warning("%s is passed over for an older one: %s", path, error.message)
        if facts is not None and isinstance(error, IntegrityError) and self._may_mark:
            self._set_aside(path, facts, error.message)

    def _at_path(self, path: str) -> list[Found]:
        stat = try_stat(self.fs, path)
        if stat is None:
            raise CheckpointNotFoundError(f"there is no checkpoint at {path}", path=path)
        return [find_at(self.fs, path) or _foreign_at(path, stat.is_dir)]

    def _listed(self) -> list[Found]:
        """What of the directory can be tried, newest first."""
        everything = newest_first(
            [one for path in self.directories for one in scan(self.fs, path, self.family, any_name=self._any_name)]
        )
        usable = [found for found in everything if self._is_usable(found)]
        if self.request.step is not None and not usable:
            steps = sorted({found.facts.step for found in everything if found.facts is not None})
            raise CheckpointNotFoundError(
                f"no usable checkpoint of step {self.request.step} of {self.family!r} in {self._place}; "
                f"there are steps {steps}{self._reasons()}",
                step=self.request.step,
                steps=steps,
            )
        if everything and not usable:
            raise self._nothing_usable()
        if not everything:
            if self.request.min_step is not None:
                raise CheckpointNotFoundError(
                    f"no checkpoint at or after step {self.request.min_step} in {self._place}",
                    min_step=self.request.min_step,
                )
            self._nothing_found()
        return usable

    def _is_usable(self, found: Found) -> bool:
        facts = found.facts
        if facts is None:
            self._judge_unreadable(found)
        elif found.set_aside is not None:
            if self.request.step in (None, facts.step):
                self.skipped.append((found.path, f"set aside: {found.set_aside}"))
        elif objection := self.request.objection(facts):
            if self.request.step in (None, facts.step):
                self.skipped.append((found.path, objection))
        else:
            return True
        return False

    def _judge_unreadable(self, found: Found) -> None:
        """Nobody knows how new it is: it may be the newest, so it is reported, or raised where that matters."""
        error = found.error or IntegrityError(f"{found.path} is unreadable", path=found.path)
        if isinstance(error, UnsupportedVersionError) and self.request.step is None:
            raise error
        if self.request.is_final and self.request.step is None:
            raise error
        self.skipped.append((found.path, error.message))
        log.warning("%s is passed over: %s", found.path, error.message)

    def _open(self, found: Found) -> Candidate:
        is_foreign = found.stem == _FOREIGN
        if is_foreign:
            is_dir = found.root == found.path
            strategy = self.request.strategy if is_dir else None
            manifest = foreign.open_foreign(self.fs, found.path, form=self.request.form, strategy=strategy)
        else:
            manifest = load_manifest(self.fs, found)
        if objection := self.request.objection(manifest.facts):  # else only a path, which was not listed
            raise CheckpointNotFoundError(f"{found.path}: {objection}", path=found.path)
        self._check_not_older(found.path, manifest.facts.step)
        return Candidate(found, manifest, is_foreign)

    def _check_not_older(self, path: str, step: int) -> None:
        least = self.request.min_step
        if least is not None and step < least:
            raise CheckpointNotFoundError(
                f"{path}: step {step} is before min_step={least}, and no other is taken instead: was the directory "
                f"rolled back?{self._reasons()}",
                path=path,
                step=step,
                min_step=least,
            )

    def _nothing_usable(self) -> ParckptError:
        return IntegrityError(
            f"none of the checkpoints of {self.family!r} in {self._place} can be loaded{self._reasons()}",
            skipped=[list(item) for item in self.skipped],
        )

    def _reasons(self) -> str:
        return "".join(f"\n  {path}: {why}" for path, why in self.skipped)

    def is_here(self, path: str) -> bool:
        """Whether a checkpoint is in one of the directories."""
        return os.path.dirname(path) in self.directories

    @property
    def _place(self) -> str:
        more = len(self.directories) - 1
        return self.directories[0] + (f" and {more} more director{'ies' if more > 1 else 'y'}" if more else "")

    def _set_aside(self, path: str, facts: Facts, reason: str) -> None:
        directory = os.path.dirname(path)
        mark = os.path.join(directory, naming.bad_name(facts.stem, facts.token))
        try:
            if try_stat(self.fs, mark) is None:
                # Whoever may read the checkpoint must be able to read that it is bad.
                mode = self.fs.stat(path).mode & 0o666
                write_file(self.fs, mark, reason.encode("utf-8", "replace"), mode)
                self.fs.sync_directory(directory)
        except StorageError as error:
            log.warning("%s could not be marked as damaged: %s", facts.stem, error)


_FOREIGN = "\0foreign"


def _foreign_at(path: str, is_dir: bool) -> Found:
    return Found(path, "", path if is_dir else os.path.dirname(path) or ".", _FOREIGN, None)
