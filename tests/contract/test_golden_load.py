"""`load_checkpoint` on every unencrypted file of the corpus: what MindSpore loads, and where it must be stricter."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.comm.base import Communicator
from parckpt.testing.files import GoldenFile, golden_files
from parckpt.testing.world import run_world

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FILES = {f.name: f for form in ("ckpt", "safetensors") for f in golden_files(GOLDEN, form)}

# What MindSpore loads although it is wrong, or cannot be known to be right; we refuse it.
STRICTER = {
    "crafted/content_too_short.ckpt": "the content does not fit the shape",
    "crafted/content_too_long.ckpt": "the content does not fit the shape",
    "corrupt/crc_data_bitflip.ckpt": "a crc that is there is checked, asked for or not",
    "corrupt/crc_value_wrong.ckpt": "a crc that is there is checked",
    "corrupt/crc_value_high_byte.ckpt": "a crc that is there is checked",
    "corrupt/crc_cut_boundary_with_trailer.ckpt": "a crc that is there is checked",
    "corrupt/st_bitflip_crc.safetensors": "a crc that is there is checked",
}
# What MindSpore wrote and cannot load.
BETTER = {
    "ckpt/dtype_complex64_unloadable.ckpt",
    "ckpt/dtype_complex128_unloadable.ckpt",
    "safetensors/complex64_unloadable.safetensors",
}


def attempts() -> list[Any]:
    return [
        pytest.param(file, load, id=f"{name}{'+crc' * bool(load['crc_check'])}")
        for name, file in FILES.items()
        for load in file.facts["loads"]
    ]


@pytest.mark.parametrize(("file", "load"), attempts())
def test_loads_what_mindspore_loads_or_says_why_not(file: GoldenFile, load: dict[str, Any]) -> None:
    check = load["crc_check"]
    # MindSpore only warns where the checksum that was asked for is missing.
    unprotected = check and not file.name.endswith(".safetensors") and b"crc_num" not in file.path.read_bytes()
    if file.name in STRICTER or unprotected or (not load["ok"] and file.name not in BETTER):
        with pytest.raises((parckpt.FormatError, parckpt.IntegrityError)) as caught:
            parckpt.load_checkpoint(file.path, allow_unverified=True, crc_check=check)
        assert file.path.name in str(caught.value)
        return
    # What says that it is one rank's of several is taken for all there is only by those who know.
    partial = b'"remove_redundancy":"True"' in file.path.read_bytes()
    if partial:
        with pytest.warns(parckpt.StateWarning, match="one rank's of several"):
            parckpt.load_checkpoint(file.path, allow_unverified=True, crc_check=check)
    found = parckpt.load_checkpoint(file.path, allow_unverified=True, crc_check=check, remove_redundancy=partial)
    if load["ok"]:
        assert set(found) == {tensor["name"] for tensor in load["tensors"]}
        for tensor in load["tensors"]:
            check_tensor(file.name, tensor, found[tensor["name"]])


def check_tensor(file: str, tensor: dict[str, Any], found: Any) -> None:
    if tensor["kind"] == "str":
        assert isinstance(found, str)
    elif tensor["kind"] == "map":
        assert [part.ndim >= 1 for part in found] == [True] * 3
    else:
        # dims [0] without content comes back as a scalar in MindSpore; we know that it is empty.
        empty = file == "ckpt/empty_async.ckpt" and found.shape == (0,)
        assert empty or list(found.shape) == tensor["shape"]
        assert empty or hashlib.sha256(found.tobytes()).hexdigest() == tensor["sha256"]


def test_a_foreign_file_is_announced_and_refused_next_to_our_own(tmp_path: Path) -> None:
    source = FILES["ckpt/mlp_plain.ckpt"].path
    (tmp_path / "mlp.ckpt").write_bytes(source.read_bytes())
    with pytest.warns(parckpt.StateWarning, match="no manifest"):
        parckpt.load_checkpoint(tmp_path / "mlp.ckpt")
    parckpt.save_checkpoint({"w": np.ones(3)}, tmp_path / "ours.ckpt")
    with pytest.raises(parckpt.IntegrityError, match="allow_unverified"):
        parckpt.load_checkpoint(tmp_path / "mlp.ckpt")
    assert parckpt.load_checkpoint(tmp_path / "mlp.ckpt", allow_unverified=True)


@pytest.mark.parametrize("name", ["ckpt_full", "ckpt_dedup", "safetensors_full", "safetensors_dedup"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_mindspore_rank_directories_restore_on_any_number_of_ranks(name: str, size: int, tmp_path: Path) -> None:
    directory = GOLDEN / "dist2" / name
    facts = [t for file in FILES.values() if file.name.startswith(f"dist2/{name}/") for t in file.tensors]
    expected = {t["name"]: t for t in facts}
    dtypes = {"Float32": np.float32, "Int32": np.int32}

    def rank_main(comm: Communicator, rank: int) -> tuple[int, dict[str, Any]]:
        state = {
            key: np.zeros(t["shape"], dtypes[t["dtype"]])
            for key, t in expected.items()
            if key not in ("epoch_num", "step_num")
        }
        with parckpt.ModelCheckpoint("net", tmp_path, comm=comm) as ckpt:
            progress = ckpt.restore(state, path=directory)
            assert set(progress.append_dict) == {"epoch_num", "step_num"}
        return progress.step, state

    assert len(expected) > 8
    for step, state in run_world(size, rank_main):
        assert step == 2
        for key, array in state.items():
            assert hashlib.sha256(array.tobytes()).hexdigest() == expected[key]["sha256"], key


@pytest.mark.parametrize(("mode", "first"), [("AES-GCM", 0xD8), ("AES-CBC", 0xD9), ("SM4-CBC", 0xDA)])
def test_what_is_encrypted_is_said_to_be(mode: str, first: int, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(bytes([first]) + b"\x5e\x3a\x7f" + bytes(200))
    with pytest.raises(parckpt.ConfigError, match=f"is encrypted with {mode}: pass dec_key"):
        parckpt.load_checkpoint(path, allow_unverified=True)
