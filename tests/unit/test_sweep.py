"""What a start removes, puts back and leaves; which of them is published is in tests/faults/test_finalize.py."""

from __future__ import annotations

import pytest

from parckpt.core.naming import parse_hidden
from parckpt.engine.belonging import Owner
from parckpt.engine.catalog import find_at
from parckpt.engine.staging import Modes
from parckpt.engine.sweep import Swept, recover
from parckpt.errors import StorageError
from parckpt.storage.atomic import read_file, write_file
from parckpt.storage.filesystem import try_stat
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem
from parckpt.testing.saves import DIRECTORY, make_state, new_disk, saved, unpublished

pytestmark = pytest.mark.fast

TOKEN = "0123456789abcdef"


def sweep(disk: MemoryFileSystem | FaultyFileSystem, family: str = "m", *, alone: bool = False) -> Swept:
    return recover(disk, DIRECTORY, Owner(family, lambda: alone), lambda: None, Modes())


def tree(disk: MemoryFileSystem, path: str) -> None:
    disk.mkdir(path)
    disk.mkdir(f"{path}/rank_0")
    write_file(disk, f"{path}/rank_0/x", b"x")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (f".m-1_1.staging-{TOKEN}", ("m-1_1", "staging", TOKEN)),
        (f".a.b-1_1.trash-{TOKEN}", ("a.b-1_1", "trash", TOKEN)),
        (f".m-1_1.replaced-{TOKEN}", ("m-1_1", "replaced", TOKEN)),
        (f".m-1_1.bad-{TOKEN}", ("m-1_1", "bad", TOKEN)),
        (f".m-1_1.pin-{TOKEN}", None),
        (f"m-1_1.staging-{TOKEN}", None),
        (f".m-1_1.staging-{TOKEN[1:]}", None),
        (f".m-1_1.staging-{TOKEN.upper()}", None),
        (f"..staging-{TOKEN}", None),
    ],
)
def test_hidden_names(name: str, parts: tuple[str, str, str] | None) -> None:
    assert parse_hidden(name) == parts


def test_only_the_own_family_is_touched() -> None:
    disk = new_disk()
    for prefix in ("m", "other"):
        for kind in ("staging", "trash"):
            tree(disk, f"{DIRECTORY}/.{prefix}-1_1.{kind}-{TOKEN}")
    write_file(disk, f"{DIRECTORY}/.hidden", b"")
    write_file(disk, f"{DIRECTORY}/.m-1_1.pin-{TOKEN}", b"")
    swept = sweep(disk)
    assert [path for path, _ in swept.removed] == [f"{DIRECTORY}/.m-1_1.staging-{TOKEN}"]
    left = [".hidden", f".m-1_1.pin-{TOKEN}", f".other-1_1.staging-{TOKEN}", f".other-1_1.trash-{TOKEN}"]
    assert disk.listdir(DIRECTORY) == left


def test_what_names_nobody_waits_until_nobody_else_is_at_work() -> None:
    disk = new_disk()
    for kind in ("staging", "trash"):
        tree(disk, f"{DIRECTORY}/.best.{kind}-{TOKEN}")
    before = disk.listdir(DIRECTORY)
    assert sweep(disk).removed == ()
    assert disk.listdir(DIRECTORY) == before
    sweep(disk, alone=True)
    assert disk.listdir(DIRECTORY) == []


def test_what_names_another_family_is_its_own_whatever_it_is_called() -> None:
    disk = saved(new_disk(), "per-rank", 1, [(1, 1)])
    path = unpublished(disk, "per-rank", 1, 2, lambda rank, size: make_state(rank, size, 2))
    other = f"{DIRECTORY}/.other-1_2.staging-{path[-16:]}"
    disk.rename(path, other)
    assert sweep(disk, "other", alone=True) == Swept((), ())
    assert try_stat(disk, other) is not None


def test_a_name_goes_durably_before_its_content() -> None:
    disk = new_disk()
    tree(disk, f"{DIRECTORY}/.m-1_1.staging-{TOKEN}")
    system = FaultyFileSystem(disk)
    sweep(system)
    acts = [c.operation for c in system.calls if c.operation in ("rename", "sync_directory", "unlink", "rmdir")]
    assert acts[:2] == ["rename", "sync_directory"]


def test_what_was_published_is_told() -> None:
    disk = saved(new_disk(), "per-rank", 1, [(1, 1)])
    unpublished(disk, "per-rank", 1, 2, lambda rank, size: make_state(rank, size, 2))
    swept = sweep(disk)
    assert swept == Swept((f"{DIRECTORY}/m-1_2",), ())
    # Plan and record are for unpublished ones only.
    assert disk.listdir(f"{DIRECTORY}/m-1_2/rank_0") == ["m-1_2.ckpt"]
    assert try_stat(disk, f"{DIRECTORY}/m-1_2/plan") is None


def test_replaced_goes_back_where_nothing_took_the_name() -> None:
    disk = saved(new_disk(), "per-rank", 1, [(1, 1)])
    disk.rename(f"{DIRECTORY}/m-1_1", f"{DIRECTORY}/.m-1_1.replaced-{TOKEN}")
    sweep(disk)
    assert disk.crash(keep="none").listdir(DIRECTORY) == disk.listdir(DIRECTORY)
    found = find_at(disk, f"{DIRECTORY}/m-1_1")
    assert found is not None
    assert found.facts is not None


def test_of_several_replaced_the_newest_goes_back() -> None:
    disk = saved(new_disk(), "per-rank", 1, [(1, 1), (2, 2)])
    disk.rename(f"{DIRECTORY}/m-1_2", f"{DIRECTORY}/.m-1_1.replaced-{'f' * 16}")
    disk.rename(f"{DIRECTORY}/m-1_1", f"{DIRECTORY}/.m-1_1.replaced-{'0' * 16}")
    sweep(disk)
    found = find_at(disk, f"{DIRECTORY}/m-1_1")
    assert found is not None
    assert found.facts is not None
    assert found.facts.step == 2
    assert [name for name in disk.listdir(DIRECTORY) if "replaced" in name] == []


def test_replaced_stays_while_what_has_the_name_is_damaged() -> None:
    disk = saved(new_disk(), "per-rank", 1, [(1, 1), (2, 2)])
    kept = f"{DIRECTORY}/.m-1_2.replaced-{TOKEN}"
    disk.rename(f"{DIRECTORY}/m-1_1", kept)
    disk.corrupt(f"{DIRECTORY}/m-1_2/manifest", 30)
    sweep(disk)
    assert try_stat(disk, f"{kept}/manifest") is not None


def test_marks_go_with_what_they_mark() -> None:
    disk = saved(new_disk(), "integrated", 1, [(1, 1)])
    found = find_at(disk, f"{DIRECTORY}/m-1_1.ckpt")
    assert found is not None
    for token in (found.token, TOKEN):
        write_file(disk, f"{DIRECTORY}/.m-1_1.bad-{token}", b"why")
    sweep(disk)
    assert [name for name in disk.listdir(DIRECTORY) if ".bad-" in name] == [f".m-1_1.bad-{found.token}"]


def test_manifests_without_data_go_and_damaged_ones_stay() -> None:
    disk = saved(new_disk(), "integrated", 1, [(1, 1), (2, 2)])
    names = [name for name in disk.listdir(DIRECTORY) if name.endswith(".manifest")]
    for step in (1, 2):
        disk.unlink(f"{DIRECTORY}/m-1_{step}.ckpt")
    disk.corrupt(f"{DIRECTORY}/{names[1]}", 30)
    sweep(disk)
    assert [name for name in disk.listdir(DIRECTORY) if name.endswith(".manifest")] == [names[1]]


def test_a_foreign_file_with_our_name_is_left() -> None:
    disk = new_disk()
    write_file(disk, f"{DIRECTORY}/m-1_1.ckpt", b"foreign")
    sweep(disk)
    assert read_file(disk, f"{DIRECTORY}/m-1_1.ckpt", 100) == b"foreign"


def test_every_fault_of_a_sweep_is_raised_or_harmless_and_the_next_one_finishes() -> None:
    base = saved(new_disk(), "per-rank", 1, [(1, 1)])
    unpublished(base, "per-rank", 1, 2, lambda rank, size: make_state(rank, size, 2))
    tree(base, f"{DIRECTORY}/.m-1_5.staging-{TOKEN}")
    tree(base, f"{DIRECTORY}/.m-1_6.trash-{TOKEN}")
    for n in range(1, 300):
        disk = base.crash(keep="all")
        system = FaultyFileSystem(disk, fail_at=n)
        try:
            sweep(system)
            raised = False
        except StorageError:
            raised = True
        sweep(disk)
        assert [name for name in disk.listdir(DIRECTORY) if not name.startswith(".m.")] == ["m-1_1", "m-1_2"], raised
        if system.failed is None:
            break
    assert n > 40
