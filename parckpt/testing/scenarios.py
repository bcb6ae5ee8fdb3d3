"""What the ranks of one job may do to each other, as scenes that all of them play together.

The same scenes run on ranks in threads and under mpiexec. A scene gets a communicator and an empty directory of its
own, and raises `AssertionError` on the rank that saw something wrong.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from parckpt.checkpointer import ModelCheckpoint
from parckpt.comm.base import Communicator
from parckpt.comm.collective import allgather_bytes
from parckpt.comm.wait import Waiter
from parckpt.core.config import CheckpointConfig
from parckpt.core.leaves import Leaf, PerRank, Shard
from parckpt.errors import (
    ConfigError,
    LayoutError,
    NoSpaceError,
    ParckptError,
    RankError,
    StateMismatchError,
    StateWarning,
    StepMismatchError,
    StorageError,
)
from parckpt.savefile import save_checkpoint
from parckpt.storage.filesystem import FileSystem, storage_error
from parckpt.testing.faulty import Call, FaultyFileSystem
from parckpt.testing.jobs import LAYOUTS, QuickFileSystem

__all__ = ["SCENES", "Scene"]

Scene = Callable[[Communicator, str], None]
Array = npt.NDArray[Any]
E = TypeVar("E", bound=ParckptError)

SCENES: dict[str, Scene] = {}
"""By name. Each works on two ranks or more."""

LIMIT_S = 60.0

STRIDE = 5
"""Of a save's calls one in so many is failed; which ones depends on the number of ranks."""

NEVER = 1000
"""Steps between saves, where a scene is to be without."""


def _scene(fn: Scene) -> Scene:
    SCENES[fn.__name__] = fn
    return fn


def _checkpoint(comm: Communicator, directory: str, steps: int = NEVER, **options: Any) -> ModelCheckpoint:
    filesystem: FileSystem = options.pop("filesystem", None) or QuickFileSystem()
    config = CheckpointConfig(save_checkpoint_steps=steps, agree_timeout_s=LIMIT_S, **options)
    return ModelCheckpoint("net", directory, config, comm=comm, filesystem=filesystem)


def _state(comm: Communicator, step: int) -> dict[str, Any]:
    """Two rows a rank, and a bias on all."""
    rows = np.full((2, 3), 10.0 * step + comm.rank)
    return {
        "w": Shard(rows, (2 * comm.size, 3), (2 * comm.rank, 0)),
        "b": np.full(5, float(step), np.float32),
        "lr": 0.5 / step,
        "at": PerRank(comm.rank + step),
    }


def _assert_restores(comm: Communicator, directory: str, step: int) -> None:
    with _checkpoint(comm, directory) as ckpt:
        state = _state(comm, 99)
        assert ckpt.restore(state).step == step
        _assert_is(comm, state, step)


def _assert_is(comm: Communicator, state: Mapping[str, Any], step: int) -> None:
    want = _state(comm, step)
    np.testing.assert_array_equal(state["w"].data, want["w"].data)
    np.testing.assert_array_equal(state["b"], want["b"])
    assert (state["lr"], state["at"].value) == (want["lr"], want["at"].value)


def _caught(act: Callable[[], object]) -> Exception:
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def _same_everywhere(comm: Communicator, act: Callable[[], object], kind: type[E]) -> E:
    """Every rank's ``act`` must raise the same error of this class."""
    error = _caught(act)
    said = allgather_bytes(comm, f"{type(error).__name__}: {error}".encode(), Waiter(LIMIT_S))
    assert len(set(said)) == 1, said
    assert isinstance(error, kind), said[0]
    return error


def _assert_in(text: object, *parts: str) -> None:
    assert all(part in str(text) for part in parts), f"{parts} should be in: {text}"


def _visible(directory: str) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


def _meet(comm: Communicator) -> None:
    allgather_bytes(comm, b"", Waiter(LIMIT_S))


# -- the round ----------------------------------------------------------------------------------------------------


@_scene
def a_rank_that_leaves_early_answers(comm: Communicator, directory: str) -> None:
    """The others go on as long as nothing has to be saved; at the end the steps differ, and that is said."""
    last = comm.size - 1

    def train() -> None:
        with _checkpoint(comm, directory) as ckpt:
            for step in range(1, 3 if comm.rank == last else 6):
                ckpt.step_end(_state(comm, step), step)

    error = _same_everywhere(comm, train, StepMismatchError)
    _assert_in(error, "leaving at step 5: rank", f"leaving at step 2: rank {last}")
    assert not _visible(directory)


@_scene
def a_rank_that_leaves_misses_a_save(comm: Communicator, directory: str) -> None:
    """A save is due for the others: an error on all, not a wait without end."""

    def train() -> None:
        with _checkpoint(comm, directory, steps=3) as ckpt:
            for step in range(1, 3 if comm.rank == 1 else 6):
                ckpt.step_end(_state(comm, step), step)

    error = _same_everywhere(comm, train, StepMismatchError)
    _assert_in(error, "step_end at step 3: rank", "leaving at step 2: rank 1")


@_scene
def poll_and_wait_meet_step_end(comm: Communicator, directory: str) -> None:
    with _checkpoint(comm, directory) as ckpt:
        for step in range(1, 4):
            if comm.rank == 0:
                ckpt.poll() if step == 2 else ckpt.wait()
            else:
                ckpt.step_end(_state(comm, step), step)
        assert ckpt.latest_ckpt_file_name == ""
        path = ckpt.save_now(_state(comm, 7), 7)
        assert path == ckpt.latest_ckpt_file_name
    _assert_restores(comm, directory, 7)


@_scene
def steps_differ_when_a_save_is_due(comm: Communicator, directory: str) -> None:
    with _checkpoint(comm, directory, steps=4) as ckpt:
        ckpt.step_end(_state(comm, 3), 3)
        step = 5 if comm.rank == 1 else 4
        error = _same_everywhere(comm, lambda: ckpt.step_end(_state(comm, step), step), StepMismatchError)
        _assert_in(error, "step_end at step 4: rank", "step_end at step 5: rank 1")
        assert _visible(directory) == []
        # Once they agree again, all goes on.
        ckpt.step_end(_state(comm, 6), 6)
        _assert_in(ckpt.latest_ckpt_file_name, "net-1_6")
    _assert_restores(comm, directory, 6)


@_scene
def a_save_is_due_and_one_rank_polls(comm: Communicator, directory: str) -> None:
    with _checkpoint(comm, directory, steps=2) as ckpt:
        ckpt.step_end(_state(comm, 1), 1)
        act = ckpt.poll if comm.rank == 1 else lambda: ckpt.step_end(_state(comm, 2), 2)
        error = _same_everywhere(comm, act, StepMismatchError)
        _assert_in(error, "step_end at step 2: rank", "poll at step 1: rank 1")
        ckpt.step_end(_state(comm, 2), 2)


@_scene
def restore_meets_step_end(comm: Communicator, directory: str) -> None:
    with _checkpoint(comm, directory) as ckpt:
        state = _state(comm, 1)
        act = (lambda: ckpt.restore(state)) if comm.rank == 1 else lambda: ckpt.step_end(state, 1)
        error = _same_everywhere(comm, act, StepMismatchError)
        _assert_in(error, "restore at step 0: rank 1", "step_end at step 1: rank")
        _assert_is(comm, state, 1)
        ckpt.step_end(_state(comm, 2), 2)


@_scene
def save_now_meets_step_end(comm: Communicator, directory: str) -> None:
    with _checkpoint(comm, directory) as ckpt:
        act = (lambda: ckpt.save_now(_state(comm, 1), 1)) if comm.rank == 0 else lambda: ckpt.step_end(None, 1)
        error = _same_everywhere(comm, act, StepMismatchError)
        _assert_in(error, "save_now at step 1: rank 0", "step_end at step 1: rank")
        assert _visible(directory) == []
        ckpt.save_now(_state(comm, 2), 2)
    _meet(comm)  # root is still tidying when the others have left
    assert not [name for name in os.listdir(directory) if "staging" in name or "trash" in name]


@_scene
def a_rank_leaves_by_an_exception(comm: Communicator, directory: str) -> None:
    """Its own error passes; the others hear of it in their next call, whichever that is."""
    last = comm.size - 1

    def train() -> None:
        with _checkpoint(comm, directory, steps=2) as ckpt:
            for step in range(1, 5):
                if step == 3 and comm.rank == last:
                    raise ZeroDivisionError("the program's own")
                ckpt.step_end(_state(comm, step), step)

    error = _caught(train)
    if comm.rank == last:
        assert isinstance(error, ZeroDivisionError)
    else:
        assert isinstance(error, RankError), repr(error)
        _assert_in(error, f"rank {last} left because of an exception")
    _meet(comm)
    _assert_restores(comm, directory, 2)


@_scene
def a_rank_leaves_by_an_exception_and_the_others_are_done(comm: Communicator, directory: str) -> None:
    """There is no last save then, and those who leave in order are told."""

    def train() -> None:
        with _checkpoint(comm, directory, steps=2) as ckpt:
            for step in range(1, 4):
                ckpt.step_end(_state(comm, step), step)
            if comm.rank == 1:
                raise ZeroDivisionError("the program's own")

    error = _caught(train)
    assert isinstance(error, ZeroDivisionError if comm.rank == 1 else RankError), repr(error)
    _meet(comm)
    _assert_restores(comm, directory, 2)


@_scene
def a_rank_closes_early(comm: Communicator, directory: str) -> None:
    """`close` is leaving, too: it waits until the others leave."""
    ckpt = _checkpoint(comm, directory)
    ckpt.step_end(_state(comm, 1), 1)
    if comm.rank != 1:
        ckpt.step_end(_state(comm, 2), 2)
        ckpt.poll()
    ckpt.close()
    ckpt.close()
    assert isinstance(_caught(ckpt.poll), ConfigError)
    _meet(comm)
    assert _visible(directory) == []


@_scene
def the_last_step_is_saved_on_leaving(comm: Communicator, directory: str) -> None:
    with _checkpoint(comm, directory, steps=2, integrated_save=False) as ckpt:
        for step in range(1, 4):
            ckpt.step_end(_state(comm, step), step)
    assert _visible(directory) == ["net-1_2", "net-1_3"]
    _assert_restores(comm, directory, 3)


# -- errors -------------------------------------------------------------------------------------------------------


def _layouts() -> dict[str, dict[str, Any]]:
    crc_first = {"crc-first": {"format": "safetensors", "crc_check": True}}
    return {**LAYOUTS, **crc_first}


@_scene
def a_state_callable_raises(comm: Communicator, directory: str) -> None:
    """On the first save and on a later one, on each rank in turn; a later save works."""
    with _checkpoint(comm, directory, steps=1, remove_redundancy=True) as ckpt:
        for step in range(1, comm.size + 3):

            def state(step: int = step) -> dict[str, Any]:
                if comm.rank == step - 1:
                    raise KeyError("weights")
                return _state(comm, step)

            if step <= comm.size:
                error = _same_everywhere(comm, lambda s=step: ckpt.step_end(state, s), RankError)  # type: ignore[misc]
                _assert_in(error, "KeyError: 'weights'", f"rank {step - 1}")
                assert error.failures == {step - 1: "KeyError: 'weights'"}
                assert _visible(directory) == []
            else:
                ckpt.step_end(state, step)
        failing = comm.size - 1

        def later() -> dict[str, Any]:
            if comm.rank == failing:
                raise KeyError("later")
            return _state(comm, 50)

        _assert_in(_same_everywhere(comm, lambda: ckpt.step_end(later, 50), RankError), "KeyError: 'later'")
        # Leaving tries once more to save step 50; a state that works is needed for that.
        ckpt.step_end(_state(comm, 51), 51)
    _assert_restores(comm, directory, 51)


@_scene
def a_leaf_cannot_be_read(comm: Communicator, directory: str) -> None:
    """In every layout, on each rank in turn, while the plan is new and while it is known."""
    for layout, options in _layouts().items():
        failing: set[int] = set()

        def leaf(length: int, value: float, failing: set[int] = failing) -> Leaf:
            def read_into(out: Array) -> None:
                if comm.rank in failing:
                    raise MemoryError("no room on the device")
                out[...] = value

            return Leaf((length, 2), np.float32, read_into, lambda array: None)

        def state(step: int) -> dict[str, Any]:
            own = Shard(leaf(4, step + comm.rank), (4 * comm.size, 2), (4 * comm.rank, 0))
            return {"device": own, "copy": leaf(3, step)}

        place = f"{directory}/{layout}"
        with _checkpoint(comm, place, steps=1, replica_check="never", **options) as ckpt:
            for step in range(1, comm.size + 1):
                failing.clear()
                failing.add(step - 1)
                error = _same_everywhere(comm, lambda s=step: ckpt.step_end(state(s), s), RankError)  # type: ignore[misc]
                _assert_in(error, "MemoryError: no room on the device", f"rank {step - 1}")
                assert _visible(place) == [], layout
            failing.clear()
            ckpt.step_end(state(20), 20)
            before = _visible(place)
            failing.add(1)
            _same_everywhere(comm, lambda: ckpt.step_end(state(21), 21), RankError)
            assert _visible(place) == before
            failing.clear()
            ckpt.step_end(state(22), 22)
            assert "net-1_22" in ckpt.latest_ckpt_file_name


@_scene
def an_appended_value_cannot_be_read(comm: Communicator, directory: str) -> None:
    """On each rank in turn, while the plan is new and while it is known."""
    failing = {0}

    def read_into(out: Array) -> None:
        if comm.rank in failing:
            raise MemoryError("no room on the device")
        out[...] = 7

    append = {"seen": Leaf((2,), np.float32, read_into)}
    with _checkpoint(comm, directory, steps=1, remove_redundancy=True, append_info=[append]) as ckpt:
        for first in (1, 20):
            for rank in range(comm.size):
                failing.clear()
                failing.add(rank)
                before = _visible(directory)
                step = first + rank
                error = _same_everywhere(comm, lambda s=step: ckpt.step_end(_state(comm, s), s), RankError)  # type: ignore[misc]
                _assert_in(error, "MemoryError: no room on the device", f"rank {rank}")
                assert _visible(directory) == before
            failing.clear()
            ckpt.step_end(_state(comm, first + 10), first + 10)
    _assert_restores(comm, directory, 30)


@_scene
def a_replica_check_cannot_read(comm: Communicator, directory: str) -> None:
    def read_into(out: Array) -> None:
        if comm.rank == 1:
            raise OSError(errno.EIO, "device")
        out[...] = 1

    with _checkpoint(comm, directory, steps=1) as ckpt:
        state = {"copy": Leaf((3,), np.float32, read_into)}
        error = _same_everywhere(comm, lambda: ckpt.save_now(state, 1), RankError)
        _assert_in(error, "device", "rank 1")
        assert _visible(directory) == []
        ckpt.save_now(_state(comm, 2), 2)


@_scene
def a_target_cannot_be_written(comm: Communicator, directory: str) -> None:
    """`Leaf.write_from` fails on one rank of a restore."""
    with _checkpoint(comm, directory) as ckpt:
        ckpt.save_now({"w": np.arange(6.0)}, 1)

    def write_from(array: Array) -> None:
        if comm.rank == 1:
            raise ValueError("no device")

    with _checkpoint(comm, directory) as ckpt:
        state = {"w": Leaf((6,), np.float64, lambda out: None, write_from)}
        _assert_in(_same_everywhere(comm, lambda: ckpt.restore(state), RankError), "ValueError: no device", "rank 1")


def _failing(operation: str, name: str, code: int) -> tuple[FileSystem, set[str]]:
    """A file system whose ``operation`` on paths that end in ``name`` fails while the set has anything in it."""
    active: set[str] = set()

    class Failing(FaultyFileSystem):
        def _call(self, called: str, path: str, act: Callable[[], Any], on_failure: Any = None) -> Any:
            if active and called == operation and path.endswith(name):
                raise _error(operation, path, code)
            return act()

    return Failing(QuickFileSystem()), active


def _error(operation: str, path: str, code: int) -> StorageError:
    return storage_error(operation, path, code)


@_scene
def the_disk_refuses_one_rank(comm: Communicator, directory: str) -> None:
    """Full, read-only or broken, for one rank, in every layout: one error on all, and what was there stays."""
    kinds: list[tuple[str, str, int, type[StorageError]]] = [
        ("mkdir", "rank_1", errno.EACCES, StorageError),
        ("open", ".ckpt", errno.EACCES, StorageError),
        ("pwrite", ".ckpt", errno.ENOSPC, NoSpaceError),
        ("fsync", ".ckpt", errno.EIO, StorageError),
        ("pwrite", "record", errno.EDQUOT, NoSpaceError),
    ]
    for layout, options in LAYOUTS.items():
        for number, (operation, name, code, kind) in enumerate(kinds):
            gathered = layout == "integrated"
            if gathered and name == "rank_1":
                name = "rank_0"
            culprit = 0 if gathered else 1
            fs, active = _failing(operation, name, code)
            place = f"{directory}/{layout}-{number}"
            with _checkpoint(comm, place, steps=1, filesystem=fs if comm.rank == culprit else None, **options) as ckpt:
                active.add("now")
                error = _same_everywhere(comm, lambda: ckpt.step_end(_state(comm, 1), 1), kind)
                assert error.errno == code
                _assert_in(error, f"rank {culprit}")
                assert _visible(place) == []
                active.clear()
                ckpt.step_end(_state(comm, 2), 2)
                before = _visible(place)
                active.add("now")
                _same_everywhere(comm, lambda: ckpt.step_end(_state(comm, 3), 3), kind)
                assert _visible(place) == before
                active.clear()
                # A new start restores the last good one.
                again = _state(comm, 9)
                assert ckpt.restore(again).step == 2
                _assert_is(comm, again, 2)
            _meet(comm)  # root is still tidying when the others have left
            hidden = [one for one in os.listdir(place) if "staging" in one or "trash" in one]
            assert hidden == [], hidden


@_scene
def every_call_of_one_rank_fails_once(comm: Communicator, directory: str) -> None:
    """The n-th call of root, then of rank 1, in a save of the steady state, for one n in five until a save has less."""
    for culprit in (0, 1):
        for number in range(1 + comm.size % STRIDE, 200, STRIDE):
            plan: dict[str, int] = {}
            seen: list[Call] = []

            class Nth(FaultyFileSystem):
                def _call(self, called: str, path: str, act: Callable[[], Any], on_failure: Any = None) -> Any:
                    if "left" in plan and "lock" not in path:  # noqa: B023
                        seen.append(Call(len(seen) + 1, called, path))  # noqa: B023
                        plan["left"] -= 1  # noqa: B023
                        if plan["left"] == 0:  # noqa: B023
                            if called == "close":
                                act()
                            raise _error(called, path, errno.EIO)
                    return act()

            place = f"{directory}/{culprit}-{number}"
            fs = Nth(QuickFileSystem()) if comm.rank == culprit else None
            failed = False
            with _checkpoint(comm, place, steps=1, integrated_save=False, filesystem=fs) as ckpt:
                ckpt.step_end(_state(comm, 1), 1)
                ckpt.step_end(_state(comm, 2), 2)
                plan["left"] = number
                try:
                    ckpt.step_end(_state(comm, 3), 3)
                except StorageError as error:
                    failed = error.errno == errno.EIO
                reached = plan.pop("left") <= 0
            outcomes = allgather_bytes(comm, b"%d" % failed, Waiter(LIMIT_S))
            assert len(set(outcomes)) == 1, (outcomes, seen[-1:])
            hits = allgather_bytes(comm, b"%d" % reached, Waiter(LIMIT_S))
            _assert_restores(comm, place, 3)
            if hits[culprit] == b"0":
                break
        else:
            raise AssertionError("a save of two tensors has no 200 calls")


@_scene
def bad_layouts_are_named(comm: Communicator, directory: str) -> None:
    """The same LayoutError on all ranks, with tensor, ranks and boxes; what was saved before stays."""
    one = comm.rank == 1
    n = comm.size

    def shard(start: int, length: int, total: int = 4 * n, dtype: Any = np.float32) -> Shard:
        return Shard(np.zeros((length, 2), dtype), (total, 2), (start, 0))

    start = 4 * comm.rank
    cases: dict[str, tuple[Any, str]] = {
        "dtype": (
            shard(start, 4, dtype=np.float16 if one else np.float32),
            "dtype differs: float32 on rank 0, float16 on rank 1",
        ),
        "shape": (np.zeros(3 if one else 4), "shape differs: (4,) on rank 0, (3,) on rank 1"),
        "global": (shard(start, 4, 4 * n + one), f"shape differs: ({4 * n}, 2) on rank 0, ({4 * n + 1}, 2) on rank 1"),
        "kinds": (np.zeros((4 * n, 2), np.float32) if one else shard(start, 4), "Shard on rank 0, array on rank 1"),
        "hole": (shard(start + one, 4 - one), "no rank holds the box at (4, 0) of shape (1, 2)"),
        "overlap": (shard(start - one, 4 + one), "(3, 0) of shape (5, 2) on rank 1 overlaps the box at offsets (0, 0)"),
        "range": (
            shard(4 * n - 3, 4) if one else shard(start, 4),
            f"({4 * n - 3}, 0) of shape (4, 2) on rank 1 is out of range",
        ),
        "twice": ([shard(start, 4), shard(start, 4)] if one else shard(start, 4), "(4, 0) of shape (4, 2) on rank 1"),
    }
    for layout, options in LAYOUTS.items():
        place = f"{directory}/{layout}"
        with _checkpoint(comm, place, steps=1, **options) as ckpt:
            ckpt.step_end(_state(comm, 1), 1)
            _meet(comm)  # root has still to note what was published
            before = sorted(os.listdir(place))
            for name, (leaf, part) in cases.items():
                state = {**_state(comm, 2), f"bad.{name}": leaf}
                error = _same_everywhere(comm, lambda: ckpt.step_end(state, 2), LayoutError)  # noqa: B023
                _assert_in(error, f"'bad.{name}'", part)
                assert sorted(os.listdir(place)) == before, name
            ckpt.step_end(_state(comm, 3), 3)
        _assert_restores(comm, place, 3)


@_scene
def forgotten_shards_are_found(comm: Communicator, directory: str) -> None:
    last = comm.size - 1
    for layout, options in LAYOUTS.items():
        with _checkpoint(comm, f"{directory}/{layout}", steps=1, **options) as ckpt:
            piece = np.full(4, float(comm.rank == last))
            error = _same_everywhere(comm, lambda: ckpt.step_end({"u": piece}, 1), LayoutError)  # noqa: B023
            _assert_in(error, f"'u' differs between ranks 0 and {last}", "Shard", "PerRank")
            error = _same_everywhere(
                comm,
                lambda: ckpt.step_end({"v": {"lr": float(comm.rank == last)}}, 2),
                LayoutError,
            )
            _assert_in(error, f"'v.lr' differs between ranks 0 and {last}", "PerRank")
            assert _visible(f"{directory}/{layout}") == []
            ckpt.step_end({"u": PerRank(piece), "v": PerRank(comm.rank)}, 3)


@_scene
def arguments_differ(comm: Communicator, directory: str) -> None:
    one = comm.rank == 1

    def make(prefix: str = "net", place: str = directory, per_epoch: int = 10, **options: Any) -> ModelCheckpoint:
        config = CheckpointConfig(agree_timeout_s=LIMIT_S, **options)
        return ModelCheckpoint(prefix, place, config, comm=comm, steps_per_epoch=per_epoch)

    differing: list[tuple[Callable[[], object], tuple[str, ...]]] = [
        (lambda: make("other" if one else "net"), ("prefix", "'net' on rank 0", "'other' on rank 1")),
        (lambda: make(place=f"{directory}/b" if one else f"{directory}/a"), ("directory", "/a' on rank 0", "/b' on")),
        (lambda: make(per_epoch=5 if one else 10), ("steps_per_epoch", "10 on rank 0", "5 on rank 1")),
        (lambda: make(save_checkpoint_steps=5 if one else 7), ("save_checkpoint_steps", "7 on rank 0", "5 on rank 1")),
        (lambda: make(crc_check=one), ("crc_check", "False on rank 0", "True on rank 1")),
        (lambda: make(file_mode=0o640 if one else 0o600), ("file_mode", "on rank 0", "on rank 1")),
        (lambda: make(place=f"{directory}/rank_{comm.rank}"), ("directory", "rank_0' on rank 0", "drop rank_<n>")),
        (lambda: make("a/b" if one else "net"), ("a/b", "rank 1")),
        (lambda: make(place=" " if one else directory), ("blank", "rank 1")),
    ]
    for act, parts in differing:
        _assert_in(_same_everywhere(comm, act, ConfigError), *parts)
    assert os.listdir(directory) == []
    make().close()


@_scene
def failed_saves_are_endured(comm: Communicator, directory: str) -> None:
    """``on_save_error="warn"``: two failures pass, the third in a row is raised, whoever failed and wherever."""
    for operation, name in (("pwrite", ".ckpt"), ("open", "plan"), ("pwrite", "manifest")):
        culprit = 0 if name != ".ckpt" else 1
        fs, active = _failing(operation, name, errno.ENOSPC)
        place = f"{directory}/{name}"
        options: dict[str, Any] = {"on_save_error": "warn", "max_failed_saves": 3, "integrated_save": False}
        with _checkpoint(comm, place, steps=1, filesystem=fs if comm.rank == culprit else None, **options) as ckpt:
            ckpt.step_end(_state(comm, 1), 1)
            active.add("now")
            ckpt.step_end(_state(comm, 2), 2)
            ckpt.step_end(_state(comm, 3), 3)
            assert "net-1_1" in ckpt.latest_ckpt_file_name
            _same_everywhere(comm, lambda: ckpt.step_end(_state(comm, 4), 4), NoSpaceError)
            active.clear()
            ckpt.step_end(_state(comm, 5), 5)
            active.add("now")
            ckpt.step_end(_state(comm, 6), 6)
            active.clear()
        # The step that failed was still due on leaving.
        _assert_restores(comm, place, 6)


@_scene
def a_restore_does_not_fit_one_rank(comm: Communicator, directory: str) -> None:
    """StateMismatchError on all ranks, and no array half filled."""
    with _checkpoint(comm, directory) as ckpt:
        ckpt.save_now(_state(comm, 1), 1)
        for change, part in (
            ({"b": np.zeros(6, np.float32)}, "b"),
            ({"b": np.zeros(5, np.float64)}, "b"),
            ({"extra": np.zeros(2)}, "extra"),
        ):
            state = {**_state(comm, 9), **(change if comm.rank == 1 else {})}
            kept = _state(comm, 9)
            error = _same_everywhere(comm, lambda: ckpt.restore(state), StateMismatchError)  # noqa: B023
            _assert_in(error, part)
            np.testing.assert_array_equal(state["w"].data, kept["w"].data)
        ckpt.restore(state := _state(comm, 9))
        _assert_is(comm, state, 1)


@_scene
def single_file_saves_disagree(comm: Communicator, directory: str) -> None:
    """`save_checkpoint` with different arguments on the ranks, or with a bad one on one: an error on all."""
    state = _state(comm, 1)
    one = comm.rank == 1
    differing: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
        ({}, "other" if one else "one", ("on rank 0", "on rank 1")),
        ({"integrated_save": not one}, "one", ("on rank 0", "on rank 1")),
        ({"remove_redundancy": one}, "one", ("on rank 0", "on rank 1")),
        ({"crc_check": one}, "one", ("on rank 0", "on rank 1")),
        ({"format": "zip" if one else "ckpt"}, "one", ("zip",)),
    ]
    for options, name, parts in differing:
        act = lambda: save_checkpoint(state, f"{directory}/{name}", comm=comm, **options)  # noqa: B023, E731
        _assert_in(_same_everywhere(comm, act, ConfigError), *parts)
    assert os.listdir(directory) == []
    save_checkpoint(state, f"{directory}/one", comm=comm, filesystem=QuickFileSystem())
    save_checkpoint(state, f"{directory}/several", integrated_save=False, comm=comm, filesystem=QuickFileSystem())
    assert [name for name in _visible(directory) if "manifest" not in name] == ["one.ckpt", "several"]


# -- what users are told ------------------------------------------------------------------------------------------


@_scene
def a_callable_is_called_for_saves_only(comm: Communicator, directory: str) -> None:
    calls: list[int] = []

    def state() -> dict[str, Any]:
        calls.append(ckpt_step[0])
        return _state(comm, ckpt_step[0])

    ckpt_step = [0]
    with _checkpoint(comm, directory, steps=3) as ckpt:
        for step in range(1, 9):
            ckpt_step[0] = step
            ckpt.step_end(state, step)
            if step == 4:
                ckpt.poll()
                ckpt.wait()
        assert calls == [3, 6]
    assert calls == [3, 6, 8]
    _assert_restores(comm, directory, 8)


@_scene
def unchanged_tensors_are_told_once(comm: Communicator, directory: str) -> None:
    """On root, by name, also where appended info changes all the time; not while a single value changes."""
    variants: list[dict[str, Any]] = [
        {},
        {"remove_redundancy": True},
        {"append_info": ["step_num"]},
        {"format": "safetensors", "crc_check": True},
    ]
    for number, options in enumerate(variants):
        place = f"{directory}/{number}"
        told: list[str] = []
        with _checkpoint(comm, place, steps=1, **options) as ckpt:
            state = _state(comm, 1)
            for step in range(1, 9):
                if step in (2, 3):
                    state["w"].data[0, 0] += 1
                elif step > 3:
                    state["w"] = Shard(state["w"].data.copy(), state["w"].global_shape, state["w"].offsets)
                if comm.rank == 0:
                    # Only one of the ranks: in threads, they all share the filters.
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        ckpt.step_end(state, step)
                    told += [str(one.message) for one in caught if issubclass(one.category, StateWarning)]
                else:
                    ckpt.step_end(state, step)
                assert len(told) == (comm.rank == 0 and step > 3), (step, told)
        if comm.rank == 0:
            _assert_in(told[0], "steps 3 and 4", "w, b", "callable")


@_scene
def a_network_fails_on_leaving(comm: Communicator, directory: str) -> None:
    """The config's network cannot be asked on one rank: its error there, and no endless wait on the others."""

    class Network:
        broken = False

        def state_dict(self) -> dict[str, Any]:
            if self.broken:
                raise KeyError("weights")
            return _state(comm, 1)

    network = Network()

    def train() -> None:
        with _checkpoint(comm, directory, saved_network=network) as ckpt:
            ckpt.step_end(step=1)
            network.broken = comm.rank == 1

    error = _caught(train)
    assert isinstance(error, KeyError if comm.rank == 1 else RankError), repr(error)
    _meet(comm)
    assert _visible(directory) == []
