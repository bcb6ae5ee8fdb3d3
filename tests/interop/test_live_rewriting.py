"""Rewritten files, loaded by MindSpore; and MindSpore's files, rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from typer.testing import CliRunner

import parckpt
from parckpt.cli.main import main
from parckpt.testing.world import run_world

DTYPES = ("bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64")


def run(*words: Any) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def random_state(rng: np.random.Generator) -> dict[str, np.ndarray]:
    state = {}
    for number, dtype in enumerate(DTYPES):
        shape = tuple(rng.integers(1, 7, rng.integers(1, 4)))
        state[f"p{number}.{dtype}"] = (rng.standard_normal(shape) * 50).astype(dtype)
    return state


def assert_loads(path: Path, expected: dict[str, np.ndarray]) -> None:
    """MindSpore finds exactly this in a file, and its checksum right."""
    found = ms.load_checkpoint(str(path), format=path.suffix[1:], crc_check=True)
    assert sorted(found) == sorted([*expected, "epoch_num", "step_num"])
    assert (int(found["epoch_num"].asnumpy()), int(found["step_num"].asnumpy())) == (2, 9)
    for name, array in expected.items():
        loaded = found[name].asnumpy()
        assert (loaded.dtype, loaded.shape, loaded.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


@pytest.mark.parametrize("seed", range(5))
def test_mindspore_loads_what_was_rewritten(tmp_path: Path, seed: int) -> None:
    expected = random_state(np.random.default_rng(seed))

    def save(comm: Any, rank: int) -> None:
        state: dict[str, Any] = {}
        for name, array in expected.items():
            half = len(array) // 2
            mine = array[:half] if rank == 0 else array[half:]
            state[name] = parckpt.Shard(mine.copy(), array.shape, (half * rank, *(0,) * (array.ndim - 1)))
        append = {"epoch_num": 2, "step_num": 9}
        parckpt.save_checkpoint(state, tmp_path / "src", False, append_dict=append, comm=comm)

    run_world(2, save)
    for name in ("a.ckpt", "a.safetensors"):
        run("merge", tmp_path / "src", tmp_path / name, "--crc")
        assert_loads(tmp_path / name, expected)
    run("convert", tmp_path / "a.safetensors", tmp_path / "b.ckpt", "--crc")
    assert (tmp_path / "b.ckpt").read_bytes() == (tmp_path / "a.ckpt").read_bytes()
    run("split", tmp_path / "a.ckpt", tmp_path / "three", "--ranks", 3, "--crc")
    pieces = [ms.load_checkpoint(str(tmp_path / f"three/rank_{r}/three.ckpt"), crc_check=True) for r in range(3)]
    for name, array in expected.items():
        rows = [piece[name].asnumpy() for piece in pieces if name in piece]
        assert np.concatenate(rows).tobytes() == array.tobytes()


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_mindspores_files_are_rewritten(tmp_path: Path, form: str) -> None:
    expected = random_state(np.random.default_rng(7))
    listed = [{"name": name, "data": ms.Tensor(array)} for name, array in expected.items()]
    path = tmp_path / f"theirs.{form}"
    append = {"epoch_num": 2, "step_num": 9}
    ms.save_checkpoint(listed, str(path), append_dict=append, crc_check=True, format=form)
    for name in ("x.ckpt", "x.safetensors"):
        run("convert", path, tmp_path / name, "--crc")
        assert_loads(tmp_path / name, expected)
    if form == "ckpt":  # MindSpore writes the members of a safetensors header in any order
        assert (tmp_path / "x.ckpt").read_bytes() == path.read_bytes()
