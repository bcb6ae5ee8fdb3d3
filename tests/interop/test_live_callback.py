"""Model.train with parckpt's callback beside MindSpore's own: the same files, bit for bit, at the same steps."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import nn, train

import parckpt


class LeNet(nn.Cell):
    """Two convolutions and three dense layers, small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 5, pad_mode="valid")
        self.conv2 = nn.Conv2d(3, 6, 5, pad_mode="valid")
        self.pool = nn.MaxPool2d(2, 2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Dense(6 * 5 * 5, 24)
        self.fc2 = nn.Dense(24, 12)
        self.fc3 = nn.Dense(12, 10)
        self.relu = nn.ReLU()

    def construct(self, x: Any) -> Any:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        return self.fc3(self.relu(self.fc2(self.relu(self.fc1(self.flatten(x))))))


def data(batches: int) -> Any:
    """The same batches each time."""
    source = np.random.default_rng(7)
    rows = [
        (source.standard_normal((1, 32, 32)).astype(np.float32), np.int32(source.integers(10)))
        for _ in range(4 * batches)
    ]
    return ds.GeneratorDataset(rows, ["image", "label"], shuffle=False, num_parallel_workers=1).batch(4)


def model_of(net: nn.Cell, optimizer: Any = None) -> Any:
    loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
    return train.Model(net, loss, optimizer or nn.Momentum(net.trainable_params(), 0.01, 0.9))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.suffix in (".ckpt", ".safetensors"))


def same_files(theirs: Path, ours: Path) -> list[str]:
    assert names(ours) == names(theirs)
    for name in names(theirs):
        assert file_contents(ours / name) == file_contents(theirs / name), name
    return names(theirs)


def file_contents(path: Path) -> Any:
    """All bytes; of safetensors the header as what it says, because MindSpore's metadata are in random order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def test_the_example_of_mindspores_page(tmp_path: Path) -> None:
    net = LeNet()
    config = parckpt.CheckpointConfig(save_checkpoint_seconds=100, keep_checkpoint_per_n_minutes=5, saved_network=net)
    assert (config.save_checkpoint_steps, config.save_checkpoint_seconds) == (1, None)
    assert (config.keep_checkpoint_max, config.keep_checkpoint_per_n_minutes) == (5, None)
    assert config.integrated_save
    assert not config.async_save
    assert config.saved_network is net
    with (
        pytest.warns(parckpt.ConfigWarning, match="save_checkpoint_seconds=100 has no effect"),
        pytest.warns(parckpt.ConfigWarning, match="keep_checkpoint_per_n_minutes=5 has no effect"),
    ):
        ckpoint = parckpt.ModelCheckpoint(prefix="LeNet5", directory="./checkpoint", config=config)
    with ckpoint:
        callback = ckpoint.as_mindspore_callback()
        assert isinstance(callback, train.Callback)
        model_of(net).train(10, data(2), callbacks=callback)
        assert callback.latest_ckpt_file_name == str(tmp_path / "checkpoint" / "LeNet5-10_2.ckpt")
    assert names(tmp_path / "checkpoint") == [
        f"LeNet5-{e}_{s}.ckpt" for e, s in [(10, 1), (10, 2), (8, 2), (9, 1), (9, 2)]
    ]
    loaded = ms.load_checkpoint("checkpoint/LeNet5-10_2.ckpt")
    assert list(loaded) == [parameter.name for parameter in net.get_parameters()]
    for parameter in net.get_parameters():
        assert loaded[parameter.name].asnumpy().tobytes() == parameter.asnumpy().tobytes()
    assert parckpt.latest_checkpoint("checkpoint") is not None


OPTIONS: list[dict[str, Any]] = [
    {"save_checkpoint_steps": 3, "keep_checkpoint_max": 2},
    {"save_checkpoint_steps": 4, "keep_checkpoint_max": 10, "crc_check": True},
    {"append_info": ["epoch_num", "step_num", {"epoch_num": 5, "lr": 0.1, "s": "text", "ok": True}]},
    {"save_checkpoint_steps": 5, "format": "safetensors"},
    {
        "append_info": [
            {"tensor": ms.Tensor([[1.5, 2.5]], ms.float64), "p": ms.Parameter(ms.Tensor([3], ms.int16), "p")}
        ]
    },
    {"integrated_save": True, "save_checkpoint_steps": 100},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_both_in_one_training_write_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = train.ModelCheckpoint("net", str(tmp_path / "theirs"), train.CheckpointConfig(**options))
    with parckpt.ModelCheckpoint("net", tmp_path / "ours", parckpt.CheckpointConfig(**options)) as ckpt:
        net = nn.SequentialCell(nn.Flatten(), nn.Dense(32 * 32, 10))
        # No state is handed in: it is the loop's train_network, with the optimizer's state.
        model_of(net).train(3, data(3), callbacks=[theirs, ckpt.as_mindspore_callback()])
    assert same_files(tmp_path / "theirs", tmp_path / "ours")
    assert Path(ckpt.latest_ckpt_file_name).name == Path(theirs.latest_ckpt_file_name).name


def test_random_trainings_write_the_same(tmp_path: Path) -> None:
    source = random.Random(3)
    for number in range(12):
        options = {
            "save_checkpoint_steps": source.choice([1, 2, 3, 4, 5, 7, 100]),
            "keep_checkpoint_max": source.choice([1, 2, 3, 5]),
            "append_info": source.choice([None, ["step_num"], [{"epoch_num": 3, "step_num": 100}]]),
        }
        directory = tmp_path / str(number)
        first = source.choice([0, 0, 0, 1, 3])
        epochs, batches = first + source.randint(1, 3), source.randint(1, 4)
        theirs = train.ModelCheckpoint("n", str(directory / "theirs"), train.CheckpointConfig(**options))
        with parckpt.ModelCheckpoint("n", directory / "ours", parckpt.CheckpointConfig(**options)) as ckpt:
            net = nn.SequentialCell(nn.Flatten(), nn.Dense(32 * 32, 10))
            callbacks = [theirs, ckpt.as_mindspore_callback()]
            model_of(net).train(epochs, data(batches), callbacks=callbacks, initial_epoch=first)
        if options["append_info"] and first:
            # Documented: step_num counts the steps of the epochs before the first, as the names do.
            assert names(directory / "ours") == names(directory / "theirs"), (number, options)
        else:
            assert same_files(directory / "theirs", directory / "ours"), (number, options)


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE], ids=["pynative", "graph"])
def test_both_modes(tmp_path: Path, mode: int) -> None:
    ms.set_context(mode=mode)
    try:
        options = {"save_checkpoint_steps": 4, "keep_checkpoint_max": 10}
        theirs = train.ModelCheckpoint("net", str(tmp_path / "theirs"), train.CheckpointConfig(**options))
        with parckpt.ModelCheckpoint("net", tmp_path / "ours", parckpt.CheckpointConfig(**options)) as ckpt:
            net = nn.SequentialCell(nn.Flatten(), nn.Dense(32 * 32, 10))
            callbacks = [theirs, ckpt.as_mindspore_callback()]
            model_of(net).train(4, data(3), callbacks=callbacks, dataset_sink_mode=True)
        assert same_files(tmp_path / "theirs", tmp_path / "ours")
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_evaluations_between_the_epochs_save_nothing(tmp_path: Path) -> None:
    options = {"save_checkpoint_steps": 2, "append_info": ["step_num"]}
    theirs = train.ModelCheckpoint("net", str(tmp_path / "theirs"), train.CheckpointConfig(**options))
    with parckpt.ModelCheckpoint("net", tmp_path / "ours", parckpt.CheckpointConfig(**options)) as ckpt:
        net = nn.SequentialCell(nn.Flatten(), nn.Dense(32 * 32, 10))
        loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
        model = train.Model(net, loss, nn.Momentum(net.trainable_params(), 0.01, 0.9), metrics={"accuracy"})
        model.fit(3, data(3), data(2), callbacks=[theirs, ckpt.as_mindspore_callback()])
    assert same_files(tmp_path / "theirs", tmp_path / "ours")


def test_an_exception_in_training_keeps_what_was_saved(tmp_path: Path) -> None:
    class Mishap(train.Callback):
        def step_end(self, run_context: Any) -> None:
            if run_context.original_args().cur_step_num == 3:
                raise RuntimeError("out of luck")

    net = nn.SequentialCell(nn.Flatten(), nn.Dense(32 * 32, 10))
    with pytest.raises(RuntimeError, match="out of luck"), parckpt.ModelCheckpoint("net", tmp_path) as ckpt:
        model_of(net).train(3, data(2), callbacks=[ckpt.as_mindspore_callback(), Mishap()])
    assert names(tmp_path) == ["net-1_1.ckpt", "net-1_2.ckpt", "net-2_1.ckpt"]
    # Nothing is left locked: the next run goes on.
    with parckpt.ModelCheckpoint("net", tmp_path) as ckpt:
        model = model_of(nn.SequentialCell(nn.Flatten(), nn.Dense(32 * 32, 10)))
        assert ckpt.restore(model.train_network).step == 3
        model.train(1, data(2), callbacks=ckpt.as_mindspore_callback())
    assert names(tmp_path)[-2:] == ["net-2_2.ckpt", "net-3_1.ckpt"]


def test_a_restored_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def start() -> tuple[nn.Cell, Any, Any]:
        ms.set_seed(11)
        net = nn.SequentialCell(
            nn.Flatten(), nn.Dense(32 * 32, 10, weight_init=ms.Tensor(np.full((10, 1024), 0.01, "f4")))
        )
        optimizer = nn.Adam(net.trainable_params(), 0.01)
        return net, optimizer, model_of(net, optimizer)

    net, _, model = start()
    model.train(4, data(3))
    wanted = {parameter.name: parameter.asnumpy().copy() for parameter in net.get_parameters()}

    for epochs, initial in ((2, 0), (4, 2)):
        net, optimizer, model = start()
        with parckpt.ModelCheckpoint("run", tmp_path) as ckpt:
            # A state of the user's own: two Cells, and a plain value.
            state = {"net": net, "optimizer": optimizer, "epochs": epochs}
            progress = ckpt.restore(state)
            assert progress.step == initial * 3

            class Whole(train.Callback):
                def step_end(self, run_context: Any, ckpt: Any = ckpt, state: Any = state) -> None:
                    ckpt.step_end(state)

            model.train(epochs, data(3), callbacks=Whole(), initial_epoch=initial)
    assert {parameter.name: parameter.asnumpy().tobytes() for parameter in net.get_parameters()} == {
        name: array.tobytes() for name, array in wanted.items()
    }


def test_the_program_of_the_compatibility_page(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "compatibility.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for stem, epochs in (("lenet-10_10", 10), ("lenet-20_10", 20)):
        net = nn.SequentialCell(nn.Flatten(), nn.Dense(32 * 32, 10))
        loss_fn = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
        optimizer = nn.Momentum(net.trainable_params(), 0.01, 0.9)
        given: dict[str, Any] = {"net": net, "loss_fn": loss_fn, "optimizer": optimizer, "data": data(10)}
        exec(code[0], given)
        assert Path(given["ckpt"].latest_ckpt_file_name) == tmp_path / "ckpts" / f"{stem}.ckpt"
        assert int(ms.load_checkpoint(f"ckpts/{stem}.ckpt")["global_step"].asnumpy()[0]) == epochs * 10
    assert names(tmp_path / "ckpts") == ["lenet-10_10.ckpt", "lenet-20_10.ckpt"]


def test_the_best_by_a_loss_that_the_loop_tells(tmp_path: Path) -> None:
    losses: list[float] = []

    def measure(told: Any) -> dict[str, float]:
        losses.append(float(told.net_outputs.asnumpy()))
        return {"loss": losses[-1]}

    config = parckpt.CheckpointConfig(keep_checkpoint_max=1, keep_best=1, best_metric="loss")
    with parckpt.ModelCheckpoint("net", tmp_path, config) as ckpt:
        net = nn.SequentialCell(nn.Flatten(), nn.Dense(32 * 32, 10))
        model_of(net).train(2, data(3), callbacks=ckpt.as_mindspore_callback(metrics=measure))
    assert len(losses) == 6
    best = min(range(6), key=lambda at: (losses[at], -at))
    assert {info.step for info in parckpt.list_checkpoints(tmp_path)} == {best + 1, 6}
