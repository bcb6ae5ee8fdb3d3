"""One rank's file of a step directory: a part of a checkpoint that somebody takes for the whole."""

from __future__ import annotations

import os
from dataclasses import dataclass

from parckpt.core import naming
from parckpt.core.crc import crc32
from parckpt.core.manifest import Manifest
from parckpt.engine.catalog import find_at, load_manifest
from parckpt.errors import ChecksumError, IntegrityError
from parckpt.storage.direct import InputFile
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["Part", "find"]


@dataclass(frozen=True)
class Part:
    """A file of a published step directory.

    Attributes
    ----------
    root : str
        The step directory.
    number : int
        Its place among the manifest's files.
    """

    path: str
    root: str
    rank: int
    manifest: Manifest
    number: int

    @property
    def is_partial(self) -> bool:
        """Whether other files hold anything."""
        return bool((self.manifest.contents.boxes.file != self.number).any())

    def verify(self, fs: FileSystem) -> None:
        """Compare every chunk with the manifest. ChecksumError names the first that differs."""
        contents = self.manifest.contents
        crcs = contents.files[self.number].chunk_crcs
        if crcs is None:
            return
        with InputFile(fs, self.path) as source:
            for number, expected in enumerate(crcs.tolist()):
                start = number * contents.chunk_nbytes
                data = source.read(start, min(contents.chunk_nbytes, source.nbytes - start))
                if crc32(data) != expected:
                    raise ChecksumError(f"{self.path}: chunk {number} differs from its checksum", path=self.path)


def find(fs: FileSystem, path: str) -> Part | None:
    """The part at a path, if it lies in a step directory with a manifest."""
    root, directory = os.path.split(os.path.dirname(path))
    rank = naming.parse_rank_directory(directory)
    if rank is None or try_stat(fs, os.path.join(root, naming.MANIFEST)) is None:
        return None
    found = find_at(fs, root)
    if found is None:
        return None
    manifest = load_manifest(fs, found)
    name = os.path.join(directory, os.path.basename(path))
    for number, file in enumerate(manifest.contents.files):
        if file.path == name:
            return Part(path, root, rank, manifest, number)
    raise IntegrityError(f"{path} is no file of the checkpoint {root} that it lies in", path=path)
