"""What `load_distributed_checkpoint` gives a rank: arrays, or a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from parckpt.core.flat import FlatState
from parckpt.core.layout import Box, whole
from parckpt.core.state import State, flatten
from parckpt.core.strategy import Strategy
from parckpt.engine.group import Group
from parckpt.engine.local import as_state
from parckpt.engine.rewrite import OutputSpec, Piece, write_files
from parckpt.engine.source import BoxReading, Source
from parckpt.engine.staging import Modes
from parckpt.formats.registry import FORMATS
from parckpt.storage.filesystem import FileSystem
from parckpt.transform.outputs import Recut
from parckpt.transform.reading import Opened

__all__ = ["Loading"]


@dataclass(frozen=True)
class Loading:
    """What one call of `load_distributed_checkpoint` loads.

    Attributes
    ----------
    predict : Strategy or None
        How the tensors to load are cut.
    rank : int or None
        Rank whose pieces are wanted. None: this process', or where files are written all.
    unified : bool
        The source is unified files: of those only what `predict` names is loaded.
    """

    group: Group
    fs: FileSystem
    opened: Opened
    recut: Recut
    predict: Strategy | None
    rank: int | None
    unified: bool

    def absent(self) -> list[str]:
        """Say which tensors the target strategy names and no file has."""
        predict = self.predict
        if predict is None:
            return []
        present = {row.name for row in self.opened.contents.tensors}
        present |= {name for found in self.opened.numbers.values() for name in found}
        missing = [name for name in predict.names if name not in present]
        shown = f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}"
        return [f"predict_strategy names tensors that no file has: {shown}"] if missing else []

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """What a rank gets: of unified files only what the target strategy names, in its order, and what none names."""
        found = self.recut.pieces(rank)
        predict = self.predict
        if predict is None or not self.unified:
            return found
        places = {name: place for place, name in enumerate(predict.names)}
        hyper = set(self.opened.names.get(1, ()))
        kept = [piece for piece in found if piece.name in places]
        return (*sorted(kept, key=lambda piece: places[piece.name]), *(p for p in found if p.name in hyper))

    def write(self, directory: str, output_format: str, modes: Modes) -> None:
        """One file for each rank, or for one. Collective."""
        rank = self.rank
        ranks = range(self.recut.nranks) if rank is None else [rank]

        def specs() -> list[OutputSpec]:
            paths = {r: os.path.join(directory, f"rank_{r}", f"net.{output_format}") for r in ranks}
            return [OutputSpec(path, self.pieces(r), self.recut.numbers(r)) for r, path in paths.items()]

        outputs = self.group.run(specs)
        form, opened = FORMATS[output_format], self.opened
        write_files(self.group, self.fs, opened.manifest, opened.root, outputs, form, modes=modes)

    def arrays(self, network: State | None) -> dict[str, Any]:
        """This rank's arrays. Not collective."""
        rank = self.rank if self.rank is not None else self.group.rank
        rank = rank if self.predict is not None else 0
        pieces = self.pieces(rank)
        if network is not None and self.predict is None:
            pieces = _own_boxes(pieces, flatten(as_state(network), writable=True))
        source = Source(self.fs, self.opened.root, self.opened.root, self.opened.manifest, None)
        with BoxReading(source).start([(piece.tensor, piece.box) for piece in pieces]) as batch:
            found = dict(zip((piece.name for piece in pieces), batch.arrays(), strict=True))
        return {**found, **self.recut.numbers(rank)}


def _own_boxes(pieces: Sequence[Piece], flat: FlatState) -> tuple[Piece, ...]:
    """Read only what a leaf of the same name and shape holds."""
    boxes: dict[tuple[str, tuple[int, ...]], Box] = {}
    for leaf in flat.tensors:
        if not leaf.per_rank:
            found = [Box(tuple(piece.offsets), tuple(piece.shape)) for piece in leaf.pieces]
            if len(found) == 1:
                boxes[leaf.name, tuple(leaf.global_shape)] = found[0]
    return tuple(
        replace(piece, box=boxes.get((piece.name, piece.box.shape), piece.box))
        if piece.box == whole(piece.box.shape)
        else piece
        for piece in pieces
    )
