"""``parckpt pin``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.engine import deleting, pins
from parckpt.engine.catalog import find_at
from parckpt.errors import CheckpointGoneError
from parckpt.testing.filesystem import MemoryFileSystem


def _pins(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if ".pin-" in name]


@pytest.mark.parametrize("name", ["one-2_1.ckpt", "ranks-2_1", "single.ckpt"])
def test_there_and_back(call: Any, published: Path, name: str) -> None:
    path = published / name
    done = call("pin", path, "--json")
    assert (done.status, done.json["pinned"], done.json["changed"], done.json["path"]) == (0, True, True, str(path))
    assert _pins(published) == [f".{name.split('.')[0]}.pin-{done.json['token']}"]
    assert call("pin", path).out.endswith("was pinned already\n")
    rows = {row["name"]: row["pinned"] for row in call("ls", published, "--json").json["checkpoints"]}
    assert [one for one, pinned in rows.items() if pinned] == [name]
    assert "ok, pinned\n" in call("ls", published).out
    assert f"  pinned  {name}\n" in call("status", published).out
    assert "ok, pinned" in call("show", path).out
    (row,) = call("pin", published, "--list", "--json").json["pins"]
    assert (row["name"], row["path"], row["token"]) == (name, str(path), done.json["token"])
    removed = call("pin", path, "--remove", "--json")
    assert (removed.status, removed.json["pinned"], removed.json["changed"]) == (0, False, True)
    assert _pins(published) == []
    assert call("pin", path, "--remove").out == f"{path}: was not pinned\n"
    assert call("pin", published, "--list").out == f"nothing is pinned in {published}\n"


def test_retention_leaves_it_alone(call: Any, tmp_path: Path) -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1, keep_checkpoint_max=2)
    with parckpt.ModelCheckpoint("m", tmp_path, config) as checkpoints:
        for step in range(1, 7):
            checkpoints.step_end({"w": np.full(1, float(step))}, step)
            if step == 2:
                assert call("pin", tmp_path / "m-1_2.ckpt").status == 0  # beside the living run
    rows = {row["name"]: row["pinned"] for row in call("ls", tmp_path, "--json").json["checkpoints"]}
    assert rows == {"m-1_6.ckpt": False, "m-1_5.ckpt": False, "m-1_2.ckpt": True}


def test_what_cannot_be_pinned(call: Any, published: Path, golden: Path, tmp_path: Path) -> None:
    assert call("pin", tmp_path / "nowhere").status == 4
    directory = call("pin", published)
    assert (directory.status, "--list" in directory.err) == (4, True)
    shutil.copy(golden / "train" / "net-2_4.ckpt", tmp_path)
    foreign = call("pin", tmp_path / "net-2_4.ckpt")
    assert (foreign.status, "it needs no pin" in foreign.err) == (3, True)
    (published / "ranks-2_1" / "manifest").write_bytes(b"x")
    assert call("pin", published / "ranks-2_1").status == 5
    assert call("pin", published / "one-2_1.ckpt", "--remove", "--list").status == 3
    assert _pins(published) == []


def test_pin_of_what_is_gone(call: Any, published: Path) -> None:
    call("pin", published / "ranks-2_1")
    shutil.rmtree(published / "ranks-2_1")
    assert "gone: the pin can be removed" in call("pin", published, "--list").out
    assert call("ls", published).status == 0
    assert call("pin", published / "ranks-2_1", "--remove", "--json").json["changed"] is True
    assert _pins(published) == []
    assert call("pin", published / "ranks-2_1", "--remove").status == 4


def test_a_pin_holds_for_one_save(call: Any, published: Path) -> None:
    call("pin", published / "one-2_2.ckpt")
    (name,) = _pins(published)
    os.rename(published / name, published / f"{name[:-4]}0000")
    rows = call("ls", published, "--json").json["checkpoints"]
    assert not any(row["pinned"] for row in rows)


def _saved() -> tuple[MemoryFileSystem, Any]:
    fs = MemoryFileSystem()
    fs.mkdir("/d")
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1, integrated_save=False)
    with parckpt.ModelCheckpoint("m", "/d", config, comm=parckpt.SELF, filesystem=fs) as checkpoints:
        checkpoints.step_end({"w": np.zeros(1)}, 1)
    found = find_at(fs, "/d/m-1_1")
    assert found is not None
    return fs, found


def test_who_pins_and_who_deletes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either the deleter sees the pin, or the pinner that the checkpoint is gone."""
    fs, found = _saved()
    rename = fs.rename

    def pinned_meanwhile(src: str, dst: str) -> None:
        assert pins.pin(fs, found)
        rename(src, dst)

    monkeypatch.setattr(fs, "rename", pinned_meanwhile)
    assert deleting.take_away(fs, found) is None
    assert find_at(fs, "/d/m-1_1") is not None
    monkeypatch.setattr(fs, "rename", rename)
    pins.unpin(fs, "/d", found.stem, found.token)
    trash = deleting.take_away(fs, found)
    assert trash is not None
    with pytest.raises(CheckpointGoneError):
        pins.pin(fs, found)
    assert pins.find_pins(fs, "/d") == []
    deleting.remove_taken(fs, found, trash)
    assert not [name for name in fs.listdir("/d") if not name.endswith(".run")]
