"""``parckpt show``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


def _loadable() -> list[dict[str, Any]]:
    """What the golden manifest says of whole, unencrypted files that MindSpore loads."""
    listed: list[dict[str, Any]] = json.loads((GOLDEN / "manifest.json").read_text())["files"]
    whole = ("ckpt/", "safetensors/", "train/", "train_exception/", "dist2/")
    return [one for one in listed if one["file"].startswith(whole) and one["loads"][0]["ok"]]


def test_published(call: Any, published: Path) -> None:
    content = call("show", published / "owners-2_2", "--json").json
    assert (content["step"], content["state"], content["remove_redundancy"], content["crc_check"]) == (
        5,
        "ok",
        True,
        True,
    )
    tensors = {(row["name"], row["rank"]): row for row in content["tensors"]}
    files = [f"rank_{rank}/owners-2_2.safetensors" for rank in (0, 1)]
    w = tensors["model.w", None]
    assert (w["dtype"], w["shape"], w["nbytes"], w["boxes"], w["files"]) == ("float32", [6, 7], 168, 2, files)
    assert tensors["own", 1]["files"] == files[1:]
    assert tensors["own", 1]["shape"] == [2]
    assert content["values"]["lr"] == 0.5
    assert content["per_rank_values"]["position"] == {"0": 0, "1": 10}
    assert [file["path"] for file in content["files"]] == files


def test_published_for_people(call: Any, published: Path) -> None:
    out = call("show", published / "ranks-2_2").out
    for expected in ("step 2 of it", "2 rank files", "model.w", "6x7", "own [rank 1]", "nan", "position [rank 1]"):
        assert expected in out
    single = call("show", published / "single.ckpt").out
    assert "one file with every tensor" in single
    assert "epoch_num  3" in single


@pytest.mark.parametrize("listed", _loadable(), ids=lambda listed: str(listed["file"]))
def test_foreign_files_show_what_mindspore_loads(call: Any, golden: Path, listed: dict[str, Any]) -> None:
    content = call("show", golden / listed["file"], "--json").json
    shown = {row["name"].removesuffix(".keys") for row in content["tensors"]} | set(content["strings"])
    assert {item["name"] for item in listed["loads"][0]["tensors"]} <= shown


def test_foreign_directory_of_slices(call: Any, golden: Path) -> None:
    """Slices that nobody can fit together without a layout are still shown."""
    content = call("show", golden / "strategy" / "src_ckpt", "--json").json
    assert len(content["files"]) == 4
    assert all(set(row["files"]) <= {file["path"] for file in content["files"]} for row in content["tensors"])
    assert "no manifest" in call("show", golden / "strategy" / "src_ckpt").out


def test_damage_and_mistakes(call: Any, published: Path, golden: Path) -> None:
    (published / "ranks-2_2" / "rank_1" / "ranks-2_2.ckpt").unlink()
    shown = call("show", published / "ranks-2_2", "--json")
    assert (shown.status, shown.json["state"]) == (0, "damaged")
    manifest = published / "owners-2_2" / "manifest"
    data = bytearray(manifest.read_bytes())
    data[100] ^= 1
    manifest.write_bytes(bytes(data))
    broken = call("show", published / "owners-2_2", "--json")
    assert (broken.status, broken.json["error"]["code"]) == (5, "checksum")
    assert call("show", published).status == 4
    assert "parckpt ls" in call("show", published).err
    assert call("show", golden / "corrupt" / "garbage.ckpt").status == 5
    assert call("show", golden / "README.md").status == 3
