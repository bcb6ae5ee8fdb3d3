"""Files as MindSpore would write them: without a manifest, byte for byte."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from parckpt.core.crc import crc32
from parckpt.core.layout import whole
from parckpt.core.mesh import Layout
from parckpt.engine.fileplan import appended_entry
from parckpt.formats.base import BytesReader
from parckpt.formats.registry import FORMATS
from parckpt.formats.safetensors import MINDSPORE_METADATA, content_crc, file_crc
from parckpt.testing.files import assemble, content

__all__ = ["file_bytes", "piece_of", "put", "tree"]


def file_bytes(form_name: str, entries: Mapping[str, Any], *, crc: bool = False, **metadata: str) -> bytes:
    """A whole file of arrays and plain values."""
    form = FORMATS[form_name]
    made = [appended_entry(form, name, value) for name, value in entries.items()]
    number = 0 if crc else None
    if crc and form_name == "safetensors":
        own = [(e.name, content_crc(e, crc32(data), data if e.shape == () else None)) for e, data in made]
        number = file_crc(own)
    facts = {**MINDSPORE_METADATA, **metadata} if form_name == "safetensors" and made else {}
    layout = form.layout([entry for entry, _ in made], metadata=facts, crc=number)
    return assemble(layout, [data for _, data in made], form)


def put(path: Path, entries: Mapping[str, Any], *, crc: bool = False, **metadata: str) -> Path:
    """Write such a file; its format follows from its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_bytes(path.suffix[1:], entries, crc=crc, **metadata))
    return path


def piece_of(array: Any, layout: Layout | None, rank: int) -> Any:
    """What a rank holds of a whole array."""
    box = whole(array.shape) if layout is None else layout.box(array.shape, rank)
    index = tuple(slice(first, first + extent) for first, extent in zip(box.offsets, box.shape, strict=True))
    return np.ascontiguousarray(array[index]).reshape(box.shape)


def tree(root: Path) -> dict[str, dict[str, Any]]:
    """All data files below a directory, by relative path: entries in order, metadata, and the file's sha256."""
    return {
        str(path.relative_to(root)): _described(path)
        for path in sorted(root.rglob("*"))
        if path.suffix[1:] in FORMATS and path.is_file()
    }


def _described(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    reader = BytesReader(data, os.fspath(path))
    index = FORMATS[path.suffix[1:]].read_index(reader)
    entries: list[list[Any]] = []
    for item in index.entries:
        if item.dtype is None:
            entries.append([item.name, "str", [], item.text])
            continue
        array = np.frombuffer(content(reader, item), item.dtype.numpy)
        plain = array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array
        entries.append([item.name, item.dtype.name, list(item.shape), hashlib.sha256(plain.tobytes()).hexdigest()])
    return {"entries": entries, "metadata": index.metadata, "sha256": hashlib.sha256(data).hexdigest()}
