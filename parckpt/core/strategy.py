"""MindSpore's parallel strategy files as a model: for each tensor the mesh of devices and the axes that cut it.

The files leave out the tensors' shapes, the first rank of a pipeline stage and everything about the rank that reads
them; what is known of those follows from the rank files they belong to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from parckpt.core.mesh import Layout
from parckpt.errors import LayoutError

__all__ = ["Operator", "Strategy", "TensorStrategy", "split_stage"]

_STAGED = re.compile(r"(\d{1,9})-(.+)", re.DOTALL)


@dataclass(frozen=True)
class TensorStrategy:
    """How one tensor is cut; the fields of a strategy file.

    Attributes
    ----------
    dev_matrix : tuple of int
        Extents of the mesh of devices.
    tensor_map : tuple of int or of tuple of int
        For each dimension the mesh axis, counted from the right, that cuts it, -1, or several axes, major first.
    param_split_shape, indices_offset : tuple of int
        Lengths and offsets of uneven pieces; empty when pieces are even.
    field : int
        Number of fields that each row of an embedding table has.
    opt_weight_shard_step, opt_weight_shard_size : int
        Optimizer sharding; see `Layout`.
    """

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[int | tuple[int, ...], ...]
    param_split_shape: tuple[int, ...] = ()
    indices_offset: tuple[int, ...] = ()
    field: int = 0
    opt_weight_shard_step: int = 0
    opt_weight_shard_size: int = 0

    def layout(self, first_rank: int = 0) -> Layout:
        """Return the layout of the tensor over ranks from `first_rank`.

        Raises
        ------
        LayoutError
            If the tensor is cut unevenly or by fields, which nothing here can put together.
        """
        if self.param_split_shape or self.field > 0:
            raise LayoutError("a tensor that is cut unevenly, or by the fields of an embedding, cannot be put together")
        # Both numbers are needed: MindSpore's tools read a step of 0 as "not cut", whatever the size.
        is_cut = self.opt_weight_shard_step > 0 and self.opt_weight_shard_size != 0
        return Layout(
            self.dev_matrix,
            None,
            self.tensor_map,
            shard_step=self.opt_weight_shard_step if is_cut else 0,
            shard_size=self.opt_weight_shard_size if is_cut else 0,
            first_rank=first_rank,
        )

    @classmethod
    def of(cls, layout: Layout, ndim: int) -> TensorStrategy:
        """Return what a strategy file says of a tensor of `ndim` dimensions that is cut by a layout."""
        entries = layout.tensor_map
        size = layout.optimizer_parts
        return cls(
            layout.mesh_shape,
            (*entries, *(-1,) * (ndim - len(entries))),
            opt_weight_shard_step=layout.holder_stride if size > 1 else 0,
            opt_weight_shard_size=size if size > 1 else 0,
        )


@dataclass(frozen=True)
class Operator:
    """How an operator's inputs are cut: kept so that a strategy file survives a round trip."""

    node_name: str
    stage: int
    strategies: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Strategy:
    """A strategy file.

    Attributes
    ----------
    tensors : mapping of str to TensorStrategy
        By the names in the file, which begin with ``<stage>-`` when stages were merged; in the file's order.
    current_stage : int
        A counter of MindSpore's; 1 in merged files.
    operators : tuple of Operator
    """

    tensors: Mapping[str, TensorStrategy]
    current_stage: int = 1
    operators: tuple[Operator, ...] = ()

    @property
    def is_merged(self) -> bool:
        """Whether names carry the pipeline stage."""
        return bool(self.tensors) and all(_STAGED.fullmatch(name) for name in self.tensors)

    @property
    def stage(self) -> int:
        """Pipeline stage of a file that was not merged."""
        return self.operators[0].stage if self.operators else 0

    @cached_property
    def stages(self) -> Mapping[str, Mapping[int, TensorStrategy]]:
        """For each tensor, by its own name, the stages that hold it, ascending, and how they cut it."""
        found: dict[str, dict[int, TensorStrategy]] = {}
        for full, tensor in self.tensors.items():
            stage, name = split_stage(full) if self.is_merged else (self.stage, full)
            found.setdefault(name, {})[stage] = tensor
        return {name: dict(sorted(stages.items())) for name, stages in found.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, without stages."""
        return tuple(self.stages)

    @cached_property
    def stage_nranks(self) -> int:
        """Ranks of one pipeline stage.

        Raises
        ------
        LayoutError
            If tensors lie on meshes of different size, or there are none.
        """
        counts = {name: math.prod(tensor.dev_matrix) for name, tensor in self.tensors.items()}
        if not counts:
            raise LayoutError("the strategy names no tensors")
        first = next(iter(counts))
        for name, count in counts.items():
            if count != counts[first]:
                raise LayoutError(
                    f"{first!r} lies on {counts[first]} devices and {name!r} on {count}: all must lie on equally many",
                    tensor=name,
                )
        return counts[first]

    @cached_property
    def nstages(self) -> int:
        """Number of pipeline stages.

        Raises
        ------
        LayoutError
            If a merged file lacks one.
        """
        if not self.is_merged:
            return 1
        found = sorted({stage for stages in self.stages.values() for stage in stages})
        if found != list(range(len(found))):
            raise LayoutError(f"the strategy has the pipeline stages {found}: some are missing")
        return len(found)

    @property
    def ranks(self) -> range:
        """The ranks that the strategy speaks of: all, or those of its stage in a file that was not merged."""
        first = 0 if self.is_merged else self.stage * self.stage_nranks
        return range(first, first + self.nranks)

    @property
    def nranks(self) -> int:
        """Number of ranks, of all stages in the file."""
        return self.nstages * self.stage_nranks

    def layouts(self, name: str) -> tuple[Layout, ...]:
        """Return the layouts of a tensor, one for each stage that holds it; none if it is not in the strategy.

        Raises
        ------
        LayoutError
            As `TensorStrategy.layout` and `Layout` do, with the tensor's name.
        """
        stages = self.stages.get(name, {})
        try:
            return tuple(tensor.layout(stage * self.stage_nranks) for stage, tensor in stages.items())
        except LayoutError as error:
            raise LayoutError(f"{name!r}: {error.message}", tensor=name) from error

    def layout(self, name: str) -> Layout | None:
        """Return the layout of a tensor in the first stage that holds it; None if it is not in the strategy."""
        found = self.layouts(name)
        return found[0] if found else None


def split_stage(name: str) -> tuple[int, str]:
    """Split ``<stage>-<name>``; stage 0 where there is none."""
    match = _STAGED.fullmatch(name)
    return (int(match[1]), match[2]) if match else (0, name)
