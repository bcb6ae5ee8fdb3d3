"""Files without a manifest: which are taken, what they say of themselves, and what cannot be made sense of."""

from __future__ import annotations

import posixpath
from typing import Any

import numpy as np
import pytest

from parckpt.core import values
from parckpt.core.crc import crc32
from parckpt.core.dtypes import from_numpy
from parckpt.core.layout import whole
from parckpt.core.manifest import Manifest
from parckpt.engine import foreign
from parckpt.errors import CheckpointNotFoundError, ChecksumError, ConfigError, FormatError, LayoutError
from parckpt.formats.registry import FORMATS
from parckpt.storage.atomic import write_file
from parckpt.testing.files import assemble
from parckpt.testing.filesystem import FaultyFileSystem, MemoryFileSystem

pytestmark = pytest.mark.fast


@pytest.fixture
def disk() -> MemoryFileSystem:
    return MemoryFileSystem()


def put(
    disk: MemoryFileSystem,
    path: str,
    arrays: dict[str, np.ndarray],
    append: dict[str, Any] | None = None,
    *,
    crc: bool = False,
) -> bytes:
    """Write a file as another program would, and its directories."""
    parts = path.split("/")[1:-1]
    for depth in range(len(parts)):
        directory = "/" + "/".join(parts[: depth + 1])
        if parts[depth] not in disk.listdir(posixpath.dirname(directory)):
            disk.mkdir(directory)
    form = FORMATS[path.rsplit(".", 1)[1]]
    entries = [form.entry(name, from_numpy(array.dtype), array.shape) for name, array in arrays.items()]
    made = [form.value_entry(name, value) for name, value in (append or {}).items()]
    layout = form.layout([*entries, *(entry for entry, _ in made)], metadata={}, crc=0 if crc else None)
    data = assemble(layout, [*(array.tobytes() for array in arrays.values()), *(c for _, c in made)], form)
    write_file(disk, path, data)
    return data


A, B = np.arange(6.0).reshape(2, 3), np.array([1, 2, 3], "i4")


@pytest.mark.parametrize(
    ("path", "form"),
    [("/x.ckpt", "ckpt"), ("a/b.safetensors", "safetensors"), ("/d.safetensors/x.ckpt", "ckpt"), ("/x.y.ckpt", "ckpt")],
)
def test_the_extension_says_the_format(path: str, form: str) -> None:
    assert foreign.format_of(path) == form


@pytest.mark.parametrize("path", ["/x", "/x.h5", "/x.CKPT", "/xckpt", "/x.ckpt/y", "/x.", ""])
def test_other_extensions_say_nothing(path: str) -> None:
    with pytest.raises(ConfigError, match=r"should end with \.ckpt or \.safetensors"):
        foreign.format_of(path)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_a_file_is_described(disk: MemoryFileSystem, form: str) -> None:
    data = put(disk, f"/net-3_20.{form}", {"a": A, "b": B, "s": np.array(2.5)}, {"epoch_num": 3, "step_num": 120})
    manifest = foreign.open_foreign(disk, f"/net-3_20.{form}")
    facts, contents = manifest.facts, manifest.contents
    assert (facts.stem, facts.prefix, facts.epoch, facts.step_in_epoch) == ("net-3_20", "net", 3, 20)
    assert (facts.step, facts.world_size, facts.format, facts.reason) == (120, 1, form, "foreign")
    assert {name: values.decode(value) for name, value in facts.append.items()} == {"epoch_num": 3, "step_num": 120}
    rows = {tensor.name: (tensor.dtype.name, tensor.global_shape) for tensor in contents.tensors}
    assert rows == {"a": ("float64", (2, 3)), "b": ("int32", (3,)), "s": ("float64", ())}
    (file,) = contents.files
    assert (file.path, file.nbytes) == (f"net-3_20.{form}", len(data))
    # It crosses the wire like any other, and its checksums are known to be unknown.
    again = foreign.without_checksums(Manifest.decode(manifest.encode(), "wire"))
    assert again.contents.files[0].chunk_crcs is None
    assert again.contents.tensors == contents.tensors


def test_counters_that_are_none(disk: MemoryFileSystem) -> None:
    put(disk, "/x.ckpt", {"step_num": np.array([1, 2]), "w": A}, {"epoch_num": 0.5})
    facts = foreign.open_foreign(disk, "/x.ckpt").facts
    assert (facts.step, dict(facts.append)) == (0, {"epoch_num": 0.5})
    put(disk, "/y.ckpt", {"w": A}, {"step_num": -3})
    assert foreign.open_foreign(disk, "/y.ckpt").facts.step == 0


def test_texts_are_appended_values(disk: MemoryFileSystem) -> None:
    put(disk, "/x.ckpt", {"w": A}, {"note": "ü"})
    manifest = foreign.open_foreign(disk, "/x.ckpt")
    assert [tensor.name for tensor in manifest.contents.tensors] == ["w"]
    assert values.decode(manifest.facts.append["note"]) == "ü"


def test_only_headers_are_read_without_a_check(disk: MemoryFileSystem) -> None:
    put(disk, "/x.ckpt", {"w": np.zeros(1 << 18)})
    watched = FaultyFileSystem(disk, only=frozenset({"pread_into"}))
    foreign.open_foreign(watched, "/x.ckpt", check=False)
    assert len(watched.calls) < 8


def test_nothing_at_the_path(disk: MemoryFileSystem) -> None:
    for path in ("/x.ckpt", "/d"):
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint at"):
            foreign.open_foreign(disk, path)


# -- checksums --------------------------------------------------------------------------------------------------------


def test_a_checksum_that_is_there_is_verified(disk: MemoryFileSystem) -> None:
    data = put(disk, "/x.ckpt", {"a": A, "b": B}, crc=True)
    index, nbytes = foreign.index_file(disk, "/x.ckpt")
    assert nbytes == len(data)
    assert index.crc == crc32(data[: index.body_nbytes])
    foreign.verify_crc(disk, "/x.ckpt", index, required=True)
    disk.corrupt("/x.ckpt", 30)
    with pytest.raises(ChecksumError, match="stored"):
        foreign.open_foreign(disk, "/x.ckpt")
    foreign.open_foreign(disk, "/x.ckpt", check=False)


def test_one_that_is_missing_matters_only_when_asked_for(disk: MemoryFileSystem) -> None:
    for path in ("/x.ckpt", "/x.safetensors"):
        put(disk, path, {"a": A})
        index, _ = foreign.index_file(disk, path)
        foreign.verify_crc(disk, path, index)
        with pytest.raises(ChecksumError, match="no crc"):
            foreign.verify_crc(disk, path, index, required=True)


# -- directories of ranks ----------------------------------------------------------------------------------------------


def test_rank_directories_are_one_checkpoint(disk: MemoryFileSystem) -> None:
    put(disk, "/d/rank_0/net-1_4.ckpt", {"a": A, "shared": B}, {"step_num": 4})
    put(disk, "/d/rank_1/net-1_4.ckpt", {"b": B, "shared": B}, {"step_num": 4})
    manifest = foreign.open_foreign(disk, "/d")
    assert [tensor.name for tensor in manifest.contents.tensors] == ["a", "shared", "b"]
    assert [file.path for file in manifest.contents.files] == ["rank_0/net-1_4.ckpt", "rank_1/net-1_4.ckpt"]
    assert manifest.contents.boxes.file.tolist() == [0, 0, 1]
    assert (manifest.facts.world_size, manifest.facts.step, manifest.facts.stem) == (2, 4, "net-1_4")


def test_the_latest_file_that_all_ranks_have_is_taken(disk: MemoryFileSystem) -> None:
    for step in (9, 10, 11):
        for rank in (0, 1):
            if (rank, step) != (1, 11):
                put(disk, f"/d/rank_{rank}/net-2_{step}.ckpt", {"a": A + step})
    put(disk, "/d/rank_0/net-1_99.ckpt", {"a": A})
    put(disk, "/d/rank_1/net-1_99.ckpt", {"a": A})
    assert foreign.open_foreign(disk, "/d").facts.stem == "net-2_10"


@pytest.mark.parametrize(
    ("files", "error", "gist"),
    [
        ([], CheckpointNotFoundError, "neither a manifest nor"),
        (["rank_0/x.txt"], FormatError, "no file name"),
        (["rank_0/x.ckpt", "rank_2/x.ckpt"], FormatError, r"ranks \[1\] are missing"),
        (["rank_1/x.ckpt"], FormatError, r"ranks \[0\] are missing"),
        (["rank_0/x.ckpt", "rank_1/y.ckpt"], FormatError, "no file name is in all of its 2"),
        (["rank_00/x.ckpt"], CheckpointNotFoundError, "neither"),
    ],
)
def test_directories_that_are_none(disk: MemoryFileSystem, files: list[str], error: type[Exception], gist: str) -> None:
    disk.mkdir("/d")
    for name in files:
        if name.endswith(".txt"):
            disk.mkdir("/d/rank_0")
            write_file(disk, f"/d/{name}", b"text")
        else:
            put(disk, f"/d/{name}", {"a": A})
    with pytest.raises(error, match=gist):
        foreign.open_foreign(disk, "/d")


@pytest.mark.parametrize("other", [A + 1, A[:1], A.astype("f4"), A.reshape(3, 2)])
def test_slices_without_a_layout_are_refused(disk: MemoryFileSystem, other: np.ndarray) -> None:
    put(disk, "/d/rank_0/x.ckpt", {"w": A})
    put(disk, "/d/rank_1/x.ckpt", {"w": np.ascontiguousarray(other)})
    with pytest.raises(LayoutError, match=r"'w' differs between rank_0/x\.ckpt and rank_1/x\.ckpt") as caught:
        foreign.open_foreign(disk, "/d")
    assert caught.value.ranks == [0, 1]


@pytest.mark.parametrize("rank", [3, 12])
def test_names_may_end_with_their_rank(disk: MemoryFileSystem, rank: int) -> None:
    for other in range(rank + 1):
        put(disk, f"/d/rank_{other}/out{other}.ckpt", {f"t{other}": A})
        put(disk, f"/d/rank_{other}/note{other % 2}.ckpt", {"other": A})
    files = foreign.open_foreign(disk, "/d").contents.files
    assert [file.path for file in files] == [f"rank_{other}/out{other}.ckpt" for other in range(rank + 1)]


def test_files_of_two_steps_do_not_belong_together(disk: MemoryFileSystem) -> None:
    put(disk, "/d/rank_0/x.ckpt", {"a": A}, {"step_num": 4})
    put(disk, "/d/rank_1/x.ckpt", {"b": A}, {"step_num": 5})
    with pytest.raises(LayoutError, match=r"rank_1/x.ckpt is of step 5 and rank_0/x.ckpt of step 4"):
        foreign.open_foreign(disk, "/d")


# -- whole files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_a_whole_file(disk: MemoryFileSystem, form: str) -> None:
    empty = np.zeros((0, 4), "f4")
    put(disk, f"/x.{form}", {"a": A, "b": B, "none": empty, "s": np.array(7)}, {"epoch_num": 3})
    found = foreign.load_all(disk, f"/x.{form}", None, lambda name: name != "b")
    assert list(found) == list(dict.fromkeys(found))
    assert set(found) == {"a", "none", "s", "epoch_num"}
    assert found["a"].tolist() == A.tolist()
    assert found["none"].shape == (0, 4)
    assert (found["s"].shape, found["s"].item()) == ((), 7)
    assert found["epoch_num"].item() == 3


def test_a_file_that_holds_nothing(disk: MemoryFileSystem) -> None:
    write_file(disk, "/x.ckpt", b"")
    with pytest.raises(FormatError, match="holds no tensors"):
        foreign.load_all(disk, "/x.ckpt", None, lambda name: True)


def test_the_format_can_be_said(disk: MemoryFileSystem) -> None:
    put(disk, "/x.ckpt", {"a": A})
    disk.rename("/x.ckpt", "/model.bin")
    with pytest.raises(ConfigError):
        foreign.load_all(disk, "/model.bin", None, lambda name: True)
    assert foreign.load_all(disk, "/model.bin", "ckpt", lambda name: True)["a"].tolist() == A.tolist()
    manifest = foreign.open_foreign(disk, "/model.bin", form="ckpt")
    assert manifest.contents.boxes.tensor.tolist() == [0]
    assert manifest.contents.tensors[0].global_shape == whole((2, 3)).shape
