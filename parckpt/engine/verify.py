"""Verification: every stored byte read once and compared with what is known of it. Nothing is changed.

Chunks stream through a few buffers, so memory depends neither on the size of the files nor on how much is damaged.
Not collective; takes no lock.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from parckpt.core import naming
from parckpt.core.contents import Contents, chunk_count
from parckpt.core.layout import tiling_problem
from parckpt.core.manifest import CHUNK_NBYTES, Manifest
from parckpt.engine.catalog import MAX_MANIFEST_NBYTES, Found, manifest_stem, read_facts
from parckpt.engine.foreign import cipher_of, encrypted, index_file
from parckpt.engine.reading import ChunkReader, ChunkTask, names_within
from parckpt.engine.storedcrc import StoredCrc
from parckpt.engine.survey import is_unreadable
from parckpt.errors import (
    CheckpointGoneError,
    ConfigError,
    FormatError,
    IntegrityError,
    ParckptError,
    StorageError,
    TruncatedError,
)
from parckpt.formats.base import FileIndex
from parckpt.storage.atomic import read_file
from parckpt.storage.direct import InputFile, aligned_buffer
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["MAX_FINDINGS", "Finding", "Report", "Severity", "Verdict", "verify_checkpoint", "verify_files"]

MAX_FINDINGS = 1000  # a disk full of damage must not fill the memory; the rest is counted
_BATCH = 1024  # chunks planned at a time: 4 GiB

Severity = Literal["damage", "unreadable", "note"]
Verdict = Literal["sound", "damaged", "unreadable", "unverified"]
OnRead = Callable[[int], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes
    ----------
    severity : str
        ``damage`` (proved), ``unreadable`` (could not be judged: refused by the disk, or of a newer version), or
        ``note`` (does no harm).
    code : str
        That of the error class that a restore would raise; of notes a word.
    path, message : str
    chunk : int or None
        Number of the chunk in the file.
    tensors : tuple of str
        Tensors with bytes there.
    """

    severity: Severity
    code: str
    path: str
    message: str
    chunk: int | None = None
    tensors: tuple[str, ...] = ()


@dataclass
class Report:
    """What verifying one checkpoint found.

    Attributes
    ----------
    has_manifest : bool
        Without one, only a checksum of the file's own can tell damage.
    files, chunks, nbytes : int
        How many were read.
    files_without_checksum : int
        Files of which nothing but the headers could be checked.
    findings : list of Finding
        At most `MAX_FINDINGS`; ``omitted`` counts the rest.
    """

    path: str
    has_manifest: bool
    step: int | None = None
    format: str = ""
    files: int = 0
    chunks: int = 0
    nbytes: int = 0
    files_without_checksum: int = 0
    omitted: int = 0
    damaged: bool = False
    unreadable: bool = False
    findings: list[Finding] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The worst that was found."""
        if self.damaged:
            return "damaged"
        if self.unreadable:
            return "unreadable"
        return "unverified" if self.files_without_checksum else "sound"

    def add(self, finding: Finding) -> None:
        """Note a finding, or count it when there are too many."""
        self.damaged |= finding.severity == "damage"
        self.unreadable |= finding.severity == "unreadable"
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)
        else:
            self.omitted += 1

    def add_error(self, path: str, error: Exception) -> None:
        """Note an error that stopped the look at one file or chunk; one that is not about the file is raised."""
        if not isinstance(error, (IntegrityError, FormatError, StorageError)):
            raise error
        facts = error.facts
        tensors = tuple(facts.get("tensors", ()))
        severity: Severity = "unreadable" if is_unreadable(error) else "damage"
        self.add(Finding(severity, error.code, str(facts.get("path", path)), str(error), facts.get("chunk"), tensors))


def verify_checkpoint(fs: FileSystem, found: Found, on_read: OnRead = lambda nbytes: None) -> Report:
    """Verify a checkpoint with a manifest.

    Parameters
    ----------
    on_read : callable
        Called with the number of bytes read since the last call.

    Raises
    ------
    CheckpointGoneError
        If it is deleted or replaced meanwhile.
    """
    report = Report(found.path, has_manifest=True)
    if found.facts is not None:
        report.step, report.format = found.facts.step, found.facts.format
    if found.set_aside is not None:
        report.add(Finding("note", "set-aside", found.path, f"was set aside earlier: {found.set_aside}"))
    manifest = _manifest(fs, found, report)
    if manifest is not None:
        _Verifying(fs, found, manifest, report, on_read).run()
    return report


def verify_files(fs: FileSystem, path: str, files: Iterable[str], on_read: OnRead = lambda nbytes: None) -> Report:
    """Verify files without a manifest, as far as their format allows: headers, and a checksum of their own.

    Parameters
    ----------
    path : str
        What the report is about.
    files : iterable of str
        Paths of the data files.
    """
    report = Report(path, has_manifest=False)
    for file in files:
        _verify_foreign(fs, file, report, on_read)
    return report


def _manifest(fs: FileSystem, found: Found, report: Report) -> Manifest | None:
    """The whole manifest, or None when what is wrong with it is in the report."""
    try:
        if found.error is not None:
            raise found.error
        return Manifest.decode(read_file(fs, found.manifest_path, MAX_MANIFEST_NBYTES), found.manifest_path)
    except (IntegrityError, FormatError) as error:
        report.add_error(found.manifest_path, error)
    except StorageError as error:
        if error.errno == errno.ENOENT:
            raise _gone(found) from error
        report.add_error(found.manifest_path, error)
    return None


@dataclass
class _Verifying:
    """One checkpoint, its manifest read."""

    fs: FileSystem
    found: Found
    manifest: Manifest
    report: Report
    on_read: OnRead

    def __post_init__(self) -> None:
        self.contents: Contents = self.manifest.contents
        self._order = np.argsort(self.contents.boxes.file, kind="stable")
        ordered = self.contents.boxes.file[self._order]
        self._starts = np.searchsorted(ordered, np.arange(len(self.contents.files) + 1)).tolist()

    def run(self) -> None:
        self._check_coverage()
        for number in range(len(self.contents.files)):
            try:
                self._check_file(number)
            except (IntegrityError, FormatError, StorageError) as error:
                self.report.add_error(self._path(number), error)
        try:
            self._check_extra()
        except StorageError as error:
            self.report.add_error(self.found.root, error)
        if self._is_gone():
            raise _gone(self.found)  # whatever was missing or short was being deleted

    def _is_gone(self) -> bool:
        if try_stat(self.fs, self.found.manifest_path) is None:
            return True
        facts = read_facts(self.fs, self.found.manifest_path)[0] if self.report.damaged else None
        return facts is not None and facts.token != self.manifest.facts.token

    def _path(self, number: int) -> str:
        return os.path.join(self.found.root, self.contents.files[number].path)

    def _check_coverage(self) -> None:
        """Every element of every tensor is in some box; a breakpoint may lack those of dead ranks."""
        if self.manifest.facts.kind == "breakpoint":
            return
        for number, tensor in enumerate(self.contents.tensors):
            _, offsets, shapes = self.contents.geometry(number)
            if len(tensor.global_shape):
                distinct = np.unique(np.concatenate([offsets, shapes], axis=1), axis=0)
                offsets, shapes = np.split(distinct, 2, axis=1)
            elif len(offsets):
                continue
            problem = tiling_problem(tensor.global_shape, offsets, shapes) if len(offsets) else None
            if not len(offsets) or (problem is not None and problem.kind == "gap"):
                where = f" from {list(problem.box.offsets)}" if problem is not None and problem.box else ""
                message = f"{self.found.manifest_path}: tensor {tensor.name!r} is not stored in full{where}"
                self.report.add(
                    Finding("damage", IntegrityError.code, self.found.manifest_path, message, None, (tensor.name,))
                )

    def _check_file(self, number: int) -> None:
        file, path = self.contents.files[number], self._path(number)
        stat = try_stat(self.fs, path)
        nbytes = -1 if stat is None else stat.nbytes
        if nbytes != file.nbytes:
            self._wrong_size(number, nbytes)
            return
        index, problem = _index(self.fs, path, self.manifest.facts.format)
        crc = StoredCrc(index) if index is not None else None
        intact = self._read_chunks(number, crc)
        self.report.files += 1
        if not intact:
            return  # what the headers say, and the file's own checksum, would only tell the same again
        if problem is not None:
            raise problem
        if index is not None:
            self._check_places(number, index)
        mismatch = crc.problem() if crc is not None else None
        if mismatch is not None:
            self.report.add(Finding("damage", "checksum", path, f"{path}: {mismatch}"))

    def _wrong_size(self, number: int, nbytes: int) -> None:
        file, path = self.contents.files[number], self._path(number)
        names = tuple(names_within(self.contents, number, (max(nbytes, 0), file.nbytes)))
        what = "is missing" if nbytes < 0 else f"has {nbytes} bytes, its manifest says {file.nbytes}"
        self.report.add(Finding("damage", TruncatedError.code, path, f"{path} {what}", None, names))

    def _read_chunks(self, number: int, crc: StoredCrc | None) -> bool:
        """Read a file; True if every chunk is what the manifest says."""
        intact = True
        for batch in self._batches(number):
            with ChunkReader(
                self.fs, self.found.root, self.contents, batch, manifest_path=self.found.manifest_path
            ) as reader:
                for result in reader.run():
                    self.report.chunks += 1
                    self.report.nbytes += len(result.data)
                    self.on_read(len(result.data))
                    if result.error is not None:
                        intact = False
                        self.report.add_error(self._path(number), result.error)
                    elif crc is not None and intact:
                        crc.add(result.task.start, result.data)
        return intact

    def _batches(self, number: int) -> Iterator[list[ChunkTask]]:
        count = chunk_count(self.contents.files[number].nbytes, self.contents.chunk_nbytes)
        for first in range(0, count, _BATCH):
            yield [ChunkTask.of(self.contents, number, k) for k in range(first, min(first + _BATCH, count))]

    def _check_places(self, number: int, index: FileIndex) -> None:
        """The file's own headers put each tensor where the manifest does."""
        entries = {item.name: item for item in index.entries}
        path = self._path(number)
        for row in self._order[self._starts[number] : self._starts[number + 1]].tolist():
            box = self.contents.box(row)
            tensor = self.contents.tensors[box.tensor]
            item = entries.get(box.entry)
            stored = [(e.start, e.byte_offset, e.nbytes) for e in item.extents] if item is not None else None
            if stored != [(e.start, e.byte_offset, e.nbytes) for e in box.extents] or (
                item is not None and item.dtype is not None and item.dtype.itemsize != tensor.dtype.itemsize
            ):
                message = f"{path}: entry {box.entry!r} lies elsewhere than its manifest says"
                self.report.add(Finding("damage", FormatError.code, path, message, None, (tensor.name,)))

    def _check_extra(self) -> None:
        """Files that belong to nothing. They do no harm, but somebody should know."""
        expected = {file.path for file in self.contents.files}
        for name in _files_beside(self.fs, self.found, expected):
            path = os.path.join(self.found.root, name)
            self.report.add(Finding("note", "extra", path, f"{path} does not belong to this checkpoint"))


def _files_beside(fs: FileSystem, found: Found, expected: set[str]) -> Iterator[str]:
    """Unexpected names in a step directory, or further manifests of a single file."""
    if not found.is_directory:
        own = os.path.basename(found.manifest_path)
        yield from (name for name in fs.listdir(found.root) if manifest_stem(name) == found.stem and name != own)
        return
    directories = {os.path.dirname(path) for path in expected} - {""}
    for name in fs.listdir(found.root):
        if name in directories:
            inside = (f"{name}/{inner}" for inner in fs.listdir(os.path.join(found.root, name)))
            # A crash right after the publish leaves records and plan; they are part of the protocol.
            yield from (path for path in inside if path not in expected and not path.endswith(f"/{naming.RECORD}"))
        elif name not in expected and name not in (naming.MANIFEST, naming.PLAN):
            yield name


def _index(fs: FileSystem, path: str, form: str) -> tuple[FileIndex | None, ParckptError | None]:
    try:
        return index_file(fs, path, form)[0], None
    except (ConfigError, FormatError, IntegrityError) as error:
        return None, error


def _verify_foreign(fs: FileSystem, path: str, report: Report, on_read: OnRead) -> None:
    try:
        cipher = cipher_of(fs, path)
        if cipher is not None:
            report.add(Finding("unreadable", ConfigError.code, path, encrypted(path, cipher)))
            return
        index, nbytes = index_file(fs, path)
        report.format = index.format
        if not index.entries:
            # Also what is left of a file whose writing never began; loading refuses it, too.
            raise FormatError(f"{path} ({nbytes} bytes) holds no tensors", path=path, byte_offset=0, field="file")
        crc = StoredCrc(index)
        buffer = aligned_buffer(min(CHUNK_NBYTES, nbytes)) if nbytes else memoryview(b"")
        with InputFile(fs, path) as source:
            for start in range(0, nbytes, CHUNK_NBYTES):
                view = buffer[: min(CHUNK_NBYTES, nbytes - start)]
                source.read_into(view, start)
                crc.add(start, np.frombuffer(view, np.uint8))
                report.chunks += 1
                report.nbytes += len(view)
                on_read(len(view))
    except (FormatError, IntegrityError, StorageError) as error:
        report.add_error(path, error)
        return
    report.files += 1
    report.files_without_checksum += not crc.checks
    mismatch = crc.problem()
    if mismatch is not None:
        report.add(Finding("damage", "checksum", path, f"{path}: {mismatch}"))


def _gone(found: Found) -> CheckpointGoneError:
    return CheckpointGoneError(f"{found.path} was deleted while it was being read", path=found.path)
