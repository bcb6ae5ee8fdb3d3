"""The callback shape: training loops like MindSpore's drive a ModelCheckpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.callbacks import position
from parckpt.comm.base import Communicator
from parckpt.testing.world import run_world


class Params(dict):
    """As MindSpore's: attributes are items, and a missing one is a KeyError."""

    __getattr__ = dict.__getitem__


class Context:
    def __init__(self, params: Any) -> None:
        self.params = params

    def original_args(self) -> Any:
        return self.params


def train(
    ckpt: Any, network: Any, epochs: int, batch_num: int, *, initial_epoch: int = 0, sink: int = 1, start: int = 0
) -> None:
    """Run a loop that calls the callback as MindSpore's does."""
    params = Params(cur_step_num=start, batch_num=batch_num, train_network=network)
    context = Context(params)
    ckpt.on_train_begin(context)
    for epoch in range(initial_epoch, epochs):
        params["cur_epoch_num"] = epoch + 1
        ckpt.on_train_epoch_begin(context)
        for _ in range(0, batch_num, sink):
            ckpt.on_train_step_begin(context)
            params["cur_step_num"] += sink
            network["w"] += 1
            ckpt.on_train_step_end(context)
        ckpt.on_train_epoch_end(context)
    ckpt.on_train_end(context)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.ckpt"))


@pytest.fixture
def ckpt(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[parckpt.ModelCheckpoint]:
    config = parckpt.CheckpointConfig(**getattr(request, "param", {"save_checkpoint_steps": 3}))
    with parckpt.ModelCheckpoint("net", tmp_path, config, comm=parckpt.SELF) as made:
        yield made


def test_names_and_the_last_save_are_mindspores(ckpt: parckpt.ModelCheckpoint, tmp_path: Path) -> None:
    train(ckpt, {"w": np.zeros(3)}, epochs=2, batch_num=4)
    assert names(tmp_path) == ["net-1_3.ckpt", "net-2_2.ckpt", "net-2_4.ckpt"]
    assert ckpt.latest_ckpt_file_name == str(tmp_path / "net-2_4.ckpt")
    assert parckpt.load_checkpoint(str(tmp_path / "net-2_2.ckpt"))["w"].tolist() == [6.0] * 3
    assert [info.step for info in parckpt.list_checkpoints(tmp_path)] == [8, 6, 3]


def test_short_names_of_the_events_and_an_object_with_fields(ckpt: parckpt.ModelCheckpoint, tmp_path: Path) -> None:
    state = {"w": np.zeros(2)}
    context = Context(SimpleNamespace(cur_step_num=0, cur_epoch_num=1, batch_num=np.int64(4), train_network=state))
    ckpt.begin(context)
    for step in range(1, 5):
        ckpt.step_begin(context)
        context.params.cur_step_num = step
        state["w"] += 1
        ckpt.step_end(context)
    ckpt.epoch_end(context)
    ckpt.end(context)
    assert names(tmp_path) == ["net-1_3.ckpt", "net-1_4.ckpt"]


@pytest.mark.parametrize("ckpt", [{"save_checkpoint_steps": 8}], indirect=True)
def test_steps_jump_with_sinking(ckpt: parckpt.ModelCheckpoint, tmp_path: Path) -> None:
    train(ckpt, {"w": np.zeros(2)}, epochs=3, batch_num=8, sink=4)
    assert names(tmp_path) == ["net-1_8.ckpt", "net-2_8.ckpt", "net-3_8.ckpt"]


def test_a_later_first_epoch_shifts_names_and_schedule_alike(ckpt: parckpt.ModelCheckpoint, tmp_path: Path) -> None:
    train(ckpt, {"w": np.zeros(2)}, epochs=7, batch_num=4, initial_epoch=5)
    # Counted from the loop's begin, as MindSpore does: steps 3, 6 and the last one.
    assert names(tmp_path) == ["net-6_3.ckpt", "net-7_2.ckpt", "net-7_4.ckpt"]
    assert [info.step for info in parckpt.list_checkpoints(tmp_path)] == [28, 26, 23]


def test_a_second_training_goes_on_counting(ckpt: parckpt.ModelCheckpoint, tmp_path: Path) -> None:
    state = {"w": np.zeros(2)}
    train(ckpt, state, epochs=1, batch_num=4)
    train(ckpt, state, epochs=1, batch_num=4)
    assert names(tmp_path) == ["net-1_3.ckpt", "net-1_4.ckpt", "net-2_3.ckpt", "net-2_4.ckpt"]


@pytest.mark.parametrize(("initial_epoch", "start"), [(0, 0), (1, 0), (1, 4)])
def test_a_restored_run_goes_on_however_the_loop_counts(tmp_path: Path, initial_epoch: int, start: int) -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=2)
    with parckpt.ModelCheckpoint("net", tmp_path, config, comm=parckpt.SELF) as ckpt:
        train(ckpt, {"w": np.zeros(2)}, epochs=1, batch_num=4)
    state = {"w": np.zeros(2)}
    with parckpt.ModelCheckpoint("net", tmp_path, config, comm=parckpt.SELF) as ckpt:
        assert ckpt.restore(state).step == 4
        train(ckpt, state, epochs=initial_epoch + 1, batch_num=4, initial_epoch=initial_epoch, start=start)
    assert names(tmp_path) == ["net-1_2.ckpt", "net-1_4.ckpt", "net-2_2.ckpt", "net-2_4.ckpt"]
    assert parckpt.load_checkpoint(str(tmp_path / "net-2_4.ckpt"))["w"].tolist() == [8.0, 8.0]


@pytest.mark.parametrize(("first", "saved"), [(5, [8, 6, 4, 2]), (1, [8, 6, 4, 2])])
def test_without_begin_a_restored_run_goes_on_too(tmp_path: Path, first: int, saved: list[int]) -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=2)
    state = {"w": np.zeros(2)}
    with parckpt.ModelCheckpoint("net", tmp_path, config, comm=parckpt.SELF) as ckpt:
        train(ckpt, state, epochs=1, batch_num=4)
    with parckpt.ModelCheckpoint("net", tmp_path, config, comm=parckpt.SELF) as ckpt:
        ckpt.restore(state)
        for step in range(first, first + 4):
            state["w"] += 1
            epoch = (step - 1) // 4 + 1
            ckpt.step_end(Context(Params(cur_step_num=step, cur_epoch_num=epoch, batch_num=4, train_network=state)))
    assert [info.step for info in parckpt.list_checkpoints(tmp_path)] == saved


def test_the_configs_network_comes_before_the_loops(tmp_path: Path) -> None:
    config = parckpt.CheckpointConfig(saved_network={"mine": np.ones(2)})
    with parckpt.ModelCheckpoint("net", tmp_path, config, comm=parckpt.SELF) as ckpt:
        train(ckpt, {"w": np.zeros(2)}, epochs=1, batch_num=1)
    assert list(parckpt.load_checkpoint(str(tmp_path / "net-1_1.ckpt"))) == ["mine"]


def test_a_loop_without_a_network_uses_what_was_handed_in(tmp_path: Path) -> None:
    config = parckpt.CheckpointConfig(saved_network=lambda: {"w": np.ones(2)})
    with parckpt.ModelCheckpoint("net", tmp_path, config, comm=parckpt.SELF) as ckpt:
        ckpt.step_end(Context({"cur_step_num": 1, "cur_epoch_num": 1, "batch_num": 10}))
    assert names(tmp_path) == ["net-1_1.ckpt"]


def test_steps_per_epoch_of_the_constructor_comes_first(tmp_path: Path) -> None:
    with parckpt.ModelCheckpoint("net", tmp_path, comm=parckpt.SELF, steps_per_epoch=3) as ckpt:
        train(ckpt, {"w": np.zeros(2)}, epochs=1, batch_num=4)
    assert names(tmp_path) == ["net-1_1.ckpt", "net-1_2.ckpt", "net-1_3.ckpt", "net-2_1.ckpt"]


def test_counters_of_append_info(tmp_path: Path) -> None:
    config = parckpt.CheckpointConfig(append_info=[{"epoch_num": 10, "step_num": 400}], save_checkpoint_steps=100)
    with parckpt.ModelCheckpoint("net", tmp_path, config, comm=parckpt.SELF) as ckpt:
        train(ckpt, {"w": np.zeros(2)}, epochs=2, batch_num=4)
    loaded = parckpt.load_checkpoint(str(tmp_path / "net-2_4.ckpt"))
    assert (int(loaded["epoch_num"]), int(loaded["step_num"])) == (12, 408)


def test_nothing_trained_nothing_saved(ckpt: parckpt.ModelCheckpoint, tmp_path: Path) -> None:
    train(ckpt, {"w": np.zeros(2)}, epochs=0, batch_num=4)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("params", "what"),
    [
        ({"cur_step_num": 1, "cur_epoch_num": 1}, "batch_num"),
        ({"cur_step_num": 1, "batch_num": 1}, "cur_epoch_num"),
        ({"cur_step_num": 0, "cur_epoch_num": 1, "batch_num": 1}, "cur_step_num must be at least 1"),
        ({"cur_step_num": 1.5, "cur_epoch_num": 1, "batch_num": 1}, "cur_step_num must be an int, not float"),
        ({"cur_step_num": 1, "cur_epoch_num": 1, "batch_num": -1}, "batch_num"),
    ],
)
def test_a_context_that_lacks_something_is_an_error_that_names_it(
    ckpt: parckpt.ModelCheckpoint, params: dict[str, Any], what: str
) -> None:
    with pytest.raises(parckpt.ConfigError, match=what):
        ckpt.step_end(Context(params))
    with pytest.raises(parckpt.ConfigError, match=what):
        position(Context(SimpleNamespace(**params)))


def test_without_original_args_it_is_no_context(ckpt: parckpt.ModelCheckpoint) -> None:
    with pytest.raises(TypeError, match="original_args"):
        ckpt.begin({"cur_step_num": 1})  # type: ignore[arg-type]


def test_ranks_that_count_epochs_differently_take_roots_word(tmp_path: Path) -> None:
    def rank_main(comm: Communicator, rank: int) -> str:
        with parckpt.ModelCheckpoint("net", tmp_path, comm=comm) as ckpt:
            for step in range(1, 7):
                batch_num = 4 if rank == 0 else 3
                epoch = (step - 1) // batch_num + 1
                params = Params(cur_step_num=step, cur_epoch_num=epoch, batch_num=batch_num)
                params["train_network"] = {"w": np.full(2, step)}
                ckpt.step_end(Context(params))
            return ckpt.latest_ckpt_file_name

    assert run_world(2, rank_main) == [str(tmp_path / "net-2_2.ckpt")] * 2


def test_an_error_in_one_ranks_context_is_everybodys(tmp_path: Path) -> None:
    def rank_main(comm: Communicator, rank: int) -> str:
        with parckpt.ModelCheckpoint("net", tmp_path, comm=comm) as ckpt:
            params = Params(cur_step_num=1, cur_epoch_num=1, train_network={"w": np.zeros(2)})
            if rank != 1:
                params["batch_num"] = 4
            with pytest.raises(parckpt.ConfigError, match="batch_num"):
                ckpt.step_end(Context(params))
            params["batch_num"] = 4
            ckpt.step_end(Context(params))
            return ckpt.latest_ckpt_file_name

    assert run_world(3, rank_main) == [str(tmp_path / "net-1_1.ckpt")] * 3


def test_mindspore_is_needed_for_its_callback_only(
    ckpt: parckpt.ModelCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mindspore", None)
    with pytest.raises(ImportError, match="as_mindspore_callback"):
        ckpt.as_mindspore_callback()


def test_metrics_of_a_step_may_be_what_returns_them(ckpt: parckpt.ModelCheckpoint, tmp_path: Path) -> None:
    state = {"w": np.zeros(2)}
    for step, loss in enumerate([3.0, 2.0, 1.0], 1):
        ckpt.step_end(state, step, metrics=lambda loss=loss: {"loss": loss})
    assert parckpt.inspect(tmp_path / "net-1_3.ckpt").metrics == {"loss": 1.0}
    with pytest.raises(parckpt.ConfigError, match="must be a mapping"):
        ckpt.step_end(state, 4, metrics=lambda: 1.0)  # type: ignore[arg-type,return-value]


def test_a_run_context_and_a_step_contradict_each_other(ckpt: parckpt.ModelCheckpoint) -> None:
    params = Params(cur_step_num=1, cur_epoch_num=1, batch_num=4, train_network={"w": np.zeros(2)})
    with pytest.raises(parckpt.ConfigError, match="run context tells the step"):
        ckpt.step_end(Context(params), 7)
