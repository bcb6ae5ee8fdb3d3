"""What a restore gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PerRankArrays", "Progress"]


class PerRankArrays(Sequence[Any]):
    """Every rank's saved array of one `PerRank` leaf, read from the checkpoint when asked for.

    Reading is not collective, and verified like everything else.
    """

    def __init__(self, read: Callable[[int], Any], count: int) -> None:
        self._read = read
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read(rank) for rank in range(*index.indices(self._count))]
        rank = index + self._count if index < 0 else index
        if not 0 <= rank < self._count:
            raise IndexError(index)
        return self._read(rank)

    def __iter__(self) -> Iterator[Any]:
        return (self._read(rank) for rank in range(self._count))


@dataclass(frozen=True)
class Progress:
    """Where training stands after a restore.

    Attributes
    ----------
    step, epoch, step_in_epoch : int
        Of the restored checkpoint; all 0 when there was none (a fresh start).
    path : str or None
        What was restored.
    prefix : str or None
        Prefix in its name.
    reason : str
        Why it was saved.
    consistent : bool
        All ranks' parts are of this step.
    world_size : int
        Number of ranks that saved it; 0 for a fresh start.
    append_dict : dict
        Appended info, in full precision.
    values : dict
        Plain values by name, as they were saved.
    per_rank : mapping
        Name of each `PerRank` leaf to every old rank's value.
    state : nested dict
        The state with what was allocated (`Spec` leaves; everything when no state was given).
    missing : list of str
        Names that the state has and the checkpoint lacks (``strict=False``).
    skipped : list of (str, str)
        Newer checkpoints that could not be used, and why.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    path: str | None = None
    prefix: str | None = None
    reason: str = ""
    consistent: bool = True
    world_size: int = 0
    append_dict: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    per_rank: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    state: Any = None
    missing: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
