"""Appended info: values that stand beside the tensors in every file, and in full precision in the manifest."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from parckpt.core import dtypes, values
from parckpt.core.adapting import as_leaf
from parckpt.core.leaves import Leaf
from parckpt.errors import FormatError

__all__ = ["decode", "encode", "settle"]


def settle(append: Mapping[str, Any] | None, epoch: int, step: int) -> dict[str, Any]:
    """The values of one save: counters are start value plus current value, arrays are read from where they live.

    Parameters
    ----------
    append : mapping or None
        `CheckpointConfig.append_dict`.
    epoch, step : int
        Present epoch and global step.
    """
    found: dict[str, Any] = {}
    for name, value in (append or {}).items():
        if name == "epoch_num":
            found[name] = value + epoch
        elif name == "step_num":
            found[name] = value + step
        elif (leaf := value if isinstance(value, Leaf) else as_leaf(value)) is not None:
            array = np.empty(leaf.shape, leaf.dtype.numpy)
            leaf.read_into(array)
            found[name] = array
        else:
            found[name] = value
    return found


def encode(value: Any) -> Any:
    """Turn a settled value into JSON-able data; an array becomes ``{"array": [dtype, shape, base64]}``."""
    if not isinstance(value, np.ndarray):
        return values.encode(value)
    dtype = dtypes.from_numpy(value.dtype)
    data = np.ascontiguousarray(value, dtype.numpy).tobytes()
    return {"array": [dtype.name, list(value.shape), base64.b64encode(data).decode("ascii")]}


def decode(data: Any) -> Any:
    """The reverse of `encode`; FormatError for anything else."""
    if not (isinstance(data, dict) and set(data) == {"array"}):
        return values.decode(data)
    try:
        name, shape, text = data["array"]
        dtype = dtypes.by_name(name)
        content = base64.b64decode(text, validate=True)
        if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f"{len(content)} bytes for shape {shape}")
        if dtype.name == "bool" and content.strip(b"\0\1"):
            raise ValueError("bytes that are no bool")
        return np.frombuffer(content, dtype.numpy).reshape(shape).copy()  # numpy refuses what no array can be
    except (TypeError, ValueError, KeyError, binascii.Error) as error:
        raise FormatError("an appended array is ill-formed", field="append") from error
