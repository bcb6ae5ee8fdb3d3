"""``parckpt verify``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.fast


def flip(path: Path, byte_offset: int) -> None:
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(byte_offset)
        byte = file.read(1)[0]
        file.seek(byte_offset)
        file.write(bytes([byte ^ 1]))


def test_all_sound(call: Any, published: Path) -> None:
    done = call("verify", published, "--json")
    assert done.status == done.json["exit_status"] == 0
    assert done.json["counts"] == {"sound": 7, "damaged": 0, "unreadable": 0, "unverified": 0}
    listed = call("ls", published, "--json").json["checkpoints"]
    assert done.json["nbytes"] == sum(row["nbytes"] for row in listed)
    assert all(not report["findings"] for report in done.json["checkpoints"])
    assert call("verify", published, "--prefix", "one", "--json").json["counts"]["sound"] == 2


def test_names_chunk_and_tensors(call: Any, published: Path) -> None:
    path = published / "ranks-2_2" / "rank_1" / "ranks-2_2.ckpt"
    flip(path, (4 << 20) + 17)
    done = call("verify", published / "ranks-2_2", "--json")
    assert done.status == 5
    (report,) = done.json["checkpoints"]
    (finding,) = report["findings"]
    assert (finding["severity"], finding["code"], finding["path"]) == ("damage", "checksum", str(path))
    assert (finding["chunk"], finding["tensors"]) == (1, ["model.big"])
    out = call("verify", published / "ranks-2_2").out
    assert "'model.big'" in out
    assert "chunk 1" in out
    assert call("verify", published / "ranks-2_1").status == 0
    assert call("verify", published, "--json").json["counts"] == {
        **{"sound": 6, "damaged": 1, "unreadable": 0, "unverified": 0}
    }


def test_without_manifest(call: Any, golden: Path, tmp_path: Path) -> None:
    """MindSpore's crc proves a file; headers alone do not."""
    assert call("verify", golden / "ckpt" / "all_dtypes_crc.ckpt").status == 0
    assert call("verify", golden / "safetensors" / "crc_zero_dim_int.safetensors").status == 0
    bare = call("verify", golden / "dist2" / "ckpt_full")
    assert bare.status == 9
    assert "without a checksum" in bare.out
    assert call("verify", golden / "corrupt" / "crc_data_bitflip.ckpt").status == 5
    shutil.copy(golden / "ckpt" / "all_dtypes_crc.ckpt", tmp_path)
    assert call("verify", tmp_path).status == 0
    shutil.copy(golden / "ckpt" / "mlp_plain.ckpt", tmp_path)
    assert call("verify", tmp_path).status == 9
    shutil.copy(golden / "corrupt" / "plain_cut_mid.ckpt", tmp_path)
    assert call("verify", tmp_path).status == 5


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *((f"crc_{name}.ckpt", 5) for name in ("data_bitflip", "value_wrong", "value_high_byte", "trailer_partial")),
        # Nothing in these can tell: the crc is cut off, or there was none.
        *((f"{name}.ckpt", 9) for name in ("crc_trailer_cut", "plain_bitflip", "plain_cut_boundary")),
        *((f"st_{name}.safetensors", 5) for name in ("bitflip_crc", "cut", "extra", "header_len", "short", "zero")),
        ("st_bitflip_nocrc.safetensors", 9),
        ("zero_length.ckpt", 5),
        ("garbage.ckpt", 5),
    ],
)
def test_corrupt_files(call: Any, golden: Path, name: str, status: int) -> None:
    assert call("verify", golden / "corrupt" / name).status == status


def test_nothing_there(call: Any, tmp_path: Path) -> None:
    assert call("verify", tmp_path).status == 4
    missing = call("verify", tmp_path / "x", "--json")
    assert (missing.status, missing.json["error"]["code"]) == (4, "not-found")


def test_a_removed_manifest_does_not_make_it_sound(call: Any, published: Path) -> None:
    (published / "ranks-2_2" / "manifest").unlink()
    assert call("verify", published / "ranks-2_2").status == 9
    assert call("verify", published).status == 5
