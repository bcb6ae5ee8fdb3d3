"""A layout file: which tensors are cut over which mesh of ranks, as JSON that people write by hand.

.. code-block:: json

    {
      "mesh_shape": [2, 4],
      "mesh_axes": ["data", "model"],
      "tensors": {
        "embed.weight": {"tensor_map": ["model"]},
        "*.attention.*.weight": {"tensor_map": [null, "model"]},
        "head.weight": {"tensor_map": ["model"], "mesh_shape": [8], "mesh_axes": ["model"]}
      }
    }

The description of a state that ``parckpt plan`` takes is one, too: shapes and types are those of the checkpoint, so
what is said of them does not count here. Keys of ``tensors`` may be shell patterns as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from parckpt.core.mesh import MESH_KEYS, Layout
from parckpt.errors import ConfigError, ParckptError

__all__ = ["LayoutFile", "parse_layout_file"]

_STATE_KEYS = ("shape", "dtype", "repeat", "per_rank")


@dataclass(frozen=True)
class LayoutFile:
    """The layouts of a file, by name or pattern, in its order; None where a tensor is said to be whole."""

    layouts: Mapping[str, Layout | None]

    @property
    def nranks(self) -> int:
        """Ranks that the layouts speak of, from 0."""
        return max((layout.ranks.stop for layout in self.layouts.values() if layout is not None), default=1)

    def of(self, names: Iterable[str]) -> dict[str, tuple[Layout, ...]]:
        """Layouts of these tensors; one that no key fits has none. A name goes before the first pattern that fits."""
        found: dict[str, tuple[Layout, ...]] = {}
        for name in names:
            fitting = (key for key in self.layouts if fnmatchcase(name, key))
            layout = self.layouts[name] if name in self.layouts else self.layouts.get(next(fitting, ""))
            if layout is not None:
                found[name] = (layout,)
        return found

    def unused(self, names: Iterable[str]) -> list[str]:
        """Keys that fit none of these tensors: most likely misspelt."""
        known = list(names)
        return [key for key in self.layouts if not any(name == key or fnmatchcase(name, key) for name in known)]


def parse_layout_file(data: bytes, path: str) -> LayoutFile:
    """Read a layout file.

    Raises
    ------
    ConfigError
        With the place that is wrong.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}", path=path) from error
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
        _refuse(path, "tensors", "expected an object with an object 'tensors'")
    _check_keys(content, ("mesh_shape", "mesh_axes", "ranks", "dtype", "tensors"), path, "the file")
    common = {key: content[key] for key in ("mesh_shape", "mesh_axes") if key in content}
    layouts: dict[str, Layout | None] = {}
    for key, value in content["tensors"].items():
        layout = _layout(value, common, path, f"tensors[{key!r}]")
        repeat = value.get("repeat") if isinstance(value, dict) else None
        numbers = range(repeat) if type(repeat) is int and 0 <= repeat <= 1 << 20 else range(0)
        layouts.update({key.replace("{}", str(number)): layout for number in numbers} if numbers else {key: layout})
    return LayoutFile(layouts)


def _layout(value: Any, common: Mapping[str, Any], path: str, where: str) -> Layout | None:
    if isinstance(value, list) and all(type(extent) is int and extent >= 0 for extent in value):
        return None  # a shape alone: whole on every rank
    if not isinstance(value, dict):
        _refuse(path, where, 'expected an object, such as {"tensor_map": [null, "model"]}')
    _check_keys(value, (*MESH_KEYS, *_STATE_KEYS), path, where)
    own = {key: value[key] for key in MESH_KEYS if key in value}
    if not own:
        return None
    arguments = {**common, **own}
    if "mesh_shape" in own and "mesh_axes" not in own:
        arguments.pop("mesh_axes", None)  # those of another mesh
    if "mesh_shape" not in arguments:
        _refuse(path, where, "is cut, but there is no mesh_shape")
    try:
        return Layout(**arguments)
    except ParckptError as error:
        raise ConfigError(f"{path}: {where}: {error.message}", path=path) from error


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], path: str, where: str) -> None:
    unknown = sorted(given.keys() - set(known))
    if unknown:
        _refuse(path, where, f"unknown member {unknown[0]!r}; known are {', '.join(known)}")


def _refuse(path: str, where: str, problem: str) -> NoReturn:
    raise ConfigError(f"{path}: {where}: {problem}", path=path)
