"""The two ways to write a save: every rank its own file, or root one file gathered from all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core import appended
from parckpt.core.layout import Box
from parckpt.core.manifest import CHUNK_NBYTES, Facts, Record
from parckpt.core.tensors import TensorRow
from parckpt.engine.arrays import Source
from parckpt.engine.chunks import NBUFFERS, ChunkWriter
from parckpt.engine.filecrc import GatheredCrc, local_crc
from parckpt.engine.fileplan import FilePlan, appended_entry, plan_file
from parckpt.engine.gathering import GatherPlan, Owners, stream_gathered
from parckpt.engine.group import Group
from parckpt.engine.local import LocalState
from parckpt.engine.planning import Planned
from parckpt.engine.staging import Staging
from parckpt.engine.writing import finish, stream_local
from parckpt.formats.base import Extent, Format
from parckpt.formats.safetensors import MINDSPORE_METADATA
from parckpt.storage.direct import OutputFile, aligned_buffer

__all__ = ["Job", "Writers", "Written"]


@dataclass(frozen=True)
class Job:
    """One save as a writer sees it."""

    local: LocalState
    planned: Planned
    facts: Facts
    append: Mapping[str, Any]
    marks: Mapping[str, str]
    staging: Staging


@dataclass(frozen=True)
class Written:
    """What a rank wrote: its record, and the fingerprint of the tensors in it (without step numbers and the like)."""

    record: Record
    fingerprint: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class _Layout:
    """What follows from a save plan alone, kept while it holds.

    Attributes
    ----------
    own : list of (int, Box)
        Tensor and box of everything this rank writes or sends.
    boxes : list of (TensorRow, Box)
        What this rank's file holds, in order; of one integrated file the same on all ranks.
    owners : Owners or None
        Of an integrated file's boxes.
    """

    plan_hash: str
    own: list[tuple[int, Box]]
    boxes: list[tuple[TensorRow, Box]]
    owners: Owners | None

    @classmethod
    def of(cls, planned: Planned, rank: int) -> _Layout:
        save = planned.save
        own = save.boxes_of(rank)
        if not save.integrated:
            return cls(planned.hash, own, [(planned.tensors[tensor], box) for tensor, box in own], None)
        mine: dict[int, list[tuple[int, Box]]] = {}
        for tensor, box in own:
            mine.setdefault(tensor, []).append((rank, box))
        # Only root needs to know what the others send.
        pairs = save.pieces_of if rank == 0 else lambda tensor: mine.get(tensor, [])
        return cls(planned.hash, own, planned.whole_tensors(), Owners(planned.tensors, pairs))


class Writers:
    """Writes files, with buffers and layouts kept from save to save."""

    def __init__(self, group: Group, form: Format, *, crc_check: bool) -> None:
        self.group, self.form, self.crc_check = group, form, crc_check
        self._buffers: list[memoryview] = []
        self._last_plan: tuple[tuple[Any, ...], FilePlan] | None = None
        self._last_layout: _Layout | None = None

    def write_own(self, job: Job) -> Written:
        """Write this rank's file and record into staging, synced. Not collective."""
        rank = self.group.rank
        layout = self._layout(job)
        sources = [(job.local.source(tensor.name, box), box) for tensor, box in layout.boxes]
        plan = self._plan(job, layout, 0 if self.crc_check else None)
        if self.crc_check and self.form.crc_first:
            crc = local_crc(plan, [partial(_pass, source, box) for source, box in sources])
            plan = self._plan(job, layout, crc)
        job.staging.make_rank_directory(rank)
        path = job.staging.data_path(rank)
        with self._open(job, path, plan) as output, self._writer(output, plan) as writer:
            stream_local(plan, self.form, sources, writer)
            output.finish(plan.nbytes)
        own = {name: {str(rank): value} for name, value in job.local.own_values().items()}
        record = self._record(job, plan, writer, path, self._shared(job), own)
        job.staging.record(rank, record.encode())
        return Written(record, writer.content_crcs)

    def write_gathered(self, job: Job) -> tuple[Written | None, Exception | None]:
        """Write one file and its record on root. Collective; errors are returned, to be agreed on."""
        layout = self._layout(job)
        held = {(index, box): job.local.source(job.planned.tensors[index].name, box) for index, box in layout.own}
        crc: int | None = 0 if self.crc_check else None
        error: Exception | None = None
        if self.crc_check and self.form.crc_first:
            crc, error = self._gathered_crc(self._gather(job, layout, 0), held)
        gather = self._gather(job, layout, crc)
        if not self.group.is_root:
            streaming = stream_gathered(self.group, gather, held, None)
            self.group.gather(_pack(job.local))
            return None, error or streaming
        return self._write_root(job, gather, held, error)

    def _write_root(
        self, job: Job, gather: GatherPlan, held: Mapping[tuple[int, Box], Source], error: Exception | None
    ) -> tuple[Written | None, Exception | None]:
        path = job.staging.data_path(0)
        output: OutputFile | None = None
        writer: ChunkWriter | None = None
        try:
            if error is None:
                job.staging.make_rank_directory(0)
                output = self._open(job, path, gather.file)
                writer = self._writer(output, gather.file)
        except Exception as problem:  # the other ranks are about to send: receive first, agree afterwards
            error = problem
        try:
            # Without a writer, or after an error, the messages are received and dropped.
            streaming = stream_gathered(self.group, gather, held, writer)
            reports = self.group.gather(_pack(job.local))
            error = error or streaming
            if error is None and output is not None and writer is not None:
                try:
                    return self._complete(job, gather, output, writer, path, reports), None
                except Exception as problem:
                    error = problem
            return None, error
        finally:
            if writer is not None:
                writer.close()
            if output is not None:
                output.close()

    def _complete(
        self, job: Job, gather: GatherPlan, output: OutputFile, writer: ChunkWriter, path: str, reports: list[bytes]
    ) -> Written:
        finish(gather.file, self.form, writer)
        output.finish(gather.file.nbytes)
        output.close()
        shared: dict[str, Any] = {}
        own: dict[str, dict[str, Any]] = {}
        for rank, report in enumerate(reports):
            all_shared, all_own = json.loads(report)
            for name, value in all_shared.items():
                if name in job.planned.save.value_owner:  # else an empty list that stood for "no shards here"
                    shared.setdefault(name, value)
            for name, value in all_own.items():
                own.setdefault(name, {})[str(rank)] = value
        # In the manifest the file has its published name, beside the manifest.
        record = self._record(job, gather.file, writer, os.path.basename(path), shared, own)
        job.staging.record(0, record.encode())
        return Written(record, writer.content_crcs)

    def _gathered_crc(self, gather: GatherPlan, held: Mapping[tuple[int, Box], Source]) -> tuple[int, Exception | None]:
        """Checksum on root, known to all: the length of the header depends on its digits."""
        sink = GatheredCrc(gather.file) if self.group.is_root else None
        error = stream_gathered(self.group, gather, held, sink)
        crc = sink.result() if sink is not None and error is None else 0
        data = self.group.bcast(crc.to_bytes(8, "little") if self.group.is_root else None)
        return int.from_bytes(data, "little"), error

    def _layout(self, job: Job) -> _Layout:
        if self._last_layout is None or self._last_layout.plan_hash != job.planned.hash:
            self._last_layout = _Layout.of(job.planned, self.group.rank)
        return self._last_layout

    def _gather(self, job: Job, layout: _Layout, crc: int | None) -> GatherPlan:
        assert layout.owners is not None
        return GatherPlan(self._plan(job, layout, crc), layout.owners)

    def _plan(self, job: Job, layout: _Layout, crc: int | None) -> FilePlan:
        """Lay the file out; the last layout is kept while all that it depends on is the same."""
        extra = [appended_entry(self.form, name, value) for name, value in job.append.items()]
        key = (job.planned.hash, crc, tuple(entry for entry, _ in extra))
        if self._last_plan is None or self._last_plan[0] != key:
            metadata = {**MINDSPORE_METADATA, **job.marks}
            integrated = job.facts.integrated
            plan = plan_file(self.form, layout.boxes, extra, integrated=integrated, crc=crc, metadata=metadata)
            self._last_plan = (key, plan)
        return replace(self._last_plan[1], contents=tuple(content for _, content in extra))

    def _open(self, job: Job, path: str, plan: FilePlan) -> OutputFile:
        staging = job.staging
        return OutputFile(staging.fs, f"{staging.path}/{path}", plan.nbytes, mode=staging.modes.file)

    def _writer(self, output: OutputFile, plan: FilePlan) -> ChunkWriter:
        if not self._buffers:
            self._buffers = [aligned_buffer(CHUNK_NBYTES) for _ in range(NBUFFERS)]
        return ChunkWriter(output, plan.nbytes, self._buffers, _volatile(plan))

    def _shared(self, job: Job) -> dict[str, Any]:
        """The shared values that this rank is to record."""
        owner = job.planned.save.value_owner
        return {name: v for name, v in job.local.shared_values().items() if owner.get(name) == self.group.rank}

    def _record(
        self,
        job: Job,
        plan: FilePlan,
        writer: ChunkWriter,
        path: str,
        shared: Mapping[str, Any],
        own: Mapping[str, Any],
    ) -> Record:
        return Record(
            token=job.facts.token,
            plan_hash=job.planned.hash,
            rank=self.group.rank,
            path=path,
            nbytes=plan.nbytes,
            chunk_crcs=writer.chunk_crcs,
            append={name: appended.encode(value) for name, value in job.append.items()},
            values=shared,
            per_rank_values=own,
            **plan.record_columns,
        )


def _pass(source: Source, box: Box) -> Iterator[npt.NDArray[np.uint8]]:
    """One pass over a box; a Leaf is let go at the end and read again for the next."""
    yield from source.blocks(box, CHUNK_NBYTES)
    source.release()


def _pack(local: LocalState) -> bytes:
    return json.dumps([local.shared_values(), local.own_values()]).encode("utf-8")


def _volatile(plan: FilePlan) -> list[tuple[int, int]]:
    """Bytes that may change although no tensor does: appended values, and a header or trailer with a crc over them."""
    if not plan.contents:
        return []
    parts = [p for p in plan.layout.parts if p.byte_offset == 0 or (isinstance(p, Extent) and p.entry >= plan.nboxes)]
    end = (plan.nbytes - plan.layout.trailer_nbytes, plan.nbytes)
    return [*((p.byte_offset, p.byte_offset + p.nbytes) for p in parts), end]
