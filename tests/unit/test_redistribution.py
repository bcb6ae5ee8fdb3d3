"""Which source ranks MindSpore reads: recorded lists, and that what they hold is enough."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core.layout import intersect
from parckpt.core.mesh import Layout
from parckpt.core.redistribution import Cut, needed_ranks
from parckpt.errors import LayoutError

pytestmark = pytest.mark.fast


def cut(mesh: list[int], axes: list[int | tuple[int, ...]], step: int = 0, size: int = 0) -> Cut:
    return Cut(tuple(mesh), tuple(a if isinstance(a, tuple) else (a,) for a in axes), step, size)


@pytest.mark.parametrize(
    ("source", "target", "lists"),
    [
        # Recorded from rank_list_for_transform.
        (cut([3, 2], [0, -1]), cut([2, 1, 3], [2, -1]), {0: [0, 1], 1: [0, 1], 2: [2, 3]}),
        (cut([2, 2], [0, -1]), cut([2, 2], [1, -1]), {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}),
        (cut([2, 2], [0, -1]), cut([4], [-1, -1]), {0: [0, 1], 1: [0, 1]}),
        (cut([4], [0, -1]), cut([2, 2], [0, -1]), {0: [0, 1, 2, 3]}),
        (cut([4], [0, -1]), cut([2, 2], [1, 0]), {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}),
        (cut([6], [0, -1]), cut([3, 2], [0, -1]), {0: [0, 1, 2, 3, 4, 5]}),
        (cut([2, 3], [0, -1]), cut([3, 2], [0, -1]), {0: [0, 1, 2], 5: [3, 4, 5]}),
        (cut([2, 2], [0, -1], 2, 2), cut([2, 2], [0, -1], 2, 2), {r: [r] for r in range(4)}),
        (cut([2, 2], [0, -1], 2, -1), cut([1], [-1, -1]), {0: [0, 1, 2, 3]}),
    ],
)
def test_the_recorded_lists(source: Cut, target: Cut, lists: dict[int, list[int]]) -> None:
    assert {rank: sorted(needed_ranks(source, target, rank)) for rank in lists} == lists


def test_numbers_of_ranks_that_do_not_divide() -> None:
    with pytest.raises(LayoutError, match="4 ranks cannot be mapped to 6"):
        needed_ranks(cut([4], [0]), cut([6], [0]), 0)


@pytest.mark.parametrize("size", [3, 4])
def test_optimizer_shards_that_do_not_fit_the_replicas(size: int) -> None:
    with pytest.raises(LayoutError, match=f"optimizer shards of {size} ranks"):
        needed_ranks(cut([2, 2], [0, -1], 2, size), cut([1], [-1, -1]), 0)


@st.composite
def cuts(draw: st.DrawFn, nranks: int, ndim: int) -> Cut:
    mesh = []
    while nranks > 1:
        mesh.append(draw(st.sampled_from([d for d in range(2, nranks + 1) if nranks % d == 0])))
        nranks //= mesh[-1]
    mesh = mesh or [1]
    axes = list(draw(st.permutations(range(len(mesh)))))
    entries: list[tuple[int, ...]] = []
    for _ in range(ndim):
        count = draw(st.integers(0, min(2, len(axes))))
        entries.append(tuple(axes.pop() for _ in range(count)))
    free = math.prod(mesh[len(mesh) - 1 - axis] for axis in axes)
    return Cut(tuple(mesh), tuple(entries), *((1, free) if free > 1 and draw(st.booleans()) else (0, 0)))


def layout(cut: Cut) -> Layout:
    return Layout(cut.mesh, None, cut.axes, shard_step=cut.shard_step, shard_size=cut.shard_size)


@given(st.data())
def test_what_the_ranks_hold_is_enough(data: st.DataObject) -> None:
    """Their boxes cover every box of the target."""
    ndim = data.draw(st.integers(1, 2))
    counts = data.draw(st.sampled_from([(1, 4), (4, 1), (4, 4), (8, 2), (2, 8), (6, 3), (3, 6), (12, 4)]))
    source, target = data.draw(cuts(counts[0], ndim)), data.draw(cuts(counts[1], ndim))
    rank = data.draw(st.integers(0, counts[1] - 1))
    shape = (math.lcm(*counts) ** 2,) * ndim
    wanted = layout(target).box(shape, rank)
    held = {layout(source).box(shape, other) for other in needed_ranks(source, target, rank)}
    parts = [intersect(box, wanted) for box in held]
    assert sum(part.size for part in parts if part is not None) == wanted.size
