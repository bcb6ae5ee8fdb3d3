"""The environment of a command line that may be typed, or called, inside a rank."""

from __future__ import annotations

from collections.abc import MutableMapping

from parckpt.comm.launch import LAUNCHER_VARIABLES

__all__ = ["drop_launcher_variables"]

# What mpiexec of MPICH and Open MPI, PMIx and srun --mpi=pmi2 hand to the ranks they start.
_PREFIXES = ("PMI_", "PMIX_", "PRTE_", "OMPI_", "MPIR_", "HYDRA_", "HYDI_", "MPI_LOCAL")


def drop_launcher_variables(environ: MutableMapping[str, str]) -> None:
    """Forget that a launcher started us: a command is one process, and must not pass for a second rank of the job.

    What says which batch job this is (``SLURM_JOB_ID``) stays.
    """
    for name in list(environ):
        if name in LAUNCHER_VARIABLES or name.startswith(_PREFIXES):
            del environ[name]
