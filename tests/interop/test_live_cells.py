"""MindSpore's Tensor, Parameter and Cell where parckpt takes a state, a leaf, or a network to load into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

import parckpt

TYPES = ["bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
TYPES += ["float16", "float32", "float64", "bfloat16", "complex64", "qint4x2"]
SHAPES = [(), (1,), (3, 4), (2, 3, 5), (0, 3)]


class Everything(nn.Cell):
    """One parameter of each type and shape; one held twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        source = np.random.default_rng(seed)
        for place, kind in enumerate(TYPES):
            shape = SHAPES[place % len(SHAPES)]
            values = source.integers(0, 7, shape)
            array = np.array(values, np.int8 if kind == "qint4x2" else np.float32)
            parameter = ms.Parameter(ms.Tensor(array, getattr(ms, kind)), name=f"own.{kind}")
            setattr(self, f"held_{kind}", parameter)
        self.again = self.held_float32
        self.dense = nn.Dense(3, 2)


def contents(cell: nn.Cell) -> dict[str, tuple[Any, ...]]:
    return {p.name: (str(p.dtype), p.shape, bytes(p.get_bytes())) for p in cell.get_parameters()}


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_a_cell_of_all_types_saved_and_restored_in_place(tmp_path: Path, form: str) -> None:
    saved, other = Everything(1), Everything(2)
    assert contents(saved) != contents(other)
    held = other.held_bfloat16
    with parckpt.ModelCheckpoint("net", tmp_path, parckpt.CheckpointConfig(format=form)) as ckpt:
        ckpt.step_end(saved, 1)
    with parckpt.ModelCheckpoint("net", tmp_path, parckpt.CheckpointConfig(format=form)) as ckpt:
        assert ckpt.restore(other).step == 1
    assert contents(other) == contents(saved)
    assert other.held_bfloat16 is held


def test_mindspore_reads_what_a_cell_was_saved_to(tmp_path: Path) -> None:
    cell = Everything(3)
    # MindSpore writes complex numbers and does not read them, and leaves arrays without elements out.
    for name, parameter in list(cell._params.items()):
        if parameter.dtype == ms.complex64 or 0 in parameter.shape:
            del cell._params[name]
    parckpt.save_checkpoint(cell, str(tmp_path / "ours"))
    ms.save_checkpoint(cell, str(tmp_path / "theirs"))
    assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()
    loaded = ms.load_checkpoint(str(tmp_path / "ours.ckpt"))
    assert {name: (str(p.dtype), p.shape, bytes(p.get_bytes())) for name, p in loaded.items()} == contents(cell)


def test_a_cell_as_saved_network_is_read_anew_at_each_save(tmp_path: Path) -> None:
    net = nn.Dense(3, 2)
    config = parckpt.CheckpointConfig(saved_network=net)
    with parckpt.ModelCheckpoint("net", tmp_path, config) as ckpt:
        for step in (1, 2):
            net.weight.set_data(ms.Tensor(np.full((2, 3), step, np.float32)))
            ckpt.step_end()
    for step in (1, 2):
        assert (ms.load_checkpoint(str(tmp_path / f"net-1_{step}.ckpt"))["weight"].asnumpy() == step).all()


def test_a_cell_as_net_of_load_checkpoint(tmp_path: Path) -> None:
    net, other = nn.Dense(3, 2), nn.Dense(3, 2)
    ms.save_checkpoint(net, str(tmp_path / "net.ckpt"))
    with pytest.warns(parckpt.StateWarning, match="no manifest"):
        found = parckpt.load_checkpoint(str(tmp_path / "net.ckpt"), other)
    assert contents(other) == contents(net)
    assert [(name, value is other.parameters_dict()[name]) for name, value in found.items()] == [
        ("weight", True),
        ("bias", True),
    ]


def test_lists_of_parameters_and_dicts_as_mindspores_save_checkpoint_takes_them(tmp_path: Path) -> None:
    net = nn.Dense(3, 2)
    forms = {
        "list": list(net.get_parameters()),
        "items": [{"name": p.name, "data": p} for p in net.get_parameters()],
        "tensors": [{"name": p.name, "data": ms.Tensor(p)} for p in net.get_parameters()],
        "dict": {p.name: p for p in net.get_parameters()},
        "loaded": ms.load_checkpoint(ms.save_checkpoint(net, "x.ckpt") or "x.ckpt"),
    }
    for form, given in forms.items():
        parckpt.save_checkpoint(given, str(tmp_path / f"ours_{form}"))
        ms.save_checkpoint(given, str(tmp_path / f"theirs_{form}"))
        ours = (tmp_path / f"ours_{form}.ckpt").read_bytes()
        assert ours == (tmp_path / f"theirs_{form}.ckpt").read_bytes(), form


def test_tensors_in_a_nested_state_stay_the_same_objects(tmp_path: Path) -> None:
    def state(fill: float) -> dict[str, Any]:
        whole = ms.Tensor(np.full((2, 2), fill, np.float32))
        part = parckpt.Shard(ms.Parameter(ms.Tensor([fill, fill]), "part"), global_shape=(2,), offsets=(0,))
        return {"deep": {"list": [whole, {"own": parckpt.PerRank(ms.Tensor(fill))}]}, "cut": part, "n": 3}

    with parckpt.ModelCheckpoint("net", tmp_path) as ckpt:
        ckpt.step_end(state(1.0), 1)
    restored = state(2.0)
    tensor = restored["deep"]["list"][0]
    with parckpt.ModelCheckpoint("net", tmp_path) as ckpt:
        progress = ckpt.restore(restored)
    assert progress.state["deep"]["list"][0] is tensor
    assert tensor.asnumpy().tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert restored["deep"]["list"][1]["own"].value.asnumpy() == 1.0
    assert set(parckpt.load_checkpoint(str(tmp_path / "net-1_1.ckpt"))) == {
        "deep.list.0",
        "deep.list.1.own@rank_0",
        "cut",
        "n",
    }


def test_parameters_that_are_not_made_yet(tmp_path: Path) -> None:
    with nn.utils.no_init_parameters():
        lazy, target = nn.Dense(3, 2), nn.Dense(3, 2)
    assert lazy.weight.has_init
    parckpt.save_checkpoint(lazy, str(tmp_path / "lazy.ckpt"))
    parckpt.load_checkpoint(str(tmp_path / "lazy.ckpt"), target)
    assert contents(target) == contents(lazy)
    assert np.ptp(target.weight.asnumpy()) > 0


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    from mindspore.experimental import MapParameter

    table = MapParameter(name="table", key_dtype=ms.int32, value_dtype=ms.float32, value_shape=(2,))
    with pytest.raises(parckpt.ConfigError, match="'table' is a MapParameter"):
        parckpt.save_checkpoint({"t": table}, str(tmp_path / "x.ckpt"))
    net = nn.SequentialCell(nn.Dense(2, 2), nn.Dense(2, 2))
    for parameter in net.get_parameters():
        parameter.name = parameter.name.split(".")[-1]
    with pytest.raises(parckpt.ConfigError, match="two parameters called 'weight'"):
        parckpt.save_checkpoint(net, str(tmp_path / "x.ckpt"))
    with pytest.raises(TypeError, match="network"):
        parckpt.CheckpointConfig(saved_network=nn.Dense)
    assert list(tmp_path.glob("*.ckpt")) == []


def test_a_slice_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    net = nn.Dense(4, 2)  # its weight stands for the upper half of a (4, 4) one
    bias = [[2], [-1], [2], 0, True, "", [2]]
    net.parameter_layout_dict = {"weight": [[2], [0, -1], [2, 4], 0, True, "", [4, 4]], "bias": bias}
    with pytest.raises(parckpt.ConfigError) as caught:
        parckpt.save_checkpoint(net, str(tmp_path / "x.ckpt"))
    advice = str(caught.value).partition("stands ")[2]
    shard = eval(advice, {"parckpt": parckpt, "parameter": net.weight, "rank": 1})
    assert (shard.global_shape, shard.offsets, shard.shape) == ((4, 4), (2, 0), (2, 4))
    net.parameter_layout_dict = {"bias": bias}
    parckpt.save_checkpoint(net, str(tmp_path / "x.ckpt"))


def test_a_generator_in_append_info(tmp_path: Path) -> None:
    generator = ms.Generator()
    generator.manual_seed(5)
    given = [{"rng": generator}]
    with parckpt.ModelCheckpoint("net", tmp_path, parckpt.CheckpointConfig(append_info=given)) as ckpt:
        ckpt.step_end(nn.Dense(2, 2), 1)
    loaded = ms.load_checkpoint(str(tmp_path / "net-1_1.ckpt"))["rng"].asnumpy()
    assert loaded.tobytes() == generator.get_state().asnumpy().tobytes()
