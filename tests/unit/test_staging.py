"""The order of the publish protocol, as ``docs/format.md`` §7 writes it down, and what its acts do when they cannot."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest

from parckpt.engine.staging import Modes, Staging, discard
from parckpt.errors import CheckpointExistsError, NoSpaceError, StorageError
from parckpt.storage.atomic import read_file, write_file
from parckpt.storage.filesystem import try_stat
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem
from parckpt.testing.saves import DIRECTORY, fill, make_state, new_disk, started

pytestmark = pytest.mark.fast

TOKEN = "0123456789abcdef"

# What changes something, or makes it durable. `open` counts where it creates: the file did not exist before.
_ACTS = {"mkdir", "rmdir", "unlink", "link", "rename", "rename_noreplace", "exchange", "fsync", "sync_directory"}

# docs/format.md §7.1: the directory form.
BEGIN = """
mkdir STAGING
fsync STAGING/plan
sync STAGING
sync .
"""
RECORD = """
mkdir STAGING/rank_0
fsync STAGING/rank_0/m-1_2.ckpt
fsync STAGING/rank_0/record
sync STAGING/rank_0
"""
MANIFEST = """
fsync STAGING/manifest
sync STAGING
"""
PUBLISH_DIRECTORY = """
rename_noreplace STAGING
sync .
unlink m-1_2/rank_0/record
unlink m-1_2/plan
"""
# §7.2: the file form.
PUBLISH_FILE = """
rename_noreplace STAGING/manifest
sync .
rename_noreplace STAGING/rank_0/m-1_2.ckpt
sync .
"""
PUBLISH_FILE_FLAGLESS = """
link STAGING/manifest
sync .
unlink STAGING/manifest
sync .
link STAGING/rank_0/m-1_2.ckpt
sync .
unlink STAGING/rank_0/m-1_2.ckpt
sync .
"""
DISCARD_STAGING = """
rename STAGING
sync .
"""
# §7.3: replacing.
EXCHANGE = """
exchange STAGING
sync .
rename STAGING
sync .
rename REPLACED
sync .
"""
EXCHANGE_FLAGLESS = """
rename m-1_2
sync .
rename STAGING
sync .
rename REPLACED
sync .
"""
REPLACE_FILE = """
rename_noreplace STAGING/manifest
sync .
rename STAGING/rank_0/m-1_2.ckpt
sync .
unlink m-1_2.OTHER.manifest
"""
TIDY = """
unlink m-1_2/rank_0/record
unlink m-1_2/plan
"""


def acts(system: FaultyFileSystem, start: int) -> list[str]:
    """The acts since a call, without the emptying of trash, which nothing depends on."""
    found = []
    for call in system.calls[start:]:
        path = call.path.removeprefix(DIRECTORY).lstrip("/") or "."
        path = re.sub(r"^\.m-1_2\.staging-[0-9a-f]{16}", "STAGING", path)
        path = re.sub(r"^\.m-1_2\.replaced-[0-9a-f]{16}", "REPLACED", path)
        path = re.sub(r"m-1_2\.[0-9a-f]{16}\.manifest", "m-1_2.OTHER.manifest", path)
        if call.operation in _ACTS and ".trash-" not in path:
            found.append(f"{call.operation.replace('sync_directory', 'sync')} {path}")
    return found


def save_acts(mode: str, *, replace: bool, flags: bool = True) -> list[str]:
    """What the second save of a run does: in the steady state."""
    system = FaultyFileSystem(new_disk(rename_flags=flags))
    with started(system, mode) as run:  # type: ignore[arg-type]
        state = make_state(0, 1)
        for step, version in [(1, 1), (2, 2)]:
            fill(state, 0, 1, version)
            start = system.count
            run.step_end(state, step)
        if replace:
            fill(state, 0, 1, 3)
            start = system.count
            run.save_now(state, 2)
        return acts(system, start)


@pytest.mark.parametrize(
    ("mode", "replace", "flags", "protocol"),
    [
        ("per-rank", False, True, BEGIN + RECORD + MANIFEST + PUBLISH_DIRECTORY),
        ("per-rank", False, False, BEGIN + RECORD + MANIFEST + PUBLISH_DIRECTORY),
        ("per-rank", True, True, BEGIN + RECORD + MANIFEST + EXCHANGE + TIDY),
        ("per-rank", True, False, BEGIN + RECORD + MANIFEST + EXCHANGE_FLAGLESS + TIDY),
        ("integrated", False, True, BEGIN + RECORD + MANIFEST + PUBLISH_FILE + DISCARD_STAGING),
        ("integrated", False, False, BEGIN + RECORD + MANIFEST + PUBLISH_FILE_FLAGLESS + DISCARD_STAGING),
        ("integrated", True, True, BEGIN + RECORD + MANIFEST + REPLACE_FILE + DISCARD_STAGING),
    ],
)
def test_the_protocol_is_the_documented_one(mode: str, replace: bool, flags: bool, protocol: str) -> None:
    found = save_acts(mode, replace=replace, flags=flags)
    tried = {"rename_noreplace", "exchange"} if not flags else set()
    expected = protocol.split("\n")
    if not flags:  # what the kernel refuses is tried first
        found = [act for act in found if act.split()[0] not in tried]
        expected = [act.replace("rename_noreplace", "rename") for act in expected]
    assert found == [act for act in expected if act]


@pytest.mark.parametrize(
    ("mode", "old", "last"),
    [("per-rank", "m-1_1", "rmdir .m-1_1.trash-T"), ("integrated", "m-1_1.ckpt", "unlink m-1_1.T.manifest")],
)
def test_deleting_is_the_documented_one(mode: str, old: str, last: str) -> None:
    # docs/format.md §7.4: the name, durably; then the content; of a file, the manifest last.
    system = FaultyFileSystem(new_disk())
    with started(system, mode, keep_checkpoint_max=1) as run:  # type: ignore[arg-type]
        state = make_state(0, 1)
        run.step_end(state, 1)
        fill(state, 0, 1, 2)
        run.step_end(state, 2)
        run._run.keeper.flush()
        calls = [c for c in system.calls if c.operation in _ACTS]
    begin = next(k for k, c in enumerate(calls) if (c.operation, c.path) == ("rename", f"{DIRECTORY}/{old}"))
    done = [f"{c.operation} {c.path.removeprefix(DIRECTORY)}".replace(" /", " ") for c in calls[begin + 1 :]]
    done = [re.sub(r"[0-9a-f]{16}", "T", act) for act in done]
    assert done[0].strip() == "sync_directory"
    assert done[-1] == last
    content = done[1:-1] if mode == "integrated" else done[1:]
    assert all(act.split()[1].startswith(".m-1_1.trash-T") for act in content)


def new_staging(disk: MemoryFileSystem, modes: Modes | None = None) -> Staging:
    """A staging directory with its plan, one data file and a record."""
    staging = Staging(disk, DIRECTORY, "m-1_2", TOKEN, "ckpt", modes or Modes())
    staging.begin(b"plan")
    staging.make_rank_directory(0)
    write_file(disk, f"{staging.path}/{staging.data_path(0)}", b"new data")
    staging.record(0, b"record")
    return staging


def test_modes() -> None:
    disk = new_disk()
    staging = new_staging(disk, Modes(0o640, 0o750))
    assert [disk.stat(f"{staging.path}{rest}").mode for rest in ("", "/rank_0")] == [0o750] * 2
    assert [disk.stat(f"{staging.path}{rest}").mode for rest in ("/plan", "/rank_0/record")] == [0o640] * 2
    staging.publish_directory(b"manifest", replace=False)
    assert disk.stat(f"{staging.final_directory}/manifest").mode == 0o640


@pytest.mark.parametrize("flags", [True, False])
def test_a_taken_name_is_not_replaced(flags: bool) -> None:
    disk = new_disk(rename_flags=flags)
    disk.mkdir(f"{DIRECTORY}/m-1_2")
    write_file(disk, f"{DIRECTORY}/m-1_2/manifest", b"other")
    write_file(disk, f"{DIRECTORY}/m-1_2.ckpt", b"other")
    staging = new_staging(disk)
    with pytest.raises(CheckpointExistsError):
        staging.publish_file(b"manifest", replace=False)
    with pytest.raises(CheckpointExistsError):
        staging.publish_directory(b"manifest", replace=False)
    assert read_file(disk, f"{DIRECTORY}/m-1_2/manifest", 100) == b"other"
    assert read_file(disk, f"{DIRECTORY}/m-1_2.ckpt", 100) == b"other"
    assert try_stat(disk, staging.final_manifest) is None


def test_the_mark_is_durable_before_anything_is_removed() -> None:
    disk = new_disk()
    staging = new_staging(disk)
    system = FaultyFileSystem(disk)
    Staging(system, DIRECTORY, "m-1_2", TOKEN, "ckpt").abort("because")
    names = [(c.operation, c.path.removeprefix(staging.path)) for c in system.calls if c.operation in _ACTS]
    assert names[:3] == [("fsync", "/aborted"), ("sync_directory", ""), ("rename", "")]
    assert disk.listdir(DIRECTORY) == []


def test_a_full_disk_takes_no_mark_so_the_plan_goes() -> None:
    disk = new_disk()
    staging = new_staging(disk)
    disk.capacity_nbytes = 0
    system = FaultyFileSystem(disk)
    with pytest.raises(NoSpaceError):
        write_file(disk, f"{staging.path}/x", b"x")
    Staging(system, DIRECTORY, "m-1_2", TOKEN, "ckpt").abort("because")
    names = [(c.operation, c.path.removeprefix(staging.path)) for c in system.calls if c.operation in _ACTS]
    unlinked = names.index(("unlink", "/plan"))
    assert names[unlinked + 1 : unlinked + 3] == [("sync_directory", ""), ("rename", "")]
    assert disk.listdir(DIRECTORY) == []


def test_every_fault_of_an_abort_leaves_nothing_that_can_be_published() -> None:
    for n in range(1, 100):
        disk = new_disk()
        staging = new_staging(disk)
        system = FaultyFileSystem(disk, fail_at=n)
        with suppress(StorageError):
            Staging(system, DIRECTORY, "m-1_2", TOKEN, "ckpt").abort("because")
        if system.failed is None:
            break
        gone = try_stat(disk, f"{staging.path}/plan") is None
        assert gone or try_stat(disk, f"{staging.path}/aborted") is not None
    assert n > 10


def test_an_abort_of_what_never_began_or_is_published_does_nothing() -> None:
    disk = new_disk()
    Staging(disk, DIRECTORY, "m-1_2", TOKEN, "ckpt").abort("because")
    assert disk.listdir(DIRECTORY) == []
    staging = new_staging(disk)
    staging.publish_directory(b"manifest", replace=False)
    staging.abort("because")
    assert disk.listdir(DIRECTORY) == ["m-1_2"]


def test_a_manifest_whose_data_got_no_name_is_withdrawn() -> None:
    disk = new_disk()
    staging = new_staging(disk)
    system = FaultyFileSystem(disk, fail_at=2, only=frozenset({"rename_noreplace"}))
    with pytest.raises(StorageError):
        Staging(system, DIRECTORY, "m-1_2", TOKEN, "ckpt").publish_file(b"manifest", replace=False)
    assert disk.listdir(DIRECTORY) == [f".m-1_2.staging-{TOKEN}"]
    assert try_stat(disk, f"{staging.path}/{staging.data_path(0)}") is not None


def test_a_manifest_stays_once_the_data_has_its_name() -> None:
    disk = new_disk()
    staging = new_staging(disk)
    system = FaultyFileSystem(disk, fail_at=3, only=frozenset({"sync_directory"}))
    with pytest.raises(StorageError):
        Staging(system, DIRECTORY, "m-1_2", TOKEN, "ckpt").publish_file(b"manifest", replace=False)
    assert system.failed is not None
    assert system.failed.path == DIRECTORY
    assert read_file(disk, staging.final_file, 100) == b"new data"
    assert read_file(disk, staging.final_manifest, 100) == b"manifest"


def test_discard_takes_the_place_of_older_trash() -> None:
    disk = new_disk()
    staging = new_staging(disk)
    disk.mkdir(f"{DIRECTORY}/.m-1_2.trash-{TOKEN}")
    write_file(disk, f"{DIRECTORY}/.m-1_2.trash-{TOKEN}/left", b"x")
    discard(disk, staging.path, "m-1_2", TOKEN)
    assert disk.listdir(DIRECTORY) == []
