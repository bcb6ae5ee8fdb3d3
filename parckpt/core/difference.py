"""How two arrays of one type differ: how many elements, by how much at most, and where.

Elements differ when their bits do: a NaN equals a NaN of the same bits, and 0.0 differs from -0.0. That is what a
restore gives back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core.layout import Box

__all__ = ["MAX_EXAMPLES", "Delta", "Element", "slabs"]

MAX_EXAMPLES = 10
_BLOCK = 1 << 20  # elements at a time: differences are taken in eight or sixteen bytes each, however small the type

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Element:
    """One element that differs: its index in the whole tensor, and its two values as Python numbers."""

    index: tuple[int, ...]
    a: Any
    b: Any


@dataclass
class Delta:
    """What is known of one tensor's differences so far.

    Attributes
    ----------
    differing : int
        Elements whose bits differ.
    largest : int or float or None
        The largest absolute difference of two finite numbers, exact for integers; None while there is none.
    largest_at : Element or None
        Where it is.
    nonfinite : int
        Differing elements of which one or both are NaN or infinite.
    examples : list of Element
        The first that differ, at most `MAX_EXAMPLES`, in the order in which they were looked at.
    """

    differing: int = 0
    largest: int | float | None = None
    largest_at: Element | None = None
    nonfinite: int = 0
    examples: list[Element] = field(default_factory=list)

    def add(self, a: Array, b: Array, box: Box) -> None:
        """Compare two C-contiguous little-endian arrays of one type that hold the same box of the tensor."""
        left, right = a.reshape(-1), b.reshape(-1)
        if not np.array_equal(left.view(np.uint8), right.view(np.uint8)):
            for start in range(0, left.size, _BLOCK):
                self._add(left[start : start + _BLOCK], right[start : start + _BLOCK], box, start)

    def _add(self, a: Array, b: Array, box: Box, start: int) -> None:
        at = np.flatnonzero(_bits_differ(a, b))
        if not len(at):
            return
        self.differing += len(at)
        left, right = a[at], b[at]
        size, finite = _sizes(left, right)
        self.nonfinite += len(at) - int(np.count_nonzero(finite))
        for k in range(min(len(at), MAX_EXAMPLES - len(self.examples))):
            self.examples.append(_element(box, start + int(at[k]), left[k], right[k]))
        if not finite.any():
            return
        most = int(np.argmax(np.where(finite, size, 0)))
        value = size[most].item()
        if finite[most] and (self.largest is None or value > self.largest):
            self.largest, self.largest_at = value, _element(box, start + int(at[most]), left[most], right[most])


def _bits_differ(a: Array, b: Array) -> npt.NDArray[np.bool_]:
    if a.dtype.itemsize == 16:
        pairs: npt.NDArray[np.bool_] = (a.view("<u8") != b.view("<u8")).reshape(-1, 2).any(axis=1)
        return pairs
    kind = f"<u{a.dtype.itemsize}"
    found: npt.NDArray[np.bool_] = a.view(kind) != b.view(kind)
    return found


def _sizes(a: Array, b: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Absolute differences, and where both are finite; where not, the difference means nothing."""
    if a.dtype.kind in "iu":
        # In unsigned arithmetic the wrap-around is undone: exact even between the ends of int64.
        high, low = np.maximum(a, b), np.minimum(a, b)
        exact = high.astype("<u8") - low.astype("<u8")
        return exact, np.ones(len(a), np.bool_)
    if a.dtype.kind == "b":
        return np.ones(len(a), "<u8"), np.ones(len(a), np.bool_)
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    left, right = a.astype(wide), b.astype(wide)
    finite = np.isfinite(left) & np.isfinite(right)
    with np.errstate(all="ignore"):
        return np.abs(left - right), finite


def _element(box: Box, position: int, a: Any, b: Any) -> Element:
    local = np.unravel_index(position, box.shape) if box.shape else ()
    index = tuple(int(i) + o for i, o in zip(local, box.offsets, strict=True))
    return Element(index, _number(a), _number(b))


def _number(value: Any) -> Any:
    """A Python number; of types that numpy itself does not know (bfloat16), too."""
    return value.item() if type(value).__module__ == "numpy" else float(value)


def slabs(box: Box, nelements: int) -> Iterator[tuple[Box, int]]:
    """Cut a box into boxes of at most so many elements, each a range of its C order; with the range's first element.

    Not much smaller either, where the shape allows: whole rows of the outermost dimension whose rows fit.
    """
    if box.is_empty:
        return
    if not box.shape:
        yield box, 0
        return
    axis, inner = 0, box.size // box.shape[0]
    while inner > nelements:
        axis += 1
        inner //= box.shape[axis]
    rows = max(1, nelements // inner)
    extent = box.shape[axis]
    for outer in range(box.size // (inner * extent)):
        lead = np.unravel_index(outer, box.shape[:axis]) if axis else ()
        head = [o + int(i) for o, i in zip(box.offsets[:axis], lead, strict=True)]
        for row in range(0, extent, rows):
            count = min(rows, extent - row)
            offsets = (*head, box.offsets[axis] + row, *box.offsets[axis + 1 :])
            shape = (*(1,) * axis, count, *box.shape[axis + 1 :])
            yield Box(offsets, shape), (outer * extent + row) * inner
