"""save_checkpoint against MindSpore's own: random states and arguments; the same verdict, and the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn

import parckpt

TYPES = [
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
]
NAMES = ["w", "w.bias", "net.w", "head.weight", "emb", "步骤", "a b", "x.y.z"]
SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (2, 3), (1, 1), (4, 1, 2), (300,)]
OBJECTS = ["list", "list", "parameters", "cell", "dict of parameters", 5, None, "text", (1, 2), {1, 2}]
APPEND = [None, {}, {"epoch_num": 3, "step_num": 7}, {"lr": 0.1, "flag": True, "big": 2**63, "least": -(2**63)}]
APPEND += [
    {"note": "text"},
    {"note": ""},
    {"f": np.float64(0.1)},
    {"huge": 1e300},
    [1],
    {"a": None},
    {1: 1},
    {"a": [1]},
]
APPEND += [{"a": b"x"}, {"a": np.float32(1)}, {"a": np.int64(1)}, "epoch_num", 0, {"a": 2**64}]
ARGUMENTS: dict[str, list[Any]] = {
    "name": ["o.ckpt", "o", "o.x", "sub/o", "nodir/o", ".", "", "sub", 5, None, b"o", "o.safetensors", "../here/o"],
    "integrated_save": [True, False, 1, None, "True"],
    "async_save": [False, 1, None, "x", "Thread", [], 0.0],
    "append_dict": APPEND,
    "enc_key": [None, None, "0" * 16, bytearray(16), b"", b"0" * 5, b"0" * 17, 1],
    "enc_mode": ["AES-GCM", "AES-CBC", "xx", "", None, 1],
    "choice_func": [None, lambda name: "w" in name, lambda name: 0],
    "crc_check": [False, True, True, 1, None],
    "format": ["ckpt", "safetensors", "safetensors", "xx", "", None, ".ckpt", "CKPT", 1],
    "incremental": [False, True],
    "global_step_num": [None, 1],
    "remove_redundancy": [None, True, False, 1, "x"],
}


def random_state(source: random.Random) -> dict[str, Any]:
    numbers = np.random.default_rng(source.randrange(2**32))
    found = {}
    for name in source.sample(NAMES, source.randint(1, 5)):
        type_name = source.choice(TYPES)
        values = np.asarray(numbers.integers(0, 2 if type_name == "bool" else 100, source.choice(SHAPES)))
        found[name] = values.astype(type_name)
    if source.random() < 0.2:
        found["note"] = "text 步"
    return found


@contextmanager
def in_directory(path: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


class Net(nn.Cell):
    def __init__(self, parameters: dict[str, ms.Parameter]) -> None:
        super().__init__()
        for number, parameter in enumerate(parameters.values()):
            setattr(self, f"p{number}", parameter)


def attempt(save: Any, call: dict[str, Any]) -> tuple[dict[str, bytes], BaseException | None]:
    """The files that a call leaves in a fresh directory, and what it raised."""
    shutil.rmtree("here", ignore_errors=True)
    Path("here/sub").mkdir(parents=True)
    call = dict(call)
    error: BaseException | None = None
    try:
        with warnings.catch_warnings(), in_directory("here"):
            warnings.simplefilter("ignore")
            save(call.pop("save_obj"), call.pop("name"), **call)
    except Exception as problem:
        error = problem
    files = {
        str(path.relative_to("here")): path.read_bytes() for path in sorted(Path("here").rglob("*")) if path.is_file()
    }
    return {name: data for name, data in files.items() if not name.endswith(".manifest")}, error


def parsed(name: str, data: bytes) -> Any:
    """Of safetensors the order of the metadata is by chance."""
    if not name.endswith(".safetensors"):
        return data
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_random_saves() -> None:
    source = random.Random(515)
    counts: Counter[str] = Counter()
    for number in range(400):
        state = random_state(source)
        call: dict[str, Any] = {"name": "o"}
        kind = "dict"
        names = source.sample(sorted(ARGUMENTS), source.choice([0, 1, 1, 2, 2, 3, 4]))
        call |= {name: source.choice(ARGUMENTS[name]) for name in names}
        if source.random() < 0.4:
            kind = source.choice(OBJECTS)
        mine: Any = state if kind == "dict" else kind
        other: Any = mine
        if kind == "list":
            only = {n: v for n, v in state.items() if not isinstance(v, str)}
            mine = [{"name": n, "data": v} for n, v in only.items()]
            other = [{"name": n, "data": ms.Parameter(ms.Tensor(v), name=n)} for n, v in only.items()]
        elif kind in ("parameters", "cell", "dict of parameters"):
            only = {n: ms.Parameter(ms.Tensor(v), name=n) for n, v in state.items() if not isinstance(v, str)}
            state = dict(only)
            mine = other = {"parameters": list(only.values()), "cell": Net(only), "dict of parameters": only}[kind]
        their_files, their_error = attempt(ms.save_checkpoint, {"save_obj": other, **call})
        our_files, our_error = attempt(parckpt.save_checkpoint, {"save_obj": mine, **call})
        where = f"{number}: {kind} {describe(state)} {call}: {their_error!r} against {our_error!r}"
        if difference := deliberate(call, state, our_error):
            counts[difference] += 1
        elif their_error is not None:
            assert isinstance(our_error, kind_of(their_error)), where
            assert isinstance(our_error, parckpt.ParckptError), where
            assert our_files == {}, where
            counts["refused by both"] += 1
        else:
            assert our_error is None, where
            assert {name: parsed(name, data) for name, data in our_files.items()} == {
                name: parsed(name, data) for name, data in their_files.items()
            }, where
            counts["equal"] += 1
    assert min(counts["equal"], counts["refused by both"]) > 100, counts
    assert sum(counts.values()) - counts["equal"] - counts["refused by both"] < 20, counts


def deliberate(call: dict[str, Any], state: dict[str, Any], our_error: BaseException | None) -> str | None:
    """What is different on purpose."""
    key, append = call.get("enc_key"), call.get("append_dict")
    if isinstance(key, bytes) and isinstance(our_error, parckpt.ConfigError) and "enc_key must have" in str(our_error):
        return "a key of a wrong length is refused at once, and not where there is something to encrypt"
    if append == {"a": 2**64} and isinstance(our_error, parckpt.ConfigError):
        return "a number of more than 64 bits is a ValueError, not a RuntimeError"
    if call.get("format") == "safetensors" and "note" in state and our_error is None:
        return "texts of the state are kept in the manifest where the file can hold none"
    return None


def kind_of(error: BaseException) -> type[BaseException]:
    """The class to find here; the safetensors library's own errors are our ValueErrors."""
    kinds = (IsADirectoryError, FileNotFoundError, TypeError)
    return next((kind for kind in kinds if isinstance(error, kind)), ValueError)


def describe(arrays: dict[str, Any]) -> dict[str, Any]:
    return {n: a if isinstance(a, str) else f"{a.dtype}{list(a.shape)}" for n, a in arrays.items()}
