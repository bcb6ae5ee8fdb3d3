"""Strategy files: recorded ones, round trips, pipeline stages, and bytes that are none."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import parckpt
from parckpt.core.strategy import Operator, Strategy, TensorStrategy
from parckpt.errors import ConfigError, ConfigTypeError, FormatError, LayoutError, ParckptError
from parckpt.formats import strategy as form
from parckpt.storage.atomic import write_file
from parckpt.testing.filesystem import MemoryFileSystem

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "strategy"

MANY = Strategy(
    {
        "embed.table": TensorStrategy((2, 4), (-1, 0)),
        "both": TensorStrategy((2, 4), ((1, 0), -1)),
        "alone": TensorStrategy((2, 4), ((0, 1),)),
        "scalar": TensorStrategy((2, 4), ()),
        "uneven": TensorStrategy((2, 4), (0,), (3, 2, 2, 2), (0, -3, 5, 7), 0, 0, 0),
        "sharded": TensorStrategy((8,), (-1, -1), (), (), 0, 1, -1),
        "größe": TensorStrategy((8,), (0, -1), (), (), 3, 1, 8),
    },
    7,
    (Operator("Default/MatMul-op0", 0, ((2, 1), (1, 4))), Operator("none", 3, ())),
)


@pytest.mark.parametrize("name", ["strategy_2dev.ckpt", "strategy_4dev.ckpt"])
def test_recorded_files(name: str) -> None:
    data = (GOLDEN / name).read_bytes()
    strategy = parckpt.load_strategy(GOLDEN / name)
    expected = json.loads((GOLDEN / "expected.json").read_text())["layouts"][name]
    found = {
        key: [list(t.dev_matrix), list(t.tensor_map), t.opt_weight_shard_step, t.opt_weight_shard_size]
        for key, t in strategy.tensors.items()
    }
    assert found == expected
    assert strategy.operators == (Operator("node", 0, ((1, 1),)),)
    assert form.encode(strategy) == data


def test_round_trips() -> None:
    assert form.decode(form.encode(MANY), "x") == MANY
    assert form.decode_json(form.encode_json(MANY), "x.json") == MANY


@pytest.mark.parametrize("name", ["/s.ckpt", "/s.json"])
def test_files_are_replaced_as_a_whole(name: str) -> None:
    disk = MemoryFileSystem()
    write_file(disk, name, b"old")
    parckpt.save_strategy(MANY, name, filesystem=disk)
    assert disk.listdir("/") == [name[1:]]
    assert parckpt.load_strategy(name, filesystem=disk) == MANY


def test_packed_numbers_and_unknown_fields_are_read() -> None:
    packed = bytes.fromhex("0a0208021203 0a01002800 3000 38009a0100".replace(" ", ""))
    item = b"\x0a\x01w\x12" + bytes([len(packed)]) + packed
    data = b"\x08\x01\x1a" + bytes([len(item)]) + item
    assert form.decode(data, "x").tensors == {"w": TensorStrategy((2,), (0,))}


def test_what_is_no_strategy_is_refused() -> None:
    good = form.encode(MANY)
    mesh = form.encode(Strategy({"w": TensorStrategy((4, 0), (0,))}))
    for wrong in (TensorStrategy((4,), (-2,)), TensorStrategy((4,), (0,), (), (), 0, -1, 0)):
        with pytest.raises(FormatError, match=r"negative number"):
            form.decode(form.encode(Strategy({"w": wrong})), "x")
    for data in (b"\x00", b"\x1a\x00", good[2:], good[:-1], b"junk, not a message", mesh, b"\x08\x01\x1a\x02\x0a\x00"):
        with pytest.raises(FormatError, match=r"^x: byte \d+: "):
            form.decode(data, "x")


def test_no_bytes_raise_anything_else() -> None:
    rng = random.Random(1)
    good, text = form.encode(MANY), form.encode_json(MANY)
    for source, decode in ((good, form.decode), (text, form.decode_json)) * 300:
        data = bytearray(source[: rng.randrange(len(source) + 1)] if rng.random() < 0.3 else source)
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            found = decode(bytes(data), "x")
            for name in found.names:
                found.layouts(name)
        except (FormatError, LayoutError):
            pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dev_matrix": [2, 0]}, "positive"),
        ({"dev_matrix": 2}, "w: dev_matrix must be a list"),
        ({"dev_matrix": [True]}, "w: dev_matrix must be an integer"),
        ({"tensor_map": [-2]}, "w: tensor_map must be a list of numbers from -1"),
        ({"opt_weight_shard_step": -1}, "opt_weight_shard_size must be 0, -1 or more"),
        ({"tensor_map": [0.5]}, "w: tensor_map must be an integer"),
        ({"tensor_map": [[0, "1"]]}, "w: tensor_map must be an integer"),
        ({"field": None}, "w: field must be an integer"),
        ({"opt_weight_shard_size": 1 << 64}, "w: opt_weight_shard_size must be an integer"),
    ],
)
def test_wrong_json_is_refused(change: dict[str, object], said: str) -> None:
    content = json.loads(form.encode_json(Strategy({"w": TensorStrategy((2,), (0,))})))
    content["parallel_layout_item"]["w"] |= change
    with pytest.raises(FormatError, match=said):
        form.decode_json(json.dumps(content).encode(), "x.json")
    for data in (b"[]", b"{", b"\xff", b'{"parallel_layout_item": []}', b"[" * 100_000):
        with pytest.raises(FormatError):
            form.decode_json(data, "x.json")


def test_missing_and_empty_files() -> None:
    disk = MemoryFileSystem()
    write_file(disk, "/empty.ckpt", b"")
    with pytest.raises(ConfigError, match=r"there is no strategy file /none"):
        parckpt.load_strategy("/none", filesystem=disk)
    with pytest.raises(FormatError, match=r"/empty.ckpt is empty"):
        parckpt.load_strategy("/empty.ckpt", filesystem=disk)
    with pytest.raises(ConfigTypeError):
        parckpt.load_strategy(3, filesystem=disk)  # type: ignore[arg-type]
    with pytest.raises(ConfigTypeError):
        parckpt.save_strategy({}, "/x", filesystem=disk)  # type: ignore[arg-type]


def test_layouts_of_a_strategy() -> None:
    strategy = Strategy({"w": TensorStrategy((2, 2), (0,), opt_weight_shard_step=2, opt_weight_shard_size=-1)})
    layout = strategy.layout("w")
    assert layout == parckpt.Layout((2, 2), None, (0,), shard_step=2, shard_size=-1)
    assert layout is not None
    assert TensorStrategy.of(layout, 2) == TensorStrategy((2, 2), (0, -1), (), (), 0, 2, 2)
    assert strategy.layout("other") is None
    assert (list(strategy.ranks), strategy.nstages, strategy.is_merged) == ([0, 1, 2, 3], 1, False)
    # A size without a step does not cut, for MindSpore's tools.
    assert TensorStrategy((2,), (-1,), opt_weight_shard_size=2).layout().optimizer_parts == 1
    for odd in (TensorStrategy((2,), (0,), (3, 2)), TensorStrategy((2,), (0,), field=2)):
        with pytest.raises(LayoutError, match="unevenly"):
            odd.layout()


def test_pipeline_stages() -> None:
    strategy = Strategy(
        {
            "0-embed": TensorStrategy((2, 1), (1,)),
            "0-a-b": TensorStrategy((2, 1), (-1,)),
            "1-embed": TensorStrategy((1, 2), (-1,)),
            "1-head": TensorStrategy((1, 2), (0,)),
        }
    )
    assert strategy.is_merged
    assert strategy.names == ("embed", "a-b", "head")
    assert (strategy.nstages, strategy.stage_nranks, strategy.nranks) == (2, 2, 4)
    assert [list(layout.ranks) for layout in strategy.layouts("embed")] == [[0, 1], [2, 3]]
    head = strategy.layout("head")
    assert head is not None
    assert head.groups() == ((2,), (3,))


def test_stages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"stages \[0, 2\]: some are missing"):
        _ = Strategy({"0-a": TensorStrategy((2,), ()), "2-b": TensorStrategy((2,), ())}).nstages
    with pytest.raises(LayoutError, match=r"'a' lies on 2 devices and 'b' on 3"):
        _ = Strategy({"a": TensorStrategy((2,), ()), "b": TensorStrategy((3,), ())}).nranks
    with pytest.raises(LayoutError, match="no tensors"):
        _ = Strategy({}).nranks


def _stage(number: int, names: str) -> Strategy:
    return Strategy({n: TensorStrategy((2,), (0,)) for n in names}, 1, (Operator(f"op{number}", number, ((1,),)),))


@pytest.mark.parametrize("end", ["ckpt", "json"])
def test_stages_are_merged(end: str) -> None:
    disk = MemoryFileSystem()
    disk.mkdir("/s")
    disk.mkdir("/s/below")
    for number, strategy in enumerate([_stage(1, "bc"), _stage(0, "a"), _stage(1, "bc")]):
        parckpt.save_strategy(strategy, f"/s/{number}.{end}", filesystem=disk)
    for _ in range(2):  # the result lies in the directory the second time
        parckpt.merge_pipeline_strategys("/s", f"/s/merged.{end}", filesystem=disk)
        merged = parckpt.load_strategy(f"/s/merged.{end}", filesystem=disk)
        assert list(merged.tensors) == ["1-b", "1-c", "0-a"]
        assert [operator.stage for operator in merged.operators] == [1, 0]
        assert merged.nranks == 4


def test_stages_that_contradict_are_not_merged() -> None:
    disk = MemoryFileSystem()
    disk.mkdir("/s")
    with pytest.raises(ConfigError, match="no strategy files in /s"):
        parckpt.merge_pipeline_strategys("/s", "/merged.ckpt", filesystem=disk)
    parckpt.save_strategy(_stage(0, "a"), "/s/0.ckpt", filesystem=disk)
    parckpt.save_strategy(_stage(0, "b"), "/s/1.ckpt", filesystem=disk)
    with pytest.raises(ConfigError, match=r"/s/0.ckpt and /s/1.ckpt are both of stage 0, but differ"):
        parckpt.merge_pipeline_strategys("/s", "/merged.ckpt", filesystem=disk)
    parckpt.save_strategy(Strategy({}), "/s/1.ckpt", filesystem=disk)
    with pytest.raises(FormatError, match=r"/s/1.ckpt names no operators"):
        parckpt.merge_pipeline_strategys("/s", "/merged.ckpt", filesystem=disk)
    with pytest.raises(ConfigError, match="no directory /t"):
        parckpt.merge_pipeline_strategys("/t", "/merged.ckpt", filesystem=disk)
    parckpt.save_strategy(_stage(1, "b"), "/s/1.json", filesystem=disk)
    with pytest.raises(ConfigError, match=r"both \.ckpt and \.json"):
        parckpt.merge_pipeline_strategys("/s", "/merged.ckpt", filesystem=disk)
    assert disk.listdir("/") == ["s"]


def test_group_files() -> None:
    disk = MemoryFileSystem()
    write_file(disk, "/group", b"\x0a\x02\x08\x01" + form.encode_group([5, 300, 0]))
    write_file(disk, "/none", b"\x12\x00")
    assert parckpt.restore_group_info_list("/group", filesystem=disk) == [5, 300, 0]
    with pytest.raises(FormatError, match="no list of ranks"):
        parckpt.restore_group_info_list("/none", filesystem=disk)
    with pytest.raises(ConfigError, match="no strategy file"):
        parckpt.restore_group_info_list("/missing", filesystem=disk)
    with pytest.raises(ConfigTypeError):
        parckpt.restore_group_info_list(3, filesystem=disk)  # type: ignore[arg-type]


def test_the_file_of_a_rank_with_the_same_pieces() -> None:
    disk = MemoryFileSystem()
    strategy = Strategy({"w": TensorStrategy((2, 2), (0,)), "b": TensorStrategy((2, 2), ())})
    for rank in (0, 1):
        disk.mkdir(f"/rank_{rank}")
        write_file(disk, f"/rank_{rank}/x.ckpt", b"")
    find = parckpt.get_ckpt_path_with_strategy
    assert find("/rank_1/x.ckpt", strategy, filesystem=disk) == "/rank_1/x.ckpt"
    assert find("/rank_2/x.ckpt", strategy, filesystem=disk) == "/rank_0/x.ckpt"
    assert find("/rank_3/x.ckpt", strategy, filesystem=disk) == "/rank_1/x.ckpt"
    assert find("/rank_0/x.ckpt", strategy, rank=3, filesystem=disk) == "/rank_1/x.ckpt"
    assert find("/rank_6/x.ckpt", strategy, filesystem=disk) is None
    assert find("/elsewhere/x.ckpt", strategy, filesystem=disk) is None
    whole = Strategy({"w": TensorStrategy((2, 2), (1, 0))})
    assert find("/rank_2/x.ckpt", whole, filesystem=disk) is None
    with pytest.raises(ParckptError):
        find("/rank_2/x.ckpt", "/missing", filesystem=disk)
