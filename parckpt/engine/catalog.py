"""What is in a checkpoint directory: every published checkpoint, good or not, without taking a lock or writing.

Kilobytes are read: names, sizes, and the facts of each manifest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from parckpt.core import naming
from parckpt.core.crc import crc32
from parckpt.core.manifest import Facts, Manifest
from parckpt.core.tablefile import peek
from parckpt.errors import (
    CheckpointGoneError,
    FormatError,
    IntegrityError,
    ParckptError,
    StorageError,
    TruncatedError,
)
from parckpt.storage.atomic import read_file
from parckpt.storage.direct import InputFile
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = [
    "MAX_MANIFEST_NBYTES",
    "Found",
    "find_at",
    "load_manifest",
    "manifest_stem",
    "newest_first",
    "read_facts",
    "scan",
    "step_directories",
]

MAX_MANIFEST_NBYTES = 8 << 30  # 4 million shards take a few hundred MB


@dataclass(frozen=True)
class Found:
    """One published checkpoint.

    Attributes
    ----------
    path : str
        Step directory, or the single data file.
    manifest_path : str
    root : str
        Directory that the manifest's file paths are relative to.
    stem : str
        The name without extension.
    facts : Facts or None
        None when the manifest cannot be trusted; `error` then says why.
    error : ParckptError or None
        Damage seen without reading data.
    set_aside : str or None
        Why it was marked bad.
    """

    path: str
    manifest_path: str
    root: str
    stem: str
    facts: Facts | None
    error: ParckptError | None = None
    set_aside: str | None = None

    @property
    def is_directory(self) -> bool:
        """Whether it is a step directory."""
        return os.path.basename(self.manifest_path) == naming.MANIFEST

    @property
    def token(self) -> str:
        """Token of the save, empty if unknown."""
        return self.facts.token if self.facts else ""


def scan(
    fs: FileSystem, directory: str, family: str | None = None, *, any_name: bool = False, tolerant: bool = False
) -> list[Found]:
    """List the published checkpoints of a directory, newest first; those with unreadable manifests come last.

    Parameters
    ----------
    family : str, optional
        Only those whose prefix the user gave as this (numbered prefixes included), as their manifests say.
    any_name : bool
        The family's names are of the program's own choice: what is damaged may be of it, whatever it is called.
    tolerant : bool
        List what the file system refuses to read with its StorageError. Only for people who look: nothing may be
        chosen or deleted by such a list, in which the newest one may be among those.

    Raises
    ------
    StorageError
        If the directory, or (unless `tolerant`) something in it, cannot be read: never taken for "nothing there".
    """
    names = fs.listdir(directory)
    found = [*_directories(fs, directory, names, tolerant), *_single_files(fs, directory, names, tolerant)]
    found = [_with_mark(fs, directory, one, names, tolerant) for one in found if _belongs(one, family, any_name)]
    return newest_first(found)


def newest_first(found: Iterable[Found]) -> list[Found]:
    """Order checkpoints by their place in the lineage; those with unreadable manifests come last."""
    return sorted(found, key=_age, reverse=True)


def find_at(fs: FileSystem, path: str) -> Found | None:
    """The checkpoint at a path: a step directory or a data file with its manifest; None where there is no manifest."""
    directory, name = os.path.split(path.rstrip("/"))
    directory = directory or "."
    stat = try_stat(fs, path)
    if stat is not None and stat.is_dir:
        manifest = os.path.join(path, naming.MANIFEST)
        return _directory(fs, directory, name) if try_stat(fs, manifest) is not None else None
    stem = os.path.splitext(name)[0]
    manifests = [n for n in fs.listdir(directory) if manifest_stem(n) == stem]
    found = [one for one in _single_files(fs, directory, [*manifests, name], False) if one.path.endswith(name)]
    return found[0] if found else None


def load_manifest(fs: FileSystem, found: Found) -> Manifest:
    """Read and check the whole manifest, and the sizes of the files it names.

    Raises
    ------
    CheckpointGoneError
        If it was deleted meanwhile.
    IntegrityError, FormatError, UnsupportedVersionError
    """
    if found.error is not None:
        raise found.error
    try:
        manifest = Manifest.decode(_read_manifest(fs, found), found.manifest_path)
    except IntegrityError:
        manifest = Manifest.decode(_read_manifest(fs, found), found.manifest_path)  # damage needs proof: a second look
    for file in manifest.contents.files:
        _check_size(fs, os.path.join(found.root, file.path), file.nbytes, found)
    return manifest


def _read_manifest(fs: FileSystem, found: Found) -> bytes:
    try:
        return read_file(fs, found.manifest_path, MAX_MANIFEST_NBYTES)
    except StorageError as error:
        if error.errno == errno.ENOENT:
            raise CheckpointGoneError(f"{found.path} was deleted while it was being read", path=found.path) from error
        raise


def _check_size(fs: FileSystem, path: str, nbytes: int, found: Found) -> None:
    stat = try_stat(fs, path)
    if stat is None:
        if try_stat(fs, found.manifest_path) is None:
            raise CheckpointGoneError(f"{found.path} was deleted while it was being read", path=found.path)
        raise TruncatedError(f"{path} is missing", path=path)
    if stat.nbytes != nbytes:
        raise TruncatedError(f"{path} has {stat.nbytes} bytes, its manifest says {nbytes}", path=path)


def manifest_stem(name: str) -> str | None:
    """Stem of ``<stem>.<16 hex digits>.manifest``."""
    parts = name.rsplit(".", 2)
    if len(parts) != 3 or parts[2] != "manifest" or len(parts[1]) != 16 or name.startswith("."):
        return None
    return parts[0] if all(c in "0123456789abcdef" for c in parts[1]) else None


def _directories(fs: FileSystem, directory: str, names: Iterable[str], tolerant: bool) -> list[Found]:
    found: list[Found] = []
    for name, stem in _possible_directories(names):
        path = os.path.join(directory, name)
        try:
            one = _published_directory(fs, directory, name, stem)
        except StorageError as error:
            if not tolerant:
                raise
            one = Found(path, os.path.join(path, naming.MANIFEST), path, stem, None, error)
        if one is not None:
            found.append(one)
    return found


def _published_directory(fs: FileSystem, directory: str, name: str, stem: str) -> Found | None:
    path = os.path.join(directory, name)
    stat = try_stat(fs, path)
    if stat is None or not stat.is_dir:
        return None
    by_prefix = naming.parse_stem(stem) is not None
    if by_prefix or _has(fs, path, naming.MANIFEST):
        one = _directory(fs, directory, name, stem)
        if by_prefix or _is_named_so(fs, one):
            return one
    return None


def _possible_directories(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names that step directories may have, and the stems; without the data files, of which there may be many."""
    present = set(names)
    stems = {stem for name in present if (stem := manifest_stem(name)) is not None}
    files = {f"{stem}.{extension}" for stem in stems for extension in naming.EXTENSIONS.values()}
    for name in names:
        if hidden := naming.parse_hidden(name):
            # With its successor in place it only waits to be deleted.
            if hidden[1] == "replaced" and hidden[0] not in present:
                yield name, hidden[0]
        elif not (
            name.startswith(".")
            or name in files
            or manifest_stem(name) is not None
            or naming.parse_rank_directory(name) is not None
        ):
            yield name, name


def step_directories(fs: FileSystem, directory: str, holding: str) -> list[str]:
    """Names of those directories of a directory that may be checkpoints and have an entry ``holding``."""
    names = fs.listdir(directory)
    return [
        name
        for name, stem in _possible_directories(names)
        if name == stem and _has(fs, os.path.join(directory, name), holding)
    ]


def _is_named_so(fs: FileSystem, found: Found) -> bool:
    """Whether a directory with a name of no prefix is a checkpoint that was saved under this name.

    A copy that somebody renamed is his: it is opened by its path, never restored or deleted by itself. Strangers'
    directories may hold a "manifest", too.
    """
    if found.facts is not None:
        return found.facts.stem == found.stem
    return _has(fs, found.path, naming.rank_directory(0))


def _has(fs: FileSystem, path: str, name: str) -> bool:
    """Whether a directory has an entry; a directory that nobody lets us into is no checkpoint of ours."""
    try:
        return try_stat(fs, os.path.join(path, name)) is not None
    except StorageError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR):
            return False
        raise


def _directory(fs: FileSystem, directory: str, name: str, stem: str | None = None) -> Found:
    path = os.path.join(directory, name)
    manifest = os.path.join(path, naming.MANIFEST)
    facts, error = read_facts(fs, manifest)
    return Found(path, manifest, path, stem or name, facts, error)


def _single_files(fs: FileSystem, directory: str, names: Iterable[str], tolerant: bool) -> list[Found]:
    by_stem: dict[str, list[str]] = {}
    for name in names:
        stem = manifest_stem(name)
        if stem is not None:
            by_stem.setdefault(stem, []).append(name)
    present = set(names)
    found: list[Found] = []
    for stem, manifests in by_stem.items():
        for extension in naming.EXTENSIONS.values():
            name = f"{stem}.{extension}"
            if name not in present:
                continue
            try:
                one = _single_file(fs, directory, stem, name, manifests)
            except StorageError as error:
                if not tolerant:
                    raise
                manifest = os.path.join(directory, manifests[0])
                one = Found(os.path.join(directory, name), manifest, directory, stem, None, error)
            if one is not None:
                found.append(one)
    return found


def _single_file(fs: FileSystem, directory: str, stem: str, name: str, manifests: list[str]) -> Found | None:
    """The data file with the manifest that fits it. A crash while a file is replaced leaves two."""
    path = os.path.join(directory, name)
    readable: list[tuple[str, Manifest]] = []
    errors: list[tuple[str, ParckptError]] = []
    for manifest_name in manifests:
        manifest_path = os.path.join(directory, manifest_name)
        facts, error = read_facts(fs, manifest_path)
        if facts is not None and f"{facts.stem}.{facts.token}.manifest" != manifest_name:
            what = f"{manifest_path} is the manifest of {facts.stem}, token {facts.token}"
            facts, error = None, FormatError(what, path=manifest_path, field="stem")
        if error is not None:
            errors.append((manifest_path, error))
        elif facts is not None and f"{stem}.{naming.EXTENSIONS.get(facts.format, '')}" == name:
            if len(manifests) == 1:
                return Found(path, manifest_path, directory, stem, facts)
            try:
                readable.append((manifest_path, Manifest.decode(_read(fs, manifest_path), manifest_path)))
            except (IntegrityError, FormatError) as problem:
                errors.append((manifest_path, problem))
    fitting = _fitting(fs, path, readable)
    if fitting is not None:
        return Found(path, fitting[0], directory, stem, fitting[1].facts)
    if readable:
        manifest_path = readable[0][0]
        error = TruncatedError(f"{path} fits none of its {len(manifests)} manifests; all are kept", path=path)
        return Found(path, manifest_path, directory, stem, None, error)
    return Found(path, errors[0][0], directory, stem, None, errors[0][1]) if errors else None


def _read(fs: FileSystem, path: str) -> bytes:
    return read_file(fs, path, MAX_MANIFEST_NBYTES)


def _fitting(fs: FileSystem, path: str, candidates: list[tuple[str, Manifest]]) -> tuple[str, Manifest] | None:
    """The manifest that describes the data: by size, then by one chunk in which they differ, then the newer one.

    Where data is replaced by the same bytes both fit: then both saves are whole, and the later one counts.
    """
    stat = try_stat(fs, path)
    if stat is None:
        return None
    left = [c for c in candidates if len(c[1].contents.files) == 1 and c[1].contents.files[0].nbytes == stat.nbytes]
    while len(left) > 1:
        first, second = left[0][1].contents.files[0], left[1][1].contents.files[0]
        assert first.chunk_crcs is not None
        assert second.chunk_crcs is not None
        differing = (first.chunk_crcs != second.chunk_crcs).nonzero()[0]
        if len(differing) == 0:
            left.remove(min(left[:2], key=lambda c: _recency(c[1].facts)))
            continue
        index = int(differing[0])
        crc = _chunk_crc(fs, path, index, left[0][1])
        left = [c for c in left if _crc_at(c[1], index) == crc]
    return left[0] if left else None


def _recency(facts: Facts) -> tuple[int, int, float]:
    return facts.generation, facts.sequence, facts.created


def _crc_at(manifest: Manifest, index: int) -> int:
    crcs = manifest.contents.files[0].chunk_crcs
    assert crcs is not None
    return int(crcs[index])


def _chunk_crc(fs: FileSystem, path: str, index: int, manifest: Manifest) -> int:
    start = index * manifest.contents.chunk_nbytes
    nbytes = min(manifest.contents.chunk_nbytes, manifest.contents.files[0].nbytes - start)
    buffer = memoryview(bytearray(nbytes))
    with InputFile(fs, path) as source:
        source.read_into(buffer, start)
    return crc32(buffer)


def read_facts(
    fs: FileSystem, manifest_path: str, kind: Literal["manifest", "plan"] = "manifest"
) -> tuple[Facts | None, ParckptError | None]:
    """Facts of a manifest or plan, or what is wrong with it. What the file system refuses is raised, not reported."""
    facts, error = _read_facts_once(fs, manifest_path, kind)
    # Damage needs proof: a second look.
    return (facts, error) if error is None else _read_facts_once(fs, manifest_path, kind)


def _read_facts_once(fs: FileSystem, manifest_path: str, kind: str) -> tuple[Facts | None, ParckptError | None]:
    try:
        with InputFile(fs, manifest_path) as source:

            def read(byte_offset: int, nbytes: int) -> bytes:
                buffer = bytearray(nbytes)
                source.read_into(memoryview(buffer), byte_offset)
                return bytes(buffer)

            return Facts.from_table(peek(read, source.nbytes, manifest_path, kind), manifest_path), None
    except (IntegrityError, FormatError) as error:
        return None, error
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return None, TruncatedError(f"{manifest_path} is missing", path=manifest_path)
        raise


def _with_mark(fs: FileSystem, directory: str, found: Found, names: Iterable[str], tolerant: bool) -> Found:
    if found.facts is None:
        return found
    mark = f".{found.stem}.bad-{found.facts.token}"
    if mark not in names:
        return found
    try:
        reason = read_file(fs, os.path.join(directory, mark), 1 << 20).decode("utf-8", "replace")
    except StorageError as error:
        if not tolerant:
            raise
        reason = error.message
    return Found(found.path, found.manifest_path, found.root, found.stem, found.facts, found.error, reason or "damaged")


def _belongs(found: Found, family: str | None, any_name: bool) -> bool:
    if family is None:
        return True
    if found.facts is not None:
        return found.facts.family == family
    return any_name or naming.belongs(found.stem, family)


def _age(found: Found) -> tuple[int, int, int, int]:
    stem = naming.parse_stem(found.stem)
    order = (stem.epoch, stem.step_in_epoch) if stem else (0, 0)
    return (0 if found.facts is None else 1, found.facts.sequence if found.facts else 0, *order)
