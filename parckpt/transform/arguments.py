"""What the arguments of the transform functions may be, in MindSpore's order and with its classes of errors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from parckpt.core.checks import count, text
from parckpt.core.mesh import Layout
from parckpt.core.redistribution import Cut
from parckpt.core.strategy import Strategy, TensorStrategy
from parckpt.errors import ConfigError, ConfigTypeError, LayoutError
from parckpt.storage.filesystem import FileSystem
from parckpt.strategies import load_strategy

__all__ = [
    "StrategyLike",
    "cut_of",
    "explicit",
    "path_text",
    "processes",
    "safe_path",
    "strategy_of",
    "tensor_strategy",
]

StrategyLike = str | os.PathLike[str] | Strategy | Mapping[str, Any] | None
"""A strategy file, a strategy, or for each name what `tensor_strategy` takes."""

_UNSAFE = ("..", "//", "~", "./.")


def strategy_of(parameter: str, given: StrategyLike, fs: FileSystem) -> Strategy | None:
    """Return the strategy that an argument means; None stays None, tensors that are not cut.

    Raises
    ------
    ConfigError, FormatError
        The file is not there, or is none.
    ConfigTypeError
        For anything else.
    LayoutError
        A tensor's mesh is too large to be one, or its map uses axes that the mesh has not, or one twice.
    """
    if given is None:
        return None
    if isinstance(given, Strategy):
        found = given
    elif isinstance(given, Mapping):
        found = Strategy({text(parameter, name): tensor_strategy(name, value) for name, value in given.items()})
    elif isinstance(given, (str, os.PathLike)):
        found = load_strategy(given, filesystem=fs)
    else:
        raise ConfigTypeError(
            f"{parameter} must be the name of a strategy file, a Strategy or a mapping, not {type(given).__name__}",
            parameter=parameter,
        )
    if not found.tensors:
        raise ConfigError(f"{parameter}: the strategy names no tensors", parameter=parameter)
    return replace(found, tensors={name: explicit(_possible(name, one)) for name, one in found.tensors.items()})


def tensor_strategy(name: str, given: Any) -> TensorStrategy:
    """Return how one tensor is cut, from any of the forms in use.

    Parameters
    ----------
    given : TensorStrategy, Layout, sequence, or MindSpore's message
        A sequence begins with device matrix, tensor map, split shape and field, as MindSpore's layouts of a network.
    """
    return _possible(name, _any_form(name, given))


def _any_form(name: str, given: Any) -> TensorStrategy:
    if isinstance(given, TensorStrategy):
        return given
    if isinstance(given, Layout):
        return TensorStrategy.of(given, len(given.tensor_map))
    try:
        if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
            return _of_sequence(given)
        maps = [tuple(entry.dim) for entry in given.tensor_map]
        nested = len(maps) > 1
        return TensorStrategy(
            tuple(given.dev_matrix[0].dim),
            tuple(entry for entry in maps if entry) if nested else maps[0],
            tuple(given.param_split_shape[0].dim) if given.param_split_shape else (),
            field=int(given.field),
            opt_weight_shard_step=int(given.opt_weight_shard_step),
            opt_weight_shard_size=int(given.opt_weight_shard_size),
        )
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"the strategy of {name!r} is none: {given!r}", parameter=name) from error


def _of_sequence(given: Sequence[Any]) -> TensorStrategy:
    mesh, tensor_map, *rest = given
    if len(rest) < 2:
        raise ValueError("too short")
    entries = tuple(tuple(entry) if isinstance(entry, (list, tuple)) else int(entry) for entry in tensor_map)
    # Behind the field, layouts of a network have other things (a flag, a group's name) than those of a file.
    if len(rest) > 3 and isinstance(rest[3], str) and rest[3]:
        raise ValueError(f"the optimizer shard group {rest[3]!r} has a name only: say the ranks by a TensorStrategy")
    sharding = tuple(rest[2:4]) if len(rest) > 3 and not isinstance(rest[3], str) else (0, 0)
    split = rest[0] if len(rest) > 3 and not isinstance(rest[3], str) else ()
    return TensorStrategy(
        tuple(int(extent) for extent in mesh),
        entries,
        tuple(split or ()),
        field=int(rest[1]),
        opt_weight_shard_step=int(sharding[0]),
        opt_weight_shard_size=int(sharding[1]),
    )


def _possible(name: str, tensor: TensorStrategy) -> TensorStrategy:
    """The same; LayoutError, before anything is counted by it, if there can be no such mesh and map."""
    try:
        Layout(tensor.dev_matrix, None, tensor.tensor_map)
    except LayoutError as error:
        raise LayoutError(f"{name!r}: {error.message}", tensor=name) from error
    return tensor


def explicit(tensor: TensorStrategy) -> TensorStrategy:
    """Say the number of optimizer shards where -1 stands for all holders of a slice, as MindSpore's tools read it."""
    if tensor.opt_weight_shard_size != -1:
        return tensor
    axes = [axis for entry in tensor.tensor_map for axis in (entry if isinstance(entry, tuple) else (entry,))]
    cut = prod(tensor.dev_matrix[len(tensor.dev_matrix) - 1 - axis] for axis in axes if axis >= 0)
    return replace(tensor, opt_weight_shard_size=prod(tensor.dev_matrix) // cut)


def cut_of(tensor: TensorStrategy) -> Cut:
    """Return the form that `needed_ranks` takes."""
    axes = tuple(entry if isinstance(entry, tuple) else (entry,) for entry in tensor.tensor_map)
    return Cut(tensor.dev_matrix, axes, tensor.opt_weight_shard_step, tensor.opt_weight_shard_size)


def path_text(parameter: str, given: Any) -> str:
    """Return a path as text; blank ones are refused."""
    found = text(parameter, os.fspath(given) if isinstance(given, os.PathLike) else given)
    if not found.strip():
        raise ConfigError(f"{parameter} must not be blank", parameter=parameter)
    return found


def safe_path(parameter: str, given: str) -> str:
    """Refuse paths that lead elsewhere than they seem to."""
    found = next((part for part in _UNSAFE if part in given), None)
    if found is not None or re.fullmatch(r"\s*", given):
        raise ConfigError(f"{parameter} must not contain {found or 'only blanks'!r}: {given!r}", parameter=parameter)
    return given


def processes(parameter: str, given: Any) -> int:
    """MindSpore's number of processes. Here MPI ranks share the work, so it is checked and has no effect."""
    return int(count(parameter, given, least=1))
