"""parckpt convert, merge, split, copy: what is there afterwards, what is refused, and how DST is understood."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.cli.rewriting import destination
from parckpt.engine.foreign import load_all
from parckpt.engine.source import open_source
from parckpt.errors import ConfigError
from parckpt.storage.filesystem import PosixFileSystem

STEP = "one-2_1"  # step 4 of 3 an epoch


def loaded(path: Path) -> dict[str, Any]:
    return parckpt.load_checkpoint(path, allow_unverified=True)


def of_rank(path: Path) -> dict[str, Any]:
    return load_all(PosixFileSystem(), str(path), None, lambda name: True)


def assert_same(a: Path, b: Path, load: Callable[[Path], dict[str, Any]] = loaded) -> None:
    left, right = load(a), load(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(right[name]), err_msg=name)
        assert np.asarray(value).dtype == np.asarray(right[name]).dtype


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_convert_and_back(call: Any, published: Path, tmp_path: Path) -> None:
    src, dst = published / f"{STEP}.ckpt", tmp_path / "out" / "x.safetensors"
    done = call("convert", src, dst, "--crc", "--json")
    assert done.status == 0
    assert done.json.pop("seconds") >= 0
    assert done.json == {
        **{"source": str(src), "path": str(dst), "step": 4, "format": "safetensors", "integrated": True, "files": 1},
        **{"nbytes": dst.stat().st_size, "tensor_count": 5, "verified": True, "pinned": False},
        **{"seconds": done.json["seconds"]},
    }
    assert_same(src, dst)
    assert parckpt.load_checkpoint(dst, crc_check=True).keys() == loaded(src).keys()
    assert call("convert", dst, tmp_path / "back", "--format", "ckpt").status == 0
    assert_same(src, tmp_path / "back.ckpt")
    # MindSpore writes appended values in the order of its dictionary, and so did the run.
    assert (tmp_path / "back.ckpt").read_bytes() == src.read_bytes()


def test_files_of_ranks_merged_and_split(call: Any, published: Path, tmp_path: Path) -> None:
    src = published / "ranks-2_1"
    assert call("merge", src, tmp_path / "merged.ckpt").status == 0
    assert_same(src, tmp_path / "merged.ckpt")
    text = call("split", tmp_path / "merged.ckpt", tmp_path / "three", "--ranks", 3, "--format", "safetensors").out
    assert text.startswith(f"{tmp_path / 'three'}: 5 tensors, 9.6")
    assert text.endswith(" MB in 3 safetensors files\n")
    assert visible(tmp_path / "three") == ["manifest", "rank_0", "rank_1", "rank_2"]
    assert_same(src, tmp_path / "three")
    assert call("verify", tmp_path / "three").status == 0
    assert call("ls", tmp_path).out.count(" ok\n") == 2
    # As many files as before, in the other format, with what every rank held.
    assert call("convert", src, tmp_path / "same", "--format", "safetensors").status == 0
    assert_same(src, tmp_path / "same")
    for rank in range(2):
        names = {name.partition("@")[0] for name in of_rank(src / f"rank_{rank}" / "ranks-2_1.ckpt")}
        assert {name.partition("@")[0] for name in of_rank(tmp_path / f"same/rank_{rank}/same.safetensors")} == names


def test_split_by_layout(call: Any, published: Path, tmp_path: Path) -> None:
    layout = {"mesh_shape": [2, 2], "mesh_axes": ["dp", "tp"], "tensors": {"model.*": {"tensor_map": ["tp"]}}}
    (tmp_path / "cut.json").write_text(json.dumps(layout))
    src, dst = published / f"{STEP}.ckpt", tmp_path / "cut"
    assert call("split", src, dst, "--layout", tmp_path / "cut.json").status == 0
    assert_same(src, dst)
    whole = loaded(src)["model.w"]
    for rank in range(4):
        held = of_rank(dst / f"rank_{rank}/cut.ckpt")
        np.testing.assert_array_equal(held["model.w"], whole[3 * (rank % 2) :][:3])
        assert held["count"] == 7
    done = call("split", src, tmp_path / "once", "--layout", tmp_path / "cut.json", "--remove-redundancy", "--json")
    assert done.json["nbytes"] < sum(f.stat().st_size for f in dst.glob("rank_*/*")) * 0.6
    assert_same(src, tmp_path / "once")
    for tensors, said in (
        ({"modle.*": {"tensor_map": ["tp"]}}, "'modle.*' fits no tensor"),
        ({"model.w": {"tensor_map": ["pp"]}}, "no mesh axis 'pp'"),
        ({"model.w": ["tp"]}, "expected an object"),
    ):
        (tmp_path / "cut.json").write_text(json.dumps({**layout, "tensors": tensors}))
        refused = call("split", src, tmp_path / "no", "--layout", tmp_path / "cut.json")
        assert (refused.status, said in refused.err) == (3, True), refused.err
    assert not (tmp_path / "no").exists()


def test_rank_files_of_mindspore(call: Any, golden: Path, tmp_path: Path) -> None:
    strategies = golden / "strategy"
    four, two = strategies / "strategy_4dev.ckpt", strategies / "strategy_2dev.ckpt"
    for src in ("src_ckpt", "src_safetensors"):
        refused = call("merge", strategies / src, tmp_path / f"{src}.ckpt")
        assert (refused.status, "say how with --strategy" in refused.err) == (8, True)
        done = call("merge", strategies / src, tmp_path / f"{src}.ckpt", "--strategy", four)
        assert done.status == 0
        assert "has no checksums: damage in it would not have been noticed" in done.out
        assert_same(tmp_path / f"{src}.ckpt", strategies / "to1/rank_0/out0.ckpt")
    split = ("split", strategies / "src_ckpt", tmp_path / "two", "--source-strategy", four, "--strategy", two)
    assert call(*split).status == 0
    for rank in range(2):
        made, theirs = tmp_path / f"two/rank_{rank}/two.ckpt", strategies / f"to2/rank_{rank}/out{rank}.ckpt"
        assert_same(made, theirs, of_rank)
    assert made.read_bytes() == theirs.read_bytes()
    assert call("copy", strategies / "src_ckpt", tmp_path / "backup").status == 0
    copied = tmp_path / "backup/src_ckpt/rank_3/net-1_2.ckpt"
    assert copied.read_bytes() == (strategies / "src_ckpt/rank_3/net-1_2.ckpt").read_bytes()


def test_pipeline_stages(call: Any, tmp_path: Path) -> None:
    arrays = {"a.w": np.arange(32.0).reshape(8, 4), "b.w": np.arange(24.0).reshape(4, 6), "b.n": np.ones(6)}
    parckpt.save_checkpoint(arrays, tmp_path / "whole")
    cuts = {"0-a.w": (0, -1), "1-b.w": (-1, 0), "1-b.n": (-1,)}
    strategy = parckpt.Strategy({name: parckpt.TensorStrategy((2,), cut) for name, cut in cuts.items()})
    parckpt.save_strategy(strategy, tmp_path / "stages.ckpt")
    assert call("split", tmp_path / "whole.ckpt", tmp_path / "four", "--strategy", tmp_path / "stages.ckpt").status == 0
    held = [sorted(of_rank(tmp_path / f"four/rank_{rank}/four.ckpt")) for rank in range(4)]
    assert held == [["a.w"], ["a.w"], ["b.n", "b.w"], ["b.n", "b.w"]]
    (tmp_path / "four" / "manifest").unlink()  # as MindSpore would have left it
    merge = ("merge", tmp_path / "four", tmp_path / "merged.ckpt")
    refused = call(*merge)
    assert (refused.status, "say how with --strategy" in refused.err) == (8, True)
    assert call(*merge, "--strategy", tmp_path / "stages.ckpt").status == 0
    assert_same(tmp_path / "whole.ckpt", tmp_path / "merged.ckpt")


def test_copy(call: Any, published: Path, tmp_path: Path) -> None:
    for name in (f"{STEP}.ckpt", "ranks-2_1", "owners-2_1", "single.ckpt"):
        done = call("copy", published / name, tmp_path / "new")
        assert (done.status, str(tmp_path / "new" / name) in done.out) == (0, True), done.err
        assert_same(published / name, tmp_path / "new" / name)
    assert call("verify", tmp_path / "new").status == 0
    with parckpt.ModelCheckpoint("one", tmp_path / "new", comm=parckpt.SELF) as run:
        assert run.restore(strict=False).step == 4


@pytest.mark.parametrize("command", ["convert", "merge", "copy"])
def test_damage_is_named_and_nothing_is_made(call: Any, published: Path, tmp_path: Path, command: str) -> None:
    data = published / "ranks-2_1/rank_0/ranks-2_1.ckpt"
    content = bytearray(data.read_bytes())
    content[5_000_000] ^= 1
    data.write_bytes(content)
    new = tmp_path / "new"
    done = call(command, published / "ranks-2_1", f"{new}/")
    assert done.status == 5
    assert f"{data}: chunk 1" in done.err
    assert "'model.big'" in done.err
    assert visible(new) == []


def test_what_is_refused(call: Any, published: Path, tmp_path: Path) -> None:
    src = published / f"{STEP}.ckpt"
    for words, status, said in (
        (("convert", src, src), 11, "is what is being read"),
        (("convert", src, published / "one-2_2.ckpt"), 11, "not the same step of the same run"),
        (("convert", src, tmp_path / "x", "--per-rank"), 3, "SRC is one file: say with --ranks"),
        (("convert", src, tmp_path / "x", "--ranks", 2, "--integrated"), 3, "leave one of them out"),
        (("convert", src, tmp_path / "x.ckpt", "--format", "safetensors"), 3, "says ckpt, --format says safetensors"),
        (("convert", src, tmp_path / "x", "--format", "h5"), 3, "ckpt or safetensors, not 'h5'"),
        (("split", src, tmp_path / "x.ckpt", "--ranks", 2), 3, "leave .ckpt out"),
        (("split", src, tmp_path / "x"), 3, "say how to cut"),
        (("split", src, tmp_path / ".x", "--ranks", 2), 3, "choose another name"),
        (("merge", src, tmp_path / "x.ckpt", "--strategy", tmp_path / "none"), 3, "none"),
        (("merge", published, tmp_path / "x.ckpt"), 4, "is not a checkpoint itself"),
        (("merge", tmp_path / "none", tmp_path / "x.ckpt"), 4, "there is no checkpoint"),
        (("copy", src, published), 11, "is what is being read"),
    ):
        before = visible(published)
        done = call(*words)
        assert (done.status, said in done.err) == (status, True), (words, done.err)
        assert visible(published) == before
    assert visible(tmp_path) == ["ckpts"]


def test_a_place_within_a_checkpoint_is_refused(call: Any, published: Path, golden: Path, tmp_path: Path) -> None:
    step, foreign = published / "many-1_1", tmp_path / "ms"
    assert call("split", published / f"{STEP}.ckpt", step, "--ranks", 2).status == 0
    shutil.copytree(golden / "dist2" / "ckpt_full", foreign)
    link = tmp_path / "link"
    link.symlink_to(step)
    before = {path for place in (published, foreign) for path in place.rglob("*")}
    for words, said in (
        (("convert", step, step / "x.ckpt"), "lies within the checkpoint"),
        (("convert", published / f"{STEP}.ckpt", link / "new" / "x.ckpt"), "lies within the checkpoint"),
        (("copy", published / f"{STEP}.ckpt", step / "rank_0"), "lies within the checkpoint"),
        (("merge", foreign, foreign / "rank_1" / "x.ckpt"), "lies among the files that are being read"),
    ):
        done = call(*words)
        assert (done.status, said in done.err) == (3, True), (words, done.err)
        assert {path for place in (published, foreign) for path in place.rglob("*")} == before
    assert call("merge", foreign, foreign / "x.ckpt").status == 0


def test_where_dst_is(published: Path, tmp_path: Path) -> None:
    source = open_source(PosixFileSystem(), str(published / f"{STEP}.ckpt"))
    (tmp_path / "place").mkdir()
    (tmp_path / "theirs" / "rank_0").mkdir(parents=True)
    shutil.copytree(published / "ranks-2_1", tmp_path / "step")
    for dst, integrated, expected in (
        ("x.safetensors", True, (tmp_path, "x", "safetensors")),
        ("x", True, (tmp_path, "x", "ckpt")),
        ("x.y", True, (tmp_path, "x.y", "ckpt")),
        ("x", False, (tmp_path, "x", "ckpt")),
        ("place", True, (tmp_path / "place", STEP, "ckpt")),
        ("place", False, (tmp_path / "place", STEP, "ckpt")),
        ("new/", False, (tmp_path / "new", STEP, "ckpt")),
        ("step", False, (tmp_path, "step", "ckpt")),
        ("theirs", False, (tmp_path, "theirs", "ckpt")),
        ("theirs", True, (tmp_path / "theirs", STEP, "ckpt")),
    ):
        named = destination(source, f"{tmp_path}/{dst}", None, integrated=integrated)
        assert (Path(named.directory), named.stem, named.form.name) == expected, dst
    with pytest.raises(ConfigError, match="no checkpoint can"):
        destination(source, f"{tmp_path}/rank_0", None, integrated=False)


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    nbytes = 640 << 20  # more than three times what may be used
    header = {"big": {"dtype": "F32", "shape": [10, nbytes // 40], "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + nbytes)  # without blocks on disk
    command = [sys.executable, str(Path(__file__).parent / "programs" / "converting.py")]
    command += ["convert", str(tmp_path / "big.safetensors"), str(tmp_path / "big.ckpt")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        made = (tmp_path / "big.ckpt").stat().st_size
    finally:
        (tmp_path / "big.ckpt").unlink(missing_ok=True)
    assert made > nbytes
    assert int(done.stdout.rpartition("grew ")[2]) < 200 << 20
