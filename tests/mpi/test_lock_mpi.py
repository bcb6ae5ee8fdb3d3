"""Two jobs on one directory, or one file name: the second is refused and told by whom; afterwards it works."""

from __future__ import annotations

import os
import select
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parckpt.testing.mpirun import Mpi, run


@pytest.mark.parametrize("what", ["run", "file"])
def test_the_second_job_is_refused(mpi: Mpi, what: str, programs: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "held")
    os.mkfifo(tmp_path / "go")
    program = programs / "contending.py"

    def play(how: str, nranks: int) -> tuple[str, ...]:
        args = [what, how, str(tmp_path)]
        return run(program, nranks, args, mpi=mpi, timeout_s=90, abort_on_error=True).check().stdout

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(play, "hold", 2)
        reader = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
        assert select.select([reader], [], [], 60)[0], "the first job did not get that far"
        host, pid = os.read(reader, 1000).decode().split()
        os.close(reader)
        refused = play("try", 3)
        (tmp_path / "go").write_text("!")
        assert first.result() == ("done\n",) * 2
    assert len(set(refused)) == 1
    assert refused[0].startswith("refused:")
    assert f"{host!r}, process {pid}" in refused[0]
    assert play("try", 2) == ("done\n",) * 2
