"""What every communicator must do, as checks that all ranks of one run together.

The same checks run on one process, on ranks in threads, and under mpiexec. A check is given a fresh communicator and
raises `AssertionError` on the rank that saw something wrong.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from parckpt.comm.arrival import DRAIN_EVERY
from parckpt.comm.base import Communicator, Request
from parckpt.comm.collective import allgather_bytes, allgather_distinct, bcast_bytes, reduce_max
from parckpt.comm.outcome import agree, run_on_all
from parckpt.comm.wait import Waiter
from parckpt.errors import LayoutError, ParckptError, RankError, StorageError, TimeoutExpiredError

__all__ = ["CHECKS", "TIMEOUT_CHECKS", "Check"]

Check = Callable[[Communicator], None]

CHECKS: dict[str, Check] = {}
"""Checks after which the communicator is as good as new, by name."""

TIMEOUT_CHECKS: dict[str, Check] = {}
"""Checks after which it is unusable. They need two ranks and take seconds, since somebody has to be waited for."""

LONG_NBYTES = (1 << 20) + 13
"""Longer than what any MPI sends before the receiver asks for it, and not a multiple of anything."""

LIMIT_S = 60.0


def _check(fn: Check) -> Check:
    CHECKS[fn.__name__] = fn
    return fn


def _timeout_check(fn: Check) -> Check:
    TIMEOUT_CHECKS[fn.__name__] = fn
    return fn


def _wait(*requests: Request) -> None:
    waiter = Waiter(LIMIT_S)
    for request in requests:
        waiter.wait(request, "a check")


def _neighbours(comm: Communicator) -> tuple[int, int]:
    return (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size


def _content(seed: int, nbytes: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


@_check
def ranks_are_numbered(comm: Communicator) -> None:
    assert 0 <= comm.rank < comm.size
    ranks = allgather_bytes(comm, str(comm.rank).encode(), Waiter(LIMIT_S))
    assert ranks == [str(rank).encode() for rank in range(comm.size)]


@_check
def messages_arrive_whole(comm: Communicator) -> None:
    left, right = _neighbours(comm)
    for nbytes in (0, 1, 8, 4096, LONG_NBYTES):
        received = bytearray(nbytes)
        receive = comm.irecv(received, left, 7)
        _wait(comm.isend(_content(comm.rank, nbytes), right, 7), receive)
        assert received == _content(left, nbytes)
        assert receive.nbytes == nbytes


@_check
def arrays_of_every_type_travel(comm: Communicator) -> None:
    left, right = _neighbours(comm)
    for dtype in (np.float64, np.complex64, np.bool_, np.dtype(">i4"), ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        sent: np.ndarray[Any, Any] = np.arange(24).reshape(2, 3, 4).astype(dtype)
        received = np.zeros_like(sent)
        _wait(comm.irecv(received, left, 3), comm.isend(sent, right, 3))
        assert received.tobytes() == sent.tobytes()
    scalar = np.array(1.5)
    _wait(comm.irecv(scalar, left, 3), comm.isend(np.array(float(comm.rank)), right, 3))
    assert scalar == left


@_check
def messages_of_one_tag_keep_their_order(comm: Communicator) -> None:
    left, right = _neighbours(comm)
    received = [bytearray(4) for _ in range(8)]
    receives = [comm.irecv(buffer, left, 1) for buffer in received]
    sends = [comm.isend(bytes([number] * 4), right, 1) for number in range(8)]
    _wait(*reversed(receives), *reversed(sends))
    assert received == [bytearray([number] * 4) for number in range(8)]


@_check
def tags_are_kept_apart(comm: Communicator) -> None:
    left, right = _neighbours(comm)
    sends = [comm.isend(bytes([tag]), right, tag) for tag in (1, 2, 3)]
    for tag in (3, 1, 2):
        received = bytearray(1)
        _wait(comm.irecv(received, left, tag))
        assert received[0] == tag
    _wait(*sends)


@_check
def a_short_message_tells_its_length(comm: Communicator) -> None:
    left, right = _neighbours(comm)
    received = bytearray(b"." * 10)
    receive = comm.irecv(received, left, 4)
    _wait(comm.isend(b"abc", right, 4), receive)
    assert receive.nbytes == 3
    assert received == b"abc......."


@_check
def a_probe_sees_what_has_come(comm: Communicator) -> None:
    left, right = _neighbours(comm)
    assert comm.iprobe(None, 5) is None
    assert comm.iprobe(left, 5) is None
    _agree_all_are_here(comm)
    send = comm.isend(b"hello", right, 5)
    waiter = Waiter(LIMIT_S)
    waiter.wait(_Until(lambda: comm.iprobe(None, 5) is not None), "a probe")
    assert comm.iprobe(None, 5) == (left, 5)
    assert comm.iprobe(left, 5) == (left, 5)
    assert comm.iprobe(None, 6) is None
    received = bytearray(5)
    _wait(comm.irecv(received, left, 5), send)
    assert comm.iprobe(None, 5) is None


@_check
def a_maximum_is_exact(comm: Communicator) -> None:
    limits = np.iinfo(np.int64)
    values = np.array([comm.rank, -comm.rank, limits.min, limits.max, (1 << 53) + comm.rank], np.int64)
    result = np.zeros(5, np.int64)
    _wait(comm.iallreduce_max(values, result))
    assert result.tolist() == [comm.size - 1, 0, limits.min, limits.max, (1 << 53) + comm.size - 1]


@_check
def every_rank_can_broadcast(comm: Communicator) -> None:
    for root in range(comm.size):
        for nbytes in (0, 5, LONG_NBYTES):
            # Root's buffer may be read-only.
            buffer = _content(root, nbytes) if comm.rank == root else bytearray(nbytes)
            _wait(comm.ibcast(buffer, root))
            assert buffer == _content(root, nbytes)


@_check
def pieces_are_gathered_by_rank(comm: Communicator) -> None:
    mine = np.full(3, comm.rank, np.uint8)
    result = np.zeros(3 * comm.size, np.uint8)
    _wait(comm.iallgather(mine, result))
    assert result.tolist() == [rank for rank in range(comm.size) for _ in range(3)]


@_check
def collectives_overlap(comm: Communicator) -> None:
    results = [np.zeros(1, np.int64) for _ in range(4)]
    requests = [comm.iallreduce_max(np.array([10 * n + comm.rank], np.int64), results[n]) for n in range(4)]
    gathered = np.zeros(comm.size, np.uint8)
    requests.append(comm.iallgather(np.array([comm.rank], np.uint8), gathered))
    _wait(*reversed(requests))
    assert [int(result[0]) for result in results] == [10 * n + comm.size - 1 for n in range(4)]
    assert gathered.tolist() == list(range(comm.size))
    assert all(request.test() for request in requests)


@_check
def duplicates_are_apart(comm: Communicator) -> None:
    left, right = _neighbours(comm)
    other = comm.duplicate()
    assert (other.rank, other.size, other.node()) == (comm.rank, comm.size, comm.node())
    send = comm.isend(b"A", right, 1)
    other_send = other.isend(b"B", right, 1)
    received, other_received = bytearray(1), bytearray(1)
    _wait(other.irecv(other_received, left, 1), comm.irecv(received, left, 1), send, other_send)
    assert bytes(received + other_received) == b"AB"
    result, other_result = np.zeros(1, np.int64), np.zeros(1, np.int64)
    # In opposite order on odd ranks: collectives of different communicators do not wait for each other.
    pairs = [(comm, result), (other, other_result)]
    _wait(*[c.iallreduce_max(np.array([1], np.int64), r) for c, r in (pairs[::-1] if comm.rank % 2 else pairs)])
    other.free()
    other.free()
    _agree_all_are_here(comm)


@_check
def misuse_is_refused(comm: Communicator) -> None:
    strided = np.zeros((4, 4))[:, ::2]
    try:
        comm.isend(strided, comm.rank, 1)
    except ValueError:
        return
    raise AssertionError("a strided array was sent")


@_check
def long_data_is_cut(comm: Communicator) -> None:
    waiter = Waiter(LIMIT_S)
    data = _content(1, LONG_NBYTES)
    for root in {0, comm.size - 1}:
        assert bcast_bytes(comm, data if comm.rank == root else None, root, waiter) == data
        assert bcast_bytes(comm, b"" if comm.rank == root else None, root, waiter) == b""


@_check
def ragged_bytes_are_gathered(comm: Communicator) -> None:
    waiter = Waiter(LIMIT_S)
    for length in (
        lambda rank: 0,
        lambda rank: 17 * rank,
        lambda rank: 1000 if rank == comm.size - 1 else 0,
        lambda rank: 70_000 + rank,
    ):
        gathered = allgather_bytes(comm, _content(comm.rank, length(comm.rank)), waiter)
        assert gathered == [_content(rank, length(rank)) for rank in range(comm.size)]


@_check
def equal_bytes_travel_once(comm: Communicator) -> None:
    waiter = Waiter(LIMIT_S)
    for groups in (1, 2, comm.size):
        distinct, index = allgather_distinct(comm, _content(comm.rank % groups, 100), waiter)
        assert distinct == [_content(group, 100) for group in range(min(groups, comm.size))]
        assert index.tolist() == [rank % groups for rank in range(comm.size)]


@_check
def many_rounds_stay_in_step(comm: Communicator) -> None:
    waiter = Waiter(LIMIT_S)
    for number in range(2 * DRAIN_EVERY + 1):
        assert reduce_max(comm, np.array([number * comm.size + comm.rank], np.int64), waiter)[0] == (
            number * comm.size + comm.size - 1
        )


@_check
def node_names_are_equal_here(comm: Communicator) -> None:
    assert comm.node()
    assert len(set(allgather_bytes(comm, comm.node().encode(), Waiter(LIMIT_S)))) == 1


@_check
def success_is_agreed(comm: Communicator) -> None:
    agree(comm, None, Waiter(LIMIT_S))
    assert run_on_all(comm, lambda: comm.rank, Waiter(LIMIT_S)) == comm.rank


@_check
def one_failure_is_everybodys(comm: Communicator) -> None:
    waiter = Waiter(LIMIT_S)
    last = comm.size - 1
    mine = StorageError("disk full", errno=errno.ENOSPC, path="/x") if comm.rank == last else None
    raised = _caught(lambda: agree(comm, mine, waiter))
    assert type(raised) is StorageError
    assert isinstance(raised, OSError)
    assert raised.errno == errno.ENOSPC
    assert raised.path == "/x"
    assert raised.failures == {last: "disk full"}
    assert raised.__cause__ is mine
    messages = allgather_bytes(comm, str(raised).encode(), waiter)
    assert len(set(messages)) == 1


@_check
def the_lowest_rank_gives_the_class(comm: Communicator) -> None:
    waiter = Waiter(LIMIT_S)

    def step() -> None:
        if comm.rank == 0:
            raise LayoutError("w overlaps", tensor="w", ranks=[0, 1])
        raise KeyError("other")

    raised = _caught(lambda: run_on_all(comm, step, waiter))
    assert type(raised) is LayoutError
    assert raised.tensor == "w"
    assert raised.ranks == [0, 1]
    assert sorted(raised.failures) == list(range(comm.size))
    assert all("other" in raised.failures[rank] for rank in range(1, comm.size))


@_check
def foreign_errors_become_rank_errors(comm: Communicator) -> None:
    own = ZeroDivisionError("by zero") if comm.rank == 0 else None
    raised = _caught(lambda: agree(comm, own, Waiter(LIMIT_S)))
    assert isinstance(raised, RankError)
    assert (raised.rank, raised.type) == (0, "ZeroDivisionError")
    assert raised.failures == {0: "ZeroDivisionError: by zero"}
    assert raised.__cause__ is own


@_timeout_check
def the_missing_rank_is_named(comm: Communicator) -> None:
    _leave_out(comm, absent=comm.size - 1)


@_timeout_check
def a_missing_root_is_named(comm: Communicator) -> None:
    _leave_out(comm, absent=0)


@_timeout_check
def a_late_rank_is_told(comm: Communicator) -> None:
    """A rank that comes after the others gave up learns it soon, although its own time has hardly begun."""
    control = comm.duplicate()
    absent = comm.size - 1
    if comm.rank == absent:
        for rank in range(absent):
            _wait(control.irecv(bytearray(1), rank, 9))
        # Whether the collective still ends is MPI's affair; the next one cannot.
        patient = Waiter(LIMIT_S, notice_s=0.05)

        def twice() -> None:
            _reduce(comm, patient)
            _reduce(comm, patient)

        raised = _caught(twice)
    else:
        raised = _caught(lambda: _reduce(comm, _impatient()))
        _wait(control.isend(b"!", absent, 9))
    assert isinstance(raised, TimeoutExpiredError)
    assert raised.missing == [absent]
    _agree_all_are_here(control)


def _leave_out(comm: Communicator, absent: int) -> None:
    control = comm.duplicate()
    if comm.rank != absent:
        raised = _caught(lambda: _reduce(comm, _impatient()))
        assert isinstance(raised, TimeoutExpiredError), repr(raised)
        assert raised.missing == [absent], str(raised)
        again = _caught(lambda: comm.isend(b"", absent, 1))
        assert isinstance(again, TimeoutExpiredError)
        assert str(again) == str(raised)
        assert str(_caught(lambda: _reduce(comm, _impatient()))) == str(raised)
    _agree_all_are_here(control)
    comm.free()


def _impatient() -> Waiter:
    # The others' notices are listened for twice `notice_s`: long enough for a busy machine to let every rank run.
    return Waiter(0.6, notice_s=0.5)


def _reduce(comm: Communicator, waiter: Waiter) -> None:
    reduce_max(comm, np.zeros(1, np.int64), waiter, "the test's reduction")


def _agree_all_are_here(comm: Communicator) -> None:
    _reduce(comm, Waiter(LIMIT_S))


def _caught(fn: Callable[[], object]) -> ParckptError:
    try:
        fn()
    except ParckptError as error:
        return error
    raise AssertionError("nothing was raised")


class _Until:
    """A request that is complete once a condition holds."""

    nbytes = 0
    ticket = None

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    def test(self) -> bool:
        return self._condition()
