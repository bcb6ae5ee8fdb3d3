"""``parckpt ls``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.fast


def test_newest_first_within_each_prefix(call: Any, published: Path) -> None:
    rows = call("ls", published, "--json").json["checkpoints"]
    for family in ("one", "ranks", "owners"):
        assert [row["step"] for row in rows if row["family"] == family] == [5, 4]
    assert {row["state"] for row in rows} == {"ok"}
    by_name = {row["name"]: row for row in rows}
    assert set(by_name) == {
        *("one-2_1.ckpt", "one-2_2.ckpt", "ranks-2_1", "ranks-2_2", "owners-2_1", "owners-2_2", "single.ckpt")
    }
    row = by_name["owners-2_2"]
    assert (row["epoch"], row["step_in_epoch"], row["ranks"], row["format"]) == (2, 2, 2, "safetensors")
    assert (row["kind"], row["reason"], row["path"]) == ("regular", "end", str(published / "owners-2_2"))
    files = [published / "owners-2_2" / f"rank_{rank}" / "owners-2_2.safetensors" for rank in (0, 1)]
    assert row["nbytes"] == sum(os.path.getsize(file) for file in files)


def test_prefix_and_numbered_prefixes(call: Any, published: Path) -> None:
    shutil.copy(published / "single.ckpt", published / "one_1-1_1.ckpt")
    found = call("ls", published, "--prefix", "one", "--json").json
    assert {row["family"] for row in found["checkpoints"]} == {"one"}
    assert [row["name"] for row in found["foreign"]] == ["one_1-1_1.ckpt"]
    none = call("ls", published, "--prefix", "o", "--json").json
    assert none["checkpoints"] == none["foreign"] == []


def test_states(call: Any, published: Path, golden: Path) -> None:
    (published / "ranks-2_2" / "rank_1" / "ranks-2_2.ckpt").unlink()
    with open(published / "one-2_2.ckpt", "ab") as file:
        file.write(b"x")
    (published / "owners-2_2" / "manifest").write_bytes(b"nothing")
    token = next(r["token"] for r in call("ls", published, "--json").json["checkpoints"] if r["name"] == "ranks-2_1")
    (published / f".ranks-2_1.bad-{token}").write_text("chunk 0 is damaged")
    shutil.copy(golden / "train" / "net-2_4.ckpt", published)
    shutil.copytree(golden / "dist2" / "ckpt_full", published / "foreign")
    found = call("ls", published, "--json").json
    rows = {row["name"]: row for row in found["checkpoints"]}
    assert rows["ranks-2_2"]["state"] == "damaged"
    assert rows["ranks-2_2"]["problem"] == "rank_1/ranks-2_2.ckpt is missing"
    assert rows["one-2_2.ckpt"]["state"] == "damaged"
    assert "its manifest says" in rows["one-2_2.ckpt"]["problem"]
    assert rows["owners-2_2"]["state"] == "damaged"
    assert rows["owners-2_2"]["step"] is None
    assert (rows["ranks-2_1"]["state"], rows["ranks-2_1"]["problem"]) == ("set aside", "chunk 0 is damaged")
    assert {row["name"]: row["files"] for row in found["foreign"]} == {"foreign": 2, "net-2_4.ckpt": 1}
    text = call("ls", published).out
    assert "set aside: chunk 0 is damaged" in text
    assert "no manifest" in text


def test_a_directory_of_rank_directories_is_foreign_itself(call: Any, golden: Path) -> None:
    (row,) = call("ls", golden / "dist2" / "ckpt_full", "--json").json["foreign"]
    assert (row["name"], row["files"]) == (".", 2)


def test_names_are_whole_and_harmless_without_a_terminal(call: Any, tmp_path: Path, golden: Path) -> None:
    long = "n" * 200 + ".ckpt"
    hostile = "a\x1b[31m[bold]b\n.ckpt"
    for name in (long, hostile):
        shutil.copy(golden / "train" / "net-2_4.ckpt", tmp_path / name)
    out = call("ls", tmp_path).out
    assert long in out
    assert "\x1b" not in out
    assert r"a\x1b[31m[bold]b\n.ckpt" in out
    assert len(out.splitlines()) == 3
    assert {row["name"] for row in call("ls", tmp_path, "--json").json["foreign"]} == {long, hostile}


def test_nothing_and_nowhere(call: Any, tmp_path: Path) -> None:
    found = call("ls", tmp_path)
    assert (found.status, found.out) == (0, f"no checkpoints in {tmp_path}\n")
    missing = call("ls", tmp_path / "missing")
    assert (missing.status, missing.out) == (4, "")
    assert missing.err == f"parckpt: {tmp_path / 'missing'} does not exist\n"
    (tmp_path / "file").write_text("")
    assert call("ls", tmp_path / "file").status == 4
