"""The communicator of MPI: the only module that knows mpi4py, which is imported when the first one is made.

Only buffers travel (nothing is pickled) and every call is non-blocking. Making one is collective and, alone of all,
blocks without a bound in its last step, when all ranks are known to be there.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from parckpt.comm.arrival import RollCall, Ticket
from parckpt.comm.base import MAX_NBYTES, Buffer, Bytes, Int64s, Request, as_bytes, host_domain
from parckpt.comm.wait import Waiter
from parckpt.errors import ConfigError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["MpiCommunicator", "in_use", "is_mpi", "world_size", "wrap"]

DUPLICATE_TIMEOUT_S = 1800.0
"""Bound of the wait for all ranks when a communicator is made, unless the caller sets one."""

_UNDER_WAY: set[_MpiRequest] = set()
"""Every request that is not complete, with its buffers: MPI goes on writing into a buffer whose owner gave up on it (a
time-out, an exception between start and wait), so none may be freed before MPI is done with it or has ended."""


class _MpiRequest:
    """An mpi4py request and the buffers it uses."""

    def __init__(self, request: MPI.Request, ticket: Ticket, buffers: tuple[Any, ...], *, receives: bool) -> None:
        self._request = request
        self._buffers = buffers
        self._status: MPI.Status | None = _mpi().Status() if receives else None
        self._done = False
        self.ticket = ticket
        self.nbytes = 0
        _UNDER_WAY.add(self)

    def test(self) -> bool:
        if not self._done and self._request.Test(self._status):
            if self._status is not None:
                self.nbytes = self._status.Get_count(_mpi().BYTE)
            self._done = True
            self._buffers = ()
            _UNDER_WAY.discard(self)
        return self._done


class MpiCommunicator:
    """A private duplicate of an MPI communicator; fits `parckpt.comm.base.Communicator`. Made by `wrap`.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Owned from now on.
    node : str
        Name of this rank's memory domain.
    max_nbytes : int
        Longest buffer of one call.
    """

    def __init__(self, comm: MPI.Intracomm, node: str, max_nbytes: int) -> None:
        self._comm = comm
        self._rank = comm.Get_rank()
        self._size = comm.Get_size()
        self._node = node
        self._max_nbytes = max_nbytes
        self._freed = False
        self._roll_call = RollCall(self)

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    @property
    def max_nbytes(self) -> int:
        """Longest buffer of one call."""
        return self._max_nbytes

    def duplicate(self) -> MpiCommunicator:
        """Make a communicator of the same ranks with messages of its own. Collective."""
        self._roll_call.check()
        return MpiCommunicator(_duplicate(self._comm, Waiter(DUPLICATE_TIMEOUT_S)), self._node, self._max_nbytes)

    def free(self) -> None:
        """Give the communicator back to MPI; after a time-out it is left alone, for MPI may still be using it."""
        if self._freed:
            return
        self._freed = True
        if self._roll_call.broken or _mpi().Is_finalized():
            return
        if self._roll_call.is_root:
            self._roll_call.collect()
        self._comm.Free()

    def isend(self, data: Buffer, dest: int, tag: int) -> Request:
        """Send to one rank."""
        self._roll_call.check()
        view = self._bounded(data)
        request = self._comm.Isend([view, len(view), _mpi().BYTE], dest, tag)
        return _MpiRequest(request, Ticket(self._roll_call, peer=dest), (data, view), receives=False)

    def irecv(self, buffer: Buffer, source: int, tag: int) -> Request:
        """Receive from one rank."""
        self._roll_call.check()
        view = self._bounded(buffer)
        request = self._comm.Irecv([view, len(view), _mpi().BYTE], source, tag)
        return _MpiRequest(request, Ticket(self._roll_call, peer=source), (buffer, view), receives=True)

    def iprobe(self, source: int | None, tag: int) -> tuple[int, int] | None:
        """Source and length of a message that can be received now."""
        self._roll_call.check()
        mpi = _mpi()
        status = mpi.Status()
        if not self._comm.Iprobe(mpi.ANY_SOURCE if source is None else source, tag, status):
            return None
        return status.Get_source(), status.Get_count(mpi.BYTE)

    def iallreduce_max(self, values: Int64s, result: Int64s) -> Request:
        """Element-wise maximum. Collective."""
        ticket = self._roll_call.begin()
        mpi = _mpi()
        request = self._comm.Iallreduce([values, mpi.INT64_T], [result, mpi.INT64_T], mpi.MAX)
        return _MpiRequest(request, ticket, (values, result), receives=False)

    def ibcast(self, buffer: Buffer, root: int) -> Request:
        """Copy root's buffer to all. Collective."""
        view = self._bounded(buffer)
        ticket = self._roll_call.begin()
        request = self._comm.Ibcast([view, len(view), _mpi().BYTE], root)
        return _MpiRequest(request, ticket, (buffer, view), receives=False)

    def iallgather(self, data: Bytes, result: Bytes) -> Request:
        """Gather equally long pieces. Collective."""
        sent, gathered = self._bounded(data), as_bytes(result)
        ticket = self._roll_call.begin()
        mpi = _mpi()
        request = self._comm.Iallgather([sent, len(sent), mpi.BYTE], [gathered, len(sent), mpi.BYTE])
        return _MpiRequest(request, ticket, (data, sent, result, gathered), receives=False)

    def node(self) -> str:
        """Name of the memory domain, told by MPI when the communicator was wrapped."""
        return self._node

    def _bounded(self, buffer: Buffer) -> memoryview:
        view = as_bytes(buffer)
        if len(view) > self._max_nbytes:
            raise ValueError(f"{len(view)} bytes in one call, at most {self._max_nbytes} are allowed")
        return view


def wrap(
    comm: MPI.Comm | None = None, *, max_nbytes: int = MAX_NBYTES, waiter: Waiter | None = None
) -> MpiCommunicator:
    """Duplicate an mpi4py communicator (None: ``COMM_WORLD``). Collective over it; initialises MPI if need be.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        Stays the caller's.
    max_nbytes : int, optional
        Longest buffer of one call.
    waiter : Waiter, optional
        Bounds the wait for the other ranks.

    Raises
    ------
    ConfigError
        If it is an intercommunicator, or no communicator any more.
    TimeoutExpiredError
        If not all ranks come.
    """
    mpi = _mpi()
    given = mpi.COMM_WORLD if comm is None else comm
    if given == mpi.COMM_NULL or not isinstance(given, mpi.Intracomm):
        raise ConfigError(f"comm must be an intracommunicator, not {type(given).__name__}")
    private = _duplicate(given, waiter or Waiter(DUPLICATE_TIMEOUT_S))
    return MpiCommunicator(private, _node_name(private), max_nbytes)


def is_mpi(comm: object) -> TypeGuard[MPI.Comm]:
    """Whether this is an mpi4py communicator, without importing mpi4py: if it is one, somebody else has."""
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and isinstance(comm, module.Comm)


def in_use() -> bool:
    """Whether this process is one of several ranks of an initialised MPI, started by a launcher we do not know."""
    module = sys.modules.get("mpi4py.MPI")
    if module is None or not module.Is_initialized() or module.Is_finalized():
        return False
    return bool(module.COMM_WORLD.Get_size() > 1)


def world_size() -> int:
    """Number of ranks of ``COMM_WORLD``; initialises MPI if need be.

    Raises
    ------
    ConfigError
        If mpi4py or the MPI library is not there.
    """
    return int(_mpi().COMM_WORLD.Get_size())


def _duplicate(comm: MPI.Intracomm, waiter: Waiter) -> MPI.Intracomm:
    private, request = comm.Idup()
    waiter.wait(_Started(request), "making a communicator of all ranks")
    return private


class _Started:
    """A request of MPI that has no communicator of ours yet."""

    ticket = None
    nbytes = 0

    def __init__(self, request: MPI.Request) -> None:
        self._request = request

    def test(self) -> bool:
        return bool(self._request.Test())


def _node_name(comm: MPI.Intracomm) -> str:
    """Name the memory domain by host and lowest rank in it: virtual nodes share a host name but not memory."""
    mpi = _mpi()
    here = comm.Split_type(mpi.COMM_TYPE_SHARED, key=comm.Get_rank())
    lowest = np.array([comm.Get_rank()], np.int64)
    here.Bcast([lowest, mpi.INT64_T], 0)
    here.Free()
    return f"{host_domain()}/{int(lowest[0])}"


def _mpi() -> Any:
    """Import mpi4py, with an error that says what is missing."""
    module = sys.modules.get("mpi4py.MPI")
    if module is not None:
        return module
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"MPI cannot be used here ({error}): install mpi4py and an MPI library, for instance "
            "`pip install parckpt[mpich]`"
        ) from error
    return MPI
