"""MindSpore's rules for loading parameters into a network: what fills what, which types convert, which shapes fit.

As observed in ``load_param_into_net`` of MindSpore 2.10. What it does with a shape that only has more trailing ones is
not copied: it accepts the file's and gives the network's parameter that shape; here the network's shape stays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

from parckpt.core.dtypes import DType

__all__ = ["GRADIENT_SUMS", "Pairing", "converts", "fits", "never", "not_loaded", "pair"]

Pairing = Callable[[Sequence[str], Sequence[str]], Mapping[str, str]]

_FLOATS = frozenset({"float16", "float32", "float64", "bfloat16"})
_INTEGERS = frozenset({"int8", "int16", "int32", "int64", "int4"})  # signed only
# MindSpore's sums of gradients that a rank has not shared yet: a network in training has them, a file need not; they
# differ between ranks, and no tool of MindSpore's keeps them.
GRADIENT_SUMS = "accu_grads"


def converts(stored: DType, wanted: DType) -> bool:
    """Whether the one type may be turned into the other: both floating, or both signed integers."""
    names = {stored.name, wanted.name}
    return names <= _FLOATS or names <= _INTEGERS


def never(stored: DType, wanted: DType) -> bool:
    """The rule of ``strict_load``: no other type will do."""
    return False


def fits(stored: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a stored shape is the wanted one, with more trailing ones at most."""
    common = len(wanted)
    return tuple(stored[:common]) == tuple(wanted) and all(length == 1 for length in stored[common:])


def pair(wanted: Sequence[str], stored: Sequence[str], *, strict: bool) -> dict[str, str]:
    """Which stored name fills which wanted one.

    Equal names first. Unless `strict`, names that are left are looked for behind a prefix: the first stored name that
    ends with the first wanted one gives the prefix, and every wanted name that is stored behind it is filled; then
    again for what is still left. A stored name may fill several.

    Parameters
    ----------
    wanted, stored : sequence of str
        In their order, which decides between several prefixes.

    Returns
    -------
    dict
        Wanted name to stored name, in the order in which they were found.
    """
    present = set(stored)
    found = {name: name for name in wanted if name in present}
    left = [name for name in wanted if name not in present and not name.startswith(GRADIENT_SUMS)]
    if strict or not left:
        return found
    endings = _Endings(stored)
    while left:
        prefix = endings.prefix(left)
        if prefix is None:
            break
        behind = {name: prefix + name for name in left if prefix + name in present}
        found.update(behind)
        left = [name for name in left if name not in behind]
    return found


def not_loaded(wanted: Iterable[str], pairs: Mapping[str, str]) -> list[str]:
    """Wanted names that nothing fills, but for those that need not be stored."""
    return [name for name in wanted if name not in pairs and not name.startswith(GRADIENT_SUMS)]


class _Endings:
    """Stored names by how they end: 100,000 names are looked up in a second, not in an hour."""

    def __init__(self, stored: Sequence[str]) -> None:
        self._reversed = sorted((name[::-1], number) for number, name in enumerate(stored))
        self._stored = stored

    def prefix(self, left: Iterable[str]) -> str | None:
        """What stands before the first of these names, in the first stored name that ends with it."""
        for name in left:
            number = self._first(name[::-1])
            if number is not None:
                return self._stored[number][: -len(name)]
        return None

    def _first(self, ending: str) -> int | None:
        at = bisect_left(self._reversed, (ending, -1))
        found = None
        while at < len(self._reversed) and self._reversed[at][0].startswith(ending):
            number = self._reversed[at][1]
            found = number if found is None else min(found, number)
            at += 1
        return found
