"""The formats by name, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parckpt.formats import ckpt, safetensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from parckpt.core.dtypes import DType
    from parckpt.formats.base import Entry, FileIndex, FileLayout, Format, RangeReader

__all__ = ["FORMATS"]


@dataclass(frozen=True)
class _Ckpt:
    name: str = "ckpt"
    extension: str = ".ckpt"
    crc_first: bool = False

    def entry(self, name: str, dtype: DType, shape: Sequence[int]) -> Entry:
        return ckpt.entry(name, dtype, shape)

    def value_entry(self, name: str, value: object) -> tuple[Entry, bytes]:
        return ckpt.value_entry(name, value)

    def layout(self, entries: Sequence[Entry], *, metadata: Mapping[str, str], crc: int | None) -> FileLayout:
        # The format has no metadata; whoever needs them keeps them in the manifest.
        return ckpt.layout(entries, crc=crc is not None)

    def trailer(self, crc: int) -> bytes:
        return ckpt.trailer(crc)

    def read_index(self, reader: RangeReader) -> FileIndex:
        return ckpt.read_index(reader)


@dataclass(frozen=True)
class _Safetensors:
    name: str = "safetensors"
    extension: str = ".safetensors"
    crc_first: bool = True

    def entry(self, name: str, dtype: DType, shape: Sequence[int]) -> Entry:
        return safetensors.entry(name, dtype, shape)

    def value_entry(self, name: str, value: object) -> tuple[Entry, bytes]:
        return safetensors.value_entry(name, value)

    def layout(self, entries: Sequence[Entry], *, metadata: Mapping[str, str], crc: int | None) -> FileLayout:
        return safetensors.layout(entries, metadata=metadata, crc=crc)

    def trailer(self, crc: int) -> bytes:
        return safetensors.trailer(crc)

    def read_index(self, reader: RangeReader) -> FileIndex:
        return safetensors.read_index(reader)


FORMATS: dict[str, Format] = {"ckpt": _Ckpt(), "safetensors": _Safetensors()}
