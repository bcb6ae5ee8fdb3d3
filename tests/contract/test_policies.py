"""Triggers, ephemeral saves, metrics and the longer retention rules through a real ModelCheckpoint, on some ranks."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import parckpt
from parckpt.comm.base import Communicator
from parckpt.core.manifest import Manifest
from parckpt.core.policy import Decision
from parckpt.core.tablefile import Table, encode
from parckpt.engine.catalog import load_manifest, scan
from parckpt.engine.explaining import read_policies
from parckpt.errors import ConfigError, ParckptError
from parckpt.storage.atomic import replace_file
from parckpt.testing.clock import ManualClock
from parckpt.testing.filesystem import MemoryFileSystem
from parckpt.testing.world import run_world

pytestmark = pytest.mark.fast

PLACE = "/ckpts"


def train(
    fs: MemoryFileSystem,
    steps: Any,
    *,
    size: int = 1,
    clocks: Mapping[int, ManualClock] | None = None,
    steps_per_epoch: int | None = None,
    pace: float = 1.0,
    metrics: Any = None,
    restore: bool = False,
    end: bool = True,
    **options: Any,
) -> list[list[Decision]]:
    """Run, and give every rank's decisions at its steps and at its end."""

    def rank_main(comm: Communicator, rank: int) -> list[Decision]:
        clock = (clocks or {}).get(rank) or ManualClock()
        decisions = []
        config = parckpt.CheckpointConfig(**options)
        made = parckpt.ModelCheckpoint(
            "m", PLACE, config, comm=comm, steps_per_epoch=steps_per_epoch, clock=clock, filesystem=fs
        )
        weights = np.zeros(3)
        with contextlib.closing(made) as ckpt:
            if restore:
                weights[:] = ckpt.restore({"w": weights}).step
            for step in steps:
                clock.advance(pace)
                weights[:] = step
                ckpt.step_end({"w": weights}, step, metrics=metrics(step, rank) if metrics else None)
                assert ckpt.last_decision is not None
                decisions.append(ckpt.last_decision)
            if end:
                ckpt.end()
                assert ckpt.last_decision is not None
                decisions.append(ckpt.last_decision)
        return decisions

    return run_world(size, rank_main)


def left(fs: MemoryFileSystem) -> list[int]:
    """Steps of what is published, oldest first."""
    return sorted(found.facts.step for found in scan(fs, PLACE) if found.facts)


def facts_of(fs: MemoryFileSystem, step: int) -> Any:
    return next(found.facts for found in scan(fs, PLACE) if found.facts and found.facts.step == step)


class Hasty(ManualClock):
    """Finds a save due at every step."""

    def monotonic(self) -> float:
        return 1e6 * super().monotonic()


def saves(decisions: list[Decision]) -> dict[int, str]:
    return {number: decision.reason for number, decision in enumerate(decisions, 1) if decision.save}


@pytest.mark.parametrize("size", [1, 3])
def test_any_trigger_saves_and_is_remembered(size: int) -> None:
    fs = MemoryFileSystem()
    by_rank = train(
        fs,
        range(1, 15),
        size=size,
        steps_per_epoch=3,
        save_checkpoint_steps=10,
        keep_checkpoint_max=20,
        triggers=[parckpt.AtSteps([2, 14]), parckpt.EveryEpochs(2), parckpt.EverySteps(100)],
    )
    expected = {2: "at steps", 6: "every epochs", 12: "every epochs", 14: "at steps"}
    for decisions in by_rank:
        assert saves(decisions[:-1]) == expected
        assert decisions[0].detail == "the next is due at step 2 (AtSteps([2, 14]))"
    assert left(fs) == [2, 6, 12, 14]
    assert {step: facts_of(fs, step).reason for step in left(fs)} == expected
    assert facts_of(fs, 12).detail == "EveryEpochs(2): step 12, the last save was at step 6"


def test_only_roots_clock_counts_and_all_ranks_hear_its_reason() -> None:
    fs = MemoryFileSystem()
    clocks = {0: ManualClock(), 1: Hasty()}
    by_rank = train(
        fs,
        range(1, 10),
        size=2,
        clocks=clocks,
        save_checkpoint_steps=0,
        triggers=[parckpt.EverySeconds(2.5), parckpt.AtSteps([5])],
    )
    assert saves(by_rank[0][:-1]) == {3: "every seconds", 5: "at steps", 8: "every seconds"}
    assert left(fs) == [3, 5, 8, 9]
    assert saves(by_rank[1]) == saves(by_rank[0])
    assert "root's decides" in by_rank[1][0].detail


def test_ephemeral_saves_live_until_the_next_publish() -> None:
    fs = MemoryFileSystem()
    by_rank = train(
        fs, range(1, 9), size=2, end=False, save_checkpoint_steps=5, keep_checkpoint_max=1, ephemeral_steps=2
    )
    for decisions in by_rank:
        assert saves(decisions) == {2: "ephemeral", 4: "ephemeral", 5: "steps", 7: "ephemeral"}
    assert left(fs) == [5, 7]
    assert (facts_of(fs, 7).ephemeral, facts_of(fs, 7).counted_step) == (True, 5)
    assert (facts_of(fs, 5).ephemeral, facts_of(fs, 5).counted_step) == (False, 5)
    # A restart goes on with the schedule of those that count: 10 is due, not 12, and 9 for a while.
    (decisions,) = train(fs, range(8, 12), restore=True, end=False, save_checkpoint_steps=5, ephemeral_steps=2)
    assert saves(decisions) == {2: "ephemeral", 3: "steps"}
    assert left(fs) == [5, 10]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("layout", [{}, {"integrated_save": False}], ids=["file", "directory"])
def test_the_end_keeps_for_good_what_was_saved_for_a_while(size: int, layout: dict[str, Any]) -> None:
    fs = MemoryFileSystem()
    for decisions in train(fs, range(1, 5), size=size, save_checkpoint_steps=10, ephemeral_steps=2, **layout):
        assert saves(decisions) == {2: "ephemeral", 4: "ephemeral", 5: "end"}
    assert left(fs) == [4]
    assert facts_of(fs, 4).ephemeral is False
    weights = np.zeros(3)
    with parckpt.ModelCheckpoint("m", PLACE, comm=parckpt.SELF, filesystem=fs) as ckpt:
        assert ckpt.restore({"w": weights}).step == 4
    assert weights.tolist() == [4.0] * 3


def test_metrics_of_root_decide_what_is_best() -> None:
    fs = MemoryFileSystem()
    losses = {1: 0.9, 2: 0.1, 3: float("nan"), 4: 0.3, 5: float("inf"), 6: 0.8}
    train(
        fs,
        losses,
        size=2,
        keep_checkpoint_max=1,
        keep_best=2,
        best_metric="loss",
        metrics=lambda step, rank: {"loss": losses[step] if rank == 0 else -1.0, "seen": np.int32(step)},
    )
    assert left(fs) == [2, 4, 6]
    assert facts_of(fs, 2).metric_values() == {"loss": 0.1, "seen": 2.0}


def test_metrics_belong_to_one_step() -> None:
    fs = MemoryFileSystem()
    with pytest.warns(parckpt.StateWarning, match=r"step 1 was saved without the metric 'loss'.*hand metrics="):
        train(
            fs,
            range(1, 5),
            keep_checkpoint_max=1,
            keep_best=2,
            best_metric="loss",
            metrics=lambda step, rank: {"loss": 1 / step} if step % 2 == 0 else None,
        )
    assert left(fs) == [2, 4]
    assert not math.isnan(facts_of(fs, 4).metric_values()["loss"])
    train(fs, [9], restore=True, metrics=lambda step, rank: {"nan": float("nan")})
    assert str(facts_of(fs, 9).metric_values()) == "{'nan': nan}"


@pytest.mark.parametrize(
    "metrics", [{"loss": "0.1"}, {"loss": True}, {1: 0.1}, [0.1], {"loss": np.zeros(2)}, {"n": 10**400}]
)
def test_what_is_no_metric(metrics: Any) -> None:
    with pytest.raises(ConfigError, match="metrics"):
        train(MemoryFileSystem(), [1], metrics=lambda step, rank: metrics)


def test_every_kth_stays_and_the_old_go(caplog: pytest.LogCaptureFixture) -> None:
    fs = MemoryFileSystem()
    with caplog.at_level(logging.INFO, "parckpt"):
        train(fs, range(1, 13), keep_checkpoint_max=4, keep_every_n_steps=5, time_to_live_s=1.5)
    assert left(fs) == [5, 10, 11, 12]
    deleted = [message for message in caplog.messages if message.startswith("deleting")]
    assert len(deleted) == 8
    assert "m-1_9.ckpt: older than time_to_live_s=1.5" in deleted[-1]


# Steps that jump.


def test_steps_that_jump_are_warned_of_once_on_root() -> None:
    fs = MemoryFileSystem()
    with pytest.warns(parckpt.StateWarning, match="steps come 4 at a time, and save_checkpoint_steps=10") as caught:
        by_rank = train(fs, range(4, 50, 4), size=2, save_checkpoint_steps=10)
    assert len(caught) == 1
    assert [step * 4 for step in saves(by_rank[1][:-1])] == [12, 24, 36, 48]


@pytest.mark.parametrize(
    ("steps", "interval"),
    [(range(4, 30, 4), 8), (range(4, 30, 4), 4), (range(3, 30, 3), 1), ([7, 8, 9, 11], 2), ([5, 10, 15], 5)],
    ids=str,
)
def test_jumps_that_divide_the_interval_are_none_of_our_business(steps: Any, interval: int) -> None:
    train(MemoryFileSystem(), steps, save_checkpoint_steps=interval)


def test_where_the_warning_is_an_error_all_ranks_get_it_and_may_go_on() -> None:
    fs = MemoryFileSystem()

    def rank_main(comm: Communicator, rank: int) -> None:
        config = parckpt.CheckpointConfig(save_checkpoint_steps=3)
        with parckpt.ModelCheckpoint("m", PLACE, config, comm=comm, filesystem=fs) as ckpt:
            ckpt.step_end({"w": np.zeros(2)}, 2)
            with pytest.raises(ParckptError, match="steps come 2 at a time"):
                ckpt.step_end({"w": np.ones(2)}, 4)
            ckpt.step_end({"w": np.ones(2)}, 4)

    run_world(2, rank_main)
    assert left(fs) == [4]


def test_epochs_of_unknown_length_are_refused_at_the_first_step() -> None:
    with pytest.raises(ConfigError, match="steps_per_epoch"):
        train(MemoryFileSystem(), [1], triggers=[parckpt.EveryEpochs(1)], save_checkpoint_steps=0)

    def ask(comm: Communicator, rank: int) -> None:
        config = parckpt.CheckpointConfig(triggers=[parckpt.EveryEpochs(1)])
        with parckpt.ModelCheckpoint("m", PLACE, config, comm=comm, filesystem=fs) as ckpt:
            with pytest.raises(ConfigError, match="steps_per_epoch"):
                ckpt.need_checkpoint()
            ckpt.close()

    fs = MemoryFileSystem()
    run_world(2, ask)


# What manifests say.


def test_the_policy_is_stored_with_each_checkpoint() -> None:
    fs = MemoryFileSystem()
    options: dict[str, Any] = {
        "save_checkpoint_steps": 2,
        "triggers": [parckpt.AtSteps([3])],
        "keep_best": 1,
        "best_metric": "loss",
        "time_to_live_s": 9,
    }
    train(fs, range(1, 4), metrics=lambda step, rank: {"loss": 1.0}, **options)
    config = parckpt.CheckpointConfig(**options)
    for step in (2, 3):
        policies = read_policies(facts_of(fs, step))
        assert (policies.save, policies.keep, policies.problem) == (config.save_policy, config.retention_policy, None)
    newer = replace(facts_of(fs, 3), policy={"save": {"triggers": [{"kind": "whenever"}]}, "keep": {}})
    assert "newer parckpt" in (read_policies(newer).problem or "")


NEW = ("detail", "metrics", "ephemeral", "counted_step", "policy")


def test_a_manifest_of_before_is_read_and_one_with_more_is_kept() -> None:
    fs = MemoryFileSystem()
    train(fs, [1, 2], integrated_save=False)
    found = scan(fs, PLACE)[0]
    manifest = load_manifest(fs, found)
    facts = {name: value for name, value in manifest.facts.to_json().items() if name not in NEW}
    facts["of a newer version"] = [1]
    replace_file(fs, found.manifest_path, encode(Table("manifest", facts, manifest.contents.columns())))
    old = load_manifest(fs, scan(fs, PLACE)[0])
    assert (old.facts.detail, old.facts.ephemeral, old.facts.policy) == ("", False, {})
    assert Manifest.decode(old.encode(), "again").facts.unknown == {"of a newer version": [1]}
    assert "by what policy" in (read_policies(old.facts).problem or "")
    (decisions,) = train(fs, [3, 4], restore=True, save_checkpoint_steps=2, keep_checkpoint_max=1)
    assert saves(decisions[:-1]) == {2: "steps"}
    assert left(fs) == [4]


@pytest.mark.parametrize(
    "fact", [{"metrics": {"a": 1}}, {"metrics": {"a": {"x": 1}}}, {"ephemeral": 1}, {"policy": []}]
)
def test_ill_formed_facts_are_damage(fact: dict[str, Any]) -> None:
    fs = MemoryFileSystem()
    train(fs, [1], integrated_save=False)
    found = scan(fs, PLACE)[0]
    manifest = load_manifest(fs, found)
    data = encode(Table("manifest", {**manifest.facts.to_json(), **fact}, manifest.contents.columns()))
    replace_file(fs, found.manifest_path, data)
    assert isinstance(scan(fs, PLACE)[0].error, parckpt.FormatError)


@pytest.mark.parametrize("spares", [False, True])
def test_what_is_assigned_to_the_config_later_does_not_count(spares: bool) -> None:
    fs = MemoryFileSystem()

    def rank_main(comm: Communicator, rank: int) -> bool:
        config = parckpt.CheckpointConfig(remove_redundancy=spares)
        weights = np.zeros(8)
        with parckpt.ModelCheckpoint("m", PLACE, config, comm=comm, filesystem=fs) as ckpt:
            ckpt.step_end({"w": weights}, 1)
            if rank == 1:
                config.remove_redundancy = not spares
            weights[:] = 2
            ckpt.step_end({"w": weights}, 2)
            return ckpt.config.remove_redundancy

    assert run_world(2, rank_main) == [spares, spares]
    assert left(fs) == [1, 2]
    assert {one.facts.integrated for one in scan(fs, PLACE) if one.facts} == {not spares}
