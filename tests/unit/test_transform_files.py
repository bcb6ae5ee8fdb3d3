"""Which file of each rank's directory is meant."""

from __future__ import annotations

import pytest

from parckpt.engine.rankfiles import rank_files
from parckpt.errors import ConfigError, FormatError, StateWarning
from parckpt.storage.atomic import write_file
from parckpt.storage.filesystem import try_stat
from parckpt.testing.filesystem import MemoryFileSystem
from parckpt.transform.files import choose_files

pytestmark = pytest.mark.fast


def disk(*paths: str) -> MemoryFileSystem:
    fs = MemoryFileSystem()
    for path in paths:
        parents = path.split("/")[1:-1]
        for depth in range(len(parents)):
            parent = "/" + "/".join(parents[: depth + 1])
            if try_stat(fs, parent) is None:
                fs.mkdir(parent, 0o700)
        write_file(fs, path, b"x")
    return fs


def test_one_file_each() -> None:
    fs = disk("/d/rank_0/a-1_2.ckpt", "/d/rank_1/a-1_2.ckpt", "/d/rank_x/a.ckpt", "/d/rank_1/notes.txt", "/d/rank_2")
    assert choose_files(fs, "/d") == ({0: "/d/rank_0/a-1_2.ckpt", 1: "/d/rank_1/a-1_2.ckpt"}, "ckpt")


def test_a_single_file_is_rank_0s() -> None:
    assert choose_files(disk("/d/a.safetensors"), "/d/a.safetensors") == ({0: "/d/a.safetensors"}, "safetensors")


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_the_highest_epoch_and_step_are_taken_and_that_is_said(form: str) -> None:
    """By name epoch 9 comes after epoch 10."""
    names = [f"/d/rank_{rank}/a-{epoch}_2.{form}" for rank in (0, 1) for epoch in (9, 10)]
    with pytest.warns(StateWarning, match=rf"a-10_2.{form} is taken for rank 0, not a-9_2.{form}; for 2 ranks"):
        files, _ = choose_files(disk(*names), "/d")
    assert files == {rank: f"/d/rank_{rank}/a-10_2.{form}" for rank in (0, 1)}


def test_the_latest_name_that_all_ranks_have_is_taken() -> None:
    """A job that died while it saved left step 4 of rank 0 only."""
    fs = disk("/d/rank_0/a-1_2.ckpt", "/d/rank_0/a-1_4.ckpt", "/d/rank_1/a-1_2.ckpt")
    with pytest.warns(StateWarning, match=r"rank_0/a-1_2.ckpt is taken for rank 0, not a-1_4.ckpt; for 1 ranks"):
        files, _ = choose_files(fs, "/d")
    assert files == {rank: f"/d/{name}" for rank, name in rank_files(fs, "/d").items()}
    assert files == {rank: f"/d/rank_{rank}/a-1_2.ckpt" for rank in (0, 1)}


@pytest.mark.filterwarnings("ignore::parckpt.StateWarning")
def test_files_of_different_steps_are_not_put_together() -> None:
    fs = disk("/d/rank_0/a-1_2.ckpt", "/d/rank_0/a-1_4.ckpt", "/d/rank_1/a-1_3.ckpt")
    with pytest.raises(ConfigError, match=r"rank 0 is /d/rank_0/a-1_4.ckpt, that of rank 1 is /d/rank_1/a-1_3.ckpt"):
        choose_files(fs, "/d")


def test_a_step_is_not_taken_for_a_rank() -> None:
    fs = disk("/d/rank_0/a-1_10.ckpt", "/d/rank_1/a-1_11.ckpt")
    with pytest.raises(FormatError, match="no file name is in all of its 2 rank directories"):
        rank_files(fs, "/d")
    with pytest.raises(ConfigError, match="epoch and step differ"):
        choose_files(fs, "/d")


@pytest.mark.filterwarnings("ignore::parckpt.StateWarning")
@pytest.mark.parametrize("pattern", ["out_{step}", "net_rank_{rank}-1_{step}", "net_rank{rank}_1-1_{step}"])
def test_the_latest_by_numbers_also_where_names_have_their_rank_in_them(pattern: str) -> None:
    """By name step 9 comes after step 10."""
    names = {(r, s): pattern.format(rank=r, step=s) for r in (0, 1, 12) for s in (9, 10)}
    fs = disk(*(f"/d/rank_{rank}/{name}.ckpt" for (rank, _), name in names.items()))
    expected = {rank: f"rank_{rank}/{names[rank, 10]}.ckpt" for rank in (0, 1, 12)}
    assert rank_files(fs, "/d", partial=True) == expected
    assert choose_files(fs, "/d")[0] == {rank: f"/d/{name}" for rank, name in expected.items()}


def test_names_with_their_rank_in_them() -> None:
    fs = disk("/d/rank_0/out0.ckpt", "/d/rank_1/out1.ckpt")
    assert list(choose_files(fs, "/d")[0].values()) == ["/d/rank_0/out0.ckpt", "/d/rank_1/out1.ckpt"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["/d/x"], "no rank_<n> directories"),
        (["/d/rank_0/notes.txt"], "no rank_<n> directories"),
        (["/d/rank_0/a.ckpt", "/d/rank_1/a.safetensors"], "both .ckpt and .safetensors"),
    ],
)
def test_refusals(paths: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_files(disk(*paths), "/d")
    with pytest.raises(ConfigError, match="no rank_<n> directories"):
        choose_files(MemoryFileSystem(), "/d")


class TestSuffix:
    NAMES = ("net_rank_0-1_100", "net_rank_0_1-1_100", "net_rank_0-2_100", "net_rank_0-11_100")

    def chosen(self, suffix: str, names: tuple[str, ...] = NAMES) -> str:
        files, _ = choose_files(disk(*(f"/d/rank_0/{name}.safetensors" for name in names)), "/d", suffix=suffix)
        return files[0].removeprefix("/d/rank_0/").removesuffix(".safetensors")

    def test_endings_of_numbers_are_whole_numbers(self) -> None:
        assert self.chosen("2_100") == "net_rank_0-2_100"
        assert self.chosen("_1-1_100") == self.chosen("1-1_100") == "net_rank_0_1-1_100"
        assert self.chosen("0-1_100") == "net_rank_0-1_100"  # the only one with this end

    def test_the_shortest_of_several_and_that_is_said(self) -> None:
        with pytest.warns(StateWarning, match="the shortest name is taken"):
            assert self.chosen("1_100") == "net_rank_0-1_100"

    @pytest.mark.parametrize(
        ("suffix", "message"), [("zz", "ends with 'zz'"), ("00", "longest ending"), ("t_100", "ends with")]
    )
    def test_refusals(self, suffix: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            self.chosen(suffix)
