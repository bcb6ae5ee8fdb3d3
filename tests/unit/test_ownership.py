"""Owners: fixed cases; the bounds are in the property tests."""

from __future__ import annotations

import numpy as np
import pytest

from parckpt.core.balance import level_loads
from parckpt.core.ownership import Replicas, Shares, assign_by_name, assign_owners
from parckpt.core.redundancy import mindspore_owners

pytestmark = pytest.mark.fast

MIB = 1 << 20


def make(sizes: list[int | tuple[int, int]], which: list[int], sets: list[list[int]], itemsize: int = 1) -> Replicas:
    shapes = np.array([s if isinstance(s, tuple) else (s, 1) for s in sizes], dtype=np.int64).reshape(-1, 2)
    ranks = [np.array(s, dtype=np.int64) for s in sets]
    return Replicas(shapes, np.full(len(sizes), itemsize, dtype=np.int64), np.array(which, dtype=np.int64), ranks)


def rows(shares: Shares) -> list[tuple[int, int, int, int]]:
    columns = (shares.box, shares.rank, shares.start, shares.stop)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def test_a_lone_holder_owns_its_boxes() -> None:
    replicas = make([5, 0, 7], [0, 0, 1], [[2], [0]])
    for split in (False, True):
        assert rows(assign_owners(replicas, [0, 0, 0], split=split)) == [(0, 2, 0, 5), (1, 2, 0, 0), (2, 0, 0, 7)]


def test_owners_by_name_are_mindspores() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        nranks, nnames = int(rng.integers(1, 7)), int(rng.integers(0, 12))
        names = [f"p{number}" for number in rng.permutation(20)[:nnames].tolist()]
        distinct = {tuple(np.flatnonzero(rng.random(nranks) < 0.6).tolist()) for _ in range(4)} - {()}
        sets = [list(group) for group in distinct] or [[0]]
        held = [(name, which) for name in range(nnames) for which in range(len(sets)) if rng.random() < 0.5]
        rng.shuffle(held)
        replicas = make([4] * len(held), [which for _, which in held], sets)
        shares = assign_by_name(replicas, names, np.array([name for name, _ in held], dtype=np.int64))
        groups: dict[str, list[list[int]]] = {}
        for name, which in held:
            groups.setdefault(names[name], []).append(sets[which])
        found: dict[int, set[str]] = {}
        for box, rank, start, stop in rows(shares):
            assert (start, stop) == (0, 4)
            found.setdefault(rank, set()).add(names[held[box][0]])
        assert found == mindspore_owners(groups)


def test_nothing_to_own() -> None:
    for split in (False, True):
        assert rows(assign_owners(make([], [], [[0, 1]]), [0, 0], split=split)) == []
    assert rows(assign_by_name(make([], [], [[0, 1]]), [], np.zeros(0, dtype=np.int64))) == []


def test_largest_first_onto_the_least_loaded() -> None:
    shares = assign_owners(make([2, 9, 4, 3], [0] * 4, [[0, 1]]), [0, 0], split=False)
    assert rows(shares) == [(0, 1, 0, 2), (1, 0, 0, 9), (2, 1, 0, 4), (3, 1, 0, 3)]


def test_what_a_rank_must_write_anyway_counts() -> None:
    shares = assign_owners(make([100, 10, 10], [0, 1, 1], [[0], [0, 1]]), [0, 0], split=False)
    assert shares.rank.tolist() == [0, 1, 1]


def test_ties_go_to_the_less_loaded_node() -> None:
    """Rank 0 writes much, so its neighbour rank 1 is spared although it is as idle as ranks 2 and 3."""
    shares = assign_owners(make([100, 10], [0, 1], [[0], [1, 2, 3]]), [0, 0, 1, 1], split=False)
    assert shares.rank.tolist() == [0, 2]


def test_equal_ranks_of_equal_nodes_take_turns_over_nodes() -> None:
    shares = assign_owners(make([10, 10, 10, 10], [0] * 4, [[0, 1, 2, 3]]), [0, 0, 1, 1], split=False)
    assert shares.rank.tolist() == [0, 2, 1, 3]


def test_three_tensors_of_10_mib_over_two_ranks_are_cut_once() -> None:
    shares = assign_owners(make([10 * MIB] * 3, [0] * 3, [[0, 1]]), [0, 0], split=True)
    assert rows(shares) == [(0, 0, 0, 10 * MIB), (1, 1, 0, 10 * MIB), (2, 0, 0, 5 * MIB), (2, 1, 5 * MIB, 10 * MIB)]


def test_small_tensors_are_not_cut() -> None:
    shares = assign_owners(make([2 * MIB] * 3, [0] * 3, [[0, 1]]), [0, 0], split=True)
    assert len(shares.box) == 3


def test_cuts_fall_between_rows_where_the_slack_allows() -> None:
    """3 ranks, 1,000 rows of 100 kB: a third is not a whole number of rows, a cut is."""
    row = 100_000
    shares = assign_owners(make([(1000, row)], [0], [[0, 1, 2]]), [0, 0, 0], split=True)
    assert len(shares.box) == 3
    assert (shares.start % row == 0).all()


def test_cuts_are_exact_if_rows_are_long() -> None:
    shares = assign_owners(make([(3, 100 * MIB)], [0], [[0, 1]], itemsize=2), [0, 0], split=True)
    assert rows(shares) == [(0, 0, 0, 150 * MIB), (0, 1, 150 * MIB, 300 * MIB)]


def test_without_permission_nothing_is_cut() -> None:
    shares = assign_owners(make([1000 * MIB], [0], [[0, 1]]), [0, 0], split=False)
    assert rows(shares) == [(0, 0, 0, 1000 * MIB)]


def test_loads_level_around_what_is_there_already() -> None:
    (share,) = level_loads([10], [np.array([0, 1, 2])], np.array([0, 100, 4]), 0)
    assert share.tolist() == [7, 0, 3]
    (share,) = level_loads([0], [np.array([0, 1])], np.array([5, 5]), 0)
    assert share.tolist() == [0, 0]


def test_sets_make_room_for_each_other() -> None:
    """What {0, 1} shares goes to 0, since 1 and 2 have enough with their own."""
    sets = [np.array([0, 1]), np.array([1, 2])]
    first, second = level_loads([10, 20], sets, np.zeros(3, dtype=np.int64), 0)
    load = [first[0], first[1] + second[0], second[1]]
    assert load == [10, 10, 10]
