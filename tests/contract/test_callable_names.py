"""Callable prefix and directory: names without epoch and step, found, replaced, pruned and restored all the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt import SELF, CheckpointConfig, ModelCheckpoint
from parckpt.comm.base import Communicator
from parckpt.errors import ConfigError, IntegrityError, LockedError, ParckptError
from parckpt.storage.atomic import read_file
from parckpt.testing.filesystem import MemoryFileSystem
from parckpt.testing.world import run_world

HOME = "/ckpts"


def run(
    disk: MemoryFileSystem,
    prefix: Any,
    steps: range | list[int],
    *,
    directory: Any = HOME,
    restore: bool = False,
    comm: Any = SELF,
    family: str | None = None,
    **options: Any,
) -> tuple[int, list[str]]:
    """A run that saves at each of the steps; the step it began at, and the paths."""
    config = CheckpointConfig(**{"save_checkpoint_steps": 1, "keep_checkpoint_max": 100, **options})
    state = {"w": np.zeros(3), "n": 0}
    paths: list[str] = []
    given: dict[str, Any] = {"comm": comm, "steps_per_epoch": 4, "filesystem": disk, "family": family}
    with ModelCheckpoint(prefix, directory, config, **given) as ckpt:
        begin = ckpt.restore(state).step if restore else 0
        if restore and begin:
            assert state["w"].tolist() == [begin] * 3
        for step in steps:
            state["w"][...] = step
            ckpt.step_end(state, step)
            paths.append(ckpt.latest_ckpt_file_name)
    return begin, paths


def names(disk: MemoryFileSystem, directory: str = HOME) -> list[str]:
    return sorted(name for name in disk.listdir(directory) if not name.startswith(".") and ".manifest" not in name)


def by_step(parameters: Any) -> str:
    return f"at_{parameters.cur_step_num}"


def always(parameters: Any) -> str:
    return "latest"


LAYOUTS = pytest.mark.parametrize("integrated", [True, False], ids=["file", "directory"])


@LAYOUTS
def test_the_name_is_what_was_returned(integrated: bool) -> None:
    disk = MemoryFileSystem()
    seen: list[tuple[int, int, int]] = []

    def prefix(parameters: Any) -> str:
        seen.append((parameters.cur_step_num, parameters.cur_epoch_num, parameters.batch_num))
        return by_step(parameters)

    _, paths = run(disk, prefix, [1, 5, 8, 9], integrated_save=integrated)
    end = ".ckpt" if integrated else ""
    assert paths == [f"{HOME}/at_{step}{end}" for step in (1, 5, 8, 9)]
    assert names(disk) == sorted(f"at_{step}{end}" for step in (1, 5, 8, 9))
    assert seen == [(1, 1, 4), (5, 2, 4), (8, 2, 4), (9, 3, 4)]  # at saves only
    assert disk.stat(f"{HOME}/.CKP.run") is not None
    listed = parckpt.list_checkpoints(HOME, filesystem=disk)
    assert [info.step for info in listed] == [9, 8, 5, 1]
    assert parckpt.latest_checkpoint(HOME, prefix="CKP", filesystem=disk) == paths[-1]


class Loop:
    """A training loop's context; it counts from 1 at each start."""

    def __init__(self, step: int, as_mapping: bool) -> None:
        told = {"cur_step_num": step, "cur_epoch_num": (step + 3) // 4, "batch_num": 4, "epoch_num": 9}
        self.told: Any = told if as_mapping else SimpleNamespace(**told)

    def original_args(self) -> Any:
        return self.told


@pytest.mark.parametrize("as_mapping", [True, False])
def test_in_a_training_loop_it_gets_what_the_loop_tells_with_the_steps_of_the_run(as_mapping: bool) -> None:
    disk = MemoryFileSystem()
    seen: list[Any] = []

    def prefix(p: Any) -> str:
        seen.append((p.cur_step_num, p["cur_epoch_num"], p.batch_num, p.epoch_num, hasattr(p, "loss")))
        with pytest.raises(KeyError):
            p["loss"]
        return by_step(p)

    for _ in range(2):
        state = {"w": np.ones(2)}
        config = CheckpointConfig(saved_network=state, save_checkpoint_steps=3)
        with ModelCheckpoint(prefix, HOME, config, comm=SELF, filesystem=disk) as ckpt:
            ckpt.restore(state)
            ckpt.begin(Loop(0, as_mapping))
            for step in range(1, 7):
                state["w"] += 1
                ckpt.step_end(Loop(step, as_mapping))
    assert seen == [(3, 1, 4, 9, False), (6, 2, 4, 9, False), (9, 3, 4, 9, False), (12, 3, 4, 9, False)]
    assert names(disk) == ["at_12.ckpt", "at_3.ckpt", "at_6.ckpt", "at_9.ckpt"]


@LAYOUTS
def test_it_goes_on_with_the_newest_whatever_it_is_called(integrated: bool) -> None:
    disk = MemoryFileSystem()
    words = ["pear", "apple", "quince", "fig"]
    run(disk, lambda p: words[p.cur_step_num - 1], range(1, 4), integrated_save=integrated)
    begin, _ = run(disk, lambda p: words[p.cur_step_num - 1], [4], restore=True, integrated_save=integrated)
    assert begin == 3
    infos = parckpt.list_checkpoints(HOME, filesystem=disk)
    assert [(info.step, info.sequence) for info in infos] == [(4, 4), (3, 3), (2, 2), (1, 1)]


@LAYOUTS
def test_retention_counts_them(integrated: bool) -> None:
    disk = MemoryFileSystem()
    run(disk, by_step, range(1, 8), integrated_save=integrated, keep_checkpoint_max=2)
    assert [info.step for info in parckpt.list_checkpoints(HOME, filesystem=disk)] == [7, 6]
    assert len(names(disk)) == 2


@LAYOUTS
def test_the_same_name_again_replaces_what_this_run_saved(integrated: bool) -> None:
    disk = MemoryFileSystem()
    _, paths = run(disk, always, range(1, 4), integrated_save=integrated)
    assert len(set(paths)) == 1
    assert [info.step for info in parckpt.list_checkpoints(HOME, filesystem=disk)] == [3]
    assert [name for name in disk.listdir(HOME) if name != ".CKP.run" and not name.startswith("latest")] == []
    begin, again = run(disk, always, [4], restore=True, integrated_save=integrated)
    assert (begin, again) == (3, paths[:1])


@LAYOUTS
def test_what_another_run_saved_is_not_replaced(integrated: bool) -> None:
    disk = MemoryFileSystem()
    end = ".ckpt" if integrated else ""
    run(disk, always, [1], integrated_save=integrated)
    for number in (1, 2):
        _, paths = run(disk, always, [1, 2], integrated_save=integrated)
        assert set(paths) == {f"{HOME}/latest_{number}{end}"}
    assert names(disk) == [f"latest{end}", f"latest_1{end}", f"latest_2{end}"]
    begin, paths = run(disk, always, [3], restore=True, integrated_save=integrated)
    assert (begin, paths) == (2, [f"{HOME}/latest_2{end}"])


def test_a_file_that_is_not_ours_is_not_replaced() -> None:
    disk = MemoryFileSystem()
    run(disk, by_step, [1])
    parckpt.save_checkpoint({"w": np.ones(2)}, f"{HOME}/best.ckpt", filesystem=disk)
    _, paths = run(disk, lambda p: "best", [2], restore=True)
    assert paths == [f"{HOME}/best_1.ckpt"]
    assert parckpt.load_checkpoint(f"{HOME}/best.ckpt", filesystem=disk)["w"].tolist() == [1, 1]


def test_a_callable_that_makes_the_usual_names() -> None:
    disk = MemoryFileSystem()
    usual = lambda p: f"net-{p.cur_epoch_num}_{p.cur_step_num}"  # noqa: E731
    run(disk, usual, [1, 2], integrated_save=False)
    run(disk, "net", [1], integrated_save=False)
    assert names(disk) == ["net-1_1", "net-1_2", "net_1-1_1"]  # numbered on, as with any run's
    assert run(disk, usual, [], restore=True, integrated_save=False)[0] == 2
    assert run(disk, "net", [], restore=True, integrated_save=False)[0] == 1


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (5, "must return a str, not int"),
        (None, "must return a str, not NoneType"),
        ("a/b", "must not hold '/'"),
        ("", "empty"),
        (".hidden", "start with '.'"),
        ("manifest", "parts of a checkpoint"),
        ("rank_0", "parts of a checkpoint"),
        ("x.0123456789abcdef.manifest", "parts of a checkpoint"),
        ("a\nb", "control characters"),
        ("x" * 161, "161 bytes"),
    ],
)
def test_what_cannot_be_a_name_fails_the_save(returned: Any, message: str) -> None:
    disk = MemoryFileSystem()
    with pytest.raises(ConfigError, match=message):
        run(disk, lambda p: returned, [1])
    assert names(disk) == []


def test_a_callable_that_raises_fails_the_save_and_the_next_one_succeeds() -> None:
    def prefix(parameters: Any) -> str:
        if parameters.cur_step_num == 2:
            raise KeyError("no such thing")
        return by_step(parameters)

    disk = MemoryFileSystem()
    run(disk, prefix, [1, 2, 3], on_save_error="warn")
    assert names(disk) == ["at_1.ckpt", "at_3.ckpt"]
    with pytest.raises(ParckptError, match="no such thing"):
        run(disk, prefix, [2])


def test_the_arguments() -> None:
    with pytest.raises(ConfigError, match="family"):
        ModelCheckpoint("net", HOME, comm=SELF, family="other", filesystem=MemoryFileSystem())
    with pytest.raises(ConfigError):
        ModelCheckpoint(always, HOME, comm=SELF, family="a/b", filesystem=MemoryFileSystem())
    for wrong in (7, lambda p: 7, lambda p: None, lambda p: " ", lambda p: "x" * 2000):
        with pytest.raises(ConfigError, match="directory"):
            ModelCheckpoint("net", wrong, comm=SELF, filesystem=MemoryFileSystem())  # type: ignore[arg-type]


def test_families_share_a_directory() -> None:
    disk = MemoryFileSystem()
    with ModelCheckpoint(by_step, HOME, comm=SELF, family="a", filesystem=disk):
        with pytest.raises(LockedError):
            ModelCheckpoint(always, HOME, comm=SELF, family="a", filesystem=disk)
        run(disk, always, [1, 2], family="b")
    run(disk, by_step, [7], family="a")
    assert run(disk, always, [], restore=True, family="b")[0] == 2
    assert run(disk, always, [], restore=True, family="a")[0] == 7


@LAYOUTS
def test_a_damaged_one_is_named_and_the_one_before_taken(integrated: bool) -> None:
    disk = MemoryFileSystem()
    _, paths = run(disk, by_step, [1, 2], integrated_save=integrated)
    for path in reversed(paths):
        if integrated:
            name = next(n for n in disk.listdir(HOME) if n.startswith(path.split("/")[-1][:4]) and "manifest" in n)
        disk.corrupt(f"{HOME}/{name}" if integrated else f"{path}/manifest", 40)
        if path == paths[1]:
            with ModelCheckpoint(by_step, HOME, comm=SELF, filesystem=disk) as ckpt:
                progress = ckpt.restore({"w": np.zeros(3), "n": 0})
            assert (progress.step, [p for p, _ in progress.skipped]) == (1, [path])
    # No fresh start over what cannot be read.
    with ModelCheckpoint(by_step, HOME, comm=SELF, filesystem=disk) as ckpt, pytest.raises(IntegrityError):
        ckpt.restore({"w": np.zeros(3), "n": 0})


# Directories.


def epoch(parameters: Any) -> str:
    return f"{HOME}/epoch_{parameters.cur_epoch_num}"


@pytest.mark.parametrize("prefix", ["m", by_step, always], ids=["fixed", "by step", "always"])
@LAYOUTS
def test_directories_by_epoch(integrated: bool, prefix: Any) -> None:
    disk = MemoryFileSystem()
    run(disk, prefix, range(1, 11), directory=epoch, integrated_save=integrated, keep_checkpoint_max=2)
    for number, newest in ((1, 4), (2, 8), (3, 10)):
        steps = [info.step for info in parckpt.list_checkpoints(f"{HOME}/epoch_{number}", filesystem=disk)]
        assert steps == ([newest] if prefix is always else [newest, newest - 1])
    begin, paths = run(disk, prefix, [11], directory=epoch, restore=True, integrated_save=integrated)
    assert begin == 10
    assert paths[0].startswith(f"{HOME}/epoch_3/")
    infos = [i for n in (1, 2, 3) for i in parckpt.list_checkpoints(f"{HOME}/epoch_{n}", filesystem=disk)]
    assert len({info.sequence for info in infos}) == len(infos)
    assert [name for n in (1, 2, 3) for name in disk.listdir(f"{HOME}/epoch_{n}") if "lock" in name] == []


@pytest.mark.parametrize("restart", [False, True])
@LAYOUTS
def test_ephemeral_ones_live_until_the_next_publish_wherever_that_is(integrated: bool, restart: bool) -> None:
    disk = MemoryFileSystem()
    fails = {5, 9} if restart else set()  # after an ephemeral one, each at the end of an epoch

    def name(parameters: Any) -> str:
        if parameters.cur_step_num in fails:
            fails.remove(parameters.cur_step_num)
            raise ValueError("no name")
        return by_step(parameters)

    options: dict[str, Any] = {"directory": epoch, "integrated_save": integrated, "save_checkpoint_steps": 6}
    for start in (1, 5, 9) if restart else (1,):
        with pytest.raises(ValueError, match="no name") if start + 4 in fails else nullcontext():
            run(disk, name, range(start, 11), restore=True, ephemeral_steps=1, **options)
    steps = {n: [i.step for i in parckpt.list_checkpoints(f"{HOME}/epoch_{n}", filesystem=disk)] for n in (1, 2, 3)}
    assert steps == {1: [], 2: [6], 3: [10]}
    assert [name for n in (1, 2, 3) for name in disk.listdir(f"{HOME}/epoch_{n}") if "lock" in name] == []


def test_back_and_forth_between_directories() -> None:
    disk = MemoryFileSystem()
    odd = lambda p: f"{HOME}/{'odd' if p.cur_step_num % 2 else 'even'}"  # noqa: E731
    run(disk, "m", range(1, 8), directory=odd)
    assert run(disk, "m", [8, 9], directory=odd, restore=True)[0] == 7
    assert run(disk, "m", [], directory=odd, restore=True)[0] == 9
    assert {info.step for info in parckpt.list_checkpoints(f"{HOME}/even", filesystem=disk)} == {2, 4, 6, 8}


def test_a_new_run_in_directories_of_another_does_not_replace_and_outranks() -> None:
    disk = MemoryFileSystem()
    run(disk, "m", range(1, 7), directory=epoch)
    run(disk, "m", [1, 5], directory=epoch)
    assert "m_1-1_1.ckpt" in names(disk, f"{HOME}/epoch_1")
    assert len(names(disk, f"{HOME}/epoch_2")) == 3
    assert run(disk, "m", [], directory=epoch, restore=True)[0] == 5


def test_a_directory_that_another_holds_fails_the_save_and_nothing_else() -> None:
    disk = MemoryFileSystem()
    with ModelCheckpoint("m", f"{HOME}/epoch_2", comm=SELF, filesystem=disk):
        run(disk, "m", range(1, 5), directory=epoch)
        with pytest.raises(LockedError):
            run(disk, "m", [5], directory=epoch, restore=True)
    assert run(disk, "m", [5], directory=epoch, restore=True) == (4, [f"{HOME}/epoch_2/m-2_1.ckpt"])


def test_a_deleted_directory_is_no_error() -> None:
    disk = MemoryFileSystem()
    run(disk, "m", range(1, 10), directory=epoch)
    for name in disk.listdir(f"{HOME}/epoch_3"):
        disk.unlink(f"{HOME}/epoch_3/{name}")
    disk.rmdir(f"{HOME}/epoch_3")
    assert run(disk, "m", [], directory=epoch, restore=True)[0] == 8


def test_the_run_file_is_written_once_a_directory() -> None:
    disk = MemoryFileSystem()
    run(disk, "m", range(1, 11), directory=epoch)
    home = read_file(disk, f"{HOME}/epoch_1/.m.run", 10000)
    run(disk, "m", [11, 12], directory=epoch, restore=True)
    assert read_file(disk, f"{HOME}/epoch_1/.m.run", 10000) == home


# Several ranks.


def together(size: int, program: Callable[[Communicator, int], Any]) -> list[Any]:
    found: list[Any] = [None] * size

    def act(comm: Communicator, rank: int) -> None:
        try:
            found[rank] = program(comm, rank)
        except ParckptError as error:
            found[rank] = error

    run_world(size, act)
    return found


@LAYOUTS
def test_all_ranks_save_to_one_place(integrated: bool) -> None:
    disk = MemoryFileSystem()
    for steps, begin in ((range(1, 6), 0), (range(6, 7), 5)):
        found = together(
            3,
            lambda comm, rank, steps=steps: run(  # type: ignore[misc]
                disk, by_step, steps, directory=epoch, comm=comm, restore=True, integrated_save=integrated
            ),
        )
        assert found[0] == found[1] == found[2]
        assert found[0][0] == begin
    assert names(disk, f"{HOME}/epoch_2") == [f"at_{n}{'.ckpt' if integrated else ''}" for n in (5, 6)]


def test_ranks_that_are_told_different_names_fail_together() -> None:
    disk = MemoryFileSystem()
    found = together(3, lambda comm, rank: run(disk, lambda p: f"name{rank // 2}", [1], comm=comm))
    for error in found:
        assert isinstance(error, ConfigError)
        assert "'name0' on rank 0, 'name1' on rank 2" in str(error)
    found = together(2, lambda comm, rank: run(disk, "m", [1], directory=lambda p: f"{HOME}/rank_{rank}", comm=comm))
    for error in found:
        assert isinstance(error, ConfigError)
        assert "drop rank_<n>" in str(error)
    assert names(disk) == []


def test_only_the_time_of_root_counts_and_only_then_the_others_are_asked() -> None:
    disk = MemoryFileSystem()
    options = {"save_checkpoint_steps": 0, "save_checkpoint_seconds": 10**6}
    found = together(2, lambda comm, rank: run(disk, by_step, [1, 2], comm=comm, **options))
    assert [paths for _, paths in found] == [["", ""], ["", ""]]
    assert names(disk) == ["at_2.ckpt"]  # at the end
