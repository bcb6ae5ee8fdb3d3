"""What goes wrong on one rank is the same error on all of them, and what was published stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from parckpt.testing.mpirun import Mpi, run

SCENES = [
    "a_state_callable_raises",
    "a_leaf_cannot_be_read",
    "a_replica_check_cannot_read",
    "a_target_cannot_be_written",
    "the_disk_refuses_one_rank",
    "every_call_of_one_rank_fails_once",
    "bad_layouts_are_named",
    "forgotten_shards_are_found",
    "arguments_differ",
    "failed_saves_are_endured",
    "a_restore_does_not_fit_one_rank",
    "single_file_saves_disagree",
    "a_network_fails_on_leaving",
]


@pytest.mark.parametrize("nranks", [3])
def test_scenes(mpi: Mpi, nranks: int, programs: Path, tmp_path: Path) -> None:
    args = [str(tmp_path), *SCENES]
    result = run(programs / "scenes.py", nranks, args, mpi=mpi, timeout_s=120, abort_on_error=True).check()
    assert [out.split() for out in result.stdout] == [SCENES] * nranks
