"""``parckpt explain``: what it says of the next publish and of a restore is what they do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.core.tablefile import Table, encode
from parckpt.engine.catalog import load_manifest, scan
from parckpt.storage.filesystem import PosixFileSystem
from parckpt.testing.clock import ManualClock

OPTIONS: dict[str, Any] = {
    "save_checkpoint_steps": 10,
    "keep_checkpoint_max": 2,
    "ephemeral_steps": 4,
    "keep_every_n_steps": 20,
    "keep_best": 1,
    "best_metric": "loss",
}


def train(directory: Path, first: int, last: int, *, end: bool = False, **options: Any) -> None:
    config = parckpt.CheckpointConfig(**{**OPTIONS, **options})
    with parckpt.ModelCheckpoint("net", directory, config, comm=parckpt.SELF, clock=ManualClock()) as ckpt:
        ckpt.restore({"w": np.zeros(3)})
        for step in range(first, last + 1):
            ckpt.step_end({"w": np.full(3, float(step))}, step, metrics={"loss": abs(step - 10.5)})
        if not end:
            ckpt.close()


@pytest.fixture(autouse=True)
def _in_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def by_epoch(parameters: Any) -> str:
    return f"epoch_{parameters.cur_epoch_num}"


def by_step(content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in content["prefixes"][0]["checkpoints"]}


def test_every_checkpoint_is_explained(call: Any, tmp_path: Path) -> None:
    train(tmp_path, 1, 54)
    content = call("explain", tmp_path, "--json").json
    (prefix,) = content["prefixes"]
    assert (prefix["prefix"], prefix["restored"]) == ("net", "net-1_54.ckpt")
    assert prefix["restore"] == "takes net-1_54.ckpt, step 54"
    assert prefix["next_save"] == [
        "at step 58 (ephemeral_steps=4, ephemeral)",
        "at step 60 (save_checkpoint_steps=10)",
    ]
    assert prefix["policy"]["keep"]["every_steps"] == 20
    rows = by_step(content)
    assert list(rows) == [54, 50, 40, 20, 10]
    assert (rows[54]["ephemeral"], rows[54]["reason"], rows[54]["metrics"]) == (True, "ephemeral", {"loss": 43.5})
    assert rows[54]["made"] == "ephemeral: ephemeral_steps=4: step 54, the last save was at step 50"
    assert rows[54]["stays"] == "ephemeral: until the next publish"
    assert rows[54]["goes"] == "ephemeral, and a newer one is published"
    assert rows[54]["restore"] == "a restore takes this one: the newest that is whole"
    assert rows[50]["made"] == "save_checkpoint_steps=10: step 50, the last save was at step 40"
    assert rows[50]["stays"] == "number 1 of the newest 2 (keep_checkpoint_max=2)"
    assert rows[50]["goes"] is None
    assert rows[50]["restore"] == "older than net-1_54.ckpt"
    assert rows[40]["stays"] == "the first at or after step 40 (keep_every_n_steps=20)"
    assert rows[10]["stays"] == "number 1 by loss=0.5 (keep_best=1)"
    text = call("explain", tmp_path).out
    for row in rows.values():
        for key in ("made", "stays", "goes", "restore"):
            assert row[key] is None or row[key] in text
    assert "  next save  at step 58" in text
    assert "  metrics    loss=0.5" in text


def test_what_it_says_will_go_goes(call: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep_best": 0, "best_metric": None, "keep_every_n_steps": 30, "ephemeral_steps": None}
    train(tmp_path, 1, 59, **options)
    before = by_step(call("explain", tmp_path, "--json").json)
    assert list(before) == [50, 40, 30]
    train(tmp_path, 51, 60, **options)
    after = by_step(call("explain", tmp_path, "--json").json)
    assert set(after) - set(before) == {60}
    assert set(before) - set(after) == {step for step, row in before.items() if row["goes"]} == {40}


def test_damage_and_what_was_set_aside_is_passed_over(call: Any, tmp_path: Path) -> None:
    train(tmp_path, 1, 30, ephemeral_steps=None, keep_checkpoint_max=5)
    os.truncate(tmp_path / "net-1_30.ckpt", 9)
    next(tmp_path.glob("net-1_20.*.manifest")).write_bytes(b"")
    content = call("explain", tmp_path, "--json").json
    assert content["prefixes"][0]["restored"] == "net-1_10.ckpt"
    thirty, ten, twenty = content["prefixes"][0]["checkpoints"]
    assert thirty["restore"].startswith("passed over: its data has 9 bytes")
    assert (ten["step"], ten["restore"]) == (10, "a restore takes this one: the newest that is whole")
    assert (twenty["step"], twenty["stays"]) == (None, "damaged: neither counted nor deleted")
    with parckpt.ModelCheckpoint("net", tmp_path, comm=parckpt.SELF) as ckpt:
        assert ckpt.restore({"w": np.zeros(3)}).step == 10
    rows = by_step(call("explain", tmp_path, "--json").json)
    assert rows[30]["restore"].startswith("passed over: set aside: ")
    assert rows[30]["stays"] == "set aside: neither counted nor deleted"
    os.truncate(tmp_path / "net-1_10.ckpt", 9)
    content = call("explain", tmp_path, "--json").json
    assert (content["prefixes"][0]["restored"], content["prefixes"][0]["restore"]) == (
        None,
        "fails: none of 3 can be loaded",
    )


def test_a_checkpoint_whose_manifest_is_damaged(call: Any, tmp_path: Path) -> None:
    train(tmp_path, 1, 54)
    (manifest,) = tmp_path.glob("net-1_54.*.manifest")
    manifest.write_bytes(manifest.read_bytes()[:100])
    told = call("explain", tmp_path)
    assert (told.status, told.err) == (0, "")
    assert "\nnet-1_54.ckpt\n" in told.out
    rows = {row["name"]: row for row in call("explain", tmp_path, "--json").json["prefixes"][0]["checkpoints"]}
    assert (rows["net-1_54.ckpt"]["step"], rows["net-1_54.ckpt"]["age_s"]) == (None, None)


def test_other_runs_functions_and_manifests_of_before(call: Any, tmp_path: Path) -> None:
    train(tmp_path, 1, 10, ephemeral_steps=None)
    config = parckpt.CheckpointConfig(save_checkpoint_steps=0, save_checkpoint_seconds=600, keep_checkpoint_max=1)
    with parckpt.ModelCheckpoint("net", tmp_path, config, comm=parckpt.SELF) as ckpt:
        ckpt.save_now({"w": np.ones(3)}, 7)
    parckpt.save_checkpoint({"w": np.ones(3)}, str(tmp_path / "single"))
    content = call("explain", tmp_path, "--json").json
    net, single = content["prefixes"]
    assert [row["name"] for row in net["checkpoints"]] == ["net_1-1_7.ckpt", "net-1_10.ckpt"]
    assert net["checkpoints"][0]["made"] == "save_now was called"
    assert net["checkpoints"][1]["stays"] == "of another run (prefix 'net'): only that one deletes it"
    assert net["next_save"] == [
        "at the first step end more than 600 s after the last save (save_checkpoint_seconds=600)"
    ]
    assert single["prefix"] == "single"
    assert single["checkpoints"][0]["made"] == "save_checkpoint was called"
    assert single["checkpoints"][0]["stays"] == "made by save_checkpoint: no run deletes it"
    fs = PosixFileSystem()
    found = scan(fs, str(tmp_path), "net")[0]
    manifest = load_manifest(fs, found)
    facts = {k: v for k, v in manifest.facts.to_json().items() if k not in ("detail", "policy")}
    Path(found.manifest_path).write_bytes(encode(Table("manifest", facts, manifest.contents.columns())))
    row = call("explain", tmp_path, "--prefix", "net", "--json").json["prefixes"][0]
    assert row["policy"]["problem"].startswith("its manifest does not say")
    assert (row["next_save"], row["checkpoints"][0]["made"]) == ([], "save_now was called")
    assert "policy     unknown" in call("explain", tmp_path, "--prefix", "net").out


def test_nothing_there(call: Any, tmp_path: Path) -> None:
    assert call("explain", tmp_path).out == f"no checkpoints in {tmp_path}\n"
    assert call("explain", tmp_path / "missing").status == 4
    train(tmp_path, 1, 10, ephemeral_steps=None)
    for path in tmp_path.glob("net-*"):
        path.unlink()
    (prefix,) = call("explain", tmp_path, "--json").json["prefixes"]
    assert prefix["restore"] == "fails: checkpoints were published here, and none is left"
    with parckpt.ModelCheckpoint("net", tmp_path, comm=parckpt.SELF) as ckpt:
        with pytest.raises(parckpt.CheckpointNotFoundError):
            ckpt.restore({"w": np.zeros(3)})
        ckpt.close()


def test_the_output_in_the_docs(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock(1710030200.0)
    config = parckpt.CheckpointConfig(
        save_checkpoint_steps=100,
        keep_checkpoint_max=2,
        triggers=[parckpt.EverySeconds(3600)],
        ephemeral_steps=50,
        keep_best=1,
        best_metric="loss",
    )
    ckpt = parckpt.ModelCheckpoint("llama", "ckpts", config, comm=parckpt.SELF, clock=clock)
    for step in range(10, 360, 10):
        clock.advance(200.0)
        state = {"w": np.full(131072, float(step))}
        ckpt.step_end(lambda state=state: state, step, metrics={"loss": 2 + step / 1000})  # type: ignore[misc]
    ckpt.close()
    clock.advance(55.0)
    monkeypatch.setattr("parckpt.cli.explain.SystemClock", lambda: clock)
    out = call("explain", "ckpts").out
    documented = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    block = documented.partition("<!-- explain -->\n```\n")[2].partition("```")[0]
    assert f"$ parckpt explain ckpts\n{out}" == block


def test_a_run_that_went_on_in_other_directories(call: Any, tmp_path: Path) -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=2, keep_checkpoint_max=1)
    given: dict[str, Any] = {"comm": parckpt.SELF, "steps_per_epoch": 4}
    with parckpt.ModelCheckpoint("net", by_epoch, config, **given) as ckpt:
        for step in range(1, 12):
            ckpt.step_end({"w": np.full(3, float(step))}, step)
        ckpt.close()
    content = call("explain", tmp_path / "epoch_1", "--json").json
    told = content["prefixes"][0]
    assert told["restored"] == "../epoch_3/net-3_2.ckpt"
    assert told["restore"] == "takes ../epoch_3/net-3_2.ckpt, step 10"
    assert told["next_save"] == ["at step 12 (save_checkpoint_steps=2)"]
    assert by_step(content)[4]["restore"] == "older than ../epoch_3/net-3_2.ckpt"
    assert by_step(content)[4]["goes"] is None
