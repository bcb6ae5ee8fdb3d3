"""`rank_list_for_transform`: which source ranks' files a target rank needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from parckpt.core.redistribution import needed_ranks
from parckpt.core.strategy import Strategy, TensorStrategy
from parckpt.errors import ConfigTypeError, LayoutError
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.transform.arguments import StrategyLike, cut_of, strategy_of

__all__ = ["by_stage", "needed", "rank_list_for_transform"]


def rank_list_for_transform(
    rank_id: int,
    src_strategy_file: StrategyLike = None,
    dst_strategy_file: StrategyLike = None,
    *,
    filesystem: FileSystem | None = None,
) -> list[int]:
    """Return the source ranks whose files the checkpoint of target rank `rank_id` needs, descending. Not collective.

    Parameters
    ----------
    src_strategy_file, dst_strategy_file : str, Strategy or mapping, optional
        How tensors are and will be cut. None: not at all.

    Raises
    ------
    ConfigTypeError, ConfigError, FormatError
        An argument is of a wrong kind; a strategy is not there, or is none.
    LayoutError
        Neither number of ranks divides the other, or the strategy has no rank `rank_id`.
    """
    if not isinstance(rank_id, int):
        raise ConfigTypeError(f"rank_id must be an int, not {type(rank_id).__name__}", parameter="rank_id")
    if src_strategy_file is None:
        return [0]
    fs = filesystem if filesystem is not None else PosixFileSystem()
    source = strategy_of("src_strategy_file", src_strategy_file, fs)
    assert source is not None
    target = strategy_of("dst_strategy_file", dst_strategy_file, fs)
    # For stages of one rank MindSpore keeps the number in the job, and so spreads the stages over the replicas.
    alone = target is not None and target.stage_nranks == 1
    return needed(rank_id, source, target, local=rank_id if alone else None)


def needed(rank: int, source: Strategy, target: Strategy | None, *, local: int | None = None) -> list[int]:
    """Return the source ranks that MindSpore reads for a target rank, descending.

    ``local`` is the rank's number in its stage, if that is not to follow from `rank`.
    """
    if target is not None and not 0 <= rank < target.nranks:
        raise LayoutError(f"there is no rank {rank} among the {target.nranks} of the target strategy", ranks=[rank])
    kept = by_stage(source)
    ours: Mapping[str, TensorStrategy] | None = None
    if target is not None:
        stage = rank // target.stage_nranks
        everything = by_stage(target)
        ours = {name: stages[stage] for name, stages in everything.items() if stage in stages}
        kept = {name: stages for name, stages in kept.items() if name in ours or name not in everything}
        rank %= target.stage_nranks
    inside = _local(rank if local is None else local, kept, ours)
    held = {stage for stages in kept.values() for stage in stages}
    return sorted({stage * source.stage_nranks + other for stage in held for other in inside}, reverse=True)


def _local(
    rank: int, source: Mapping[str, Mapping[int, TensorStrategy]], target: Mapping[str, TensorStrategy] | None
) -> set[int]:
    """Ranks within a source stage."""
    pairs: dict[tuple[TensorStrategy, TensorStrategy], None] = {}
    for name, stages in source.items():
        before = stages[min(stages)]
        after = TensorStrategy((1,), (-1,) * len(before.tensor_map)) if target is None else target.get(name)
        if after is not None:
            pairs[before, after] = None
    return _union(needed_ranks(cut_of(before), cut_of(after), rank) for before, after in pairs)


def _union(sets: Iterable[set[int]]) -> set[int]:
    return set().union(*sets)


def by_stage(strategy: Strategy) -> Mapping[str, Mapping[int, TensorStrategy]]:
    """For each tensor the stages that hold it; a file that was not merged speaks of one stage, its first."""
    if strategy.is_merged:
        return strategy.stages
    return {name: {0: tensor} for name, tensor in strategy.tensors.items()}
