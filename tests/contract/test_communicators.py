"""Every communicator does what `parckpt.comm.base` says: one process and ranks in threads (MPI: tests/mpi)."""

from __future__ import annotations

import numpy as np
import pytest

from parckpt.comm.base import Communicator
from parckpt.comm.single import SelfCommunicator
from parckpt.errors import InternalError
from parckpt.testing.communicators import CHECKS, TIMEOUT_CHECKS
from parckpt.testing.world import WorldError, run_world


@pytest.mark.fast
@pytest.mark.parametrize("name", CHECKS)
def test_one_process(name: str) -> None:
    comm = SelfCommunicator()
    assert isinstance(comm, Communicator)
    CHECKS[name](comm)


@pytest.mark.fast
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", CHECKS)
def test_threads(name: str, size: int) -> None:
    run_world(size, lambda comm, rank: CHECKS[name](comm))


@pytest.mark.fast
@pytest.mark.parametrize("name", ["long_data_is_cut", "ragged_bytes_are_gathered", "equal_bytes_travel_once"])
def test_small_pieces(name: str) -> None:
    run_world(3, lambda comm, rank: CHECKS[name](comm), max_nbytes=20_001)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("name", TIMEOUT_CHECKS)
def test_threads_time_out(name: str, size: int) -> None:
    run_world(size, lambda comm, rank: TIMEOUT_CHECKS[name](comm))


# -- the world of threads itself: what MPI answers with a hang or garbage must be an error here ------------------------


@pytest.mark.fast
def test_a_failing_rank_ends_the_others() -> None:
    def fn(comm: Communicator, rank: int) -> None:
        if rank == 1:
            raise ZeroDivisionError("rank 1")
        while not comm.irecv(bytearray(1), 1, 1).test():
            pass

    with pytest.raises(ZeroDivisionError, match="rank 1"):
        run_world(3, fn)


@pytest.mark.fast
def test_a_hang_is_reported_with_stacks() -> None:
    def fn(comm: Communicator, rank: int) -> None:
        request = comm.irecv(bytearray(1), 0, 1)
        while rank == 1 and not request.test():
            pass

    with pytest.raises(WorldError, match=r"(?s)1 of 2 ranks.*rank-1.*request\.test"):
        run_world(2, fn, timeout_s=0.2)


@pytest.mark.fast
def test_long_sends_wait_for_their_receiver() -> None:
    comm = SelfCommunicator()
    data, received = np.ones(1 << 20, np.uint8), np.zeros(1 << 20, np.uint8)
    send = comm.isend(data, 0, 1)
    assert not send.test()
    receive = comm.irecv(received, 0, 1)
    assert send.test()
    assert receive.test()
    assert received.all()


@pytest.mark.fast
def test_different_collectives_are_an_error() -> None:
    def fn(comm: Communicator, rank: int) -> None:
        if rank == 0:
            comm.ibcast(bytearray(1), 0)
        else:
            comm.iallgather(np.zeros(1, np.uint8), np.zeros(2, np.uint8))

    with pytest.raises(InternalError, match="disagree on collective 0"):
        run_world(2, fn)


@pytest.mark.fast
def test_a_receive_that_is_too_short_is_an_error() -> None:
    comm = SelfCommunicator()
    receive = comm.irecv(bytearray(3), 0, 1)
    comm.isend(b"1234", 0, 1)
    with pytest.raises(InternalError, match="4 bytes met a receive of 3"):
        receive.test()


@pytest.mark.fast
def test_bounds_are_kept() -> None:
    def fn(comm: Communicator, rank: int) -> None:
        comm.isend(bytes(11), 0, 1)

    with pytest.raises(InternalError, match="at most 10"):
        run_world(1, fn, max_nbytes=10)
    comm = SelfCommunicator()
    with pytest.raises(InternalError, match="rank 1 is not in"):
        comm.isend(b"", 1, 1)
    comm.free()
    with pytest.raises(InternalError, match="freed"):
        comm.duplicate()


@pytest.mark.fast
def test_nodes_are_as_told() -> None:
    assert run_world(3, lambda comm, rank: comm.node(), nodes=["a", "a", "b"]) == ["a", "a", "b"]
