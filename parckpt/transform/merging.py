"""`merge_sliced_parameter`: one array out of the slices of all devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.strategy import Strategy, TensorStrategy
from parckpt.errors import ConfigError, ConfigKeyError, ConfigTypeError, LayoutError
from parckpt.transform.arguments import explicit, tensor_strategy

__all__ = ["merge_sliced_parameter"]

Array = npt.NDArray[Any]


def merge_sliced_parameter(
    sliced_parameters: list[Any], strategy: Mapping[str, Any] | Strategy | None = None, *, name: str | None = None
) -> Array:
    """Put the slices of one tensor together. Not collective.

    Parameters
    ----------
    sliced_parameters : list
        One slice per device, by rank: arrays, or objects with ``name`` and ``asnumpy()`` (MindSpore's Parameter).
    strategy : mapping or Strategy, optional
        How tensors are cut, by name. None: the slices follow each other along the first dimension.
    name : str, optional
        Which tensor of the strategy it is. Default: the slices' name, or the strategy's only one.

    Returns
    -------
    ndarray
        A new array, of the slices' dtype.

    Raises
    ------
    ConfigTypeError
        The slices are no list, or of another kind.
    ConfigKeyError
        The strategy does not know the tensor.
    ConfigError
        There are none, too few or too many, or their names or shapes differ.
    LayoutError
        Devices that hold the same slice hold different data.
    """
    if not isinstance(sliced_parameters, list):
        raise ConfigTypeError(
            f"sliced_parameters must be a list, not {type(sliced_parameters).__name__}", parameter="sliced_parameters"
        )
    if not sliced_parameters:
        raise ConfigError("sliced_parameters must not be empty", parameter="sliced_parameters")
    if strategy and not isinstance(strategy, (Mapping, Strategy)):
        raise ConfigTypeError(f"strategy must be a mapping, not {type(strategy).__name__}", parameter="strategy")
    slices = [_array(index, element) for index, element in enumerate(sliced_parameters)]
    found = _common_name(sliced_parameters)
    _check_shapes(slices)
    tensors = strategy.tensors if isinstance(strategy, Strategy) else strategy
    if not tensors:
        return np.concatenate(slices)
    name = name or found or (next(iter(tensors)) if len(tensors) == 1 else None)
    if name is None or name not in tensors:
        raise ConfigKeyError(f"the strategy does not know the tensor {name!r}", parameter="strategy")
    return _merge(slices, tensor_strategy(name, tensors[name]))


def _array(index: int, element: Any) -> Array:
    if isinstance(element, np.ndarray):
        return element
    if callable(getattr(element, "asnumpy", None)) and isinstance(getattr(element, "name", None), str):
        return np.asarray(element.asnumpy())
    raise ConfigTypeError(
        f"sliced_parameters must hold arrays or Parameters, not {type(element).__name__} at index {index}",
        parameter="sliced_parameters",
    )


def _common_name(elements: list[Any]) -> str | None:
    names = [getattr(element, "name", None) for element in elements]
    if len(set(names)) > 1:
        raise ConfigError(f"sliced_parameters are of different tensors: {sorted(set(map(str, names)))}")
    return names[0]


def _check_shapes(slices: list[Array]) -> None:
    first = slices[0]
    for index, array in enumerate(slices):
        if array.ndim != first.ndim or array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
            raise ConfigError(
                f"sliced_parameters may differ in their first dimension only: slice 0 is {first.dtype} of shape "
                f"{first.shape}, slice {index} is {array.dtype} of shape {array.shape}",
                parameter="sliced_parameters",
            )


def _merge(slices: list[Array], tensor: TensorStrategy) -> Array:
    if len(slices) != prod(tensor.dev_matrix):
        raise ConfigError(
            f"the strategy is for {prod(tensor.dev_matrix)} devices, but there are {len(slices)} slices",
            parameter="sliced_parameters",
        )
    even = all(array.shape == slices[0].shape for array in slices)
    if not tensor.param_split_shape and not even:
        raise ConfigError("the strategy cuts evenly, but the slices differ in shape", parameter="sliced_parameters")
    if not tensor.param_split_shape and tensor.field > 0:
        return _merge_fields(slices, tensor.field)
    layout = replace(explicit(tensor), param_split_shape=(), field=0).layout()
    if len(layout.parts) > slices[0].ndim:
        raise ConfigError(
            f"the strategy cuts {len(layout.parts)} dimensions, but the slices have {slices[0].ndim}",
            parameter="strategy",
        )
    # A tensor with one element per slice: there the offsets of a rank's box are the number of its slice.
    parts = layout.global_shape((1,) * slices[0].ndim)
    cells: dict[tuple[int, ...], tuple[int, Array]] = {}
    for rank, array in enumerate(slices):
        cell = layout.box(parts, rank).offsets
        known = cells.setdefault(cell, (rank, array))
        _check_replica(known, (rank, array))
    if tensor.param_split_shape:
        _check_lengths(cells, parts, tensor.param_split_shape)
    return _assemble({cell: array for cell, (_, array) in cells.items()}, parts)


def _check_replica(first: tuple[int, Array], second: tuple[int, Array]) -> None:
    (rank_a, a), (rank_b, b) = first, second
    if a.shape != b.shape or a.tobytes() != b.tobytes():
        raise LayoutError(
            f"ranks {rank_a} and {rank_b} hold the same slice, but different data", ranks=[rank_a, rank_b]
        )


def _check_lengths(
    cells: Mapping[tuple[int, ...], tuple[int, Array]], parts: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    if len(lengths) != prod(parts):
        raise ConfigError(
            f"the strategy has {prod(parts)} slices, but lengths for {len(lengths)}", parameter="strategy"
        )
    for length, cell in zip(lengths, product(*map(range, parts)), strict=True):
        rank, array = cells[cell]
        if array.shape[0] != length:
            raise ConfigError(f"the slice of rank {rank} should have {length} rows, but has {array.shape[0]}")


def _assemble(cells: Mapping[tuple[int, ...], Array], parts: tuple[int, ...]) -> Array:
    """Concatenate cells, the last dimension first."""
    found: dict[tuple[int, ...], Array] = dict(cells)
    for axis in reversed(range(len(parts))):
        rows = {cell: [(*cell, k) for k in range(parts[axis])] for cell in product(*map(range, parts[:axis]))}
        found = {cell: np.concatenate([found[part] for part in row], axis=axis) for cell, row in rows.items()}
    merged: Array = found[()].copy()
    return merged


def _merge_fields(slices: list[Array], field: int) -> Array:
    """Each device holds some rows of each field of an embedding table."""
    if slices[0].ndim != 2 or slices[0].shape[0] % field:
        raise ConfigError(
            f"slices of shape {slices[0].shape} are no tables of {field} fields", parameter="sliced_parameters"
        )
    columns = slices[0].shape[1]
    by_field = [array.reshape(field, -1, columns) for array in slices]
    merged: Array = np.concatenate(by_field, axis=1).reshape(-1, columns)
    return merged
