"""Plain values in a form that JSON can carry: what comes back is equal in value, type and bits.

None, booleans, text, lists, integers up to 2**53 and finite floats stand for themselves. All else is an object with
one member whose name says what it is: ``int``, ``float``, ``text``, ``bytes``, ``tuple``, ``dict``, ``numpy``. A dict
is always written as ``{"dict": [[key, value], ...]}``, so it can never be mistaken for one of those.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from parckpt.core import dtypes
from parckpt.errors import ConfigError, ConfigTypeError, FormatError

__all__ = ["decode", "encode", "is_plain", "is_scalar"]

# Readers nest one call per level; 64 is far above real configurations and far below the interpreter's limit.
_MAX_DEPTH = 64
# Above this other JSON readers round integers to a double.
_MAX_JSON_INT = 1 << 53
_HEX_INT = re.compile(r"-?[0-9a-f]+")


def is_plain(value: Any) -> bool:
    """True if `encode` can keep it exactly: scalars, numpy scalars, and lists, tuples and dicts of them.

    Subclasses (an enum member, a named tuple, an OrderedDict) are not plain: they would come back as something else.
    """
    return _is_plain(value, ())


def _is_plain(value: Any, above: tuple[int, ...]) -> bool:
    kind = type(value)
    if kind not in (list, tuple, dict):
        return is_scalar(value)
    if id(value) in above or len(above) >= _MAX_DEPTH:
        return False
    inside = (*above, id(value))
    if kind is dict and not all(_is_plain(key, inside) for key in value):
        return False
    return all(_is_plain(item, inside) for item in (value.values() if kind is dict else value))


def is_scalar(value: Any) -> bool:
    """True for a plain value that is not a container."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return True
    return isinstance(value, np.generic) and _numpy_name(value) is not None


def encode(value: Any) -> Any:
    """Turn a plain value into JSON-able data.

    Raises
    ------
    ConfigTypeError
        For a type that is not plain.
    ConfigError
        If it nests deeper than 64 levels, or holds itself.
    """
    return _encode(value, ())


def decode(data: Any) -> Any:
    """Turn what `encode` made (and JSON carried) back into the value.

    Raises
    ------
    FormatError
        For anything `encode` cannot have made.
    """
    return _decode(data, 0)


def _encode(value: Any, above: tuple[int, ...]) -> Any:
    kind = type(value)
    if kind in (list, tuple, dict):
        if id(value) in above or len(above) >= _MAX_DEPTH:
            raise ConfigError(f"a plain value nests deeper than {_MAX_DEPTH} levels, or holds itself")
        return _encode_container(value, (*above, id(value)))
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if -_MAX_JSON_INT <= value <= _MAX_JSON_INT else {"int": format(value, "x")}
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if kind is str:
        return value if _is_utf8(value) else {"text": value.encode("utf-8", "surrogatepass").hex()}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, np.generic):
        name = _numpy_name(value)
        if name is not None:
            little = np.asarray(value).astype(dtypes.by_name(name).numpy)
            return {"numpy": [name, little.tobytes().hex()]}
    raise ConfigTypeError(f"{kind.__module__}.{kind.__qualname__} is not a plain value")


def _encode_container(value: Any, above: tuple[int, ...]) -> Any:
    if type(value) is dict:
        return {"dict": [[_encode(key, above), _encode(item, above)] for key, item in value.items()]}
    items = [_encode(item, above) for item in value]
    return items if type(value) is list else {"tuple": items}


def _numpy_name(value: np.generic) -> str | None:
    try:
        return dtypes.from_numpy(value.dtype).name
    except ConfigTypeError:
        return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _decode(data: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise FormatError(f"a value nests deeper than {_MAX_DEPTH} levels")
    if data is None or isinstance(data, (bool, int)):
        return data
    if isinstance(data, str):
        if not _is_utf8(data):
            raise FormatError(f"not text: {_excerpt(data)}")
        return data
    if isinstance(data, float):
        if not math.isfinite(data):
            raise FormatError(f"{data} is not a JSON number")
        return data
    if isinstance(data, list):
        return [_decode(item, depth + 1) for item in data]
    if isinstance(data, dict) and len(data) == 1:
        ((tag, content),) = data.items()
        if tag == "tuple" and isinstance(content, list):
            return tuple(_decode(item, depth + 1) for item in content)
        if tag == "dict" and isinstance(content, list):
            return _dict(_decode_pair(item, depth + 1) for item in content)
        if tag == "numpy":
            return _numpy(content)
        if tag in _SCALARS and isinstance(content, str):
            return _scalar(tag, content)
    raise FormatError(f"not an encoded value: {_excerpt(data)}")


def _decode_pair(item: Any, depth: int) -> tuple[Any, Any]:
    if not isinstance(item, list) or len(item) != 2:
        raise FormatError(f"a dict entry must be a pair, not {_excerpt(item)}")
    return _decode(item[0], depth), _decode(item[1], depth)


def _dict(items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in items:
        try:
            taken = key in found
        except TypeError as error:
            raise FormatError(f"a dict key cannot be of type {type(key).__name__}") from error
        if taken:
            raise FormatError(f"a dict has two entries {_excerpt(key)}")
        found[key] = value
    return found


def _int(text: str) -> int:
    if not _HEX_INT.fullmatch(text):
        raise ValueError(text)
    return int(text, 16)


def _float(text: str) -> float:
    (value,) = struct.unpack(">d", bytes.fromhex(text))
    return float(value)


def _text(text: str) -> str:
    return bytes.fromhex(text).decode("utf-8", "surrogatepass")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text.encode("ascii"), validate=True)


_SCALARS: dict[str, Callable[[str], Any]] = {"int": _int, "float": _float, "text": _text, "bytes": _bytes}


def _scalar(tag: str, text: str) -> Any:
    try:
        return _SCALARS[tag](text)
    except (ValueError, struct.error, binascii.Error) as error:
        raise FormatError(f"not an encoded {tag}: {_excerpt(text)}") from error


def _numpy(content: Any) -> Any:
    try:
        name, text = content
        row, raw = dtypes.by_name(name), bytes.fromhex(text)
        if len(raw) != row.itemsize or (row.name == "bool" and raw not in (b"\0", b"\1")):
            raise ValueError(text)
    except (TypeError, ValueError, KeyError) as error:
        raise FormatError(f"not an encoded numpy scalar: {_excerpt(content)}") from error
    return np.frombuffer(raw, row.numpy)[0]


def _excerpt(data: Any) -> str:
    """A short form for messages: what is quoted comes from a file and may be huge."""
    if isinstance(data, str):
        return ascii(data[:40])
    return f"a {type(data).__name__}"
