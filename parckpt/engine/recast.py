"""A whole new checkpoint, with manifest, from a stored one: other format, other cut, other place."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from parckpt.comm.outcome import run_on_all
from parckpt.comm.wait import SystemClock
from parckpt.core import appended, naming
from parckpt.core.clock import Clock
from parckpt.core.contents import box_columns
from parckpt.core.manifest import Facts, Plan, Record, assemble
from parckpt.core.recut import Cut, integrated
from parckpt.core.version import VERSION
from parckpt.engine.bands import BAND_NBYTES
from parckpt.engine.group import Group
from parckpt.engine.republish import Publisher
from parckpt.engine.source import Source
from parckpt.engine.staging import Modes, Staging
from parckpt.engine.transcribe import NewFile, OnBytes, Scribe, passes
from parckpt.formats.base import Format

__all__ = ["Target", "read_nbytes", "rewrite"]


@dataclass(frozen=True)
class Target:
    """A checkpoint that is to be made.

    Attributes
    ----------
    directory, stem : str
        Where, and the name of the step directory or of the file without extension.
    cut : Cut or None
        What each rank's file holds (`parckpt.core.recut`); None: one integrated file.
    remove_redundancy : bool
        Files lack replicas that others hold; MindSpore's mark in safetensors.
    crc_check : bool
        Add MindSpore's checksum.
    """

    directory: str
    stem: str
    form: Format
    cut: Cut | None = None
    remove_redundancy: bool = False
    crc_check: bool = False
    modes: Modes = field(default_factory=Modes)


def read_nbytes(source: Source, target: Target) -> int:
    """Bytes of tensors that `rewrite` will read in all: what its ``on_bytes`` adds up to."""
    return sum(file.nbytes * passes(file, target.form) for file in _new_files(source, target))


def rewrite(
    group: Group,
    source: Source,
    target: Target,
    *,
    on_bytes: OnBytes | None = None,
    clock: Clock | None = None,
    band_nbytes: int = BAND_NBYTES,
) -> str:
    """Publish a new checkpoint made from another one; returns its path. Collective over ``group``.

    File k is written by rank k % size, root publishes. Facts, appended and plain values are the source's, the token is
    new; `ModelCheckpoint.restore` takes it as it would have taken the source. Nothing is visible before all is
    durable, and the source is only read.

    Parameters
    ----------
    source : Source
        Ours or foreign; the new one is written with the same file system.
    target : Target
        Equal on all ranks.
    on_bytes : callable, optional
        Called with bytes of tensors that this rank has read.

    Raises
    ------
    CheckpointExistsError
        The name is taken, and not by the same step of the same run.
    ConfigError
        The format cannot hold a tensor.
    IntegrityError, NoSpaceError, LockedError, ParckptError
        The same on all ranks. Nothing is there, and the source is untouched.
    """
    files = _new_files(source, target)
    token = group.bcast(secrets.token_bytes(8) if group.is_root else None).hex()
    plan = _plan(source, target, files, token)
    scribe = Scribe(source, target.form, on_bytes=on_bytes, band_nbytes=band_nbytes)
    publisher = Publisher(
        source.fs,
        target.directory,
        plan.facts,
        reading=source.path,
        nbytes=sum(file.nbytes for file in files),
        modes=target.modes,
        pin=_is_beside(source, plan.facts, target.directory),
        clock=clock,
    )
    with ExitStack() as stack:
        run_on_all(group.comm, lambda: stack.enter_context(publisher) if group.is_root else None, group.waiter)
        records = run_on_all(group.comm, lambda: _write(group, publisher.staging, plan, files, scribe), group.waiter)
        messages = group.gather(_pack(records))
        publish = lambda: publisher.publish(_manifest(source, plan, messages)) if group.is_root else ""  # noqa: E731
        path = run_on_all(group.comm, publish, group.waiter)
        return os.fsdecode(group.bcast(os.fsencode(path) if group.is_root else None))


def _write(group: Group, staging: Staging, plan: Plan, files: Sequence[NewFile], scribe: Scribe) -> list[Record]:
    """This rank's files, synced."""
    records = []
    for number in range(group.rank, len(files), group.size):
        staging.make_rank_directory(number)
        relative = staging.data_path(number)
        path = os.path.join(staging.path, relative)
        written = scribe.write(files[number], path, staging.modes.file)
        staging.fs.sync_directory(os.path.dirname(path))
        record = Record(
            token=plan.facts.token,
            plan_hash=plan.facts.plan_hash,
            rank=number,
            path=os.path.basename(path) if plan.facts.integrated else relative,
            nbytes=written.plan.nbytes,
            chunk_crcs=written.chunk_crcs,
            **written.plan.record_columns,
        )
        records.append(record)
    return records


def _manifest(source: Source, plan: Plan, messages: Sequence[bytes]) -> bytes:
    records = sorted((record for message in messages for record in _unpack(message)), key=lambda record: record.rank)
    facts = source.facts
    records[0] = replace(records[0], append=facts.append, values=facts.values, per_rank_values=facts.per_rank_values)
    world_size = _world_size(source, plan)
    return assemble(plan, records, replace(plan.facts, world_size=world_size)).encode()


def _new_files(source: Source, target: Target) -> list[NewFile]:
    tensors = source.contents.tensors
    marks = {"remove_redundancy": "True"} if target.remove_redundancy else {}
    append = {name: appended.decode(value) for name, value in source.facts.append.items()}
    if target.form.name == "safetensors":  # it has no strings: the manifest keeps them
        append = {name: value for name, value in append.items() if not isinstance(value, str)}
    return [
        NewFile(
            [row for row, _ in boxes],
            [(tensors[row], box) for row, box in boxes],
            append,
            marks,
            integrated=target.cut is None,
            crc_check=target.crc_check,
        )
        for boxes in ([integrated(source.contents)] if target.cut is None else target.cut)
    ]


def _plan(source: Source, target: Target, files: Sequence[NewFile], token: str) -> Plan:
    """What is to be written. Its world is the new files, however many ranks the source is of."""
    old = source.facts
    ours = not source.is_foreign
    stem = naming.parse_stem(target.stem)
    prefix = stem.prefix if stem is not None else target.stem
    same = ours and prefix == old.prefix
    attempt = old.attempt if ours else token * 2
    facts = replace(
        old,
        stem=target.stem,
        token=token,
        attempt=attempt,
        run_id=old.run_id if ours else attempt,
        family=old.family if same else prefix,
        prefix=prefix,
        sequence=old.sequence if ours else 1,
        generation=old.generation + ours,
        world_size=len(files),
        format=target.form.name,
        integrated=target.cut is None,
        created=old.created if ours else SystemClock().wall(),
        reason=old.reason if ours else "converted",
        remove_redundancy=target.remove_redundancy,
        crc_check=target.crc_check,
        ephemeral=False,  # somebody wanted it
        plan_hash="",
        writer=f"parckpt {VERSION}",
    )
    boxes = box_columns(
        [
            (row, number, box)
            for number, file in enumerate(files)
            for row, (_, box) in zip(file.rows, file.boxes, strict=True)
        ]
    )
    plan = Plan(facts, source.contents.tensors, boxes)
    return replace(plan, facts=replace(facts, plan_hash=hashlib.sha256(plan.encode()).hexdigest()))


def _world_size(source: Source, plan: Plan) -> int:
    """Ranks that it is of: the new files, unless something in it belongs to ranks of the job that saved it."""
    owned = bool(source.facts.per_rank_values) or any(tensor.per_rank >= 0 for tensor in source.contents.tensors)
    return source.facts.world_size if owned or plan.facts.integrated else plan.facts.world_size


def _is_beside(source: Source, new: Facts, directory: str) -> bool:
    """Whether it comes to lie where a run may take it for one of its own, and delete it when its time has come."""
    old = source.facts
    same = (old.run_id, old.prefix, old.family) == (new.run_id, new.prefix, new.family)
    has_retention = bool(old.policy)
    return same and has_retention and os.path.realpath(os.path.dirname(source.path)) == os.path.realpath(directory)


def _pack(records: Sequence[Record]) -> bytes:
    encoded = [record.encode() for record in records]
    return b"".join(len(data).to_bytes(8, "little") + data for data in encoded)


def _unpack(message: bytes) -> Iterator[Record]:
    at = 0
    while at < len(message):
        nbytes = int.from_bytes(message[at : at + 8], "little")
        yield Record.decode(message[at + 8 : at + 8 + nbytes], "a record on its way to rank 0")
        at += 8 + nbytes
