"""Arrays and networks of frameworks: the place where `parckpt.adapters` say what they stand for.

Nothing here knows a framework, and no framework is imported because of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from parckpt.core.leaves import Leaf

__all__ = ["Adapter", "as_leaf", "as_mapping", "register"]


class Adapter(Protocol):
    """What one framework's objects are to a state."""

    def as_leaf(self, value: Any) -> Leaf | None:
        """The leaf that reads and writes this array where it lives; None if it is no array of this framework."""

    def as_mapping(self, value: Any) -> Mapping[str, Any] | None:
        """Name to array of all that this network holds; None if it is no network of this framework."""


_ADAPTERS: list[Adapter] = []


def register(adapter: Adapter) -> None:
    """Ask this adapter, too, from now on."""
    _ADAPTERS.append(adapter)


def as_leaf(value: Any) -> Leaf | None:
    """The leaf that a framework's array stands for, or None.

    Raises
    ------
    ConfigTypeError
        For an array that no checkpoint can hold.
    """
    return next((leaf for adapter in _ADAPTERS if (leaf := adapter.as_leaf(value)) is not None), None)


def as_mapping(value: Any) -> Mapping[str, Any] | None:
    """The arrays of a framework's network by name, or None. Made anew at each call, of what it holds now."""
    return next((found for adapter in _ADAPTERS if (found := adapter.as_mapping(value)) is not None), None)
