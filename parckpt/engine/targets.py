"""Where restored bytes go: wanted boxes in the caller's memory, and counts that prove they were filled exactly once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from parckpt.core.contents import Contents
from parckpt.core.layout import Box, intersect, slices
from parckpt.core.readplan import Delivery, Segment, Want
from parckpt.core.transfer import Copy, Port, copies
from parckpt.errors import InternalError

__all__ = ["Sink", "Target"]

Bytes = npt.NDArray[np.uint8]


class Target:
    """One wanted box and its array.

    Attributes
    ----------
    nbytes, filled : int
        Bytes of the box, and how many were stored so far.
    """

    def __init__(self, box: Box, port: Port) -> None:
        self.box, self.port = box, port
        self.nbytes = box.size * port.dtype.itemsize
        self.filled = 0

    def copies(self, segment: Segment, window: tuple[int, int]) -> tuple[Port, list[Copy]]:
        """Rectangles of a segment in a file window, and the port they go to.

        Their bytes one after the other are the same for every way of holding the box, so the sender need not know it.
        """
        held, port = self.box, self.port
        if intersect(segment.stored.box, held) != segment.part:
            # Stored boxes overlap and this one gives only what no other does: aim at that part of the array alone.
            held, port = segment.part, Port(port.array[slices(segment.part, held.offsets)], port.dtype)
        stored = segment.stored
        return port, copies(stored.box, stored.extents, port.dtype.itemsize, window, held, flat=port.flat)

    def pull(self, segment: Segment, window: tuple[int, int], data: Bytes) -> None:
        """Take a segment out of the bytes of a file window."""
        port, found = self.copies(segment, window)
        for copy in found:
            port.pull(copy, data)
            self.filled += copy.nbytes

    def store(self, segment: Segment, window: tuple[int, int], packed: Bytes) -> None:
        """Take a segment from the front of packed bytes."""
        port, found = self.copies(segment, window)
        position = 0
        for copy in found:
            port.store(copy, packed[position : position + copy.nbytes])
            position += copy.nbytes
        self.filled += position

    def check(self, name: str) -> None:
        """InternalError unless every byte was filled, once."""
        if self.filled != self.nbytes:
            raise InternalError(f"{self.filled} of {self.nbytes} bytes of {self.box} of {name!r} were filled")


class Sink:
    """All boxes that one rank wants.

    Parameters
    ----------
    ports : mapping
        Want to the places that its bytes go to, all of them; asked for when bytes come, not kept.
    on_filled : callable, optional
        Called with a want when its last byte is in place.
    """

    def __init__(
        self,
        contents: Contents,
        wants: Sequence[Want],
        ports: Mapping[Want, Sequence[Port]],
        on_filled: Callable[[Want], None] | None = None,
    ) -> None:
        self._contents, self._wants, self._ports = contents, wants, ports
        self._on_filled = on_filled or (lambda want: None)
        self._filled = [0] * len(wants)
        self._touched: dict[str, None] = {}

    @property
    def touched(self) -> tuple[str, ...]:
        """Names of the tensors that were written to."""
        return tuple(self._touched)

    def begin(self) -> None:
        """Report the empty wants: nothing comes for them."""
        for want in self._wants:
            if want.box.is_empty:
                self._on_filled(want)

    def pull(self, delivery: Delivery, window: tuple[int, int], data: Bytes) -> None:
        """Take a delivery out of the bytes of a file window."""
        for segment in delivery.segments:
            targets = self._touch(segment)
            for target in targets:
                target.pull(segment, window, data)
            self._count(segment, targets)

    def store(self, delivery: Delivery, window: tuple[int, int], packed: Bytes) -> None:
        """Take a delivery from packed bytes."""
        for segment in delivery.segments:
            targets = self._touch(segment)
            for target in targets:
                target.store(segment, window, packed)
            packed = packed[self._count(segment, targets) :]

    def check(self) -> None:
        """InternalError unless every byte of every want was filled, once."""
        for number, filled in enumerate(self._filled):
            if filled != self._nbytes(number):
                want = self._wants[number]
                name = self._contents.tensors[want.tensor].name
                raise InternalError(f"{filled} of {self._nbytes(number)} bytes of {want.box} of {name!r} were filled")

    def _nbytes(self, number: int) -> int:
        want = self._wants[number]
        return want.box.size * self._contents.tensors[want.tensor].dtype.itemsize

    def _touch(self, segment: Segment) -> list[Target]:
        want = self._wants[segment.want]
        targets = [Target(want.box, port) for port in self._ports[want]]
        if not targets:
            raise InternalError(f"nowhere to put {want.box} of {self._contents.tensors[want.tensor].name!r}")
        self._touched[self._contents.tensors[want.tensor].name] = None
        return targets

    def _count(self, segment: Segment, targets: list[Target]) -> int:
        nbytes = targets[0].filled
        self._filled[segment.want] += nbytes
        if nbytes and self._filled[segment.want] == self._nbytes(segment.want):
            self._on_filled(self._wants[segment.want])
        return nbytes
