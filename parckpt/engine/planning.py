"""From what the ranks hold to one plan that all of them know, kept while nothing changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from parckpt.core.contents import BoxColumns
from parckpt.core.crc import crc32
from parckpt.core.describe import PER_RANK, unpack
from parckpt.core.layout import Box, whole
from parckpt.core.manifest import CHUNK_NBYTES
from parckpt.core.plan import SavePlan, plan_save
from parckpt.core.tensors import TensorRow
from parckpt.engine.group import Group
from parckpt.engine.local import LocalState
from parckpt.errors import LayoutError

__all__ = ["Planned", "check_replicas", "make_plan", "node_numbers"]


@dataclass(frozen=True)
class Planned:
    """A plan and what follows from it, equal on all ranks but for ``digest``.

    Attributes
    ----------
    digest : bytes
        Of this rank's description when the plan was made.
    per_rank_values : tuple of (str, int)
        Plain values that belong to one rank: name and rank.
    """

    save: SavePlan
    digest: bytes
    per_rank_values: tuple[tuple[str, int], ...]

    @cached_property
    def tensors(self) -> tuple[TensorRow, ...]:
        """All tensors, as rows."""
        return tuple(self.save.tensors)

    @cached_property
    def hash(self) -> str:
        """The plan's hash, in hexadecimal."""
        return self.save.hash.hex()

    @cached_property
    def stored_boxes(self) -> BoxColumns:
        """The boxes the files will hold: what each rank writes, or whole tensors in one integrated file."""
        if self.save.integrated:
            count = len(self.tensors)
            dims = [d for t in self.tensors for d in (*(0,) * len(t.global_shape), *t.global_shape)]
            return BoxColumns(np.arange(count, dtype="<u4"), np.zeros(count, "<u4"), np.array(dims, "<i8"))
        plan = self.save
        offsets, shapes = plan.piece_offsets[plan.row_piece], plan.piece_shapes[plan.row_piece]
        ndim = plan.tensors.ndim[plan.box_tensor].astype(np.int64)[:, None]
        used = np.arange(offsets.shape[1])[None, :] < ndim
        dims = np.concatenate([offsets, shapes], axis=1)[np.concatenate([used, used], axis=1)]
        return BoxColumns(plan.box_tensor.astype("<u4"), plan.box_rank.astype("<u4"), dims.astype("<i8"))

    def whole_tensors(self) -> list[tuple[TensorRow, Box]]:
        """What an integrated file holds, in order."""
        return [(tensor, whole(tensor.global_shape)) for tensor in self.tensors]

    def nbytes(self) -> int:
        """Bytes of tensors that will be written."""
        return int(self.save.load().sum())


def node_numbers(group: Group) -> npt.NDArray[np.int64]:
    """Number the nodes: for each rank the index of its memory domain. Collective."""
    names = group.allgather(group.comm.node().encode("utf-8"))
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def make_plan(
    group: Group,
    local: LocalState,
    nodes: npt.NDArray[np.int64],
    *,
    integrated: bool,
    remove_redundancy: bool,
    split_replicas: bool,
    ownership: str = "parckpt",
) -> Planned:
    """Exchange descriptions and plan. Collective.

    Raises
    ------
    LayoutError
        The same on all ranks: what follows from equal input needs no exchange.
    """
    distinct, index = group.allgather_distinct(local.description)
    descriptions = [unpack(data) for data in distinct]
    plan = plan_save(
        descriptions,
        index,
        nodes,
        integrated=integrated,
        remove_redundancy=remove_redundancy,
        split_replicas=split_replicas,
        ownership=ownership,
    )
    own = [
        [name for name, flag in zip(d.value_names, d.value_flags.tolist(), strict=True) if flag & PER_RANK]
        for d in descriptions
    ]
    per_rank = tuple((name, rank) for rank, which in enumerate(index.tolist()) for name in own[which])
    return Planned(plan, local.digest, per_rank)


def check_replicas(group: Group, local: LocalState, planned: Planned) -> None:
    """Compare the checksums of everything that several ranks hold alike. Collective.

    A user who forgets `Shard` hands in equal-shaped but different pieces, of which all but one would be lost.

    Raises
    ------
    LayoutError
        The same on all ranks, naming the first tensor or value that differs and two ranks.
    """
    error: Exception | None = None
    report = b""
    try:
        report = _report(local, planned, group.rank)
    except Exception as problem:  # a Leaf's read_into is user code; its error must wait for the agreement
        error = problem
    group.agree(error)
    reports = group.allgather(report)
    difference = _first_difference(planned, reports)
    if difference is not None:
        name, first, second = difference
        raise LayoutError(
            f"{name!r} differs between ranks {first} and {second}: wrap it in Shard if they hold parts of one tensor, "
            "or in PerRank if each rank has its own",
            tensor=name,
            ranks=[first, second],
        )


def _report(local: LocalState, planned: Planned, rank: int) -> bytes:
    """Checksums of this rank's replicas in the plan's order (4 bytes each), then digests of its values as JSON."""
    crcs = np.zeros(0, "<u4")
    held = planned.save.replicas_of(rank)
    if held:
        crcs = np.array([_crc(local, planned.tensors[one.tensor], one.box) for one in held], "<u4")
    digests = {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()[:16]
        for name, value in local.shared_values().items()
    }
    return len(crcs).to_bytes(8, "little") + crcs.tobytes() + json.dumps(digests).encode("utf-8")


def _crc(local: LocalState, tensor: TensorRow, box: Box) -> int:
    source = local.source(tensor.name, box)
    crc = 0
    for block in source.blocks(box, CHUNK_NBYTES):
        crc = crc32(block, crc)
    source.release()
    return crc


def _first_difference(planned: Planned, reports: list[bytes]) -> tuple[str, int, int] | None:
    counts = [int.from_bytes(report[:8], "little") for report in reports]
    crcs: list[Iterator[int]] = [
        iter(np.frombuffer(report, "<u4", count, 8).tolist()) for report, count in zip(reports, counts, strict=True)
    ]
    for replica in planned.save.replicas():
        ranks = planned.save.holders(replica).tolist()
        found = [next(crcs[rank]) for rank in ranks]
        for rank, crc in zip(ranks[1:], found[1:], strict=True):
            if crc != found[0]:
                return planned.tensors[replica.tensor].name, ranks[0], rank
    first: dict[str, tuple[int, str]] = {}
    for rank, (report, count) in enumerate(zip(reports, counts, strict=True)):
        for name, digest in json.loads(report[8 + 4 * count :]).items():
            seen = first.setdefault(name, (rank, digest))
            if seen[1] != digest:
                return name, seen[0], rank
    return None
