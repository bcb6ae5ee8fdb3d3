"""How the tensors of a checkpoint are to lie in new files: as they are, cut evenly, or by a layout. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from parckpt.core.contents import Contents
from parckpt.core.layout import Box, whole
from parckpt.core.mesh import Layout
from parckpt.core.tensors import TensorRow
from parckpt.errors import ConfigError

__all__ = ["Boxes", "Cut", "as_stored", "by_layout", "even", "integrated"]

Boxes: TypeAlias = "tuple[tuple[int, Box], ...]"
"""Row of the tensor, and a box of it."""

Cut = tuple[Boxes, ...]
"""What each new file holds, in order."""


def integrated(contents: Contents) -> Boxes:
    """Every stored tensor, whole, for one file; of a breakpoint those of dead ranks are left out, as it lacks them."""
    tensors = contents.tensors
    return tuple((row, whole(tensors[row].global_shape)) for row in stored_rows(contents))


def as_stored(contents: Contents) -> Cut:
    """File by file what the source has."""
    found: list[list[tuple[int, Box]]] = [[] for _ in contents.files]
    for index, file in enumerate(contents.boxes.file.tolist()):
        box = contents.box(index)
        found[file].append((box.tensor, box.box))
    return tuple(tuple(boxes) for boxes in found)


def even(contents: Contents, nfiles: int) -> Cut:
    """Cut tensors along their first dimension into ``nfiles`` parts, earlier ones at most one row longer.

    Each element is in one file. What cannot be cut, goes to the file with the fewest bytes so far; what belongs to
    rank r, to file r, or r modulo ``nfiles``.
    """
    files = _Files(contents, nfiles)
    for row in stored_rows(contents):
        shape = contents.tensors[row].global_shape
        if files.of_one_rank(row):
            continue
        if not shape or shape[0] < 2 or 0 in shape:
            files.add(files.lightest(range(nfiles)), row, whole(shape))
            continue
        rows, longer = divmod(shape[0], nfiles)
        start = 0
        for rank in range(nfiles):
            length = rows + (rank < longer)
            if length:
                rest = (0,) * (len(shape) - 1)
                files.add(rank, row, Box((start, *rest), (length, *shape[1:])))
            start += length
    return files.cut()


def by_layout(
    contents: Contents, layouts: Mapping[str, Sequence[Layout]], nfiles: int, *, once: bool, first_rank: int = 0
) -> Cut:
    """Cut tensors by their layouts; a tensor without one is whole on every rank.

    Parameters
    ----------
    layouts : mapping
        For a tensor's name its layouts, one for each pipeline stage that holds it.
    once : bool
        Of equal boxes only one is kept, in the file with the fewest bytes so far.
    first_rank : int
        Rank of the layouts that file 0 is of.

    Raises
    ------
    LayoutError
        If a layout does not fit its tensor.
    ConfigError
        If a layout names a tensor that is not there, or is for more ranks than files.
    """
    unknown = sorted(layouts.keys() - {tensor.name for tensor in contents.tensors})
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(f"there is a layout for {unknown[0]!r}{more}, but no such tensor", tensors=unknown)
    files = _Files(contents, nfiles)
    for row in stored_rows(contents):
        if files.of_one_rank(row):
            continue
        tensor = contents.tensors[row]
        holders = _holders(tensor, layouts.get(tensor.name, ()), nfiles, first_rank)
        for box, ranks in holders.items():
            for rank in [files.lightest(ranks)] if once else ranks:
                files.add(rank, row, box)
    return files.cut()


def _holders(tensor: TensorRow, layouts: Sequence[Layout], nfiles: int, first_rank: int) -> dict[Box, list[int]]:
    """The files that are to hold each box of a tensor."""
    if not layouts:
        return {whole(tensor.global_shape): list(range(nfiles))}
    holders: dict[Box, list[int]] = {}
    for layout in layouts:
        if layout.ranks.start < first_rank or layout.ranks.stop > first_rank + nfiles:
            raise ConfigError(
                f"{tensor.name!r} is cut over ranks {layout.ranks.start} to {layout.ranks.stop - 1}, "
                f"but the files are for ranks {first_rank} to {first_rank + nfiles - 1}",
                tensor=tensor.name,
            )
        for rank in layout.ranks:
            box = layout.box(tensor.global_shape, rank)
            if not box.is_empty or 0 in tensor.global_shape:
                holders.setdefault(box, []).append(rank - first_rank)
    return holders


def stored_rows(contents: Contents) -> list[int]:
    """Rows of the tensors of which anything is stored."""
    stored = set(contents.boxes.tensor.tolist())
    return [row for row in range(len(contents.tensors)) if row in stored]


class _Files:
    """Boxes by file, and their bytes."""

    def __init__(self, contents: Contents, nfiles: int) -> None:
        if nfiles < 1:
            raise ConfigError(f"there must be at least 1 rank, not {nfiles}", parameter="ranks")
        self._contents = contents
        self._boxes: list[list[tuple[int, Box]]] = [[] for _ in range(nfiles)]
        self._nbytes = [0] * nfiles

    def add(self, file: int, row: int, box: Box) -> None:
        self._boxes[file].append((row, box))
        self._nbytes[file] += box.size * self._contents.tensors[row].dtype.itemsize

    def of_one_rank(self, row: int) -> bool:
        """Place a tensor that belongs to one rank; False for others."""
        tensor = self._contents.tensors[row]
        if tensor.per_rank >= 0:
            self.add(tensor.per_rank % len(self._boxes), row, whole(tensor.global_shape))
        return tensor.per_rank >= 0

    def lightest(self, files: Sequence[int]) -> int:
        return min(files, key=lambda file: (self._nbytes[file], file))

    def cut(self) -> Cut:
        return tuple(tuple(boxes) for boxes in self._boxes)
