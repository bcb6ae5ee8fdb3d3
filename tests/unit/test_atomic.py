"""Files and directories appear, change and vanish in one act: on every disk, at every crash."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from parckpt.errors import CheckpointExistsError, FormatError, StorageError, SyncError, TruncatedError
from parckpt.storage import atomic
from parckpt.storage.filesystem import FileSystem
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem, SimulatedCrash

pytestmark = pytest.mark.fast

OLD, NEW = b"old" * 3000, b"new" * 4000


def crashes(disk: MemoryFileSystem) -> Iterator[MemoryFileSystem]:
    """Every kind of machine that may come up after a loss of power."""
    yield disk.crash(keep="all")
    yield disk.crash(keep="none")
    for seed in range(12):
        yield disk.crash(seed)


def each_crash(
    prepare: Callable[[], MemoryFileSystem], act: Callable[[FileSystem], object]
) -> Iterator[tuple[MemoryFileSystem, bool]]:
    """Die after the n-th call, n = 0, 1, 2 ..., and come up in every way; True: the act had returned."""
    for n in range(10_000):
        disk = prepare()
        fs = FaultyFileSystem(disk, crash_at=n)
        try:
            act(fs)
        except SimulatedCrash:
            finished = False
        else:
            finished = True
        for found in crashes(disk):
            yield found, finished
        if finished:
            return


def directory(**files: bytes) -> MemoryFileSystem:
    disk = MemoryFileSystem()
    disk.mkdir("/d")
    for name, content in files.items():
        atomic.write_file(disk, f"/d/{name}", content)
    disk.sync_all()
    return disk


def read(fs: FileSystem, path: str) -> bytes:
    return atomic.read_file(fs, path, 1 << 20)


def test_replaced_file_is_old_or_new_at_every_crash() -> None:
    seen = set()
    for found, finished in each_crash(
        lambda: directory(a=OLD), lambda fs: atomic.replace_file(fs, "/d/a", [NEW[:5000], NEW[5000:]])
    ):
        content = read(found, "/d/a")
        assert content == NEW if finished else content in (OLD, NEW)
        seen.add((content, finished))
    assert seen == {(OLD, False), (NEW, False), (NEW, True)}


def test_replaced_file_is_old_or_new_at_every_fault() -> None:
    for n in range(1, 100):
        disk = directory(a=OLD)
        fs = FaultyFileSystem(disk, fail_at=n)
        try:
            atomic.replace_file(fs, "/d/a", NEW)
        except StorageError as error:
            failed = error
        else:
            break
        in_place = isinstance(failed, SyncError) and failed.facts["operation"] == "sync_directory"
        assert read(disk, "/d/a") == (NEW if in_place else OLD)
        assert (disk.listdir("/d"), disk.nopen) == (["a"], 0)
    assert n == 8  # open, chmod, write, fsync, close, rename, sync
    assert read(disk, "/d/a") == NEW


def test_a_synced_file_has_no_durable_name_before_the_directory_is_synced() -> None:
    disk = directory()
    atomic.write_file(disk, "/d/a", NEW)
    assert disk.crash(keep="none").listdir("/d") == []
    assert {tuple(found.listdir("/d")) for found in crashes(disk)} == {(), ("a",)}
    disk.sync_directory("/d")
    assert all(read(found, "/d/a") == NEW for found in crashes(disk))


@pytest.mark.parametrize("rename_flags", [False, True])
def test_swap_keeps_both_contents_under_known_names_at_every_crash(rename_flags: bool) -> None:
    def prepare() -> MemoryFileSystem:
        disk = MemoryFileSystem(rename_flags=rename_flags)
        for name, content in (("new", NEW), ("current", OLD)):
            disk.mkdir(f"/{name}")
            atomic.write_file(disk, f"/{name}/f", content)
        disk.sync_all()
        return disk

    states = set()
    for found, finished in each_crash(prepare, lambda fs: atomic.swap(fs, "/new", "/current", "/old")):
        state = tuple(
            read(found, f"/{name}/f")[:3].decode() if name in found.listdir("/") else None
            for name in ("new", "current", "old")
        )
        states.add(state)
        if finished:
            assert state == (None, "new", "old")
    between = ("old", "new", None) if rename_flags else ("new", None, "old")
    assert states == {("new", "old", None), between, (None, "new", "old")}


@pytest.mark.parametrize("rename_flags", [False, True])
def test_swap_that_fails_loses_nothing(rename_flags: bool) -> None:
    for n in range(1, 100):
        disk = MemoryFileSystem(rename_flags=rename_flags)
        for name, content in (("new", NEW), ("current", OLD)):
            disk.mkdir(f"/{name}")
            atomic.write_file(disk, f"/{name}/f", content)
        fs = FaultyFileSystem(disk, fail_at=n)
        try:
            atomic.swap(fs, "/new", "/current", "/old")
        except StorageError:
            contents = sorted(read(disk, f"/{name}/f") for name in disk.listdir("/"))
            assert contents == [NEW, OLD]
            assert read(disk, "/current/f") == OLD
        else:
            assert read(disk, "/current/f") == NEW  # also where only the old one could not be moved on
            if fs.failed is None:
                break
    assert n > 4


def test_swap_refuses_a_taken_reserved_name() -> None:
    disk = MemoryFileSystem(rename_flags=False)
    for name in ("new", "current", "old"):
        disk.mkdir(f"/{name}")
    with pytest.raises(CheckpointExistsError, match="old"):
        atomic.swap(disk, "/new", "/current", "/old")
    assert disk.listdir("/") == ["current", "new", "old"]


@pytest.mark.parametrize(("rename_flags", "links"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_move_new_never_loses_the_content(kind: str, rename_flags: bool, links: bool) -> None:
    def prepare() -> MemoryFileSystem:
        disk = MemoryFileSystem(rename_flags=rename_flags, links=links)
        if kind == "directory":
            disk.mkdir("/src")
        atomic.write_file(disk, "/src/f" if kind == "directory" else "/src", NEW)
        disk.sync_all()
        return disk

    def act(fs: FileSystem) -> None:
        atomic.move_new(fs, "/src", "/dst")
        fs.sync_directory("/")

    for found, finished in each_crash(prepare, act):
        names = found.listdir("/")
        assert names == ["dst"] if finished else names in (["src"], ["dst"], ["dst", "src"])
        for name in names:
            assert read(found, f"/{name}/f" if kind == "directory" else f"/{name}") == NEW
        if not finished:
            act_again = names == ["dst"]
            if not act_again:
                act(found)
            assert found.listdir("/") == ["dst"]


@pytest.mark.parametrize(("rename_flags", "links"), [(True, True), (False, True), (False, False)])
def test_move_new_lets_only_one_of_two_win(rename_flags: bool, links: bool) -> None:
    # The other one moves its own directory to the same name before each call of the first.
    for n in range(1, 100):
        disk = MemoryFileSystem(rename_flags=rename_flags, links=links)
        for name in ("one", "two"):
            disk.mkdir(f"/{name}")
            atomic.write_file(disk, f"/{name}/f", name.encode())

        won = []

        def other(call: object, disk: MemoryFileSystem = disk, n: int = n, won: list[str] = won) -> None:
            if getattr(call, "number", 0) == n:
                try:
                    atomic.move_new(disk, "/two", "/dst")
                except CheckpointExistsError:
                    return
                won.append("two")

        fs = FaultyFileSystem(disk, on_call=other)
        try:
            atomic.move_new(fs, "/one", "/dst")
        except CheckpointExistsError:
            assert won == ["two"]
        else:
            won.append("one")
        assert len(won) == 1
        assert read(disk, "/dst/f").decode() == won[0]
        if fs.count < n:
            break
    assert n > 1


def test_read_file_is_bounded_before_it_allocates() -> None:
    disk = directory(a=b"x" * 11)
    assert atomic.read_file(disk, "/d/a", 11) == b"x" * 11
    with pytest.raises(FormatError, match="11 bytes, at most 10") as caught:
        atomic.read_file(disk, "/d/a", 10)
    assert caught.value.facts == {"path": "/d/a", "byte_offset": 0, "field": "size"}


def test_read_file_notices_that_the_file_shrank() -> None:
    disk = directory(a=b"x" * 11)

    def shrink(call: object) -> None:
        if getattr(call, "operation", "") == "pread_into":
            atomic.write_file(disk, "/d/a", b"x" * 5, exclusive=False)

    with pytest.raises(TruncatedError, match="byte 5 of 11"):
        atomic.read_file(FaultyFileSystem(disk, on_call=shrink), "/d/a", 20)


def test_write_file_removes_what_it_could_not_finish() -> None:
    def pieces() -> Iterator[bytes]:
        yield b"some"
        raise ValueError("no more")

    disk = directory(a=OLD)
    with pytest.raises(ValueError, match="no more"):
        atomic.write_file(disk, "/d/b", pieces())
    disk.capacity_nbytes = len(OLD) + 10
    with pytest.raises(StorageError) as caught:
        atomic.write_file(disk, "/d/b", b"x" * 11)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(CheckpointExistsError):
        atomic.write_file(disk, "/d/a", NEW)
    assert (disk.listdir("/d"), read(disk, "/d/a"), disk.nopen) == (["a"], OLD, 0)


def test_remove_tree_gives_up_on_a_directory_that_fills_again() -> None:
    disk = directory(a=b"x")

    def fill(call: object) -> None:  # as NFS does with files that are open somewhere
        if getattr(call, "operation", "") == "rmdir" and disk.listdir("/d") == []:
            atomic.write_file(disk, "/d/.nfs0", b"x")

    with pytest.raises(StorageError) as caught:
        atomic.remove_tree(FaultyFileSystem(disk, on_call=fill), "/d")
    assert caught.value.errno == errno.ENOTEMPTY


def test_remove_tree_says_what_may_not_be_removed() -> None:
    disk = directory(a=b"x", b=b"y")
    disk.deny("/d/b", errno.EPERM)
    with pytest.raises(StorageError) as caught:
        atomic.remove_tree(disk, "/d")
    assert (caught.value.errno, caught.value.facts["path"]) == (errno.EPERM, "/d/b")
