"""Transform functions beyond the recordings: refusals, damage, our own checkpoints, several ranks, networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt import Layout, Shard, Strategy, TensorStrategy
from parckpt.errors import (
    CheckpointExistsError,
    ChecksumError,
    ConfigError,
    ConfigTypeError,
    FormatError,
    IntegrityError,
    LayoutError,
    StateMismatchError,
    StateWarning,
)
from parckpt.testing.foreign import piece_of, put, tree
from parckpt.testing.world import run_world

FULL = {
    "w": np.arange(64, dtype=np.float32).reshape(8, 8),
    "v": np.arange(100, 132, dtype=np.int32).reshape(4, 8),
    "b": np.arange(8, dtype=np.float16),
}
FOUR = {"w": TensorStrategy((2, 2), (1, 0)), "v": TensorStrategy((4,), (0, -1)), "b": TensorStrategy((4,), (-1,))}
TWO = {"w": TensorStrategy((2,), (-1, 0)), "v": TensorStrategy((2,), (-1, 0)), "b": TensorStrategy((2,), (0,))}


def held(cuts: dict[str, TensorStrategy], rank: int, **more: Any) -> dict[str, Any]:
    return {name: piece_of(array, cuts[name].layout(), rank) for name, array in FULL.items()} | more


def write(
    root: Path, cuts: dict[str, TensorStrategy], form: str = "ckpt", name: str = "net-1_2", **options: Any
) -> Path:
    for rank in range(Strategy(cuts).nranks):
        put(root / f"rank_{rank}" / f"{name}.{form}", held(cuts, rank, lr=np.float32([0.5])), **options)
    return root


def contents(path: Path) -> dict[str, Any]:
    loaded = parckpt.load_checkpoint(str(path), allow_unverified=True)
    return {name: loaded[name] for name in sorted(loaded)}


def check(path: Path, cuts: dict[str, TensorStrategy] | None, rank: int = 0, **more: Any) -> None:
    expected = dict(FULL) if cuts is None else held(cuts, rank)
    found = contents(path)
    assert sorted(found) == sorted([*expected, *more])
    for name, array in {**expected, **more}.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == np.asarray(array).dtype


LR = {"lr": np.float32([0.5])}


class TestTransform:
    @pytest.mark.parametrize("output", ["ckpt", "safetensors"])
    @pytest.mark.parametrize("form", ["ckpt", "safetensors"])
    def test_any_format_to_any(self, form: str, output: str, tmp_path: Path) -> None:
        write(tmp_path / "a", FOUR, form)
        parckpt.transform_checkpoints(
            str(tmp_path / "a"), str(tmp_path / "b"), "p", FOUR, TWO, process_num=7, output_format=output
        )
        for rank in (0, 1):
            check(tmp_path / "b" / f"rank_{rank}" / f"p{rank}.{output}", TWO, rank, **LR)

    def test_numbers_of_ranks_that_do_not_divide_each_other(self, tmp_path: Path) -> None:
        """MindSpore refuses them."""
        array = np.arange(24).reshape(12, 2)
        four, six = TensorStrategy((4,), (0, -1)), TensorStrategy((2, 3), (0, 1))
        for rank in range(4):
            put(tmp_path / "a" / f"rank_{rank}" / "n.ckpt", {"w": piece_of(array, four.layout(), rank)})
        parckpt.transform_checkpoints(str(tmp_path / "a"), str(tmp_path / "b"), "p", {"w": four}, {"w": six})
        for rank in range(6):
            found = contents(tmp_path / "b" / f"rank_{rank}" / f"p{rank}.ckpt")
            np.testing.assert_array_equal(found["w"], piece_of(array, six.layout(), rank))

    def test_ranks_share_the_files(self, tmp_path: Path) -> None:
        write(tmp_path / "a", TWO)
        run_world(
            3,
            lambda comm, rank: parckpt.transform_checkpoints(
                str(tmp_path / "a"), str(tmp_path / "b"), "p", TWO, FOUR, comm=comm
            ),
        )
        for rank in range(4):
            check(tmp_path / "b" / f"rank_{rank}" / f"p{rank}.ckpt", FOUR, rank, **LR)

    def test_an_error_of_root_is_all_ranks(self, tmp_path: Path) -> None:
        def call(comm: Any, rank: int) -> str:
            with pytest.raises(ConfigError) as caught:
                parckpt.transform_checkpoints(str(tmp_path / "none"), str(tmp_path / "b"), "p", TWO, comm=comm)
            return caught.value.message

        said = run_world(2, call)
        assert all("no rank_<n> directories" in message for message in said)

    def test_ranks_that_want_different_things(self, tmp_path: Path) -> None:
        def call(comm: Any, rank: int) -> None:
            with pytest.raises(ConfigError, match="ckpt_prefix must be the same"):
                parckpt.transform_checkpoints(str(tmp_path), str(tmp_path / "b"), f"p{rank}", comm=comm)

        run_world(2, call)

    def test_our_own_checkpoint_needs_no_source_strategy(self, tmp_path: Path) -> None:
        """Its manifest knows the boxes, and every chunk is verified."""

        def save(comm: Any, rank: int) -> None:
            state = {name: FOUR[name].layout().shard(held(FOUR, rank)[name], FULL[name].shape, rank) for name in FULL}
            config = parckpt.CheckpointConfig(integrated_save=False)
            with parckpt.ModelCheckpoint("m", str(tmp_path), config, comm=comm) as ckpt:
                ckpt.step_end(state, 1)

        run_world(4, save)
        parckpt.transform_checkpoints(str(tmp_path / "m-1_1"), str(tmp_path / "b"), "p", None, TWO)
        for rank in (0, 1):
            found = contents(tmp_path / "b" / f"rank_{rank}" / f"p{rank}.ckpt")
            for name in FULL:
                np.testing.assert_array_equal(found[name], held(TWO, rank)[name])
        victim = tmp_path / "m-1_1" / "rank_2" / "m-1_1.ckpt"
        victim.chmod(0o600)
        victim.write_bytes(victim.read_bytes()[:-1] + b"\x7f")
        with pytest.raises(ChecksumError, match="rank_2"):
            parckpt.transform_checkpoints(str(tmp_path / "m-1_1"), str(tmp_path / "c"), "p", None, TWO)

    def test_de_duplicated_files(self, tmp_path: Path) -> None:
        """MindSpore cannot convert them."""
        for rank in range(4):
            own = {name: array for name, array in held(FOUR, rank).items() if name != "b" or rank == 2}
            put(tmp_path / "a" / f"rank_{rank}" / "n.safetensors", own, remove_redundancy="True")
        parckpt.transform_checkpoints(str(tmp_path / "a"), str(tmp_path / "b"), "p", FOUR, TWO)
        for rank in (0, 1):
            check(tmp_path / "b" / f"rank_{rank}" / f"p{rank}.ckpt", TWO, rank)

    def test_a_missing_rank_and_differing_replicas_are_named(self, tmp_path: Path) -> None:
        write(tmp_path / "a", FOUR)
        path = tmp_path / "a" / "rank_3" / "net-1_2.ckpt"
        put(path, held(FOUR, 3) | {"b": FULL["b"] + 1})
        arguments = (str(tmp_path / "a"), str(tmp_path / "b"), "p", FOUR, TWO)
        with pytest.raises(LayoutError, match=r"'b' differs between rank_0/net-1_2.ckpt and rank_3/net-1_2.ckpt"):
            parckpt.transform_checkpoints(*arguments)
        path.unlink()
        with pytest.raises(LayoutError, match=r"files of ranks \[3\] are missing"):
            parckpt.transform_checkpoints(*arguments)
        assert not (tmp_path / "b").exists()

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        write(tmp_path / "a", FOUR, crc=True)
        path = tmp_path / "a" / "rank_1" / "net-1_2.ckpt"
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        path.write_bytes(data)
        with pytest.raises((ChecksumError, FormatError), match=r"rank_1/net-1_2\.ckpt"):
            parckpt.transform_checkpoints(str(tmp_path / "a"), str(tmp_path / "b"), "p", FOUR, TWO)
        assert not (tmp_path / "b").exists()

    def test_values_that_belong_to_ranks_stay_with_their_ranks(self, tmp_path: Path) -> None:
        for rank in range(4):
            own = {"seed": np.array(rank), "note": f"of {rank}", "step_num": np.array(5)}
            put(tmp_path / "a" / f"rank_{rank}" / "n.ckpt", held(FOUR, rank, **own))
        parckpt.transform_checkpoints(str(tmp_path / "a"), str(tmp_path / "b"), "p", FOUR, FOUR)
        for rank in range(4):
            found = contents(tmp_path / "b" / f"rank_{rank}" / f"p{rank}.ckpt")
            assert (int(found["seed"]), found["note"], int(found["step_num"])) == (rank, f"of {rank}", 5)

    def test_files_of_published_checkpoints_are_not_replaced(self, tmp_path: Path) -> None:
        write(tmp_path / "a", TWO)
        parckpt.save_checkpoint(FULL, str(tmp_path / "b.ckpt"))
        with pytest.raises(CheckpointExistsError):
            parckpt.transform_checkpoint_by_rank(0, files_of(tmp_path / "a", 2), str(tmp_path / "b.ckpt"), TWO)

    @pytest.mark.parametrize(
        ("changed", "kind", "message"),
        [
            ({"src_checkpoints_dir": 5}, ConfigTypeError, "src_checkpoints_dir must be a str"),
            ({"dst_checkpoints_dir": None}, ConfigTypeError, "dst_checkpoints_dir must be a str"),
            ({"dst_checkpoints_dir": " "}, ConfigError, "must not be blank"),
            ({"dst_checkpoints_dir": "x/../y"}, ConfigError, r"must not contain '\.\.'"),
            ({"dst_checkpoints_dir": "x//y"}, ConfigError, "must not contain '//'"),
            ({"dst_checkpoints_dir": "~/y"}, ConfigError, "must not contain '~'"),
            ({"dst_checkpoints_dir": "a/rank_0/net-1_2.ckpt"}, ConfigError, "is a file"),
            ({"ckpt_prefix": 5}, ConfigTypeError, "ckpt_prefix must be a str"),
            ({"ckpt_prefix": "../p"}, ConfigError, "ckpt_prefix must not contain"),
            ({"ckpt_prefix": "a/p"}, ConfigError, "ckpt_prefix must not contain '/'"),
            ({"src_strategy_file": 5}, ConfigTypeError, "src_strategy_file must be"),
            ({"src_strategy_file": "none.ckpt"}, ConfigError, "there is no strategy file none.ckpt"),
            ({"process_num": 0}, ConfigError, "process_num must be at least 1"),
            ({"process_num": "2"}, ConfigTypeError, "process_num must be an int"),
            ({"output_format": "hdf5"}, ConfigError, "output_format must be one of"),
            ({"file_mode": 0o100}, ConfigError, "file_mode"),
            ({"check": 1}, ConfigTypeError, "check must be a bool"),
            ({"src_strategy_file": {"w": TensorStrategy((2,), (0,))}}, LayoutError, "files of ranks"),
            ({"dst_strategy_file": {"b": TensorStrategy((3,), (0,))}}, LayoutError, "cannot be cut evenly"),
            ({"dst_strategy_file": {"b": TensorStrategy((16,), (0,))}}, LayoutError, "cannot be cut evenly"),
            ({"dst_strategy_file": {"w": TensorStrategy((2,), (-1, -1, 0))}}, LayoutError, "'w' does not fit"),
        ],
    )
    def test_refusals(
        self, changed: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "a", FOUR)
        given = {"src_checkpoints_dir": "a", "dst_checkpoints_dir": "b", "ckpt_prefix": "p", "src_strategy_file": FOUR}
        with pytest.raises(kind, match=message):
            parckpt.transform_checkpoints(**{**given, **changed})
        assert not Path("b").exists()


def files_of(root: Path, count: int) -> dict[int, str]:
    return {rank: str(root / f"rank_{rank}" / "net-1_2.ckpt") for rank in range(count)}


class TestByRank:
    def test_the_listed_files_are_enough(self, tmp_path: Path) -> None:
        cuts = {name: TensorStrategy((4,), (0,) + (-1,) * (array.ndim - 1)) for name, array in FULL.items()}
        target = {name: TensorStrategy((2,), (0,) + (-1,) * (array.ndim - 1)) for name, array in FULL.items()}
        target["w"] = TensorStrategy((2, 2), (1, -1))
        target["v"], target["b"] = TensorStrategy((2, 2), (1, -1)), TensorStrategy((2, 2), (1,))
        files = files_of(write(tmp_path / "a", cuts), 4)
        ranks = parckpt.rank_list_for_transform(3, cuts, target)
        assert ranks == [3, 2]
        path = tmp_path / "o.ckpt"
        parckpt.transform_checkpoint_by_rank(3, {rank: files[rank] for rank in ranks}, str(path), cuts, target)
        check(path, target, 3, **LR)
        with pytest.raises(ConfigError, match=r"files of ranks \[2\] are needed for rank 3"):
            parckpt.transform_checkpoint_by_rank(3, {3: files[3]}, str(path), cuts, target)

    def test_without_a_source_strategy(self, tmp_path: Path) -> None:
        put(tmp_path / "a.ckpt", FULL)
        parckpt.transform_checkpoint_by_rank(1, {0: str(tmp_path / "a.ckpt")}, str(tmp_path / "o.ckpt"), None, TWO)
        check(tmp_path / "o.ckpt", TWO, 1)

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ((0, ["a"], "o.ckpt"), ConfigTypeError, "checkpoint_files_map must be a dict"),
            (("0", {0: "a"}, "o.ckpt"), ConfigTypeError, "rank_id must be an int"),
            ((0, {0: "a"}, 5), ConfigTypeError, "save_checkpoint_file_name must be a str"),
            ((0, {0: "a"}, "o.txt"), ConfigError, "must end with .ckpt"),
            ((0, {0: "a"}, "o.ckpt"), ConfigError, "file a of rank 0 does not exist"),
            ((0, {}, "o.ckpt"), ConfigError, "is empty"),
            ((0, {0: "here.ckpt"}, "o.ckpt", 5), ConfigTypeError, "src_strategy_file"),
            ((9, {0: "here.ckpt"}, "o.ckpt", None, TWO), LayoutError, "no rank 9"),
        ],
    )
    def test_refusals(
        self, arguments: Any, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        put(tmp_path / "here.ckpt", FULL)
        with pytest.raises(kind, match=message):
            parckpt.transform_checkpoint_by_rank(*arguments)


class TestUnified:
    def test_parts_of_a_size_and_shares(self, tmp_path: Path) -> None:
        write(tmp_path / "a", FOUR, "safetensors", crc=True)
        sizes = {"w": 256, "v": 128, "b": 16}
        whole = tmp_path / "whole"
        parckpt.unified_safetensors(str(tmp_path / "a"), FOUR, str(whole), part_nbytes=200)
        content = json.loads((whole / "param_name_map.json").read_text())
        assert content == {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {"w": "part0.safetensors", "v": "part1.safetensors", "b": "part1.safetensors"},
        }
        shared = tmp_path / "shared"
        for share in (1, 2):
            parckpt.unified_safetensors(
                str(tmp_path / "a"), FOUR, str(shared), part_nbytes=200, split_dst_file=(share, 2)
            )
            assert (shared / "part1.safetensors").exists() == (share == 2)
        run_world(
            2,
            lambda comm, rank: parckpt.unified_safetensors(
                str(tmp_path / "a"), FOUR, str(tmp_path / "world"), part_nbytes=200, comm=comm
            ),
        )
        assert tree(whole) == tree(shared) == tree(tmp_path / "world")
        # No stale checksum of a source file: MindSpore copies it along.
        assert all("crc_num" not in file["metadata"] for file in tree(whole).values())

    def test_ckpt_files_and_choices(self, tmp_path: Path) -> None:
        write(tmp_path / "a", FOUR)
        asked = []

        def choose(name: str) -> bool | str:
            asked.append(name)
            return {"w": "model.w", "v": False}.get(name, True)

        parckpt.unified_safetensors(str(tmp_path / "a"), FOUR, str(tmp_path / "b"), choice_func=choose)
        check_arrays(tmp_path / "b" / "part0.safetensors", {"model.w": FULL["w"], "b": FULL["b"]})
        check_arrays(tmp_path / "b" / "hyper_param.safetensors", LR)
        assert sorted(asked) == sorted(FULL)

    @pytest.mark.parametrize(
        ("changed", "kind", "message"),
        [
            ({"src_dir": "a/rank_0/net-1_2.ckpt"}, ConfigError, "is not a directory"),
            ({"src_dir": "none"}, ConfigError, "is not a directory"),
            ({"dst_dir": "a/rank_0/net-1_2.ckpt"}, ConfigError, "is a file"),
            ({"src_strategy_file": None}, ConfigError, "has to say how tensors are cut"),
            ({"src_strategy_file": "none"}, ConfigError, "no strategy file"),
            ({"merge_with_redundancy": 1}, ConfigTypeError, "merge_with_redundancy"),
            ({"file_suffix": 1}, ConfigTypeError, "file_suffix"),
            ({"file_suffix": "9_9"}, ConfigError, "ends with '9_9'"),
            ({"max_process_num": 0}, ConfigError, "max_process_num"),
            ({"choice_func": 5}, ConfigTypeError, "choice_func"),
            ({"choice_func": lambda name: None}, ConfigError, "must return a bool or a str"),
            ({"choice_func": lambda name: "x"}, ConfigError, "gives two tensors the name 'x'"),
            ({"choice_func": lambda name: False}, ConfigError, "no tensor is left"),
            ({"split_dst_file": 1}, ConfigTypeError, "split_dst_file"),
            ({"split_dst_file": (3, 2)}, ConfigError, "1 <= k <= n"),
            ({"part_nbytes": 0}, ConfigError, "part_nbytes"),
        ],
    )
    def test_refusals(
        self, changed: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "a", FOUR)
        with pytest.raises(kind, match=message):
            parckpt.unified_safetensors(**{"src_dir": "a", "src_strategy_file": FOUR, "dst_dir": "b", **changed})
        assert not list(Path().glob("b/*"))


def check_arrays(path: Path, expected: dict[str, Any]) -> None:
    found = contents(path)
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


class TestDistributed:
    def network(self, cuts: dict[str, TensorStrategy] | None, rank: int) -> dict[str, Any]:
        shapes = FULL if cuts is None else held(cuts, rank)
        return {name: np.full_like(array, -1) for name, array in shapes.items()}

    def test_ckpt_files_into_networks_of_other_ranks(self, tmp_path: Path) -> None:
        files = list(files_of(write(tmp_path / "a", FOUR), 4).values())

        def load(comm: Any, rank: int) -> None:
            net = self.network(TWO, rank)
            assert parckpt.load_distributed_checkpoint(net, files, TWO, FOUR, comm=comm) is True
            for name, array in held(TWO, rank).items():
                np.testing.assert_array_equal(net[name], array)

        run_world(2, load)

    def test_shards_get_their_boxes_without_a_predict_strategy(self, tmp_path: Path) -> None:
        files = list(files_of(write(tmp_path / "a", FOUR), 4).values())
        net = {"w": Shard(np.zeros((3, 2), np.float32), (8, 8), (4, 5)), "b": np.zeros(8, np.float16)}
        parckpt.load_distributed_checkpoint(net, files, None, FOUR)
        np.testing.assert_array_equal(net["w"].data, FULL["w"][4:7, 5:7])
        np.testing.assert_array_equal(net["b"], FULL["b"])

    def test_unified_files(self, tmp_path: Path) -> None:
        write(tmp_path / "a", FOUR, "safetensors")
        unified = str(tmp_path / "u")
        parckpt.unified_safetensors(str(tmp_path / "a"), FOUR, unified, part_nbytes=200)
        given = {"format": "safetensors", "unified_safetensors_dir": unified}
        net = self.network(TWO, 1)
        lists = parckpt.load_distributed_checkpoint(net, predict_strategy=TWO, rank_id=1, **given)
        assert lists == ([], ["lr"])
        for name, array in held(TWO, 1).items():
            np.testing.assert_array_equal(net[name], array)
        arrays = parckpt.load_distributed_checkpoint(None, return_param_dict=True, **given)
        assert sorted(arrays) == ["b", "lr", "v", "w"]
        np.testing.assert_array_equal(arrays["w"], FULL["w"])
        parckpt.load_distributed_checkpoint(
            None, predict_strategy=TWO, dst_safetensors_dir=str(tmp_path / "o"), output_format="ckpt", **given
        )
        for rank in (0, 1):
            check(tmp_path / "o" / f"rank_{rank}" / "net.ckpt", TWO, rank, **LR)

    def test_what_no_file_has_is_said(self, tmp_path: Path) -> None:
        put(tmp_path / "u" / "all.safetensors", FULL)
        cuts = {**TWO, "moment.w": TWO["w"]}
        with pytest.warns(StateWarning, match="no file has: moment.w"):
            parckpt.load_distributed_checkpoint(
                None,
                predict_strategy=cuts,
                format="safetensors",
                unified_safetensors_dir=str(tmp_path / "u"),
                dst_safetensors_dir=str(tmp_path / "o"),
                rank_id=0,
            )
        check(tmp_path / "o" / "rank_0" / "net.safetensors", TWO, 0)

    def test_shapes_that_do_not_fit(self, tmp_path: Path) -> None:
        files = list(files_of(write(tmp_path / "a", FOUR), 4).values())
        net = self.network(None, 0)
        with pytest.raises(StateMismatchError):
            parckpt.load_distributed_checkpoint(net, files, TWO, FOUR, rank_id=0)
        assert all(np.all(array == -1) for array in net.values())

    @pytest.mark.parametrize(
        ("content", "kind", "message"),
        [
            ("{", FormatError, "is no map of tensors"),
            ("[]", FormatError, "is no map of tensors"),
            ('{"weight_map": {"w": "../x.safetensors"}}', FormatError, "is no file beside it"),
            ('{"weight_map": {"w": "part1.safetensors"}}', ConfigError, "names part1.safetensors, which is not there"),
            ('{"weight_map": {"x": "part0.safetensors"}}', FormatError, "names 'x', but no file has it"),
        ],
    )
    def test_maps_that_lie(self, content: str, kind: type[Exception], message: str, tmp_path: Path) -> None:
        put(tmp_path / "part0.safetensors", FULL)
        (tmp_path / "param_name_map.json").write_text(content)
        with pytest.raises(kind, match=message):
            parckpt.load_distributed_checkpoint(
                None, format="safetensors", unified_safetensors_dir=str(tmp_path), return_param_dict=True
            )

    @pytest.mark.parametrize(
        ("given", "kind", "message"),
        [
            ({"format": "hdf5"}, ConfigError, "format must be one of"),
            ({"output_format": "hdf5"}, ConfigError, "output_format must be one of"),
            ({"format": "safetensors"}, ConfigError, "unified_safetensors_dir must be given"),
            ({"format": "safetensors", "unified_safetensors_dir": "u", "dec_key": b"k" * 16}, ConfigError, "dec_key"),
            (
                {"format": "safetensors", "unified_safetensors_dir": "u", "strict_load": True},
                ConfigError,
                "strict_load",
            ),
            ({"format": "safetensors", "unified_safetensors_dir": "none"}, ConfigError, "is not a directory"),
            ({"format": "safetensors", "unified_safetensors_dir": "two"}, ConfigError, "no param_name_map.json"),
            ({"checkpoint_filenames": "a.ckpt"}, ConfigTypeError, "must be a list of str"),
            ({"checkpoint_filenames": []}, ConfigError, "is empty"),
            ({"checkpoint_filenames": ["none.ckpt"]}, ConfigError, r"checkpoint_filenames\[0\]"),
            ({"checkpoint_filenames": ["empty.ckpt"]}, ConfigError, r"checkpoint_filenames\[0\]"),
            (
                {"checkpoint_filenames": ["a.ckpt"], "train_strategy_filename": FOUR},
                ConfigError,
                "4 devices, but there",
            ),
            ({"checkpoint_filenames": ["a.ckpt"], "predict_strategy": 5}, ConfigTypeError, "predict_strategy"),
            ({"checkpoint_filenames": ["a.ckpt"], "network": None}, ConfigError, "nowhere to load to"),
            ({"checkpoint_filenames": ["a.ckpt"], "rank_id": "0"}, ConfigTypeError, "rank_id"),
            (
                {"checkpoint_filenames": ["a.ckpt"], "predict_strategy": TWO, "rank_id": 2},
                ConfigError,
                "there is no rank 2",
            ),
            ({"checkpoint_filenames": ["a.ckpt"], "name_map": [1]}, ConfigTypeError, "name_map"),
            ({"checkpoint_filenames": ["a.ckpt"], "return_param_dict": 1}, ConfigTypeError, "return_param_dict"),
        ],
    )
    def test_refusals(
        self, given: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        put(tmp_path / "a.ckpt", FULL)
        (tmp_path / "empty.ckpt").touch()
        for name in ("x", "y"):
            put(tmp_path / "two" / f"{name}.safetensors", FULL)
        with pytest.raises(kind, match=message):
            parckpt.load_distributed_checkpoint(**{"network": {"w": np.zeros((8, 8), np.float32)}, **given})

    def test_without_comm_a_launched_rank_does_not_guess_its_number(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("PMI_SIZE", "2")
        put(tmp_path / "a.ckpt", FULL)
        with pytest.raises(ConfigError, match="pass comm or rank_id"):
            parckpt.load_distributed_checkpoint({}, [str(tmp_path / "a.ckpt")], TWO)


class TestFormats:
    def test_there_and_back(self, tmp_path: Path) -> None:
        entries = {**FULL, "epoch_num": np.array(3, np.int32), "one": np.float64([2.5])}
        put(tmp_path / "a.ckpt", dict(sorted(entries.items())))
        parckpt.ckpt_to_safetensors(str(tmp_path / "a.ckpt"), str(tmp_path / "st"))
        parckpt.safetensors_to_ckpt(str(tmp_path / "st" / "a.safetensors"))
        assert (tmp_path / "st" / "a.ckpt").read_bytes() == (tmp_path / "a.ckpt").read_bytes()

    def test_directories_names_and_ranks(self, tmp_path: Path) -> None:
        for rank in range(3):
            for name in ("x-1_1", "x-1_2", "y-1_1"):
                put(tmp_path / f"rank{rank}" / f"{name}.ckpt", {"w": np.array([rank])})
        run_world(
            2,
            lambda comm, rank: parckpt.ckpt_to_safetensors(
                str(tmp_path), str(tmp_path / "out"), {"w": "new"}, r"^x", 4, comm=comm
            ),
        )
        made = tree(tmp_path / "out")
        assert sorted(made) == sorted(f"rank{r}/{n}.safetensors" for r in range(3) for n in ("x-1_1", "x-1_2"))
        assert contents(tmp_path / "out" / "rank2" / "x-1_2.safetensors")["new"].tolist() == [2]

    def test_damage_is_found_by_the_crc_and_by_our_manifest(self, tmp_path: Path) -> None:
        put(tmp_path / "a.ckpt", FULL, crc=True)
        parckpt.save_checkpoint(FULL, str(tmp_path / "b.ckpt"))
        for name in ("a.ckpt", "b.ckpt"):
            path = tmp_path / name
            path.chmod(0o600)
            data = bytearray(path.read_bytes())
            data[60] ^= 1  # inside the first tensor
            path.write_bytes(data)
            with pytest.raises(IntegrityError, match=name):
                parckpt.ckpt_to_safetensors(str(path))
        assert not list(tmp_path.glob("*.safetensors"))

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ((5,), ConfigTypeError, "file_path must be a str"),
            (("none",), ConfigError, "does not exist"),
            (("a.safetensors",), ConfigError, "must end with .ckpt"),
            (("empty",), ConfigError, "begin with 'rank'"),
            (("a.ckpt", "x.d"), ConfigError, "save_path must be a directory"),
            (("a.ckpt", None, [1]), ConfigTypeError, "name_map"),
            (("a.ckpt", None, {"w": "b"}), ConfigError, "'b'"),
            (("a.ckpt", None, None, "zz"), ConfigError, "does not match"),
            (("a.ckpt", None, None, "("), ConfigError, "no regular expression"),
            (("a.ckpt", None, None, None, 0), ConfigError, "processes_num"),
            (("text.ckpt",), ConfigError, "note"),
            (("junk.ckpt",), FormatError, "junk.ckpt"),
        ],
    )
    def test_refusals(
        self, arguments: Any, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        put(tmp_path / "a.ckpt", FULL)
        put(tmp_path / "a.safetensors", FULL)
        put(tmp_path / "text.ckpt", {"w": FULL["w"], "note": "a text"})
        (tmp_path / "junk.ckpt").write_bytes(b"\xff" * 50)
        (tmp_path / "empty").mkdir()
        before = sorted(tmp_path.iterdir())
        with pytest.raises(kind, match=message):
            parckpt.ckpt_to_safetensors(*arguments)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.filterwarnings("ignore::parckpt.StateWarning")
class TestSegments:
    def test_all_files_of_a_directory(self, tmp_path: Path) -> None:
        put(tmp_path / "p0_part0.ckpt", {"w": FULL["w"], "step_num": np.array(7)})
        put(tmp_path / "p0_part1.ckpt", {"b": FULL["b"], "step_num": np.array(7)})
        put(tmp_path / "other.safetensors", {"x": FULL["b"]})
        found = parckpt.load_segmented_checkpoints(str(tmp_path))
        assert sorted(found) == ["b", "step_num", "w"]
        assert sorted(parckpt.load_segmented_checkpoints(str(tmp_path), choice_func=lambda name: name != "x")) == [
            "b",
            "step_num",
            "w",
        ]
        net = {"w": np.zeros((8, 8), np.float32), "b": np.zeros(8, np.float16)}
        parckpt.load_segmented_checkpoints(str(tmp_path), net)
        np.testing.assert_array_equal(net["w"], FULL["w"])
        np.testing.assert_array_equal(net["b"], FULL["b"])

    def test_files_that_contradict_each_other(self, tmp_path: Path) -> None:
        put(tmp_path / "p0.ckpt", {"w": FULL["w"]})
        put(tmp_path / "p1.ckpt", {"w": FULL["w"] + 1})
        with pytest.raises(ConfigError, match=r"'w' differs between p0\.ckpt and p1\.ckpt"):
            parckpt.load_segmented_checkpoints(str(tmp_path))

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigTypeError, match="must be a str"):
            parckpt.load_segmented_checkpoints(5)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="is not a directory"):
            parckpt.load_segmented_checkpoints(str(tmp_path / "none"))
        with pytest.raises(ConfigError, match=r"no \.ckpt files"):
            parckpt.load_segmented_checkpoints(str(tmp_path))


def test_layouts_are_strategies_too(tmp_path: Path) -> None:
    """What users of JAX's words would write."""
    cuts = {"w": Layout((2, 2), ("x", "y"), ("x", "y"))}
    for rank in range(4):
        put(tmp_path / "a" / f"rank_{rank}" / "n.ckpt", {"w": piece_of(FULL["w"], cuts["w"], rank)})
    parckpt.transform_checkpoints(
        str(tmp_path / "a"), str(tmp_path / "b"), "p", cuts, {"w": Layout((2,), ("x",), (None, "x"))}
    )
    np.testing.assert_array_equal(contents(tmp_path / "b" / "rank_1" / "p1.ckpt")["w"], FULL["w"][:, 4:])
