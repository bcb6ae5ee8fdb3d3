"""What `unified_safetensors` has written, opened as one checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace

from parckpt.errors import ConfigError, FormatError
from parckpt.storage.atomic import read_file
from parckpt.storage.filesystem import FileSystem, try_stat
from parckpt.transform.reading import Opened, open_files
from parckpt.transform.unified import HYPER_PARAMETERS, NAME_MAP

__all__ = ["open_unified"]

_MAX_MAP_NBYTES = 256 << 20


def open_unified(fs: FileSystem, directory: str, names: Mapping[str, str], check: bool) -> Opened:
    """Open what `unified_safetensors` has written, by its map; or the one file of a directory."""
    stat = try_stat(fs, directory)
    if stat is None or not stat.is_dir:
        raise ConfigError(f"{directory} is not a directory", parameter="unified_safetensors_dir")
    present = sorted(name for name in fs.listdir(directory) if name.endswith(".safetensors") and name[0] != ".")
    hyper = [name for name in present if name == HYPER_PARAMETERS]
    where = _weight_map(fs, directory) if NAME_MAP in fs.listdir(directory) else None
    if where is None and len(present) - len(hyper) != 1:
        raise ConfigError(
            f"{directory} has {len(present) - len(hyper)} .safetensors files, but no {NAME_MAP} says what is where",
            parameter="unified_safetensors_dir",
        )
    parts = sorted(set(where.values())) if where is not None else [name for name in present if name not in hyper]
    for name in parts:
        if name not in present:
            raise ConfigError(f"{directory}: {NAME_MAP} names {name}, which is not there", path=directory)
    files = {rank: os.path.join(directory, name) for rank, name in enumerate([*parts, *hyper])}
    return _in_order(open_files(fs, files, None, named=None, check=check), len(parts), where, names, directory)


def _weight_map(fs: FileSystem, directory: str) -> dict[str, str]:
    """Tensor to file; hostile, as all that comes from disk."""
    path = os.path.join(directory, NAME_MAP)
    try:
        found = json.loads(read_file(fs, path, _MAX_MAP_NBYTES))
        where = found.get("weight_map", found)
        if not where or not all(isinstance(word, str) for pair in where.items() for word in pair):
            raise ValueError("no mapping of names to files")
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is no map of tensors: {error}", path=path, byte_offset=0, field="map") from error
    for name in where.values():
        if os.path.basename(name) != name or name.startswith("."):
            raise FormatError(f"{path}: {name!r} is no file beside it", path=path, byte_offset=0, field="map")
    return dict(where)


def _in_order(
    opened: Opened, parts: int, where: Mapping[str, str] | None, names: Mapping[str, str], directory: str
) -> Opened:
    """The tensors under the network's names, in the map's order; what is in parts but not in the map is left out."""
    listed = [name for part in range(parts) for name in opened.names[part]]
    hyper = [name for part in range(parts, len(opened.names)) for name in opened.names[part]]
    if where is not None:
        stored = [names.get(name, name) for name in where]
        absent = sorted(set(stored) - set(listed) - {n for k in range(parts) for n in opened.numbers.get(k, {})})
        if absent:
            raise FormatError(
                f"{directory}: {NAME_MAP} names {absent[0]!r}, but no file has it",
                path=directory,
                byte_offset=0,
                field=absent[0],
            )
        there = set(listed)
        listed = [name for name in stored if name in there]
    back = {stored: own for own, stored in names.items()}
    rows = tuple(replace(row, name=back.get(row.name, row.name)) for row in opened.contents.tensors)
    if len({row.name for row in rows}) != len(rows):
        raise ConfigError("name_map gives two tensors one name", parameter="name_map")
    manifest = replace(opened.manifest, contents=replace(opened.contents, tensors=rows))
    singles = {back.get(name, name): value for found in opened.numbers.values() for name, value in found.items()}
    listed, hyper = ([back.get(name, name) for name in found] for found in (listed, hyper))
    return Opened(manifest, opened.root, {0: [*listed, *hyper], 1: hyper}, {0: singles})
