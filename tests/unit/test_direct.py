"""Direct and buffered files hold the same bytes; errors are never lost."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from parckpt.errors import CheckpointExistsError, NoSpaceError, StorageError, SyncError, TruncatedError
from parckpt.storage import atomic
from parckpt.storage.direct import ALIGNMENT, InputFile, OutputFile, _address, aligned_buffer
from parckpt.storage.filesystem import FileSystem, PosixFileSystem, opened
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem

pytestmark = pytest.mark.fast

FILE_SYSTEMS: dict[str, Callable[[], FileSystem]] = {
    "posix": PosixFileSystem,
    "refused": lambda: MemoryFileSystem(direct="refused"),
    "open-only": lambda: MemoryFileSystem(direct="open-only"),
    "works": lambda: MemoryFileSystem(direct="works"),
    "short": lambda: FaultyFileSystem(MemoryFileSystem(direct="works"), max_transfer_nbytes=ALIGNMENT + 7),
    "short-pages": lambda: FaultyFileSystem(MemoryFileSystem(direct="works"), max_transfer_nbytes=2 * ALIGNMENT),
}


@pytest.fixture(params=FILE_SYSTEMS)
def fs(request: pytest.FixtureRequest) -> FileSystem:
    return FILE_SYSTEMS[request.param]()


@pytest.fixture
def path(fs: FileSystem, tmp_path: Path) -> str:
    return str(tmp_path / "file") if isinstance(fs, PosixFileSystem) else "/file"


def content_of(nbytes: int) -> bytes:
    return random.Random(nbytes).randbytes(nbytes)


def in_buffer(content: bytes, nbytes: int | None = None) -> memoryview:
    buffer = aligned_buffer(len(content) if nbytes is None else nbytes)
    buffer[: len(content)] = content
    return buffer


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 5 * 4096 + 3])
def test_aligned_buffers_start_at_a_page(nbytes: int) -> None:
    buffer = aligned_buffer(nbytes)
    assert (buffer.nbytes, buffer.readonly, bytes(buffer)) == (nbytes, False, bytes(nbytes))
    assert nbytes == 0 or _address(buffer) % ALIGNMENT == 0


@pytest.mark.parametrize("nbytes", [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 70 * ALIGNMENT + 5])
@pytest.mark.parametrize("padded", [False, True])
def test_written_is_read(fs: FileSystem, path: str, nbytes: int, padded: bool) -> None:
    content = content_of(nbytes)
    buffer = in_buffer(content, -(-nbytes // ALIGNMENT) * ALIGNMENT if padded else nbytes)
    with OutputFile(fs, path, nbytes) as file:
        file.write(buffer, 0)
        file.finish(nbytes)
    assert atomic.read_file(fs, path, 1 << 20) == content
    with InputFile(fs, path) as source:
        assert source.nbytes == nbytes
        assert source.read(0, nbytes) == content


def test_pieces_in_any_order_aligned_or_not(fs: FileSystem, path: str) -> None:
    content = content_of(40 * ALIGNMENT + 100)
    cuts = [0, 10, ALIGNMENT, 3 * ALIGNMENT, 3 * ALIGNMENT + 1, 8 * ALIGNMENT, 30 * ALIGNMENT, len(content)]
    pieces = list(itertools.pairwise(cuts))
    random.Random(1).shuffle(pieces)
    with OutputFile(fs, path, 10, direct="auto") as file:  # grows beyond what was said
        for start, stop in pieces:
            file.write(in_buffer(content[start:stop]), start)
            file.write(b"", 7)
        file.finish(len(content))
    assert atomic.read_file(fs, path, 1 << 20) == content


@pytest.mark.parametrize("direct", ["auto", False])
def test_any_range_into_any_buffer(fs: FileSystem, path: str, direct: str) -> None:
    content = content_of((1 << 20) + 333)
    atomic.write_file(fs, path, content)
    rng = random.Random(2)
    with InputFile(fs, path, direct=direct) as file:  # type: ignore[arg-type]
        for _ in range(60):
            start = rng.choice([rng.randrange(len(content)), rng.randrange(200) * ALIGNMENT])
            stop = rng.choice([rng.randint(start, len(content)), len(content)])
            skew = rng.choice([0, start % ALIGNMENT, rng.randrange(ALIGNMENT)])
            target = aligned_buffer(stop - start + skew + 1)
            target[-1] = 7
            file.read_into(target[skew:-1], start)
            assert target[skew:-1] == content[start:stop]
            assert (bytes(target[:skew]), target[-1]) == (bytes(skew), 7)


def test_reading_past_the_end_allocates_nothing(fs: FileSystem, path: str) -> None:
    atomic.write_file(fs, path, b"abc")
    with InputFile(fs, path) as file:
        for byte_offset, nbytes in [(0, 4), (3, 1), (1 << 60, 1), (0, 1 << 60), (-1, 1), (1, -1)]:
            with pytest.raises(TruncatedError, match="3 bytes"):
                file.read(byte_offset, nbytes)
        assert file.read(3, 0) == b""


def test_a_file_that_shrinks_while_open_is_truncated(fs: FileSystem, path: str) -> None:
    atomic.write_file(fs, path, content_of(1 << 20))
    with InputFile(fs, path) as file:
        atomic.write_file(fs, path, b"abc", exclusive=False)
        with pytest.raises(TruncatedError, match="ended at"):
            file.read_into(aligned_buffer(1 << 20), 0)


def test_a_writer_thread_beside_a_filling_thread(fs: FileSystem, path: str) -> None:
    chunk, count = 4 * ALIGNMENT, 12
    content = content_of(chunk * count)
    buffers = [aligned_buffer(chunk), aligned_buffer(chunk)]
    free, full = threading.Semaphore(2), threading.Semaphore(0)
    with OutputFile(fs, path, len(content)) as file:

        def write() -> None:
            for index in range(count):
                full.acquire()
                file.write(buffers[index % 2], index * chunk)
                free.release()

        writer = threading.Thread(target=write)
        writer.start()
        for index in range(count):
            free.acquire()
            buffers[index % 2][:] = content[index * chunk : (index + 1) * chunk]
            full.release()
        writer.join()
        file.finish(len(content))
    assert atomic.read_file(fs, path, 1 << 20) == content


def test_an_existing_file_is_refused_and_kept(fs: FileSystem, path: str) -> None:
    atomic.write_file(fs, path, b"mine")
    with pytest.raises(CheckpointExistsError):
        OutputFile(fs, path, 10)
    assert atomic.read_file(fs, path, 10) == b"mine"


def test_discard_removes_the_file(fs: FileSystem, path: str) -> None:
    file = OutputFile(fs, path, 10)
    file.write(b"abc", 0)
    file.discard()
    with pytest.raises(StorageError, match="No such file"):
        fs.stat(path)


def test_a_closed_file_says_so(fs: FileSystem, path: str) -> None:
    file = OutputFile(fs, path, 1)
    file.close()
    file.close()
    with pytest.raises(StorageError, match="closed"):
        file.write(b"a", 0)
    atomic.write_file(fs, path, b"abc", exclusive=False)
    source = InputFile(fs, path)
    source.close()
    source.close()
    with pytest.raises(StorageError, match="closed"):
        source.read(0, 1)


def test_mode_is_exact(fs: FileSystem, path: str) -> None:
    with OutputFile(fs, path, 1, mode=0o666) as file:
        file.finish(0)
    assert fs.stat(path).mode == 0o666


def test_refused_direct_io_is_remembered_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    fs = MemoryFileSystem(direct="open-only")
    content = content_of(8 * ALIGNMENT)
    with caplog.at_level(logging.INFO):
        for index, direct in enumerate([True, False, False]):
            with OutputFile(fs, f"/file-{index}", len(content)) as file:
                assert file.is_direct is direct
                file.write(in_buffer(content), 0)
                assert not file.is_direct
                file.finish(len(content))
            assert atomic.read_file(fs, f"/file-{index}", 1 << 20) == content
    assert [record.message for record in caplog.records if "direct I/O" in record.message] == [
        "the file system of /file-0 refuses direct I/O: going through the page cache"
    ]


def test_direct_io_is_used_where_it_works() -> None:
    fs = FaultyFileSystem(MemoryFileSystem(direct="works"))
    with OutputFile(fs, "/file", 8 * ALIGNMENT) as file:
        assert file.is_direct
        file.write(in_buffer(content_of(8 * ALIGNMENT)), 0)
        file.write(in_buffer(b"abc"), 8 * ALIGNMENT)
        file.finish(8 * ALIGNMENT + 3)
    assert [call.operation for call in fs.calls].count("pwrite") == 2
    assert [call.operation for call in fs.calls].count("open") == 2


def test_space_is_reserved_before_the_first_byte() -> None:
    fs = MemoryFileSystem(capacity_nbytes=10 * ALIGNMENT)
    with pytest.raises(NoSpaceError):
        OutputFile(fs, "/file", 11 * ALIGNMENT)
    assert (fs.listdir("/"), fs.nopen) == ([], 0)


def test_a_failed_sync_stays_failed() -> None:
    disk = MemoryFileSystem(direct="works")
    content = in_buffer(content_of(8 * ALIGNMENT))
    fs = FaultyFileSystem(disk, fail_at=1, only=frozenset({"fsync"}))
    file = OutputFile(fs, "/file", content.nbytes)
    file.write(content, 0)
    with pytest.raises(SyncError):
        file.finish(content.nbytes)
    for again in (lambda: file.finish(content.nbytes), lambda: file.write(b"x", 0)):
        with pytest.raises(SyncError):
            again()
    file.close()
    assert fs.count == 1
    # And it was right not to try: the kernel would have said yes, with nothing on disk.
    with opened(disk, "/file", os.O_WRONLY) as fd:
        disk.fsync(fd)
    disk.sync_directory("/")
    assert atomic.read_file(disk.crash(keep="all"), "/file", 1 << 20) == bytes(content.nbytes)


@pytest.mark.parametrize("operation", ["pwrite", "truncate", "close", "open", "allocate", "chmod_open", "stat_open"])
@pytest.mark.parametrize("nth", [1, 2])
def test_every_error_is_raised(operation: str, nth: int) -> None:
    disk = MemoryFileSystem(direct="works")
    fs = FaultyFileSystem(disk, fail_at=nth, only=frozenset({operation}))

    def save() -> None:
        with OutputFile(fs, "/file", 5 * ALIGNMENT) as file:
            file.write(in_buffer(content_of(4 * ALIGNMENT)), 0)
            file.write(in_buffer(b"tail"), 4 * ALIGNMENT)
            file.finish(4 * ALIGNMENT + 4)

    save_fails = nth == 1 or operation in ("pwrite", "close", "open")
    if not save_fails:
        save()
        assert fs.failed is None
        return
    with pytest.raises(StorageError) as caught:
        save()
    assert caught.value.errno == errno.EIO
    assert caught.value.facts["operation"] == operation
    assert disk.nopen == 0
