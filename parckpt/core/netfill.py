"""Filling a state from a dict of whole arrays by MindSpore's rules: all is checked before anything is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from parckpt.core import dtypes, netrules
from parckpt.core.adapting import as_leaf
from parckpt.core.dtypes import DType
from parckpt.core.flat import FlatState, LocalPiece, TensorLeaf, ValueLeaf
from parckpt.core.layout import Box, slices
from parckpt.core.leaves import Leaf, plain_array
from parckpt.core.values import is_plain
from parckpt.errors import ConfigError, ConfigTypeError, StateMismatchError

__all__ = ["Fill", "Part", "check_entries", "complaints", "put"]

Array = npt.NDArray[Any]
L = TypeVar("L", TensorLeaf, ValueLeaf)


@dataclass(frozen=True, eq=False)
class Part:
    """One piece of the state and the array that fills it, already of the piece's type."""

    leaf: TensorLeaf
    piece: LocalPiece
    array: Array


@dataclass
class Fill:
    """What will be done to a state.

    Attributes
    ----------
    parts : list of Part
    values : list of (ValueLeaf, value)
    pairs : dict
        The state's name to the dict's, of all that is filled.
    mismatched : list of str
        One sentence for each entry that does not fit.
    """

    flat: FlatState
    entries: Mapping[str, Any]
    rank: int | None
    strict: bool
    parts: list[Part] = field(default_factory=list)
    values: list[tuple[ValueLeaf, Any]] = field(default_factory=list)
    pairs: dict[str, str] = field(default_factory=dict)
    mismatched: list[str] = field(default_factory=list)

    @classmethod
    def plan(cls, flat: FlatState, entries: Mapping[str, Any], *, strict: bool, rank: int | None) -> Fill:
        """Pair names and check what is paired. Touches nothing.

        Parameters
        ----------
        strict : bool
            Other types and prefixes are not accepted.
        rank : int or None
            Whose entries ``<name>@rank_<r>`` fill `PerRank` leaves; None: nobody's.

        Raises
        ------
        StateMismatchError
            Naming all that does not fit.
        """
        fill = cls(flat, entries, rank, strict)
        for leaf, stored in fill._paired(flat.tensors, _is_array):
            fill._tensor(leaf, stored)
        for value, stored in fill._paired(flat.values, _is_scalar):
            fill._value(value, stored)
        if fill.mismatched:
            listed = _some(fill.mismatched)
            raise StateMismatchError(
                f"parameter_dict does not fit the net: {listed}; nothing was changed", mismatched=fill.mismatched
            )
        return fill

    @property
    def param_not_load(self) -> list[str]:
        """Names of the state that nothing fills."""
        names = [leaf.name for leaf in self.flat.tensors] + [leaf.name for leaf in self.flat.values]
        return netrules.not_loaded(names, self.pairs)

    @property
    def ckpt_not_load(self) -> list[str]:
        """Names of the dict that fill nothing of the same name."""
        own = {stored for name, stored in self.pairs.items() if stored in (name, self._label(name))}
        return [name for name in self.entries if name not in own]

    @property
    def renamed(self) -> dict[str, str]:
        """The state's name to the dict's, where they differ by a prefix."""
        return {name: stored for name, stored in self.pairs.items() if stored not in (name, self._label(name))}

    def apply(self) -> None:
        """Change the state. Calls user code (``write_from``)."""
        for part in self.parts:
            put(part.piece, part.array)
        for leaf, value in self.values:
            if not leaf.write_back(value):
                del self.pairs[leaf.name]

    def _paired(self, leaves: Sequence[L], suits: Callable[[Any], bool]) -> list[tuple[L, str]]:
        """Leaves of one kind with the entries of that kind which fill them."""
        found: dict[str, str] = {}
        wanted: list[str] = []
        for leaf in leaves:
            label = self._label(leaf.name)
            if leaf.per_rank and leaf.name not in self.entries and label in self.entries:
                found[leaf.name] = label
            elif leaf.name not in self.entries or suits(self.entries[leaf.name]):
                wanted.append(leaf.name)
            elif not (suits is _is_array and isinstance(self.entries[leaf.name], (str, list))):
                # Texts and maps are passed over, as in MindSpore; anything else is a mistake.
                self.mismatched.append(f"{leaf.name} is {_kinds(suits)}")
        stored = [name for name, entry in self.entries.items() if suits(entry)]
        found.update(netrules.pair(wanted, stored, strict=self.strict))
        return [(leaf, found[leaf.name]) for leaf in leaves if leaf.name in found]

    def _label(self, name: str) -> str:
        return f"{name}@rank_{self.rank}"

    def _tensor(self, leaf: TensorLeaf, stored: str) -> None:
        entry, dtype = _read(self.entries[stored])
        if not self._converts(dtype, leaf.dtype):
            self.mismatched.append(f"{leaf.name} is {leaf.dtype.name} in the net and {dtype.name} in parameter_dict")
            return
        arrays = [_cut(leaf, piece, entry) for piece in leaf.pieces]
        for piece, array in zip(leaf.pieces, arrays, strict=True):
            if array is None:
                wanted = leaf.global_shape if leaf.split else piece.shape
                self.mismatched.append(f"{leaf.name} has shape {wanted} in the net and {entry.shape} in parameter_dict")
                return
            if piece.source is None:
                raise ConfigError(f"{leaf.name!r} is a Spec: load_param_into_net fills what is there")
        self.pairs[leaf.name] = stored
        self.parts += [
            Part(leaf, piece, converted(array, leaf.dtype))
            for piece, array in zip(leaf.pieces, arrays, strict=True)
            if array is not None
        ]

    def _converts(self, stored: DType, wanted: DType) -> bool:
        # int4 and int8 are one type of numpy, of which an array says nothing.
        return stored.numpy == wanted.numpy or (not self.strict and netrules.converts(stored, wanted))

    def _value(self, leaf: ValueLeaf, stored: str) -> None:
        entry = _read(self.entries[stored])[0] if _is_array(self.entries[stored]) else self.entries[stored]
        if isinstance(entry, (np.ndarray, np.generic)) and not isinstance(leaf.value, np.generic):
            entry = entry.item()
        elif isinstance(entry, np.ndarray):
            entry = entry[()]
        self.pairs[leaf.name] = stored
        self.values.append((leaf, entry))


def check_entries(parameter_dict: Any) -> dict[str, Any]:
    """A dict of names to arrays, texts, lists and plain values, as `load_checkpoint` returns it.

    Raises
    ------
    ConfigTypeError
        For anything else.
    """
    if not isinstance(parameter_dict, Mapping):
        raise ConfigTypeError(
            f"parameter_dict must be a dict, not {type(parameter_dict).__name__}", parameter="parameter_dict"
        )
    for name, value in parameter_dict.items():
        if not isinstance(name, str):
            raise ConfigTypeError(
                f"the names of parameter_dict must be str, not {name!r} of type {type(name).__name__}",
                parameter="parameter_dict",
            )
        if not (_is_entry(value) or isinstance(value, list) or is_plain(value)):
            raise ConfigTypeError(
                f"parameter_dict[{name!r}] must be an array, a list or a plain value, not {type(value).__name__}",
                parameter="parameter_dict",
            )
    # A framework's tensors are arrays that live elsewhere.
    return {name: value if plain_array(value) else as_leaf(value) or value for name, value in parameter_dict.items()}


def complaints(missing: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """What should be said of names that were not found, or found elsewhere."""
    said = []
    if renamed:
        shown = [f"{name!r} from {stored!r}" for name, stored in renamed.items()]
        said.append(
            f"found behind a prefix only (strict_load=True refuses that): {_some(shown)}; "
            "see that these are the parameters that were meant"
        )
    if missing:
        said.append(f"not loaded, because the checkpoint has nothing to fill them with: {_some(missing)}")
    return said


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def converted(array: Array, dtype: DType) -> Array:
    """An array as another type; the array itself where it is of that type."""
    return array if array.dtype == dtype.numpy else array.astype(dtype.numpy)


def put(piece: LocalPiece, array: Array) -> None:
    """Hand an array of the right shape and type to a piece of the state."""
    if isinstance(piece.source, np.ndarray):
        piece.source[...] = array
    elif isinstance(piece.source, Leaf):
        assert piece.source.write_from is not None
        view = np.require(array, requirements="C").view()
        view.flags.writeable = False
        piece.source.write_from(view)


def _cut(leaf: TensorLeaf, piece: LocalPiece, entry: Array) -> Array | None:
    """What of an entry belongs to a piece: its box of the whole tensor, or the entry if that is just the box."""
    if netrules.fits(entry.shape, leaf.global_shape):
        whole = entry.reshape(leaf.global_shape)
        return whole[slices(Box(piece.offsets, piece.shape), (0,) * len(piece.shape))] if leaf.split else whole
    if leaf.split and len(leaf.pieces) == 1 and netrules.fits(entry.shape, piece.shape):
        return entry.reshape(piece.shape)
    return None


def _is_entry(value: Any) -> bool:
    return plain_array(value) or isinstance(value, Leaf) or as_leaf(value) is not None


def _read(entry: np.ndarray[Any, Any] | Leaf) -> tuple[Array, DType]:
    if isinstance(entry, np.ndarray):
        return entry, dtypes.from_numpy(entry.dtype)
    array: Array = np.empty(entry.shape, entry.dtype.numpy)
    entry.read_into(array)
    return array, entry.dtype


def _is_array(entry: Any) -> bool:
    return isinstance(entry, (np.ndarray, Leaf))


def _is_scalar(entry: Any) -> bool:
    """Whether an entry can become a plain value: numbers are 0-d arrays in what `load_checkpoint` returns."""
    return entry.shape == () if _is_array(entry) else True


def _kinds(suits: Callable[[Any], bool]) -> str:
    here, there = ("an array", "a plain value") if suits is _is_array else ("a plain value", "an array")
    return f"{here} in the net and {there} in parameter_dict"
