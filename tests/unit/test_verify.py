"""Verification: what it reads, what it finds, what it never does."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.core.manifest import CHUNK_NBYTES, Manifest
from parckpt.core.tablefile import Table, encode
from parckpt.engine import verify as module
from parckpt.engine.catalog import Found, find_at
from parckpt.engine.foreign import index_file, verify_crc
from parckpt.engine.storedcrc import StoredCrc
from parckpt.engine.verify import Report, verify_checkpoint, verify_files
from parckpt.errors import CheckpointGoneError, ChecksumError
from parckpt.storage.filesystem import PosixFileSystem
from parckpt.testing.faulty import Call, FaultyFileSystem
from parckpt.testing.world import run_world

pytestmark = pytest.mark.fast

FS = PosixFileSystem()
GOLDEN = Path(__file__).parent.parent / "data" / "golden"
STATE = {"a": np.arange(1_500_000.0), "b": np.ones(3, "f2"), "zero": np.array(7), "none": np.zeros((0, 3))}


@pytest.fixture(scope="module")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")

    def save(comm: Any, rank: int) -> None:
        part = parckpt.Shard(np.arange(600_000.0) + rank, (1_200_000,), (600_000 * rank,))
        parckpt.save_checkpoint({**STATE, "w": part}, root / "dir", comm=comm, remove_redundancy=True)

    run_world(2, save)
    parckpt.save_checkpoint(STATE, root / "one", crc_check=True)
    parckpt.save_checkpoint(STATE, root / "st", crc_check=True, format="safetensors")
    return root


@pytest.fixture
def saved(_saved: Path, tmp_path: Path) -> Path:
    """``one.ckpt``, ``st.safetensors`` and the step directory ``dir``."""
    return Path(shutil.copytree(_saved, tmp_path / "saved"))


def _found(path: Path, fs: Any = FS) -> Found:
    found = find_at(fs, str(path))
    assert found is not None
    return found


def _verify(path: Path, fs: Any = FS) -> Report:
    return verify_checkpoint(fs, _found(path))


def _flip(path: Path, byte_offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte_offset)
        byte = file.read(1)[0]
        file.seek(byte_offset)
        file.write(bytes([byte ^ 0x10]))


def _data(saved: Path, rank: int) -> Path:
    return saved / "dir" / f"rank_{rank}" / "dir.ckpt"


@pytest.mark.parametrize("name", ["one.ckpt", "st.safetensors", "dir"])
def test_sound(saved: Path, name: str) -> None:
    read: list[int] = []
    report = verify_checkpoint(FS, _found(saved / name), read.append)
    assert (report.verdict, report.findings) == ("sound", [])
    files = [saved / name] if name != "dir" else [_data(saved, 0), _data(saved, 1)]
    assert report.nbytes == sum(read) == sum(os.path.getsize(file) for file in files)
    assert max(read) <= CHUNK_NBYTES
    assert report.files == len(files)


@pytest.mark.parametrize("name", ["one.ckpt", "st.safetensors", "dir"])
def test_any_flipped_bit_is_found(saved: Path, name: str) -> None:
    path = saved / name if name != "dir" else _data(saved, 1)
    nbytes = os.path.getsize(path)
    for byte_offset in (0, 9, CHUNK_NBYTES - 1, CHUNK_NBYTES, nbytes // 2, nbytes - 1):
        _flip(path, byte_offset)
        report = _verify(saved / name)
        assert report.verdict == "damaged"
        (finding,) = report.findings
        assert (finding.code, finding.path, finding.chunk) == ("checksum", str(path), byte_offset // CHUNK_NBYTES)
        _flip(path, byte_offset)
    assert _verify(saved / name).verdict == "sound"


def test_the_manifest_is_covered(saved: Path) -> None:
    path = saved / "dir" / "manifest"
    for byte_offset in (20, os.path.getsize(path) // 2, os.path.getsize(path) - 1):
        _flip(path, byte_offset)
        assert [finding.severity for finding in _verify(saved / "dir").findings] == ["damage"]
        _flip(path, byte_offset)


def test_all_damage_is_listed(saved: Path) -> None:
    _flip(_data(saved, 0), 100)
    _data(saved, 1).write_bytes(_data(saved, 1).read_bytes()[:-5])
    findings = _verify(saved / "dir").findings
    assert [(f.code, f.path) for f in findings] == [
        ("checksum", str(_data(saved, 0))),
        ("truncated", str(_data(saved, 1))),
    ]
    assert findings[1].tensors
    _data(saved, 1).unlink()
    missing = _verify(saved / "dir").findings[1]
    assert missing.message == f"{_data(saved, 1)} is missing"
    assert "w" in missing.tensors


def test_extra_files_are_noted(saved: Path) -> None:
    (saved / "dir" / "notes.txt").write_text("mine")
    (saved / "dir" / "rank_1" / "core.17").write_text("")
    report = _verify(saved / "dir")
    assert report.verdict == "sound"
    assert [(f.severity, f.path) for f in report.findings] == [
        ("note", str(saved / "dir" / "notes.txt")),
        ("note", str(saved / "dir" / "rank_1" / "core.17")),
    ]


def test_headers_must_agree_with_the_manifest(saved: Path) -> None:
    """A manifest, sound in itself, whose places are not those of the file."""
    manifest = _rewritten(saved / "dir")
    contents = manifest.contents
    places = contents.extent_byte_offset.copy()
    places[0] += 2
    _write(saved / "dir", Manifest(manifest.facts, replace(contents, extent_byte_offset=places)))
    (finding,) = _verify(saved / "dir").findings
    assert (finding.severity, finding.code) == ("damage", "format")
    assert "lies elsewhere" in finding.message


def test_a_tensor_stored_in_part_only(saved: Path) -> None:
    manifest = _rewritten(saved / "dir")
    contents = manifest.contents
    row = next(k for k, t in enumerate(contents.tensors) if t.name == "w")
    boxes = [contents.box(k).index for k in range(len(contents.boxes.tensor)) if contents.box(k).tensor == row]
    grown = replace(contents.tensors[row], global_shape=(1_200_001,))
    tensors = tuple(grown if k == row else t for k, t in enumerate(contents.tensors))
    assert len(boxes) == 2
    _write(saved / "dir", Manifest(manifest.facts, replace(contents, tensors=tensors)))
    (finding,) = _verify(saved / "dir").findings
    assert finding.tensors == ("w",)
    assert "not stored in full" in finding.message


def _rewritten(path: Path) -> Manifest:
    return Manifest.decode((path / "manifest").read_bytes(), "manifest")


def _write(path: Path, manifest: Manifest) -> None:
    (path / "manifest").write_bytes(manifest.encode())


def test_a_newer_version_is_not_damage(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("parckpt.core.tablefile.VERSION", 99)
        (saved / "dir" / "manifest").write_bytes(encode(Table("manifest")))
    report = _verify(saved / "dir")
    assert (report.verdict, report.findings[0].code) == ("unreadable", "version")


@pytest.mark.parametrize("operation", ["pread_into", "open", "stat", "listdir", "stat_open"])
def test_a_refusing_disk_is_not_damage(saved: Path, operation: str) -> None:
    """Whichever call fails with an I/O error: nothing is called damaged for it."""
    found = _found(saved / "dir")
    counting = FaultyFileSystem(FS, only=frozenset({operation}))
    assert verify_checkpoint(counting, found).verdict == "sound"
    assert counting.calls
    refused = 0
    for number in range(1, len(counting.calls) + 1):
        codes = _codes_when(found, FaultyFileSystem(FS, number, errno.EIO, only=frozenset({operation})))
        assert codes <= {"storage"}
        refused += bool(codes)
    # A read past the page cache has another way; whether the manifest is still there is asked more than once.
    assert refused == len(counting.calls) or (refused and operation in ("open", "pread_into", "stat"))


def _codes_when(found: Found, fs: FaultyFileSystem) -> set[str]:
    """Codes of what verification finds, or fails with."""
    try:
        return {finding.code for finding in verify_checkpoint(fs, found).findings}
    except parckpt.StorageError as error:
        return {error.code}


def test_deleted_meanwhile_is_gone_not_damaged(saved: Path) -> None:
    found = _found(saved / "dir")
    deleted: list[Call] = []

    def delete(call: Call) -> None:
        if call.path.endswith("rank_1/dir.ckpt") and not deleted:
            deleted.append(call)
            shutil.rmtree(saved / "dir")

    with pytest.raises(CheckpointGoneError):
        verify_checkpoint(FaultyFileSystem(FS, on_call=delete), found)
    assert deleted


def test_findings_are_bounded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FINDINGS", 2)
    for number in range(5):
        (saved / "dir" / f"extra{number}").write_text("")
    _flip(_data(saved, 0), 100)
    report = _verify(saved / "dir")
    assert (len(report.findings), report.omitted, report.verdict) == (2, 4, "damaged")


def test_batches_cover_every_chunk(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 1)
    report = _verify(saved / "one.ckpt")
    assert (report.verdict, report.chunks) == ("sound", -(-os.path.getsize(saved / "one.ckpt") // CHUNK_NBYTES))


def _with_crc() -> Iterator[Path]:
    for path in sorted(GOLDEN.rglob("*_crc*.*")):
        if path.suffix in (".ckpt", ".safetensors") and "enc" not in path.parts and "corrupt" not in path.parts:
            yield path


@pytest.mark.parametrize("path", list(_with_crc()), ids=lambda path: path.name)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_mindspores_crc_piece_by_piece(path: Path, piece: int) -> None:
    """The checksum computed on the way equals the one of a whole look, for any cut of the stream."""
    index, nbytes = index_file(FS, str(path))
    crc = StoredCrc(index)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    for start in range(0, nbytes, piece):
        crc.add(start, data[start : start + piece])
    try:
        verify_crc(FS, str(path), index)
        expected = None
    except ChecksumError:
        expected = "wrong"
    assert (crc.problem() is None) == (expected is None)
    assert crc.checks == (index.crc is not None and all(item.kind != "map" for item in index.entries))


def test_our_files_pass_without_their_manifest(saved: Path) -> None:
    for name in ("one.ckpt", "st.safetensors"):
        assert verify_files(FS, name, [str(saved / name)]).verdict == "sound"
        _flip(saved / name, CHUNK_NBYTES + 3)
        assert verify_files(FS, name, [str(saved / name)]).verdict == "damaged"
    assert verify_files(FS, "dir", [str(_data(saved, 0))]).verdict == "unverified"
