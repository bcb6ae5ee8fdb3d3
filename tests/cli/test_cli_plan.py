"""``parckpt plan``: what it says is what a job then does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.engine.measuring import measure_rate
from parckpt.engine.source import open_source
from parckpt.errors import NoSpaceError, StorageError
from parckpt.storage.filesystem import PosixFileSystem
from parckpt.testing.clock import ManualClock
from parckpt.testing.filesystem import MemoryFileSystem
from parckpt.testing.world import run_world

TENSORS: dict[str, Any] = {
    "embed": {"shape": [64, 10], "tensor_map": ["model", None]},
    "norm": {"shape": [33], "dtype": "float64"},
    "moment": {"shape": [50, 4], "tensor_map": [["data", "model"], None]},
    "seed": {"shape": [3], "dtype": "int32", "per_rank": True},
}


def _describe(path: Path, **extra: Any) -> Path:
    content = {"mesh_shape": [2, 2], "mesh_axes": ["data", "model"], "tensors": TENSORS, **extra}
    path.write_text(json.dumps(content))
    return path


def _train(directory: Path, **options: Any) -> Any:
    """The same state through a real ModelCheckpoint; returns the boxes of each rank's file."""

    def run(comm: Any, rank: int) -> None:
        state: dict[str, Any] = {}
        for name, one in TENSORS.items():
            dtype = one.get("dtype", "f4")
            layout = parckpt.Layout((2, 2), ("data", "model"), one.get("tensor_map", ()))
            data = np.zeros(layout.local_shape(one["shape"], rank), dtype)
            state[name] = parckpt.PerRank(data) if one.get("per_rank") else layout.shard(data, one["shape"], rank)
        config = parckpt.CheckpointConfig(save_checkpoint_steps=1, **options)
        with parckpt.ModelCheckpoint("m", directory, config, comm=comm) as checkpoints:
            checkpoints.step_end(state, 1)

    run_world(4, run)
    contents = open_source(PosixFileSystem(), str(directory / "m-1_1")).contents
    boxes = [contents.box(row) for row in range(len(contents.boxes.file))]
    return sorted(
        (box.file, contents.tensors[box.tensor].file_name, list(box.box.offsets), list(box.box.shape)) for box in boxes
    )


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (("--per-rank",), {"integrated_save": False}),
        ((), {"remove_redundancy": True}),
        (("--ownership", "mindspore"), {"remove_redundancy": True, "ownership": "mindspore"}),
    ],
)
def test_the_job_does_as_planned(call: Any, tmp_path: Path, words: tuple[str, ...], options: dict[str, Any]) -> None:
    planned = call("plan", _describe(tmp_path / "state.json"), "--boxes", "--json", *words)
    assert planned.status == 0
    rows = planned.json["boxes"]
    saved = _train(tmp_path / "ckpts", **options)
    assert sorted((row["rank"], row["tensor"], row["offsets"], row["shape"]) for row in rows) == saved
    by_rank = {row["rank"]: row["nbytes"] for row in planned.json["by_rank"]}
    assert by_rank == {rank: sum(row["nbytes"] for row in rows if row["rank"] == rank) for rank in range(4)}
    # What was saved can be planned as it lies, too.
    again = call("plan", tmp_path / "ckpts" / "m-1_1", "--per-rank", "--boxes", "--json").json
    assert sorted((r["rank"], r["tensor"], r["offsets"], r["shape"]) for r in again["boxes"]) == saved


def test_ways_nodes_and_seconds(call: Any, tmp_path: Path) -> None:
    path = _describe(tmp_path / "state.json")
    words = ("--ranks", 8, "--ranks-per-node", 4, "--rate", 1e-6, "--total-rate", 1e-3, "--json")
    found = call("plan", path, *words).json
    assert (found["ranks"], found["nodes"], found["tensor_count"], found["chosen"]) == (8, 2, 4, "without redundancy")
    once = (64 * 10 + 50 * 4) * 4 + 33 * 8 + 8 * 12
    ways = {row["name"]: row for row in found["ways"]}
    assert ways["integrated"]["nbytes"] == ways["without redundancy"]["nbytes"] == once
    assert (ways["integrated"]["files"], ways["per rank"]["files"]) == (1, 8)
    assert ways["integrated"]["fullest_node_nbytes"] == once
    assert ways["per rank"]["nbytes"] == 8 * (32 * 10 * 4 + 33 * 8 + 12) + 2 * 50 * 4 * 4
    assert sum(row["nbytes"] for row in found["by_node"]) == once
    assert [row["ranks"] for row in found["by_node"]] == [[0, 3], [4, 7]]
    for row in ways.values():
        assert row["seconds"] == pytest.approx(row["fullest_node_nbytes"] / 1000)
    unknown = call("plan", path, "--json").json
    assert {row["seconds"] for row in unknown["ways"]} == {None}
    assert "not known" in unknown["seconds_rest_on"]


def test_text(call: Any, tmp_path: Path) -> None:
    path = _describe(tmp_path / "state.json")
    out = call("plan", path, "--ranks-per-node", 2, "--rate", 2, "--boxes").out
    assert out.startswith("4 tensors, 3.64 kB; 4 ranks on 2 nodes\n")
    assert "seconds are those of writing, at 2.00 GB/s a node, as given by --rate" in out
    assert "embed [0:32, :]" in out
    whole = call("plan", path, "--integrated").out
    assert "rank 0 writes the file; the others send their part to it" in whole
    assert "seconds are not known" in whole
    many = call("plan", path, "--ranks", 400, "--ranks-per-node", 4).out
    assert "and 36 more (--json has every node)" in many
    assert "and 336 more (--json has every rank)" in many


def test_checkpoints(call: Any, published: Path, golden: Path) -> None:
    whole = call("plan", published / "one-2_2.ckpt", "--ranks", 3, "--json").json
    ways = {row["name"]: row["nbytes"] for row in whole["ways"]}
    assert ways["per rank"] == 3 * (6 * 7 * 4 + 9600000 + 8 + 8)
    cut = call("plan", published / "one-2_2.ckpt", "--ranks", 3, "--sharded", "--per-rank", "--json").json
    assert max(row["nbytes"] for row in cut["by_rank"]) < 3200000 + 200
    other = call("plan", published / "ranks-2_2", "--ranks", 4, "--json").json
    assert (other["ranks"], other["held_nbytes"]) == (4, 4 * (6 * 7 * 4 + 9600000 + 8 + 8))
    source = golden / "strategy" / "to1" / "rank_0"
    name = next(name for name in os.listdir(source) if name.endswith(".ckpt"))
    strategy = golden / "strategy" / "strategy_4dev.ckpt"
    planned = call("plan", source / name, "--strategy", strategy, "--per-rank", "--json").json
    assert planned["ranks"] == 4
    assert planned["nbytes"] < planned["held_nbytes"] < 4 * planned["nbytes"]


def test_mistakes(call: Any, tmp_path: Path, golden: Path) -> None:
    path = _describe(tmp_path / "state.json")
    assert call("plan", path, "--ranks", 6).status == 8
    for words in (
        ("--integrated", "--per-rank"),
        ("--strategy", path, "--sharded"),
        ("--rate", 1, "--measure", tmp_path),
        ("--rate", 0),
        ("--total-rate", -1),
        ("--rate", "inf"),
    ):
        assert call("plan", path, *words).status == 3
    assert call("plan", tmp_path / "none.json").status == 4
    assert call("plan", path, "--measure", tmp_path / "none").status == 4
    strategy = call("plan", golden / "strategy" / "strategy_4dev.ckpt")
    assert (strategy.status, "is a strategy file, which has no shapes" in strategy.err) == (3, True)
    assert call("plan", golden / "corrupt" / "garbage.ckpt").status == 5
    assert call("plan", "-", stdin='{"tensors": {"w": [4]}}').status == 0
    (tmp_path / "bad.json").write_text('{"tensors": {"w": {"shape": [4], "dtipe": "x"}}}')
    bad = call("plan", tmp_path / "bad.json")
    assert (bad.status, "did you mean dtype?" in bad.err) == (3, True)


def test_measure(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parckpt.cli.plan.MEASURE_NBYTES", 1 << 20)
    path = _describe(tmp_path / "state.json")
    found = call("plan", path, "--measure", tmp_path, "--json").json
    assert found["node_rate"] > 0
    assert "by one process on this machine" in found["seconds_rest_on"]
    assert os.listdir(tmp_path) == ["state.json"]


class _Slow(ManualClock):
    """Every look takes a second."""

    def monotonic(self) -> float:
        self.advance(1)
        return super().monotonic()


def test_a_slow_disk_is_given_up_on_and_a_full_one_spared() -> None:
    fs = MemoryFileSystem()
    fs.mkdir("/d")
    rate = measure_rate(fs, "/d", _Slow(), 64 << 20)
    assert 4 << 20 <= rate.nbytes < 64 << 20
    assert fs.listdir("/d") == []

    class Full(MemoryFileSystem):
        def free_nbytes(self, path: str) -> int:
            return 100

    full = Full()
    full.mkdir("/d")
    with pytest.raises(NoSpaceError, match="free"):
        measure_rate(full, "/d", ManualClock(), 64)
    assert full.listdir("/d") == []

    class Broken(MemoryFileSystem):
        def pwrite(self, fd: int, data: Any, byte_offset: int) -> int:
            raise StorageError("no", errno=5, operation="pwrite", path="")

    broken = Broken()
    broken.mkdir("/d")
    with pytest.raises(StorageError, match="no"):
        measure_rate(broken, "/d", ManualClock(), 1 << 20)
    assert broken.listdir("/d") == []
