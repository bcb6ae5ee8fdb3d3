"""``parckpt diff``."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.engine import comparing
from parckpt.engine.source import open_source
from parckpt.storage.filesystem import PosixFileSystem
from parckpt.testing.world import run_world


def flip(path: Path, byte_offset: int) -> None:
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(byte_offset)
        byte = file.read(1)[0]
        file.seek(byte_offset)
        file.write(bytes([byte ^ 1]))


def test_a_step_and_the_next(call: Any, published: Path) -> None:
    done = call("diff", published / "ranks-2_1", published / "ranks-2_2", "--json")
    assert done.status == 1
    found = done.json
    assert (found["equal"], found["a"]["step"], found["b"]["step"], found["tensor_count"]) == (False, 4, 5, 5)
    (big,) = found["tensors"]
    assert (big["name"], big["kind"], big["elements"], big["differing"]) == ("model.big", "values", 1200000, 1200000)
    assert (big["largest"], big["largest_at"]) == (1.0, {"index": [0], "a": 4.0, "b": 5.0})
    assert found["values"] == []
    # What is left was not read: its chunks are equal, or small beside the tensor that was.
    text = call("diff", published / "ranks-2_1", published / "ranks-2_2", "--values").out
    assert "all 1200000 elements differ, largest difference 1 at [0] (A 4.0, B 5.0)" in text
    assert "  [9]: A 4.0, B 5.0" in text
    assert "they differ: 1 of 5 tensors (1 in values), 0 plain values" in text


def test_formats_and_layouts_do_not_matter(call: Any, published: Path) -> None:
    """One file, one file a rank, replicas stored once as safetensors: the same state."""
    names = ("one-2_2.ckpt", "ranks-2_2", "owners-2_2")
    for a, b in (names[:2], names[1:], names[::2]):
        done = call("diff", published / a, published / b, "--json")
        assert (done.status, done.json["equal"], done.json["not_compared"]) == (0, True, [])
        assert done.json["nbytes_skipped"] == 0
    assert "no difference (5 tensors); read" in call("diff", published / names[0], published / names[1]).out


def test_equal_chunks_are_not_read(call: Any, published: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(published / "ranks-2_2", other)
    same = call("diff", published / "ranks-2_2", other, "--json").json
    assert (same["equal"], same["nbytes_read"]) == (True, 0)
    full = call("diff", published / "ranks-2_2", other, "--json", "--read-all").json
    assert (full["equal"], full["nbytes_skipped"]) == (True, 0)
    assert full["nbytes_read"] >= 2 * 1200000 * 8
    # Equal checksums say what was saved; damage since then is seen where data is read.
    flip(other / "rank_0" / "ranks-2_2.ckpt", 5000)
    assert call("diff", published / "ranks-2_2", other).status == 0
    damaged = call("diff", published / "ranks-2_2", other, "--read-all")
    assert damaged.status == 5
    assert str(other / "rank_0" / "ranks-2_2.ckpt") in damaged.err


def test_one_element_of_a_large_tensor(call: Any, tmp_path: Path) -> None:
    big = np.arange(3 << 20, dtype="f4").reshape(3, -1)
    parckpt.save_checkpoint({"big": big}, tmp_path / "a")
    big[2, 77] = math.nan
    parckpt.save_checkpoint({"big": big}, tmp_path / "b")
    done = call("diff", tmp_path / "a.ckpt", tmp_path / "b.ckpt", "--json").json
    (row,) = done["tensors"]
    assert (row["differing"], row["nonfinite"], row["largest"]) == (1, 1, None)
    assert row["examples"] == [{"index": [2, 77], "a": float((2 << 20) + 77), "b": "nan"}]
    assert done["nbytes_skipped"] >= 4 << 20
    assert done["nbytes_read"] < 2 * (9 << 20)
    assert (
        "1 of 3145728 elements differ, 1 with NaN or infinity"
        in call("diff", tmp_path / "a.ckpt", tmp_path / "b.ckpt").out
    )


def test_names_types_and_values(call: Any, tmp_path: Path) -> None:
    a = {"w": np.zeros(3), "gone": np.ones(2, "i4"), "t": np.zeros(4, "f4"), "s": np.zeros((2, 2))}
    b = {"w": np.zeros(3), "t": np.zeros(4, "f2"), "s": np.zeros(4), "new": np.array(True)}
    parckpt.save_checkpoint(a, tmp_path / "a", append_dict={"epoch_num": 1, "note": "x\x1b[31m", "only": 2.5})
    parckpt.save_checkpoint(b, tmp_path / "b", append_dict={"epoch_num": 2, "note": "x\x1b[31m"})
    done = call("diff", tmp_path / "a.ckpt", tmp_path / "b.ckpt", "--json")
    assert {row["name"]: row["kind"] for row in done.json["tensors"]} == {
        **{"gone": "only in A", "t": "type", "s": "type", "new": "only in B"}
    }
    assert done.json["values"] == [
        {"kind": "appended", "name": "epoch_num", "a": "1", "b": "2"},
        {"kind": "appended", "name": "only", "a": "2.5", "b": None},
    ]
    out = call("diff", tmp_path / "a.ckpt", tmp_path / "b.ckpt").out
    assert "A float32 4, B float16 4" in out
    assert "A float64 2x2, B float64 4" in out
    assert "A 2.5, B not there" in out
    assert "they differ: 4 of 5 tensors (1 only in A, 2 in shape or type, 1 only in B), 2 plain values" in out
    headers = call("diff", tmp_path / "a.ckpt", tmp_path / "b.ckpt", "--headers")
    assert (headers.status, "read no data" in headers.out) == (1, True)


def test_headers_read_no_data(call: Any, published: Path) -> None:
    done = call("diff", published / "ranks-2_1", published / "ranks-2_2", "--headers", "--json")
    assert (done.status, done.json["equal"], done.json["nbytes_read"]) == (0, True, 0)
    assert call("diff", published, published, "--headers", "--values").status == 3


def test_without_a_manifest(call: Any, published: Path, tmp_path: Path, golden: Path) -> None:
    shutil.copy(published / "one-2_2.ckpt", tmp_path / "bare.ckpt")
    done = call("diff", published / "one-2_2.ckpt", tmp_path / "bare.ckpt", "--json")
    assert (done.status, done.json["equal"], done.json["b"]["has_manifest"]) == (0, True, False)
    assert len(done.json["not_compared"]) == 1
    flip(tmp_path / "bare.ckpt", 2_000_000)
    assert (
        call("diff", published / "one-2_2.ckpt", tmp_path / "bare.ckpt", "--json").json["tensors"][0]["differing"] == 1
    )
    same = call("diff", golden / "dist2" / "ckpt_full", golden / "dist2" / "ckpt_full")
    assert same.status == 0


def test_appended_numbers_of_a_bare_file(call: Any, tmp_path: Path) -> None:
    parckpt.save_checkpoint({"w": np.zeros(2)}, tmp_path / "a", append_dict={"epoch_num": 3, "lr": 0.1})
    os.mkdir(tmp_path / "bare")
    shutil.copy(tmp_path / "a.ckpt", tmp_path / "bare")
    for pair in (
        (tmp_path / "a.ckpt", tmp_path / "bare" / "a.ckpt"),
        (tmp_path / "bare" / "a.ckpt", tmp_path / "a.ckpt"),
    ):
        done = call("diff", *pair, "--json")
        assert (done.status, done.json["tensors"], done.json["values"]) == (0, [], [])
        assert any("'lr'" in sentence for sentence in done.json["not_compared"])


def test_what_cannot_be_compared(call: Any, published: Path, tmp_path: Path, golden: Path) -> None:
    missing = call("diff", published / "ranks-2_2", tmp_path / "nowhere")
    assert (missing.status, missing.err) == (4, f"parckpt: there is no checkpoint at {tmp_path / 'nowhere'}\n")
    several = call("diff", published, published / "ranks-2_2")
    assert (several.status, "parckpt ls lists what is in it" in several.err) == (4, True)
    assert call("diff", golden / "corrupt" / "zero_length.ckpt", published / "ranks-2_2").status == 5
    slices = call("diff", golden / "strategy" / "src_ckpt", published / "ranks-2_2")
    assert (slices.status, "without a layout" in slices.err) == (8, True)


def test_mindspore_rank_directories_by_their_strategy(call: Any, golden: Path, tmp_path: Path) -> None:
    strategy = ("--strategy", golden / "strategy" / "strategy_4dev.ckpt")
    a, b = golden / "strategy" / "src_ckpt", golden / "strategy" / "src_safetensors"
    assert call("diff", a, b, *strategy, "--json").json["tensors"] == []
    copy = tmp_path / "copy"
    shutil.copytree(b, copy)
    file = next((copy / "rank_0").glob("*.safetensors"))
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header = json.loads(file.read_bytes()[8 : 8 + length])
    name = max(header, key=lambda key: header[key].get("shape", []))
    flip(file, 8 + length + header[name]["data_offsets"][0])
    (row,) = call("diff", a, copy, *strategy, "--json").json["tensors"]
    assert (row["name"], row["kind"], row["differing"]) == (name, "values", 1)


def test_other_cuts_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk is verified once, and read once more at most, however the cuts cross."""
    monkeypatch.setattr(comparing, "_BATCH_NBYTES", 1 << 18)
    monkeypatch.setattr(comparing, "_SLAB_NBYTES", 1 << 17)
    whole = np.random.default_rng(7).integers(0, 100, (1000, 1200), dtype="i4")

    def save(comm: Any, rank: int, name: str, axis: int) -> None:
        config = parckpt.CheckpointConfig(save_checkpoint_steps=1, integrated_save=False)
        offsets = [0, 0]
        offsets[axis] = rank * whole.shape[axis] // comm.size
        part = np.split(whole, comm.size, axis)[rank]
        small = {f"s{k}": np.full(3, k) for k in range(50)}
        state = {"w": parckpt.Shard(part.copy(), whole.shape, offsets), **small}
        with parckpt.ModelCheckpoint(name, tmp_path, config, comm=comm) as checkpoints:
            checkpoints.step_end(state, 1)

    run_world(4, lambda comm, rank: save(comm, rank, "rows", 0))
    whole[999, 3] += 5
    whole[0, 1199] -= 6
    run_world(3, lambda comm, rank: save(comm, rank, "columns", 1))
    fs = PosixFileSystem()
    a, b = (open_source(fs, str(tmp_path / name)) for name in ("rows-1_1", "columns-1_1"))
    for left, right in ((a, b), (b, a)):
        done: list[int] = []
        found = comparing.compare(left, right, on_done=done.append)
        (one,) = found.tensor_differences
        assert one.delta is not None
        assert (one.name, one.delta.differing, one.delta.largest) == ("w", 2, 6)
        assert sorted(element.index for element in one.delta.examples) == [(0, 1199), (999, 3)]
        assert sum(done) == comparing.comparable_nbytes(left, right)
        stored = sum(file.nbytes for side in (a, b) for file in side.contents.files)
        assert found.nbytes_read < 2 * stored


def _sparse(path: Path, rows: int, columns: int, changed: int | None = None) -> None:
    """A file of one float32 tensor of zeros that takes no room on the disk."""
    nbytes = rows * columns * 4
    header = json.dumps({"w": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, nbytes]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + nbytes)
        if changed is not None:
            file.seek(8 + len(header) + 4 * changed)
            file.write(struct.pack("<f", 3.5))


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """One tensor of 240 MB in each: 480 MB pass through less than 150 MB beyond what the program itself takes."""
    _sparse(tmp_path / "a.safetensors", 6_000, 10_000)
    _sparse(tmp_path / "b.safetensors", 6_000, 10_000, changed=59_999_999)
    code = """
import resource, sys
from parckpt.cli.main import main
def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
try:
    main(["diff", *sys.argv[1:3], "--headers"], prog_name="parckpt")
except SystemExit:
    before = peak_mb()
try:
    main(["diff", *sys.argv[1:3]], prog_name="parckpt")
except SystemExit as end:
    print(end.code, peak_mb() - before)
"""
    paths = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=120, check=True)
    status, grown_mb = map(int, done.stdout.splitlines()[-1].split())
    assert "1 of 60000000 elements differ" in done.stdout
    assert "largest difference 3.5 at [5999, 9999] (A 0.0, B 3.5)" in done.stdout
    assert (status, grown_mb < 150) == (1, True), grown_mb
