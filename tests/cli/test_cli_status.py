"""``parckpt status``: what it says a start will do is what a start does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKEN = "0123456789abcdef"


def _fates(content: dict[str, Any]) -> dict[str, str]:
    return {row["kind"]: row["fate"] for row in content["debris"]}


def test_quiet_directory(call: Any, published: Path) -> None:
    content = call("status", published, "--json").json
    assert [row["prefix"] for row in content["prefixes"]] == ["one", "owners", "ranks", "single"]
    first = content["prefixes"][0]
    assert (first["checkpoints"], first["newest"]["step"], first["lock"]) == (2, 5, None)
    assert first["run_file"]["published"] is True
    assert content["debris"] == []
    assert content["free_nbytes"] > 0
    only = call("status", published, "--prefix", "ranks", "--json").json["prefixes"]
    assert [row["prefix"] for row in only] == ["ranks"]


def test_complete_staging_will_be_published(call: Any, crashed: Callable[[str], Path], finish: Any) -> None:
    directory = crashed("die-before-publish")
    before = sorted(os.listdir(directory))
    content = call("status", directory, "--json").json
    assert sorted(os.listdir(directory)) == before
    assert _fates(content) == {"staging": "publish"}
    (row,) = content["prefixes"]
    assert row["newest"]["step"] == 1
    assert (row["lock"]["alive"], row["lock"]["next_start"]) == (False, "takes over")
    assert "will be published" in call("status", directory).out
    finish(directory)
    after = call("status", directory, "--json").json
    assert after["debris"] == []
    assert after["prefixes"][0]["lock"] is None
    assert [row["step"] for row in call("ls", directory, "--json").json["checkpoints"]] == [4, 3, 2, 1]


def test_incomplete_staging_will_be_removed(call: Any, crashed: Callable[[str], Path], finish: Any) -> None:
    directory = crashed("die-before-record")
    content = call("status", directory, "--json").json
    assert _fates(content) == {"staging": "remove"}
    assert "incomplete" in content["debris"][0]["why"]
    finish(directory)
    assert [row["step"] for row in call("ls", directory, "--json").json["checkpoints"]] == [3, 2, 1]


def test_replaced_trash_and_temporaries(call: Any, crashed: Callable[[str], Path], finish: Any) -> None:
    directory = crashed("die-before-publish")
    shutil.rmtree(next(directory.glob(".run-1_2.staging-*")))
    (directory / ".run-0_9.trash-0123456789abcdef").mkdir()
    (directory / f".run-0_9.bad-{TOKEN}").write_text("gone")
    (directory / f".run.run.temp-{TOKEN}").write_text("")
    os.rename(directory / "run-1_1", directory / f".run-1_1.replaced-{TOKEN}")
    content = call("status", directory, "--json").json
    assert _fates(content) == {"trash": "remove", "mark": "remove", "temporary": "remove", "replaced": "restore"}
    assert content["prefixes"][0]["newest"]["step"] == 1
    finish(directory)
    assert call("status", directory, "--json").json["debris"] == []
    assert "run-1_1" in os.listdir(directory)


def test_a_file_that_was_not_written_to_the_end_is_told(call: Any, published: Path) -> None:
    (published / "rank_3").mkdir()
    names = [f".{'x' * 40}.safetensors.temp-{TOKEN}", f"rank_3/.x.ckpt.temp-{TOKEN}"]
    for name in names:
        (published / name).write_bytes(b"123")
    (published / ".x.ckpt.temp-1").write_bytes(b"somebody's own")
    left = call("status", published, "--json").json["debris"]
    assert [(row["name"], row["kind"], row["fate"], row["nbytes"]) for row in left] == [
        (name, "temporary", "keep", 3) for name in names
    ]
    assert "can be deleted" in call("status", published).out


def test_what_is_being_rewritten_is_in_progress(call: Any, alive: tuple[Path, int]) -> None:
    directory, _ = alive
    (lock,) = directory.glob(".*.lock")
    (staging,) = directory.glob(".*.staging-*")
    # As a rewriting does: the name is locked, not the family.
    os.rename(lock, directory / f"{staging.name.rsplit('.', 1)[0]}.lock")
    assert _fates(call("status", directory, "--json").json) == {"staging": "in progress"}


def test_orphan_manifest(call: Any, published: Path) -> None:
    (published / "one-2_1.ckpt").unlink()
    content = call("status", published, "--json").json
    assert [(row["kind"], row["fate"]) for row in content["debris"]] == [("manifest", "remove")]


def test_living_holder(call: Any, alive: tuple[Path, int]) -> None:
    directory, pid = alive
    content = call("status", directory, "--json").json
    lock = content["prefixes"][0]["lock"]
    assert (lock["pid"], lock["alive"], lock["next_start"], lock["why"]) == (pid, True, "refused", None)
    assert lock["host"] == os.uname().nodename
    assert _fates(content) == {"staging": "in progress"}
    text = call("status", directory).out
    assert f"process {pid}" in text
    assert "in progress" in text


def test_oddities_are_described(call: Any, published: Path) -> None:
    (published / ".odd.lock").write_text("{")
    (published / ".odd.run").write_text("{")
    (published / f".x-1_1.staging-{TOKEN}").mkdir()
    (published / "y-1_1").mkdir()
    content = call("status", published, "--json").json
    odd = next(row for row in content["prefixes"] if row["prefix"] == "odd")
    assert odd["lock"]["readable"] is False
    assert odd["run_file"] == {"state": "unreadable"}
    assert odd["newest"] is None
    unknown = next(row for row in content["prefixes"] if row["prefix"] is None)
    assert unknown["unusable"] == 1
    assert [(row["kind"], row["fate"]) for row in content["debris"]] == [("staging", "remove")]
    out = call("status", published).out
    assert "the lock file is unreadable" in out
    assert "the run file is unreadable" in out
