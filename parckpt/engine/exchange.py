"""Restoring into the arrays of all ranks: each rank reads its chunks, keeps its parts and sends on the others'.

One message per chunk and destination: 8 bytes of status, then the packed bytes. A chunk's bytes are stored or sent only
after its checksum held. No rank leaves early: after a failure the remaining messages are sent without bytes, so each
receive is met and all ranks come to the agreement that follows. A rank that waits for one thing goes on with all
others, so no pattern of messages can lock up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parckpt.comm.arrival import MAX_NAMED
from parckpt.comm.wait import MAX_SLEEP_S, MIN_SLEEP_S, SPIN_S
from parckpt.core.contents import Contents
from parckpt.core.layout import Box
from parckpt.core.readplan import ChunkRead, Delivery, ReadPlan, Want
from parckpt.core.transfer import Port, copies, extract
from parckpt.engine.group import TAG_RESTORE, Group
from parckpt.engine.mailbox import Inbox, Outbox
from parckpt.engine.reading import ChunkReader, ChunkResult, ChunkTask
from parckpt.engine.targets import Sink
from parckpt.errors import IntegrityError, InternalError, TimeoutExpiredError
from parckpt.storage.filesystem import FileSystem

__all__ = ["Outcome", "restore_arrays"]

Bytes = npt.NDArray[np.uint8]

STATUS_NBYTES = 8
# A rank that only heard of a failure says STOPPED: it is not to blame.
OK, DAMAGED, FAILED, STOPPED = range(4)

_Key = tuple[tuple[int, Box], ...]


@dataclass(frozen=True)
class Outcome:
    """How one rank's part went; not agreed on yet.

    Attributes
    ----------
    error : Exception or None
        This rank's own.
    failed_peers : tuple of int
        Ranks that told this one that they could not read something.
    complete : bool
        Every byte of every want is in place.
    touched : tuple of str
        Names of the tensors of this rank that were written to, completely or not.
    chunks_read, nbytes_read : int
        What this rank read from disk and verified.
    """

    error: Exception | None
    failed_peers: tuple[int, ...]
    complete: bool
    touched: tuple[str, ...]
    chunks_read: int
    nbytes_read: int


def restore_arrays(
    group: Group,
    fs: FileSystem,
    root_path: str,
    contents: Contents,
    plan: ReadPlan,
    ports: Mapping[Want, Sequence[Port]],
    *,
    manifest_path: str | None = None,
    on_filled: Callable[[Want], None] | None = None,
) -> Outcome:
    """Fill the wanted boxes of all ranks. Collective over ``group``; call from the thread that owns MPI.

    Parameters
    ----------
    root_path : str
        Directory that the files' paths are relative to.
    plan : ReadPlan
        The same on all ranks.
    ports : mapping
        For each of this rank's wants the places its bytes go to. Asked for when bytes come, never kept, so the mapping
        may make them when needed and let them go in ``on_filled``.
    manifest_path : str, optional
        See `ChunkReader`.
    on_filled : callable, optional
        Called with a want when its last byte is in place, and with an empty one at once.

    Returns
    -------
    Outcome
        Errors are in it, not raised: agree on ``error`` next (`Group.agree`). Without a failure anywhere ``complete``
        is True on all ranks; with one, no further array is touched once a rank knows of it.

    Raises
    ------
    TimeoutExpiredError
        If nothing moved for the group's time-out. Fact ``missing``: the ranks that are waited for. The communicator
        is then unusable.
    """
    if len(plan.wants) != group.size:
        raise InternalError(f"a plan for {len(plan.wants)} ranks met {group.size}")
    reads = plan.reads_of(group.rank)
    tasks = [ChunkTask.of(contents, read.file, read.chunk) for read in reads]
    sink = Sink(contents, plan.wants[group.rank], ports, on_filled)
    with ExitStack() as stack:
        reader: ChunkReader | Exception
        try:
            reader = stack.enter_context(ChunkReader(fs, root_path, contents, tasks, manifest_path=manifest_path))
        except Exception as error:  # no memory, no thread: the others must hear of it
            reader = error
        return _Exchange(group, contents, plan, sink, reads, reader).run()


class _Exchange:
    """One rank's part, as a loop of small steps of which none waits."""

    def __init__(
        self,
        group: Group,
        contents: Contents,
        plan: ReadPlan,
        sink: Sink,
        reads: list[ChunkRead],
        reader: ChunkReader | Exception,
    ) -> None:
        self._group, self._contents, self._sink = group, contents, sink
        self._reader = reader if isinstance(reader, ChunkReader) else None
        self._reads = deque(reads)
        receipts = plan.receipts_of(group.rank)
        sizes = {rank: [STATUS_NBYTES + read.deliveries[0].nbytes for read in row] for rank, row in receipts.items()}
        self._receipts = {rank: deque(row) for rank, row in receipts.items()}
        self._inbox, self._outbox = Inbox(group.comm, TAG_RESTORE, sizes), Outbox(group.comm, TAG_RESTORE)
        self._current: ChunkRead | None = None  # the chunk being handed out, and its bytes unless there are none
        self._result: ChunkResult | None = None
        self._pending: deque[Delivery] = deque()
        self._packed: tuple[_Key, Bytes] | None = None
        self._error: Exception | None = None
        self._failed_peers: set[int] = set()
        self._stopped = False
        self._chunks_read = self._nbytes_read = 0
        if isinstance(reader, Exception):
            self._fail(reader)

    def run(self) -> Outcome:
        clock = self._group.waiter.clock
        self._guard(self._sink.begin)
        since, pause = clock.monotonic(), MIN_SLEEP_S
        while not self._finished():
            if self._step():
                since, pause = clock.monotonic(), MIN_SLEEP_S
                continue
            elapsed = clock.monotonic() - since
            if elapsed >= self._group.waiter.timeout_s:
                raise self._expired()
            if elapsed >= SPIN_S:
                self._idle(pause)
                pause = min(2 * pause, MAX_SLEEP_S)
        if not self._stopped:
            self._guard(self._sink.check)
        return Outcome(
            self._error,
            tuple(sorted(self._failed_peers)),
            not self._stopped,
            self._sink.touched,
            self._chunks_read,
            self._nbytes_read,
        )

    def _finished(self) -> bool:
        return not self._reads and self._current is None and self._outbox.is_empty and self._inbox.is_empty

    def _step(self) -> bool:
        """Whether anything moved."""
        moved = self._outbox.poll()
        for source, message in self._inbox.poll():
            self._take(source, message)
            moved = True
        return self._advance() or moved

    def _idle(self, pause: float) -> None:
        if self._reader is not None and self._reads and self._current is None and not self._stopped:
            self._reader.ready(pause)  # wakes up as soon as the disk has answered
        else:
            self._group.waiter.sleep(pause)

    def _take(self, source: int, message: Bytes) -> None:
        """A message has come: its bytes were verified by the sender."""
        read = self._receipts[source].popleft()
        delivery = read.deliveries[0]
        status = int(message[:STATUS_NBYTES].view("<i8")[0]) if message.size >= STATUS_NBYTES else None
        if status == OK and message.size == STATUS_NBYTES + delivery.nbytes:
            if not self._stopped:
                self._guard(lambda: self._sink.store(delivery, self._window(read), message[STATUS_NBYTES:]))
        elif status in (DAMAGED, FAILED, STOPPED):
            self._stop()
            if status != STOPPED:
                self._failed_peers.add(source)
        else:
            self._fail(InternalError(f"rank {source} sent {message.size} bytes with status {status}"))

    def _advance(self) -> bool:
        """Go on with the chunk at hand, or take the next one."""
        if self._current is None:
            return self._next()
        moved = False
        while self._pending and self._outbox.has_room:
            self._send(self._pending.popleft())
            moved = True
        if not self._pending:
            if self._result is not None and self._reader is not None:
                self._reader.release(self._result)
            self._current = self._result = self._packed = None
            moved = True
        return moved

    def _next(self) -> bool:
        if not self._reads:
            return False
        if not self._stopped:
            assert self._reader is not None
            self._result = self._reader.poll()
            if self._result is None:
                return False
            self._count()
        self._current = self._reads.popleft()
        rank = self._group.rank
        # From the next rank on, so that not all readers send to rank 0 first.
        others = [delivery for delivery in self._current.deliveries if delivery.rank != rank]
        self._pending = deque(sorted(others, key=lambda delivery: (delivery.rank - rank) % self._group.size))
        for delivery in self._current.deliveries:
            if delivery.rank == rank and not self._stopped:
                self._guard(lambda own=delivery: self._pull(own))  # type: ignore[misc]
        return True

    def _pull(self, delivery: Delivery) -> None:
        assert self._current is not None
        assert self._result is not None
        self._sink.pull(delivery, self._window(self._current), self._result.data)

    def _count(self) -> None:
        assert self._result is not None
        if self._result.error is not None:
            self._fail(self._result.error)
        else:
            self._chunks_read += 1
            self._nbytes_read += self._result.data.size

    def _send(self, delivery: Delivery) -> None:
        key = tuple((segment.stored.index, segment.part) for segment in delivery.segments)
        if not self._stopped and (self._packed is None or self._packed[0] != key):
            self._guard(lambda: self._pack(key, delivery))
        # A failure after the bytes were packed does not make them wrong, but nobody needs them any more.
        if self._stopped or self._packed is None:
            message = np.array([self._status()], "<i8").view(np.uint8)
        else:
            message = self._packed[1]
        self._outbox.send(delivery.rank, message, STATUS_NBYTES + delivery.nbytes)

    def _pack(self, key: _Key, delivery: Delivery) -> None:
        """Pack a message; ranks that hold replicas get the same one."""
        assert self._current is not None
        assert self._result is not None
        self._packed = None
        message = np.empty(STATUS_NBYTES + delivery.nbytes, np.uint8)
        message[:STATUS_NBYTES].view("<i8")[0] = OK
        position = STATUS_NBYTES
        for segment in delivery.segments:
            stored = segment.stored
            itemsize = self._contents.tensors[stored.tensor].dtype.itemsize
            window = self._window(self._current)
            for copy in copies(stored.box, stored.extents, itemsize, window, segment.part, flat=True):
                message[position : position + copy.nbytes] = extract(copy, self._result.data)
                position += copy.nbytes
        if position != message.size:
            raise InternalError(f"{position} bytes packed, {message.size} planned")
        self._packed = key, message

    def _window(self, read: ChunkRead) -> tuple[int, int]:
        return ChunkTask.of(self._contents, read.file, read.chunk).window

    def _status(self) -> int:
        if self._error is None:
            return STOPPED
        return DAMAGED if isinstance(self._error, IntegrityError) else FAILED

    def _guard(self, step: Callable[[], None]) -> None:
        """Do what touches the caller's memory: its error must wait until all messages are through."""
        try:
            step()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._stop()

    def _stop(self) -> None:
        """Read and store no more; the messages go on."""
        self._stopped = True
        if self._reader is not None:
            self._reader.close(wait=False)

    def _expired(self) -> TimeoutExpiredError:
        what = "restoring"
        missing = sorted({*self._inbox.sources, *self._outbox.destinations})
        if not missing:
            missing = [self._group.rank]
            what += f": reading {self._contents.files[self._reads[0].file].path!r}"
        names = ", ".join(str(rank) for rank in missing[:MAX_NAMED])
        message = f"{what}: nothing moved for {self._group.waiter.timeout_s:g} s, waiting for rank {names}"
        ticket = self._inbox.ticket or self._outbox.ticket
        if ticket is None:
            return TimeoutExpiredError(message, missing=missing, what=what)
        return ticket.roll_call.fail(message, missing, what)
