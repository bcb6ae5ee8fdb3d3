"""How arrays differ, and cutting boxes into slabs."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from parckpt.core import dtypes
from parckpt.core.difference import MAX_EXAMPLES, Delta, slabs
from parckpt.core.layout import Box, range_boxes, shift, tiling_problem, whole

pytestmark = pytest.mark.fast


def _delta(a: Any, b: Any, dtype: Any = None, offsets: tuple[int, ...] | None = None) -> Delta:
    left, right = np.array(a, dtype), np.array(b, dtype)
    found = Delta()
    found.add(left, right, Box(offsets or (0,) * left.ndim, left.shape))
    return found


def test_equal_bits_are_equal() -> None:
    assert _delta([math.nan, 0.0, math.inf], [math.nan, 0.0, math.inf]) == Delta()
    assert _delta([], []) == Delta()
    signed = _delta([0.0, 1.0], [-0.0, 1.0])
    assert (signed.differing, signed.largest, signed.nonfinite) == (1, 0.0, 0)


def test_where_and_how_much() -> None:
    a = np.zeros((3, 4), "f4")
    b = a.copy()
    b[1, 2], b[2, 3] = -7, 5
    found = _delta(a, b, offsets=(10, 20))
    assert (found.differing, found.largest) == (2, 7.0)
    assert found.largest_at is not None
    assert (found.largest_at.index, found.largest_at.a, found.largest_at.b) == ((11, 22), 0.0, -7.0)
    assert [one.index for one in found.examples] == [(11, 22), (12, 23)]


def test_several_boxes_add_up() -> None:
    found = Delta()
    for row, change in enumerate((1.0, 3.0, 2.0)):
        found.add(np.zeros((1, 2)), np.full((1, 2), change), Box((row, 0), (1, 2)))
    assert (found.differing, found.largest) == (6, 3.0)
    assert found.largest_at is not None
    assert found.largest_at.index == (1, 0)


@pytest.mark.parametrize(
    ("dtype", "a", "b", "largest"),
    [
        ("int64", -(2**63), 2**63 - 1, 2**64 - 1),
        ("uint64", 0, 2**64 - 1, 2**64 - 1),
        ("int8", -128, 127, 255),
        ("bool", True, False, 1),
        ("float16", 65504, -65504, 131008.0),
        (ml_dtypes.bfloat16, 3.0, 1.0, 2.0),
        (ml_dtypes.float8_e4m3fn, 448.0, -448.0, 896.0),
        ("complex64", 3 + 4j, 0, 5.0),
        ("complex128", 1j, -1j, 2.0),
    ],
)
def test_exact_for_every_kind(dtype: Any, a: Any, b: Any, largest: Any) -> None:
    found = _delta([a], [b], dtype)
    assert (found.differing, found.nonfinite) == (1, 0)
    assert found.largest == largest
    assert type(found.largest) is type(largest)
    assert found.largest_at is not None
    assert type(found.largest_at.a) in (bool, int, float, complex)
    assert found.largest_at.a == a


def test_every_element_type_can_be_compared() -> None:
    for code in range(1, 19):
        dtype = dtypes.by_code(code).numpy
        bits = np.arange(16 * dtype.itemsize, dtype="u1")
        a = (bits & 1 if dtype.kind == "b" else bits).view(dtype)
        found = Delta()
        found.add(a, a[::-1].copy(), whole(a.shape))
        expected = sum(a[k].tobytes() != a[15 - k].tobytes() for k in range(16))
        assert found.differing == expected > 0


def test_what_is_not_finite_is_counted_apart() -> None:
    found = _delta([math.nan, math.inf, 1.0, 2.0], [1.0, -math.inf, math.nan, 2.5])
    assert (found.differing, found.nonfinite, found.largest) == (4, 3, 0.5)
    nothing = _delta([math.nan], [0.0])
    assert (nothing.differing, nothing.nonfinite, nothing.largest, nothing.largest_at) == (1, 1, None, None)


def test_examples_are_bounded_and_blocks_join() -> None:
    count = (1 << 20) + 5
    a, b = np.zeros(count, "i1"), np.ones(count, "i1")
    b[-1] = 9
    found = _delta(a, b)
    assert (found.differing, found.largest, len(found.examples)) == (count, 9, MAX_EXAMPLES)
    assert found.largest_at is not None
    assert found.largest_at.index == (count - 1,)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 1, 6), (2, 3, 4), (1, 1, 9, 2), (5, 0, 2)])
@pytest.mark.parametrize("limit", [1, 2, 5, 8, 1000])
def test_slabs_tile_in_order(shape: tuple[int, ...], limit: int) -> None:
    box = Box(tuple(range(len(shape))), shape)
    found = list(slabs(box, limit))
    assert sum(part.size for part, _ in found) == box.size
    position = 0
    for part, start in found:
        assert 0 < part.size <= limit
        assert start == position
        (expected,) = range_boxes(shape, start, start + part.size)
        assert part == shift(expected, [-o for o in box.offsets])
        position += part.size
    if found and shape:
        local = [shift(part, box.offsets) for part, _ in found]
        arrays = [np.array([getattr(one, name) for one in local], np.int64) for name in ("offsets", "shape")]
        assert tiling_problem(shape, *arrays) is None
