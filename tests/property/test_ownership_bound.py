"""No rank writes more than the optimum plus a chunk, where the optimum is what a linear program says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from hypothesis import given, settings
from scipy.optimize import linprog

from parckpt.core.ownership import CHUNK_NBYTES, Replicas, Shares, assign_owners
from parckpt.testing.strategies import replica_numbers

Ints = np.ndarray[Any, np.dtype[np.int64]]


def nbytes(replicas: Replicas) -> Ints:
    return replicas.shapes.prod(axis=1) * replicas.itemsize


def loads(replicas: Replicas, shares: Shares, nranks: int) -> Ints:
    found = np.zeros(nranks, dtype=np.int64)
    np.add.at(found, shares.rank, (shares.stop - shares.start) * replicas.itemsize[shares.box])
    return found


def optimum(replicas: Replicas, nranks: int) -> float:
    """Least possible heaviest load if every byte may be given to any of its holders."""
    amounts = np.bincount(replicas.holder_set, weights=nbytes(replicas), minlength=len(replicas.sets)) / (1 << 20)
    columns = [(s, int(rank)) for s, ranks in enumerate(replicas.sets) for rank in ranks]
    equal = np.zeros((len(replicas.sets), len(columns) + 1))
    at_most = np.zeros((nranks, len(columns) + 1))
    at_most[:, -1] = -1
    for column, (s, rank) in enumerate(columns):
        equal[s, column] = 1
        at_most[rank, column] = 1
    cost = np.zeros(len(columns) + 1)
    cost[-1] = 1
    found = linprog(cost, A_ub=at_most, b_ub=np.zeros(nranks), A_eq=equal, b_eq=amounts, method="highs")
    assert found.status == 0
    return float(found.fun) * (1 << 20)


def check_cover(replicas: Replicas, shares: Shares) -> None:
    """Every element of each box has exactly one writer, who holds it."""
    sizes = replicas.shapes.prod(axis=1)
    expected = dict.fromkeys(range(len(sizes)), 0)
    rows: Iterable[tuple[int, int, int, int]] = zip(
        shares.box.tolist(), shares.rank.tolist(), shares.start.tolist(), shares.stop.tolist(), strict=True
    )
    seen = set()
    for box, rank, start, stop in rows:
        assert rank in replicas.sets[int(replicas.holder_set[box])]
        assert start == expected[box]
        assert stop > start or sizes[box] == 0
        expected[box] = stop
        seen.add(box)
    assert expected == dict(enumerate(sizes.tolist()))
    assert seen == set(expected)  # empty boxes have a writer too


@settings(deadline=None, max_examples=200)
@given(replica_numbers())
def test_with_cuts_no_load_exceeds_the_optimum_by_a_chunk(case: tuple[Replicas, Ints]) -> None:
    replicas, nodes = case
    shares = assign_owners(replicas, nodes, split=True)
    check_cover(replicas, shares)
    assert loads(replicas, shares, len(nodes)).max() <= optimum(replicas, len(nodes)) + CHUNK_NBYTES


@settings(deadline=None, max_examples=100)
@given(replica_numbers(max_nbytes=1 << 16))
def test_the_bound_scales_with_the_chunk(case: tuple[Replicas, Ints]) -> None:
    replicas, nodes = case
    shares = assign_owners(replicas, nodes, split=True, chunk_nbytes=1024)
    check_cover(replicas, shares)
    assert loads(replicas, shares, len(nodes)).max() <= optimum(replicas, len(nodes)) + 1024


@settings(deadline=None, max_examples=100)
@given(replica_numbers())
def test_without_cuts_each_box_has_one_owner_and_lists_are_balanced(case: tuple[Replicas, Ints]) -> None:
    replicas, nodes = case
    shares = assign_owners(replicas, nodes, split=False)
    check_cover(replicas, shares)
    assert len(shares.box) == len(replicas.shapes)
    load = loads(replicas, shares, len(nodes))
    # Moving any one box from its owner to another holder does not make that holder lighter than the owner is now ...
    for box, owner in zip(shares.box.tolist(), shares.rank.tolist(), strict=True):
        later = nbytes(replicas) <= nbytes(replicas)[box]
        before = load[owner] - nbytes(replicas)[(shares.rank == owner) & later][:].sum()
        holders = replicas.sets[int(replicas.holder_set[box])]
        assert before <= load[holders].min()  # ... since it was the least loaded when it got the box


@settings(deadline=None, max_examples=100)
@given(replica_numbers())
def test_if_all_hold_all_lists_keep_their_bound(case: tuple[Replicas, Ints]) -> None:
    given_, nodes = case
    replicas = Replicas(
        given_.shapes, given_.itemsize, np.zeros(len(given_.shapes), dtype=np.int64), [np.arange(len(nodes))]
    )
    load = loads(replicas, assign_owners(replicas, nodes, split=False), len(nodes))
    assert load.max() <= load.mean() + nbytes(replicas).max(initial=0)


@settings(deadline=None, max_examples=50)
@given(replica_numbers())
def test_equal_input_gives_equal_shares(case: tuple[Replicas, Ints]) -> None:
    replicas, nodes = case
    again = Replicas(replicas.shapes.copy(), replicas.itemsize.copy(), replicas.holder_set.copy(), list(replicas.sets))
    for split in (False, True):
        first, second = assign_owners(replicas, nodes, split=split), assign_owners(again, nodes.copy(), split=split)
        for name in ("box", "rank", "start", "stop"):
            assert getattr(first, name).tolist() == getattr(second, name).tolist()


def make(sizes: list[int], which: list[int], sets: list[list[int]]) -> Replicas:
    shapes = np.array(sizes, dtype=np.int64).reshape(-1, 1)
    ranks = [np.array(s, dtype=np.int64) for s in sets]
    return Replicas(shapes, np.ones(len(sizes), dtype=np.int64), np.array(which, dtype=np.int64), ranks)


def test_one_gigabyte_tensor_and_many_small_ones_on_four_ranks() -> None:
    sizes = [1 << 30, *(1000 + 977 * k for k in range(2000))]
    replicas = make(sizes, [0] * len(sizes), [[0, 1, 2, 3]])
    shares = assign_owners(replicas, [0, 0, 1, 1], split=True)
    check_cover(replicas, shares)
    load = loads(replicas, shares, 4)
    assert load.max() <= load.mean() + CHUNK_NBYTES
    assert len(shares.box) <= len(sizes) + 3  # only the large one is cut, and no more often than needed


def test_chains_of_overlapping_sets_reach_the_optimum() -> None:
    """Load has to trickle from pair to pair over all ranks: sweeps alone would take very long."""
    nranks = 40
    sizes = [200 << 20, *([1 << 20] * (nranks - 2))]
    replicas = make(sizes, list(range(nranks - 1)), [[k, k + 1] for k in range(nranks - 1)])
    shares = assign_owners(replicas, [k // 8 for k in range(nranks)], split=True)
    check_cover(replicas, shares)
    assert loads(replicas, shares, nranks).max() <= optimum(replicas, nranks) + CHUNK_NBYTES


def test_a_mesh_of_nested_sets_reaches_the_optimum() -> None:
    """Everything on all ranks, on each half, on pairs: as data parallel groups within groups."""
    generator = np.random.default_rng(7)
    nranks = 32
    sets = [list(range(nranks)), list(range(16)), list(range(16, nranks)), *([k, k + 1] for k in range(0, nranks, 2))]
    which = generator.integers(0, len(sets), 400).tolist()
    replicas = make(generator.integers(1, 60 << 20, 400).tolist(), which, sets)
    shares = assign_owners(replicas, [k // 4 for k in range(nranks)], split=True)
    check_cover(replicas, shares)
    assert loads(replicas, shares, nranks).max() <= optimum(replicas, nranks) + CHUNK_NBYTES


def test_rows_crossing_columns_reach_the_optimum() -> None:
    """A 6 x 6 mesh with tensors replicated along rows and others along columns, of very different sizes."""
    generator = np.random.default_rng(11)
    mesh = np.arange(36).reshape(6, 6)
    sets = [*mesh.tolist(), *mesh.T.tolist()]
    which = generator.integers(0, len(sets), 60).tolist()
    replicas = make((generator.random(60) ** 4 * (1 << 30)).astype(np.int64).tolist(), which, sets)
    shares = assign_owners(replicas, [k // 6 for k in range(36)], split=True)
    check_cover(replicas, shares)
    assert loads(replicas, shares, 36).max() <= optimum(replicas, 36) + CHUNK_NBYTES
