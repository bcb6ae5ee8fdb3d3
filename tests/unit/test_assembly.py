"""Rank files put together by a strategy: boxes, replicas, pipeline stages, and everything that does not fit."""

from __future__ import annotations

import logging
import posixpath
from typing import Any

import numpy as np
import pytest

from parckpt import Layout
from parckpt.core.contents import Contents
from parckpt.core.dtypes import from_numpy
from parckpt.core.manifest import Manifest
from parckpt.core.strategy import Strategy, TensorStrategy
from parckpt.engine import foreign
from parckpt.engine.reading import read_box
from parckpt.errors import ConfigError, FormatError, LayoutError
from parckpt.formats.registry import FORMATS
from parckpt.storage.atomic import write_file
from parckpt.testing.files import assemble
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem

pytestmark = pytest.mark.fast

W = np.arange(48, dtype="f4").reshape(8, 6)
B = np.arange(3, dtype="f8")


@pytest.fixture
def disk() -> MemoryFileSystem:
    disk = MemoryFileSystem()
    disk.mkdir("/d")
    return disk


def put(disk: MemoryFileSystem, rank: int, arrays: dict[str, Any], name: str = "x.ckpt") -> None:
    directory = f"/d/rank_{rank}"
    if posixpath.basename(directory) not in disk.listdir("/d"):
        disk.mkdir(directory)
    form = FORMATS[name.rsplit(".", 1)[1]]
    made = {key: np.asarray(array) for key, array in arrays.items()}
    layout = form.layout(
        [form.entry(key, from_numpy(array.dtype), array.shape) for key, array in made.items()], metadata={}, crc=None
    )
    write_file(disk, f"{directory}/{name}", assemble(layout, [array.tobytes() for array in made.values()], form))


def cut(array: np.ndarray, layout: Layout, rank: int) -> np.ndarray:
    box = layout.box(array.shape, rank)
    return np.ascontiguousarray(array[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))])


def read(disk: MemoryFileSystem, manifest: Manifest, name: str) -> np.ndarray:
    contents: Contents = foreign.without_checksums(manifest).contents
    (row,) = contents.index[name]
    shape = contents.tensors[row].global_shape
    found: np.ndarray = read_box(disk, "/d", contents, row, Layout((1,)).box(shape, 0))
    return found


MESH = (2, 2)
STRATEGY = Strategy({"w": TensorStrategy(MESH, (0, -1), (), (), 0, 2, 2), "b": TensorStrategy(MESH, (-1,))})


def put_all(disk: MemoryFileSystem, strategy: Strategy, arrays: dict[str, np.ndarray], **more: Any) -> None:
    for rank in strategy.ranks:
        held = {
            name: cut(array, layout, rank)
            for name, array in arrays.items()
            for layout in strategy.layouts(name)
            if rank in layout.ranks
        }
        put(disk, rank, held | more)


@pytest.mark.parametrize(
    "tensor",
    [
        TensorStrategy(MESH, (0, -1)),
        TensorStrategy(MESH, (1, 0)),
        TensorStrategy(MESH, (-1, -1), (), (), 0, 1, -1),
        TensorStrategy(MESH, (0, -1), (), (), 0, 2, 2),
        TensorStrategy(MESH, ((0, 1), -1)),
        TensorStrategy((4,), (0,)),
    ],
)
def test_pieces_become_the_tensor(disk: MemoryFileSystem, tensor: TensorStrategy) -> None:
    strategy = Strategy({"w": tensor})
    put_all(disk, strategy, {"w": W})
    manifest = foreign.open_foreign(disk, "/d", strategy=strategy)
    assert [(t.name, t.global_shape) for t in manifest.contents.tensors] == [("w", (8, 6))]
    np.testing.assert_array_equal(read(disk, manifest, "w"), W)
    again = Manifest.decode(manifest.encode(), "/d")  # as it travels to the other ranks
    np.testing.assert_array_equal(read(disk, again, "w"), W)


def test_replicas_are_compared(disk: MemoryFileSystem) -> None:
    put_all(disk, STRATEGY, {"w": W, "b": B})
    assert foreign.open_foreign(disk, "/d", strategy=STRATEGY).contents.boxes.file.tolist() == [0, 1, 2, 3, 0]
    disk.unlink("/d/rank_3/x.ckpt")
    put(disk, 3, {"w": cut(W, STRATEGY.layouts("w")[0], 3), "b": B + 1})
    with pytest.raises(LayoutError, match=r"'b' differs between rank_0/x.ckpt and rank_3/x.ckpt") as caught:
        foreign.open_foreign(disk, "/d", strategy=STRATEGY)
    assert (caught.value.tensor, caught.value.ranks) == ("b", [0, 3])
    watched = FaultyFileSystem(disk)
    foreign.open_foreign(watched, "/d", strategy=STRATEGY, check=False)
    assert sum(call.operation == "open" for call in watched.calls) == 4  # each file's headers, and nothing else


def test_deduplicated_files_and_missing_directories_are_fine_while_all_is_there(disk: MemoryFileSystem) -> None:
    strategy = Strategy({"w": TensorStrategy(MESH, (0, -1)), "b": TensorStrategy(MESH, (-1,))})
    layout = strategy.layouts("w")[0]
    put(disk, 1, {"w": cut(W, layout, 1)})
    put(disk, 2, {"w": cut(W, layout, 2), "b": B})
    manifest = foreign.open_foreign(disk, "/d", strategy=strategy)
    np.testing.assert_array_equal(read(disk, manifest, "w"), W)
    np.testing.assert_array_equal(read(disk, manifest, "b"), B)
    with pytest.raises(FormatError, match=r"ranks \[0\] are missing"):
        foreign.open_foreign(disk, "/d")


def test_a_missing_part_names_who_should_have_it(disk: MemoryFileSystem) -> None:
    strategy = Strategy({"w": TensorStrategy(MESH, (0, -1))})
    for rank in (0, 2):
        put(disk, rank, {"w": cut(W, strategy.layouts("w")[0], rank)})
    with pytest.raises(LayoutError) as caught:
        foreign.open_foreign(disk, "/d", strategy=strategy)
    assert str(caught.value) == (
        "'w': the box at offsets (4, 0) of shape (4, 6) is in no file; by the strategy ranks [1, 3] hold it; "
        "the files of ranks [1, 3] are missing"
    )


def test_what_the_strategy_does_not_name(disk: MemoryFileSystem, caplog: pytest.LogCaptureFixture) -> None:
    for rank in (0, 1):
        put(disk, rank, {"w": cut(W, Layout((2,), None, (0,)), rank), "lr": np.float32(rank), "own": np.array([rank])})
    strategy = Strategy({"w": TensorStrategy((2,), (0,)), "unused": TensorStrategy((2,), (0,))})
    with caplog.at_level(logging.WARNING, "parckpt"):
        manifest = foreign.open_foreign(disk, "/d", strategy=strategy)
    assert "lr (ranks [1]), own (ranks [1])" in caplog.text
    assert (read(disk, manifest, "lr"), read(disk, manifest, "own").tolist()) == (0.0, [0])
    with pytest.raises(LayoutError, match=r"'w' differs .* the strategy does not name it"):
        foreign.open_foreign(disk, "/d", strategy=Strategy({"lr": TensorStrategy((2,), ())}))


def test_sums_of_gradients_may_differ(disk: MemoryFileSystem, caplog: pytest.LogCaptureFixture) -> None:
    for rank in (0, 1):
        put(disk, rank, {"accu_grads.w": W + rank, "w": W})
    for strategy in (None, Strategy({"accu_grads.w": TensorStrategy((2,), ()), "w": TensorStrategy((2,), ())})):
        caplog.clear()
        manifest = foreign.open_foreign(disk, "/d", strategy=strategy)
        assert "accu_grads.w (ranks [1])" in caplog.text
        np.testing.assert_array_equal(read(disk, manifest, "accu_grads.w"), W)


def test_pipeline_stages(disk: MemoryFileSystem, caplog: pytest.LogCaptureFixture) -> None:
    strategy = Strategy(
        {
            "0-embed": TensorStrategy((2,), (0, -1)),
            "0-a.w": TensorStrategy((2,), (-1, 0)),
            "1-embed": TensorStrategy((2,), (0, -1)),
            "1-b.w": TensorStrategy((2,), ()),
        }
    )
    put_all(disk, strategy, {"embed": W, "a.w": W + 1, "b.w": W + 2}, step=np.int32(7))
    put(disk, 3, {"embed": W[4:], "b.w": W + 2, "a.w": np.zeros(2), "step": np.int32(7)}, "later.ckpt")
    manifest = foreign.open_foreign(disk, "/d", strategy=strategy)
    assert manifest.facts.world_size == 4
    for name, array in {"embed": W, "a.w": W + 1, "b.w": W + 2, "step": np.int32(7)}.items():
        np.testing.assert_array_equal(read(disk, manifest, name), array)
    # What another stage has of a tensor is not used.
    files = {0: "rank_0/x.ckpt", 1: "rank_1/x.ckpt", 2: "rank_2/x.ckpt", 3: "rank_3/later.ckpt"}
    with caplog.at_level(logging.INFO, "parckpt"):
        manifest = foreign.open_foreign(disk, "/d", strategy=strategy, files=files)
    assert "rank_3/later.ckpt: 'a.w' is of another pipeline stage" in caplog.text
    np.testing.assert_array_equal(read(disk, manifest, "a.w"), W + 1)


def test_files_may_be_named(disk: MemoryFileSystem) -> None:
    strategy = Strategy({"w": TensorStrategy((2,), (0,))})
    put(disk, 7, {"w": W[:4]}, "first.ckpt")
    put(disk, 9, {"w": W[4:]}, "second.safetensors")
    for files in (
        ["rank_7/first.ckpt", "/d/rank_9/second.safetensors"],
        {1: "rank_9/second.safetensors", 0: "rank_7/first.ckpt"},
    ):
        manifest = foreign.open_foreign(disk, "/d", strategy=strategy, files=files)
        np.testing.assert_array_equal(read(disk, manifest, "w"), W)
    for outside in ("/e/x.ckpt", "../x.ckpt", "."):
        with pytest.raises(ConfigError, match="does not lie in /d"):
            foreign.open_foreign(disk, "/d", strategy=strategy, files=["rank_7/first.ckpt", outside])


@pytest.mark.parametrize(
    ("held", "strategy", "gist"),
    [
        ({"w": W[0]}, {"w": TensorStrategy((2,), (-1, 0))}, "rank_1/x.ckpt does not fit the strategy: a tensor"),
        ({"w": W[:3]}, {"w": TensorStrategy((2,), (0,))}, "rank_1/x.ckpt one of float32[6, 6]"),
        ({"w": W[:4].astype("f2")}, {"w": TensorStrategy((2,), (0,))}, "rank_1/x.ckpt one of float16[8, 6]"),
        ({"w": W[:4]}, {"v": TensorStrategy((2,), (0,))}, "another model's"),
        ({"w": W[:4]}, {"w": TensorStrategy((1,), (0,))}, "for ranks 0 to 0, but there are files of ranks [1]; of pip"),
        ({"w": W[:4]}, {"w": TensorStrategy((2,), (0,), (4, 4))}, "'w': a tensor that is cut unevenly"),
        ({"w": W[:4]}, {}, "the strategy names no tensors"),
    ],
)  # fmt: skip
def test_strategies_that_do_not_fit(
    disk: MemoryFileSystem, held: dict[str, Any], strategy: dict[str, TensorStrategy], gist: str
) -> None:
    put(disk, 0, {"w": W[:4]})
    put(disk, 1, held)
    with pytest.raises(LayoutError) as caught:
        foreign.open_foreign(disk, "/d", strategy=Strategy(strategy))
    assert gist in str(caught.value)
