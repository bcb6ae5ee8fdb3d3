"""Rectangles between file windows and arrays, against plain numpy indexing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core.contents import Extent
from parckpt.core.dtypes import by_name
from parckpt.core.layout import Box, intersect, slices
from parckpt.core.transfer import Copy, Port, copies, extract, insert
from parckpt.testing.strategies import shapes

pytestmark = pytest.mark.fast

U4 = np.dtype("<u4")


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, extent - 1)) for extent in shape)
    return Box(offsets, tuple(draw(st.integers(1, e - o)) for e, o in zip(shape, offsets, strict=True)))


def laid_out(kind: str, values: np.ndarray) -> np.ndarray:
    """The same values in other memory."""
    if kind == "fortran" and values.ndim:  # numpy makes a 0-d array 1-d there
        return np.asfortranarray(values)
    if kind == "swapped":
        return values.astype(values.dtype.newbyteorder(">"))
    if kind == "strided":
        wide = np.zeros((*values.shape, 3), values.dtype)
        wide[..., 1] = values
        return wide[..., 1]
    return values.copy()


KINDS = st.sampled_from(["plain", "fortran", "swapped", "strided"])


def windows(nbytes: int, width: int) -> list[tuple[int, int]]:
    return [(first, min(first + width, nbytes)) for first in range(0, nbytes, width)]


@given(st.data(), KINDS, st.integers(1, 9))
def test_any_windows_of_a_file_fill_exactly_what_both_boxes_have(data: st.DataObject, kind: str, width: int) -> None:
    shape = data.draw(shapes(max_ndim=3, max_extent=5, min_extent=1))
    stored = data.draw(boxes_in(shape))
    held = data.draw(st.one_of(st.just(stored), boxes_in(shape)))
    full = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2**32, shape, dtype=U4)
    origin = (0,) * len(shape)
    content = np.ascontiguousarray(full[slices(stored, origin)]).reshape(-1).view(np.uint8)
    cut = data.draw(st.integers(0, content.size))
    extents = [Extent(0, 10, cut), Extent(cut, 13 + cut, content.size - cut)]
    file = np.full(content.size + 18, 255, np.uint8)
    file[10 : 10 + cut], file[13 + cut : 13 + content.size] = content[:cut], content[cut:]

    target = laid_out(kind, np.full(held.shape, 7, U4))
    port = Port(target, U4)
    sent = 0
    for window in windows(file.size, width):
        part = file[window[0] : window[1]]
        # The sender does not know how the receiver holds it: the packed bytes are the same.
        packed = [extract(c, part) for c in copies(stored, extents, 4, window, held, flat=True)]
        stream = np.concatenate([np.zeros(0, np.uint8), *packed])
        for copy in copies(stored, extents, 4, window, held, flat=port.flat):
            assert np.array_equal(stream[: copy.nbytes], extract(copy, part))
            if data.draw(st.booleans()):
                port.pull(copy, part)
            else:
                port.store(copy, stream[: copy.nbytes])
            stream = stream[copy.nbytes :]
            sent += copy.nbytes
        assert stream.size == 0
    common = intersect(stored, held)
    expected = np.full(held.shape, 7, U4)
    if common is not None:
        expected[slices(common, held.offsets)] = full[slices(common, origin)]
    assert sent == (0 if common is None else common.size * 4)
    assert np.array_equal(target, expected)


@given(st.data(), KINDS, st.integers(1, 9))
def test_pushing_all_held_parts_makes_the_file(data: st.DataObject, kind: str, width: int) -> None:
    shape = data.draw(shapes(max_ndim=3, max_extent=5, min_extent=1))
    stored, held = data.draw(boxes_in(shape)), Box((0,) * len(shape), shape)
    # numpy 1 widens a 0-d product.
    full = np.asarray(np.arange(np.prod(shape, dtype=int), dtype=U4).reshape(shape) * 0x01020304, U4)
    content = np.ascontiguousarray(full[slices(stored, (0,) * len(shape))]).reshape(-1).view(np.uint8)
    port = Port(laid_out(kind, full), U4)
    by_push, by_load = np.zeros(content.size + 3, np.uint8), np.zeros(content.size + 3, np.uint8)
    for first, last in windows(content.size + 3, width):
        for copy in copies(stored, [Extent(0, 3, content.size)], 4, (first, last), held, flat=port.flat):
            port.push(copy, by_push[first:last])
            packed = np.empty(copy.nbytes, np.uint8)
            port.load(copy, packed)
            insert(copy, by_load[first:last], packed)
    assert by_push.tobytes() == by_load.tobytes() == bytes(3) + content.tobytes()


@pytest.mark.parametrize("name", ["bfloat16", "bool", "complex128", "float8_e4m3fn"])
def test_element_types_are_only_bytes(name: str) -> None:
    dtype = by_name(name).numpy
    bits = np.arange(6 * dtype.itemsize, dtype=np.uint8) % 2
    values = bits.view(dtype).reshape(2, 3)
    target = np.zeros((3, 2), dtype).T
    port = Port(target, dtype)
    box = Box((0, 0), (2, 3))
    for window in windows(bits.size, 5):
        for copy in copies(box, [Extent(0, 0, bits.size)], dtype.itemsize, window, box, flat=port.flat):
            port.pull(copy, bits[window[0] : window[1]])
    assert np.ascontiguousarray(target).tobytes() == values.tobytes()


def test_equal_boxes_of_plain_memory_are_one_run() -> None:
    box = Box((4, 0), (100, 7))
    found = copies(box, [Extent(0, 16, 2800)], 4, (8, 1000), box, flat=True)
    assert found == [Copy(8, (984,), (slice(0, 984),), (slice(0, 984),), 984)]


def test_boxes_that_do_not_meet_have_nothing_in_common() -> None:
    extents = [Extent(0, 0, 16)]
    assert copies(Box((0,), (4,)), extents, 4, (0, 16), Box((4,), (4,)), flat=True) == []
    assert copies(Box((0,), (4,)), extents, 4, (16, 32), Box((0,), (4,)), flat=True) == []
