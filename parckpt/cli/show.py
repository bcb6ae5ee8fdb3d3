"""``parckpt show``: what one checkpoint holds."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from parckpt.cli.failure import guarded
from parckpt.cli.ls import checkpoint_row, state_text
from parckpt.cli.options import DebugOption, JsonOption, absolute
from parckpt.cli.output import count, emit, facts, line, moment, size, table
from parckpt.core import appended, naming
from parckpt.core.contents import Contents
from parckpt.core.manifest import Manifest
from parckpt.engine.catalog import MAX_MANIFEST_NBYTES, Found, find_at
from parckpt.engine.foreign import index_file
from parckpt.engine.survey import data_files
from parckpt.errors import CheckpointNotFoundError, FormatError
from parckpt.formats.base import IndexedEntry
from parckpt.storage.atomic import read_file
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, try_stat

__all__ = ["show"]

_MAX_FILES_SHOWN = 3
_COLUMNS = ("tensor", "dtype", "shape", "size", "files")


@guarded
def show(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A step directory, or a .ckpt or .safetensors file; MindSpore's too.",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what one checkpoint holds: facts, tensors with the files they lie in, plain values.

    Only the manifest is read, or, where there is none, the headers of the files.
    """
    del debug
    fs = PosixFileSystem()
    place = absolute(path)
    stat = fs.stat(place)
    found = find_at(fs, place)
    if found is None and stat.is_dir and try_stat(fs, os.path.join(place, naming.rank_directory(0))) is None:
        raise CheckpointNotFoundError(f"{place} is not a checkpoint; parckpt ls lists what is in it", path=place)
    content = _published(fs, found) if found is not None else _foreign(fs, place)
    if as_json:
        emit(content)
    elif found is not None:
        _print_published(content)
    else:
        _print_foreign(content)


def _published(fs: FileSystem, found: Found) -> dict[str, Any]:
    if found.error is not None:
        raise found.error
    manifest = Manifest.decode(read_file(fs, found.manifest_path, MAX_MANIFEST_NBYTES), found.manifest_path)
    own = manifest.facts
    return {
        **checkpoint_row(fs, found),
        "manifest": found.manifest_path,
        "parent": own.parent,
        "generation": own.generation,
        "attempt": own.attempt,
        "steps_per_epoch": own.steps_per_epoch,
        "remove_redundancy": own.remove_redundancy,
        "crc_check": own.crc_check,
        "chunk_nbytes": own.chunk_nbytes,
        "missing": list(own.missing),
        "values": dict(own.values),
        "per_rank_values": {name: dict(by_rank) for name, by_rank in own.per_rank_values.items()},
        "append": dict(own.append),
        "files": [{"path": file.path, "nbytes": file.nbytes} for file in manifest.contents.files],
        "tensors": _tensors(manifest.contents),
    }


def _tensors(contents: Contents) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, tensor in enumerate(contents.tensors):
        boxes, _, _ = contents.geometry(number)
        files = sorted(set(contents.boxes.file[boxes].tolist()))
        rows.append(
            {
                "name": tensor.name,
                "rank": tensor.per_rank if tensor.per_rank >= 0 else None,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.global_shape),
                "nbytes": tensor.nbytes,
                "boxes": len(boxes),
                "files": [contents.files[file].path for file in files],
            }
        )
    return rows


def _print_published(content: dict[str, Any]) -> None:
    layout = "one file with every tensor" if content["integrated"] else count(len(content["files"]), "rank file")
    facts(
        [
            ("path", content["path"]),
            ("state", state_text(content)),
            ("step", f"{content['step']} (epoch {content['epoch']}, step {content['step_in_epoch']} of it)"),
            ("saved", f"{moment(content['created'])}, {content['kind']}, {content['reason'] or 'no reason noted'}"),
            ("consistent", "yes" if content["consistent"] else "no: ranks may be at different steps"),
            ("ranks", str(content["ranks"])),
            ("layout", f"{content['format']}, {layout}" + _extras(content)),
            (
                "size",
                f"{size(content['nbytes'])} ({content['nbytes']} bytes), {count(len(content['tensors']), 'tensor')}",
            ),
            ("run", f"{content['run_id']}, save {content['sequence']}, prefix {content['prefix']!r}"),
            ("token", f"{content['token']}, after {content['parent'] or 'none'}"),
        ]
    )
    if content["missing"]:
        line(f"missing from dead ranks: {', '.join(content['missing'])}")
    _print_tensors(content["tensors"])
    _print_values("value", content["values"])
    _print_values("appended", content["append"])
    by_rank = content["per_rank_values"]
    _print_values("per-rank value", {f"{name} [rank {r}]": by_rank[name][r] for name in by_rank for r in by_rank[name]})


def _extras(content: dict[str, Any]) -> str:
    said = {"remove_redundancy": ", replicas stored once", "crc_check": ", with MindSpore's crc"}
    return "".join(text for name, text in said.items() if content[name])


def _print_tensors(rows: list[dict[str, Any]]) -> None:
    if rows:
        line("")
        table(_COLUMNS, [_tensor_cells(row) for row in rows], right=("size",))


def _tensor_cells(row: dict[str, Any]) -> tuple[str, ...]:
    owner = f" [rank {row['rank']}]" if row.get("rank") is not None else ""
    files = row["files"]
    more = f" and {len(files) - _MAX_FILES_SHOWN} more" if len(files) > _MAX_FILES_SHOWN else ""
    shape = "x".join(str(length) for length in row["shape"]) or "scalar"
    return (row["name"] + owner, row["dtype"], shape, size(row["nbytes"]), ", ".join(files[:_MAX_FILES_SHOWN]) + more)


def _print_values(title: str, found: dict[str, Any]) -> None:
    if found:
        line("")
        table((title, ""), [(name, _value_text(value)) for name, value in found.items()])


def _value_text(value: Any) -> str:
    try:
        return repr(appended.decode(value))
    except FormatError:
        return f"not readable: {value!r}"


# -- without a manifest -------------------------------------------------------------------------------------------


def _foreign(fs: FileSystem, path: str) -> dict[str, Any]:
    root = path if fs.stat(path).is_dir else os.path.dirname(path)
    files: list[dict[str, Any]] = []
    tensors: dict[tuple[Any, ...], dict[str, Any]] = {}
    strings: dict[str, str | None] = {}
    for file in data_files(fs, path):
        name = os.path.relpath(file, root)
        index, nbytes = index_file(fs, file)
        files.append({"path": name, "nbytes": nbytes, "format": index.format, "crc": index.crc})
        files[-1]["metadata"] = index.metadata
        for item in index.entries:
            if item.kind == "str":
                strings[item.name] = item.text
            for row in _entry_rows(item):
                key = (row["name"], row["dtype"], tuple(row["shape"]))
                tensors.setdefault(key, row)["files"].append(name)
    return {
        "path": path,
        "state": "no manifest",
        "nbytes": sum(file["nbytes"] for file in files),
        "files": files,
        "tensors": list(tensors.values()),
        "strings": strings,
    }


def _entry_rows(item: IndexedEntry) -> list[dict[str, Any]]:
    if item.kind == "map":
        return [row for part in item.parts for row in _entry_rows(_renamed(part, f"{item.name}.{part.name}"))]
    if item.dtype is None:
        return []
    row = {"name": item.name, "dtype": item.dtype.name, "shape": list(item.shape), "nbytes": item.nbytes, "files": []}
    return [row]


def _renamed(part: IndexedEntry, name: str) -> IndexedEntry:
    return IndexedEntry(name, part.kind, part.dtype, part.type, part.shape, part.extents, part.text, part.parts)


def _print_foreign(content: dict[str, Any]) -> None:
    files = content["files"]
    crcs = sum(file["crc"] is not None for file in files)
    facts(
        [
            ("path", content["path"]),
            ("state", "no manifest: not published by parckpt, or its manifest was left behind"),
            ("layout", f"{files[0]['format']}, {count(len(files), 'file')}, {crcs} with a crc"),
            (
                "size",
                f"{size(content['nbytes'])} ({content['nbytes']} bytes), {count(len(content['tensors']), 'tensor')}",
            ),
        ]
    )
    _print_tensors(content["tensors"])
    if content["strings"]:
        line("")
        table(("string", ""), [(name, repr(text)) for name, text in content["strings"].items()])
    metadata = files[0]["metadata"]
    if metadata:
        line("")
        table(("metadata", ""), [(name, repr(text)) for name, text in metadata.items()])
