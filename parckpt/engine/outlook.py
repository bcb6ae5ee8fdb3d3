"""What saves of a job would come to: bytes by rank and node, and seconds, in each of the ways to save. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parckpt.core.describe import Description
from parckpt.core.plan import SavePlan, plan_save

__all__ = ["WAYS", "Outlook", "Speed", "Way", "look_ahead"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Way:
    """One way to save, by the options of `CheckpointConfig`."""

    name: str
    options: str
    integrated: bool = False
    remove_redundancy: bool = False


WAYS = (
    Way("integrated", "integrated_save=True", integrated=True),
    Way("per rank", "integrated_save=False"),
    Way("without redundancy", "remove_redundancy=True", remove_redundancy=True),
)


@dataclass(frozen=True)
class Speed:
    """How fast can be written, in bytes per second; None: not known.

    Attributes
    ----------
    node : float or None
        One node, however many of its ranks write.
    total : float or None
        All nodes together.
    """

    node: float | None = None
    total: float | None = None

    def seconds(self, fullest_node: int, everything: int) -> float | None:
        """The time to write, where nodes write at once and the fullest one is the last."""
        times = [fullest_node / self.node] if self.node else []
        times += [everything / self.total] if self.total else []
        return max(times, default=None)


@dataclass(frozen=True, eq=False)
class Outlook:
    """One way to save one state.

    Attributes
    ----------
    plan : SavePlan
    rank_nbytes : int64 array
        Bytes of tensors that each rank provides: writes, or, for an integrated file, sends to rank 0 that writes it.
    written_by_node : int64 array
        Bytes that each node writes.
    """

    way: Way
    plan: SavePlan
    rank_nbytes: Ints
    written_by_node: Ints

    @property
    def nfiles(self) -> int:
        """Data files."""
        return 1 if self.way.integrated else self.plan.world_size

    @property
    def nbytes(self) -> int:
        """Bytes of tensors written in all."""
        return int(self.rank_nbytes.sum())

    @property
    def fullest_rank(self) -> int:
        """The most that one rank writes."""
        return self.nbytes if self.way.integrated else int(self.rank_nbytes.max())

    @property
    def fullest_node(self) -> int:
        """The most that one node writes."""
        return int(self.written_by_node.max())


def look_ahead(
    descriptions: Sequence[Description],
    rank_description: Ints,
    ranks_per_node: int,
    way: Way,
    *,
    split_replicas: bool = True,
    ownership: str = "parckpt",
) -> Outlook:
    """Plan a save, as the job itself would.

    Parameters
    ----------
    descriptions, rank_description
        As of `plan_save`.
    ranks_per_node : int
        Ranks are numbered node by node.

    Raises
    ------
    LayoutError
        If the layouts leave gaps or overlap.
    """
    nodes = np.arange(len(rank_description)) // ranks_per_node
    plan = plan_save(
        descriptions,
        rank_description,
        nodes,
        integrated=way.integrated,
        remove_redundancy=way.remove_redundancy,
        split_replicas=split_replicas,
        ownership=ownership,
    )
    load = plan.load()
    written = np.zeros(int(nodes[-1]) + 1, np.int64)
    if way.integrated:
        written[0] = load.sum()
    else:
        np.add.at(written, nodes, load)
    return Outlook(way, plan, load, written)
