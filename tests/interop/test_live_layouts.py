"""Random layouts and strategy files: what MindSpore's own functions make of them, and what parckpt does."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
import pytest
from mindspore.parallel import _parallel_serialization as serialization
from mindspore.parallel import checkpoint_transform
from mindspore.parallel._tensor import _load_tensor
from mindspore.train import _utils as theirs
from mindspore.train import node_strategy_pb2 as protobuf
from mindspore.train import serialization as files

import parckpt
from parckpt.core.redundancy import mindspore_groups, mindspore_owners, redundancy_map
from parckpt.core.strategy import Operator, Strategy, TensorStrategy, split_stage
from parckpt.formats import strategy as form

pytestmark = pytest.mark.filterwarnings("ignore:.*has no manifest")


def _mesh(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.choice([1, 2, 2, 2, 3, 4]) for _ in range(rng.randint(1, 4)))


def _map(rng: random.Random, mesh: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    axes = [*range(len(mesh)), *(-1 for _ in range(ndim))]
    rng.shuffle(axes)
    return tuple(axes[:ndim])


def _nested(rng: random.Random, mesh: tuple[int, ...]) -> tuple[int | tuple[int, ...], ...]:
    axes = list(range(len(mesh)))
    rng.shuffle(axes)
    cut = rng.randint(0, len(axes))
    groups = [tuple(axes[:cut]), tuple(axes[cut : cut + rng.randint(0, 2)])]
    return tuple(group if len(group) > 1 else group[0] if group else -1 for group in groups)


def _shards(rng: random.Random, layout: parckpt.Layout) -> tuple[int, int]:
    """A step and a size of optimizer sharding, or none."""
    sizes = [n for n in range(2, layout.holders + 1) if layout.holders % n == 0]
    if not sizes or rng.random() < 0.4:
        return 0, 0
    size = rng.choice([*sizes, layout.holders])
    return layout.holder_stride, -1 if size == layout.holders and rng.random() < 0.3 else size


def _plain(tensor: TensorStrategy) -> dict[str, Any]:
    """MindSpore's dict form of a layout."""
    return {
        "dev_matrix": list(tensor.dev_matrix),
        "tensor_map": [list(e) if isinstance(e, tuple) else e for e in tensor.tensor_map],
        "param_split_shape": list(tensor.param_split_shape),
        "indices_offset": list(tensor.indices_offset),
        "field": tensor.field,
        "opt_weight_shard_step": tensor.opt_weight_shard_step,
        "opt_weight_shard_size": tensor.opt_weight_shard_size,
    }


def test_strategy_files_are_read_and_written_as_by_mindspore(tmp_path: Path) -> None:
    rng = random.Random(1)
    for _ in range(200):
        tensors = {}
        for name in ("a.weight", "b", "größe")[: rng.randint(0, 3)]:
            mesh = _mesh(rng)
            entries = _nested(rng, mesh) if rng.random() < 0.3 else _map(rng, mesh, rng.randint(0, 4))
            numbers = [rng.choice([0, 0, 1, 5, 1 << 20]) for _ in range(2)]
            split = tuple(rng.randint(-3, 1 << 40) for _ in range(rng.choice([0, 0, 3])))
            tensors[name] = TensorStrategy(mesh, entries, split, split[::-1], *numbers, rng.choice([-1, 0, 8]))
        operators = tuple(Operator(f"op{k}", rng.randint(0, 9), ((1, k), ())) for k in range(rng.randint(0, 2)))
        ours = Strategy(tensors, rng.randint(0, 1 << 31), operators)
        data = form.encode(ours)
        message = protobuf.ParallelStrategyMap()
        message.ParseFromString(data)
        assert message.SerializeToString() == data
        assert form.decode(data, "x") == ours
        (tmp_path / "s.ckpt").write_bytes(data)
        found = serialization._build_searched_strategy(str(tmp_path / "s.ckpt"))
        listed = serialization._convert_to_list(found) if tensors else {}
        for name, tensor in tensors.items():
            nested = any(isinstance(entry, tuple) for entry in tensor.tensor_map)
            entries = [
                [e] if nested and isinstance(e, int) else list(e) if isinstance(e, tuple) else e
                for e in tensor.tensor_map
            ]
            assert listed[name][:6] == [
                list(tensor.dev_matrix),
                entries,
                list(tensor.param_split_shape),
                tensor.field,
                tensor.opt_weight_shard_step,
                tensor.opt_weight_shard_size,
            ]
        if not any(isinstance(entry, tuple) for tensor in tensors.values() for entry in tensor.tensor_map):
            parckpt.save_strategy(ours, tmp_path / "s.json")
            assert serialization._convert_to_list(serialization._build_searched_strategy(str(tmp_path / "s.json"))) == (
                listed if tensors else {}
            )
            assert {n: _plain(t) for n, t in tensors.items()} == json.loads((tmp_path / "s.json").read_text())[
                "parallel_layout_item"
            ]


def _as_lists(groups: Any) -> dict[str, list[list[int]]]:
    return {name: [list(group) for group in each] for name, each in groups.items()}


def test_redundancy_and_owners(tmp_path: Path) -> None:
    rng = random.Random(2)
    for _ in range(300):
        mesh, first = _mesh(rng), rng.choice([0, 0, 4])
        tensors: dict[str, TensorStrategy] = {}
        for number in range(rng.randint(1, 6)):
            entries = _map(rng, mesh, rng.randint(1, 3))
            size = rng.choice([0, 0, 2, 3, 4, -1])
            step = rng.choice([1, 2 if math.prod(mesh) > 1 else 1, math.prod(mesh)]) if size else 0
            tensors[f"p{rng.randint(0, 99)}.{number}"] = TensorStrategy(mesh, entries, (), (), 0, step, size)
        plain = {n: [list(t.dev_matrix), list(t.tensor_map), None, None, None, ""] for n, t in tensors.items()}
        layouts = {n: parckpt.Layout(mesh, None, t.tensor_map, first_rank=first) for n, t in tensors.items()}
        groups = theirs.get_parameter_redundancy(plain, first)
        assert _as_lists(redundancy_map(layouts)) == _as_lists(groups)
        assert list(redundancy_map(layouts)) == list(groups)
        parckpt.save_strategy(Strategy(tensors), tmp_path / "s.ckpt")
        groups = theirs.get_parameter_redundancy(str(tmp_path / "s.ckpt"), first)
        cut = {n: mindspore_groups(t.layout(first)) for n, t in tensors.items()}
        assert _as_lists(cut) == _as_lists(groups)
        for keep in (1, 2, 3):
            assert mindspore_owners(groups, keep) == theirs.remove_param_redundancy(groups, keep)


def test_slices() -> None:
    rng = random.Random(3)
    for _ in range(200):
        mesh = _mesh(rng)
        entries = _map(rng, mesh, rng.randint(1, 3))
        layout = parckpt.Layout(mesh, None, entries)
        shape = layout.global_shape([rng.randint(1, 3) for _ in entries])
        array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        for rank in range(layout.nranks):
            box = layout.box(shape, rank)
            ours = array[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))]
            np.testing.assert_array_equal(
                ours, _load_tensor(mindspore.Tensor(array), list(mesh), list(entries), rank_id=rank)
            )


def _write_ranks(root: Path, strategy: Strategy, arrays: dict[str, np.ndarray]) -> None:
    for rank in strategy.ranks:
        parts = []
        for name, array in arrays.items():
            for layout in strategy.layouts(name):
                if rank in layout.ranks:
                    box = layout.box(array.shape, rank)
                    piece = array[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))]
                    parts.append({"name": name, "data": mindspore.Tensor(np.ascontiguousarray(piece))})
        parts.append({"name": "global_step", "data": mindspore.Tensor(np.int32(7))})
        (root / f"rank_{rank}").mkdir(parents=True)
        mindspore.save_checkpoint(parts, str(root / f"rank_{rank}" / "net-1_1.ckpt"))


def _is_misplaced(mesh: tuple[int, ...], entries: tuple[Any, ...], layout: parckpt.Layout) -> bool:
    """Whether MindSpore's tools put slices that are cut again for the optimizer in wrong places.

    They do if mesh axes cut the dimensions in another order than they come in the mesh.
    """
    used = [entry for entry in entries if entry >= 0 and mesh[len(mesh) - 1 - entry] > 1]
    return layout.optimizer_parts > 1 and used != sorted(used, reverse=True)


def _drawn(rng: random.Random, mesh: tuple[int, ...]) -> tuple[TensorStrategy, np.ndarray] | None:
    """A tensor that MindSpore can put together, or nothing."""
    # A nested map of one dimension cannot be told from one of several dimensions in MindSpore's own files.
    entries = _nested(rng, mesh) if rng.random() < 0.3 else _map(rng, mesh, rng.randint(1, 3))
    flat = not any(isinstance(entry, tuple) for entry in entries)
    step, size = _shards(rng, parckpt.Layout(mesh, None, entries))
    layout = parckpt.Layout(mesh, None, entries, shard_step=step, shard_size=size)
    if flat and _is_misplaced(mesh, entries, layout):
        return None
    shape = layout.global_shape([rng.randint(1, 3) for _ in entries])
    return (
        TensorStrategy(mesh, entries, (), (), 0, step, size),
        rng.random() + np.arange(math.prod(shape), dtype=np.float32).reshape(shape),
    )


@pytest.mark.parametrize("stages", [1, 2])
def test_rank_files_are_put_together_as_by_transform_checkpoints(tmp_path: Path, stages: int) -> None:
    rng = random.Random(4)
    agreed = 0
    for case in range(30):
        mesh = _mesh(rng)
        if not 1 < math.prod(mesh) <= 8:
            continue
        tensors, arrays = {}, {}
        for number in range(3):
            stage = number % stages
            if drawn := _drawn(rng, mesh):
                name = f"p{number}"
                tensors[name if stages == 1 else f"{stage}-{name}"], arrays[name] = drawn
        strategy = Strategy(tensors, 1, (Operator("op", 0, ((1,),)),))
        if not tensors or strategy.nranks != math.prod(mesh) * stages or len({*map(split_stage, tensors)}) < stages:
            continue
        root = tmp_path / str(case)
        _write_ranks(root / "src", strategy, arrays)
        parckpt.save_strategy(strategy, root / "s.ckpt")
        ours = parckpt.load_checkpoint(root / "src", strategy=root / "s.ckpt", allow_unverified=True)
        assert {*ours} == {*arrays, "global_step"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=f"{tensors}")
        try:
            checkpoint_transform.transform_checkpoints(str(root / "src"), str(root / "dst"), "o", str(root / "s.ckpt"))
        except ValueError:  # it cannot deal with every size of optimizer shards
            continue
        merged = mindspore.load_checkpoint(str(root / "dst" / "rank_0" / "o0.ckpt"))
        for name, array in arrays.items():
            np.testing.assert_array_equal(merged[name].asnumpy(), array, err_msg=f"{tensors}")
        agreed += 1
    assert agreed > 10


def test_slices_that_mindspores_tools_misplace(tmp_path: Path) -> None:
    """If this fails, MindSpore has mended it: then the row in docs/compatibility.md goes."""
    mesh, entries = (2, 2, 2), (0, 1)
    strategy = Strategy({"w": TensorStrategy(mesh, entries, (), (), 0, 4, 2)}, 1, (Operator("op", 0, ((1,),)),))
    array = np.arange(8, dtype=np.float32).reshape(4, 2)
    _write_ranks(tmp_path / "src", strategy, {"w": array})
    parckpt.save_strategy(strategy, tmp_path / "s.ckpt")
    ours = parckpt.load_checkpoint(tmp_path / "src", strategy=strategy, allow_unverified=True)
    np.testing.assert_array_equal(ours["w"], array)
    checkpoint_transform.transform_checkpoints(
        str(tmp_path / "src"), str(tmp_path / "dst"), "o", str(tmp_path / "s.ckpt")
    )
    merged = mindspore.load_checkpoint(str(tmp_path / "dst" / "rank_0" / "o0.ckpt"))["w"].asnumpy()
    assert not np.array_equal(merged, array)
    assert np.array_equal(np.sort(merged, axis=None), np.sort(array, axis=None))


@pytest.mark.parametrize("end", ["ckpt", "json"])
def test_stages_are_merged_as_by_mindspore(tmp_path: Path, end: str) -> None:
    source = tmp_path / "stages"
    source.mkdir()
    for number in (2, 0, 1, 1):
        tensors = {f"p{number}.{k}": TensorStrategy((2, 2), (k - 1, -1), (), (), 0, 0, 0) for k in range(3)}
        one = Strategy(tensors, 1, (Operator(f"op{number}", number, ((1, 2),)),))
        parckpt.save_strategy(one, source / f"{len(list(source.iterdir()))}.{end}")
    checkpoint_transform.merge_pipeline_strategys(str(source), str(tmp_path / f"theirs.{end}"))
    parckpt.merge_pipeline_strategys(source, tmp_path / f"ours.{end}")
    theirs_, ours = (parckpt.load_strategy(tmp_path / f"{name}.{end}") for name in ("theirs", "ours"))
    assert dict(theirs_.tensors) == dict(ours.tensors)
    assert {*theirs_.operators} == {*ours.operators}
    assert theirs_.current_stage == ours.current_stage
    assert ours.nranks == 12


def test_the_rank_whose_file_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(6)
    for case in range(60):
        mesh = _mesh(rng)
        nranks = math.prod(mesh)
        tensors = {f"p{k}": TensorStrategy(mesh, _map(rng, mesh, 2)) for k in range(rng.randint(1, 3))}
        root = tmp_path / str(case)
        for rank in rng.sample(range(nranks), rng.randint(1, nranks)):
            (root / f"rank_{rank}").mkdir(parents=True)
            (root / f"rank_{rank}" / "x.ckpt").write_bytes(b"")
        parckpt.save_strategy(Strategy(tensors), root / "s.ckpt")
        for rank in range(nranks):
            monkeypatch.setattr(files, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(theirs, "get_rank", lambda rank=rank: rank)
            path = str(root / f"rank_{rank}" / "x.ckpt")
            found = files.get_ckpt_path_with_strategy(path, str(root / "s.ckpt"))
            ours = parckpt.get_ckpt_path_with_strategy(path, str(root / "s.ckpt"))
            if found is not None or ours is None:
                assert ours == found, (tensors, rank)
                continue
            # MindSpore gives up where the groups of two tensors cross.
            other = int(Path(ours).parent.name.removeprefix("rank_"))
            for layout in (tensor.layout() for tensor in tensors.values()):
                assert layout.box((48, 48), other) == layout.box((48, 48), rank)


def test_group_files(tmp_path: Path) -> None:
    group = protobuf.ParallelGroupMap()
    group.ckpt_restore_rank_list.dim.extend([4, 0, 1 << 20])
    (tmp_path / "group").write_bytes(group.SerializeToString())
    assert parckpt.restore_group_info_list(str(tmp_path / "group")) == [4, 0, 1 << 20]
    assert checkpoint_transform.restore_group_info_list(str(tmp_path / "group")) == [4, 0, 1 << 20]
