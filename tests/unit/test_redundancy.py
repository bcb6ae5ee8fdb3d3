"""Which ranks hold the same, and which of them saves it: MindSpore's recorded answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parckpt import Layout, load_strategy
from parckpt.core.describe import Held, pack, unpack
from parckpt.core.dtypes import by_name
from parckpt.core.plan import plan_save
from parckpt.core.redundancy import mindspore_groups, mindspore_owners, redundancy_map

pytestmark = pytest.mark.fast

DATA = Path(__file__).parents[1] / "data"
VECTORS: dict[str, Any] = json.loads((DATA / "vectors" / "redundancy_vectors.json").read_text())


def _plain(groups: Any) -> dict[str, list[list[int]]]:
    return {name: [list(group) for group in each] for name, each in groups.items()}


def _owners(owners: dict[int, set[str]]) -> dict[str, list[str]]:
    return {str(rank): sorted(names) for rank, names in owners.items()}


@pytest.mark.parametrize("case", VECTORS["from_layout"], ids=lambda case: "-".join(case["layout"])[:40])
def test_recorded_layouts(case: dict[str, Any]) -> None:
    layouts = {
        name: Layout(mesh, None, entries, first_rank=case["initial_rank"])
        for name, (mesh, entries) in case["layout"].items()
    }
    groups = redundancy_map(layouts)
    assert list(groups) == sorted(layouts)
    assert _plain(groups) == case["redundancy"]
    assert _plain({name: mindspore_groups(layout) for name, layout in layouts.items()}) == case["redundancy"]
    assert _owners(mindspore_owners(groups)) == case["owners_keep1"]
    assert _owners(mindspore_owners(groups, 2)) == case["owners_keep2"]


@pytest.mark.parametrize("case", VECTORS["from_layout"], ids=lambda case: "-".join(case["layout"])[:40])
def test_a_plan_by_mindspores_rule_saves_the_same(case: dict[str, Any]) -> None:
    layouts = {name: Layout(mesh, None, entries) for name, (mesh, entries) in case["layout"].items()}
    first, shape = case["initial_rank"], (48, 48, 48)
    nranks = next(iter(layouts.values())).nranks
    boxes = [{name: layout.box(shape, rank) for name, layout in layouts.items()} for rank in range(nranks)]
    described = [
        pack([Held(name, by_name("int8"), shape, box.offsets, box.shape, split=True) for name, box in each.items()], ())
        for each in boxes
    ]
    plan = plan_save(
        [unpack(data) for data in described],
        range(nranks),
        [0] * nranks,
        integrated=False,
        remove_redundancy=True,
        split_replicas=True,
        ownership="mindspore",
    )
    owners = {first + rank: {plan.tensors[t].name for t, _ in plan.boxes_of(rank)} for rank in range(nranks)}
    assert _owners({rank: names for rank, names in owners.items() if names}) == case["owners_keep1"]


@pytest.mark.parametrize("case", VECTORS["from_map"], ids=lambda case: f"{len(case['redundancy'])} names")
def test_recorded_maps(case: dict[str, Any]) -> None:
    assert _owners(mindspore_owners(case["redundancy"])) == case["owners_keep1"]


def test_recorded_strategy_file() -> None:
    expected = json.loads((DATA / "golden" / "strategy" / "expected.json").read_text())
    strategy = load_strategy(DATA / "golden" / "strategy" / "strategy_4dev.ckpt")
    groups = redundancy_map({name: strategy.layouts(name) for name in strategy.names})
    assert _plain(groups) == expected["redundancy_4dev"]
    assert _owners(mindspore_owners(groups)) == expected["owners_4dev"]


def test_what_mindspore_drops_is_kept() -> None:
    layout = Layout((6,), None, (-1,), shard_step=1, shard_size=4)
    assert mindspore_groups(layout) == ()
    assert redundancy_map({"w": layout}) == {"w": ((0, 1, 2, 3, 4, 5),)}
    # All holders shall share a slice; MindSpore takes their number from the step, which fits for leading axes only.
    leading = Layout((2, 2), None, (0,), shard_step=2, shard_size=-1)
    assert mindspore_groups(leading) == leading.groups() == ((0,), (2,), (1,), (3,))
    last = Layout((2, 2), None, (1,), shard_step=1, shard_size=-1)
    assert (mindspore_groups(last), last.groups()) == ((), ((0,), (1,), (2,), (3,)))
    assert mindspore_groups(Layout((4,), None, (), shard_step=2, shard_size=-1)) == ((0, 2), (1, 3))


def test_a_tensor_of_two_stages_has_the_groups_of_both() -> None:
    layouts = [Layout((2,), None, (-1,)), Layout((2,), None, (0,), first_rank=2)]
    assert redundancy_map({"w": layouts}) == {"w": ((0, 1), (2,), (3,))}
