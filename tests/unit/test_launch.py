"""Which communicator a call means, as far as that can be told without a launcher."""

from __future__ import annotations

import subprocess
import sys

import pytest

from parckpt.comm.launch import LAUNCHER_VARIABLES, SELF, launched_by, launched_size, resolve
from parckpt.comm.single import SelfCommunicator
from parckpt.errors import ConfigError, ConfigTypeError
from parckpt.testing.world import run_world

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("variable", LAUNCHER_VARIABLES)
def test_each_variable_counts(variable: str) -> None:
    assert launched_size({variable: "4"}) == 4
    assert launched_size({variable: "1"}) == 1


@pytest.mark.parametrize("text", ["", " ", "0", "-3", "four", "1e3", "٤", "2(x2)"])
def test_nonsense_promises_nothing(text: str) -> None:
    assert launched_size({"WORLD_SIZE": text}) == 1


def test_the_largest_promise_counts() -> None:
    assert launched_by({"WORLD_SIZE": "2", "PMI_SIZE": " 8 ", "RANK_SIZE": "1"}) == ("PMI_SIZE", 8)
    assert launched_by({}) == ("", 1)


def test_not_launched_means_alone_without_mpi() -> None:
    assert isinstance(resolve(None, {}), SelfCommunicator)
    assert isinstance(resolve(None, {"SLURM_STEP_NUM_TASKS": "1"}), SelfCommunicator)


def test_self_is_alone_whatever_launched_it() -> None:
    assert resolve(SELF, {"PMI_SIZE": "8"}).size == 1
    assert repr(SELF) == "parckpt.SELF"


def test_any_communicator_is_duplicated() -> None:
    def sizes(comm, rank):  # type: ignore[no-untyped-def]
        mine = resolve(comm, {"WORLD_SIZE": "7"})
        assert mine is not comm
        mine.free()
        return comm.duplicate().size

    assert run_world(2, sizes) == [2, 2]


@pytest.mark.parametrize("thing", [0, "world", object(), [1]])
def test_other_things_are_refused(thing: object) -> None:
    with pytest.raises(ConfigTypeError, match=type(thing).__name__):
        resolve(thing, {})


# In processes of their own: one imports MPI where nothing launched it, the other must not find mpi4py at all.

_RESOLVE = """
import sys
{prepare}
from parckpt.comm.launch import resolve
from parckpt.errors import ConfigError
try:
    resolve({comm}, {{{variable!r}: "4"}})
except ConfigError as error:
    print(error)
"""


def _resolve(variable: str, *, prepare: str = "", comm: str = "None") -> str:
    code = _RESOLVE.format(variable=variable, prepare=prepare, comm=comm)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("comm", ["None", "MPI.COMM_WORLD"])
def test_a_world_of_one_is_refused_when_launched_as_several(comm: str) -> None:
    message = _resolve("SLURM_STEP_NUM_TASKS", prepare="from mpi4py import MPI", comm=comm)
    assert "SLURM_STEP_NUM_TASKS=4 says this is one of 4 processes, but MPI's world has one rank" in message
    assert "srun --mpi=pmi2" in message
    assert "comm=parckpt.SELF" in message


def test_mpi4py_missing_is_refused_when_launched() -> None:
    message = _resolve("WORLD_SIZE", prepare="sys.modules['mpi4py'] = None")
    assert "WORLD_SIZE=4 says this is one of 4 processes, but MPI cannot be used here" in message
    assert "pip install parckpt[mpich]" in message
    assert "comm=parckpt.SELF" in message


def test_config_errors_carry_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    with pytest.raises(ConfigError) as caught:
        resolve(None, {"RANK_SIZE": "3"})
    assert (caught.value.variable, caught.value.launched) == ("RANK_SIZE", 3)
