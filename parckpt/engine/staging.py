"""The unpublished directory of one save, and the acts that publish, abort or discard it.

The order of syncs is the publish protocol; ``docs/format.md`` has it as a table with what a crash at each line leaves.
Nothing here is collective: root and the ranks call their parts, the saver keeps them in order.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from parckpt.core import naming
from parckpt.engine.catalog import manifest_stem, read_facts
from parckpt.errors import CheckpointExistsError, ParckptError, StorageError
from parckpt.storage.atomic import move_new, remove_tree, swap, write_file
from parckpt.storage.filesystem import FileSystem, opened, try_stat

__all__ = ["Modes", "Staging", "discard"]

log = logging.getLogger("parckpt")


@dataclass(frozen=True)
class Modes:
    """Permission bits of what is written; ACLs and setgid of the parent stay."""

    file: int = 0o600
    directory: int = 0o700


@dataclass(frozen=True)
class Staging:
    """Where one save is written before it is published.

    Attributes
    ----------
    directory : str
        The checkpoint directory.
    stem, token : str
        What will be its name, and the name of this attempt.
    extension : str
        Of the data files.
    """

    fs: FileSystem
    directory: str
    stem: str
    token: str
    extension: str
    modes: Modes = Modes()

    @property
    def path(self) -> str:
        """The hidden directory."""
        return os.path.join(self.directory, naming.staging_name(self.stem, self.token))

    @property
    def final_directory(self) -> str:
        """Where a step directory is published."""
        return os.path.join(self.directory, self.stem)

    @property
    def final_file(self) -> str:
        """Where a single file is published."""
        return os.path.join(self.directory, f"{self.stem}.{self.extension}")

    @property
    def final_manifest(self) -> str:
        """Where a single file's manifest is published."""
        return os.path.join(self.directory, naming.manifest_name(self.stem, self.token))

    def data_path(self, rank: int) -> str:
        """Path of a rank's data file, relative to the checkpoint."""
        return f"{naming.rank_directory(rank)}/{self.stem}.{self.extension}"

    def begin(self, plan: bytes) -> None:
        """Root: make the directory and put the synced plan in it, before any rank writes."""
        if try_stat(self.fs, self.path) is not None:
            # Only this attempt makes this name: a save that was begun and taken back, and could not be removed then.
            discard(self.fs, self.path, self.stem, self.token)
        self._mkdir(self.path)
        write_file(self.fs, os.path.join(self.path, naming.PLAN), plan, self.modes.file)
        self.fs.sync_directory(self.path)
        self.fs.sync_directory(self.directory)

    def make_rank_directory(self, rank: int) -> None:
        """Each rank: its own directory."""
        self._mkdir(os.path.join(self.path, naming.rank_directory(rank)))

    def record(self, rank: int, record: bytes) -> None:
        """Each rank, after its data is synced: the record, then the directory that holds both."""
        own = os.path.join(self.path, naming.rank_directory(rank))
        write_file(self.fs, os.path.join(own, naming.RECORD), record, self.modes.file)
        self.fs.sync_directory(own)

    def publish_directory(self, manifest: bytes, *, replace: bool) -> str:
        """Root, when all have recorded: make the step directory exist, durably. Returns its path.

        Raises
        ------
        CheckpointExistsError
            If the name is taken and ``replace`` is False.
        """
        write_file(self.fs, os.path.join(self.path, naming.MANIFEST), manifest, self.modes.file)
        self.fs.sync_directory(self.path)
        if replace and try_stat(self.fs, self.final_directory) is not None:
            reserved = os.path.join(self.directory, naming.replaced_name(self.stem, self.token))
            swap(self.fs, self.path, self.final_directory, reserved)
            self._clean(lambda: self._discard_replaced(reserved))
        else:
            move_new(self.fs, self.path, self.final_directory)
            self.fs.sync_directory(self.directory)
        return self.final_directory

    def publish_file(self, manifest: bytes, *, replace: bool) -> str:
        """Root, when the file is synced: manifest first, then the data takes its name. Returns the data's path.

        A data file without a manifest would be foreign; a manifest without data is debris. Hence this order. When a
        file is replaced both manifests stand beside it for a moment, and the data decides which one counts.

        Raises
        ------
        CheckpointExistsError
            If the name is taken and ``replace`` is False.
        StorageError
            The data has not taken its name, and the manifest is gone again; or only the last sync failed: then both
            are there, and whole.
        """
        if not replace and try_stat(self.fs, self.final_file) is not None:
            raise CheckpointExistsError(f"{self.final_file} exists already", path=self.final_file)
        staged = os.path.join(self.path, naming.MANIFEST)
        write_file(self.fs, staged, manifest, self.modes.file)
        self.fs.sync_directory(self.path)
        data = os.path.join(self.path, self.data_path(0))
        try:
            move_new(self.fs, staged, self.final_manifest)
            self.fs.sync_directory(self.directory)
            if replace:
                self.fs.rename(data, self.final_file)
            else:
                move_new(self.fs, data, self.final_file)
            self.fs.sync_directory(self.directory)
        except ParckptError:
            with suppress(StorageError):
                self._withdraw_manifest(data)
            raise
        self._clean(self._drop_old_manifests)
        self._clean(lambda: discard(self.fs, self.path, self.stem, self.token))
        return self.final_file

    def _withdraw_manifest(self, data: str) -> None:
        """Remove the manifest again unless the data has its name: data without manifest would be foreign."""
        staged, there = try_stat(self.fs, data), try_stat(self.fs, self.final_file)
        moved = staged is None or (there is not None and (staged.device, staged.inode) == (there.device, there.inode))
        if not moved:
            self.fs.unlink(self.final_manifest)

    def abort(self, reason: str) -> None:
        """Root: mark the save as rejected, so that nobody finalizes it later, then remove it as far as possible.

        On a full disk the mark cannot be written; removing the plan makes it unfinalizable as well. Does nothing if
        there is no staging directory: nothing was begun, or all of it was published.
        """
        mark = os.path.join(self.path, naming.ABORTED)
        try:
            write_file(self.fs, mark, reason.encode("utf-8", "replace"), self.modes.file)
            self.fs.sync_directory(self.path)
        except (StorageError, CheckpointExistsError) as error:
            if isinstance(error, StorageError) and error.errno == errno.ENOENT:
                return
            with suppress(StorageError):
                self.fs.unlink(os.path.join(self.path, naming.PLAN))
                self.fs.sync_directory(self.path)
        discard(self.fs, self.path, self.stem, self.token)

    def tidy(self, ranks: Sequence[int], *, root: bool) -> None:
        """After the publish: remove what only an unpublished checkpoint needs. Leftovers do no harm."""
        with suppress(StorageError):
            for rank in ranks:
                self.fs.unlink(os.path.join(self.final_directory, naming.rank_directory(rank), naming.RECORD))
            if root:
                self.fs.unlink(os.path.join(self.final_directory, naming.PLAN))

    def _clean(self, step: Callable[[], None]) -> None:
        """After the publish nothing may fail the save any more: what stays, the next start sweeps."""
        try:
            step()
        except StorageError as error:
            log.warning("%s is published, but something could not be cleaned up: %s", self.stem, error)

    def _discard_replaced(self, reserved: str) -> None:
        """The old directory is at its reserved name, or where the new one was, if it could not be moved on."""
        for path in (reserved, self.path):
            if try_stat(self.fs, path) is not None:
                discard(self.fs, path, self.stem, self.token)

    def _drop_old_manifests(self) -> None:
        """Remove the manifests of the data that was replaced; `x.ckpt` and `x.safetensors` keep their own."""
        for name in self.fs.listdir(self.directory):
            path = os.path.join(self.directory, name)
            if manifest_stem(name) == self.stem and path != self.final_manifest:
                facts, _ = read_facts(self.fs, path)
                if facts is not None and naming.EXTENSIONS.get(facts.format) == self.extension:
                    self.fs.unlink(path)

    def _mkdir(self, path: str) -> None:
        self.fs.mkdir(path, self.modes.directory)
        with opened(self.fs, path, os.O_RDONLY | os.O_DIRECTORY) as fd:
            self.fs.chmod_open(fd, self.modes.directory)


def discard(fs: FileSystem, path: str, stem: str, token: str) -> None:
    """Delete a file or directory that nothing refers to any more: first the name, durably, then the content."""
    directory = os.path.dirname(path)
    trash = os.path.join(directory, naming.trash_name(stem, token))
    if path != trash:
        if try_stat(fs, trash) is not None:
            remove_tree(fs, trash)
        fs.rename(path, trash)
        fs.sync_directory(directory)
    remove_tree(fs, trash)
