"""Plan, record and manifest: their facts, and how a manifest is put together from a plan and records.

* The *plan* says what the checkpoint must contain and which rank's file holds which box. Root syncs it first.
* A *record* says what one rank wrote: size, chunk checksums, where each of its boxes lies, its plain values.
* The *manifest* is plan plus records. Whoever holds both can make it: root at the end of a save, or `finalize` later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from parckpt.core import naming
from parckpt.core.contents import (
    BoxColumns,
    Contents,
    StoredFile,
    check_boxes,
    check_relative,
    chunk_count,
    parse_tensors,
    tensor_columns,
)
from parckpt.core.tablefile import Column, Table, decode, encode, join_names, split_names
from parckpt.core.tensors import TensorRow
from parckpt.core.values import decode as decode_value
from parckpt.errors import FormatError, IntegrityError

__all__ = ["CHUNK_NBYTES", "Coverage", "Facts", "Manifest", "Plan", "Record", "assemble", "coverage"]

MAX_WORLD_SIZE = 1 << 24  # tables by rank are made before anything else is known to be true
CHUNK_NBYTES = 4 << 20  # design.md, "chunk": measured best for checksum and cipher in cache


@dataclass(frozen=True)
class Facts:
    """What is true of a whole checkpoint; the metadata of plan and manifest.

    Attributes
    ----------
    stem : str
        Name of the step directory, or of the file without its extension.
    token : str
        16 hexadecimal digits naming this attempt at this save.
    attempt : str
        Random id of the process group that wrote it.
    run_id : str
        Random id of the run, kept over restarts.
    family, prefix : str
        The prefix the user gave, and the one in the names (numbered on where an earlier run used it).
    sequence : int
        Position in the lineage: the highest is the newest.
    parent : str or None
        Token of the checkpoint saved or restored before.
    kind : str
        ``regular`` or ``breakpoint``.
    created : float
        Wall clock, seconds since the epoch.
    nbytes, tensor_count : int
        Of all data files, and how many tensors they hold; filled in by `assemble`.
    append, values, per_rank_values : mapping
        Encoded plain values (`core.values`); per-rank ones by name, then by rank as text.
    missing : list of str
        Per-rank entries that a breakpoint lacks, as ``name@rank_r``.
    detail : str
        The reason in a sentence.
    metrics : mapping
        Encoded floats by name, as `step_end` was told; `metric_values` decodes them.
    ephemeral : bool
        Lives until the next publish.
    counted_step : int
        Step that the save schedule counts from: of the last save that was not ephemeral.
    policy : mapping
        ``save`` and ``keep``: `SavePolicy` and `RetentionPolicy` of the run, as plain values; empty where nobody said.
    unknown : mapping
        Facts of a newer minor version; written back unchanged.
    """

    stem: str
    token: str
    attempt: str
    run_id: str
    family: str
    prefix: str
    sequence: int
    step: int
    epoch: int
    step_in_epoch: int
    world_size: int
    format: str
    integrated: bool
    created: float
    parent: str | None = None
    generation: int = 0
    steps_per_epoch: int | None = None
    kind: str = "regular"
    reason: str = ""
    consistent: bool = True
    remove_redundancy: bool = False
    crc_check: bool = False
    chunk_nbytes: int = CHUNK_NBYTES
    plan_hash: str = ""
    writer: str = ""
    nbytes: int = 0
    tensor_count: int = 0
    append: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    per_rank_values: Mapping[str, Any] = field(default_factory=dict)
    missing: Sequence[str] = ()
    detail: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    ephemeral: bool = False
    counted_step: int = 0
    policy: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def metric_values(self) -> dict[str, float]:
        """Metrics by name, decoded."""
        return {name: decode_value(value) for name, value in self.metrics.items()}

    @property
    def has_chosen_name(self) -> bool:
        """Whether the program chose the name, instead of prefix, epoch and step."""
        made = naming.Stem(self.prefix, self.epoch, self.step_in_epoch, self.kind == "breakpoint")
        return self.stem != str(made)

    def may_replace(self, other: Facts) -> bool:
        """Whether this checkpoint may take the name of another: of the same step of the same run, or of any step of
        it where the program wants that name again and again."""
        return self.run_id == other.run_id and (self.step == other.step or self.has_chosen_name)

    def to_json(self) -> dict[str, Any]:
        """Facts by name, JSON-able, the unknown ones last."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unknown"}
        known["missing"] = list(self.missing)
        return {**known, **self.unknown}

    @classmethod
    def from_table(cls, table: Table, path: str) -> Facts:
        """Check the facts of a plan or manifest; FormatError names the first that is missing or of a wrong type."""
        known = {name: table.fact(name, kind, path) for name, kind in _FACT_TYPES.items()}
        # Earlier versions did not write these.
        known |= {name: table.fact(name, kind, path) for name, kind in _OPTIONAL.items() if name in table.facts}
        if known["chunk_nbytes"] != CHUNK_NBYTES:
            raise FormatError(f"{path}: chunks of {known['chunk_nbytes']} bytes", path=path, field="chunk_nbytes")
        for name, low, high in _LIMITS:
            if not low <= known[name] <= high:
                raise FormatError(f"{path}: {name} is {known[name]}", path=path, field=name)
        known["missing"] = tuple(known["missing"])
        if not all(isinstance(entry, str) for entry in known["missing"]):
            raise FormatError(f"{path}: a missing entry is no name", path=path, field="missing")
        if "/" in known["stem"] or known["stem"] in ("", ".", ".."):
            raise FormatError(f"{path}: stem {known['stem']!r} is not a name", path=path, field="stem")
        _check_per_rank(known["per_rank_values"], path)
        if any(type(decode_value(value)) is not float for value in known.get("metrics", {}).values()):
            raise FormatError(f"{path}: a metric is no number", path=path, field="metrics")
        named = {*_FACT_TYPES, *_OPTIONAL}
        return cls(**known, unknown={n: v for n, v in table.facts.items() if n not in named})


_LIMITS = (("world_size", 1, MAX_WORLD_SIZE), ("step", 0, 1 << 62), ("sequence", 0, 1 << 62))
_TEXT, _NUMBER = str, (int, float)
_FACT_TYPES: dict[str, Any] = {
    "stem": _TEXT,
    "token": _TEXT,
    "attempt": _TEXT,
    "run_id": _TEXT,
    "family": _TEXT,
    "prefix": _TEXT,
    "sequence": int,
    "step": int,
    "epoch": int,
    "step_in_epoch": int,
    "world_size": int,
    "format": _TEXT,
    "integrated": bool,
    "created": _NUMBER,
    "parent": (str, type(None)),
    "generation": int,
    "steps_per_epoch": (int, type(None)),
    "kind": _TEXT,
    "reason": _TEXT,
    "consistent": bool,
    "remove_redundancy": bool,
    "crc_check": bool,
    "chunk_nbytes": int,
    "plan_hash": _TEXT,
    "writer": _TEXT,
    "nbytes": int,
    "tensor_count": int,
    "append": dict,
    "values": dict,
    "per_rank_values": dict,
    "missing": list,
}
_OPTIONAL: dict[str, Any] = {"detail": _TEXT, "metrics": dict, "ephemeral": bool, "counted_step": int, "policy": dict}


@dataclass(frozen=True)
class Plan:
    """What the checkpoint must contain; ``boxes.file`` is the rank whose file holds the box.

    For one integrated file the boxes are whole tensors, all in file 0, which root writes.
    ``columns`` are encoded once per plan and reused while it does not change.
    """

    facts: Facts
    tensors: tuple[TensorRow, ...]
    boxes: BoxColumns
    per_rank_values: tuple[tuple[str, int], ...] = ()

    @property
    def nfiles(self) -> int:
        """Number of data files, and of records."""
        return 1 if self.facts.integrated else self.facts.world_size

    def encode(self) -> bytes:
        """The plan file's bytes."""
        blob, ends = join_names([t.name for t in self.tensors])
        facts = {**self.facts.to_json(), "per_rank_value_names": [list(item) for item in self.per_rank_values]}
        columns = {
            "name_bytes": blob,
            "name_ends": ends,
            **tensor_columns(self.tensors),
            "box_tensor": self.boxes.tensor,
            "box_file": self.boxes.file,
            "box_dims": self.boxes.dims,
        }
        return encode(Table("plan", facts, columns))

    @classmethod
    def decode(cls, data: bytes, path: str) -> Plan:
        """Parse and check a plan file."""
        table = decode(data, path, "plan")
        names = split_names(table.column("name_bytes", "u1", path), table.column("name_ends", "<u8", path), path)
        kinds = {"tensor_dtype": "u1", "tensor_rank": "<i4", "tensor_ndim": "u1", "tensor_dims": "<i8"}
        tensors = parse_tensors({name: table.column(name, kind, path) for name, kind in kinds.items()}, names, path)
        boxes = BoxColumns(
            table.column("box_tensor", "<u4", path),
            table.column("box_file", "<u4", path),
            table.column("box_dims", "<i8", path),
        )
        listed = table.fact("per_rank_value_names", list, path)
        if any(not isinstance(x, list) or len(x) != 2 or [type(y) for y in x] != [str, int] for x in listed):
            raise FormatError(f"{path}: per-rank value names are ill-formed", path=path, field="per_rank_value_names")
        known = {name: value for name, value in table.facts.items() if name != "per_rank_value_names"}
        plan = cls(Facts.from_table(Table("plan", known), path), tensors, boxes, tuple((n, r) for n, r in listed))
        check_boxes(tensors, boxes, plan.nfiles, path)
        if any(not 0 <= rank < plan.facts.world_size for _, rank in plan.per_rank_values):
            raise FormatError(f"{path}: a value belongs to no rank", path=path, field="per_rank_value_names")
        return plan


@dataclass(frozen=True)
class Record:
    """What one rank wrote.

    Attributes
    ----------
    path : str
        Data file relative to the checkpoint's directory.
    box_entry, entry_names, box_extents, extent_* :
        As in `Contents`, for this rank's boxes in the plan's order.
    values, per_rank_values : mapping
        Encoded plain values by name: the shared ones this rank writes, and its own.
    """

    token: str
    plan_hash: str
    rank: int
    path: str
    nbytes: int
    chunk_crcs: Column
    box_entry: Column
    box_extents: Column
    extent_start: Column
    extent_byte_offset: Column
    extent_nbytes: Column
    entry_names: tuple[str, ...] = ()
    append: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    per_rank_values: Mapping[str, Any] = field(default_factory=dict)

    _STATIC = ("box_entry", "box_extents", "extent_start", "extent_byte_offset", "extent_nbytes")

    def same_layout(self, other: Record) -> bool:
        """Whether the static columns are equal: then only checksums and values need to travel."""
        return (self.plan_hash, self.entry_names) == (other.plan_hash, other.entry_names) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in self._STATIC
        )

    def encode(self, *, static: bool = True) -> bytes:
        """The record's bytes; without ``static``, only what changes while the plan does not (for the wire)."""
        names = ("token", "plan_hash", "rank", "path", "nbytes", "append", "values", "per_rank_values")
        facts = {name: getattr(self, name) for name in names}
        columns: dict[str, Column] = {"chunk_crc": self.chunk_crcs}
        if static:
            blob, ends = join_names(self.entry_names)
            columns |= {"name_bytes": blob, "name_ends": ends, **{n: getattr(self, n) for n in self._STATIC}}
        return encode(Table("record", facts, columns))

    @classmethod
    def decode(cls, data: bytes, path: str, like: Record | None = None) -> Record:
        """Parse; ``like`` supplies the static columns of a record that came without them."""
        table = decode(data, path, "record")
        facts = {
            name: table.fact(name, kind, path)
            for name, kind in {
                "token": str, "plan_hash": str, "rank": int, "path": str, "nbytes": int,
                "append": dict, "values": dict, "per_rank_values": dict,
            }.items()
        }  # fmt: skip
        check_relative(facts["path"], path)
        _check_per_rank(facts["per_rank_values"], path)
        crcs = table.column("chunk_crc", "<u4", path)
        if facts["nbytes"] < 0 or len(crcs) != chunk_count(facts["nbytes"], CHUNK_NBYTES):
            raise FormatError(f"{path}: {len(crcs)} checksums for {facts['nbytes']} bytes", path=path, field="nbytes")
        if "box_entry" not in table.columns:
            if like is None:
                raise FormatError(f"{path}: the record lacks its boxes", path=path, field="box_entry")
            return replace(like, **facts, chunk_crcs=crcs)
        kinds = dict(zip(cls._STATIC, ("<u4", "<u4", "<u8", "<u8", "<u8"), strict=True))
        static = {name: table.column(name, kind, path) for name, kind in kinds.items()}
        names = split_names(table.column("name_bytes", "u1", path), table.column("name_ends", "<u8", path), path)
        entries, extents = static["box_entry"], static["box_extents"]
        lengths = {len(static[name]) for name in cls._STATIC if name.startswith("extent_")}
        if len(entries) != len(extents) or lengths != {int(extents.sum(dtype="u8"))}:
            raise FormatError(f"{path}: the box columns differ in length", path=path, field="box_extents")
        if len(entries) and int(entries.max()) > len(names):
            raise FormatError(f"{path}: a box has no entry", path=path, field="box_entry")
        columns: dict[str, Any] = {**facts, **static}
        return cls(**columns, chunk_crcs=crcs, entry_names=tuple(names))


@dataclass(frozen=True)
class Manifest:
    """All records of one checkpoint plus its facts."""

    facts: Facts
    contents: Contents

    def encode(self) -> bytes:
        """The manifest file's bytes."""
        return encode(Table("manifest", self.facts.to_json(), self.contents.columns()))

    @classmethod
    def decode(cls, data: bytes, path: str) -> Manifest:
        """Parse and check a manifest file; every index and length in it is bounded afterwards."""
        table = decode(data, path, "manifest")
        facts = Facts.from_table(table, path)
        contents = Contents.from_table(table, path, chunk_nbytes=facts.chunk_nbytes, integrated=facts.integrated)
        return cls(facts, contents)


@dataclass(frozen=True)
class Coverage:
    """What of a plan is not held by the files that are there.

    Attributes
    ----------
    boxes : list of str
        One description for each missing box of a shared tensor.
    per_rank : list of str
        Entries that belonged to absent ranks, as ``name@rank_r``: a breakpoint may do without them.
    """

    boxes: list[str]
    per_rank: list[str]


def coverage(plan: Plan, present: Sequence[int]) -> Coverage:
    """Compare a plan with the files of the ``present`` ranks.

    A box that an absent rank was to write counts as held when a present rank wrote the same box (without
    ``remove_redundancy`` every holder writes it).
    """
    there = np.zeros(plan.nfiles, bool)
    there[list(present)] = True
    per_rank = [
        f"{name}@rank_{rank}" for name, rank in plan.per_rank_values if not there[0 if plan.facts.integrated else rank]
    ]
    boxes: list[str] = []
    absent = np.flatnonzero(~there[plan.boxes.file]) if len(plan.boxes.file) else np.zeros(0, np.int64)
    if len(absent):
        keys = _box_keys(plan)
        held = {keys[row] for row in np.flatnonzero(there[plan.boxes.file]).tolist()}
        for row in absent.tolist():
            tensor = plan.tensors[int(plan.boxes.tensor[row])]
            if keys[row] in held:
                continue
            if tensor.per_rank >= 0:
                per_rank.append(tensor.file_name)
            else:
                boxes.append(f"{tensor.name} of rank {plan.boxes.file[row]}")
    return Coverage(boxes, per_rank)


def _box_keys(plan: Plan) -> list[tuple[int, bytes]]:
    ndims = [2 * len(t.global_shape) for t in plan.tensors]
    keys: list[tuple[int, bytes]] = []
    position = 0
    for tensor in plan.boxes.tensor.tolist():
        keys.append((tensor, plan.boxes.dims[position : position + ndims[tensor]].tobytes()))
        position += ndims[tensor]
    return keys


def assemble(plan: Plan, records: Sequence[Record], facts: Facts) -> Manifest:
    """Put the manifest together.

    Parameters
    ----------
    plan : Plan
        What was to be written.
    records : sequence of Record
        One for each file, ascending by rank; ranks may be absent when coverage holds without them.
    facts : Facts
        The plan's facts, with what became known since (reason, missing entries).

    Raises
    ------
    IntegrityError
        If a record does not belong to this plan.
    """
    for record in records:
        if record.token != plan.facts.token or record.plan_hash != plan.facts.plan_hash:
            raise IntegrityError(
                f"the record of rank {record.rank} belongs to another save "
                f"(token {record.token}, expected {plan.facts.token})"
            )
    ranks = [record.rank for record in records]
    if ranks != sorted(set(ranks)) or (ranks and not 0 <= ranks[0] <= ranks[-1] < plan.nfiles):
        raise IntegrityError(f"records of the ranks {ranks} for {plan.nfiles} files")
    renumber = np.full(plan.nfiles, -1, np.int64)
    renumber[ranks] = np.arange(len(ranks))
    boxes = _kept_boxes(plan, renumber)
    names: list[str] = []
    entries: list[Column] = []
    for record in records:
        entries.append(np.where(record.box_entry > 0, record.box_entry + len(names), 0))
        names.extend(record.entry_names)
    contents = Contents(
        tensors=plan.tensors,
        files=tuple(StoredFile(r.path, r.nbytes, np.asarray(r.chunk_crcs, "<u4")) for r in records),
        boxes=boxes,
        box_entry=_joined(entries, "<u4"),
        entry_names=tuple(names),
        box_extents=_joined([r.box_extents for r in records], "<u4"),
        extent_start=_joined([r.extent_start for r in records], "<u8"),
        extent_byte_offset=_joined([r.extent_byte_offset for r in records], "<u8"),
        extent_nbytes=_joined([r.extent_nbytes for r in records], "<u8"),
        chunk_nbytes=facts.chunk_nbytes,
        integrated=facts.integrated,
    )
    contents._check("manifest being assembled")
    totals: dict[str, Any] = {"nbytes": sum(record.nbytes for record in records), "tensor_count": len(plan.tensors)}
    return Manifest(replace(facts, **_merged_values(records), **totals), contents)


def _kept_boxes(plan: Plan, renumber: Column) -> BoxColumns:
    """The plan's boxes in files that are there, in file order, with files renumbered."""
    if not len(plan.boxes.file):
        return plan.boxes
    file = renumber[plan.boxes.file]
    if np.all(file >= 0) and np.all(np.diff(file) >= 0):
        return BoxColumns(plan.boxes.tensor, file.astype("<u4"), plan.boxes.dims)
    ndims = np.array([2 * len(t.global_shape) for t in plan.tensors], "<i8")[plan.boxes.tensor]
    starts = np.concatenate([np.zeros(1, "<i8"), np.cumsum(ndims)])
    rows = [row for row in np.argsort(file, kind="stable").tolist() if file[row] >= 0]
    dims = [plan.boxes.dims[starts[row] : starts[row + 1]] for row in rows]
    return BoxColumns(plan.boxes.tensor[rows], file[rows].astype("<u4"), _joined(dims, "<i8"))


def _merged_values(records: Sequence[Record]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    append: dict[str, Any] = {}
    per_rank: dict[str, dict[str, Any]] = {}
    for record in records:
        values.update(record.values)
        append.update(record.append)
        # In one integrated file root's record carries every rank's values: name -> rank -> value.
        for name, by_rank in record.per_rank_values.items():
            per_rank.setdefault(name, {}).update(by_rank)
    return {"values": values, "append": append, "per_rank_values": per_rank}


def _check_per_rank(found: Mapping[str, Any], path: str) -> None:
    """Per-rank values are by name, then by rank in decimal digits."""
    for name, by_rank in found.items():
        if not isinstance(by_rank, dict) or any(not (key.isascii() and key.isdigit()) for key in by_rank):
            raise FormatError(f"{path}: values of {name!r} are not by rank", path=path, field="per_rank_values")


def _joined(parts: Sequence[Column], dtype: str) -> Column:
    return np.concatenate([np.asarray(part, dtype) for part in parts]) if parts else np.zeros(0, dtype)
