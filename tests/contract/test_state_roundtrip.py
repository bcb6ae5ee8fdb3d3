"""Whatever a state may hold comes back from a real save, bit for bit and as the type it was, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import parckpt
from parckpt.comm.base import Communicator
from parckpt.core.dtypes import _TABLE, DType
from parckpt.core.state import flatten
from parckpt.core.values import is_plain
from parckpt.errors import ConfigError, LayoutError, ParckptError, StateMismatchError
from parckpt.storage.filesystem import FileSystem
from parckpt.testing.checkpoints import random_array
from parckpt.testing.filesystem import MemoryFileSystem
from parckpt.testing.strategies import shapes
from parckpt.testing.world import run_world

MODES: dict[str, dict[str, Any]] = {
    "integrated": {},
    "integrated-safetensors": {"format": "safetensors", "crc_check": True},
    "per-rank": {"integrated_save": False},
    "deduplicated-safetensors": {"remove_redundancy": True, "format": "safetensors"},
}
State = dict[Any, Any]


@contextmanager
def run_of(fs: FileSystem, comm: Any, **options: Any) -> Iterator[parckpt.ModelCheckpoint]:
    config = parckpt.CheckpointConfig(**{"save_checkpoint_steps": 1000, **options})
    with parckpt.ModelCheckpoint("m", "/", config, comm=comm, filesystem=fs) as run:
        yield run


def saved(size: int, state: Callable[[int], State], **options: Any) -> MemoryFileSystem:
    disk = MemoryFileSystem()

    def program(comm: Communicator, rank: int) -> None:
        with run_of(disk, comm, **options) as run:
            run.save_now(state(rank), 1)

    run_world(size, program)
    return disk


def restored(
    disk: MemoryFileSystem, size: int, state: Callable[[int], State | None], **request: Any
) -> list[tuple[Any, parckpt.Progress]]:
    def program(comm: Communicator, rank: int) -> tuple[Any, parckpt.Progress]:
        held = state(rank)
        with run_of(disk, comm) as run:
            return held, run.restore(held, **request)

    return run_world(size, program)


def refused(size: int, state: Callable[[int], State], **options: Any) -> ParckptError:
    """The error of saving, the same on all ranks; nothing may be left of it."""
    disk = MemoryFileSystem()

    def program(comm: Communicator, rank: int) -> ParckptError:
        config = parckpt.CheckpointConfig(save_checkpoint_steps=1000, **options)
        run = parckpt.ModelCheckpoint("m", "/", config, comm=comm, filesystem=disk)
        try:
            with pytest.raises(ParckptError) as caught:
                run.save_now(state(rank), 1)
        finally:
            run.close()  # without the last save that leaving a context makes
        return caught.value

    errors = run_world(size, program)
    assert {(type(error), str(error)) for error in errors} == {(type(errors[0]), str(errors[0]))}
    assert [name for name in disk.listdir("/") if not name.endswith((".run", ".lock"))] == []
    return errors[0]


def same(a: Any, b: Any) -> bool:
    """Equal in type, bits and structure."""
    if isinstance(a, np.ndarray):
        little = a.dtype.newbyteorder("<")
        return (
            isinstance(b, np.ndarray)
            and (a.shape, little) == (b.shape, b.dtype.newbyteorder("<"))
            and np.ascontiguousarray(a, little).tobytes() == np.ascontiguousarray(b, little).tobytes()
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, np.generic):
        return a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


def blank(value: Any) -> Any:
    """The same structure with other content."""
    if isinstance(value, np.ndarray):
        return np.zeros_like(value)
    if isinstance(value, parckpt.Shard):
        return parckpt.Shard(np.zeros_like(value.data), value.global_shape, value.offsets)
    if isinstance(value, parckpt.PerRank):
        return parckpt.PerRank(blank(value.value), value.on_resize)
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not is_plain(value):
        items = [blank(item) for item in value]
        return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)
    return [] if isinstance(value, list) else None


# -- anything at all -------------------------------------------------------------------------------------------------

DTYPES: list[DType] = [row for row in _TABLE if row.name != "int4"]
keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.integers(-3, 3)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from([np.float64(0.1), np.int8(-3), np.bool_(True), np.float32("nan")])
)
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple), max_leaves=6
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    array = random_array(rng, draw(st.sampled_from(DTYPES)), draw(shapes(max_ndim=3, max_extent=4))).copy()
    kind = draw(st.sampled_from(["plain", "fortran", "swapped", "strided", "reversed"]))
    if kind == "fortran":
        return np.asfortranarray(array)
    if kind == "swapped" and array.dtype.isbuiltin == 1:
        return array.astype(array.dtype.newbyteorder(">"))
    if kind == "strided" and array.ndim:
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wide[..., 1::2] = array
        return wide[..., 1::2]
    return array[::-1].copy()[::-1] if kind == "reversed" and array.ndim else array


nested = st.dictionaries(
    keys,
    st.recursive(
        arrays() | plain,
        lambda inner: st.dictionaries(keys, inner, max_size=3) | st.lists(inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@settings(max_examples=60)
@given(nested, st.sampled_from(list(MODES)), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_any_state_comes_back(state: State, mode: str, size: int, other: int, atomic: bool) -> None:
    try:
        flat = flatten(state, writable=False)
    except ConfigError:  # two names collide
        assume(False)
    if "safetensors" in mode:
        assume(all(leaf.dtype.safetensors for leaf in flat.tensors))
    disk = saved(size, lambda rank: state, **MODES[mode])
    for held, progress in restored(disk, other, lambda rank: blank(state), atomic=atomic):
        assert same(progress.state, state)
        names = {leaf.name: leaf for leaf in flatten(held, writable=False).tensors}
        for leaf in flat.tensors:
            assert same(names[leaf.name].pieces[0].source, leaf.pieces[0].source)
        assert set(progress.values) == {leaf.name for leaf in flat.values}
    (_, progress), *_ = restored(disk, other, lambda rank: None)
    assert set(progress.state) == {leaf.name for leaf in flat.tensors}
    for leaf in flat.tensors:
        assert same(progress.state[leaf.name], leaf.pieces[0].source)


# -- element types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", _TABLE, ids=lambda row: row.name)
def test_every_element_type(mode: str, row: DType) -> None:
    rng = np.random.default_rng(row.code)
    array = random_array(rng, row, (5, 3))

    def state(rank: int) -> State:
        def leaf(source: np.ndarray) -> parckpt.Leaf:
            return parckpt.Leaf(source.shape, row, lambda out: np.copyto(out, source))

        return {"w": parckpt.Shard(leaf(array[3 * rank :][:3]), (5, 3), (3 * rank, 0)), "s": leaf(array[0, 0, ...])}

    if "safetensors" in mode and row.safetensors is None:
        error = refused(2, state, **MODES[mode])
        assert isinstance(error, ConfigError)
        assert row.name in str(error)
        return
    disk = saved(2, state, **MODES[mode])
    spec = {"w": parckpt.Spec((5, 3), row), "s": parckpt.Spec((), row)}
    for _, progress in restored(disk, 3, lambda rank: spec):
        assert same(progress.state["w"], array)
        assert same(progress.state["s"], array[0, 0, ...])


# -- shapes and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0, 2), (1,) * 8, (2,) * 8, (3, 1, 1, 2, 1, 2, 1, 2), (1000,)])
def test_shapes(mode: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape)
    disk = saved(2, lambda rank: {"w": array}, **MODES[mode])
    for held, _ in restored(disk, 3, lambda rank: {"w": np.full(shape, 7.0)}):
        assert same(held["w"], np.asarray(array))


def test_a_memory_map(tmp_path: Path) -> None:
    source = np.memmap(tmp_path / "a", "f4", "w+", shape=(4, 3))
    source[...] = np.arange(12).reshape(4, 3)
    disk = saved(1, lambda rank: {"w": source})
    target = np.memmap(tmp_path / "b", "f4", "w+", shape=(4, 3))
    restored(disk, 1, lambda rank: {"w": target})
    assert np.asarray(target).tolist() == np.asarray(source).tolist()


def test_two_views_of_one_array_are_two_tensors() -> None:
    base = np.arange(6.0)
    disk = saved(1, lambda rank: {"a": base, "b": base[::2]})
    ((held, _),) = restored(disk, 1, lambda rank: {"a": np.zeros(6), "b": np.zeros(3)})
    assert held["a"].tolist() == base.tolist()
    assert held["b"].tolist() == base[::2].tolist()


# -- Shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "other"), [(1, 3), (2, 1), (3, 2), (3, 3)])
def test_lists_of_shards_also_empty_ones(mode: str, size: int, other: int) -> None:
    whole = np.arange(35.0).reshape(7, 5)

    def blocks(rank: int, count: int, value: float | None = None) -> list[parckpt.Shard]:
        """Seven rows dealt out in turn, none to the last rank if there are several."""
        ranks = max(1, count - 1)
        return [
            parckpt.Shard(whole[r : r + 1].copy() if value is None else np.full((1, 5), value), (7, 5), (r, 0))
            for r in range(7)
            if r % ranks == rank
        ]

    disk = saved(size, lambda rank: {"rows": blocks(rank, size), "lr": 1}, **MODES[mode])
    for rank, (held, progress) in enumerate(restored(disk, other, lambda r: {"rows": blocks(r, other, 0.0), "lr": 0})):
        for shard in held["rows"]:
            assert same(shard.data, whole[shard.offsets[0] : shard.offsets[0] + 1])
        assert len(progress.state["rows"]) == len(blocks(rank, other))
        assert held["lr"] == 1
    specs = [parckpt.Spec((2, 5), "f8", (7, 5), (0, 0)), parckpt.Spec((1, 2), "f8", (7, 5), (6, 3))]
    for _, progress in restored(disk, other, lambda rank: {"rows": specs, "lr": 0}):
        first, second = progress.state["rows"]
        assert same(first, whole[:2])
        assert same(second, whole[6:, 3:])
    for _, progress in restored(disk, other, lambda rank: {"rows": np.zeros((7, 5)), "lr": 0}):
        assert same(progress.state["rows"], whole)  # what was cut may come back whole


def test_an_empty_list_that_is_no_tensor_anywhere_is_a_value() -> None:
    disk = saved(2, lambda rank: {"pending": [], "w": np.zeros(1)})
    for held, progress in restored(disk, 2, lambda rank: {"pending": [1], "w": np.zeros(1)}):
        assert held["pending"] == []
        assert progress.values == {"pending": []}


def test_no_rank_is_told_of_values_that_were_no_shards() -> None:
    def state(rank: int) -> State:
        return {"w": [parckpt.Shard(np.ones(2), (2,), (0,))] if rank == 0 else []}

    disk = saved(2, state)
    for _, progress in restored(disk, 2, state):
        assert progress.values == {}


def test_shards_of_leaves_and_of_odd_memory() -> None:
    whole = np.arange(24, dtype="i4").reshape(4, 6)

    def part(rank: int, source: np.ndarray) -> parckpt.Shard:
        if rank == 0:
            return parckpt.Shard(np.asfortranarray(source[:, :3]), (4, 6), (0, 0))
        return parckpt.Shard(source[:, 3:].astype(">i4"), (4, 6), (0, 3))

    disk = saved(2, lambda rank: {"w": part(rank, whole)}, remove_redundancy=True)
    for rank, (held, _) in enumerate(restored(disk, 2, lambda rank: {"w": part(rank, np.zeros_like(whole))})):
        assert held["w"].data.tolist() == whole[:, 3 * rank : 3 * rank + 3].tolist()


# -- PerRank ---------------------------------------------------------------------------------------------------------


def own(rank: int, *, on_resize: Any = "error", value: int | None = None) -> State:
    number = rank if value is None else value
    return {
        "n": parckpt.PerRank(10 * number, on_resize),
        "text": parckpt.PerRank(f"rank {number}", on_resize),
        "a": parckpt.PerRank(np.arange(3) + 100 * number, on_resize),
        "tree": parckpt.PerRank({"x": np.full(2, number, "f4"), "deep": [number, {"y": number}]}, on_resize),
        "w": np.zeros(2),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_belongs_to_a_rank_comes_back_to_it(mode: str, size: int) -> None:
    disk = saved(size, own, **MODES[mode])
    for rank, (held, progress) in enumerate(restored(disk, size, lambda rank: own(rank, value=-1))):
        expected = own(rank)
        for name in ("n", "text"):
            assert isinstance(held[name], parckpt.PerRank)
            assert held[name].value == expected[name].value
        assert held["a"].value.tolist() == expected["a"].value.tolist()
        assert held["tree"].value["x"].tolist() == [rank, rank]
        assert held["tree"].value["deep"] == [rank, {"y": rank}]
        assert progress.state["n"] == 10 * rank  # the rebuilt state has no wrappers
        assert list(progress.per_rank["n"]) == [10 * r for r in range(size)]
        assert [a.tolist() for a in progress.per_rank["a"]] == [
            [100 * r, 100 * r + 1, 100 * r + 2] for r in range(size)
        ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "other"), [(2, 1), (2, 3)])
def test_another_number_of_ranks_is_an_error_that_names_all(mode: str, size: int, other: int) -> None:
    disk = saved(size, own, **MODES[mode])
    with pytest.raises(StateMismatchError, match="on_resize") as caught:
        restored(disk, other, own)
    assert len(caught.value.mismatched) == 5
    for name in ("n", "text", "a", "tree.x", "tree.deep"):
        assert any(one.startswith(f"{name} ") for one in caught.value.mismatched)
    # strict=False is about names; this is no question of names
    with pytest.raises(StateMismatchError, match="on_resize"):
        restored(disk, other, own, strict=False)
    assert restored(disk, other, own, only=["w"])[0][1].step == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "other"), [(3, 1), (2, 3)])
def test_keep_and_callables_on_another_number_of_ranks(mode: str, size: int, other: int) -> None:
    disk = saved(size, own, **MODES[mode])
    for held, progress in restored(disk, other, lambda rank: own(rank, on_resize="keep", value=-1)):
        assert held["n"].value == -10
        assert held["a"].value.tolist() == [-100, -99, -98]
        assert list(progress.per_rank["n"]) == [10 * r for r in range(size)]
    calls: list[tuple[int, int]] = []

    def total(values: list[Any], rank: int, count: int) -> Any:
        assert len(values) == size
        calls.append((rank, count))
        return values[rank % size] if not isinstance(values[0], np.ndarray) else sum(values) + rank

    for rank, (held, _) in enumerate(restored(disk, other, lambda rank: own(rank, on_resize=total, value=-1))):
        old = rank % size
        assert (held["n"].value, held["text"].value) == (10 * old, f"rank {old}")
        assert held["a"].value.tolist() == (sum(np.arange(3) + 100 * r for r in range(size)) + rank).tolist()
        assert held["tree"].value["x"].tolist() == [sum(range(size)) + rank] * 2
        assert held["tree"].value["deep"] == [old, {"y": old}]
        assert held["n"].on_resize is total
    assert {count for _, count in calls} == {other}


def test_a_callable_that_gives_another_shape_is_told() -> None:
    disk = saved(2, lambda rank: {"a": parckpt.PerRank(np.zeros(3))})
    with pytest.raises(StateMismatchError, match="gave shape"):
        restored(disk, 1, lambda rank: {"a": parckpt.PerRank(np.zeros(3), lambda all_, rank, size: np.zeros(4))})


def test_own_leaves_are_written_and_read_elsewhere() -> None:
    device = [np.arange(4.0) + rank for rank in range(2)]

    def state(rank: int) -> State:
        leaf = parckpt.Leaf(
            (4,), "f8", lambda out: np.copyto(out, device[rank]), lambda new: np.copyto(device[rank], new)
        )
        return {"a": parckpt.PerRank(leaf, on_resize=lambda old, rank, size: old[-1] * 2)}

    disk = saved(2, state)
    device[0][:], device[1][:] = 0, 0
    restored(disk, 2, state)
    assert [d.tolist() for d in device] == [[0, 1, 2, 3], [1, 2, 3, 4]]
    device[0][:] = 0
    restored(disk, 1, state)
    assert device[0].tolist() == [2, 4, 6, 8]


def test_ranks_may_have_own_things_that_others_lack() -> None:
    def state(rank: int, value: int = 5) -> State:
        return {"w": np.zeros(1), **({"extra": parckpt.PerRank(np.full(2, value))} if rank == 1 else {})}

    disk = saved(3, state)
    results = restored(disk, 3, lambda rank: state(rank, 0))
    assert results[1][0]["extra"].value.tolist() == [5, 5]
    with pytest.raises(StateMismatchError) as caught:
        restored(disk, 3, lambda rank: {**state(1, 0)})
    assert caught.value.missing == ["extra of rank 0"]


# -- Leaf, Spec, structure -------------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: Any
    y: Any


def test_structure_is_rebuilt() -> None:
    def state(value: float) -> State:
        return {
            0: np.full(2, value),
            "layers": [{"w": np.full(3, value)}, {"w": np.full(1, value)}],
            "pair": (np.full(1, value), value),
            "point": Point(np.full(1, value), value),
            "opt": {1: {"m": np.full(2, value)}, 12: {"m": np.full(2, value)}},
            "mixed": [np.full(1, value), value, "x"],
        }

    disk = saved(2, lambda rank: state(3.0))
    for held, progress in restored(disk, 1, lambda rank: state(0.0)):
        assert same(progress.state, state(3.0))
        assert isinstance(progress.state["point"], Point)
        assert progress.state["layers"][0]["w"] is held["layers"][0]["w"]
        assert held["mixed"][1] == 3.0
        assert held["pair"][1] == 0.0  # a tuple cannot be written to; progress.state has it
    (_, progress), *_ = restored(disk, 1, lambda rank: None)
    assert set(progress.state) == {
        "0", "layers.0.w", "layers.1.w", "pair.0", "point.0", "opt.1.m", "opt.12.m", "mixed.0"
    }  # fmt: skip


def test_a_leaf_is_read_and_written_in_the_form_it_states() -> None:
    seen: list[Any] = []

    def read(out: np.ndarray) -> None:
        assert (out.shape, out.dtype, out.flags.c_contiguous) == ((2, 3), np.dtype("<i2"), True)
        out[...] = np.arange(6).reshape(2, 3)

    def write(new: np.ndarray) -> None:
        assert not new.flags.writeable
        seen.append(new.copy())

    disk = saved(1, lambda rank: {"w": parckpt.Leaf((2, 3), "i2", read)})
    restored(disk, 1, lambda rank: {"w": parckpt.Leaf((2, 3), "i2", read, write)})
    restored(disk, 1, lambda rank: {"w": parckpt.Leaf((2, 3), "f4", read, write)}, cast=True)
    assert [a.tolist() for a in seen] == [[[0, 1, 2], [3, 4, 5]]] * 2
    assert [a.dtype for a in seen] == [np.dtype("i2"), np.dtype("f4")]
    with pytest.raises(ConfigError, match="without write_from"):
        restored(disk, 1, lambda rank: {"w": parckpt.Leaf((2, 3), "i2", read)})


def test_a_leaf_that_cannot_be_read_fails_the_save_everywhere() -> None:
    def broken(out: np.ndarray) -> None:
        raise OSError("device lost")

    def state(rank: int) -> State:
        good = parckpt.Leaf((2,), "f4", lambda out: out.fill(1))
        return {"w": parckpt.Shard(parckpt.Leaf((2,), "f4", broken) if rank == 1 else good, (4,), (2 * rank,))}

    for mode in MODES:
        assert "device lost" in str(refused(2, state, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
def test_specs_allocate_what_each_rank_wants(mode: str) -> None:
    whole = np.random.default_rng(1).standard_normal((6, 4)).astype("f4")
    disk = saved(2, lambda rank: {"w": whole, "v": whole[0].copy()}, **MODES[mode])

    def specs(rank: int) -> State:
        return {"w": parckpt.Spec((2, 4), "f4", (6, 4), (2 * rank, 0)), "v": parckpt.Spec((4,), np.float32)}

    for rank, (_, progress) in enumerate(restored(disk, 3, specs)):
        assert same(progress.state["w"], whole[2 * rank : 2 * rank + 2])
        assert same(progress.state["v"], whole[0])
        assert progress.state["w"].flags.writeable


def test_a_callable_state_is_asked_each_time() -> None:
    disk = MemoryFileSystem()
    w = np.zeros(2)
    with run_of(disk, parckpt.SELF) as run:
        run.save_now(lambda: {"w": w + 1}, 1)
        run.restore(lambda: {"w": w})
    assert w.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, np.ma.array([1.0]), np.array(["x"]), np.array([None]), range(3), 1j, {"k": object()}]
)
def test_anything_else_is_refused_on_all_ranks(value: Any) -> None:
    error = refused(2, lambda rank: {"w": np.zeros(1), **({"bad": value} if rank == 1 else {})})
    assert isinstance(error, ConfigError)
    assert "'bad" in str(error)
    disk = saved(1, lambda rank: {"w": np.zeros(1)})
    with pytest.raises(ConfigError, match="'bad"):
        restored(disk, 2, lambda rank: {"w": np.zeros(1), **({"bad": value} if rank == 1 else {})})


# -- names -----------------------------------------------------------------------------------------------------------

NAMES = [
    "a.b.c", "a/b//c", "../up", "/abs", "weiß", "重み", "🧠", "n" * 200, "ü" * 100, " ", "a b\n", "%s{}", "CON", ".",
    "..", "@rank_0", "w@rank_x", "manifest", "__metadata__x", "'\"\\", "\x00nul", "\u2028",
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_names(mode: str) -> None:
    def state(scale: int) -> State:
        return {
            "tensors": {f"{name}": np.full(2, scale * number) for number, name in enumerate(NAMES, 1)},
            "values": {f"{name}": scale * number for number, name in enumerate(NAMES, 1)},
        }

    disk = saved(2, lambda rank: state(1), **MODES[mode])
    for held, progress in restored(disk, 1, lambda rank: state(0)):
        assert same(held, state(1))
        assert set(progress.values) == {f"values.{name}" for name in NAMES}
    opened = parckpt.open_checkpoint(parckpt.latest_checkpoint("/", filesystem=disk) or "", filesystem=disk)
    assert sorted(opened) == sorted(f"tensors.{name}" for name in NAMES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "state",
    [
        {"w": parckpt.PerRank(np.zeros(2)), "w@rank_0": np.zeros(2)},
        {"w": parckpt.PerRank(np.zeros(2)), "w@rank_1": np.zeros(3)},
        {"a": {"b": np.zeros(1)}, "a.b": np.zeros(1)},
        {"a": {"b": 1}, "a.b": np.zeros(1)},
        {1: np.zeros(1), "1": np.zeros(1)},
        {"": np.zeros(1)},
        {"\udc80": np.zeros(1)},
        {"n" * 70000: np.zeros(1)},
    ],
    ids=["own-0", "own-1", "nested", "nested-value", "int", "empty", "surrogate", "long"],
)
def test_names_that_collide_or_cannot_be_are_refused(mode: str, state: State) -> None:
    assert isinstance(refused(2, lambda rank: state, **MODES[mode]), (ConfigError, LayoutError))


@pytest.mark.parametrize("mode", MODES)
def test_a_name_like_that_of_a_second_box_is_no_trouble(mode: str) -> None:
    def state(rank: int, value: float = 1.0) -> State:
        boxes = [parckpt.Shard(np.full(1, value + at), (4,), (at,)) for at in (2 * rank, 2 * rank + 1)]
        return {"w": boxes, "w@shard": np.full(2, value), "w@shard_9": np.full(2, value)}

    disk = saved(2, state, **MODES[mode])
    for rank, (held, _) in enumerate(restored(disk, 2, lambda rank: state(rank, 0.0))):
        assert [shard.data.item() for shard in held["w"]] == [1.0 + 2 * rank, 2.0 + 2 * rank]
        assert held["w@shard"].tolist() == [1.0, 1.0]
    clash = {"w@shard_1": np.zeros(2)}
    if mode.startswith("integrated"):
        assert saved(2, lambda rank: {**state(rank), **clash}, **MODES[mode])  # whole tensors: no second boxes
    else:
        error = refused(2, lambda rank: {**state(rank), **clash}, **MODES[mode])
        assert "'w@shard_1'" in str(error)
