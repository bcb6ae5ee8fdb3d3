"""How fast one process writes to a directory, found out by doing it the way a save does. Not collective."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from parckpt.core.clock import Clock
from parckpt.core.manifest import CHUNK_NBYTES
from parckpt.engine.chunks import NBUFFERS, ChunkWriter
from parckpt.errors import NoSpaceError, StorageError
from parckpt.storage.direct import OutputFile, aligned_buffer
from parckpt.storage.filesystem import FileSystem

__all__ = ["MEASURE_NBYTES", "Rate", "measure_rate"]

MEASURE_NBYTES = 512 << 20  # half a second on a fast disk; a slow one is given up on after the first chunks
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Rate:
    """What was written, synced, and how long both took together."""

    nbytes: int
    seconds: float
    direct: bool

    @property
    def per_second(self) -> float:
        """Bytes per second."""
        return self.nbytes / max(self.seconds, 1e-9)


def measure_rate(
    fs: FileSystem,
    directory: str,
    clock: Clock,
    nbytes: int,
    on_written: Callable[[int], None] = lambda nbytes: None,
) -> Rate:
    """Write a file of random bytes in chunks, sync it, and remove it.

    Raises
    ------
    NoSpaceError
        If there is not twice the room.
    StorageError
    """
    free = fs.free_nbytes(directory)
    if free < 2 * nbytes:
        said = f"{directory} has {free} bytes free; measuring takes a file of {nbytes}, and leaves as much for others"
        raise NoSpaceError(said, path=directory)
    path = os.path.join(directory, f".parckpt-measure-{secrets.token_hex(8)}")
    # Random, for file systems that compress.
    chunk = np.frombuffer(np.random.default_rng().bytes(CHUNK_NBYTES), np.uint8)
    buffers = [aligned_buffer(CHUNK_NBYTES) for _ in range(NBUFFERS)]
    output = OutputFile(fs, path, nbytes)
    try:
        begun = clock.monotonic()
        written = 0
        with ChunkWriter(output, nbytes, buffers) as writer:
            while written < nbytes and clock.monotonic() - begun < _PATIENCE_S:
                writer.append(chunk[: min(CHUNK_NBYTES, nbytes - written)])
                written += min(CHUNK_NBYTES, nbytes - written)
                on_written(CHUNK_NBYTES)
            writer.finish()
        output.finish(written)
        return Rate(written, clock.monotonic() - begun, output.is_direct)
    finally:
        with suppress(StorageError):
            output.discard()
