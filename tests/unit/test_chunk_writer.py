"""Writing in chunks: any pieces make the same file and checksums, and no write error is lost."""

from __future__ import annotations

import errno
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.engine import chunks
from parckpt.engine.chunks import NBUFFERS, ChunkWriter
from parckpt.errors import StorageError
from parckpt.storage.direct import aligned_buffer

pytestmark = pytest.mark.fast

CHUNK = 8192


class Output:
    """Keeps what is written; fails at one write if told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.data = bytearray()
        self.writes: list[tuple[int, int]] = []
        self._fail_at = fail_at
        self._lock = threading.Lock()

    def write(self, buffer: memoryview, byte_offset: int) -> None:
        with self._lock:
            self.writes.append((byte_offset, len(buffer)))
            if self._fail_at == len(self.writes):
                raise StorageError("no more", errno=errno.EIO)
            self.data.extend(bytes(max(0, byte_offset + len(buffer) - len(self.data))))
            self.data[byte_offset : byte_offset + len(buffer)] = buffer


@contextmanager
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_NBYTES", CHUNK)
        yield


def buffers() -> list[memoryview]:
    return [aligned_buffer(CHUNK) for _ in range(NBUFFERS)]


def random_bytes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


def crcs(data: bytes) -> list[int]:
    return [zlib.crc32(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK)]


LENGTHS = st.integers(0, 5 * CHUNK) | st.builds(
    lambda k, d: max(0, k * CHUNK + d), st.integers(0, 5), st.integers(-1, 1)
)


@given(LENGTHS, st.lists(st.integers(0, 2 * CHUNK), max_size=12), st.integers(0, 99))
def test_any_pieces_make_the_file(length: int, cuts: list[int], seed: int) -> None:
    data = random_bytes(length, seed)
    output = Output()
    with small_chunks(), ChunkWriter(output, length, buffers()) as writer:
        position = 0
        for cut in [*cuts, length]:
            piece = data[position : position + cut]
            if cut % 3 == 0 and len(piece) <= CHUNK - position % CHUNK:
                writer.fill(len(piece), lambda room, piece=piece: np.copyto(room, piece))
            elif cut % 3 == 1:
                writer.append(piece.tobytes())
            else:
                writer.append(piece)
            position += len(piece)
            if cut % 5 == 0:
                assert writer.crc_so_far() == zlib.crc32(data[:position])
        writer.finish()
        assert writer.crc_so_far() == zlib.crc32(data)
    assert bytes(output.data[:length]) == data.tobytes()
    assert not any(output.data[length:])  # the tail is padded with zeros
    assert writer.chunk_crcs.tolist() == writer.content_crcs.tolist() == crcs(data.tobytes())
    assert all(offset % CHUNK == 0 and nbytes % 4096 == 0 for offset, nbytes in output.writes)
    assert len(output.writes) == len(writer.chunk_crcs)


@given(st.lists(st.tuples(st.integers(0, 3 * CHUNK), st.integers(0, CHUNK)), max_size=4), st.integers(0, 99))
def test_volatile_bytes_do_not_count_as_content(ranges: list[tuple[int, int]], seed: int) -> None:
    volatile, end = [], 0
    for start, count in sorted(ranges):
        volatile.append((max(start, end), max(start, end) + count))
        end = volatile[-1][1]
    first = random_bytes(3 * CHUNK + 100, seed)
    second = first.copy()
    for start, stop in volatile:
        second[start:stop] ^= 0xFF
    changed = second.copy()
    stable = sorted(set(range(len(first))) - {at for start, stop in volatile for at in range(start, stop)})
    if stable:
        changed[stable[seed % len(stable)]] ^= 1
    found = []
    for data in (first, second, changed):
        with small_chunks(), ChunkWriter(Output(), len(data), buffers(), volatile) as writer:
            writer.append(data)
            writer.finish()
        found.append(writer.content_crcs.tolist())
        assert writer.chunk_crcs.tolist() == crcs(data.tobytes())
    assert found[0] == found[1]
    assert (found[0] != found[2]) == bool(stable)


@pytest.mark.parametrize("fail_at", [1, 2, 5, 9])
def test_a_failed_write_is_raised_in_the_filling_thread(fail_at: int) -> None:
    data = random_bytes(9 * CHUNK)
    before = threading.active_count()
    output = Output(fail_at)

    def write() -> None:
        with ChunkWriter(output, len(data), buffers()) as writer:
            writer.append(data)
            writer.finish()

    with small_chunks(), pytest.raises(StorageError, match="no more"):
        write()
    assert threading.active_count() == before
    assert len(output.writes) <= 9


def test_the_error_stays() -> None:
    with small_chunks(), ChunkWriter(Output(1), 20 * CHUNK, buffers()) as writer:
        with pytest.raises(StorageError):
            writer.append(random_bytes(20 * CHUNK))
        with pytest.raises(StorageError):
            writer.finish()
        with pytest.raises(StorageError):
            writer.crc_so_far()


def test_leaving_early_ends_the_threads_and_drops_the_rest() -> None:
    before = threading.active_count()
    output = Output()
    with small_chunks():
        with ChunkWriter(output, 3 * CHUNK, buffers()) as writer:
            writer.append(random_bytes(CHUNK + 5))
        writer.close()  # a second time does nothing
    assert threading.active_count() == before
    assert output.writes == [(0, CHUNK)]


def test_an_empty_file() -> None:
    output = Output()
    with small_chunks(), ChunkWriter(output, 0, buffers()) as writer:
        writer.append(b"")
        writer.fill(0, lambda room: 1 / 0)
        writer.finish()
        assert writer.crc_so_far() == 0
    assert (output.writes, writer.chunk_crcs.tolist()) == ([], [])
