"""One rank's state as the engine sees it: what it holds, described for the others, ready to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parckpt.core import values
from parckpt.core.adapting import as_leaf, as_mapping
from parckpt.core.describe import EMPTY, PER_RANK, Held, digest, pack
from parckpt.core.flat import FlatState, ValueLeaf
from parckpt.core.layout import Box, contains
from parckpt.core.state import State
from parckpt.engine.arrays import Source
from parckpt.errors import ConfigTypeError, InternalError

__all__ = ["LocalState", "as_state"]


@dataclass(frozen=True)
class LocalState:
    """A flattened state with its description.

    Attributes
    ----------
    description, digest : bytes
        What the other ranks get to know, and its SHA-256: while no rank's digest changes, the plan holds.
    sources : dict
        Tensor name to the boxes this rank holds of it.
    """

    flat: FlatState
    description: bytes
    digest: bytes
    sources: dict[str, list[Source]]

    @classmethod
    def of(cls, flat: FlatState) -> LocalState:
        """Describe a state. Not collective.

        Raises
        ------
        LayoutError
            If a box has another number of dimensions than its tensor.
        """
        held = [
            Held(leaf.name, leaf.dtype, leaf.global_shape, piece.offsets, piece.shape, leaf.per_rank, leaf.split)
            for leaf in flat.tensors
            for piece in leaf.pieces
        ]
        listed = [(value.name, _flags(value)) for value in flat.values]
        description = pack(held, listed)
        sources = {leaf.name: [Source(leaf.name, leaf.dtype, piece) for piece in leaf.pieces] for leaf in flat.tensors}
        return cls(flat, description, digest(description), sources)

    def source(self, name: str, box: Box) -> Source:
        """The held box that contains ``box``."""
        for source in self.sources.get(name, ()):
            if source.box == box or contains(source.box, box):
                return source
        raise InternalError(f"the plan asks this rank for {box} of {name!r}, which it does not hold")

    def shared_values(self) -> dict[str, Any]:
        """Encoded plain values that all ranks should have alike."""
        return {leaf.name: values.encode(leaf.value) for leaf in self.flat.values if not leaf.per_rank}

    def own_values(self) -> dict[str, Any]:
        """Encoded plain values that belong to this rank alone."""
        return {leaf.name: values.encode(leaf.value) for leaf in self.flat.values if leaf.per_rank}


def _flags(value: ValueLeaf) -> int:
    return PER_RANK if value.per_rank else EMPTY if value.may_be_no_shards else 0


def as_state(given: Any) -> State:
    """The state that an argument means.

    A mapping, a callable, a framework's network, an object with ``state_dict()``, or MindSpore's list form: of
    ``{"name": ..., "data": ...}`` or of arrays that know their names.

    Raises
    ------
    ConfigTypeError
        For anything else.
    """
    if isinstance(given, Mapping):
        return given
    if isinstance(given, list):
        state: dict[str, Any] = {}
        for item in given:
            if as_leaf(item) is not None and isinstance(getattr(item, "name", None), str):
                state[item.name] = item
                continue
            if not isinstance(item, Mapping) or not isinstance(item.get("name"), str) or "data" not in item:
                raise ConfigTypeError("a list to save must hold {'name': str, 'data': array} items")
            state[item["name"]] = item["data"]
        return state
    network = as_mapping(given)
    if network is not None:
        return network
    if hasattr(given, "state_dict"):
        found: State = given.state_dict()
        return found
    if callable(given):
        return given  # type: ignore[no-any-return]  # flatten checks what it returns
    raise ConfigTypeError(f"a state must be a mapping, a callable or have state_dict(), not {type(given).__name__}")
