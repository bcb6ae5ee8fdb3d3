"""A communicator of this process alone, without MPI."""

from __future__ import annotations

from parckpt.comm.memory import Exchange, MemoryCommunicator

__all__ = ["SelfCommunicator"]


class SelfCommunicator(MemoryCommunicator):
    """The world of one rank: the same code runs with and without MPI."""

    def __init__(self) -> None:
        super().__init__(Exchange(1), 0)
