"""SIGINT to rank 1 in the midst of calls that all ranks take part in: ``interrupted.py directory``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import numpy as np

import parckpt
from parckpt.comm.base import Communicator
from parckpt.comm.collective import allgather_bytes
from parckpt.comm.mpi import wrap
from parckpt.comm.wait import Waiter
from parckpt.testing.faulty import Call, FaultyFileSystem
from parckpt.testing.jobs import LAYOUTS, QuickFileSystem

Moment = tuple[int, str, str]
"""Which rank sends the signal, at its first call of this name, of a path that ends so."""


def interrupting(comm: Communicator, moment: Moment) -> tuple[FaultyFileSystem, Callable[[], None]]:
    """A file system that sends SIGINT to rank 1 at that moment, once armed."""
    pids = [int(pid) for pid in allgather_bytes(comm, str(os.getpid()).encode(), Waiter(60))]
    rank, operation, suffix = moment
    armed = False

    def on_call(call: Call) -> None:
        nonlocal armed
        if armed and call.operation == operation and call.path.endswith(suffix):
            armed = False
            os.kill(pids[1], signal.SIGINT)

    def arm() -> None:
        nonlocal armed
        armed = comm.rank == rank

    return FaultyFileSystem(QuickFileSystem(), on_call=on_call), arm


def state(comm: Communicator, step: int) -> dict[str, parckpt.Shard]:
    data = np.full((2, 2), 10.0 * step + comm.rank)
    return {"w": parckpt.Shard(data, (2 * comm.size, 2), (2 * comm.rank, 0))}


def interrupt_a_save(comm: Communicator, directory: str, layout: str, moment: Moment) -> None:
    fs, arm = interrupting(comm, moment)
    config = parckpt.CheckpointConfig(**LAYOUTS[layout])
    reached, outcome, published = 0, "nothing", ""
    try:
        with parckpt.ModelCheckpoint("net", directory, config, comm=comm, filesystem=fs) as ckpt:
            for step in range(1, 5):
                if step == 2:
                    arm()
                reached = step
                try:
                    ckpt.step_end(state(comm, step), step)
                finally:
                    published = os.path.basename(ckpt.latest_ckpt_file_name)
    except KeyboardInterrupt:
        outcome = "interrupt"
    except parckpt.RankError as error:
        outcome = f"peer {error.rank}"
    told = (reached, outcome, published.split(".")[0])
    # After the save, not in it: it is published, and the others hear of it in their next call.
    assert told == ((2, "interrupt", "net-1_2") if comm.rank == 1 else (3, "peer 1", "net-1_2")), told
    with parckpt.ModelCheckpoint("net", directory, config, comm=comm, filesystem=QuickFileSystem()) as ckpt:
        target = state(comm, 9)
        assert ckpt.restore(target).step == 2
        assert np.array_equal(target["w"].data, state(comm, 2)["w"].data)


def interrupt_a_restore(comm: Communicator, directory: str, moment: Moment) -> None:
    with parckpt.ModelCheckpoint("net", directory, comm=comm, filesystem=QuickFileSystem()) as ckpt:
        ckpt.step_end(state(comm, 1), 1)
    fs, arm = interrupting(comm, moment)
    target = state(comm, 9)
    outcome = "nothing"
    try:
        with parckpt.ModelCheckpoint("net", directory, comm=comm, filesystem=fs) as ckpt:
            arm()
            ckpt.restore(target)
            ckpt.poll()
    except KeyboardInterrupt:
        outcome = "interrupt"
    except parckpt.RankError:
        outcome = "peer"
    assert outcome == ("interrupt" if comm.rank == 1 else "peer"), outcome
    assert np.array_equal(target["w"].data, state(comm, 1)["w"].data)


def interrupt_a_file(comm: Communicator, directory: str, moment: Moment) -> None:
    fs, arm = interrupting(comm, moment)
    arm()
    outcome = "nothing"
    try:
        parckpt.save_checkpoint(state(comm, 1), f"{directory}/one", integrated_save=False, comm=comm, filesystem=fs)
    except KeyboardInterrupt:
        outcome = "interrupt"
    assert outcome == ("interrupt" if comm.rank == 1 else "nothing"), outcome
    target = state(comm, 9)
    parckpt.load_checkpoint(f"{directory}/one", target, comm=comm)
    assert np.array_equal(target["w"].data, state(comm, 1)["w"].data)


def main() -> None:
    directory, comm = sys.argv[1], wrap()
    # Rank 1 in its own writing, and waiting while root writes and publishes; never before the ranks have met.
    moments = (
        ("each", (1, "mkdir", "rank_1")),
        ("each", (1, "fsync", "record")),
        ("each", (0, "pwrite", ".ckpt")),
        ("each", (0, "open", "manifest")),
        ("integrated", (0, "pwrite", ".ckpt")),
    )
    for number, (layout, moment) in enumerate(moments):
        interrupt_a_save(comm, f"{directory}/{number}", layout, moment)
        print("save", layout, moment)
    interrupt_a_restore(comm, f"{directory}/restore", (0, "open", ".ckpt"))
    print("restore")
    os.makedirs(f"{directory}/file", exist_ok=True)
    interrupt_a_file(comm, f"{directory}/file", (1, "mkdir", "rank_1"))
    print("file")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    comm.free()


main()
