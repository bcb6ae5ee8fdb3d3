"""The save plan of any job: everything once, by those who hold it, whatever the order the descriptions come in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parckpt.core.describe import Held, pack, unpack
from parckpt.core.layout import Box, contains, slices
from parckpt.core.plan import SavePlan, plan_save
from parckpt.errors import LayoutError
from parckpt.testing.strategies import job_layouts

MODES: dict[str, dict[str, Any]] = {
    "integrated": {"integrated": True, "remove_redundancy": False, "split_replicas": True},
    "owners": {"integrated": False, "remove_redundancy": True, "split_replicas": False},
    "split": {"integrated": False, "remove_redundancy": True, "split_replicas": True, "chunk_nbytes": 16},
    "everything": {"integrated": False, "remove_redundancy": False, "split_replicas": False},
}
modes = st.sampled_from(sorted(MODES))


def plan(ranks: Sequence[Sequence[Held]], mode: str, order: Sequence[int] | None = None) -> SavePlan:
    packed = [pack(rows, []) for rows in ranks]
    distinct = list(dict.fromkeys(packed))
    distinct = [distinct[k] for k in order or range(len(distinct))]
    which = [distinct.index(data) for data in packed]
    return plan_save([unpack(d) for d in distinct], which, [rank % 2 for rank in range(len(ranks))], **MODES[mode])


def kept(ranks: Sequence[Sequence[Held]]) -> list[list[Held]]:
    """What the plan is about: boxes with elements, and of an empty tensor the box that was described first."""
    first: dict[str, Box] = {}
    for rows in ranks:
        for h in rows:
            first.setdefault(h.name, h.box)

    def counts(h: Held) -> bool:
        return not h.box.is_empty or (math.prod(h.global_shape) == 0 and (h.per_rank or first[h.name] == h.box))

    return [[h for h in rows if counts(h)] for rows in ranks]


@settings(deadline=None, max_examples=200)
@given(job_layouts(), modes)
def test_each_element_is_planned_exactly_once_and_by_a_holder(ranks: list[list[Held]], mode: str) -> None:
    made = plan(ranks, mode)
    counts = {t: np.zeros(row.global_shape, dtype=np.int64) for t, row in enumerate(made.tensors)}
    writers: dict[tuple[int, Box], list[int]] = {}
    for rank, rows in enumerate(ranks):
        for tensor, box in made.boxes_of(rank):
            row = made.tensors[tensor]
            held = [h for h in rows if h.name == row.name and contains(h.box, box)]
            assert held
            assert held[0].dtype == row.dtype
            assert held[0].global_shape == row.global_shape
            assert row.per_rank in (-1, rank)
            writers.setdefault((tensor, box), []).append(rank)
    for (tensor, box), by in writers.items():
        counts[tensor][slices(box, (0,) * len(box.shape))] += 1
        if mode == "everything":
            holders = [
                r
                for r, rows in enumerate(ranks)
                if any(h.name == made.tensors[tensor].name and h.box == box for h in rows)
            ]
            assert by == ([made.tensors[tensor].per_rank] if made.tensors[tensor].per_rank >= 0 else holders)
        else:
            assert len(by) == 1
    assert all((count == 1).all() for count in counts.values())
    assert {tensor for tensor, _ in writers} == set(counts)  # empty tensors are written too
    if mode in ("integrated", "owners"):
        distinct = {(h.name, h.box, r if h.per_rank else -1) for r, rows in enumerate(kept(ranks)) for h in rows}
        assert {(made.tensors[t].name, b, made.tensors[t].per_rank) for t, b in writers} == distinct


@settings(deadline=None)
@given(job_layouts(), modes)
def test_tensors_come_in_order_of_first_appearance(ranks: list[list[Held]], mode: str) -> None:
    expected = dict.fromkeys((h.name, r if h.per_rank else -1) for r, rows in enumerate(ranks) for h in rows)
    assert [(row.name, row.per_rank) for row in plan(ranks, mode).tensors] == list(expected)


@settings(deadline=None)
@given(job_layouts(), modes)
def test_a_rank_writes_in_the_order_of_its_state(ranks: list[list[Held]], mode: str) -> None:
    made = plan(ranks, mode)
    for rank, rows in enumerate(ranks):
        places = []
        for tensor, box in made.boxes_of(rank):
            name = made.tensors[tensor].name
            places += [k for k, h in enumerate(rows) if h.name == name and contains(h.box, box)][:1]
        assert places == sorted(places)


@settings(deadline=None)
@given(st.data(), job_layouts(), modes)
def test_the_order_of_descriptions_does_not_matter(data: st.DataObject, ranks: list[list[Held]], mode: str) -> None:
    distinct = len({pack(rows, []) for rows in ranks})
    order = data.draw(st.permutations(range(distinct)))
    first, second = plan(ranks, mode), plan(ranks, mode, order)
    assert first.hash == second.hash
    assert [first.boxes_of(r) for r in range(len(ranks))] == [second.boxes_of(r) for r in range(len(ranks))]


@settings(deadline=None)
@given(job_layouts(), modes)
def test_repeating_a_description_does_not_matter(ranks: list[list[Held]], mode: str) -> None:
    descriptions = [unpack(pack(rows, [])) for rows in ranks]
    nodes = [rank % 2 for rank in range(len(ranks))]
    assert plan_save(descriptions, range(len(ranks)), nodes, **MODES[mode]).hash == plan(ranks, mode).hash


@settings(deadline=None)
@given(job_layouts(), modes)
def test_views_of_the_plan_agree(ranks: list[list[Held]], mode: str) -> None:
    made = plan(ranks, mode)
    rows = [(rank, tensor, box) for rank in range(len(ranks)) for tensor, box in made.boxes_of(rank)]
    assert made.box_rank.tolist() == [rank for rank, _, _ in rows]
    assert made.box_tensor.tolist() == [tensor for _, tensor, _ in rows]
    load = [sum(b.size * made.tensors[t].dtype.itemsize for t, b in made.boxes_of(r)) for r in range(len(ranks))]
    assert made.load().tolist() == load
    by_tensor = [(rank, t, box) for t in range(len(made.tensors)) for rank, box in made.pieces_of(t)]
    assert sorted(by_tensor, key=repr) == sorted(rows, key=repr)


@settings(deadline=None)
@given(job_layouts(), modes)
def test_replicas_are_the_boxes_that_several_ranks_hold(ranks: list[list[Held]], mode: str) -> None:
    made = plan(ranks, mode)
    holders: dict[tuple[str, Box], list[int]] = {}
    for rank, rows in enumerate(kept(ranks)):
        for h in rows:
            if not h.per_rank:
                holders.setdefault((h.name, h.box), []).append(rank)
    expected = {key: by for key, by in holders.items() if len(by) > 1}
    found = {(made.tensors[r.tensor].name, r.box): made.holders(r).tolist() for r in made.replicas()}
    assert found == expected
    for rank in range(len(ranks)):
        assert made.replicas_of(rank) == [r for r in made.replicas() if rank in made.holders(r)]


@settings(deadline=None, max_examples=150)
@given(st.data(), job_layouts())
def test_damaged_layouts_are_refused_with_the_name(data: st.DataObject, ranks: list[list[Held]]) -> None:
    """Move a shard that only one rank holds by one element, or lose it: always an error about that tensor."""
    everything = [(h.name, h.box) for rows in ranks for h in rows]
    cut = [
        (rank, place)
        for rank, rows in enumerate(ranks)
        for place, h in enumerate(rows)
        if h.split and h.shape and not h.box.is_empty and everything.count((h.name, h.box)) == 1
    ]
    assume(cut)
    rank, place = data.draw(st.sampled_from(cut))
    held = ranks[rank][place]
    if data.draw(st.booleans()):
        offsets = (held.offsets[0] + data.draw(st.sampled_from([-1, 1])), *held.offsets[1:])
        ranks[rank][place] = Held(held.name, held.dtype, held.global_shape, offsets, held.shape, split=True)
    else:
        for rows in ranks:
            rows[:] = [h for h in rows if (h.name, h.box) != (held.name, held.box)]
        assume(any(h.name == held.name for rows in ranks for h in rows))
    with pytest.raises(LayoutError) as caught:
        plan(ranks, "owners")
    assert caught.value.facts["tensor"] == held.name
    assert repr(held.name) in str(caught.value)
    assert caught.value.facts["others"] == 0
