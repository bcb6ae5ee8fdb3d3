"""The one form of manifest, record and plan: facts as JSON, columns as arrays, a SHA-256 over all of it.

The bytes are a small safetensors file, so any safetensors reader opens it and ``head -c`` shows the facts:

* header length (8 bytes, little-endian), JSON header padded with spaces to a multiple of 8, column data;
* ``__metadata__`` holds one entry per fact, its value JSON text; ``facts_sha256`` covers the others, so that a listing
  can trust the facts without reading the columns (`peek`);
* the last tensor is ``sha256``: 32 bytes, the digest of every byte before it. It is checked before anything is parsed.

Facts and columns that this version does not know survive decode and encode.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core import dtypes
from parckpt.errors import ChecksumError, FormatError, TruncatedError, UnsupportedVersionError

__all__ = ["VERSION", "Column", "Table", "decode", "encode", "join_names", "peek", "split_names"]

VERSION = 1  # of the facts and columns; a reader refuses a higher one
_DIGEST = "sha256"
_FACTS_DIGEST = "facts_sha256"
_KIND = "parckpt"
_VERSION = "parckpt_version"
_DIGEST_NBYTES = 32
# A header names columns and facts only, never shards, so it stays small however large the job is; plain values of
# the state are facts, and 256 MiB of those is a mistake.
MAX_HEADER_NBYTES = 256 << 20

Column = npt.NDArray[Any]


@dataclass(frozen=True)
class Table:
    """Facts and numeric columns.

    Attributes
    ----------
    kind : str
        ``manifest``, ``record`` or ``plan``.
    facts : mapping
        JSON values by name.
    columns : mapping
        One-dimensional little-endian arrays by name.
    """

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Column] = field(default_factory=dict)

    def fact(self, name: str, kind: type | tuple[type, ...], path: str = "?") -> Any:
        """A required fact of a given type; FormatError if it is missing or of another type."""
        value = self.facts.get(name)
        # bool is an int to isinstance, never to us.
        wrong_bool = isinstance(value, bool) and kind is not bool and not (isinstance(kind, tuple) and bool in kind)
        if not isinstance(value, kind) or wrong_bool:
            raise FormatError(f"{path}: fact {name!r} is {value!r}", path=path, field=name)
        return value

    def column(self, name: str, dtype: str, path: str = "?") -> Column:
        """A required column of a given numpy type; FormatError if it is missing or of another type."""
        values = self.columns.get(name)
        if values is None or values.dtype != np.dtype(dtype) or values.ndim != 1:
            found = "nothing" if values is None else f"{values.dtype}{list(values.shape)}"
            raise FormatError(f"{path}: column {name!r} should be {dtype}, found {found}", path=path, field=name)
        return values


def encode(table: Table) -> bytes:
    """Serialize; equal tables give equal bytes."""
    header: dict[str, Any] = {"__metadata__": _metadata(table)}
    position = 0
    for name, values in table.columns.items():
        dtype = dtypes.from_numpy(values.dtype)
        header[name] = {
            "dtype": dtype.safetensors,
            "shape": list(values.shape),
            "data_offsets": [position, position + values.nbytes],
        }
        position += values.nbytes
    header[_DIGEST] = {
        "dtype": "U8",
        "shape": [_DIGEST_NBYTES],
        "data_offsets": [position, position + _DIGEST_NBYTES],
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-len(text) % 8)
    parts: list[Any] = [len(text).to_bytes(8, "little"), text]
    parts += [
        np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes() for values in table.columns.values()
    ]
    body = b"".join(parts)
    return body + hashlib.sha256(body).digest()


def decode(data: bytes | memoryview, path: str, kind: str | None = None) -> Table:
    """Parse and check.

    Parameters
    ----------
    data : bytes
        The whole file.
    path : str
        Named in errors.
    kind : str, optional
        The kind that is expected.

    Raises
    ------
    TruncatedError, ChecksumError
        Damage: too short, or the digest does not match.
    UnsupportedVersionError
        A newer parckpt wrote it.
    FormatError
        The digest matches but the content makes no sense.
    """
    view = memoryview(data)
    if len(view) < 8 + 2 + _DIGEST_NBYTES:
        raise TruncatedError(f"{path}: {len(view)} bytes are too few for a {kind or 'table'}", path=path)
    body, digest = view[:-_DIGEST_NBYTES], view[-_DIGEST_NBYTES:]
    if hashlib.sha256(body).digest() != bytes(digest):
        raise ChecksumError(f"{path}: damaged, its SHA-256 does not match", path=path)
    header, start = _header(body, path)
    columns = _columns(header, body, start, path)
    table = _table(header, columns, path)
    if kind is not None and table.kind != kind:
        raise FormatError(f"{path}: expected a {kind}, found a {table.kind}", path=path, field="kind")
    return table


def peek(read: Callable[[int, int], bytes], nbytes: int, path: str, kind: str | None = None) -> Table:
    """Parse the facts alone.

    Parameters
    ----------
    read : callable
        ``read(byte_offset, nbytes)`` returns exactly those bytes of the file.
    nbytes : int
        Length of the file.

    Returns
    -------
    Table
        Without columns. Its facts are checked, the columns are not.

    Raises
    ------
    TruncatedError, ChecksumError, UnsupportedVersionError, FormatError
        As `decode`.
    """
    if nbytes < 8 + 2 + _DIGEST_NBYTES:
        raise TruncatedError(f"{path}: {nbytes} bytes are too few for a {kind or 'table'}", path=path)
    length = int.from_bytes(read(0, 8), "little")
    if length > min(nbytes - 8 - _DIGEST_NBYTES, MAX_HEADER_NBYTES):
        raise ChecksumError(f"{path}: damaged, its header cannot have {length} of {nbytes} bytes", path=path)
    try:
        header = json.loads(read(8, length))
        end = max(info["data_offsets"][1] for name, info in header.items() if name != "__metadata__")
        metadata = dict(header["__metadata__"])
        digest = metadata.pop(_FACTS_DIGEST)
        sound = digest == json.dumps(_facts_digest(metadata)) and type(end) is int
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise ChecksumError(f"{path}: damaged, its header cannot be read", path=path) from error
    if not sound:
        raise ChecksumError(f"{path}: damaged, the SHA-256 of its facts does not match", path=path)
    table = _table(header, {}, path)
    if kind is not None and table.kind != kind:
        raise FormatError(f"{path}: expected a {kind}, found a {table.kind}", path=path, field="kind")
    if 8 + length + end != nbytes:
        raise TruncatedError(f"{path}: {nbytes} bytes, its header says {8 + length + end}", path=path)
    return table


def join_names(names: list[str] | tuple[str, ...]) -> tuple[Column, Column]:
    """Strings to (UTF-8 bytes, end position of each)."""
    encoded = [name.encode("utf-8") for name in names]
    ends = np.cumsum([len(part) for part in encoded], dtype="<u8") if encoded else np.zeros(0, "<u8")
    return np.frombuffer(b"".join(encoded), "u1"), np.asarray(ends, "<u8")


def split_names(blob: Column, ends: Column, path: str) -> list[str]:
    """The reverse of `join_names`; FormatError if the ends are not ascending within the bytes or not UTF-8."""
    limits = np.concatenate([np.zeros(1, "<u8"), ends])
    if len(ends) and (np.any(limits[1:] < limits[:-1]) or int(ends[-1]) != len(blob)):
        raise FormatError(f"{path}: the name table is inconsistent", path=path, field="name_ends")
    data = blob.tobytes()
    try:
        return [data[a:b].decode("utf-8") for a, b in zip(limits[:-1].tolist(), limits[1:].tolist(), strict=True)]
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: a name is not UTF-8", path=path, field="name_bytes") from error


def _metadata(table: Table) -> dict[str, str]:
    facts = {_KIND: table.kind, _VERSION: VERSION, **table.facts}
    texts = {name: json.dumps(value, separators=(",", ":"), allow_nan=False) for name, value in facts.items()}
    return {**texts, _FACTS_DIGEST: json.dumps(_facts_digest(texts))}


def _facts_digest(texts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode("ascii")).hexdigest()


def _header(body: memoryview, path: str) -> tuple[dict[str, Any], int]:
    nbytes = int.from_bytes(body[:8], "little")
    if nbytes > min(len(body) - 8, MAX_HEADER_NBYTES):
        raise FormatError(f"{path}: header of {nbytes} bytes in {len(body)}", path=path, byte_offset=0, field="header")
    try:
        header = json.loads(bytes(body[8 : 8 + nbytes]))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: header is not JSON: {error}", path=path, byte_offset=8, field="header") from error
    if not isinstance(header, dict):
        raise FormatError(f"{path}: header is not an object", path=path, byte_offset=8, field="header")
    return header, 8 + nbytes


def _columns(header: dict[str, Any], body: memoryview, start: int, path: str) -> dict[str, Column]:
    available = len(body) - start
    columns: dict[str, Column] = {}
    position = 0
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, (count,), (first, stop) = info["dtype"], info["shape"], info["data_offsets"]
            row = dtypes.by_safetensors(dtype)
            sound = row is not None and all(type(x) is int for x in (count, first, stop))
        except (TypeError, ValueError, KeyError) as error:
            raise FormatError(f"{path}: column {name!r} is ill-formed", path=path, field=name) from error
        if row is None or not sound or first != position or count < 0 or stop - first != count * row.itemsize:
            raise FormatError(f"{path}: column {name!r} has a wrong place or size", path=path, field=name)
        position = stop
        if name == _DIGEST:
            if stop - first != _DIGEST_NBYTES or first != available:
                raise FormatError(f"{path}: the digest is not the last column", path=path, field=name)
            return columns
        if stop > available:
            raise FormatError(f"{path}: column {name!r} lies outside the file", path=path, field=name)
        columns[name] = np.frombuffer(body[start + first : start + stop], row.numpy)
    raise FormatError(f"{path}: no digest column", path=path, field=_DIGEST)


def _finite(text: str) -> float:
    """A number as JSON has it: no NaN and no infinity, so that what was read can be written again."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not JSON")
    return value


def _table(header: dict[str, Any], columns: dict[str, Column], path: str) -> Table:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict):
        raise FormatError(f"{path}: no facts", path=path, field="__metadata__")
    facts: dict[str, Any] = {}
    for name, text in metadata.items():
        try:
            facts[name] = json.loads(text, parse_constant=_finite, parse_float=_finite)
        except (TypeError, ValueError, RecursionError) as error:
            raise FormatError(f"{path}: fact {name!r} is not JSON", path=path, field=name) from error
    kind, version = facts.pop(_KIND, None), facts.pop(_VERSION, None)
    facts.pop(_FACTS_DIGEST, None)
    if not isinstance(kind, str) or type(version) is not int:
        raise FormatError(f"{path}: no kind or version", path=path, field="version")
    if version > VERSION:
        raise UnsupportedVersionError(
            f"{path}: written in version {version} of the format, this parckpt reads up to {VERSION}: update parckpt",
            path=path,
            field="version",
        )
    return Table(kind, facts, columns)
