"""One holder per directory and prefix, whoever comes when, and whoever dies where."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from parckpt.errors import LockedError, StorageError
from parckpt.storage import atomic, lockfile
from parckpt.storage.filesystem import FileSystem
from parckpt.storage.identity import Identity
from parckpt.storage.lock import Lock, break_lock, find_locks, read_lock
from parckpt.testing.clock import ManualClock
from parckpt.testing.filesystem import Call, FaultyFileSystem, MemoryFileSystem, SimulatedCrash

pytestmark = pytest.mark.fast

STALE_S = 600.0
ONE = Identity("hpc", "77", 0, "nid001", "boot-1", "pid:[1]", 100, 5000, "attempt-one")
SAME_HOST = replace(ONE, job_id="78", pid=200, start_time=6000, attempt="attempt-two")
OTHER_HOST = replace(SAME_HOST, host="nid002", boot_id="boot-2")

DISKS: dict[str, Callable[..., MemoryFileSystem]] = {
    "all": MemoryFileSystem,
    "flagless": lambda **more: MemoryFileSystem(rename_flags=False, **more),
    "no-links": lambda **more: MemoryFileSystem(links=False, **more),
    "bare": lambda **more: MemoryFileSystem(rename_flags=False, links=False, **more),
}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=DISKS)
def disk(request: pytest.FixtureRequest, clock: ManualClock) -> MemoryFileSystem:
    return DISKS[request.param](clock=clock)


def alive(pid: int, start_time: int) -> bool | None:
    return True


def gone(pid: int, start_time: int) -> bool | None:
    return False


def unknown(pid: int, start_time: int) -> bool | None:
    return None


def take(fs: FileSystem, clock: ManualClock, who: Identity = ONE, is_alive: Any = alive, prefix: str = "llama") -> Lock:
    return Lock.acquire(fs, "/", prefix, who, clock, STALE_S, is_alive=is_alive)


def holder(fs: FileSystem) -> str | None:
    found = read_lock(fs, "/", "llama")
    return found.record.token if found and found.record else None


def test_taken_checked_released(disk: MemoryFileSystem, clock: ManualClock) -> None:
    lock = take(disk, clock)
    lock.check()
    assert disk.listdir("/") == [".llama.lock"]
    assert disk.crash(keep="none").listdir("/") == [".llama.lock"]
    assert disk.stat("/.llama.lock").mode == 0o600
    found = read_lock(disk, "/", "llama")
    assert found is not None
    assert found.record == lock.record
    assert found.record.identity == ONE
    lock.release()
    lock.release()
    assert (disk.listdir("/"), disk.crash(keep="none").listdir("/"), disk.nopen) == ([], [], 0)
    with pytest.raises(LockedError, match="lost"):
        lock.check()
    take(disk, clock, SAME_HOST).check()


def test_the_second_is_told_about_the_first(disk: MemoryFileSystem, clock: ManualClock) -> None:
    first = take(disk, clock)
    clock.advance(12)
    with pytest.raises(LockedError) as caught:
        take(disk, clock, SAME_HOST)
    for part in (
        "'nid001'",
        "process 100",
        "job '77'",
        "since 2023-11-14T22:13:20+00:00",
        "12 s ago",
        "parckpt unlock /",
    ):
        assert part in str(caught.value)
    assert caught.value.facts["holder"]["host"] == "nid001"
    json.dumps(caught.value.facts)
    first.check()
    assert disk.listdir("/") == [".llama.lock"]


def test_prefixes_do_not_exclude_each_other(disk: MemoryFileSystem, clock: ManualClock) -> None:
    locks = [take(disk, clock, prefix=prefix) for prefix in ("llama", "llama.lock", "", "l")]
    for lock in locks:
        lock.check()
    assert find_locks(disk, "/") == ["", "l", "llama", "llama.lock"]


@pytest.mark.parametrize(
    ("who", "is_alive", "age_s", "replaced"),
    [
        (SAME_HOST, alive, 1e6, False),  # provably alive is never stale
        (SAME_HOST, gone, 0, True),
        (SAME_HOST, unknown, 600, False),
        (SAME_HOST, unknown, 601, True),
        (OTHER_HOST, gone, 600, False),  # the check says nothing about processes elsewhere
        (OTHER_HOST, gone, 601, True),
        (replace(SAME_HOST, boot_id="boot-9"), gone, 600, False),
        (replace(SAME_HOST, boot_id="boot-9"), alive, 601, True),
        (replace(SAME_HOST, pid_namespace="pid:[2]"), gone, 600, False),
        (replace(ONE, pid=300), alive, 0, False),  # same job, same start: two programs
        (replace(ONE, restart_count=1), alive, 0, True),
        (replace(OTHER_HOST, job_id="77", restart_count=1), alive, 0, True),
        (replace(ONE, restart_count=1, cluster="other"), alive, 0, False),
    ],
)
def test_who_may_take_over(
    disk: MemoryFileSystem, clock: ManualClock, who: Identity, is_alive: Any, age_s: float, replaced: bool
) -> None:
    first = take(disk, clock)
    clock.advance(age_s)
    if not replaced:
        with pytest.raises(LockedError):
            take(disk, clock, who, is_alive)
        first.check()
        return
    second = take(disk, clock, who, is_alive)
    second.check()
    for use in (first.check, first.refresh):
        with pytest.raises(LockedError, match="was lost: by host"):
            use()
    first.release()
    second.check()
    assert disk.listdir("/") == [".llama.lock"]


@pytest.mark.parametrize("field", ["host", "boot_id", "pid_namespace"])
def test_unknown_is_not_equal_to_unknown(clock: ManualClock, field: str) -> None:
    disk = MemoryFileSystem(clock=clock)
    take(disk, clock, replace(ONE, **{field: ""}))
    with pytest.raises(LockedError):
        take(disk, clock, replace(SAME_HOST, **{field: ""}), gone)


def test_jobs_without_a_batch_system_are_not_one_job(clock: ManualClock) -> None:
    disk = MemoryFileSystem(clock=clock)
    take(disk, clock, replace(ONE, cluster="", job_id=""))
    with pytest.raises(LockedError):
        take(disk, clock, replace(ONE, cluster="", job_id="", restart_count=3, pid=9))


def test_an_older_start_does_not_take_from_a_newer(clock: ManualClock) -> None:
    disk = MemoryFileSystem(clock=clock)
    take(disk, clock, replace(ONE, restart_count=2))
    with pytest.raises(LockedError):
        take(disk, clock, replace(OTHER_HOST, job_id="77", restart_count=1))


def test_heartbeats_keep_the_lock(disk: MemoryFileSystem, clock: ManualClock) -> None:
    first = take(disk, clock)
    size = disk.stat(first.path).nbytes
    for _ in range(5):
        clock.advance(500.125)
        first.refresh()
        with pytest.raises(LockedError, match="last heard of 0 s ago"):
            take(disk, clock, OTHER_HOST)
    assert disk.stat(first.path).nbytes == size
    assert first.record.since == 1.7e9
    clock.advance(601)
    take(disk, clock, OTHER_HOST).check()


def test_a_heartbeat_far_in_the_future_proves_nothing(clock: ManualClock) -> None:
    disk = MemoryFileSystem(clock=clock)
    ahead = ManualClock(clock.wall() + 1e6)
    take(disk, ahead)
    with pytest.raises(LockedError):
        take(disk, clock, OTHER_HOST)
    clock.advance(601)
    take(disk, clock, OTHER_HOST).check()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b'{"version": 1}', b" " * 200_000]
)
def test_a_damaged_lock_is_held_until_its_file_is_stale(clock: ManualClock, content: bytes) -> None:
    disk = MemoryFileSystem(clock=clock)
    atomic.write_file(disk, "/.llama.lock", content)
    clock.advance(600)
    with pytest.raises(LockedError, match="unreadable"):
        take(disk, clock, SAME_HOST, gone)
    clock.advance(1)
    take(disk, clock, SAME_HOST, gone).check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pid", 0),
        ("pid", -1),
        ("pid", True),
        ("pid", 1 << 80),
        ("start_time", 1.5),
        ("restart_count", "3"),
        ("host", None),
        ("host", "x" * 2000),
        ("token", 5),
        ("heartbeat", float("nan")),
        ("heartbeat", float("inf")),
        ("since", -1),
        ("since", "now"),
        ("version", 2),
        ("job_id", None),
    ],
)
def test_records_with_strange_fields_are_none(name: str, value: Any) -> None:
    content = json.loads(lockfile.encode(lockfile.LockRecord("t", ONE, 1.0, 2.0)))
    assert lockfile.decode(json.dumps(content).encode()) == lockfile.LockRecord("t", ONE, 1.0, 2.0)
    content[name] = value
    assert lockfile.decode(json.dumps(content).encode()) is None
    del content[name]
    assert lockfile.decode(json.dumps(content).encode()) is None


def test_a_person_may_break_a_lock(disk: MemoryFileSystem, clock: ManualClock) -> None:
    assert not break_lock(disk, "/", "llama")
    first = take(disk, clock)
    seen = read_lock(disk, "/", "llama")
    clock.advance(1)
    first.refresh()
    assert not break_lock(disk, "/", "llama", seen)  # it has moved since
    first.check()
    assert break_lock(disk, "/", "llama", read_lock(disk, "/", "llama"))
    assert disk.listdir("/") == []
    with pytest.raises(LockedError, match="it was removed"):
        first.check()
    take(disk, clock, SAME_HOST)
    assert break_lock(disk, "/", "llama")


def run_beside(
    disk: MemoryFileSystem, n: int, act: Callable[[FileSystem], object], beside: Callable[[], object]
) -> tuple[Lock | None, bool]:
    """Run `act`, and all of `beside` right before its n-th call; return its lock, and whether it came that far."""

    def on_call(call: Call) -> None:
        if call.number == n:
            beside()

    fs = FaultyFileSystem(disk, on_call=on_call)
    try:
        result = act(fs)
    except LockedError:
        result = None
    return (result if isinstance(result, Lock) else None), fs.count >= n


def holds(lock: Lock | None) -> bool:
    if lock is None:
        return False
    try:
        lock.check()
    except LockedError:
        return False
    return True


@pytest.mark.parametrize("before", ["free", "gone", "stale"])
@pytest.mark.parametrize("make", DISKS)
def test_of_two_contenders_exactly_one_wins(make: str, before: str) -> None:
    first_is_ahead = True
    for n in range(1, 1000):
        clock = ManualClock()
        disk = DISKS[make](clock=clock)
        if before != "free":
            take(disk, clock)
            clock.advance(1 if before == "gone" else 601)

        def judged(pid: int, start_time: int) -> bool:
            return pid != ONE.pid  # the two contenders live

        rivals: list[Lock | None] = []
        two, three = (SAME_HOST, replace(SAME_HOST, pid=300)) if before == "gone" else (OTHER_HOST, SAME_HOST)

        def rival(
            disk: MemoryFileSystem = disk, clock: ManualClock = clock, who: Identity = three, out: Any = rivals
        ) -> None:
            try:
                out.append(take(disk, clock, who, judged))
            except LockedError:
                out.append(None)

        mine, reached = run_beside(disk, n, lambda fs, clock=clock, who=two: take(fs, clock, who, judged), rival)
        if not reached:
            assert n > 5
            break
        assert len(rivals) == 1
        first_is_ahead &= mine is not None
        assert [holds(mine), holds(rivals[0])].count(True) == 1
        assert (mine is None) != (rivals[0] is None)
        assert holder(disk) == (mine or rivals[0]).record.token  # type: ignore[union-attr]
    assert not first_is_ahead


@pytest.mark.parametrize("make", DISKS)
def test_a_third_that_slips_in_still_leaves_one(make: str) -> None:
    # Two judges a dead lock; before its n-th call three takes over, and before the m-th four tries.
    for n in range(1, 14):
        for m in range(n, 20):
            clock = ManualClock()
            disk = DISKS[make](clock=clock)
            take(disk, clock)
            locks: list[Lock | None] = []

            def on_call(
                call: Call, disk: Any = disk, clock: Any = clock, out: Any = locks, n: int = n, m: int = m
            ) -> None:
                for number, pid in ((n, 300), (m, 400)):
                    if call.number == number:
                        try:
                            out.append(take(disk, clock, replace(SAME_HOST, pid=pid), lambda pid, _: pid != ONE.pid))
                        except LockedError:
                            out.append(None)

            try:
                fs = FaultyFileSystem(disk, on_call=on_call)
                locks.append(take(fs, clock, SAME_HOST, lambda pid, _: pid != ONE.pid))
            except LockedError:
                locks.append(None)
            assert [holds(lock) for lock in locks].count(True) == 1


@pytest.mark.parametrize("make", DISKS)
def test_a_holder_judged_by_mistake_keeps_its_lock(make: str) -> None:
    # The holder's heartbeat, check or release comes while another host is taking it for dead.
    for use in (Lock.refresh, Lock.check):
        for n in range(1, 1000):
            clock = ManualClock()
            disk = DISKS[make](clock=clock)
            first = take(disk, clock)
            clock.advance(601)
            kept: list[bool] = []

            def beat(first: Lock = first, out: list[bool] = kept, use: Any = use) -> None:
                try:
                    use(first)
                    out.append(True)
                except LockedError:
                    out.append(False)

            second, reached = run_beside(disk, n, lambda fs, clock=clock: take(fs, clock, OTHER_HOST), beat)
            if not reached:
                assert n > 5
                break
            assert [holds(first), holds(second)].count(True) == 1
            if use is Lock.refresh and kept == [True]:
                assert second is None or not holds(first)


@pytest.mark.parametrize("make", DISKS)
def test_a_release_under_judgement_leaves_no_lock_of_the_released(make: str) -> None:
    for n in range(1, 1000):
        clock = ManualClock()
        disk = DISKS[make](clock=clock)
        first = take(disk, clock)
        clock.advance(601)
        second, reached = run_beside(disk, n, lambda fs, clock=clock: take(fs, clock, OTHER_HOST), first.release)
        if not reached:
            break
        if second is None:
            assert holder(disk) is None
        else:
            second.check()


@pytest.mark.parametrize("make", DISKS)
def test_a_contender_that_dies_anywhere_leaves_a_lock_that_works(make: str) -> None:
    for n in range(1000):
        clock = ManualClock()
        disk = DISKS[make](clock=clock)
        take(disk, clock)
        clock.advance(601)
        try:
            take(FaultyFileSystem(disk, crash_at=n), clock, OTHER_HOST)
        except SimulatedCrash:
            pass
        else:
            assert n > 5
            break
        for found in (disk, disk.crash(n), disk.crash(keep="all"), disk.crash(keep="none")):
            waiting = ManualClock(clock.wall() + 601)
            third = Lock.acquire(found, "/", "llama", SAME_HOST, waiting, STALE_S, is_alive=gone)
            third.check()
            names = [name for name in found.listdir("/") if name != ".llama.lock"]
            assert names == [] or found.stat("/" + names[0]).mtime + 600 >= waiting.wall()


def test_a_valid_lock_left_aside_by_a_dead_contender_is_taken_back(disk: MemoryFileSystem, clock: ManualClock) -> None:
    for use in (Lock.check, Lock.refresh, Lock.release):
        first = take(disk, clock)
        disk.rename("/.llama.lock", "/.llama.lock.aside-0123456789abcdef")
        use(first)
        if use is Lock.release:
            assert disk.listdir("/") == []
        else:
            first.check()
            assert disk.listdir("/") == [".llama.lock"]
            first.release()


@pytest.mark.parametrize("make", DISKS)
def test_every_storage_error_is_raised_and_leaves_no_false_holder(make: str) -> None:
    for n in range(1, 1000):
        clock = ManualClock()
        disk = DISKS[make](clock=clock)
        take(disk, clock)
        fs = FaultyFileSystem(disk, fail_at=n, error=errno.EIO)
        try:
            second = take(fs, clock, SAME_HOST, gone)
        except StorageError:
            # What is there is the dead one's, or nothing: never ours, which nobody would release.
            record = getattr(read_lock(disk, "/", "llama"), "record", None)
            assert record is None or record.identity == ONE
        else:
            assert holder(disk) == second.record.token
            if fs.failed is None:
                assert n > 5
                break
        assert disk.nopen == 0


def test_debris_is_swept_when_it_is_old(clock: ManualClock) -> None:
    disk = MemoryFileSystem(clock=clock)
    for name in (".llama.lock.temp-0123456789abcdef", ".llama.lock.aside-0123456789abcdef", ".llama.lock.temp-x"):
        atomic.write_file(disk, f"/{name}", b"x")
    take(disk, clock).release()
    assert len(disk.listdir("/")) == 3
    clock.advance(601)
    take(disk, clock).release()
    assert disk.listdir("/") == [".llama.lock.temp-x"]


def test_a_lock_that_may_not_be_read_is_an_error_not_a_free_place(clock: ManualClock) -> None:
    disk = MemoryFileSystem(clock=clock)
    take(disk, clock)
    disk.deny("/.llama.lock")
    with pytest.raises(StorageError) as caught:
        take(disk, clock, SAME_HOST, gone)
    assert caught.value.errno == errno.EACCES


def test_all_of_the_identity_is_kept() -> None:
    raw = lockfile.encode(lockfile.LockRecord("t", replace(ONE, host="ü" * 64), 1.25, 2.5))
    assert len(raw) == 1024
    decoded = lockfile.decode(raw)
    assert decoded is not None
    assert asdict(decoded.identity) == asdict(replace(ONE, host="ü" * 64))
    assert (decoded.since, decoded.heartbeat) == (1.25, 2.5)
