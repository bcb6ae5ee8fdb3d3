"""Who holds the same, and who of them saves it: MindSpore's rule, which goes by names and counts, not by bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from parckpt.core.mesh import Layout

__all__ = ["Groups", "mindspore_groups", "mindspore_owners", "redundancy_map"]

Groups = tuple[tuple[int, ...], ...]
"""Groups of ranks that hold the same."""


def redundancy_map(layouts: Mapping[str, Layout | Iterable[Layout]]) -> dict[str, Groups]:
    """Find the groups of ranks that hold the same piece of each tensor, sorted by name.

    A tensor that several pipeline stages share has a layout for each. Nothing is ever left out; see `mindspore_groups`
    for what MindSpore does.
    """
    found: dict[str, Groups] = {}
    for name, given in sorted(layouts.items()):
        each = (given,) if isinstance(given, Layout) else given
        found[name] = tuple(group for layout in each for group in layout.groups())
    return found


def mindspore_groups(layout: Layout) -> Groups:
    """As `Layout.groups`, but with what MindSpore drops left out.

    Where the holders of a slice cannot be dealt out evenly to the optimizer shards there is no group, so no rank of a
    MindSpore job saves the slice.
    """
    wanted = layout.wanted_parts
    if layout.shard_size < 0 and layout.shard_step:
        wanted = layout.nranks // layout.shard_step  # the holders only where the free mesh axes are the first ones
    if wanted > 1 and layout.holders % wanted:
        return ()
    cut = Layout(layout.mesh_shape, None, layout.tensor_map, shard_size=wanted, first_rank=layout.first_rank)
    return cut.groups()


def mindspore_owners(groups: Mapping[str, Sequence[Sequence[int]]], keep_redundancy: int = 1) -> dict[int, set[str]]:
    """Choose the ranks that save each tensor.

    Parameters
    ----------
    groups : mapping of str to sequences of ranks
        For each name the groups of ranks that hold the same.
    keep_redundancy : int
        By how many ranks of each group a tensor is saved.

    Returns
    -------
    dict of int to set of str
        What each rank saves; ranks that save nothing are not in it.

    Notes
    -----
    The j-th name of a group, in sorted order, goes to its rank ``group[j % len(group)]``, then to the ones behind it.
    Each distinct group counts for itself.
    """
    found: dict[int, set[str]] = {}
    counters: dict[tuple[int, ...], int] = {}
    for name in sorted(groups):
        for ranks in groups[name]:
            group = tuple(ranks)
            place = counters.get(group, 0)
            counters[group] = place + 1
            for turn in range(keep_redundancy):
                found.setdefault(group[(place + turn) % len(group)], set()).add(name)
    return found
