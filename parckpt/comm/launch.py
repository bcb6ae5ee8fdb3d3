"""Which communicator a call means: what the caller passed, what the launcher set up, or this process alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from parckpt.comm import mpi
from parckpt.comm.base import Communicator
from parckpt.comm.single import SelfCommunicator
from parckpt.errors import ConfigError, ConfigTypeError

__all__ = ["LAUNCHER_VARIABLES", "SELF", "Alone", "launched_by", "launched_size", "resolve"]

LAUNCHER_VARIABLES: Final = (
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "WORLD_SIZE",
    "RANK_SIZE",
    "MS_WORKER_NUM",
)
"""Set by mpiexec of MPICH and its kin, of Open MPI, srun, torchrun, and MindSpore's two launchers."""


class Alone:
    """Type of `SELF`."""

    def __repr__(self) -> str:
        return "parckpt.SELF"


SELF: Final = Alone()
"""For ``comm=``: this process alone, on purpose, whatever launched it."""


def launched_by(environ: Mapping[str, str]) -> tuple[str, int]:
    """Variable that promises the most ranks, and how many; ``("", 1)`` if none promises more than one."""
    found = ("", 1)
    for variable in LAUNCHER_VARIABLES:
        text = environ.get(variable, "").strip()
        if text.isascii() and text.isdigit() and int(text) > found[1]:
            found = (variable, int(text))
    return found


def launched_size(environ: Mapping[str, str]) -> int:
    """Number of ranks the launcher promised; 1 when not launched."""
    return launched_by(environ)[1]


def resolve(comm: object, environ: Mapping[str, str]) -> Communicator:
    """Make the communicator that ``comm`` means; the caller frees it. Collective over the ranks it will have.

    Parameters
    ----------
    comm : None, SELF, mpi4py.MPI.Intracomm or Communicator
        None: ``COMM_WORLD`` when launched, else this process alone, without MPI. A given communicator is duplicated.
    environ : mapping
        Environment of this process.

    Raises
    ------
    ConfigError
        When launched as one of several but MPI knows nothing of the others: every process would believe to be rank 0
        of 1 and overwrite the others' checkpoints. Also when MPI is missing, or ``comm`` is of another kind.
    """
    if isinstance(comm, Alone):
        return SelfCommunicator()
    if comm is None:
        if launched_size(environ) == 1 and not mpi.in_use():
            return SelfCommunicator()
        _refuse_lonely_world(environ)
        return mpi.wrap()
    if mpi.is_mpi(comm):
        _refuse_lonely_world(environ)
        return mpi.wrap(comm)
    if isinstance(comm, Communicator):
        return comm.duplicate()
    raise ConfigTypeError(
        "comm must be an mpi4py communicator, parckpt.SELF, None or fit parckpt's Communicator, "
        f"not {type(comm).__name__}"
    )


def _refuse_lonely_world(environ: Mapping[str, str]) -> None:
    variable, size = launched_by(environ)
    if size == 1:
        return
    claim = f"{variable}={size} says this is one of {size} processes"
    way_out = "if they are independent on purpose, pass comm=parckpt.SELF"
    facts = {"variable": variable, "launched": size}
    try:
        world_size = mpi.world_size()
    except ConfigError as error:
        raise ConfigError(f"{claim}, but {error}; {way_out}", **facts) from error
    if world_size == 1:
        hint = (
            "start the ranks with `srun --mpi=pmi2` (MPICH) or `srun --mpi=pmix` (Open MPI), or with mpiexec"
            if variable == "SLURM_STEP_NUM_TASKS"
            else "start the ranks with the mpiexec of the MPI library that mpi4py uses"
        )
        raise ConfigError(
            f"{claim}, but MPI's world has one rank, so all would write as rank 0 of 1: {hint}; {way_out}", **facts
        )
