"""decode(encode(x)) is x in value, type and bits; any JSON gives a value or FormatError."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core.state import flatten
from parckpt.core.values import decode, encode, is_plain
from parckpt.errors import FormatError

pytestmark = pytest.mark.fast

NUMPY_TYPES = [np.bool_, np.int8, np.uint16, np.int64, np.uint64, np.float16, np.float32, np.float64, np.complex128]
NUMPY_TYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e5m2]


@st.composite
def numpy_scalars(draw):
    dtype = np.dtype(draw(st.sampled_from(NUMPY_TYPES)))
    raw = bytes([draw(st.integers(0, 1))]) if dtype.kind == "b" else draw(st.binary(min_size=dtype.itemsize))
    return np.frombuffer(raw[: dtype.itemsize], dtype)[0]


text = st.text(st.characters(exclude_categories=()), max_size=8)
hashable = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), text, st.binary(max_size=8))
scalars = st.one_of(hashable, st.floats(), numpy_scalars())
plain = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(hashable, st.tuples(hashable, hashable)), inner, max_size=4),
    ),
    max_leaves=20,
)


def bits(value):
    """Something that is equal exactly if two values are, down to types, order and NaN payloads."""
    kind = type(value).__name__
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    if isinstance(value, float):
        return kind, struct.pack(">d", value)
    if isinstance(value, (list, tuple)):
        return kind, [bits(item) for item in value]
    if isinstance(value, dict):
        return kind, [(bits(key), bits(item)) for key, item in value.items()]
    return kind, value


@given(plain)
def test_round_trip_through_strict_json(value):
    assert is_plain(value)
    text = json.dumps(encode(value), allow_nan=False)
    text.encode("utf-8")
    assert bits(decode(json.loads(text))) == bits(value)


json_like = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["int", "float", "text", "bytes", "tuple", "dict", "numpy", "x"]), inner),
    ),
    max_leaves=12,
)


@given(json_like)
def test_any_json_gives_a_plain_value_or_format_error(data):
    try:
        value = decode(data)
    except FormatError:
        return
    assert is_plain(value)
    assert bits(decode(encode(value))) == bits(value)


# Text keys have letters only, so that no two names are alike.
keys = st.one_of(st.integers(-3, 3), st.text("abc", min_size=1, max_size=2))
states = st.recursive(
    st.one_of(st.just(np.zeros(1)), scalars),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=12,
)


@given(st.dictionaries(keys, states))
def test_rebuilding_with_nothing_new_gives_the_state_back(state):
    flat = flatten(state, writable=True)

    def same(a, b):
        if isinstance(a, dict) and isinstance(b, dict):
            return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(map(same, a, b))
        return a is b

    assert same(flat.rebuild({}, {}), state)
    found = [*flat.tensors, *flat.values]
    assert len({leaf.name for leaf in found}) == len(found)
