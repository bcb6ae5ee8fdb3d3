"""A layout file: which tensors are cut over which mesh of ranks, as JSON that people write by hand.

.. code-block:: json

    {
      "mesh_shape": [2, 4],
      "mesh_axes": ["data", "model"],
      "tensors": {
        "*.attention.*.weight": [null, "model"],
        "embed.weight": {"tensor_map": ["model"], "mesh_shape": [8], "mesh_axes": ["model"]}
      }
    }

Keys of ``tensors`` are names or shell patterns; the first that fits counts. A value is a tensor map, or an object with
any of the arguments of `Layout`; what it lacks is taken from the top.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from parckpt.core.mesh import Layout
from parckpt.errors import FormatError, ParckptError

__all__ = ["LayoutFile", "parse_layout_file"]

_KEYS = ("mesh_shape", "mesh_axes", "tensor_map", "shard_step", "shard_size", "first_rank")


@dataclass(frozen=True)
class LayoutFile:
    """The layouts of a file, by name or pattern, in its order.

    Attributes
    ----------
    nranks : int
        Ranks of the largest mesh.
    """

    layouts: Mapping[str, Layout]

    @property
    def nranks(self) -> int:
        """Ranks that the layouts speak of, from 0."""
        return max((layout.ranks.stop for layout in self.layouts.values()), default=1)

    def of(self, names: Iterable[str]) -> dict[str, tuple[Layout, ...]]:
        """Layouts of these tensors; those that no key fits have none. Exact names go before patterns."""
        found: dict[str, tuple[Layout, ...]] = {}
        for name in names:
            layout = self.layouts.get(name)
            if layout is None:
                fitting = (one for pattern, one in self.layouts.items() if fnmatchcase(name, pattern))
                layout = next(fitting, None)
            if layout is not None:
                found[name] = (layout,)
        return found

    def unused(self, names: Iterable[str]) -> list[str]:
        """Keys that fit none of these tensors: most likely misspelt."""
        known = list(names)
        return [key for key in self.layouts if not any(name == key or fnmatchcase(name, key) for name in known)]


def parse_layout_file(data: bytes, path: str) -> LayoutFile:
    """Parse; FormatError says where it is ill-formed."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}", path=path, byte_offset=0, field="file") from error
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
        _refuse(path, "tensors", "an object with an object 'tensors' was expected")
    unknown = sorted(content.keys() - {*_KEYS, "tensors"})
    if unknown:
        _refuse(path, unknown[0], f"unknown key; known are tensors, {', '.join(_KEYS)}")
    common = {key: content[key] for key in _KEYS if key in content}
    return LayoutFile({key: _layout(key, value, common, path) for key, value in content["tensors"].items()})


def _layout(key: str, value: Any, common: Mapping[str, Any], path: str) -> Layout:
    own = {"tensor_map": value} if isinstance(value, list) else value
    if not isinstance(own, dict):
        _refuse(path, key, "a tensor map or an object was expected")
    unknown = sorted(own.keys() - set(_KEYS))
    if unknown:
        _refuse(path, f"{key}: {unknown[0]}", f"unknown key; known are {', '.join(_KEYS)}")
    arguments = {**common, **own}
    if "mesh_shape" in own and "mesh_axes" not in own:
        arguments.pop("mesh_axes", None)  # those of another mesh
    if "mesh_shape" not in arguments:
        _refuse(path, key, "there is no mesh_shape, neither here nor at the top")
    try:
        return Layout(**arguments)
    except (ParckptError, TypeError) as error:
        raise FormatError(f"{path}: {key}: {error}", path=path, byte_offset=0, field=key) from error


def _refuse(path: str, field: str, problem: str) -> NoReturn:
    raise FormatError(f"{path}: {field}: {problem}", path=path, byte_offset=0, field=field)
