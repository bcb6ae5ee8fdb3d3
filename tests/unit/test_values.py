"""Plain values as JSON: spelled as documented, and hostile input refused."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from parckpt.core.values import decode, encode, is_plain
from parckpt.errors import ConfigError, ConfigTypeError, FormatError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (2**53, 2**53),
        (2**53 + 1, {"int": "20000000000001"}),
        (-(2**64), {"int": "-10000000000000000"}),
        (0.1, 0.1),
        (float("inf"), {"float": "7ff0000000000000"}),
        ("é", "é"),
        ("\ud800", {"text": "eda080"}),
        (b"\x00\xff", {"bytes": "AP8="}),
        ([1, [2]], [1, [2]]),
        ((1, ()), {"tuple": [1, {"tuple": []}]}),
        ({"int": 3}, {"dict": [["int", 3]]}),
        ({1: "a", (2,): None}, {"dict": [[1, "a"], [{"tuple": [2]}, None]]}),
        (np.float32(1), {"numpy": ["float32", "0000803f"]}),
        (np.bool_(True), {"numpy": ["bool", "01"]}),
        (ml_dtypes.bfloat16(1), {"numpy": ["bfloat16", "803f"]}),
    ],
    ids=repr,
)
def test_spelling(value, spelled):
    assert encode(value) == spelled
    back = decode(json.loads(json.dumps(spelled)))
    assert (type(back), back) == (type(value), value)


@pytest.mark.parametrize("bits", [0x7FF8000000000001, 0xFFF800000000BEEF, 0x8000000000000000, 0x0000000000000001])
def test_floats_keep_every_bit(bits):
    (value,) = struct.unpack("<d", bits.to_bytes(8, "little"))
    back = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert int.from_bytes(struct.pack("<d", back), "little") == bits
    scalar = decode(json.loads(json.dumps(encode(np.float64(value)))))
    assert type(scalar) is np.float64
    assert scalar.tobytes() == bits.to_bytes(8, "little")


@pytest.mark.parametrize(
    "value", [{1}, object(), 1j, bytearray(1), np.zeros(1), [np.zeros(1)], {"a": {3j}}, np.str_("x"), range(2)]
)
def test_what_is_not_plain(value):
    assert not is_plain(value)
    with pytest.raises(ConfigTypeError):
        encode(value)


def test_self_reference_and_depth():
    loop = [1]
    loop += [loop, loop]
    deep = []
    for _ in range(100):
        deep = [deep]
    for value in (loop, deep):
        assert not is_plain(value)
        with pytest.raises(ConfigError, match="64"):
            encode(value)
    with pytest.raises(FormatError, match="64"):
        decode(deep)
    fine = []
    for _ in range(60):
        fine = [fine]
    assert decode(encode(fine)) == fine


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"int": "1", "float": "2"},
        {"integer": "1"},
        {"int": 1},
        {"int": ""},
        {"int": "0x1"},
        {"int": "1_0"},
        {"int": " 1"},
        {"int": "٣"},
        {"float": "7ff0"},
        {"float": "zz"},
        {"float": 1.0},
        {"text": "ff"},
        {"text": "é"},
        {"bytes": "a"},
        {"bytes": "é"},
        {"bytes": None},
        {"tuple": {}},
        {"tuple": [{"int": None}]},
        {"dict": {"a": 1}},
        {"dict": [[1]]},
        {"dict": [["a", 1], ["a", 2]]},
        {"dict": [[1, 1], [True, 2]]},
        {"dict": [[[], 1]]},
        {"numpy": ["float32"]},
        {"numpy": ["float32", "00"]},
        {"numpy": ["bool", "02"]},
        {"numpy": ["object", "00"]},
        {"numpy": [[], ""]},
        {"numpy": None},
        {"numpy": ["float32", 3]},
        float("nan"),
        float("inf"),
        "\ud800",
        object(),
    ],
    ids=repr,
)
def test_hostile_input_is_a_format_error(data):
    with pytest.raises(FormatError):
        decode(data)
    with pytest.raises(FormatError):
        decode([{"dict": [["x", data]]}])


def test_messages_do_not_repeat_huge_input():
    with pytest.raises(FormatError) as caught:
        decode({"int": "x" * 10**6})
    assert len(str(caught.value)) < 200
