"""Opening lazily: indexed like NumPy, verified, and only what is asked for is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import parckpt
from parckpt.browse import _bounding
from parckpt.core.layout import Box, slices
from parckpt.core.manifest import CHUNK_NBYTES
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem
from parckpt.testing.jobs import QuickFileSystem
from parckpt.testing.strategies import shapes
from parckpt.testing.world import run_world

pytestmark = pytest.mark.fast


def by_bounding(array: np.ndarray, index: Any) -> Any:
    """What a `StoredArray` does, on an array in memory; the box must be no larger than needed."""
    offsets, lengths, rest = _bounding(array.shape, index)
    return array[slices(Box(offsets, lengths), (0,) * array.ndim)][rest]


@settings(max_examples=300)
@given(st.data())
def test_any_basic_index_is_numpys(data: st.DataObject) -> None:
    shape = data.draw(shapes(max_ndim=4, max_extent=5))
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=False, allow_ellipsis=True))
    array = np.arange(int(np.prod(shape))).reshape(shape)
    expected, found = array[index], by_bounding(array, index)
    assert type(found) is type(expected)
    assert found.shape == expected.shape
    assert found.tolist() == expected.tolist()


@given(st.data())
def test_the_box_is_the_bounding_one(data: st.DataObject) -> None:
    shape = data.draw(shapes(max_ndim=3, max_extent=6, min_extent=1))
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=False, allow_ellipsis=False))
    chosen = np.zeros(shape, bool)
    chosen[index] = True
    offsets, lengths, _ = _bounding(shape, index)
    if not chosen.any():
        assert 0 in lengths
        return
    for axis, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        touched = np.flatnonzero(chosen.any(axis=tuple(a for a in range(chosen.ndim) if a != axis)))
        assert (offset, offset + length) == (touched[0], touched[-1] + 1)


@pytest.fixture
def disk() -> MemoryFileSystem:
    return MemoryFileSystem()


def test_a_real_file_is_indexed_alike(disk: MemoryFileSystem) -> None:
    w = np.arange(60.0).reshape(3, 4, 5)
    parckpt.save_checkpoint({"w": w, "s": np.float32(2.5) + np.zeros((), "f4")}, "/x.ckpt", filesystem=disk)
    stored = parckpt.open_checkpoint("/x.ckpt", filesystem=disk)["w"]
    for index in (
        0,
        -1,
        (1, ...),
        (..., 2),
        (slice(None, None, -2), 1, slice(4, 1, -1)),
        (2, 3, 4),
        (2, 3, 4, ...),
        ...,
    ):
        assert type(stored[index]) is type(w[index])
        assert np.array_equal(stored[index], w[index])
    assert (stored.shape, stored.ndim, stored.dtype) == ((3, 4, 5), 3, np.dtype("f8"))
    assert "w" in repr(stored)


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (3, IndexError),
        (-4, IndexError),
        ((0, 0, 0), IndexError),
        ((..., ...), IndexError),
        (1.0, TypeError),
        (True, TypeError),
        (None, TypeError),
        ("w", TypeError),
        ([0, 1], TypeError),
        (np.array([0, 1]), TypeError),
        ((np.array([0, 1]), ...), TypeError),
    ],
)
def test_other_indices_are_refused(disk: MemoryFileSystem, index: Any, error: type[Exception]) -> None:
    parckpt.save_checkpoint({"w": np.zeros((3, 2))}, "/x.ckpt", filesystem=disk)
    with pytest.raises(error):
        parckpt.open_checkpoint("/x.ckpt", filesystem=disk)["w"][index]


def test_arrays_of_no_dimensions_are_arrays(disk: MemoryFileSystem) -> None:
    parckpt.save_checkpoint({"s": np.array(7)}, "/x.ckpt", filesystem=disk)
    stored = parckpt.open_checkpoint("/x.ckpt", filesystem=disk)["s"]
    assert np.asarray(stored).shape == ()
    assert np.asarray(stored, np.float32).dtype == np.float32
    assert stored[()] == 7
    assert isinstance(stored[...], np.ndarray)
    with pytest.raises(ValueError, match="copy"):
        stored.__array__(copy=False)


def test_it_is_a_mapping_with_facts(disk: MemoryFileSystem) -> None:
    state = {"a": {"w": np.zeros(2), "v": np.ones((2, 2), "i2")}, "lr": 0.1, "tags": [1, "x"]}
    parckpt.save_checkpoint(state, "/x.ckpt", append_dict={"step_num": 5, "eps": 1e-300}, filesystem=disk)
    opened = parckpt.open_checkpoint("/x.ckpt", filesystem=disk)
    assert list(opened) == ["a.w", "a.v"]
    assert len(opened) == 2
    assert "a.w" in opened
    assert "lr" not in opened
    assert {name: array.shape for name, array in opened.items()} == {"a.w": (2,), "a.v": (2, 2)}
    assert opened.values_by_name == {"lr": 0.1, "tags": [1, "x"]}
    assert opened.append_dict == {"step_num": 5, "eps": 1e-300}
    assert opened.step == 5
    assert "2 tensors" in repr(opened)
    with pytest.raises(KeyError):
        opened["missing"]


def test_what_belongs_to_one_rank_has_its_rank_in_its_name(disk: MemoryFileSystem) -> None:
    def program(comm: Any, rank: int) -> None:
        state = {"own": parckpt.PerRank(np.full(rank + 1, rank)), "w": np.zeros(2)}
        parckpt.save_checkpoint(state, "/x", integrated_save=rank < 0, comm=comm, filesystem=disk)

    run_world(2, program)
    opened = parckpt.open_checkpoint("/x", filesystem=disk)
    assert sorted(opened) == ["own@rank_0", "own@rank_1", "w"]
    assert opened["own@rank_1"][:].tolist() == [1, 1]


def test_damage_is_found_where_it_is_read(disk: MemoryFileSystem) -> None:
    count = CHUNK_NBYTES // 8
    parckpt.save_checkpoint({"a": np.zeros(count), "b": np.ones(count)}, "/x.ckpt", filesystem=disk)
    disk.corrupt("/x.ckpt", 2 * CHUNK_NBYTES - 100)  # the second chunk; "a" ends shortly after the first
    opened = parckpt.open_checkpoint("/x.ckpt", filesystem=disk)
    assert opened["a"][0] == 0.0
    assert not np.any(opened["a"][:100])
    for read in (lambda: opened["b"][count // 2], lambda: opened["a"][-1]):
        with pytest.raises(parckpt.ChecksumError) as caught:
            read()
        assert (caught.value.chunk, caught.value.tensors) == (1, ["a", "b"])


def test_listing_and_opening_read_no_data(disk: MemoryFileSystem) -> None:
    parckpt.save_checkpoint({"w": np.zeros(1 << 20)}, "/x.ckpt", filesystem=disk)
    watched = FaultyFileSystem(disk, only=frozenset({"open"}))
    (info,) = parckpt.list_checkpoints("/", filesystem=watched)
    assert (info.path, info.tensors, info.nbytes) == ("/x.ckpt", 1, disk.stat("/x.ckpt").nbytes)
    assert parckpt.inspect("/x.ckpt", filesystem=watched) == info
    assert parckpt.latest_checkpoint("/", filesystem=watched) == "/x.ckpt"
    opened = parckpt.open_checkpoint("/x.ckpt", filesystem=watched)
    assert (opened["w"].shape, opened["w"].dtype) == ((1 << 20,), np.dtype("f8"))
    assert {call.path for call in watched.calls if call.path.endswith(".ckpt")} == set()


def test_lists_are_newest_first_and_say_what_is_wrong(tmp_path: Path) -> None:
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1, keep_checkpoint_max=9)
    w = np.zeros(4)
    for prefix in ("a", "b"):
        with parckpt.ModelCheckpoint(prefix, tmp_path, config, comm=parckpt.SELF, filesystem=QuickFileSystem()) as run:
            for step in (1, 2, 3):
                w += step
                run.step_end({"w": w}, step)
    steps = [(info.prefix, info.step) for info in parckpt.list_checkpoints(tmp_path, prefix="a")]
    assert steps == [("a", 3), ("a", 2), ("a", 1)]
    assert len(parckpt.list_checkpoints(tmp_path)) == 6
    assert parckpt.latest_checkpoint(tmp_path, prefix="b") == str(tmp_path / "b-1_3.ckpt")
    assert parckpt.latest_checkpoint(tmp_path, prefix="c") is None
    (manifest,) = tmp_path.glob("a-1_3.*.manifest")
    manifest.write_bytes(manifest.read_bytes()[:50])
    listed = parckpt.list_checkpoints(tmp_path, prefix="a")
    assert [info.problem is None for info in listed] == [True, True, False]
    assert listed[-1].path == str(tmp_path / "a-1_3.ckpt")
    assert parckpt.latest_checkpoint(tmp_path, prefix="a") == str(tmp_path / "a-1_2.ckpt")
    info = parckpt.inspect(tmp_path / "a-1_2.ckpt")
    assert (info.step, info.epoch, info.step_in_epoch, info.sequence, info.world_size) == (2, 1, 2, 2, 1)
    assert (info.format, info.reason, info.kind, info.integrated, info.consistent) == (
        "ckpt",
        "steps",
        "regular",
        True,
        True,
    )


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    for look in (parckpt.open_checkpoint, parckpt.inspect):
        with pytest.raises(parckpt.CheckpointNotFoundError, match="nothing"):
            look(tmp_path / "nothing.ckpt")
    with pytest.raises(parckpt.StorageError):  # a wrong path is not an empty directory
        parckpt.list_checkpoints(tmp_path / "nothing")
    assert parckpt.list_checkpoints(tmp_path) == []
    assert parckpt.latest_checkpoint(tmp_path) is None
    (tmp_path / "x.ckpt").write_bytes(b"foreign")
    with pytest.raises(parckpt.CheckpointNotFoundError, match="with a manifest"):
        parckpt.inspect(tmp_path / "x.ckpt")


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_a_file_without_manifest_opens_unverified(tmp_path: Path, form: str) -> None:
    w = np.arange(12.0).reshape(3, 4)
    parckpt.save_checkpoint({"w": w}, tmp_path / "x", format=form, append_dict={"step_num": 4})
    (tmp_path / "alone").mkdir()
    alone = shutil.copy(tmp_path / f"x.{form}", tmp_path / "alone")
    opened = parckpt.open_checkpoint(alone)
    assert opened["w"][1:, ::2].tolist() == w[1:, ::2].tolist()
    assert (opened.step, opened.append_dict) == (4, {"step_num": 4})
