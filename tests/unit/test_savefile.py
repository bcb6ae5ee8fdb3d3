"""Names that `save_checkpoint` gives and refuses, and what of a state stands in the file as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parckpt.core.leaves import PerRank, Shard
from parckpt.core.state import flatten
from parckpt.engine.saveargs import file_form, file_path
from parckpt.errors import ConfigError, ConfigTypeError
from parckpt.savefile import _flat_to_save, _refuse_parts, _strings

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("name", "extension", "path"),
    [
        ("/d/x", ".ckpt", "/d/x.ckpt"),
        ("/d/x.ckpt", ".ckpt", "/d/x.ckpt"),
        ("/d/xckpt", ".ckpt", "/d/xckpt.ckpt"),
        ("/d/../e/x", ".ckpt", "/e/x.ckpt"),
        (Path("/d/x.safetensors"), ".safetensors", "/d/x.safetensors"),
        ("/d/x.CKPT", ".ckpt", "/d/x.CKPT.ckpt"),
    ],
)
def test_paths(name: Any, extension: str, path: str) -> None:
    assert file_path(name, extension) == path


def test_relative_paths_are_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert file_path("x", ".ckpt") == str(tmp_path / "x.ckpt")
    assert file_path("./a/x", ".ckpt") == str(tmp_path / "a" / "x.ckpt")


@pytest.mark.parametrize("name", ["", "/", "/d/", ".ckpt", "/d/.ckpt", "/d/.x", "..", "/d/..", "."])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError):
        file_path(name, ".ckpt")


@pytest.mark.parametrize("name", [b"/d/x", Path("/d/x").parts, 5, None])
def test_paths_of_wrong_types(name: Any) -> None:
    with pytest.raises(TypeError):
        file_path(name, ".ckpt")
    with pytest.raises(ConfigTypeError):
        file_path(b"x", ".ckpt")  # type: ignore[arg-type]


def test_formats() -> None:
    assert [file_form(name).extension for name in ("ckpt", "safetensors")] == [".ckpt", ".safetensors"]
    for bad in ("CKPT", "h5", "", None):
        with pytest.raises(ConfigError, match="format must be one of"):
            file_form(bad)


STATE = {
    "a": {"w": np.zeros(2), "note": "text"},
    "own": PerRank("mine"),
    "n": 1,
    "part": Shard(np.zeros(1), (1,), (0,)),
}


def test_texts_that_all_ranks_share_stand_in_the_file() -> None:
    assert _strings(flatten(STATE, writable=False)) == {"a.note": "text"}


def test_choice_func_is_asked_for_tensors_and_values() -> None:
    asked: list[str] = []

    def choose(name: str) -> bool:
        asked.append(name)
        return name.startswith("a.")

    flat = _flat_to_save(STATE, choose, comm="any")
    assert [leaf.name for leaf in flat.tensors] == ["a.w"]
    assert [leaf.name for leaf in flat.values] == ["a.note"]
    assert sorted(asked) == ["a.note", "a.w", "n", "own", "part"]


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"])
def test_parts_are_refused_in_a_launched_world(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_parts(flatten(STATE, writable=False))
    monkeypatch.setenv(variable, "3")
    with pytest.raises(ConfigError, match=f"'part'.*{variable}=3"):
        _refuse_parts(flatten(STATE, writable=False))
    with pytest.raises(ConfigError, match="'own'"):
        _refuse_parts(flatten({"own": STATE["own"]}, writable=False))
    _refuse_parts(flatten({"w": np.zeros(2), "n": 1}, writable=False))
