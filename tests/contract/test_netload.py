"""`load_param_into_net` and `load_checkpoint` into a state: what is filled, what is said, what is left alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.comm.base import Communicator
from parckpt.errors import ConfigError, ConfigTypeError, StateMismatchError, StateWarning
from parckpt.testing.filesystem import MemoryFileSystem
from parckpt.testing.world import run_world

W = np.arange(12.0).reshape(3, 4)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StateWarning)
        yield


@pytest.fixture
def disk() -> MemoryFileSystem:
    return MemoryFileSystem()


# -- one process ------------------------------------------------------------------------------------------------------


def test_what_is_filled_and_what_is_listed() -> None:
    net = {
        "a": {"w": np.zeros((3, 4)), "b": np.zeros(4, "f4")},
        "c": np.zeros(2),
        "lr": 0.0,
        "name": "",
        "accu_grads.w": np.ones(1),
    }
    with pytest.warns(StateWarning, match=r"nothing to fill them with: c$") as said:
        lists = parckpt.load_param_into_net(
            net, {"a.w": W, "a.b": W[0], "lr": np.float32(0.5), "name": "x", "extra": W, "note": "text"}
        )
    assert lists == (["c"], ["extra", "note"])
    assert [warning.filename for warning in said] == [__file__]
    assert net["a"]["w"].tolist() == W.tolist()
    assert net["a"]["b"].tolist() == W[0].tolist()
    assert net["a"]["b"].dtype == np.float32
    assert (net["lr"], net["name"], net["c"].tolist(), net["accu_grads.w"].tolist()) == (0.5, "x", [0, 0], [1])


def test_a_prefix_is_said() -> None:
    net = {"w": np.zeros((3, 4))}
    with pytest.warns(StateWarning, match=r"strict_load=True.*'w' from 'net\.w'"):
        assert parckpt.load_param_into_net(net, {"net.w": W}) == ([], ["net.w"])
    assert net["w"].tolist() == W.tolist()
    net["w"][:] = 0
    with pytest.warns(StateWarning, match="nothing to fill them with: w"):
        assert parckpt.load_param_into_net(net, {"net.w": W}, strict_load=True) == (["w"], ["net.w"])
    assert not net["w"].any()


def test_the_nets_shape_stays() -> None:
    net = {"w": np.zeros((3, 4)), "s": np.zeros(()), "t": parckpt.Shard(np.zeros((1, 4)), (3, 4), (2, 0))}
    w = net["w"]
    lists = parckpt.load_param_into_net(net, {"w": W.reshape(3, 4, 1, 1), "s": np.ones(1), "t": W[..., None]})
    assert lists == ([], [])
    assert net["w"] is w
    assert w.tolist() == W.tolist()
    assert net["s"].tolist() == 1
    assert net["t"].data.tolist() == W[2:].tolist()


BAD_ENTRIES = {
    "shape": ({"v": np.zeros((4, 3))}, "(3, 4)"),
    "fewer dimensions": ({"v": np.zeros(12)}, "(12,)"),
    "type": ({"v": np.zeros((3, 4), "i4")}, "int32"),
    "unsigned": ({"n": np.zeros(2, "u2")}, "uint16"),
    "a number": ({"v": 5}, "an array in the net and a plain value"),
    "an array": ({"lr": W}, "a plain value in the net and an array"),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_what_does_not_fit_changes_nothing(name: str) -> None:
    entries, words = BAD_ENTRIES[name]
    net = {"u": np.zeros((3, 4)), "v": np.zeros((3, 4)), "n": np.zeros(2, "u1"), "lr": 0.5}
    good = {"u": W, "v": W, "n": np.ones(2, "u1"), "lr": np.asarray(7.0)}
    with pytest.raises(StateMismatchError) as caught:
        parckpt.load_param_into_net(net, {**good, **entries})
    assert words in str(caught.value)
    assert len(caught.value.mismatched) == 1
    assert isinstance(caught.value, RuntimeError)  # MindSpore's class
    assert not any(net[key].any() for key in ("u", "v", "n"))
    assert net["lr"] == 0.5


def test_all_that_does_not_fit_is_named() -> None:
    net = {f"w{n}": np.zeros(2) for n in range(12)}
    with pytest.raises(StateMismatchError, match="and 4 more") as caught:
        parckpt.load_param_into_net(net, {f"w{n}": np.zeros(3) for n in range(12)})
    assert len(caught.value.mismatched) == 12


def test_types_are_converted_unless_strict() -> None:
    net = {"f": np.zeros(2, "f2"), "i": np.zeros(2, "i2")}
    entries = {"f": np.array([1.5, -2.0]), "i": np.array([7, -300], "i8")}
    assert parckpt.load_param_into_net(net, entries) == ([], [])
    assert (net["f"].tolist(), net["i"].tolist()) == ([1.5, -2.0], [7, -300])
    with pytest.raises(StateMismatchError, match=r"float16.*float64.*int16.*int64"):
        parckpt.load_param_into_net(net, entries, strict_load=True)


def test_leaves_and_texts_and_lists() -> None:
    seen: list[Any] = []
    net = {
        "l": parckpt.Leaf((2, 2), "f4", lambda out: None, lambda new: seen.append((new.tolist(), new.flags.writeable))),
        "parts": [parckpt.Shard(np.zeros((1, 4)), (3, 4), (n, 0)) for n in (0, 2)],
        "t": np.zeros(2),
    }
    with pytest.warns(StateWarning, match="nothing to fill them with: t"):
        lists = parckpt.load_param_into_net(net, {"l": W[:2, :2].T, "parts": W, "t": "text", "m": [W, W, W]})
    assert lists == (["t"], ["t", "m"])  # MindSpore says nothing of a parameter for which there is a text
    assert seen == [([[0, 4], [1, 5]], False)]
    assert [part.data.tolist() for part in net["parts"]] == [[W[0].tolist()], [W[2].tolist()]]


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        ((5, {}), TypeError),
        (("w", {}), TypeError),
        (({"w": W}, [("w", W)]), TypeError),
        (({"w": W}, None), TypeError),
        (({"w": W}, {1: W}), TypeError),
        (({"w": W}, {"w": object()}), TypeError),
        (({"w": W}, {"x": np.ma.masked_array(W)}), TypeError),
        (({"w": W}, {"w": W}, 1), TypeError),
        (({"w": W}, {"w": W}, False, 1), ValueError),
        (({"w": W}, {"w": W}, False, True), TypeError),  # no other ranks
        (({"w": parckpt.Spec((3, 4), "f8")}, {"w": W}), ValueError),
    ],
)
def test_wrong_arguments(args: Any, kind: type[Exception]) -> None:
    with pytest.raises(ConfigError) as caught:
        parckpt.load_param_into_net(*args)
    assert isinstance(caught.value, kind)


def test_own_values_need_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    net = {"place": parckpt.PerRank(np.zeros(2)), "n": parckpt.PerRank(0)}
    entries = {"place@rank_0": np.ones(2), "n@rank_0": np.asarray(3), "n@rank_1": np.asarray(4)}
    assert parckpt.load_param_into_net(net, entries) == ([], ["n@rank_1"])
    assert (net["place"].value.tolist(), net["n"].value) == ([1, 1], 3)
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(ConfigError, match="which rank this is"):
        parckpt.load_param_into_net(net, entries)
    assert parckpt.load_param_into_net(net, entries, comm=parckpt.SELF) == ([], ["n@rank_1"])


def test_what_load_checkpoint_returns_goes_into_a_net(disk: MemoryFileSystem) -> None:
    state = {"w": W, "n": 2**70, "lr": 0.1, "tags": [1, "x"], "name": "x", "none": None, "own": parckpt.PerRank(W[0])}
    parckpt.save_checkpoint(state, "/x", append_dict={"epoch_num": 3}, filesystem=disk)
    net = {"w": W * 0, "n": 0, "lr": 0.0, "tags": [], "name": "", "none": 1, "own": parckpt.PerRank(np.zeros(4))}
    found = parckpt.load_checkpoint("/x.ckpt", filesystem=disk)
    assert parckpt.load_param_into_net(net, found) == ([], ["epoch_num"])
    assert net["own"].value.tolist() == W[0].tolist()
    assert {name: net[name] for name in ("n", "lr", "tags", "name", "none")} == {
        "n": 2**70, "lr": 0.1, "tags": [1, "x"], "name": "x", "none": None
    }  # fmt: skip


# -- several ranks ----------------------------------------------------------------------------------------------------


def test_boxes_of_whole_arrays() -> None:
    def program(comm: Communicator, rank: int) -> None:
        net = {"w": parckpt.Shard(np.zeros((1, 4)), (3, 4), (rank, 0)), "own": parckpt.PerRank(0)}
        entries = {"w": W, **{f"own@rank_{r}": np.asarray(10 * r) for r in range(3)}}
        assert parckpt.load_param_into_net(net, entries, comm=comm)[0] == []
        assert net["w"].data.tolist() == [W[rank].tolist()]
        assert net["own"].value == 10 * rank

    run_world(3, program)


def test_what_a_rank_lacks_comes_from_the_lowest_that_has_it() -> None:
    def program(comm: Communicator, rank: int) -> list[str]:
        seen: list[Any] = []
        half = rank % 2
        net = {
            "a": np.zeros((3, 4)),
            "b": np.zeros(3, "f4"),
            "c": parckpt.Shard(np.zeros(2), (4,), (2 * half,)),  # ranks 0 and 2 hold the same half, 1 and 3 the other
            "d": parckpt.Leaf((2,), "f8", lambda out: None, lambda new: seen.append(new.tolist())),
            "nowhere": np.zeros(1),
        }
        entries: dict[str, Any] = [
            {"a": W, "c": np.array([1.0, 2.0])},
            {"b": np.array([-0.0, 1.5, np.nan])},
            {"d": np.array([5.0, 6.0])},
            {"c": np.array([3.0, 4.0]), "d": np.array([5.0, 6.0])},
        ][rank]
        if rank == 0:  # who speaks for all
            with pytest.warns(StateWarning, match="nothing to fill them with: nowhere"):
                missing, left = parckpt.load_param_into_net(net, entries, False, True, comm=comm)
        else:
            missing, left = parckpt.load_param_into_net(net, entries, False, True, comm=comm)
        assert (missing, left) == (["nowhere"], [])
        assert net["a"].tolist() == W.tolist()
        assert net["b"].tobytes() == np.array([-0.0, 1.5, np.nan], "f4").tobytes()
        assert net["c"].data.tolist() == [[1, 2], [3, 4]][half]
        assert seen == [[5.0, 6.0]]
        return missing

    run_world(4, program)


def test_one_ranks_mistake_is_everybodys() -> None:
    def program(comm: Communicator, rank: int) -> list[str]:
        said = []
        for net, entries, strict in [
            ({"w": np.zeros((3, 4))}, {"w": W[:, rank:]}, False),
            ({"w": np.zeros((3, 4))}, 5 if rank else {"w": W}, False),
            ({"w": np.zeros((3, 4))}, {"w": W}, 1 if rank else False),
            (5 if rank else {"w": np.zeros((3, 4))}, {"w": W}, False),
        ]:
            with pytest.raises(parckpt.ParckptError) as caught:
                parckpt.load_param_into_net(net, entries, strict, True, comm=comm)
            said.append(f"{type(caught.value).__name__} {caught.value}")
            assert not isinstance(net, dict) or not net["w"].any()

        def broken(new: Any) -> None:
            raise OSError("gone")

        leaf = parckpt.Leaf((3, 4), "f8", lambda out: None, broken if rank else lambda new: None)
        with pytest.raises(OSError, match="gone") as lost:
            parckpt.load_param_into_net({"w": leaf}, {} if rank else {"w": W}, False, True, comm=comm)
        return [*said, str(lost.value)]

    first, second = run_world(2, program)
    assert first == second


# -- from files -------------------------------------------------------------------------------------------------------


def save_by_owners(disk: MemoryFileSystem, form: str) -> None:
    """A step directory of two ranks, in which each has some of what both hold."""

    def program(comm: Communicator, rank: int) -> None:
        state = {"a": W, "b": W + 1, "c": parckpt.Shard(W[rank : rank + 1], (2, 4), (rank, 0))}
        parckpt.save_checkpoint(
            state, "/x", remove_redundancy=True, split_replicas=False, format=form, comm=comm, filesystem=disk
        )

    run_world(2, program)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_one_ranks_file_is_not_taken_for_the_whole(disk: MemoryFileSystem, form: str) -> None:
    save_by_owners(disk, form)
    path = f"/x/rank_0/x.{form}"
    with pytest.warns(StateWarning, match=r"only what rank 0 wrote; the whole checkpoint is /x$"):
        found = parckpt.load_checkpoint(path, filesystem=disk)
    assert len({"a", "b"} & set(found)) == 1
    assert set(parckpt.load_checkpoint(path, remove_redundancy=True, filesystem=disk)) == set(found)
    whole = parckpt.load_checkpoint("/x", filesystem=disk)
    assert set(whole) == {"a", "b", "c"}
    disk.corrupt(path, 30)
    with pytest.raises(parckpt.ChecksumError, match="chunk 0"):
        parckpt.load_checkpoint(path, remove_redundancy=True, filesystem=disk)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_each_rank_its_own_file(disk: MemoryFileSystem, form: str) -> None:
    """MindSpore's way: every rank names the file of its rank directory, and gets the rest from the others."""
    save_by_owners(disk, form)

    def program(comm: Communicator, rank: int) -> None:
        net = {"a": W * 0, "b": W * 0, "c": parckpt.Shard(np.zeros((1, 4)), (2, 4), (rank, 0))}
        own = parckpt.load_checkpoint(
            f"/x/rank_{rank}/x.{form}", net, remove_redundancy=True, comm=comm, filesystem=disk
        )
        assert "c" in own
        assert [net["a"].tolist(), net["b"].tolist()] == [W.tolist(), (W + 1).tolist()]
        assert net["c"].data.tolist() == [W[rank].tolist()]
        net["a"][:] = 0
        # The directory has everything, whatever is said of it.
        parckpt.load_checkpoint("/x", net, remove_redundancy=True, comm=comm, filesystem=disk)
        assert net["a"].tolist() == W.tolist()
        with pytest.raises(parckpt.CheckpointNotFoundError):
            parckpt.load_checkpoint(
                f"/x/rank_{2 * rank}/x.{form}", net, remove_redundancy=True, comm=comm, filesystem=disk
            )

    run_world(2, program)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_names_types_and_shapes_of_a_net(disk: MemoryFileSystem, form: str) -> None:
    stored = {"net.w": W.reshape(3, 4, 1), "net.b": np.ones(4, "f4"), "net.n": np.arange(3), "other": W}
    parckpt.save_checkpoint(stored, "/x", format=form, filesystem=disk)
    path = f"/x.{form}"
    net = {"w": np.zeros((3, 4), "f4"), "b": parckpt.Spec((4,), "f8"), "n": np.zeros(3, "i2"), "new": np.zeros(1)}
    with pytest.warns(StateWarning) as said:
        found = parckpt.load_checkpoint(path, net, filesystem=disk)
    assert len(said) == 2
    assert "'w' from 'net.w'" in str(said[0].message)
    assert "nothing to fill them with: new" in str(said[1].message)
    assert {warning.filename for warning in said} == {__file__}
    assert set(found) == {"w", "b", "n"}
    assert net["w"].tolist() == W.tolist()
    assert found["b"].tolist() == [1.0] * 4
    assert net["n"].tolist() == [0, 1, 2]
    # The prefixes and the rule are about names in the file.
    net["w"][:] = 0
    with quiet():
        parckpt.load_checkpoint(path, net, specify_prefix="net.n", filesystem=disk)
        assert not net["w"].any()
        parckpt.load_checkpoint(path, net, choice_func=lambda name: name == "net.w", filesystem=disk)
        assert net["w"].any()
        with pytest.raises(ConfigError, match=r"nothing of /x.* is left"):
            parckpt.load_checkpoint(path, net, specify_prefix="w", filesystem=disk)
        with pytest.raises(StateMismatchError, match="int64"):
            parckpt.load_checkpoint(path, {"net.n": np.zeros(3)}, filesystem=disk)
        with pytest.raises(StateMismatchError, match=r"\(4, 3\)"):
            parckpt.load_checkpoint(path, {"net.w": np.zeros((4, 3))}, filesystem=disk)
        assert parckpt.load_checkpoint(path, {"w": np.zeros((3, 4))}, strict_load=True, filesystem=disk) == {}


def test_nothing_left_is_an_error(disk: MemoryFileSystem) -> None:
    parckpt.save_checkpoint({"w": W}, "/x", append_dict={"epoch_num": 1}, filesystem=disk)
    parckpt.save_checkpoint({}, "/empty", filesystem=disk)
    assert set(parckpt.load_checkpoint("/x.ckpt", filter_prefix="w", filesystem=disk)) == {"epoch_num"}
    for net in (None, {"w": W * 0}):
        with pytest.raises(ConfigError, match=r"nothing of /x.* is left"):
            parckpt.load_checkpoint("/x.ckpt", net, specify_prefix="z", filesystem=disk)
        with pytest.raises(ConfigError, match=r"nothing of /empty.* is left"):
            parckpt.load_checkpoint("/empty.ckpt", net, filesystem=disk)


def test_ranks_say_together_what_is_missing(disk: MemoryFileSystem) -> None:
    parckpt.save_checkpoint({"w": W}, "/x", filesystem=disk)

    def program(comm: Communicator, rank: int) -> None:
        net = {"w": W * 0, f"of_{rank}": np.zeros(1)}
        if rank == 0:
            with pytest.warns(StateWarning, match="of_0, of_1"):
                parckpt.load_checkpoint("/x.ckpt", net, comm=comm, filesystem=disk)
        else:
            parckpt.load_checkpoint("/x.ckpt", net, comm=comm, filesystem=disk)
        assert net["w"].tolist() == W.tolist()

    run_world(2, program)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_for_what_is_plain_and_none_for_what_is_not(disk: MemoryFileSystem) -> None:
    parckpt.save_checkpoint({"w": W}, "/x", filesystem=disk)
    with pytest.raises(ConfigError, match="not encrypted"):
        parckpt.load_checkpoint("/x.ckpt", dec_key=b"0" * 16, filesystem=disk)
    with pytest.raises(ConfigError, match="dec_key must have 16 bytes for SM4-CBC, not 32"):
        parckpt.load_checkpoint("/x.ckpt", dec_key=b"0" * 32, dec_mode="SM4-CBC", filesystem=disk)
    with pytest.raises(ConfigTypeError, match="dec_key"):
        parckpt.load_checkpoint("/x.ckpt", dec_key="0" * 16, filesystem=disk)  # type: ignore[arg-type]
    assert parckpt.load_checkpoint("/x.ckpt", dec_mode="anything", filesystem=disk)


def test_a_leaf_comes_back_as_what_it_stands_for(tmp_path: Path) -> None:
    held, device = np.zeros(3), object()
    net = {
        "a": parckpt.Leaf((3,), "f8", lambda out: None, lambda new: held.__setitem__(..., new), origin=device),
        "b": parckpt.Leaf((3,), "f8", lambda out: None, lambda new: None),
    }
    parckpt.save_checkpoint({"a": np.arange(3.0), "b": np.ones(3)}, tmp_path / "x")
    assert parckpt.load_checkpoint(tmp_path / "x.ckpt", net) == {"a": device, "b": net["b"]}
    assert held.tolist() == [0, 1, 2]
