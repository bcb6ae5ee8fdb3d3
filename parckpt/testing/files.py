"""Whole files in memory: assembled from a layout, taken apart by an index."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from parckpt.core.crc import crc32
from parckpt.formats.base import BytesReader, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from parckpt.formats.base import FileIndex, FileLayout, Format, IndexedEntry, RangeReader

__all__ = ["CountingReader", "GoldenFile", "assemble", "content", "describe", "golden_files"]


@dataclass
class CountingReader:
    """A `RangeReader` over bytes that remembers each read as (byte_offset, nbytes)."""

    data: bytes
    path: str = "<memory>"
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return len(self.data)

    @property
    def nbytes_read(self) -> int:
        """Bytes read so far."""
        return sum(nbytes for _, nbytes in self.reads)

    def read(self, byte_offset: int, nbytes: int) -> bytes:
        """As `BytesReader.read`."""
        self.reads.append((byte_offset, nbytes))
        return BytesReader(self.data, self.path).read(byte_offset, nbytes)


def assemble(layout: FileLayout, contents: Sequence[bytes], form: Format) -> bytes:
    """The file that `layout` describes, given the content of each entry. Checks that its parts leave no gap."""
    out = bytearray()
    for part in layout.parts:
        if part.byte_offset != len(out):
            raise AssertionError(f"part at {part.byte_offset}, the one before ends at {len(out)}")
        if isinstance(part, Literal):
            out += part.data
        else:
            piece = contents[part.entry][part.start : part.start + part.nbytes]
            if len(piece) != part.nbytes or not piece:
                raise AssertionError(f"extent {part} is not inside its content")
            out += piece
    if len(out) != layout.body_nbytes:
        raise AssertionError(f"body of {len(out)} bytes, the layout says {layout.body_nbytes}")
    return bytes(out) + (form.trailer(crc32(bytes(out))) if layout.trailer_nbytes else b"")


def content(reader: RangeReader, entry: IndexedEntry) -> bytes:
    """All content of an indexed tensor."""
    return b"".join(reader.read(extent.byte_offset, extent.nbytes) for extent in entry.extents)


def describe(reader: RangeReader, index: FileIndex) -> list[dict[str, Any]]:
    """What a file holds, in the words of the golden manifest."""
    return [_describe(reader, entry) for entry in index.entries]


def _describe(reader: RangeReader, entry: IndexedEntry) -> dict[str, Any]:
    if entry.kind == "str":
        return {"name": entry.name, "kind": "str", "value": entry.text}
    if entry.kind == "map":
        parts = [_array(reader, part, part.type) for part in entry.parts]
        return {"name": entry.name, "kind": "map", "parts": parts}
    # Both formats' files are described with ckpt's type names.
    type_name = entry.dtype.ckpt if entry.dtype else None
    return {"name": entry.name, "kind": "tensor"} | _array(reader, entry, type_name)


def _array(reader: RangeReader, entry: IndexedEntry, type_name: str | None) -> dict[str, Any]:
    digest = hashlib.sha256(content(reader, entry)).hexdigest()
    return {"dtype": type_name, "shape": list(entry.shape), "sha256": digest}


@dataclass(frozen=True)
class GoldenFile:
    """One file of the golden corpus, with its line of the manifest."""

    path: Path
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """Path inside the corpus."""
        return str(self.facts["file"])

    @property
    def made_by_mindspore(self) -> bool:
        """True if the bytes are as MindSpore wrote them."""
        return bool(self.facts["made_by"] == "mindspore")

    @property
    def tensors(self) -> list[dict[str, Any]]:
        """What MindSpore loaded at its first attempt; empty if it refused."""
        load = self.facts["loads"][0]
        return list(load["tensors"]) if load["ok"] else []

    def reader(self) -> CountingReader:
        """The file's bytes."""
        return CountingReader(self.path.read_bytes(), self.name)


def golden_files(directory: Path, form: str) -> list[GoldenFile]:
    """The golden files of one format."""
    lines = json.loads((directory / "manifest.json").read_text())["files"]
    return [GoldenFile(directory / line["file"], line) for line in lines if line["format"] == form]
