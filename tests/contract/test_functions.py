"""`save_checkpoint` and `load_checkpoint`: as their docstrings say, alone and on several ranks."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.comm.base import Communicator
from parckpt.core.clock import Clock
from parckpt.core.manifest import CHUNK_NBYTES
from parckpt.errors import (
    CheckpointNotFoundError,
    ChecksumError,
    ConfigError,
    FormatError,
    IntegrityError,
    LayoutError,
    LockedError,
    ParckptError,
    StateMismatchError,
    StateWarning,
    StorageError,
)
from parckpt.storage.identity import identify
from parckpt.storage.lock import Lock, break_lock
from parckpt.testing.clock import ManualClock
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem
from parckpt.testing.world import run_world

W = np.arange(12.0).reshape(3, 4)


@pytest.fixture
def disk() -> MemoryFileSystem:
    return MemoryFileSystem()


def save(disk: MemoryFileSystem, state: Any, path: str = "/x", **options: Any) -> None:
    parckpt.save_checkpoint(state, path, filesystem=disk, **options)


def load(disk: MemoryFileSystem, path: str = "/x.ckpt", *args: Any, **options: Any) -> dict[str, Any]:
    return parckpt.load_checkpoint(path, *args, filesystem=disk, **options)


def visible(disk: MemoryFileSystem) -> list[str]:
    """What is there beside manifests; nothing hidden may be left."""
    names = disk.listdir("/")
    assert [name for name in names if name.startswith(".")] == []
    return [name for name in names if not name.endswith(".manifest")]


# -- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form", "file"),
    [
        ("x", "ckpt", "x.ckpt"),
        ("x.ckpt", "ckpt", "x.ckpt"),
        ("x.y", "ckpt", "x.y.ckpt"),
        ("x.ckpt", "safetensors", "x.ckpt.safetensors"),
        ("x.safetensors", "safetensors", "x.safetensors"),
        ("x.safetensors", "ckpt", "x.safetensors.ckpt"),
        ("llama-1_100", "ckpt", "llama-1_100.ckpt"),
        ("mit Leerzeichen ü", "ckpt", "mit Leerzeichen ü.ckpt"),
    ],
)
def test_the_extension_is_added_where_it_is_missing(disk: MemoryFileSystem, name: str, form: str, file: str) -> None:
    save(disk, {"w": W}, f"/{name}", format=form)
    assert visible(disk) == [file]
    assert len(disk.listdir("/")) == 2
    assert load(disk, f"/{file}")["w"].tolist() == W.tolist()


@pytest.mark.parametrize("name", ["", "/", "/.ckpt", "/.hidden", "/dir/"])
def test_impossible_names_are_refused(disk: MemoryFileSystem, name: str) -> None:
    with pytest.raises(ConfigError):
        save(disk, {"w": W}, name)
    assert visible(disk) == []


@pytest.mark.parametrize("options", [{"format": "xx"}, {"format": None}])
def test_impossible_arguments_are_refused(disk: MemoryFileSystem, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        save(disk, {"w": W}, **options)
    with pytest.raises(ConfigError):
        parckpt.save_checkpoint({"w": W}, b"/x", filesystem=disk)  # type: ignore[arg-type]
    assert visible(disk) == []


class Module:
    """Something with a state_dict, as frameworks have."""

    def __init__(self) -> None:
        self.weight = W.copy()

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "eps": 1e-5}


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_what_can_be_saved(disk: MemoryFileSystem, form: str) -> None:
    path = f"/x.{form}"
    save(disk, {"net": {"w": W}, "lr": 0.1, "name": "abc", "n": 2**70, "tags": [1, "x"]}, format=form)
    found = load(disk, path)
    assert found["net.w"].tolist() == W.tolist()
    assert (found["lr"].shape, found["lr"].item()) == ((), 0.1)
    assert (found["name"], found["n"], found["tags"]) == ("abc", 2**70, [1, "x"])
    save(disk, Module(), format=form)
    assert set(load(disk, path)) == {"weight", "eps"}
    save(disk, lambda: {"w": W + 1}, format=form)
    assert load(disk, path)["w"].tolist() == (W + 1).tolist()
    save(disk, [{"name": "a", "data": W}, {"name": "b", "data": W[0]}, {"name": "a", "data": W[1]}], format=form)
    assert {name: array.tolist() for name, array in load(disk, path).items()} == {
        "a": W[1].tolist(), "b": W[0].tolist()
    }  # fmt: skip
    assert visible(disk) == [f"x.{form}"]
    assert len(disk.listdir("/")) == 2  # each replaced file's manifest went with it


@pytest.mark.parametrize("bad", [5, "text", None, [1], [{"name": "a"}], [{"name": 1, "data": W}], {"w": object()}])
def test_what_cannot_be_saved(disk: MemoryFileSystem, bad: Any) -> None:
    save(disk, {"w": W})
    with pytest.raises(ConfigError):
        save(disk, bad)
    assert load(disk)["w"].tolist() == W.tolist()
    assert visible(disk) == ["x.ckpt"]


def test_choice_func_leaves_names_out(disk: MemoryFileSystem) -> None:
    save(disk, {"a": {"w": W, "lr": 1}, "b": W}, choice_func=lambda name: name.startswith("a"))
    assert set(load(disk)) == {"a.w", "a.lr"}


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_append_dict_in_full_precision(disk: MemoryFileSystem, form: str) -> None:
    append = {"epoch_num": 3, "step_num": 77, "third": 1 / 3, "huge": 1e300, "flag": True, "table": W[0]}
    save(disk, {"w": W}, format=form, append_dict=append)
    found = load(disk, f"/x.{form}")
    assert {name: found[name].item() for name in ("epoch_num", "step_num", "third", "huge", "flag")} == {
        name: append[name] for name in ("epoch_num", "step_num", "third", "huge", "flag")
    }
    assert found["table"].tolist() == W[0].tolist()
    info = parckpt.inspect(f"/x.{form}", filesystem=disk)
    assert (info.step, info.epoch) == (77, 3)


def test_an_appended_name_that_is_a_tensors_is_refused(disk: MemoryFileSystem) -> None:
    with pytest.raises(ConfigError, match="'w'"):
        save(disk, {"w": W}, append_dict={"w": 1})
    assert visible(disk) == []


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("several", [False, True])
def test_replacing_is_all_or_nothing_at_every_call(form: str, several: bool) -> None:
    """The n-th call fails, for every n: then the old or, where only cleaning up failed, the new one is there, whole."""
    path = "/x" if several else f"/x.{form}"
    options: dict[str, Any] = {"format": form, "crc_check": True}
    if several:
        options |= {"comm": parckpt.SELF, "integrated_save": False}
    outcomes = set()
    for number in range(1, 400):
        disk = MemoryFileSystem()
        save(disk, {"w": W}, **options)
        faulty = FaultyFileSystem(disk, number, errno.EIO)
        error = None
        try:
            parckpt.save_checkpoint({"w": W + 1}, "/x", filesystem=faulty, **options)
        except ParckptError as problem:
            error = problem
        found = load(disk, path)["w"].tolist()
        assert found in (W.tolist(), (W + 1).tolist())
        assert error is not None or found == (W + 1).tolist()
        outcomes.add((error is None, found == W.tolist()))
        if faulty.failed is None:
            break
        # The next save over it works, whatever the failed one left.
        break_lock(disk, "/", "x")
        save(disk, {"w": W + 2}, **options)
        assert load(disk, path)["w"].tolist() == (W + 2).tolist()
    assert faulty.failed is None
    assert (False, True) in outcomes
    assert (True, False) in outcomes


def test_a_full_disk_leaves_the_old_file(disk: MemoryFileSystem) -> None:
    save(disk, {"w": W})
    disk.capacity_nbytes = 10_000
    with pytest.raises(parckpt.NoSpaceError):
        save(disk, {"w": np.zeros(100_000)})
    disk.capacity_nbytes = None
    assert load(disk)["w"].tolist() == W.tolist()


def test_who_is_saving_keeps_others_out(disk: MemoryFileSystem) -> None:
    clock: Clock = ManualClock()
    held = Lock.acquire(disk, "/", "x", identify({}, "other attempt"), clock, 600.0)
    with pytest.raises(LockedError):
        save(disk, {"w": W})
    save(disk, {"w": W}, "/y")
    held.release()
    save(disk, {"w": W})
    assert visible(disk) == ["x.ckpt", "y.ckpt"]


def test_formats_of_one_name_do_not_disturb_each_other(disk: MemoryFileSystem) -> None:
    save(disk, {"w": W})
    save(disk, {"w": W + 1}, format="safetensors")
    save(disk, {"w": W + 2}, comm=parckpt.SELF, integrated_save=False)
    for _ in range(2):
        assert load(disk, "/x.ckpt")["w"].tolist() == W.tolist()
        assert load(disk, "/x.safetensors")["w"].tolist() == (W + 1).tolist()
        assert load(disk, "/x")["w"].tolist() == (W + 2).tolist()
        save(disk, {"w": W + 1}, format="safetensors")
    assert len(disk.listdir("/")) == 5
    assert {(info.path, info.problem) for info in parckpt.list_checkpoints("/", filesystem=disk)} >= {
        ("/x.ckpt", None), ("/x.safetensors", None)
    }  # fmt: skip


def test_a_directory_that_is_not_there_is_an_error(disk: MemoryFileSystem) -> None:
    with pytest.raises(StorageError) as caught:
        save(disk, {"w": W}, "/no/such/x")
    assert caught.value.errno == errno.ENOENT


def test_modes_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parckpt.save_checkpoint({"w": W}, "x", file_mode=0o640)
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {".ckpt": 0o640, ".manifest": 0o640}
    assert parckpt.load_checkpoint("x.ckpt")["w"].tolist() == W.tolist()
    parckpt.save_checkpoint({"w": W}, Path("y"), comm=parckpt.SELF, integrated_save=False, dir_mode=0o750)
    assert (tmp_path / "y").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "y" / "rank_0").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "y" / "rank_0" / "y.ckpt").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("part", [parckpt.Shard(W, (3, 4), (0, 0)), parckpt.PerRank(W), parckpt.PerRank(1)])
def test_parts_need_to_know_the_other_ranks(disk: MemoryFileSystem, part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save(disk, {"w": part})  # started alone: this process has all
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(ConfigError, match="PMI_SIZE=4"):
        save(disk, {"w": part})
    save(disk, {"w": part}, comm=parckpt.SELF)
    save(disk, {"w": W})  # `if rank == 0: save_checkpoint(...)`


# -- loading --------------------------------------------------------------------------------------------------------

STATE = {"net": {"a": W, "b": W[0]}, "optim": {"a": W + 5}, "lr": 0.5, "name": "x"}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"net.a", "net.b", "optim.a", "lr", "name"}),
        ({"filter_prefix": "net"}, {"optim.a", "lr", "name"}),
        ({"filter_prefix": ["net.a", "n"]}, {"optim.a", "lr"}),
        ({"specify_prefix": "net"}, {"net.a", "net.b"}),
        ({"specify_prefix": ("optim", "l")}, {"optim.a", "lr"}),
        ({"specify_prefix": "net", "filter_prefix": "net.b"}, {"net.a"}),
        ({"choice_func": lambda name: name.endswith("a")}, {"net.a", "optim.a"}),
        ({"choice_func": lambda name: False, "specify_prefix": "lr"}, {"lr"}),  # as in MindSpore: the prefix wins
    ],
)
def test_which_names_are_loaded(disk: MemoryFileSystem, options: dict[str, Any], names: set[str]) -> None:
    save(disk, STATE)
    assert set(load(disk, **options)) == names
    net = {"net": {"a": np.zeros((3, 4)), "b": np.zeros(4)}, "optim": {"a": np.zeros((3, 4))}, "lr": 0.0, "name": ""}
    filled = load(disk, "/x.ckpt", net, **options)
    assert set(filled) == names - {"lr", "name"}
    assert (net["net"]["a"][0, 1] == 1) == ("net.a" in names)
    assert (net["optim"]["a"][0, 0] == 5) == ("optim.a" in names)
    assert (net["lr"] == 0.5) == ("lr" in names)
    assert (net["name"] == "x") == ("name" in names)


@pytest.mark.parametrize(
    "options",
    [
        {"filter_prefix": ""},
        {"filter_prefix": 5},
        {"specify_prefix": [""]},
        {"specify_prefix": [1]},
        {"format": "xx"},
        {"net": 5},
        {"net": {"w": object()}},
    ],
)
def test_wrong_arguments_of_load(disk: MemoryFileSystem, options: dict[str, Any]) -> None:
    save(disk, STATE)
    with pytest.raises((ConfigError, TypeError)):
        load(disk, **options)


def test_only_what_is_chosen_is_read(disk: MemoryFileSystem) -> None:
    count = CHUNK_NBYTES // 8
    save(disk, {"a": np.zeros(count), "b": np.ones(count), "c": np.zeros(count)})
    disk.corrupt("/x.ckpt", CHUNK_NBYTES + CHUNK_NBYTES // 2)  # in "b"
    assert set(load(disk, specify_prefix="c")) == {"c"}
    with pytest.raises(ChecksumError):
        load(disk, specify_prefix="b")
    with pytest.raises(ChecksumError):
        load(disk)


def test_a_net_is_filled_in_place(disk: MemoryFileSystem) -> None:
    save(disk, STATE)
    a, seen = np.zeros((3, 4)), []
    net = {
        "net": {
            "a": a,
            "b": parckpt.Leaf((4,), "f8", lambda out: None, lambda new: seen.append(new.tolist())),
            "new": np.full(2, 9.0),
        },
        "optim": {"a": parckpt.Spec((2, 4), "f8", (3, 4), (1, 0))},
        "lr": 0.0,
    }
    with pytest.warns(StateWarning, match=r"net\.new") as said:
        found = load(disk, "/x.ckpt", net)
    assert len(said) == 1
    assert set(found) == {"net.a", "net.b", "optim.a"}
    assert found["net.a"] is a
    assert a.tolist() == W.tolist()
    assert seen == [W[0].tolist()]
    assert found["optim.a"].tolist() == (W + 5)[1:].tolist()
    assert net["lr"] == 0.5
    assert net["net"]["new"].tolist() == [9.0, 9.0]


def test_a_module_is_filled_through_its_state_dict(disk: MemoryFileSystem) -> None:
    save(disk, Module())
    module = Module()
    module.weight[:] = 0
    parckpt.load_checkpoint("/x.ckpt", module, filesystem=disk)
    assert module.weight.tolist() == W.tolist()


def test_strict_load_is_about_types(disk: MemoryFileSystem) -> None:
    save(disk, {"w": W})
    net = {"w": np.zeros((3, 4), "f4")}
    with pytest.raises(StateMismatchError, match="float32"):
        load(disk, "/x.ckpt", net, strict_load=True)
    load(disk, "/x.ckpt", net)
    assert net["w"].tolist() == W.tolist()
    for strict in (False, True):
        with pytest.raises(StateMismatchError, match="shape"):
            load(disk, "/x.ckpt", {"w": np.zeros((4, 3))}, strict_load=strict)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("several", [False, True])
def test_crc_check_refuses_a_file_without_one(disk: MemoryFileSystem, form: str, several: bool) -> None:
    options: dict[str, Any] = {"format": form}
    if several:
        options |= {"comm": parckpt.SELF, "integrated_save": False}
    path = "/x" if several else f"/x.{form}"
    save(disk, {"w": W}, **options)
    assert load(disk, path)["w"].tolist() == W.tolist()
    with pytest.raises(ChecksumError, match="no crc"):
        load(disk, path, crc_check=True)
    save(disk, {"w": W}, crc_check=True, **options)
    assert load(disk, path, crc_check=True)["w"].tolist() == W.tolist()


def test_damage_is_named_and_a_path_that_is_not_there(disk: MemoryFileSystem) -> None:
    save(disk, {"w": W})
    disk.corrupt("/x.ckpt", 40)
    with pytest.raises(ChecksumError, match=r"x\.ckpt.*chunk 0"):
        load(disk)
    with pytest.raises(CheckpointNotFoundError, match="nothing"):
        load(disk, "/nothing.ckpt")
    with pytest.raises(ConfigError):
        parckpt.load_checkpoint(b"/x.ckpt", filesystem=disk)  # type: ignore[arg-type]
    assert not [name for name in disk.listdir("/") if "bad" in name]  # reading writes nothing


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("several", [False, True])
def test_copies_of_files_load(tmp_path: Path, form: str, several: bool) -> None:
    options: dict[str, Any] = {"comm": parckpt.SELF, "integrated_save": False} if several else {}
    (tmp_path / "a").mkdir()
    parckpt.save_checkpoint({"w": W}, tmp_path / "a" / "x", format=form, **options)
    name = "x" if several else f"x.{form}"
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert parckpt.load_checkpoint(tmp_path / "b" / name)["w"].tolist() == W.tolist()  # without a warning
    (tmp_path / "c").mkdir()
    for path in (tmp_path / "a").glob("*"):  # as `cp -r a/* c`: hidden files stay behind
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / "c" / path.name)
    assert parckpt.load_checkpoint(tmp_path / "c" / name)["w"].tolist() == W.tolist()
    assert parckpt.open_checkpoint(tmp_path / "c" / name)["w"][1].tolist() == W[1].tolist()


def foreign_copy(tmp_path: Path, name: str = "x.ckpt", **options: Any) -> Path:
    form = Path(name).suffix[1:]
    parckpt.save_checkpoint({"w": W, "v": W[0]}, tmp_path / "x", format=form, **options)
    (tmp_path / "alone").mkdir()
    return Path(shutil.copy(tmp_path / name, tmp_path / "alone"))


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_a_file_without_manifest(tmp_path: Path, form: str) -> None:
    path = foreign_copy(tmp_path, f"x.{form}")
    with pytest.warns(StateWarning, match="without verification") as seen:
        assert parckpt.load_checkpoint(path)["w"].tolist() == W.tolist()
    assert seen[0].filename == __file__
    assert set(parckpt.load_checkpoint(path, allow_unverified=True)) == {"w", "v"}
    with pytest.raises(IntegrityError, match="allow_unverified"):
        parckpt.load_checkpoint(path, allow_unverified=False)
    net = {"w": parckpt.Spec((1, 4), "f4", (3, 4), (2, 0))}
    found = parckpt.load_checkpoint(path, net, allow_unverified=True)
    assert found["w"].tolist() == W[2:].tolist()
    assert found["w"].dtype == np.float32
    assert set(parckpt.load_checkpoint(path, allow_unverified=True, specify_prefix="v")) == {"v"}
    # A name of any kind, with the format said.
    other = path.rename(path.with_name("model.bin"))
    with pytest.raises(ConfigError, match="should end with"):
        parckpt.load_checkpoint(other, allow_unverified=True)
    assert parckpt.load_checkpoint(other, allow_unverified=True, format=form)["w"].tolist() == W.tolist()
    assert parckpt.load_checkpoint(other, net, allow_unverified=True, format=form)["w"].tolist() == W[2:].tolist()


def test_a_deleted_manifest_downgrades_nothing(tmp_path: Path) -> None:
    parckpt.save_checkpoint({"w": W}, tmp_path / "x")
    parckpt.save_checkpoint({"w": W}, tmp_path / "y")
    (manifest,) = tmp_path.glob("x.*.manifest")
    manifest.unlink()
    with pytest.raises(IntegrityError, match="has published in this directory"):
        parckpt.load_checkpoint(tmp_path / "x.ckpt")
    assert parckpt.load_checkpoint(tmp_path / "x.ckpt", allow_unverified=True)["w"].tolist() == W.tolist()
    parckpt.save_checkpoint({"w": W}, tmp_path / "z", comm=parckpt.SELF, integrated_save=False)
    (tmp_path / "z" / "manifest").unlink()
    with pytest.raises(IntegrityError, match="has published in this directory"):
        parckpt.load_checkpoint(tmp_path / "z")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 100, b"{}"])
@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_junk_is_refused(tmp_path: Path, content: bytes, form: str) -> None:
    path = tmp_path / f"junk.{form}"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="junk"):
        parckpt.load_checkpoint(path, allow_unverified=True)


# -- several ranks ----------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "one-safetensors": {"format": "safetensors", "crc_check": True},
    "each": {"integrated_save": False},
    "owners": {"remove_redundancy": True},
}


def sharded(rank: int, size: int, scale: float = 1.0) -> dict[str, Any]:
    rows = slice(3 * rank // size, 3 * (rank + 1) // size)
    return {
        "w": parckpt.Shard(W[rows] * scale, (3, 4), (rows.start, 0)),
        "bias": W[0] * scale,
        "lr": 0.5 * scale,
        "own": parckpt.PerRank(np.full(2, rank * scale), on_resize=lambda old, rank, size: sum(old)),
        "place": parckpt.PerRank(int(10 * rank * scale), on_resize="keep"),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "other"), [(1, 2), (2, 1), (3, 2), (2, 2)])
def test_together_with_other_ranks(disk: MemoryFileSystem, layout: str, size: int, other: int) -> None:
    options = LAYOUTS[layout]

    def saving(comm: Communicator, rank: int) -> None:
        parckpt.save_checkpoint(sharded(rank, size), "/x", comm=comm, filesystem=disk, **options)

    def loading(comm: Communicator, rank: int) -> None:
        net = sharded(rank, other, 0.0)
        found = parckpt.load_checkpoint(path, net, comm=comm, filesystem=disk)
        expected = sharded(rank, other)
        assert set(found) == {"w", "bias", "own"}
        assert net["w"].data.tolist() == expected["w"].data.tolist()
        assert net["bias"].tolist() == W[0].tolist()
        assert net["lr"] == 0.5
        assert net["own"].value.tolist() == [rank if size == other else sum(range(size))] * 2
        assert net["place"].value == (10 * rank if size == other else 0)
        whole = parckpt.load_checkpoint(path, comm=comm, filesystem=disk)
        assert whole["w"].tolist() == W.tolist()

    run_world(size, saving)
    (name,) = visible(disk)
    assert name == ("x" if layout in ("each", "owners") else f"x.{options.get('format', 'ckpt')}")
    path = f"/{name}"
    run_world(other, loading)
    everything = load(disk, path)
    assert set(everything) == {
        "w", "bias", "lr", *(f"own@rank_{r}" for r in range(size)), *(f"place@rank_{r}" for r in range(size))
    }  # fmt: skip
    assert everything[f"own@rank_{size - 1}"].tolist() == [size - 1] * 2
    assert everything[f"place@rank_{size - 1}"] == 10 * (size - 1)
    info = parckpt.inspect(path, filesystem=disk)
    assert (info.world_size, info.integrated) == (size, name != "x")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_ranks_error_is_everybodys_and_the_old_stays(disk: MemoryFileSystem, layout: str) -> None:
    options = LAYOUTS[layout]

    def program(comm: Communicator, rank: int) -> list[str]:
        parckpt.save_checkpoint(sharded(rank, 2), "/x", comm=comm, filesystem=disk, **options)
        said = []
        gap = {"w": parckpt.Shard(W[:1], (3, 4), (rank, 0))}
        missing_leaf = {"w": parckpt.Leaf((2,), "f4", read_only_once)}
        for state in (gap, {"w": object() if rank else W}, {"w": W + rank}, missing_leaf):
            with pytest.raises(ParckptError) as caught:
                parckpt.save_checkpoint(state, "/x", comm=comm, filesystem=disk, **options)
            said.append(f"{type(caught.value).__name__}: {caught.value}")
        assert said[0].startswith(LayoutError.__name__)
        return said

    def read_only_once(out: np.ndarray) -> None:
        raise OSError("gone")

    first, second = run_world(2, program)
    assert first == second
    (name,) = visible(disk)
    assert load(disk, f"/{name}")["w"].tolist() == W.tolist()


def test_one_ranks_error_in_loading_is_everybodys(disk: MemoryFileSystem) -> None:
    save(disk, {"w": W})

    def program(comm: Communicator, rank: int) -> list[str]:
        said = []
        for net in ({"w": np.zeros((3, 4 + rank))}, {"w": object() if rank else np.zeros((3, 4))}):
            with pytest.raises(ParckptError) as caught:
                parckpt.load_checkpoint("/x.ckpt", net, comm=comm, filesystem=disk)
            said.append(str(caught.value))

        def choose(name: str) -> bool:
            if rank:
                raise KeyError(name)
            return True

        with pytest.raises(ConfigError, match="KeyError") as problem:
            parckpt.load_checkpoint("/x.ckpt", {"w": np.zeros((3, 4))}, choice_func=choose, comm=comm, filesystem=disk)
        return [*said, str(problem.value)]

    first, second = run_world(2, program)
    assert first == second


def test_the_directory_is_not_kept_open(disk: MemoryFileSystem) -> None:
    save(disk, {"w": W})
    load(disk)
    parckpt.open_checkpoint("/x.ckpt", filesystem=disk)["w"][0]
    assert disk.nopen == 0
    assert os.path.basename(parckpt.latest_checkpoint("/", filesystem=disk) or "") == "x.ckpt"
