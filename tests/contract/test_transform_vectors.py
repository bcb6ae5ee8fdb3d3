"""MindSpore's transform functions: the files that the real ones made of recorded inputs."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import parckpt
from parckpt.testing.foreign import put, tree

pytestmark = pytest.mark.filterwarnings("ignore::parckpt.StateWarning")

DATA = Path(__file__).parents[1] / "data"
CASES = {case["name"]: case for case in json.loads((DATA / "vectors/transform_vectors.json").read_text())["cases"]}

# Compared on their own below: here the two deliberately differ.
DIFFERENT = ("ckpt_lacking", "unify_accu", "unify_choice")


def array_of(dtype: str, shape: list[int], data: str) -> Any:
    stored = np.frombuffer(bytes.fromhex(data), "float32" if dtype == "bfloat16" else dtype).reshape(shape)
    return stored.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else stored


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set a case's inputs up, call its function, return what it returned and the files it made."""
    monkeypatch.chdir(tmp_path)

    def run(case: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        for name, data in case["strategies"].items():
            Path(name).write_bytes(bytes.fromhex(data))
        flags = case.get("save_kwargs", {})
        metadata = {"remove_redundancy": str(flags["remove_redundancy"])} if "remove_redundancy" in flags else {}
        for path, entries in case["sources"].items():
            put(Path(path), {name: array_of(*rest) for name, *rest in entries}, **metadata)
        given = dict(case["args"])
        if "choice" in given:
            answers = given.pop("choice")
            given["choice_func"] = lambda name: answers.get(name, True)
        if "checkpoint_files_map" in given:
            given["checkpoint_files_map"] = {int(k): v for k, v in given["checkpoint_files_map"].items()}
        result = getattr(parckpt, case["call"])(**given)
        return result, tree(Path("dst"))

    return run


def expected(case: dict[str, Any]) -> dict[str, Any]:
    """Recorded files. The content of transformed safetensors is that of the same case with ckpt files."""
    found = {path: dict(made) for path, made in case["outputs"].items() if "entries" in made}
    if case["name"].startswith("safetensors_"):
        twin = CASES["ckpt_" + case["name"].removeprefix("safetensors_")]["outputs"]
        for path, made in found.items():
            of_ckpt = twin[path.replace(".safetensors", ".ckpt")]["entries"]
            content = {name: digest for name, _, _, digest in of_ckpt}
            made["entries"] = [[name, kind, shape, content[name]] for name, kind, shape, _ in made["entries"]]
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name not in DIFFERENT])
def test_the_recorded_files(name: str, call: Any) -> None:
    case = CASES[name]
    returned, made = call(case)
    recorded = expected(case)
    assert returned == case["returned"]
    assert sorted(made) == sorted(recorded)
    for path, file in recorded.items():
        entries = [[entry, dtype.lower(), shape, digest] for entry, dtype, shape, digest in file["entries"]]
        if path.endswith(".ckpt"):
            assert made[path]["entries"] == entries
            assert made[path]["sha256"] == file["sha256"]
        else:
            assert sorted(made[path]["entries"]) == sorted(entries)
            assert made[path]["metadata"] == file["metadata"]
    for path, file in case["outputs"].items():
        if "json" in file:
            assert json.loads((Path("dst") / path).read_text()) == file["json"]


def test_a_tensor_that_one_strategy_does_not_name_is_not_cut_there(call: Any) -> None:
    """MindSpore puts some rank's slice under its name (b.w), or leaves whole what is to be cut (a.w, c.h)."""
    _, made = call(CASES["ckpt_lacking"])
    shapes = {path: {name: shape for name, _, shape, _ in file["entries"]} for path, file in made.items()}
    for rank in (0, 1):
        assert shapes[f"rank_{rank}/out{rank}.ckpt"] == {
            "a.b": [2],
            "b.o": [4, 4],
            "a.w": [4, 4],
            "b.w": [4, 8],
            "c.h": [2, 4],
        }


@pytest.mark.parametrize("name", ["unify_accu", "unify_choice"])
def test_what_is_left_out_of_the_parts_is_not_in_the_hyper_parameters(name: str, call: Any) -> None:
    """MindSpore puts rank 0's slice of it there, under the tensor's name."""
    case = CASES[name]
    _, made = call(case)
    assert [entry[0] for entry in made["hyper_param.safetensors"]["entries"]] == ["global_step"]
    recorded = expected(case)["part0.safetensors"]["entries"]
    assert sorted(e[3] for e in made["part0.safetensors"]["entries"]) == sorted(e[3] for e in recorded)


class TestGolden:
    """The corpus: the same bytes."""

    GOLDEN = DATA / "golden" / "strategy"

    @pytest.mark.parametrize(("directory", "target"), [("to2", "strategy_2dev.ckpt"), ("to1", None)])
    def test_transformed(self, directory: str, target: str | None, tmp_path: Path) -> None:
        strategies = [str(self.GOLDEN / "strategy_4dev.ckpt"), target and str(self.GOLDEN / target)]
        parckpt.transform_checkpoints(str(self.GOLDEN / "src_ckpt"), str(tmp_path / "out"), "out", *strategies)
        same_files(tmp_path / "out", self.GOLDEN / directory)

    def test_unified(self, tmp_path: Path) -> None:
        parckpt.unified_safetensors(
            str(self.GOLDEN / "src_safetensors"), str(self.GOLDEN / "strategy_4dev.ckpt"), str(tmp_path / "out")
        )
        assert tree(tmp_path / "out") == tree(self.GOLDEN / "unified")
        assert (tmp_path / "out" / "param_name_map.json").exists()

    def test_rank_lists(self) -> None:
        lists = json.loads((self.GOLDEN / "expected.json").read_text())["rank_list_for_transform"]
        files = {"4dev": str(self.GOLDEN / "strategy_4dev.ckpt"), "2dev": str(self.GOLDEN / "strategy_2dev.ckpt")}
        for words, by_rank in lists.items():
            before, after = (files.get(word) for word in words.split("_to_"))
            for rank, expected in by_rank.items():
                assert parckpt.rank_list_for_transform(int(rank), before, after) == expected


def same_files(found: Path, recorded: Path) -> None:
    names = sorted(str(path.relative_to(recorded)) for path in recorded.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()) == names
    for name in names:
        assert (found / name).read_bytes() == (recorded / name).read_bytes(), name


def test_signatures_begin_as_mindspores() -> None:
    """Positional arguments in MindSpore's order, with its defaults; ours follow by keyword."""
    wanted = {
        "rank_list_for_transform": ["rank_id", "src_strategy_file", "dst_strategy_file"],
        "transform_checkpoint_by_rank": [
            "rank_id",
            "checkpoint_files_map",
            "save_checkpoint_file_name",
            "src_strategy_file",
            "dst_strategy_file",
        ],
        "transform_checkpoints": [
            "src_checkpoints_dir",
            "dst_checkpoints_dir",
            "ckpt_prefix",
            "src_strategy_file",
            "dst_strategy_file",
            "process_num",
            "output_format",
        ],
        "unified_safetensors": [
            "src_dir",
            "src_strategy_file",
            "dst_dir",
            "merge_with_redundancy",
            "file_suffix",
            "max_process_num",
            "choice_func",
            "split_dst_file",
        ],
        "merge_sliced_parameter": ["sliced_parameters", "strategy"],
        "ckpt_to_safetensors": ["file_path", "save_path", "name_map", "file_name_regex", "processes_num"],
        "safetensors_to_ckpt": ["file_path", "save_path", "name_map", "file_name_regex", "processes_num"],
    }
    for name, parameters in wanted.items():
        found = inspect.signature(getattr(parckpt, name)).parameters.values()
        assert [p.name for p in found if p.kind is not p.KEYWORD_ONLY] == parameters


def test_the_inputs_are_what_mindspore_reads(tmp_path: Path) -> None:
    """The helper that makes inputs writes a file of the corpus byte for byte."""
    golden = TestGolden.GOLDEN / "src_ckpt" / "rank_0" / "net-1_2.ckpt"
    copy = tmp_path / "net-1_2.ckpt"
    shutil.copy(golden, copy)
    loaded = parckpt.load_checkpoint(str(copy), allow_unverified=True)
    assert put(tmp_path / "again.ckpt", loaded).read_bytes() == golden.read_bytes()
