"""Which stored tensor goes where: a state to be filled, compared with what a checkpoint holds. Nothing is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from parckpt.core import netrules
from parckpt.core.contents import Contents
from parckpt.core.dtypes import DType
from parckpt.core.flat import FlatState, LocalPiece, TensorLeaf, ValueLeaf
from parckpt.core.layout import Box, whole
from parckpt.core.tensors import TensorRow
from parckpt.errors import ConfigError, ConfigTypeError, StateMismatchError

__all__ = ["Matched", "NameMap", "Resize", "Selection", "Slot", "match", "unexpected"]

NameMap = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True)
class Selection:
    """Which names take part, and how strictly.

    Attributes
    ----------
    only, exclude : sequence of str or None
        Names, shell patterns, or prefixes that end before a dot (``"model"`` takes ``model.w``).
    name_map : mapping or callable
        From the name in the checkpoint to the name in the state.
    strict : bool
        Missing and unexpected names are errors.
    cast : bool or callable
        Other dtypes are converted: all, or those for which ``cast(stored, wanted)`` is true.
    choose : callable, optional
        Only names (of the state) for which this is true.
    pair : callable, optional
        ``pair(names of the state, names in the checkpoint)`` gives the name in the checkpoint for names of the state; a
        name may be given to several. In place of `name_map`.
    trailing_ones : bool
        Shapes that only have more trailing ones in the checkpoint fit.
    """

    only: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    name_map: NameMap | None = None
    strict: bool = True
    cast: bool | Callable[[DType, DType], bool] = False
    choose: Callable[[str], bool] | None = None
    pair: netrules.Pairing | None = None
    trailing_ones: bool = False

    def __post_init__(self) -> None:
        for name, given in (("only", self.only), ("exclude", self.exclude)):
            if isinstance(given, str) or (given is not None and not all(isinstance(item, str) for item in given)):
                raise ConfigTypeError(f"{name} must be a list of names, not {given!r}")
        if not (self.name_map is None or isinstance(self.name_map, Mapping) or callable(self.name_map)):
            raise ConfigTypeError(f"name_map must be a mapping or a callable, not {type(self.name_map).__name__}")

    def takes(self, name: str) -> bool:
        """Whether a name (of the state) takes part."""
        chosen = self.only is None or _any(name, self.only)
        excluded = self.exclude is not None and _any(name, self.exclude)
        return chosen and not excluded and (self.choose is None or bool(self.choose(name)))

    def converts(self, stored: DType, wanted: DType) -> bool:
        """Whether a stored type may be turned into a wanted one."""
        return self.cast(stored, wanted) if callable(self.cast) else self.cast

    def fits(self, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        """Whether a stored shape will do."""
        return stored == wanted or (self.trailing_ones and netrules.fits(stored, wanted))

    def mapped(self, name: str) -> str:
        """The state's name for a name of the checkpoint."""
        if self.name_map is None:
            return name
        found = self.name_map.get(name, name) if isinstance(self.name_map, Mapping) else self.name_map(name)
        if not isinstance(found, str):
            raise ConfigTypeError(f"name_map gives {name!r} a name of type {type(found).__name__}")
        return found


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(name == p or name.startswith(f"{p}.") or fnmatchcase(name, p) for p in patterns)


@dataclass(frozen=True)
class Slot:
    """One piece of this rank's state and the stored tensor and box that fill it."""

    leaf: TensorLeaf
    piece: LocalPiece
    tensor: int
    box: Box


@dataclass(frozen=True)
class Resize:
    """A per-rank array or value whose saved world had another size; ``tensors`` by old rank."""

    leaf: TensorLeaf | ValueLeaf
    stored_name: str
    tensors: tuple[int, ...]


@dataclass(frozen=True)
class Matched:
    """The outcome of `match`.

    Attributes
    ----------
    slots : tuple of Slot
        What is to be read.
    values : dict
        Encoded shared and own values by the state's name, for the leaves that want them.
    resizes : tuple of Resize
        Per-rank leaves whose ``on_resize`` is a callable.
    named : tuple of int
        Stored tensors that this rank's state names. What no rank names is unexpected, so that is seen only together.
    missing, unexpected, mismatched : tuple of str
        What does not fit.
    """

    slots: tuple[Slot, ...]
    values: Mapping[str, Any]
    resizes: tuple[Resize, ...]
    named: tuple[int, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unexpected: tuple[str, ...] = ()

    def error(self, path: str, strict: bool) -> StateMismatchError | None:
        """The error to raise, if any."""
        missing = self.missing if strict else ()
        unexpected = self.unexpected if strict else ()
        if not (missing or unexpected or self.mismatched):
            return None
        parts = [
            f"{label} {_listed(names)}"
            for label, names in (
                ("missing in the checkpoint:", missing),
                ("not in the state:", unexpected),
                ("different:", self.mismatched),
            )
            if names
        ]
        return StateMismatchError(
            f"{path} does not fit the state: {'; '.join(parts)}",
            missing=missing,
            unexpected=unexpected,
            mismatched=self.mismatched,
            path=path,
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def match(
    flat: FlatState,
    contents: Contents,
    values: Mapping[str, Any],
    per_rank_values: Mapping[str, Mapping[str, Any]],
    *,
    saved_world_size: int,
    rank: int,
    world_size: int,
    selection: Selection,
) -> Matched:
    """Compare a state with a checkpoint. Not collective; touches nothing.

    Parameters
    ----------
    values, per_rank_values : mapping
        Encoded plain values of the checkpoint.
    """
    matcher = _Matcher(contents, values, per_rank_values, saved_world_size, rank, world_size, selection)
    if selection.pair is not None:
        matcher.pair(selection.pair, flat)
    for leaf in flat.tensors:
        if selection.takes(leaf.name):
            matcher.tensor(leaf)
    named = {leaf.name for leaf in flat.tensors}
    for value in flat.values:
        if selection.takes(value.name) and value.name not in named:
            matcher.value(value)
    return matcher.result(named | {value.name for value in flat.values})


class _Matcher:
    def __init__(
        self,
        contents: Contents,
        values: Mapping[str, Any],
        per_rank_values: Mapping[str, Mapping[str, Any]],
        saved_world_size: int,
        rank: int,
        world_size: int,
        selection: Selection,
    ) -> None:
        self.contents, self.selection = contents, selection
        self.rank, self.same_size = rank, saved_world_size == world_size
        self.sizes = f"saved by {saved_world_size} ranks, restored by {world_size}"
        self.stored = {selection.mapped(name): (name, rows) for name, rows in contents.index.items()}
        self.shared_values = {selection.mapped(name): value for name, value in values.items()}
        self.own_values = {selection.mapped(name): (name, by) for name, by in per_rank_values.items()}
        self.slots: list[Slot] = []
        self.values: dict[str, Any] = {}
        self.resizes: list[Resize] = []
        self.missing: list[str] = []
        self.mismatched: list[str] = []
        self.check_name_map({*contents.index, *values, *per_rank_values})

    def check_name_map(self, names: set[str]) -> None:
        given: dict[str, str] = {}
        for name in sorted(names):
            first = given.setdefault(self.selection.mapped(name), name)
            if first != name:
                raise ConfigError(f"name_map gives {first!r} and {name!r} of the checkpoint one name")

    def pair(self, rule: netrules.Pairing, flat: FlatState) -> None:
        """Look names up by a rule instead: tensors among tensors, plain values among plain values."""
        pairs = rule([leaf.name for leaf in flat.tensors], list(self.contents.index))
        self.stored = {name: (stored, self.contents.index[stored]) for name, stored in pairs.items()}
        shared, own = self.shared_values, self.own_values
        pairs = rule([leaf.name for leaf in flat.values], [*shared, *own])
        self.shared_values = {name: shared[stored] for name, stored in pairs.items() if stored in shared}
        self.own_values = {name: own[stored] for name, stored in pairs.items() if stored in own}

    def tensor(self, leaf: TensorLeaf) -> None:
        name, rows = self.stored.get(leaf.name, ("", []))
        tensors = self.contents.tensors
        if not rows:
            self.no_tensor(leaf.name)
        elif (tensors[rows[0]].per_rank >= 0) != leaf.per_rank:
            self.differs(leaf.name, leaf.per_rank)
        elif not leaf.per_rank:
            self.shared(leaf, rows[0])
        else:
            self.own(leaf, name, {tensors[row].per_rank: row for row in rows})

    def no_tensor(self, name: str) -> None:
        value = self.shared_values.get(name)
        # An empty sequence may have stood for "no shards here".
        if name in self.own_values or (name in self.shared_values and value not in ([], {"tuple": []})):
            self.mismatched.append(f"{name} is an array in the state and a plain value in the checkpoint")
        else:
            self.missing.append(name)

    def differs(self, name: str, per_rank: bool) -> None:
        here, there = ("PerRank", "shared") if per_rank else ("shared", "PerRank")
        self.mismatched.append(f"{name} is {here} in the state and {there} in the checkpoint")

    def shared(self, leaf: TensorLeaf, row: int) -> None:
        if self.fits(leaf, self.contents.tensors[row], leaf.global_shape):
            for piece in leaf.pieces:
                if self.inside(leaf, piece):
                    ones = len(self.contents.tensors[row].global_shape) - len(piece.shape)
                    box = Box((*piece.offsets, *(0,) * ones), (*piece.shape, *(1,) * ones))
                    self.slots.append(Slot(leaf, piece, row, box))

    def own(self, leaf: TensorLeaf, name: str, by_rank: dict[int, int]) -> None:
        if self.same_size:
            row = by_rank.get(self.rank)
            if row is None:
                self.missing.append(f"{leaf.name} of rank {self.rank}")
            elif self.fits(leaf, self.contents.tensors[row], leaf.pieces[0].shape):
                self.slots.append(Slot(leaf, leaf.pieces[0], row, whole(self.contents.tensors[row].global_shape)))
        elif callable(leaf.on_resize):
            self.resizes.append(Resize(leaf, name, tuple(by_rank[r] for r in sorted(by_rank))))
        elif leaf.on_resize == "error":
            self.mismatched.append(f"{leaf.name} belongs to single ranks ({self.sizes}); give PerRank an on_resize")

    def fits(self, leaf: TensorLeaf, stored: TensorRow, shape: tuple[int, ...]) -> bool:
        if not self.selection.fits(stored.global_shape, shape):
            self.mismatched.append(f"{leaf.name} has shape {shape}, the checkpoint's {stored.global_shape}")
        elif stored.dtype != leaf.dtype and not self.selection.converts(stored.dtype, leaf.dtype):
            hint = "" if callable(self.selection.cast) else " (cast=True converts)"
            self.mismatched.append(f"{leaf.name} is {leaf.dtype.name}, the checkpoint's {stored.dtype.name}{hint}")
        else:
            return True
        return False

    def inside(self, leaf: TensorLeaf, piece: LocalPiece) -> bool:
        ends = zip(piece.offsets, piece.shape, leaf.global_shape, strict=True)
        sound = all(0 <= offset <= limit - length for offset, length, limit in ends)
        if not sound:
            self.mismatched.append(f"{leaf.name}: the box at {piece.offsets} of shape {piece.shape} is out of range")
        return sound

    def value(self, leaf: ValueLeaf) -> None:
        if leaf.may_be_no_shards and leaf.name in self.stored:
            return
        there = self.own_values if leaf.per_rank else self.shared_values
        elsewhere = self.shared_values if leaf.per_rank else self.own_values
        if leaf.name not in there and leaf.name in elsewhere:
            self.differs(leaf.name, leaf.per_rank)
        elif leaf.name not in there and leaf.name in self.stored:
            self.mismatched.append(f"{leaf.name} is a plain value in the state and an array in the checkpoint")
        elif leaf.name not in there:
            self.missing.append(leaf.name)
        elif leaf.per_rank:
            self.own_value(leaf)
        else:
            self.values[leaf.name] = self.shared_values[leaf.name]

    def own_value(self, leaf: ValueLeaf) -> None:
        name, by_rank = self.own_values[leaf.name]
        if self.same_size:
            if str(self.rank) in by_rank:
                self.values[leaf.name] = by_rank[str(self.rank)]
            else:
                self.missing.append(f"{leaf.name} of rank {self.rank}")
        elif callable(leaf.on_resize):
            self.resizes.append(Resize(leaf, name, ()))
        elif leaf.on_resize == "error":
            self.mismatched.append(f"{leaf.name} belongs to single ranks ({self.sizes}); give PerRank an on_resize")

    def result(self, names: set[str]) -> Matched:
        named = [row for name, (_, rows) in self.stored.items() if name in names for row in rows]
        return Matched(
            tuple(self.slots),
            self.values,
            tuple(self.resizes),
            tuple(named),
            tuple(self.missing),
            tuple(self.mismatched),
        )


def unexpected(contents: Contents, named: Iterable[int], selection: Selection) -> tuple[str, ...]:
    """Names of stored tensors that no rank's state has, of those selected.

    Plain values are not among them: those that nobody asked for are returned in `Progress`, so nothing is lost.
    """
    known = set(named)
    rows = [row for row in range(len(contents.tensors)) if row not in known]
    return tuple(
        contents.tensors[row].file_name for row in rows if selection.takes(selection.mapped(contents.tensors[row].name))
    )
