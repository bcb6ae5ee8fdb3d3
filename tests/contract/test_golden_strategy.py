"""MindSpore's recorded rank files: put together by their strategy, and written again as its ranks would."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.comm.base import Communicator
from parckpt.engine.foreign import index_file
from parckpt.errors import ConfigError, LayoutError
from parckpt.storage.filesystem import PosixFileSystem
from parckpt.testing.world import run_world

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("ignore:.*has no manifest")]

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
RECORDED = GOLDEN / "strategy"
FULL: dict[str, Any] = json.loads((RECORDED / "expected.json").read_text())["full_tensors"]
SOURCES = [
    ("src_ckpt", "strategy_4dev.ckpt"),
    ("src_safetensors", "strategy_4dev.ckpt"),
    ("to2", "strategy_2dev.ckpt"),
    ("to1", None),
]


def _check(name: str, array: Any) -> None:
    assert list(array.shape) == FULL[name]["shape"]
    assert hashlib.sha256(array.tobytes()).hexdigest() == FULL[name]["sha256"]


def _strategy(name: str | None) -> str | None:
    return None if name is None else str(RECORDED / name)


@pytest.mark.parametrize(("directory", "strategy"), SOURCES)
def test_all_recorded_cuts_give_the_same_tensors(directory: str, strategy: str | None) -> None:
    loaded = parckpt.load_checkpoint(RECORDED / directory, strategy=_strategy(strategy))
    assert set(loaded) == {*FULL, "global_step"}
    opened = parckpt.open_checkpoint(RECORDED / directory, strategy=_strategy(strategy))
    for name in FULL:
        _check(name, loaded[name])
        np.testing.assert_array_equal(opened[name][1:3], loaded[name][1:3])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("directory", "strategy"), SOURCES[:3])
def test_restored_on_any_number_of_ranks(tmp_path: Path, directory: str, strategy: str | None, size: int) -> None:
    layout = parckpt.Layout((size,), ("rank",), ("rank",))

    def rank_main(comm: Communicator, rank: int) -> dict[str, Any]:
        state: dict[str, Any] = {"global_step": np.zeros((), "i4")}
        for name, facts in FULL.items():
            piece = np.zeros(layout.local_shape(facts["shape"], rank), "f4")
            state[name] = layout.shard(piece, facts["shape"], rank)
        cuts = parckpt.load_strategy(RECORDED / str(strategy)) if size == 2 else _strategy(strategy)
        with parckpt.ModelCheckpoint("net", str(tmp_path), comm=comm) as ckpt:
            ckpt.restore(state, path=RECORDED / directory, strategy=cuts)
        return state

    states = run_world(size, rank_main)
    for name in FULL:
        _check(name, np.concatenate([state[name].data for state in states]))


def test_what_is_wrong_with_a_strategy_is_said_on_all_ranks(tmp_path: Path) -> None:
    def rank_main(comm: Communicator, rank: int) -> list[str]:
        said = []
        with parckpt.ModelCheckpoint("net", str(tmp_path), comm=comm) as ckpt:
            for options in (
                {"path": RECORDED / "src_ckpt"},
                {"path": RECORDED / "src_ckpt", "strategy": _strategy("strategy_2dev.ckpt")},
                {"path": RECORDED / "src_ckpt", "strategy": str(RECORDED / "none.ckpt")},
                {"strategy": _strategy("strategy_4dev.ckpt")},
                {"path": RECORDED / "src_ckpt", "strategy": str(RECORDED / f"strategy_{2 + 2 * rank}dev.ckpt")},
            ):
                with pytest.raises((LayoutError, ConfigError)) as caught:
                    ckpt.restore(**options)  # type: ignore[arg-type]
                said.append(str(caught.value))
        return said

    first, second = run_world(2, rank_main)
    assert first == second
    for text, gist in zip(
        first,
        (
            "without a layout nobody knows",
            "is for ranks 0 to 1, but there are files of ranks [2, 3]",
            "there is no strategy file",
            "give both",
            "strategy must be the same on all ranks",
        ),
        strict=True,
    ):
        assert gist in text


def test_the_owners_of_a_recorded_run(tmp_path: Path) -> None:
    dist2 = RECORDED.parent / "dist2"
    recorded = [dist2 / "ckpt_dedup" / f"rank_{rank}" / "net-1_2.ckpt" for rank in (0, 1)]
    whole = parckpt.load_checkpoint(dist2 / "ckpt_dedup")
    order = parckpt.load_checkpoint(dist2 / "ckpt_full")  # another run of the same network
    state = {name: whole[name] for name in order if name not in ("epoch_num", "step_num")}
    config = parckpt.CheckpointConfig(
        save_checkpoint_steps=2,
        remove_redundancy=True,
        ownership="mindspore",
        append_info=["epoch_num", "step_num"],
    )

    def rank_main(comm: Communicator, rank: int) -> str:
        with parckpt.ModelCheckpoint("net", str(tmp_path), config, comm=comm, steps_per_epoch=2) as ckpt:
            return ckpt.save_now(state, 2)

    path = run_world(2, rank_main)[0]
    for rank in (0, 1):
        own = Path(path) / f"rank_{rank}" / "net-1_2.ckpt"
        names = [
            [e.name for e in index_file(PosixFileSystem(), str(file))[0].entries] for file in (recorded[rank], own)
        ]
        assert names[0] == names[1]
        assert own.read_bytes() == recorded[rank].read_bytes()
    for name, array in parckpt.load_checkpoint(path).items():
        assert np.array_equal(array, whole[name])
