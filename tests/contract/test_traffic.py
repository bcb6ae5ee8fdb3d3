"""What a save says to whom: little, and the less the less has changed; and nothing longer than one call may carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.comm.base import Communicator
from parckpt.core.round import Call, Voice, pack
from parckpt.engine.group import TAG_RECORD
from parckpt.testing.counting import CountingCommunicator, Traffic
from parckpt.testing.faulty import FaultyFileSystem
from parckpt.testing.jobs import LAYOUTS, QuickFileSystem
from parckpt.testing.world import run_world

ROUND = Traffic("iallreduce_max", pack(Voice(Call.STEP, 0)).nbytes)


def _train(comm: Communicator, directory: str, ntensors: int, steps: int = 4, **options: Any) -> list[list[object]]:
    """Save at every step; return each step's log of communication and of calls that touch the disk."""
    counting = CountingCommunicator(comm)
    fs = FaultyFileSystem(QuickFileSystem(), on_call=lambda call: counting.log.append(call.operation))
    config = parckpt.CheckpointConfig(save_checkpoint_steps=1, keep_checkpoint_max=2, **options)
    logs: list[list[object]] = []
    rows, low = 3 * comm.size, 3 * comm.rank
    arrays = [np.zeros((3, 2)) for _ in range(ntensors)]
    state: dict[str, Any] = {f"w{n}": parckpt.Shard(a, (rows, 2), (low, 0)) for n, a in enumerate(arrays)}
    state["same"] = np.zeros(10)
    with parckpt.ModelCheckpoint("net", directory, config, comm=counting, filesystem=fs) as ckpt:
        for step in range(1, steps + 1):
            for array in (*arrays, state["same"]):
                array += step
            counting.log.clear()
            ckpt.step_end(state, step)
            logs.append(list(counting.log))
    return logs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_reduction_precedes_the_writing(layout: str, tmp_path: Path) -> None:
    logs = run_world(3, lambda comm, rank: _train(comm, str(tmp_path), 5, **LAYOUTS[layout]))
    for rank in (1, 2):
        first, *later = logs[rank]
        assert sum(isinstance(event, Traffic) for event in first) > 6  # the plan is made
        for events in later:
            # Writing, or, where root writes, the first piece on its way to it.
            begins = next(n for n, e in enumerate(events) if isinstance(e, str) or e.call == "isend")  # type: ignore[attr-defined]
            assert events[:begins] == [ROUND]
    for events in logs[0][1:]:
        # Root has looked, and made the place to write to, before it agrees.
        traffic = [event for event in events if isinstance(event, Traffic)]
        assert traffic[0] == ROUND


def test_a_step_without_a_save_is_one_reduction(tmp_path: Path) -> None:
    def steps(comm: Communicator, rank: int) -> list[object]:
        counting = CountingCommunicator(comm)
        config = parckpt.CheckpointConfig(save_checkpoint_steps=100)
        with parckpt.ModelCheckpoint("net", tmp_path, config, comm=counting) as ckpt:
            counting.log.clear()
            ckpt.step_end({"w": np.zeros(3)}, 1)
            ckpt.poll()
            log = list(counting.log)
            ckpt.save_now()
        return log

    assert run_world(2, steps) == [[ROUND, ROUND]] * 2


@pytest.mark.parametrize("layout", ["each", "split", "integrated"])
def test_what_a_save_says_does_not_grow_with_the_model(layout: str, tmp_path: Path) -> None:
    """But for the tensors themselves: names, shapes and places are told once."""

    def told(ntensors: int) -> list[list[int]]:
        place = str(tmp_path / str(ntensors))
        logs = run_world(2, lambda comm, rank: _train(comm, place, ntensors, **LAYOUTS[layout]))
        tags = {TAG_RECORD, -1}
        return [
            [sum(e.nbytes for e in events if isinstance(e, Traffic) and e.tag in tags) for events in log]
            for log in logs
        ]

    few, many = told(20), told(500)
    for rank in (0, 1):
        assert many[rank][0] > few[rank][0] + 10 * 480
        assert all(abs(m - f) < 64 for m, f in zip(many[rank][2:], few[rank][2:], strict=True)), (few, many)
        assert max(many[rank][2:]) < 4096


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_nothing_exceeds_what_one_call_may_carry(layout: str, form: str, tmp_path: Path) -> None:
    """Chunks, records, manifests and descriptions longer than the bound travel in pieces."""
    bound = 1 << 20
    config = parckpt.CheckpointConfig(format=form, crc_check=True, save_checkpoint_steps=100, **LAYOUTS[layout])
    whole = np.random.default_rng(1).integers(0, 255, (5, 1_800_000), np.uint8)
    text = "long" * 400_000
    names = [f"{n:04}-" + "n" * 190 for n in range(6000)] if layout == "each" else []

    def state(rank: int, size: int, fill: bool) -> dict[str, Any]:
        low, high = (whole.shape[1] * r // size for r in (rank, rank + 1))
        part = whole[:, low:high].copy() if fill else np.zeros((5, high - low), np.uint8)
        same = whole[0] if fill else np.zeros_like(whole[0])
        shard = parckpt.Shard(part, whole.shape, (0, low))
        many = {name: np.full(1, n if fill else 0, np.int16) for n, name in enumerate(names)} if rank == 0 else {}
        return {"w": shard, "same": same, "text": text if fill else "", "own": parckpt.PerRank(text), "many": many}

    def save(comm: Communicator, rank: int) -> None:
        with parckpt.ModelCheckpoint("net", tmp_path, config, comm=comm, filesystem=QuickFileSystem()) as ckpt:
            ckpt.save_now(state(rank, comm.size, True), 1)

    def restore(comm: Communicator, rank: int) -> None:
        with parckpt.ModelCheckpoint("net", tmp_path, config, comm=comm, filesystem=QuickFileSystem()) as ckpt:
            found, expected = state(rank, comm.size, False), state(rank, comm.size, True)
            found["own"] = parckpt.PerRank("", "keep")
            ckpt.restore(found)
            np.testing.assert_array_equal(found["w"].data, expected["w"].data)
            np.testing.assert_array_equal(found["same"], expected["same"])
            assert found["text"] == text
            assert found["many"] == expected["many"]

    run_world(3, save, max_nbytes=bound)
    run_world(2, restore, max_nbytes=bound)
