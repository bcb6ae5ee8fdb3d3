"""How many bytes each rank should write of what it holds together with others: a fractional optimum in integers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["level_loads"]

Ints = npt.NDArray[np.int64]

# Sweeps over all sets before single paths are mended, which is dear: disjoint and nested sets (meshes) need one or two
# sweeps, rows crossing columns about 200, and only many sets in odd constellations more than that.
_MAX_SWEEPS = 256
_MIN_SWEEPS = 24
_MAX_FILLS = 1 << 16  # about two seconds


def level_loads(amounts: Sequence[int], sets: Sequence[Ints], base: Ints, tolerance: int) -> list[Ints]:
    """Share amounts among sets of ranks so that the heaviest load is the least possible.

    Parameters
    ----------
    amounts : sequence of int
        Bytes to share among the ranks of each set.
    sets : sequence of int64 array
        Ranks, each set without repetition and not empty.
    base : int64 array
        Load that each rank has anyway.
    tolerance : int
        By how many bytes the heaviest load may exceed the optimum.

    Returns
    -------
    list of int64 array
        For each set, the bytes of each of its ranks, adding up to the amount.

    Notes
    -----
    One set is levelled exactly, given the others, by filling the least loaded ranks first. Doing so in turn lowers the
    sum of squares, whose minimum has the least heaviest load. It is reached when nothing can flow from the heaviest
    rank to a lighter one: the ranks in reach then hold all that is shared among them, and none of them has room.
    """
    load = base.astype(np.int64)
    shares = [np.zeros(len(ranks), dtype=np.int64) for ranks in sets]
    # Small sets have the least choice: they go first, the large ones then fill the valleys.
    order = sorted(range(len(sets)), key=lambda s: (len(sets[s]), s))
    for sweep in range(max(_MIN_SWEEPS, min(_MAX_SWEEPS, _MAX_FILLS // max(1, len(sets))))):
        for s in order if sweep % 2 == 0 else reversed(order):
            others = load[sets[s]] - shares[s]
            shares[s] = _fill(others, amounts[s])
            load[sets[s]] = others + shares[s]
        if len(sets) < 2:
            return shares
        if _path(load, sets, shares, tolerance) is None:
            return shares
    while (path := _path(load, sets, shares, tolerance)) is not None:
        _push(path, load, sets, shares)
    return shares


def _fill(others: Ints, amount: int) -> Ints:
    """Pour `amount` into vessels filled to `others`: the lowest end up level."""
    order = np.argsort(others, kind="stable")
    height = others[order] - others[order[0]]
    below = np.cumsum(height)
    needed = height * np.arange(1, len(height) + 1) - below  # to raise all lower ones to each height
    count = int(np.searchsorted(needed, amount, side="right"))
    level, rest = divmod(amount + int(below[count - 1]), count)
    poured = np.zeros(len(height), dtype=np.int64)
    poured[order[:count]] = level - height[:count]
    poured[order[:rest]] += 1
    return poured


# A path is a list of (rank, set, rank): bytes of the set move from the first rank to the second.
_Path = list[tuple[int, int, int]]


def _path(load: Ints, sets: Sequence[Ints], shares: Sequence[Ints], tolerance: int) -> _Path | None:
    """Find a shortest way from the heaviest rank to one that is lighter by more than `tolerance`, or None."""
    heaviest = int(load.argmax())
    bound = int(load[heaviest]) - tolerance
    if int(load.min()) >= bound:
        return None
    gives = _givers(sets, shares, len(load))
    came: dict[int, tuple[int, int, int] | None] = {heaviest: None}
    seen: set[int] = set()
    queue = deque([heaviest])
    while queue:
        rank = queue.popleft()
        for s in gives[rank]:
            if s in seen:
                continue
            seen.add(s)
            for other in sets[s].tolist():
                if other in came:
                    continue
                came[other] = (rank, s, other)
                if load[other] < bound:
                    return _trace(came, other)
                queue.append(other)
    return None


def _givers(sets: Sequence[Ints], shares: Sequence[Ints], nranks: int) -> list[list[int]]:
    """For each rank, the sets of which it has a share to give away."""
    gives: list[list[int]] = [[] for _ in range(nranks)]
    for s, (ranks, share) in enumerate(zip(sets, shares, strict=True)):
        for rank in ranks[share > 0].tolist():
            gives[rank].append(s)
    return gives


def _trace(came: dict[int, tuple[int, int, int] | None], rank: int) -> _Path:
    path: _Path = []
    while (step := came[rank]) is not None:
        path.append(step)
        rank = step[0]
    return path[::-1]


def _push(path: _Path, load: Ints, sets: Sequence[Ints], shares: Sequence[Ints]) -> None:
    """Move as much along a path as helps: half the difference of its ends, or what the ranks on it have."""
    first, last = path[0][0], path[-1][2]
    places = [
        (s, int(np.searchsorted(sets[s], giver)), int(np.searchsorted(sets[s], taker))) for giver, s, taker in path
    ]
    amount = min(int(load[first] - load[last] + 1) // 2, *(int(shares[s][giver]) for s, giver, _ in places))
    for s, giver, taker in places:
        shares[s][giver] -= amount
        shares[s][taker] += amount
    load[first] -= amount
    load[last] += amount
