"""Files that MindSpore wrote, and what MindSpore's loader says about crafted ones, against our reader and writer."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from parckpt.core import dtypes
from parckpt.core.crc import crc32
from parckpt.errors import FormatError
from parckpt.formats import ckpt
from parckpt.formats.base import Entry
from parckpt.formats.registry import FORMATS
from parckpt.testing.files import GoldenFile, assemble, content, describe, golden_files

pytestmark = pytest.mark.fast

FILES = golden_files(Path(__file__).parents[1] / "data" / "golden", "ckpt")
BY_NAME = {file.name: file for file in FILES}

# MindSpore loads these, with a tail of whatever was in memory, or without the excess.
REFUSED_BY_US_ALONE = {"crafted/content_too_short.ckpt", "crafted/content_too_long.ckpt"}
# MindSpore refuses these; not for their bytes, but because it has no such type or wants at least one tensor.
LOADED_BY_US_ALONE = {
    "ckpt/dtype_complex64_unloadable.ckpt": "written",
    "ckpt/dtype_complex128_unloadable.ckpt": "written",
    "ckpt/no_params.ckpt": "nothing",
    "ckpt/no_params_crc.ckpt": "nothing",
    "corrupt/zero_length.ckpt": "nothing",
}
# The synchronous writer loses tensors of zero bytes; ours keeps them.
WRITTEN_WITH_LOSS = "ckpt/empty_sync.ckpt"


def named(files: list[GoldenFile]) -> list[object]:
    return [pytest.param(file, id=file.name) for file in files]


def test_the_corpus_is_here() -> None:
    assert len(FILES) == 79
    assert set(LOADED_BY_US_ALONE) | REFUSED_BY_US_ALONE | {WRITTEN_WITH_LOSS} <= set(BY_NAME)


@pytest.mark.parametrize("file", named(FILES))
def test_load(file: GoldenFile) -> None:
    reader = file.reader()
    if file.name in REFUSED_BY_US_ALONE or (not file.facts["loads"][0]["ok"] and file.name not in LOADED_BY_US_ALONE):
        with pytest.raises(FormatError) as caught:
            ckpt.read_index(reader)
        assert caught.value.path == file.name
        assert caught.value.field
        assert 0 <= caught.value.byte_offset <= reader.nbytes
        return
    found = describe(reader, ckpt.read_index(reader))
    expected = file.facts["written"] if LOADED_BY_US_ALONE.get(file.name) == "written" else file.tensors
    if file.name == "ckpt/empty_async.ckpt":
        # MindSpore makes a 0-d zero of shape (0,). The bytes tell the two apart.
        assert expected[0]["shape"] == []
        expected = file.facts["written"]
    assert found == expected


@pytest.mark.parametrize(
    "file", named([file for file in FILES if any(load["crc_check"] for load in file.facts["loads"])])
)
def test_crc(file: GoldenFile) -> None:
    verdict = next(load for load in file.facts["loads"] if load["crc_check"])
    reader = file.reader()
    try:
        index = ckpt.read_index(reader)
    except FormatError:
        assert not verdict["ok"]
        return
    holds = index.crc == crc32(reader.data[: index.body_nbytes])
    # Where there is no trailer MindSpore warns and goes on; we say that there is none, and the caller refuses.
    assert holds == (verdict["ok"] and index.crc is not None) or file.name == "ckpt/no_params_crc.ckpt"
    assert (index.crc is None) == (not reader.data[-17:].startswith(b"crc_num"))


def written(file: GoldenFile) -> list[tuple[Entry, bytes]]:
    """What went into the file; contents are taken from it, if they have the hash of what was given."""
    reader = file.reader()
    stored = {item.name: item for item in ckpt.read_index(reader).entries}
    out = []
    # The corpus does not say what was appended to this one.
    inputs = file.tensors if file.name == "enc/plaintext.ckpt" else file.facts.get("written", file.tensors)
    for tensor in inputs:
        if tensor["kind"] == "str":
            out.append(ckpt.value_entry(tensor["name"], tensor["value"]))
            continue
        dtype = dtypes.by_ckpt(tensor["dtype"])
        assert dtype is not None
        item = stored.get(tensor["name"])
        data = content(reader, item) if item else b""
        assert hashlib.sha256(data).hexdigest() == tensor["sha256"]
        out.append((ckpt.entry(tensor["name"], dtype, tensor["shape"]), data))
    return out


def writable(file: GoldenFile) -> bool:
    made_from_tensors = not any(tensor["kind"] == "map" for tensor in file.tensors)
    return file.made_by_mindspore and made_from_tensors and file.name != WRITTEN_WITH_LOSS


@pytest.mark.parametrize("file", named([file for file in FILES if writable(file)]))
def test_reproduced_bit_for_bit(file: GoldenFile) -> None:
    items = written(file)
    data = file.reader().data
    layout = ckpt.layout(
        [entry for entry, _ in items],
        crc=data[-17:].startswith(b"crc_num"),
        slice_nbytes=1024 if "chunk_" in file.name else ckpt.SLICE_NBYTES,
        slicing="rows" if "async" in file.name else "bytes",
    )
    assert assemble(layout, [content for _, content in items], FORMATS["ckpt"]) == data


def test_zero_bytes_are_written_as_the_asynchronous_path_does() -> None:
    lossy, kept = BY_NAME[WRITTEN_WITH_LOSS], BY_NAME["ckpt/empty_async.ckpt"]
    items = written(lossy)
    ours = assemble(ckpt.layout([entry for entry, _ in items]), [data for _, data in items], FORMATS["ckpt"])
    assert ours == kept.reader().data
    assert ours.endswith(lossy.reader().data)


APPENDED = {
    "epoch_num": 3,
    "step_num": 120,
    "lr": 0.1,
    "neg": -7,
    "big": 2**40,
    "huge": 2**63,
    "flag": True,
    "off": False,
    "inf": float("inf"),
    "f64": np.float64(0.1),
    "too_big_for_float32": 1e300,
    "note": "hello",
    "unicode": "\u4e2d\u6587 \U0001f600",
    "empty": "",
}


def test_appended_values_end_the_file_as_mindspore_writes_them() -> None:
    items = [ckpt.value_entry(name, value) for name, value in APPENDED.items()]
    ours = assemble(ckpt.layout([entry for entry, _ in items]), [data for _, data in items], FORMATS["ckpt"])
    data = BY_NAME["ckpt/mlp_append.ckpt"].reader().data
    assert data.endswith(ours)
    assert len(data) - len(ours) == len(BY_NAME["ckpt/mlp_plain.ckpt"].reader().data)


def test_headers_alone_are_read() -> None:
    reader = BY_NAME["ckpt/chunk_sync.ckpt"].reader()
    ckpt.read_index(reader)
    assert reader.nbytes_read < reader.nbytes
