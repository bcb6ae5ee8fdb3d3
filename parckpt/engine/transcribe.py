"""Writing one new file from the stored boxes of another checkpoint: chunk by chunk, verified as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.layout import Box
from parckpt.core.manifest import CHUNK_NBYTES
from parckpt.core.tensors import TensorRow
from parckpt.engine.bands import BAND_NBYTES, BoxStream
from parckpt.engine.chunks import NBUFFERS, ChunkWriter
from parckpt.engine.filecrc import local_crc
from parckpt.engine.fileplan import FilePlan, appended_entry, plan_file
from parckpt.engine.source import Source
from parckpt.engine.writing import finish
from parckpt.formats.base import Extent, Format, Literal
from parckpt.formats.safetensors import MINDSPORE_METADATA
from parckpt.storage.direct import OutputFile, aligned_buffer

__all__ = ["NewFile", "OnBytes", "Scribe", "Transcribed", "passes"]

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class NewFile:
    """What a file is to hold.

    Attributes
    ----------
    rows : sequence of int
        For each box its tensor's row in the source's contents.
    boxes : sequence of (TensorRow, Box)
        The tensor as it is called in this file, and the box of it.
    append : mapping
        Plain values after them.
    metadata : mapping
        Beside MindSpore's own, where the format has any.
    integrated : bool
        Tensors that belong to one rank carry it in their names.
    """

    rows: Sequence[int]
    boxes: Sequence[tuple[TensorRow, Box]]
    append: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    integrated: bool = True
    crc_check: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(box.size * tensor.dtype.itemsize for tensor, box in self.boxes)


@dataclass(frozen=True)
class Transcribed:
    """What was written: how the file is laid out, and the crc32 of each chunk."""

    plan: FilePlan
    chunk_crcs: npt.NDArray[np.uint32]


class Scribe:
    """Writes files from one source, with buffers kept from file to file. Not collective.

    Parameters
    ----------
    on_bytes : callable, optional
        Called with bytes of tensors that were read; what has to be read twice counts twice (see `passes`).
    band_nbytes : int
        Memory that boxes are put together in.
    """

    def __init__(
        self,
        source: Source,
        form: Format,
        *,
        on_bytes: OnBytes | None = None,
        band_nbytes: int = BAND_NBYTES,
    ) -> None:
        self._source, self._form, self._on_bytes, self._band_nbytes = source, form, on_bytes, band_nbytes
        self._buffers: list[memoryview] = []

    def write(self, file: NewFile, path: str, mode: int) -> Transcribed:
        """Write and sync a file at a path that is free; after an error it is for the caller to remove.

        Raises
        ------
        IntegrityError
            Something in the source is damaged or missing: named.
        ConfigError
            The format cannot hold it.
        ParckptError
        """
        plan = self._plan(file, 0 if file.crc_check else None)
        if file.crc_check and self._form.crc_first:
            plan = self._plan(file, self._crc(file, plan))
        with OutputFile(self._source.fs, path, plan.nbytes, mode=mode) as output:
            if not self._buffers:
                self._buffers = [aligned_buffer(CHUNK_NBYTES) for _ in range(NBUFFERS)]
            with ChunkWriter(output, plan.nbytes, self._buffers) as writer:
                self._stream(file, plan, writer)
                output.finish(plan.nbytes)
        return Transcribed(plan, writer.chunk_crcs)

    def _stream(self, file: NewFile, plan: FilePlan, writer: ChunkWriter) -> None:
        extents = [part for part in plan.layout.parts if isinstance(part, Extent) and part.entry < plan.nboxes]
        stream = self._open(file, list(dict.fromkeys(part.entry for part in extents)))
        try:
            for part in plan.layout.parts:
                if isinstance(part, Literal):
                    writer.append(part.data)
                elif part.entry >= plan.nboxes:
                    writer.append(plan.contents[part.entry - plan.nboxes][part.start : part.start + part.nbytes])
                else:
                    for block in stream.take(part.nbytes):
                        writer.append(block)
        finally:
            stream.close()
        finish(plan, self._form, writer)

    def _crc(self, file: NewFile, plan: FilePlan) -> int:
        """MindSpore's crc of safetensors stands in the header: the tensors are read once before."""
        stream = self._open(file, range(plan.nboxes))
        try:
            return local_crc(plan, [partial(stream.take, entry.nbytes) for entry in plan.entries[: plan.nboxes]])
        finally:
            stream.close()

    def _open(self, file: NewFile, order: Sequence[int]) -> BoxStream:
        pieces = [(file.rows[number], file.boxes[number][1]) for number in order]
        return BoxStream(self._source, pieces, on_bytes=self._on_bytes, band_nbytes=self._band_nbytes)

    def _plan(self, file: NewFile, crc: int | None) -> FilePlan:
        extra = [appended_entry(self._form, name, value) for name, value in file.append.items()]
        metadata = {**MINDSPORE_METADATA, **file.metadata}
        return plan_file(self._form, file.boxes, extra, integrated=file.integrated, crc=crc, metadata=metadata)


def passes(file: NewFile, form: Format) -> int:
    """How often the tensors of a file have to be read."""
    return 2 if file.crc_check and form.crc_first else 1
