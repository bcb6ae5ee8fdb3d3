"""From matched names to the caller's arrays: where bytes are put, and what is done once all have come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from parckpt.core import values
from parckpt.core.contents import Contents
from parckpt.core.flat import FlatState, TensorLeaf
from parckpt.core.layout import whole
from parckpt.core.leaves import Leaf
from parckpt.core.readplan import Want
from parckpt.core.target import Matched, Slot
from parckpt.core.transfer import Port
from parckpt.errors import StateMismatchError

__all__ = ["Filling", "make_filling"]

Array = npt.NDArray[Any]


@dataclass
class Filling:
    """The ports of one restore, and the steps that complete it.

    Attributes
    ----------
    wants : list of Want
        What this rank wants.
    ports : dict
        Where each goes.
    arrays : dict
        Tensor name to the arrays that were allocated (a list where the state has a list).
    names : set of str
        Tensors of the state that are changed by the time `finish` has run.
    """

    wants: list[Want] = field(default_factory=list)
    ports: dict[Want, list[Port]] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    _direct: dict[str, set[str]] = field(default_factory=dict)  # stored name -> state names filled without a buffer
    _values: dict[str, Any] = field(default_factory=dict)
    _afterwards: list[Callable[[], object]] = field(default_factory=list)
    _old: dict[str, list[Array]] = field(default_factory=dict)

    def want(self, tensor: int, box: Any, array: Array, dtype: np.dtype[Any]) -> None:
        """Ask for a box to be put into an array."""
        wanted = Want(tensor, box)
        if wanted not in self.ports:
            self.wants.append(wanted)
        self.ports.setdefault(wanted, []).append(Port(array, dtype))

    def overwritten(self, touched: Iterable[str]) -> set[str]:
        """State names of the caller's arrays that bytes of these stored tensors went straight into."""
        return {name for stored in touched for name in self._direct.get(stored, ())}

    def settle(self, matched: Matched, per_rank: Mapping[str, Mapping[str, Any]], rank: int, size: int) -> None:
        """Once every byte has come, make everything that `finish` hands out. Nothing of the caller's is changed.

        Calls user code (``on_resize``); its errors are the caller's to agree on.

        Raises
        ------
        StateMismatchError
            If ``on_resize`` gave an array of another shape.
        """
        self._values.update((name, values.decode(value)) for name, value in matched.values.items())
        for resize in matched.resizes:
            leaf = resize.leaf
            assert callable(leaf.on_resize)
            if isinstance(leaf, TensorLeaf):
                old: list[Any] = list(self._old.get(leaf.name, []))
                self._put(leaf, leaf.on_resize(old, rank, size))
            else:
                by_rank = per_rank[resize.stored_name]
                old = [values.decode(by_rank[key]) for key in sorted(by_rank, key=int)]
                self._values[leaf.name] = leaf.on_resize(old, rank, size)

    def finish(self, flat: FlatState) -> Any:
        """Hand out and write back. Returns the rebuilt state.

        Calls user code (``write_from``); its errors are the caller's to agree on.
        """
        for step in self._afterwards:
            step()
        for leaf in flat.values:
            if leaf.name in self._values:
                leaf.write_back(self._values[leaf.name])
        return flat.rebuild(self.arrays, self._values)

    def _put(self, leaf: TensorLeaf, new: Any) -> None:
        piece = leaf.pieces[0]
        array: Array = np.asarray(new)
        if array.shape != piece.shape:
            raise StateMismatchError(
                f"on_resize of {leaf.name!r} gave shape {array.shape}, expected {piece.shape}", mismatched=[leaf.name]
            )
        array = np.array(array, leaf.dtype.numpy)  # a copy: what on_resize returned may be one of the old arrays
        source = piece.source
        self.names.add(leaf.name)
        if isinstance(source, np.ndarray):
            self._afterwards.append(lambda: _assign(source, array))
        elif isinstance(source, Leaf):
            write_from = source.write_from
            assert write_from is not None
            self._afterwards.append(lambda: write_from(_read_only(array)))
        else:
            self.arrays[leaf.name] = array


def make_filling(contents: Contents, matched: Matched, *, atomic: bool) -> Filling:
    """Allocate what must be allocated and say where each wanted box goes.

    Parameters
    ----------
    atomic : bool
        Arrays are filled in a second buffer first, so that a failed restore leaves them alone.
    """
    filling = Filling()
    several: dict[str, list[Any]] = {}
    for slot in matched.slots:
        array = _target(filling, contents, slot, atomic)
        if slot.piece.source is None:
            if slot.leaf.several:
                several.setdefault(slot.leaf.name, []).append(array)
            else:
                filling.arrays[slot.leaf.name] = array
    filling.arrays.update(several)
    for resize in matched.resizes:
        for row in resize.tensors:
            tensor = contents.tensors[row]
            array = np.empty(tensor.global_shape, tensor.dtype.numpy)
            filling._old.setdefault(resize.leaf.name, []).append(array)
            filling.want(row, whole(tensor.global_shape), array, tensor.dtype.numpy)
    return filling


def _target(filling: Filling, contents: Contents, slot: Slot, atomic: bool) -> Array:
    """The array that the bytes of a slot go into; a second one where they need another step afterwards."""
    stored = contents.tensors[slot.tensor].dtype
    source = slot.piece.source
    converts = stored != slot.leaf.dtype
    if source is not None:
        filling.names.add(slot.leaf.name)
    # A stored shape may have more trailing ones than the state's; the state's stays.
    ones = (..., *[np.newaxis] * (len(slot.box.shape) - len(slot.piece.shape)))
    if isinstance(source, np.ndarray) and not converts and not atomic:
        filling._direct.setdefault(contents.tensors[slot.tensor].name, set()).add(slot.leaf.name)
        filling.want(slot.tensor, slot.box, source[ones], stored.numpy)
        return source
    array: Array = np.empty(slot.piece.shape, stored.numpy)
    filling.want(slot.tensor, slot.box, array[ones], stored.numpy)
    if isinstance(source, np.ndarray):
        filling._afterwards.append(lambda: _assign(source, array))
        return source
    if isinstance(source, Leaf):
        write_from, dtype = source.write_from, slot.leaf.dtype.numpy
        assert write_from is not None
        filling._afterwards.append(lambda: _hand_over(write_from, array, dtype))
        return array
    if not converts:
        return array
    converted: Array = np.empty(slot.piece.shape, slot.leaf.dtype.numpy)
    filling._afterwards.append(lambda: _assign(converted, array))
    return converted


def _assign(target: Array, array: Array) -> None:
    target[...] = array.astype(target.dtype) if array.dtype != target.dtype else array


def _hand_over(write_from: Callable[[Array], object], array: Array, dtype: np.dtype[Any]) -> None:
    write_from(_read_only(array if array.dtype == dtype else array.astype(dtype)))


def _read_only(array: Array) -> Array:
    view: Array = array.view()
    view.flags.writeable = False
    return view
