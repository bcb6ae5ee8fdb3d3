"""How one data file will look: its entries, where each entry's bytes lie, and what the record says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parckpt.core import dtypes
from parckpt.core.layout import Box
from parckpt.core.tablefile import Column
from parckpt.core.tensors import TensorRow
from parckpt.errors import ConfigError
from parckpt.formats.base import Entry, Extent, FileLayout, Format

__all__ = ["FilePlan", "appended_entry", "plan_file"]


@dataclass(frozen=True)
class FilePlan:
    """Layout of one file.

    Attributes
    ----------
    entries : tuple of Entry
        The boxes in order, then the appended values.
    contents : tuple of bytes
        Content of each appended value.
    nboxes : int
        How many of the entries are boxes.
    record_columns : mapping
        The static columns of this file's `Record`.
    """

    layout: FileLayout
    entries: tuple[Entry, ...]
    contents: tuple[bytes, ...]
    nboxes: int
    record_columns: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return self.layout.nbytes


def plan_file(
    form: Format,
    boxes: Sequence[tuple[TensorRow, Box]],
    append: Sequence[tuple[Entry, bytes]],
    *,
    integrated: bool,
    crc: int | None,
    metadata: Mapping[str, str] | None = None,
) -> FilePlan:
    """Lay a file out.

    Parameters
    ----------
    form : Format
        The file format.
    boxes : sequence of (TensorRow, Box)
        What the file holds, in order. A second box of one tensor is called ``<name>@shard_<k>``.
    append : sequence of (Entry, bytes)
        Appended values and their content, after the boxes.
    integrated : bool
        All ranks' tensors stand in this file.
    crc : int or None
        None: no crc of MindSpore's; else as `Format.layout`.

    Raises
    ------
    ConfigError
        If two entries would have one name, or the format cannot hold one.
    """
    entries: list[Entry] = []
    extra: list[str] = []
    index: list[int] = []
    seen: dict[str, int] = {}
    for tensor, box in boxes:
        default = tensor.file_name if integrated else tensor.name
        count = seen.get(default, 0)
        seen[default] = count + 1
        name = default if count == 0 else f"{default}@shard_{count}"
        if count:
            extra.append(name)
        index.append(len(extra) if count else 0)
        entries.append(form.entry(name, tensor.dtype, box.shape))
    entries.extend(entry for entry, _ in append)
    _check_unique(entries)
    layout = form.layout(entries, metadata=metadata or {}, crc=crc)
    return FilePlan(
        layout,
        tuple(entries),
        tuple(content for _, content in append),
        len(boxes),
        {"box_entry": np.array(index, "<u4"), "entry_names": tuple(extra), **_extent_columns(layout, len(boxes))},
    )


def appended_entry(form: Format, name: str, value: Any) -> tuple[Entry, bytes]:
    """Entry and content of an appended value or array."""
    if not isinstance(value, np.ndarray):
        return form.value_entry(name, value)
    dtype = dtypes.from_numpy(value.dtype)
    return form.entry(name, dtype, value.shape), np.ascontiguousarray(value, dtype.numpy).tobytes()


def _extent_columns(layout: FileLayout, nboxes: int) -> dict[str, Column]:
    """Where each box's bytes lie."""
    rows = sorted(
        (part.entry, part.start, part.byte_offset, part.nbytes)
        for part in layout.parts
        if isinstance(part, Extent) and part.entry < nboxes and part.nbytes
    )
    columns = np.array(rows, "<u8").reshape(-1, 4)
    return {
        "box_extents": np.bincount(columns[:, 0].astype(np.int64), minlength=nboxes).astype("<u4"),
        "extent_start": np.ascontiguousarray(columns[:, 1]),
        "extent_byte_offset": np.ascontiguousarray(columns[:, 2]),
        "extent_nbytes": np.ascontiguousarray(columns[:, 3]),
    }


def _check_unique(entries: Sequence[Entry]) -> None:
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"two entries of one file would be called {twice[0]!r}")
