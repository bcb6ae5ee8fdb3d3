"""`save_checkpoint`, through the whole engine, gives MindSpore's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

import parckpt
from parckpt.testing.files import golden_files
from parckpt.testing.world import run_world

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
# Plain files of one tensor list in state order. names.ckpt has an empty name, which a state may not have; int4 is int8
# in NumPy; the rest of the corpus needs another slice size or MindSpore's asynchronous path: see the layout tests.
NAMES = [
    *(f"ckpt/{name}.ckpt" for name in ("all_dtypes", "scalars", "shapes", "mlp_plain")),
    *(f"ckpt/{name}.ckpt" for name in ("all_dtypes_crc", "mlp_crc", "dtype_bfloat16", "dtype_complex64_unloadable")),
    *(f"safetensors/{name}.safetensors" for name in ("all_dtypes", "complex64_unloadable")),
]
FILES = {f.name: f for form in ("ckpt", "safetensors") for f in golden_files(GOLDEN, form)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 3])
def test_bytes_are_mindspores(name: str, size: int, tmp_path: Path) -> None:
    source = FILES[name].path
    loaded = parckpt.load_checkpoint(source, allow_unverified=True)
    strings = {key: value for key, value in loaded.items() if isinstance(value, str)}
    state = {key: value for key, value in loaded.items() if key not in strings}
    if "int4" in state:
        state["int4"] = parckpt.Leaf(
            state["int4"].shape, "int4", lambda out, data=state["int4"]: out.__setitem__(..., data)
        )
    target = tmp_path / source.name
    run_world(
        size,
        lambda comm, rank: parckpt.save_checkpoint(
            state,
            target,
            append_dict=strings,
            crc_check=name.endswith("_crc.ckpt"),
            format=source.suffix[1:],
            comm=comm,
        ),
    )
    assert target.read_bytes() == source.read_bytes()
