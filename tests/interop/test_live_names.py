"""Callable prefix and directory: the same file names as MindSpore's own ModelCheckpoint, in the same callback shape."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore.train.callback._checkpoint as theirs
import numpy as np
import pytest
from mindspore import nn, train

import parckpt

PREFIXES: dict[str, Any] = {
    "fixed": "P",
    "step": lambda p: f"at_{p.cur_step_num}",
    "usual": lambda p: f"net-{p.cur_epoch_num}_{(p.cur_step_num - 1) % p.batch_num + 1}",
    "always": lambda p: "latest",
    "dotted": lambda p: f"a.b.{p.cur_step_num}",
}
DIRECTORIES: dict[str, Callable[[Path], Any]] = {
    "fixed": str,
    "epoch": lambda root: lambda p: str(root / f"epoch_{p.cur_epoch_num}"),
    "alternating": lambda root: lambda p: str(root / str(p.cur_step_num % 2) / "deeper"),
}


def files(root: Path) -> list[str]:
    found = [str(path.relative_to(root)) for path in root.rglob("*.ckpt") if path.name[0] != "."]
    return sorted(found)


def trained(callback: Any, network: Any, last: int) -> list[str]:
    """Run a loop of 4 steps an epoch; the latest names."""
    told = SimpleNamespace(batch_num=4, train_network=network)
    context = SimpleNamespace(original_args=lambda: told)
    seen = []
    for step in range(1, last + 1):
        told.cur_step_num, told.cur_epoch_num = step, (step + 3) // 4
        if isinstance(network, dict):
            network["w"] += 1
        callback.step_end(context)
        seen.append(callback.latest_ckpt_file_name)
    callback.end(context)
    return [*seen, callback.latest_ckpt_file_name]


@pytest.mark.filterwarnings("ignore::parckpt.ConfigWarning")
@pytest.mark.parametrize("where", DIRECTORIES)
@pytest.mark.parametrize("name", PREFIXES)
def test_the_same_names_in_the_same_directories(name: str, where: str, tmp_path: Path) -> None:
    given = {"save_checkpoint_steps": 3, "keep_checkpoint_max": 100}  # with a callable prefix, theirs deletes nothing
    one, other = tmp_path / "theirs", tmp_path / "ours"
    for root in (one, other):
        root.mkdir()
    callback = train.ModelCheckpoint(PREFIXES[name], DIRECTORIES[where](one), train.CheckpointConfig(**given))
    expected = trained(callback, nn.Dense(1, 1), 11)
    ckpt = parckpt.ModelCheckpoint(
        PREFIXES[name], DIRECTORIES[where](other), parckpt.CheckpointConfig(**given), comm=parckpt.SELF
    )
    found = trained(ckpt, {"w": np.ones(1)}, 11)
    ckpt.close()
    assert [path and os.path.relpath(path, other) for path in found] == [
        path and os.path.relpath(path, one) for path in expected
    ]
    assert files(other) == files(one)


@pytest.mark.parametrize("returned", [7, None, "a/b", ["a"]])
def test_what_is_no_name_is_the_same_error_at_the_same_call(returned: Any, tmp_path: Path) -> None:
    for module, config in ((train, train.CheckpointConfig()), (parckpt, parckpt.CheckpointConfig())):
        own = {"comm": parckpt.SELF} if module is parckpt else {}
        callback = module.ModelCheckpoint(lambda p: returned, str(tmp_path), config, **own)
        with pytest.raises(ValueError, match=r"(?i)prefix"):
            trained(callback, nn.Dense(1, 1), 1)


@pytest.mark.parametrize("wrong", [None, 5, "a/b", ["a"]])
def test_what_is_no_prefix_is_a_value_error(wrong: Any, tmp_path: Path) -> None:
    for make in (theirs.ModelCheckpoint, lambda *args: parckpt.ModelCheckpoint(*args, comm=parckpt.SELF)):
        with pytest.raises(ValueError, match=r"(?i)prefix"):
            make(wrong, str(tmp_path))


@pytest.mark.parametrize(("wrong", "kinds"), [(5, (TypeError,)), (" ", (ValueError,)), ("x" * 1025, (ValueError,))])
def test_what_is_no_directory(wrong: Any, kinds: tuple[type[Exception], ...]) -> None:
    for make in (theirs.ModelCheckpoint, lambda *args: parckpt.ModelCheckpoint(*args, comm=parckpt.SELF)):
        with pytest.raises(kinds):
            make("P", wrong)


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for make in (theirs.ModelCheckpoint, lambda *args: parckpt.ModelCheckpoint(*args, comm=parckpt.SELF)):
        with pytest.raises(NotADirectoryError):
            make("P", str(tmp_path / "file"))
