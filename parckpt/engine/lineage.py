"""Where a save stands among the others: run, prefix, sequence number, parent. Equal on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parckpt.core import appended, naming, values
from parckpt.core.config import CheckpointConfig
from parckpt.core.manifest import Facts
from parckpt.core.version import VERSION
from parckpt.engine.saver import Ticket

__all__ = ["Cause", "Lineage", "Moment", "make_ticket"]


@dataclass(frozen=True)
class Lineage:
    """What the next save follows.

    Attributes
    ----------
    run_id, attempt : str
        Random ids, hexadecimal: of the run, kept over restarts; of this start.
    family, prefix : str, str or None
        The prefix as given, and as used; None before the first save of a run that restored nothing.
    sequence : int
        Of the last save (restored, or highest in the directory).
    parent : str or None
        Token of what was saved or restored last.
    """

    run_id: str
    attempt: str
    family: str
    prefix: str | None = None
    sequence: int = 0
    parent: str | None = None


@dataclass(frozen=True)
class Cause:
    """Why a save is made, and what the policies will want to know of it. Root's counts.

    Attributes
    ----------
    reason, detail : str
        A word, and a sentence.
    ephemeral : bool
        It lives until the next publish.
    counted_step : int
        With `ephemeral`: step of the last save that was not.
    metrics : mapping
        What `step_end` was told at this step.
    """

    reason: str
    detail: str = ""
    ephemeral: bool = False
    counted_step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """Where training stands when a save is made, and why it is made."""

    step: int
    steps_per_epoch: int | None
    cause: Cause
    wall_s: float


def make_ticket(
    lineage: Lineage, moment: Moment, config: CheckpointConfig, world_size: int, name: str | None = None
) -> Ticket:
    """The ticket of the save that follows ``lineage``; its prefix is known. Not collective, equal on all ranks.

    Parameters
    ----------
    name : str, optional
        In place of prefix, epoch and step.
    """
    assert lineage.prefix is not None
    epoch, inner = naming.epoch_and_step(moment.step, moment.steps_per_epoch)
    sequence = lineage.sequence + 1
    facts = Facts(
        stem=name if name is not None else str(naming.Stem(lineage.prefix, epoch, inner)),
        token=naming.token(bytes.fromhex(lineage.attempt), sequence, epoch, moment.step, "save"),
        attempt=lineage.attempt,
        run_id=lineage.run_id,
        family=lineage.family,
        prefix=lineage.prefix,
        sequence=sequence,
        step=moment.step,
        epoch=epoch,
        step_in_epoch=inner,
        world_size=world_size,
        format=config.format,
        integrated=config.is_integrated,
        created=moment.wall_s,
        parent=lineage.parent,
        steps_per_epoch=moment.steps_per_epoch,
        reason=moment.cause.reason,
        detail=moment.cause.detail,
        metrics={name: values.encode(value) for name, value in moment.cause.metrics.items()},
        ephemeral=moment.cause.ephemeral,
        counted_step=moment.cause.counted_step if moment.cause.ephemeral else moment.step,
        policy={"save": config.save_policy.to_json(), "keep": config.retention_policy.to_json()},
        remove_redundancy=config.remove_redundancy,
        crc_check=config.crc_check,
        writer=f"parckpt {VERSION}",
    )
    append: Mapping[str, Any] | None = config.append_dict
    # MindSpore writes this mark from ModelCheckpoint always, from save_checkpoint only when it is asked for.
    marks = {"remove_redundancy": str(config.remove_redundancy)}
    return Ticket(facts, False, appended.settle(append, epoch, moment.step), marks)
