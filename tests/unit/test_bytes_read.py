"""Looking into large checkpoints reads kilobytes, and a part of a tensor its chunks: counted at the file system."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import parckpt
from parckpt.core.dtypes import by_name
from parckpt.core.manifest import CHUNK_NBYTES
from parckpt.formats.base import Literal
from parckpt.formats.registry import FORMATS
from parckpt.storage.filesystem import PosixFileSystem

KIB = 1 << 10
GIB = 1 << 30
WIDTH = 1 << 18  # elements of a row: 1 MiB


class CountingFileSystem(PosixFileSystem):
    """The machine's, counting the bytes that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes_read = 0

    def pread_into(self, fd: int, buffer: bytearray | memoryview, byte_offset: int) -> int:
        count = super().pread_into(fd, buffer, byte_offset)
        self.nbytes_read += count
        return count


@pytest.fixture
def fs() -> CountingFileSystem:
    return CountingFileSystem()


def sparse_file(path: Path, form: str, nbytes: int) -> int:
    """A file of that many bytes in 8 tensors of which only the headers take space; returns the rows of each."""
    rows = nbytes // 8 // (4 * WIDTH)
    layout = FORMATS[form].layout(
        [FORMATS[form].entry(f"w{k}", by_name("float32"), (rows, WIDTH)) for k in range(8)], metadata={}, crc=None
    )
    with path.open("wb") as file:
        for part in layout.parts:
            if isinstance(part, Literal):
                file.seek(part.byte_offset)
                file.write(part.data)
        file.truncate(layout.nbytes)
    return rows


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_opening_a_file_of_100_gigabytes(form: str, fs: CountingFileSystem, tmp_path: Path) -> None:
    path = tmp_path / f"big.{form}"
    rows = sparse_file(path, form, 100 * GIB)
    assert path.stat().st_size > 99 * GIB
    checkpoint = parckpt.open_checkpoint(path, filesystem=fs)
    assert [checkpoint[name].shape for name in checkpoint] == [(rows, WIDTH)] * 8
    assert fs.nbytes_read < 1024 * KIB
    before = fs.nbytes_read
    part = checkpoint["w7"][rows - 3 : rows - 1]
    assert part.shape == (2, WIDTH)
    assert not part.any()
    assert fs.nbytes_read - before <= part.nbytes + 64 * KIB  # without checksums just the bytes asked for


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of 48 MiB: 16 chunks and a little of one tensor after a small one."""
    values = np.arange(48 * WIDTH, dtype=np.float32).reshape(48, WIDTH)
    config = parckpt.CheckpointConfig()
    with parckpt.ModelCheckpoint("m", tmp_path, config, comm=parckpt.SELF) as checkpoints:
        return Path(checkpoints.save_now({"small": np.ones(5), "w": values}, 1))


def test_listing_reads_kilobytes(saved: Path, fs: CountingFileSystem) -> None:
    (info,) = parckpt.list_checkpoints(saved.parent, filesystem=fs)
    assert info.nbytes == saved.stat().st_size > 48 << 20
    assert fs.nbytes_read < 64 * KIB


def test_inspecting_reads_kilobytes(saved: Path, fs: CountingFileSystem) -> None:
    assert parckpt.inspect(saved, filesystem=fs).tensors == 2
    assert fs.nbytes_read < 64 * KIB


def test_a_part_reads_its_chunks_only(saved: Path, fs: CountingFileSystem) -> None:
    checkpoint = parckpt.open_checkpoint(saved, filesystem=fs)
    assert fs.nbytes_read < 64 * KIB
    before = fs.nbytes_read
    part = checkpoint["w"][9:11]  # 2 MiB within one chunk: headers shift it by less than a row
    np.testing.assert_array_equal(part[:, 0], [9 * WIDTH, 10 * WIDTH])
    assert fs.nbytes_read - before == CHUNK_NBYTES
    before = fs.nbytes_read
    part = checkpoint["w"][6:10]  # 4 MiB over two chunks
    assert part[-1, -1] == 10 * WIDTH - 1
    assert fs.nbytes_read - before == 2 * CHUNK_NBYTES
    before = fs.nbytes_read
    assert checkpoint["small"][2] == 1.0
    assert fs.nbytes_read - before == CHUNK_NBYTES
