"""Which box of a tensor each rank holds, from the shape of a mesh of ranks and the axes that cut the tensor.

Two notations name the same thing. MindSpore's tensor map counts mesh axes from the right, with -1 for a dimension that
is not cut. JAX's partition spec gives the axis' name, None, or several names. Ranks are numbered row-major over the
mesh in both.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.layout import Box
from parckpt.core.leaves import Leaf, Shard, Spec
from parckpt.errors import ConfigError, ConfigTypeError, LayoutError

__all__ = ["MESH_KEYS", "AxisEntry", "Layout"]

AxisEntry = int | str | None | Sequence[int | str]
"""What cuts one tensor dimension."""

# What a file that describes layouts calls the parameters of `Layout`.
MESH_KEYS = ("mesh_shape", "mesh_axes", "tensor_map", "shard_step", "shard_size", "first_rank")

# A mesh is written down by people and by files that nobody vouches for; groups of ranks are made as arrays.
_MAX_RANKS = 1 << 24


@dataclass(frozen=True, init=False)
class Layout:
    """How a tensor is cut over a mesh of ranks.

    Not collective. Lengths that do not divide evenly are cut as by ``numpy.array_split``: the first parts are one
    longer.

    Parameters
    ----------
    mesh_shape : sequence of int
        Extents of the mesh; its ranks are numbered row-major.
    mesh_axes : sequence of str, optional
        Names of the mesh axes.
    tensor_map : sequence
        What cuts each dimension of the tensor. An int is MindSpore's number of a mesh axis, **counted from the
        right**, or -1 for a dimension that is not cut. A str is the name of an axis, None is not cut, a tuple of names
        or numbers is cut by several axes of which the first is the major one. Dimensions behind the last entry are
        not cut.
    shard_step, shard_size : int
        Optimizer sharding as in MindSpore's strategy files: dimension 0 of each slice is cut once more, among groups
        of `shard_size` of the ranks that hold the slice; 0: it is not, -1: among all of them. Where the number of
        holders cannot be divided by `shard_size` they all keep the whole slice. `shard_step` is kept for the files; it
        decides nothing.
    first_rank : int
        Rank that the mesh begins with (of a pipeline stage).

    Raises
    ------
    LayoutError
        An axis does not exist, or is used twice.
    ConfigError, ConfigTypeError
        For arguments of a wrong kind.

    Examples
    --------
    >>> layout = Layout((2, 4), ("data", "model"), (None, "model"))
    >>> layout.box((1024, 512), rank=5)
    Box(offsets=(0, 128), shape=(1024, 128))
    >>> layout == Layout((2, 4), ("data", "model"), (-1, 0))
    True
    """

    mesh_shape: tuple[int, ...]
    mesh_axes: tuple[str, ...] | None
    cuts: tuple[tuple[int, ...], ...]
    """Mesh axes, from the left, that cut each tensor dimension, the major one first; no empty ones at the end."""
    shard_step: int
    shard_size: int
    first_rank: int

    def __init__(
        self,
        mesh_shape: Sequence[int],
        mesh_axes: Sequence[str] | None = None,
        tensor_map: Sequence[AxisEntry] = (),
        *,
        shard_step: int = 0,
        shard_size: int = 0,
        first_rank: int = 0,
    ) -> None:
        shape = _integers("mesh_shape", mesh_shape, least=1)
        if math.prod(shape) > _MAX_RANKS:
            raise LayoutError(f"a mesh of {math.prod(shape)} ranks is more than {_MAX_RANKS}")
        names = _names(mesh_axes, len(shape))
        if isinstance(tensor_map, (str, bytes)) or not isinstance(tensor_map, Sequence):
            raise ConfigTypeError(
                f"tensor_map must be a sequence, not {type(tensor_map).__name__}", parameter="tensor_map"
            )
        cuts = [_axes_of(entry, len(shape), names) for entry in tensor_map]
        used = [axis for axes in cuts for axis in axes]
        if len(set(used)) != len(used):
            raise LayoutError(f"tensor_map {tuple(tensor_map)!r} uses a mesh axis twice")
        while cuts and not cuts[-1]:
            cuts.pop()
        object.__setattr__(self, "mesh_shape", shape)
        object.__setattr__(self, "mesh_axes", names)
        object.__setattr__(self, "cuts", tuple(cuts))
        object.__setattr__(self, "shard_step", _integer("shard_step", shard_step, 0))
        object.__setattr__(self, "shard_size", _integer("shard_size", shard_size, -1))
        object.__setattr__(self, "first_rank", _integer("first_rank", first_rank, 0))

    @property
    def nranks(self) -> int:
        """Number of ranks of the mesh."""
        return math.prod(self.mesh_shape)

    @property
    def ranks(self) -> range:
        """The ranks of the mesh."""
        return range(self.first_rank, self.first_rank + self.nranks)

    @property
    def tensor_map(self) -> tuple[int | tuple[int, ...], ...]:
        """MindSpore's form: axes counted from the right, -1 for a dimension that is not cut."""
        last = len(self.mesh_shape) - 1
        numbers = [tuple(last - axis for axis in axes) for axes in self.cuts]
        return tuple(found[0] if len(found) == 1 else found or -1 for found in numbers)

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Into how many parts each tensor dimension of `cuts` is cut, without optimizer sharding."""
        return tuple(math.prod(self.mesh_shape[axis] for axis in axes) for axes in self.cuts)

    @property
    def holders(self) -> int:
        """How many ranks hold each slice, without optimizer sharding."""
        return self.nranks // math.prod(self.parts)

    @property
    def wanted_parts(self) -> int:
        """Into how many parts `shard_size` asks to cut each slice; 0 for none."""
        return self.holders if self.shard_size < 0 else self.shard_size

    @cached_property
    def optimizer_parts(self) -> int:
        """Into how many parts dimension 0 of each slice is cut once more."""
        wanted = self.wanted_parts
        return wanted if wanted > 0 and self.holders % wanted == 0 else 1

    def box(self, global_shape: Sequence[int], rank: int) -> Box:
        """Return the box of a tensor that a rank holds; it may be empty.

        Raises
        ------
        LayoutError
            If the rank is not one of the mesh, or the tensor has fewer dimensions than are cut.
        """
        shape = self._checked(global_shape)
        coordinates = self._coordinates(rank)
        ranges = [(0, length) for length in shape]
        for dimension, axes in enumerate(self.cuts):
            ranges[dimension] = _part(ranges[dimension], self.parts[dimension], self._index(axes, coordinates))
        if shape and self.optimizer_parts > 1:
            place = self._index(self._free_axes, coordinates) % self.optimizer_parts
            ranges[0] = _part(ranges[0], self.optimizer_parts, place)
        return Box(tuple(first for first, _ in ranges), tuple(last - first for first, last in ranges))

    def local_shape(self, global_shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """Return the shape of what a rank holds."""
        return self.box(global_shape, rank).shape

    def global_shape(self, local_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a tensor that is cut evenly into pieces of one shape."""
        shape = list(self._checked(local_shape))
        for dimension, count in enumerate(self.parts):
            shape[dimension] *= count
        if shape:
            shape[0] *= self.optimizer_parts
        return tuple(shape)

    def shard(self, data: np.ndarray[Any, Any] | Leaf, global_shape: Sequence[int], rank: int) -> Shard:
        """Return a rank's piece of a tensor as a `Shard`.

        Raises
        ------
        LayoutError
            If `data` has another shape than the rank's box.
        """
        box = self.box(global_shape, rank)
        if tuple(data.shape) != box.shape:
            raise LayoutError(
                f"rank {rank} holds a piece of shape {box.shape} of a tensor of shape {tuple(global_shape)}, but its "
                f"data has shape {tuple(data.shape)}",
                expected=box.shape,
                found=tuple(data.shape),
            )
        return Shard(data, tuple(global_shape), box.offsets)

    def spec(self, global_shape: Sequence[int], dtype: Any, rank: int) -> Spec:
        """Return a rank's piece of a tensor as something that `restore` allocates."""
        box = self.box(global_shape, rank)
        return Spec(box.shape, dtype, tuple(global_shape), box.offsets)

    @property
    def holder_stride(self) -> int:
        """Distance in ranks between neighbours in the list of a slice's holders; MindSpore calls it the step."""
        behind = max((axis for axis in self._free_axes if self.mesh_shape[axis] > 1), default=len(self.mesh_shape) - 1)
        return math.prod(self.mesh_shape[behind + 1 :])

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Return the groups of ranks that hold the same box.

        Ranks ascend in a group. Groups come in MindSpore's order: by their coordinates on the mesh axes that cut the
        tensor, the last axis first, and then by their place in the optimizer sharding.
        """
        slices = _slice_groups(self.mesh_shape, [axis for axes in self.cuts for axis in axes]) + self.first_rank
        return tuple(group for ranks in slices.tolist() for group in _interleave(ranks, self.optimizer_parts))

    @cached_property
    def _free_axes(self) -> tuple[int, ...]:
        used = {axis for axes in self.cuts for axis in axes}
        return tuple(axis for axis in range(len(self.mesh_shape)) if axis not in used)

    def _coordinates(self, rank: int) -> tuple[int, ...]:
        if rank not in self.ranks:
            raise LayoutError(
                f"rank {rank} is not one of the {self.nranks} ranks from {self.first_rank} of the mesh "
                f"{self.mesh_shape}",
                ranks=[rank],
            )
        left = operator.index(rank) - self.first_rank
        found: list[int] = []
        for extent in reversed(self.mesh_shape):
            left, coordinate = divmod(left, extent)
            found.insert(0, coordinate)
        return tuple(found)

    def _index(self, axes: Sequence[int], coordinates: Sequence[int]) -> int:
        """Row-major number of the coordinates on some axes."""
        found = 0
        for axis in axes:
            found = found * self.mesh_shape[axis] + coordinates[axis]
        return found

    def _checked(self, shape: Sequence[int]) -> tuple[int, ...]:
        found = _integers("shape", shape, least=0)
        if len(found) < len(self.cuts):
            raise LayoutError(
                f"a tensor of shape {found} has {len(found)} dimensions, but the layout cuts {len(self.cuts)}: "
                f"tensor_map {self.tensor_map}"
            )
        return found


def _slice_groups(mesh_shape: Sequence[int], used: Sequence[int]) -> npt.NDArray[np.int64]:
    """Group the ranks of a mesh by their coordinates on the `used` axes (counted from the left).

    Returns
    -------
    int64 array of shape (groups, ranks per group)
        Ranks from 0, ascending in each group. Groups are sorted by their coordinates, those on the last axis first.
    """
    cells = np.arange(math.prod(mesh_shape), dtype=np.int64).reshape(tuple(mesh_shape))
    major = sorted(set(used), reverse=True)
    free = [axis for axis in range(len(mesh_shape)) if axis not in major]
    count = math.prod(mesh_shape[axis] for axis in major)
    found: npt.NDArray[np.int64] = cells.transpose([*major, *free]).reshape(count, -1)
    return found


def _interleave(ranks: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Deal ranks out to `count` groups in turn: MindSpore's optimizer sharding."""
    return [tuple(ranks[first::count]) for first in range(count)]


def _part(span: tuple[int, int], count: int, index: int) -> tuple[int, int]:
    """Cut a range as `numpy.array_split` does."""
    first, last = span
    length, longer = divmod(last - first, count)
    start = first + index * length + min(index, longer)
    return start, start + length + (index < longer)


def _axes_of(entry: AxisEntry, ndim: int, names: tuple[str, ...] | None) -> tuple[int, ...]:
    """Mesh axes, from the left, that an entry of a tensor map names."""
    if isinstance(entry, (tuple, list)):
        return tuple(axis for part in entry for axis in _axes_of(_single(part), ndim, names))
    if entry is None:
        return ()
    if isinstance(entry, str):
        if names is None:
            raise ConfigError(f"tensor_map names the axis {entry!r}, but there are no mesh_axes", parameter="mesh_axes")
        if entry not in names:
            near = difflib.get_close_matches(entry, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LayoutError(f"tensor_map: there is no mesh axis {entry!r} among {', '.join(names)}{hint}")
        return (names.index(entry),)
    number = _integer("tensor_map", entry, -1)
    if number >= ndim:
        raise LayoutError(f"tensor_map: axis {number} from the right does not exist in a mesh of {ndim} dimensions")
    return () if number < 0 else (ndim - 1 - number,)


def _single(part: Any) -> AxisEntry:
    if part is None or isinstance(part, (tuple, list)):
        raise ConfigTypeError(f"tensor_map: a tuple holds names or numbers, not {part!r}", parameter="tensor_map")
    found: AxisEntry = part
    return found


def _names(given: Sequence[str] | None, ndim: int) -> tuple[str, ...] | None:
    if given is None:
        return None
    names = tuple(given) if not isinstance(given, str) else (given,)
    if not all(isinstance(name, str) for name in names):
        raise ConfigTypeError(f"mesh_axes must hold str, not {names!r}", parameter="mesh_axes")
    if len(names) != ndim or len(set(names)) != ndim:
        raise ConfigError(f"mesh_axes {names} must be {ndim} different names, one per mesh axis", parameter="mesh_axes")
    return names


def _integers(name: str, given: Any, least: int) -> tuple[int, ...]:
    if isinstance(given, (str, bytes)) or not isinstance(given, (Sequence, np.ndarray)):
        raise ConfigTypeError(f"{name} must be a sequence of integers, not {type(given).__name__}", parameter=name)
    return tuple(_integer(name, value, least) for value in given)


def _integer(name: str, given: Any, least: int) -> int:
    try:
        if isinstance(given, (bool, np.bool_)):
            raise TypeError
        number = operator.index(given)
    except TypeError:
        raise ConfigTypeError(f"{name}: {given!r} is not an integer", parameter=name) from None
    if number < least:
        raise ConfigError(f"{name}: {number} is less than {least}", parameter=name)
    return number
