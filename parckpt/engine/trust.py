"""How far a file or directory can be trusted before it is loaded: its manifest, its key, its crc, whether it is all."""

from __future__ import annotations

import os
from dataclasses import dataclass

from parckpt.engine import foreign, notyet, parts
from parckpt.engine.catalog import Found, find_at, load_manifest, scan
from parckpt.engine.loadargs import Arguments
from parckpt.errors import CheckpointNotFoundError, ConfigError, IntegrityError
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["Trust"]


@dataclass(frozen=True)
class Trust:
    """The look that `load_checkpoint` takes first.

    Attributes
    ----------
    is_root : bool
        Root speaks, and reads, for all ranks.
    said : list of str
        What to warn about; filled as it is found.
    """

    fs: FileSystem
    arguments: Arguments
    is_root: bool
    said: list[str]

    def check(self) -> None:
        """Look before anything is read. Not collective; only root reads more than headers."""
        path = self.arguments.path
        stat = try_stat(self.fs, path)
        if stat is None:
            raise CheckpointNotFoundError(f"there is no checkpoint at {path}", path=path)
        if not stat.is_dir:
            self._check_key(path)
        found = find_at(self.fs, path)
        if found is None and not stat.is_dir and (part := parts.find(self.fs, path)) is not None:
            self._check_part(part)
        elif found is None:
            self._check_foreign(path, stat.is_dir)
        if self.arguments.crc_check and self.is_root:
            self._check_crc(found, stat.is_dir)

    def _check_key(self, path: str) -> None:
        """A key for what is not encrypted, or none for what is, is a mistake to be told from damage."""
        mode = foreign.cipher_of(self.fs, path)
        if mode is not None:
            if self.arguments.dec_key is None:
                raise ConfigError(f"{path} is encrypted with {mode}: pass dec_key and dec_mode={mode!r}", path=path)
            notyet.refuse(enc_key=self.arguments.dec_key)
        elif self.arguments.dec_key is not None:
            raise ConfigError(f"{path} is not encrypted: load it without dec_key", path=path, parameter="dec_key")

    def _check_part(self, part: parts.Part) -> None:
        """One rank's file of a step directory of ours is verified by the manifest there; the rest is elsewhere."""
        if self.is_root:
            part.verify(self.fs)
        if part.is_partial and not self.arguments.remove_redundancy:
            self._say(f"{part.path} has only what rank {part.rank} wrote; the whole checkpoint is {part.root}")

    def _check_foreign(self, path: str, is_dir: bool) -> None:
        if not self.arguments.allow_unverified:
            self._unverified()
        if is_dir or self.arguments.remove_redundancy:
            return
        index, _ = foreign.index_file(self.fs, path, self.arguments.format)
        if index.metadata.get("remove_redundancy") == "True":
            self._say(f"{path} is one rank's of several without what other ranks hold, too: remove_redundancy=True")

    def _unverified(self) -> None:
        """A deleted manifest must not turn a verified checkpoint into one that anybody could have changed."""
        path, allow = self.arguments.path, self.arguments.allow_unverified
        if allow is False or scan(self.fs, os.path.dirname(path)):
            raise IntegrityError(
                f"{path} has no manifest, so nothing in it can be verified"
                + ("; parckpt has published in this directory" if allow is None else "")
                + ": pass allow_unverified=True to load it all the same",
                path=path,
            )
        self._say(f"{path} has no manifest: it is loaded without verification")

    def _check_crc(self, found: Found | None, is_dir: bool) -> None:
        path, form = self.arguments.path, self.arguments.format
        manifest = load_manifest(self.fs, found) if found is not None else None
        if manifest is None:
            cuts = self.arguments.strategy if is_dir else None
            manifest = foreign.open_foreign(self.fs, path, check=False, form=form, strategy=cuts)
        root = path if is_dir else os.path.dirname(path)
        for file in manifest.contents.files:
            name = os.path.join(root, file.path if is_dir else os.path.basename(path))
            index, _ = foreign.index_file(self.fs, name, form)
            foreign.verify_crc(self.fs, name, index, required=True)

    def _say(self, message: str) -> None:
        if self.is_root:
            self.said.append(message)
