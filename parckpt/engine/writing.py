"""Producing one data file from this rank's own arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from parckpt.core.layout import Box
from parckpt.core.manifest import CHUNK_NBYTES
from parckpt.engine.arrays import Source
from parckpt.engine.chunks import ChunkWriter
from parckpt.engine.fileplan import FilePlan
from parckpt.formats.base import Format, Literal

__all__ = ["finish", "stream_local"]

Bytes = npt.NDArray[np.uint8]

_NOTHING = np.zeros(0, np.uint8)


def stream_local(plan: FilePlan, form: Format, boxes: Sequence[tuple[Source, Box]], writer: ChunkWriter) -> None:
    """Write a file that holds this rank's boxes. Not collective.

    Parameters
    ----------
    boxes : sequence of (Source, Box)
        For each of the plan's boxes the held box it is part of, and the part itself in global coordinates.
    """
    entry, flat, reader = -1, _NOTHING, _Reader(iter(()))
    for part in plan.layout.parts:
        if isinstance(part, Literal):
            writer.append(part.data)
            continue
        stop = part.start + part.nbytes
        if part.entry >= plan.nboxes:
            writer.append(plan.contents[part.entry - plan.nboxes][part.start : stop])
            continue
        source, box = boxes[part.entry]
        if part.entry != entry:
            entry, plain = part.entry, source.flat(box)
            flat = _NOTHING if plain is None else plain
            reader = _Reader(source.blocks(box, CHUNK_NBYTES) if plain is None else iter(()))
        if flat.size:  # a whole tensor at once: with thousands of small ones the steps in between cost most
            writer.append(flat[part.start : stop])
        else:
            for block in reader.take(part.nbytes):
                writer.append(block)
        if stop == plan.entries[entry].nbytes:
            flat = _NOTHING
            source.release()
    finish(plan, form, writer)


class _Reader:
    """Cuts a stream of blocks into pieces of the lengths asked for."""

    def __init__(self, blocks: Iterator[Bytes]) -> None:
        self._blocks = blocks
        self._rest = np.zeros(0, np.uint8)

    def take(self, nbytes: int) -> Iterator[Bytes]:
        """Yield blocks of ``nbytes`` in all."""
        while nbytes:
            if not self._rest.size:
                self._rest = next(self._blocks)
            block, self._rest = self._rest[:nbytes], self._rest[nbytes:]
            nbytes -= block.size
            yield block


def finish(plan: FilePlan, form: Format, writer: ChunkWriter) -> None:
    """Add the trailer, if the file has one, and wait until everything is written."""
    if plan.layout.trailer_nbytes:
        writer.append(form.trailer(writer.crc_so_far()))
    writer.finish()
