"""CheckpointConfig against MindSpore's own class: random calls, the same verdict and the same properties."""

from __future__ import annotations

import random
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, train

import parckpt

CALLS = 3000
NETWORK = nn.Dense(2, 3)
TENSOR, PARAMETER = ms.Tensor([1.0, 2.0], ms.float32), ms.Parameter(ms.Tensor([3], ms.int32), "p")
GENERATOR = ms.Generator()

NUMBERS = [None, 0, 1, 2, 7, 100, 10**12, -1, True, False, 1.0, float("nan"), "1", [1], np.int64(3), np.bool_(True)]
FLAGS = [True, False, 1, 0, None, "True", np.bool_(True)]
VALUES: dict[str, list[Any]] = {
    "save_checkpoint_steps": NUMBERS,
    "save_checkpoint_seconds": NUMBERS,
    "keep_checkpoint_max": NUMBERS,
    "keep_checkpoint_per_n_minutes": NUMBERS,
    "integrated_save": FLAGS,
    "async_save": [True, False, "thread", "process", "Thread", "abc", "", 1, 0, None, []],
    "saved_network": [None, NETWORK, "x", 1, {}, nn.Dense],
    "append_info": [
        None,
        [],
        (),
        "epoch_num",
        {},
        0,
        ["epoch_num"],
        ["step_num", "epoch_num"],
        ["step_num", "step_num"],
        ["epoch"],
        [1],
        [None],
        [{}],
        [{"lr": 0.1, "n": 3, "b": True, "s": "text"}],
        [{"lr": np.float64(0.1)}],
        [{"lr": np.float32(0.1)}],
        [{"n": np.int64(1)}],
        [{"x": None}],
        [{"x": b"1"}],
        [{"x": 1j}],
        [{"x": [1]}],
        [{1: 1}],
        [{"a": 1}, {"b": 2}],
        ["step_num", {"step_num": 400, "epoch_num": 10}],
        ["epoch_num", {"epoch_num": 2.5}, "step_num"],
        [{"tensor": TENSOR}, "step_num"],
        [{"parameter": PARAMETER}],
        [{"generator": GENERATOR}],
        [{"step_num": TENSOR}],
        [{"epoch_num": "s"}],
        [{"huge": 2**64}],
        [{"array": np.arange(3)}],
        [{"leaf": parckpt.Leaf((1,), "float32", lambda out: None)}],
    ],
    "enc_key": [None, b"k" * 16, b"k" * 24, b"k" * 32, b"", b"k" * 5, "str", bytearray(16), 1],
    "enc_mode": ["AES-GCM", "AES-CBC", "SM4-CBC", "aes-gcm", "XXX", "", None, 1],
    "exception_save": FLAGS,
    "crc_check": FLAGS,
    "remove_redundancy": FLAGS,
    "format": ["ckpt", "safetensors", "hdf5", "CKPT", ".ckpt", "", None, 1],
    "incremental": [False, True, None, 1, "x"],
    "enable_redundance": [False, True, None, "x"],
    "choice_func": [None, len],
    "save_checkpoint_step": [5],
}
PROPERTIES = [
    "save_checkpoint_steps",
    "save_checkpoint_seconds",
    "keep_checkpoint_max",
    "keep_checkpoint_per_n_minutes",
    "integrated_save",
    "async_save",
    "saved_network",
    "append_dict",
    "enc_key",
    "enc_mode",
    "exception_save",
    "crc_check",
    "remove_redundancy",
    "format",
    "map_param_inc",
    "enable_redundance",
]
NOT_MINDSPORES = {"choice_func", "save_checkpoint_step"}
KEYS = {"AES-GCM": (16, 24, 32), "AES-CBC": (16, 24, 32), "SM4-CBC": (16,)}


def is_hopeless(call: dict[str, Any]) -> bool:
    """What docs/compatibility.md says is refused at once: it fails later in MindSpore, or writes useless files."""
    key, mode, form = call.get("enc_key"), call.get("enc_mode", "AES-GCM"), call.get("format", "ckpt")
    given = [element for element in call.get("append_info") or () if isinstance(element, dict)]
    return bool(
        NOT_MINDSPORES & set(call)
        or (isinstance(mode, str) and mode not in KEYS)
        or (isinstance(key, bytes) and len(key) not in KEYS.get(mode, ()))
        or (isinstance(form, str) and form not in ("ckpt", "safetensors", "hdf5"))
        or (key is not None and call.get("crc_check") is True)
        or (form == "hdf5" and (key is not None or mode != "AES-GCM" or call.get("incremental")))
        # A counter that is no number cannot be counted on; and 64 bits are what files have.
        or any(type(d.get("epoch_num", 0)) is str or d.get("step_num") is TENSOR or d.get("huge") for d in given)
    )


def as_mindspore_takes_it(call: dict[str, Any]) -> dict[str, Any]:
    """The call without what docs/compatibility.md says is allowed here only."""
    asked = dict(call)
    if isinstance(asked.get("saved_network"), dict):
        asked["saved_network"] = NETWORK
    if asked.get("format") == "safetensors":
        for name in ("crc_check", "exception_save"):
            if asked.get(name) is True:
                asked[name] = False
    if isinstance(asked.get("append_info"), list) and any(map(holds_ours, asked["append_info"])):
        asked["append_info"] = [{"tensor": TENSOR}]
    return asked


def holds_ours(element: Any) -> bool:
    """Whether an element of append_info is a dict with an array or a Leaf."""
    return isinstance(element, dict) and any(type(v) in (np.ndarray, parckpt.Leaf) for v in element.values())


def is_mindspores(call: dict[str, Any]) -> bool:
    asked = as_mindspore_takes_it(call)
    return not is_hopeless(call) and all(asked[name] is call[name] for name in call)


def random_call(source: random.Random) -> dict[str, Any]:
    """Mostly one to four arguments, good and bad ones."""
    names = source.sample(sorted(VALUES), source.choice([1, 1, 2, 2, 3, 4, 8]))
    return {name: source.choice(VALUES[name]) for name in names}


def outcome(make: Any, call: dict[str, Any]) -> tuple[Any, Exception | None]:
    try:
        return make(**call), None
    except (TypeError, ValueError) as error:
        return None, error


def test_random_calls_have_the_same_verdict_and_the_same_properties() -> None:
    source = random.Random(20260)
    counts = {"equal": 0, "refused by both": 0, "refused here only": 0}
    for number in range(CALLS):
        call = random_call(source)
        theirs, their_error = outcome(train.CheckpointConfig, as_mindspore_takes_it(call))
        ours, our_error = outcome(parckpt.CheckpointConfig, call)
        where = f"call {number}: {call}: {their_error!r} against {our_error!r}"
        if is_hopeless(call):
            assert our_error is not None, where
            counts["refused here only"] += their_error is None
        elif their_error is not None:
            assert isinstance(our_error, TypeError if isinstance(their_error, TypeError) else ValueError), where
            counts["refused by both"] += 1
        else:
            assert our_error is None, where
            same_properties(call, ours, theirs, where)
            counts["equal"] += 1
    # Each kind really occurred, many times.
    assert min(counts.values()) > 200, counts


def same_properties(call: dict[str, Any], ours: Any, theirs: Any, where: str) -> None:
    given_here_only = {name for name, value in as_mindspore_takes_it(call).items() if value is not call[name]}
    for name in PROPERTIES:
        asked = "append_info" if name == "append_dict" else name
        if asked not in given_here_only:
            assert getattr(ours, name) == getattr(theirs, name), f"{where}: {name}"
    assert list(ours.get_checkpoint_policy()) == list(theirs.get_checkpoint_policy()), where
    for name, value in theirs.get_checkpoint_policy().items():
        if name not in given_here_only:
            assert ours.get_checkpoint_policy()[name] is value or ours.get_checkpoint_policy()[name] == value, where


@pytest.mark.parametrize("name", [name for name in PROPERTIES if name != "enable_redundance"])
def test_what_cannot_be_assigned_there_cannot_be_assigned_here(name: str) -> None:
    theirs, ours = train.CheckpointConfig(), parckpt.CheckpointConfig()
    try:
        setattr(theirs, name, getattr(theirs, name))
    except AttributeError:
        with pytest.raises(AttributeError):
            setattr(ours, name, getattr(ours, name))
    else:
        setattr(ours, name, getattr(ours, name))
        assert getattr(ours, name) == getattr(theirs, name)


def test_the_first_fourteen_by_position() -> None:
    source = random.Random(14)
    for _ in range(200):
        call = {name: source.choice(VALUES[name][:2]) for name in list(VALUES)[: source.randint(0, 14)]}
        given = list(call.values())
        theirs, their_error = outcome(lambda *, given: train.CheckpointConfig(*given), {"given": given})
        ours, our_error = outcome(lambda *, given: parckpt.CheckpointConfig(*given), {"given": given})
        if not is_mindspores(call):
            continue
        assert (their_error is None) == (our_error is None), given
        if ours is not None:
            same_properties(call, ours, theirs, str(given))
