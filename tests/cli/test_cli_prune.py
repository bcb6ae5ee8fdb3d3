"""``parckpt prune``."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.core.tablefile import decode, encode
from parckpt.engine.pins import pin
from parckpt.engine.pruning import Rule, judge_directory, prune
from parckpt.errors import NoSpaceError
from parckpt.testing.clock import ManualClock
from parckpt.testing.filesystem import MemoryFileSystem


def _run(directory: Path, steps: int, prefix: str = "m", minutes: float = 10, **options: Any) -> None:
    """A run that keeps everything while it lives; its stored policy is what the options say."""
    clock = ManualClock()
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1, **{"keep_checkpoint_max": 100, **options})
    with parckpt.ModelCheckpoint(prefix, directory, config, comm=parckpt.SELF, clock=clock) as checkpoints:
        for step in range(1, steps + 1):
            clock.advance(60 * minutes)
            checkpoints.step_end({"w": np.full(4, float(step))}, step, metrics={"loss": abs(step - 3)})


def _steps(call: Any, directory: Path) -> list[int]:
    return [row["step"] for row in call("ls", directory, "--json").json["checkpoints"]]


def _verdicts(found: Any) -> dict[int, tuple[bool, str]]:
    return {row["step"]: (row["keep"], row["reason"]) for row in found.json["checkpoints"]}


def test_keep(call: Any, tmp_path: Path) -> None:
    _run(tmp_path, 5)
    looked = call("prune", tmp_path, "--keep", 2, "--dry-run", "--json")
    assert (looked.status, looked.json["deleted"], _steps(call, tmp_path)) == (0, 0, [5, 4, 3, 2, 1])
    assert [step for step, (keep, _) in _verdicts(looked).items() if keep] == [5, 4]
    assert _verdicts(looked)[3] == (False, "2 newer ones are there (--keep 2)")
    text = call("prune", tmp_path, "--keep", 2, "--dry-run").out
    assert "would go" in text
    assert "3 of 5 checkpoints would go" in text
    done = call("prune", tmp_path, "--keep", 2, "--yes", "--json").json
    assert (done["deleted"], [row["step"] for row in done["checkpoints"] if row["deleted"]]) == (3, [3, 2, 1])
    assert _steps(call, tmp_path) == [5, 4]
    assert not [name for name in os.listdir(tmp_path) if ".trash-" in name or ".lock" in name or "-1_1." in name]
    again = call("prune", tmp_path, "--keep", 2)
    assert (again.status, again.out.endswith("nothing to delete\n")) == (0, True)
    restored = np.zeros(4)
    with parckpt.ModelCheckpoint("m", tmp_path, comm=parckpt.SELF) as checkpoints:
        assert checkpoints.restore({"w": restored}).step == 5


def test_the_policy_that_the_run_stored(call: Any, tmp_path: Path) -> None:
    options = {"keep_checkpoint_max": 3, "keep_best": 1, "best_metric": "loss"}
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1, **options)
    with parckpt.ModelCheckpoint("m", tmp_path, config, comm=parckpt.SELF) as checkpoints:
        for step in range(1, 8):
            checkpoints.step_end({"w": np.full(4, float(step))}, step, metrics={"loss": abs(step - 3)})
            if step <= 2:
                call("pin", tmp_path / f"m-1_{step}.ckpt")
    assert _steps(call, tmp_path) == [7, 6, 5, 3, 2, 1]
    call("pin", tmp_path / "m-1_1.ckpt", "--remove")
    found = _verdicts(call("prune", tmp_path, "--yes", "--json"))
    assert [step for step, (keep, _) in found.items() if keep] == _steps(call, tmp_path) == [7, 6, 5, 3, 2]
    assert found[1][1] == "3 newer ones are there (keep_checkpoint_max=3)"
    assert "keep_best=1" in found[3][1]
    assert "pinned" in found[2][1]
    strict = _verdicts(call("prune", tmp_path, "--keep", 1, "--yes", "--json"))
    assert [step for step, (keep, _) in strict.items() if keep] == _steps(call, tmp_path) == [7, 3, 2]


def test_minutes_thin_out_the_whole_history(call: Any, tmp_path: Path) -> None:
    _run(tmp_path, 9, minutes=10)
    found = _verdicts(call("prune", tmp_path, "--minutes", 30, "--yes", "--json"))
    assert [step for step, (keep, _) in found.items() if keep] == [9, 7, 4, 1]
    assert found[9] == (True, "the newest")
    assert found[4] == (True, "the first in 30 min (--minutes 30)")
    assert _steps(call, tmp_path) == [9, 7, 4, 1]


def test_runs_are_judged_apart(call: Any, published: Path) -> None:
    done = call("prune", published, "--keep", 1, "--yes", "--json")
    assert done.status == 0
    left = {row["name"] for row in call("ls", published, "--json").json["checkpoints"]}
    assert left == {"one-2_2.ckpt", "ranks-2_2", "owners-2_2", "single.ckpt"}
    _run(published, 2, "one")
    only = call("prune", published, "--keep", 1, "--prefix", "one", "--yes", "--json").json
    assert {row["prefix"] for row in only["checkpoints"]} == {"one", "one_1"}
    assert [row["name"] for row in only["checkpoints"] if row["deleted"]] == ["one_1-1_1.ckpt"]


def test_never_the_last_one_that_restores(call: Any, tmp_path: Path) -> None:
    _run(tmp_path, 4)
    for step in (3, 4):  # the newest two are short
        os.truncate(tmp_path / f"m-1_{step}.ckpt", 10)
    found = _verdicts(call("prune", tmp_path, "--keep", 1, "--yes", "--json"))
    assert {step: keep for step, (keep, _) in found.items()} == {4: True, 3: True, 2: True, 1: False}
    assert "neither counted nor deleted" in found[4][1]
    assert _steps(call, tmp_path) == [4, 3, 2]


def test_verify_reads_what_stays(call: Any, tmp_path: Path) -> None:
    _run(tmp_path, 4)
    path = tmp_path / "m-1_4.ckpt"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    blind = _verdicts(call("prune", tmp_path, "--keep", 1, "--dry-run", "--json"))
    assert [step for step, (keep, _) in blind.items() if keep] == [4]
    found = _verdicts(call("prune", tmp_path, "--keep", 1, "--verify", "--yes", "--json"))
    assert [step for step, (keep, _) in found.items() if keep] == [4, 3]
    assert "chunk 0" in found[4][1]
    assert _steps(call, tmp_path) == [4, 3]


def test_no_policy_and_other_peoples_files(call: Any, tmp_path: Path, golden: Path) -> None:
    parckpt.save_checkpoint({"w": np.zeros(1)}, tmp_path / "single")
    _run(tmp_path, 2)
    shutil.copy(golden / "train" / "net-2_4.ckpt", tmp_path)
    os.rename(tmp_path / "m-1_1.ckpt", tmp_path / "m-9_9.ckpt")
    manifest = next(name for name in os.listdir(tmp_path) if name.startswith("m-1_1."))
    os.rename(tmp_path / manifest, tmp_path / manifest.replace("m-1_1", "m-9_9"))
    before = sorted(os.listdir(tmp_path))
    done = call("prune", tmp_path, "--keep", 1, "--yes")
    assert (done.status, sorted(os.listdir(tmp_path))) == (0, before)
    assert call("prune", tmp_path / "nowhere", "--keep", 1).status == 4
    policy = call("prune", tmp_path, "--prefix", "single")
    assert "no policy is stored with it: say --keep or --minutes" in policy.out
    assert call("prune", tmp_path, "--keep", 1, "--minutes", 1).status == 3
    assert call("prune", tmp_path, "--keep", 0).status == 2


def test_asks(call: Any, tmp_path: Path, monkeypatch: Any) -> None:
    _run(tmp_path, 3)
    for words in ((), ("--json",)):
        refused = call("prune", tmp_path, "--keep", 1, *words)
        assert refused.status == 3
        assert "--yes" in (refused.json["error"]["message"] if words else refused.err)
    monkeypatch.setattr("parckpt.cli.prune._has_terminal", lambda: True)
    declined = call("prune", tmp_path, "--keep", 1, stdin="n\n")
    assert (declined.status, "nothing was deleted" in declined.out) == (0, True)
    assert "Delete 2 checkpoints, 1" in declined.out
    assert _steps(call, tmp_path) == [3, 2, 1]
    agreed = call("prune", tmp_path, "--keep", 1, stdin="y\n")
    assert (agreed.status, "deleted 2 checkpoints" in agreed.out) == (0, True)
    assert _steps(call, tmp_path) == [3]


def test_only_what_was_agreed_to(call: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Between the question and the answer one is pinned, one is gone, and a new one is published."""
    _run(tmp_path, 5)
    monkeypatch.setattr("parckpt.cli.prune._has_terminal", lambda: True)

    def answer(question: str) -> bool:
        assert question.startswith("Delete 3 checkpoints")
        call("pin", tmp_path / "m-1_3.ckpt")
        os.unlink(tmp_path / "m-1_2.ckpt")
        _run(tmp_path, 6, "other")
        return True

    monkeypatch.setattr("parckpt.cli.prune.typer.confirm", answer)
    done = call("prune", tmp_path, "--keep", 2)
    assert done.status == 0
    assert "left m-1_3.ckpt: pinned" in done.out
    assert "left m-1_2.ckpt: gone already" in done.out
    assert "deleted 1 checkpoint," in done.out
    rows = call("ls", tmp_path, "--json").json["checkpoints"]
    assert [row["step"] for row in rows if row["prefix"] == "m"] == [5, 4, 3]
    assert sum(row["prefix"] == "other" for row in rows) == 6


def test_refused_beside_a_living_run(call: Any, tmp_path: Path) -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1)
    with parckpt.ModelCheckpoint("m", tmp_path, config, comm=parckpt.SELF) as checkpoints:
        for step in (1, 2):
            checkpoints.step_end({"w": np.full(2, float(step))}, step)
        assert call("prune", tmp_path, "--keep", 1, "--dry-run").status == 0
        refused = call("prune", tmp_path, "--keep", 1, "--yes")
        assert (refused.status, "A run that is alive deletes by itself" in refused.err) == (7, True)
        assert _steps(call, tmp_path) == [2, 1]


def test_a_hostile_policy(call: Any, published: Path) -> None:
    path = published / "ranks-2_2" / "manifest"
    table = decode(path.read_bytes(), str(path), "manifest")
    facts = {**table.facts, "policy": {"keep": {"count": "many"}}}
    path.write_bytes(encode(type(table)("manifest", facts, table.columns)))
    found = call("prune", published, "--prefix", "ranks", "--dry-run", "--json")
    assert (found.status, found.json["error"]["code"]) == (5, "format")
    assert str(path) in json.dumps(found.json)


def test_after_a_crash(call: Any, crashed: Callable[[str], Path], finish: Callable[[Path], None]) -> None:
    """A dead run's lock is taken over; what it left is for the next start."""
    directory = crashed("die-before-publish")
    assert call("prune", directory, "--keep", 1).status == 0
    left = [name for name in os.listdir(directory) if ".staging-" in name]
    assert len(left) == 1
    finish(directory)
    assert call("prune", directory, "--keep", 1, "--yes").status == 0
    assert len(_steps(call, directory)) == 1


class _Full(MemoryFileSystem):
    """Has no room for a lock until something was deleted."""

    full = False

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        if self.full and ".lock" in path and flags & os.O_CREAT:
            raise NoSpaceError(f"{path}: no space", errno=errno.ENOSPC, operation="open", path=path)
        return super().open(path, flags, mode)

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self.full = False


def test_where_not_even_a_lock_has_room() -> None:
    fs = _Full()
    fs.mkdir("/d")
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1, keep_checkpoint_max=10)
    with parckpt.ModelCheckpoint("m", "/d", config, comm=parckpt.SELF, filesystem=fs) as checkpoints:
        for step in range(1, 6):
            checkpoints.step_end({"w": np.full(2, float(step))}, step)
    rule, clock = Rule(count=2), ManualClock()
    doomed = [one for one in judge_directory(fs, "/d", None, rule, 0.0) if not one.keep]
    oldest = next(one.found for one in doomed if one.path == "/d/m-1_1.ckpt")
    pin(fs, oldest)
    fs.full = True
    done = prune(fs, "/d", doomed, rule, clock, 600.0)
    assert sorted(one.path for one in done.deleted) == ["/d/m-1_2.ckpt", "/d/m-1_3.ckpt"]
    assert [one.path for one, _ in done.left] == ["/d/m-1_1.ckpt"]
    assert not fs.full
    assert [name for name in fs.listdir("/d") if ".lock" in name or ".trash" in name] == []
    fs.full = True
    with pytest.raises(NoSpaceError):
        prune(fs, "/d", doomed, rule, clock, 600.0)
    assert len([name for name in fs.listdir("/d") if name.endswith(".ckpt")]) == 3
