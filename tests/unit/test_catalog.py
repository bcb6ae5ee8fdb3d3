"""Listing a directory: what counts as a checkpoint, which manifest belongs to a file, in which order."""

from __future__ import annotations

import errno
from dataclasses import replace

import numpy as np
import pytest

import parckpt
from parckpt import SELF
from parckpt.core.manifest import Manifest
from parckpt.engine.catalog import Found, find_at, load_manifest, manifest_stem, scan
from parckpt.errors import CheckpointGoneError, IntegrityError, StorageError, TruncatedError
from parckpt.storage.atomic import read_file, write_file
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem
from parckpt.testing.saves import DIRECTORY, new_disk, saved

pytestmark = pytest.mark.fast

LIMIT = 1 << 30


def disk_with(mode: str, *versions: tuple[int, int]) -> MemoryFileSystem:
    return saved(new_disk(), mode, 1, versions or [(1, 1), (2, 2)])


def one(disk: MemoryFileSystem, name: str) -> Found:
    found = find_at(disk, f"{DIRECTORY}/{name}")
    assert found is not None
    return found


def manifest_of(disk: MemoryFileSystem, found: Found) -> Manifest:
    return Manifest.decode(read_file(disk, found.manifest_path, LIMIT), found.manifest_path)


def add_manifest(disk: MemoryFileSystem, manifest: Manifest) -> str:
    path = f"{DIRECTORY}/{manifest.facts.stem}.{manifest.facts.token}.manifest"
    write_file(disk, path, manifest.encode())
    return path


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("m-1_1.0123456789abcdef.manifest", "m-1_1"),
        ("a.b-1_1.0123456789abcdef.manifest", "a.b-1_1"),
        ("m-1_1.0123456789ABCDEF.manifest", None),
        ("m-1_1.0123456789abcde.manifest", None),
        (".m-1_1.0123456789abcdef.manifest", None),
        ("m-1_1.manifest", None),
        ("manifest", None),
    ],
)
def test_manifest_stem(name: str, stem: str | None) -> None:
    assert manifest_stem(name) == stem


@pytest.mark.parametrize("mode", ["integrated", "per-rank"])
def test_newest_first_by_sequence_not_by_step(mode: str) -> None:
    disk = disk_with(mode, (1, 1), (2, 2), (7, 3))
    saved(disk, mode, 1, [(7, 4)])
    found = scan(disk, DIRECTORY, "m")
    assert [f.facts.step for f in found if f.facts] == [7, 2, 1]
    sequences = [f.facts.sequence for f in found if f.facts]
    assert sequences == sorted(sequences, reverse=True)
    assert scan(disk, DIRECTORY, "other") == []


def test_a_damaged_manifest_is_listed_with_its_error() -> None:
    disk = disk_with("per-rank")
    disk.corrupt(f"{DIRECTORY}/m-1_2/manifest", 20)
    found = {f.stem: f for f in scan(disk, DIRECTORY, "m")}
    assert found["m-1_2"].facts is None
    assert isinstance(found["m-1_2"].error, IntegrityError)
    assert found["m-1_1"].error is None
    with pytest.raises(IntegrityError):
        load_manifest(disk, found["m-1_2"])


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_what_cannot_be_read_is_not_absent(code: int) -> None:
    disk = disk_with("per-rank")
    disk.deny(f"{DIRECTORY}/m-1_2/manifest", code)
    with pytest.raises(StorageError) as caught:
        scan(disk, DIRECTORY, "m")
    assert caught.value.errno == code


def test_foreign_things_are_not_listed() -> None:
    disk = disk_with("integrated")
    before = scan(disk, DIRECTORY)
    write_file(disk, f"{DIRECTORY}/m-1_9.ckpt", b"foreign")
    write_file(disk, f"{DIRECTORY}/notes.txt", b"")
    disk.mkdir(f"{DIRECTORY}/rank_0")
    assert scan(disk, DIRECTORY) == before
    assert find_at(disk, f"{DIRECTORY}/m-1_9.ckpt") is None


def test_a_file_replaced_by_the_same_step_keeps_the_manifest_that_fits() -> None:
    disk = disk_with("integrated", (1, 1))
    old = one(disk, "m-1_1.ckpt")
    other = disk_with("integrated", (1, 2))
    # Both manifests, either data: as a crash between the two renames leaves it.
    new = manifest_of(other, one(other, "m-1_1.ckpt"))
    add_manifest(disk, new)
    assert old.facts is not None
    assert one(disk, "m-1_1.ckpt").token == old.token
    disk.unlink(old.path)
    write_file(disk, old.path, read_file(other, old.path, LIMIT))
    assert one(disk, "m-1_1.ckpt").token == new.facts.token


def test_of_two_that_fit_the_later_one_counts() -> None:
    disk = disk_with("integrated", (1, 1))
    old = manifest_of(disk, one(disk, "m-1_1.ckpt"))
    for token in ("0" * 16, "f" * 16):  # whatever the order of the names
        again = disk.crash(keep="all")
        newer = replace(old, facts=replace(old.facts, token=token, sequence=old.facts.sequence + 1))
        add_manifest(again, newer)
        assert one(again, "m-1_1.ckpt").token == token


def test_neither_fitting_is_damage() -> None:
    disk = disk_with("integrated", (1, 1))
    found = one(disk, "m-1_1.ckpt")
    other = disk_with("integrated", (1, 2))
    second = add_manifest(disk, manifest_of(other, one(other, "m-1_1.ckpt")))
    disk.corrupt(found.path, 100)
    now = one(disk, "m-1_1.ckpt")
    assert now.facts is None
    assert isinstance(now.error, TruncatedError)
    assert {found.manifest_path, second} <= {f"{DIRECTORY}/{name}" for name in disk.listdir(DIRECTORY)}


def test_a_damaged_second_manifest_does_not_hide_the_good_one() -> None:
    disk = disk_with("integrated", (1, 1))
    found = one(disk, "m-1_1.ckpt")
    other = disk_with("integrated", (1, 2))
    second = add_manifest(disk, manifest_of(other, one(other, "m-1_1.ckpt")))
    disk.corrupt(second, disk.stat(second).nbytes - 40)  # in the columns: its facts are fine
    assert one(disk, "m-1_1.ckpt").token == found.token
    assert [f.token for f in scan(disk, DIRECTORY)] == [found.token]


def test_a_manifest_under_another_name_is_not_believed() -> None:
    disk = disk_with("integrated")
    first, second = one(disk, "m-1_1.ckpt"), one(disk, "m-1_2.ckpt")
    disk.exchange(first.manifest_path, second.manifest_path)
    assert [f.facts for f in scan(disk, DIRECTORY)] == [None, None]


def step_directory(disk: MemoryFileSystem, name: str) -> str:
    path = f"{DIRECTORY}/{name}"
    parckpt.save_checkpoint({"w": np.ones(3)}, f"{path}.ckpt", integrated_save=False, comm=SELF, filesystem=disk)
    assert disk.stat(path).is_dir
    return path


def test_step_directories_of_any_name_are_listed() -> None:
    disk = disk_with("per-rank", (1, 1))
    path = step_directory(disk, "export")
    names = {f.stem: f.facts.family for f in scan(disk, DIRECTORY) if f.facts}
    assert names == {"m-1_1": "m", "export": "export"}
    assert [f.path for f in scan(disk, DIRECTORY, "export")] == [path]
    assert [f.stem for f in scan(disk, DIRECTORY, "m")] == ["m-1_1"]
    disk.rename(path, f"{DIRECTORY}/.export.replaced-0123456789abcdef")
    assert [f.stem for f in scan(disk, DIRECTORY, "export")] == ["export"]


def test_a_renamed_copy_is_its_owners_and_strangers_directories_are_theirs() -> None:
    disk = disk_with("per-rank", (1, 1))
    disk.rename(step_directory(disk, "export"), f"{DIRECTORY}/keep this")
    assert one(disk, "keep this").facts is not None
    disk.mkdir(f"{DIRECTORY}/extension")
    write_file(disk, f"{DIRECTORY}/extension/manifest", b'{"manifest_version": 3}')
    disk.mkdir(f"{DIRECTORY}/private")
    disk.deny(f"{DIRECTORY}/private/manifest", errno.EACCES)
    assert [f.stem for f in scan(disk, DIRECTORY)] == ["m-1_1"]


def test_a_damaged_one_of_any_name_is_listed_where_names_are_free() -> None:
    disk = disk_with("per-rank", (1, 1))
    disk.corrupt(f"{step_directory(disk, 'export')}/manifest", 20)
    assert {f.stem: f.error is None for f in scan(disk, DIRECTORY)} == {"m-1_1": True, "export": False}
    assert [f.stem for f in scan(disk, DIRECTORY, "m")] == ["m-1_1"]
    assert [f.stem for f in scan(disk, DIRECTORY, "m", any_name=True)] == ["m-1_1", "export"]


def test_the_replaced_one_counts_only_while_nothing_has_its_name() -> None:
    disk = disk_with("per-rank")
    disk.rename(f"{DIRECTORY}/m-1_2", f"{DIRECTORY}/.m-1_2.replaced-0123456789abcdef")
    found = scan(disk, DIRECTORY, "m")
    assert [f.stem for f in found] == ["m-1_2", "m-1_1"]
    assert load_manifest(disk, found[0]).facts.step == 2
    disk.rename(f"{DIRECTORY}/m-1_1", f"{DIRECTORY}/m-1_2")
    assert [f.path for f in scan(disk, DIRECTORY, "m")] == [f"{DIRECTORY}/m-1_2"]


def test_deleted_meanwhile_is_gone_not_damaged() -> None:
    disk = disk_with("per-rank")
    found = one(disk, "m-1_2")
    disk.rename(found.path, f"{DIRECTORY}/.m-1_2.trash-{found.token}")
    with pytest.raises(CheckpointGoneError):
        load_manifest(disk, found)


def test_a_scan_changes_nothing_and_reads_little() -> None:
    disk = disk_with("integrated")
    system = FaultyFileSystem(disk)
    scan(system, DIRECTORY, "m")
    assert {call.operation for call in system.calls} <= {"listdir", "open", "stat_open", "stat", "pread_into", "close"}
    assert not any(call.path.endswith(".ckpt") and call.operation == "pread_into" for call in system.calls)
