"""A state described by a person, in JSON: for planning the saves of a job that does not run yet."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from parckpt.core import dtypes
from parckpt.core.dtypes import DType
from parckpt.core.mesh import MESH_KEYS, Layout
from parckpt.core.outline import Outline, OutlineTensor
from parckpt.errors import ConfigError, LayoutError

__all__ = ["parse_outline"]

# Written by hand, so anything larger is a mistake; what is bounded here is made in memory.
_MAX_RANKS = 1 << 20
_MAX_TENSORS = 1 << 20

_JOB_KEYS = ("ranks", "dtype", "mesh_shape", "mesh_axes", "tensors")
_TENSOR_KEYS = ("shape", "dtype", "repeat", "per_rank", *MESH_KEYS)


def parse_outline(data: bytes, path: str) -> Outline:
    """Read a description that a person wrote, in JSON; docs/cli.md has its members.

    Raises
    ------
    ConfigError
        With the place that is wrong.
    LayoutError
        If a tensor map does not fit its mesh or shape.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    job = _Reader(path).mapping(content, "the description", _JOB_KEYS)
    if "tensors" not in job:
        raise ConfigError(f"{path}: tensors is missing: an object of name: {{shape, dtype, tensor_map}}")
    return _parse(job, _Reader(path))


def _parse(job: Mapping[str, Any], read: _Reader) -> Outline:
    tensors: list[OutlineTensor] = []
    cache: dict[str, Layout] = {}
    for name, given in read.mapping(job["tensors"], "tensors").items():
        tensors += _tensors(job, name, given, read, cache)
        if len(tensors) > _MAX_TENSORS:
            read.refuse("tensors", f"at most {_MAX_TENSORS}, not more")
    if not tensors:
        read.refuse("tensors", "at least one")
    if len({one.name for one in tensors}) != len(tensors):
        read.refuse("tensors", "different names; a repeated one meets another")
    used = max((layout.ranks.stop for tensor in tensors for layout in tensor.layouts), default=1)
    if "mesh_shape" in job:
        used = max(used, math.prod(read.integers(job["mesh_shape"], "mesh_shape", 1)))
    nranks = read.integer(job.get("ranks", used), "ranks", 1)
    if max(nranks, used) > _MAX_RANKS:
        read.refuse("ranks", f"at most {_MAX_RANKS}")
    if nranks % used:
        raise LayoutError(f"{read.path}: ranks is {nranks}, no multiple of the {used} ranks of the mesh")
    return Outline(tuple(tensors), used, nranks)


def _tensors(
    job: Mapping[str, Any], name: str, given: Any, read: _Reader, cache: dict[str, Layout]
) -> list[OutlineTensor]:
    """What one member of ``tensors`` stands for."""
    where = f"tensors[{name!r}]"
    one = read.mapping({"shape": given} if isinstance(given, list) else given, where, _TENSOR_KEYS)
    if "shape" not in one:
        raise ConfigError(f"{read.path}: {where} has no shape")
    if ("{}" in name) != ("repeat" in one):
        raise ConfigError(f"{read.path}: {where}: a name with {{}} and a member repeat belong together")
    repeat = read.integer(one.get("repeat", 1), f"{where}.repeat", 1)
    if repeat > _MAX_TENSORS:
        read.refuse(f"{where}.repeat", f"at most {_MAX_TENSORS}")
    layouts = _layouts(job, one, read, where, cache)
    per_rank = one.get("per_rank", False)
    if not isinstance(per_rank, bool) or (per_rank and layouts):
        read.refuse(f"{where}.per_rank", "true or false, and true without tensor_map")
    first = OutlineTensor(
        name,
        read.dtype(one.get("dtype", job.get("dtype", "float32")), where),
        read.integers(one["shape"], f"{where}.shape", 0),
        layouts,
        (),
        per_rank,
    )
    try:
        first.check_layouts()
    except LayoutError as error:
        raise LayoutError(f"{read.path}: {error.message}", tensor=name) from error
    return [replace(first, name=name.replace("{}", str(k))) for k in range(repeat)] if "repeat" in one else [first]


def _layouts(
    job: Mapping[str, Any], one: Mapping[str, Any], read: _Reader, where: str, cache: dict[str, Layout]
) -> tuple[Layout, ...]:
    given = {key: one[key] for key in MESH_KEYS if key in one}
    if not given:
        return ()
    arguments = {**{key: job[key] for key in ("mesh_shape", "mesh_axes") if key in job}, **given}
    if "mesh_shape" not in arguments:
        raise ConfigError(f"{read.path}: {where} is cut, but there is no mesh_shape")
    key = json.dumps(arguments, sort_keys=True)
    if key not in cache:
        try:
            cache[key] = Layout(
                arguments.pop("mesh_shape"),
                arguments.pop("mesh_axes", None),
                arguments.pop("tensor_map", ()),
                **arguments,
            )
        except (ConfigError, LayoutError) as error:
            raise type(error)(f"{read.path}: {where}: {error.message}") from error
    return (cache[key],)


@dataclass(frozen=True)
class _Reader:
    """Checks what a person wrote."""

    path: str

    def refuse(self, where: str, expected: str) -> NoReturn:
        raise ConfigError(f"{self.path}: {where}: expected {expected}")

    def mapping(self, value: Any, where: str, keys: Sequence[str] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.refuse(where, "an object" if where != "the description" else "an object with a member tensors")
        for key in value if keys is not None else ():
            if key not in (keys or ()):
                near = difflib.get_close_matches(key, keys or (), n=1)
                hint = f": did you mean {near[0]}?" if near else f"; there are {', '.join(keys or ())}"
                raise ConfigError(f"{self.path}: {where} has an unknown member {key!r}{hint}")
        return value

    def integer(self, value: Any, where: str, least: int) -> int:
        if type(value) is not int or not least <= value < 1 << 62:
            self.refuse(where, f"an integer of at least {least}, not {value!r}")
        return value

    def integers(self, value: Any, where: str, least: int) -> tuple[int, ...]:
        if not isinstance(value, list):
            self.refuse(where, f"a list of integers, not {value!r}")
        return tuple(self.integer(item, where, least) for item in value)

    def dtype(self, value: Any, where: str) -> DType:
        try:
            return dtypes.by_name(value)
        except (KeyError, TypeError):
            names = [dtypes.by_code(code).name for code in range(1, 19)]
            near = difflib.get_close_matches(str(value), names, n=1)
            hint = f": did you mean {near[0]}?" if near else f"; expected one of {', '.join(names)}"
            raise ConfigError(f"{self.path}: {where}: unknown dtype {value!r}{hint}") from None
