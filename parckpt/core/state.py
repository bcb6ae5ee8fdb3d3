"""From the nested state a user hands in to flat lists of tensors and plain values, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parckpt.core import dtypes
from parckpt.core.adapting import as_leaf, as_mapping
from parckpt.core.dtypes import DType
from parckpt.core.flat import Builder, FlatState, LocalPiece, TensorLeaf, ValueLeaf
from parckpt.core.leaves import Leaf, OnResize, PerRank, Shard, Spec, plain_array
from parckpt.core.values import is_plain, is_scalar
from parckpt.errors import ConfigError, ConfigTypeError, LayoutError

__all__ = ["FlatState", "LocalPiece", "State", "TensorLeaf", "ValueLeaf", "flatten"]

State = Mapping[str, Any] | Callable[[], Mapping[str, Any]]

# Flattening and rebuilding use one call per level; deeper than this it is a structure that holds itself.
_MAX_DEPTH = 64


def flatten(state: State, *, writable: bool) -> FlatState:
    """List the leaves of a state, with their names joined by ".".

    Not collective. Calls `state` if it is a callable.

    Parameters
    ----------
    state : mapping, callable, or a framework's network
        See the user documentation for what it may hold.
    writable : bool
        True if the leaves are to be restored into: read-only arrays, and Leafs without `write_from`, are refused, and
        Specs accepted. For saving it is the other way round.

    Raises
    ------
    ConfigError, ConfigTypeError
        Naming the leaf.
    LayoutError
        If Shards given as one tensor disagree about its shape or type.
    """
    nested = _nested(state)
    if not isinstance(nested, Mapping):
        raise ConfigTypeError(f"the state must be a mapping or a callable that returns one, not {_kind(nested)}")
    collector = _Collector(writable)
    build = collector.mapping(nested, _Place())
    return FlatState(tuple(collector.tensors), tuple(collector.values), build)


def _nested(state: Any) -> Any:
    """The mapping that a state is or returns. A network comes first: calling one would compute with it."""
    for _ in range(2):
        if isinstance(state, Mapping):
            return state
        network = as_mapping(state)
        if network is not None:
            return network
        if not callable(state):
            break
        state = state()
    return state


@dataclass(frozen=True)
class _Place:
    """Where in the nested state the walk is."""

    path: tuple[str, ...] = ()
    above: tuple[int, ...] = ()
    per_rank: bool = False
    on_resize: OnResize = "error"
    container: Any = None
    key: Any = None
    wrapped: bool = False  # directly in a PerRank, which then is what the container holds

    @property
    def name(self) -> str:
        return ".".join(self.path)

    def inside(self, holder: Any, key: Any, text: str) -> _Place:
        container = holder if isinstance(holder, (MutableMapping, MutableSequence)) else None
        above = (*self.above, id(holder))
        return replace(self, path=(*self.path, text), above=above, container=container, key=key, wrapped=False)


class _Collector:
    """One walk over a nested state."""

    def __init__(self, writable: bool) -> None:
        self.writable = writable
        self.tensors: list[TensorLeaf] = []
        self.values: list[ValueLeaf] = []
        self.paths: dict[str, tuple[str, ...]] = {}

    def visit(self, value: Any, place: _Place) -> Builder:
        if isinstance(value, PerRank):
            return self.per_rank(value, place)
        if isinstance(value, (np.ndarray, Leaf, Shard, Spec)):
            return self.tensor([value], place, several=False)
        if is_scalar(value):
            return self.value(value, place)
        if isinstance(value, Mapping):
            return self.mapping(value, place)
        if isinstance(value, (list, tuple)):
            if value and all(_is_boxed(item) for item in value):
                return self.tensor(list(value), place, several=True)
            return self.value(value, place) if is_plain(value) else self.sequence(value, place)
        if self.adapted(value, place):
            # A restored state holds the framework's object itself: it was filled in place.
            return lambda arrays, values: value
        raise ConfigTypeError(
            f"{place.name!r} is of type {_kind(value)}, which cannot be saved: expected a numpy array, a parckpt "
            "Shard, PerRank or Leaf, a plain value (int, float, bool, str, None, bytes), or a mapping or list of them"
        )

    def adapted(self, value: Any, place: _Place) -> bool:
        """Take a framework's array or network; False if it is none."""
        leaf = as_leaf(value)
        if leaf is not None:
            self.tensor([leaf], place, several=False)
            return True
        network = as_mapping(value)
        if network is not None:
            self.mapping(network, place)
        return network is not None

    def mapping(self, value: Mapping[Any, Any], place: _Place) -> Builder:
        self.check_depth(value, place)
        parts = [(key, self.visit(item, place.inside(value, key, _key(key, place)))) for key, item in value.items()]
        return lambda arrays, values: {key: build(arrays, values) for key, build in parts}

    def sequence(self, value: Sequence[Any], place: _Place) -> Builder:
        self.check_depth(value, place)
        parts = [self.visit(item, place.inside(value, index, str(index))) for index, item in enumerate(value)]
        make = getattr(type(value), "_make", list if isinstance(value, list) else tuple)  # named tuples stay so
        return lambda arrays, values: make([build(arrays, values) for build in parts])

    def per_rank(self, value: PerRank, place: _Place) -> Builder:
        if place.per_rank:
            raise ConfigError(f"{place.name!r} is a PerRank within a PerRank")
        return self.visit(value.value, replace(place, per_rank=True, on_resize=value.on_resize, wrapped=True))

    def value(self, value: Any, place: _Place) -> Builder:
        name = self.claim(place)
        self.values.append(
            ValueLeaf(name, value, place.per_rank, place.on_resize, place.container, place.key, place.wrapped)
        )
        return lambda arrays, values: values.get(name, value)

    def tensor(self, items: list[Any], place: _Place, *, several: bool) -> Builder:
        name = self.claim(place)
        boxed = _is_boxed(items[0])
        if boxed and place.per_rank:
            raise ConfigError(f"{name!r} is a Shard within a PerRank: a Shard is a part of what all ranks share")
        pieces = tuple(self.piece(item, name) for item in items)
        kinds = {(_dtype(item, name).name, _global_shape(item)) for item in items}
        if len(kinds) > 1:
            raise LayoutError(f"the Shards of {name!r} disagree about its type or global shape: {sorted(kinds)}")
        self.tensors.append(
            TensorLeaf(
                name,
                _dtype(items[0], name),
                _global_shape(items[0]),
                pieces,
                split=boxed,
                several=several,
                per_rank=place.per_rank,
                on_resize=place.on_resize,
            )
        )
        kept = items if several else items[0]
        return lambda arrays, values: arrays.get(name, kept)

    def piece(self, item: Any, name: str) -> LocalPiece:
        if isinstance(item, Spec):
            if not self.writable:
                raise ConfigError(f"{name!r} is a Spec: that has nothing to save, it is for restoring")
            return LocalPiece(item.offsets, item.shape, None)
        source = item.data if isinstance(item, Shard) else item
        if isinstance(source, np.ndarray):
            self.check_array(source, name)
        elif self.writable and source.write_from is None:
            raise ConfigError(f"{name!r} is a Leaf without write_from: it cannot be restored into")
        offsets = item.offsets if isinstance(item, Shard) else (0,) * len(source.shape)
        return LocalPiece(offsets, tuple(source.shape), source)

    def check_array(self, array: np.ndarray[Any, Any], name: str) -> None:
        if not plain_array(array):
            raise ConfigTypeError(
                f"{name!r} is of type {_kind(array)}, of which only the bare elements could be saved: "
                "pass numpy.asarray(...) of it if those are meant"
            )
        if self.writable and not array.flags.writeable:
            raise ConfigError(f"{name!r} is a read-only array: it cannot be restored into")

    def claim(self, place: _Place) -> str:
        taken = self.paths.get(place.name)
        if taken is not None:
            raise ConfigError(f"two leaves are called {place.name!r}: {_spell(taken)} and {_spell(place.path)}")
        self.paths[place.name] = place.path
        return place.name

    def check_depth(self, value: Any, place: _Place) -> None:
        if id(value) in place.above or len(place.above) >= _MAX_DEPTH:
            raise ConfigError(f"the state holds itself, or nests deeper than {_MAX_DEPTH} levels, at {place.name!r}")


def _is_boxed(item: Any) -> bool:
    return isinstance(item, Shard) or (isinstance(item, Spec) and item.split)


def _dtype(item: Any, name: str) -> DType:
    if isinstance(item, (Leaf, Spec)):
        return item.dtype
    data = item.data if isinstance(item, Shard) else item
    if isinstance(data, Leaf):
        return data.dtype
    try:
        return dtypes.from_numpy(data.dtype)
    except ConfigTypeError as error:
        raise ConfigTypeError(f"{name!r}: {error}") from None


def _global_shape(item: Any) -> tuple[int, ...]:
    if isinstance(item, (Shard, Spec)):
        return item.global_shape
    return tuple(item.shape)


def _key(key: Any, place: _Place) -> str:
    """The part of a leaf's name that a mapping's key gives."""
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return str(int(key))
    if not isinstance(key, str):
        raise ConfigTypeError(f"a key in {place.name!r} is of type {_kind(key)}; names are made of str and int keys")
    if not key:
        raise ConfigError(f"a key in {place.name!r} is empty")
    try:
        key.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"the key {key!a} in {place.name!r} is not valid Unicode text") from error
    return str(key)


def _spell(path: tuple[str, ...]) -> str:
    return "".join(f"[{part!r}]" for part in path)


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
