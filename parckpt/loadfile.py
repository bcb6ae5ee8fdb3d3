"""`load_checkpoint`: one file or step directory, ours or MindSpore's, whole or just this rank's boxes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from parckpt.comm.launch import SELF, resolve
from parckpt.comm.wait import AGREE_TIMEOUT_S, Waiter
from parckpt.core.state import State
from parckpt.core.strategy import Strategy
from parckpt.engine.group import Group
from parckpt.engine.loadargs import Arguments
from parckpt.engine.loading import Loading, complaints, load_own
from parckpt.errors import StateWarning
from parckpt.netload import fill_net
from parckpt.signals import deferred_interrupt
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.strategies import as_strategy, name_of

__all__ = ["load_checkpoint"]


def load_checkpoint(
    ckpt_file_name: str | os.PathLike[str],
    net: State | None = None,
    strict_load: bool = False,
    filter_prefix: str | Sequence[str] | None = None,
    dec_key: bytes | None = None,
    dec_mode: str = "AES-GCM",
    specify_prefix: str | Sequence[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    crc_check: bool = False,
    remove_redundancy: bool = False,
    format: str | None = None,
    *,
    comm: Any = None,
    allow_unverified: bool | None = None,
    strategy: Strategy | str | os.PathLike[str] | None = None,
    agree_timeout_s: float = AGREE_TIMEOUT_S,
    filesystem: FileSystem | None = None,
) -> dict[str, Any]:
    """Load one file or step directory, ours or MindSpore's.

    This process alone, or collective over ``comm`` if that is given: then all ranks name the same checkpoint.

    Parameters
    ----------
    net : mapping, callable or object with ``state_dict()``, optional
        A state to fill in place; with ``comm`` each rank gets just its boxes. Without it full arrays are returned.
        Names, types and shapes are matched by the rules of `load_param_into_net`; what the net has and the checkpoint
        lacks is warned about.
    strict_load : bool
        Refuse other element types and common prefixes instead of converting and matching them.
    filter_prefix, specify_prefix : str or list of str, optional
        Drop, or keep only, names in the file that begin so.
    choice_func : callable, optional
        Keep the names in the file for which it is true. Without effect if a prefix is given.
    crc_check : bool
        Verify MindSpore's own checksum, and refuse a file without one.
    remove_redundancy : bool
        The file is one rank's of several, and what others have is not in it. With ``comm`` every rank names its own
        file, and ``net`` gets the rest from the other ranks. (Naming the directory needs none of this.)
    format : {"ckpt", "safetensors"}, optional
        Default: by the extension.
    allow_unverified : bool, optional
        A file without a manifest cannot be verified. None: warn, but refuse in a directory where parckpt has
        published; True: say nothing; False: refuse.
    strategy : Strategy or str, optional
        MindSpore's strategy, or its file: how the ``rank_<n>`` files of a directory fit together. Not used for what
        has a manifest, and for a single file.

    Returns
    -------
    dict
        Arrays by name; strings as ``str``; MindSpore's map parameters as [keys, values, status]. What belongs to one
        rank is called ``<name>@rank_<r>``.

    Raises
    ------
    ConfigError
        Impossible arguments; nothing is left after filtering.
    CheckpointNotFoundError, FormatError, IntegrityError
    StateMismatchError
        Shapes or types of the net do not fit; nothing was changed.
    """
    fs = filesystem if filesystem is not None else PosixFileSystem()
    given: Mapping[str, Any] = {
        "specify_prefix": specify_prefix,
        "filter_prefix": filter_prefix,
        "dec_key": dec_key,
        "dec_mode": dec_mode,
        "crc_check": crc_check,
        "remove_redundancy": remove_redundancy,
        "format": format,
        "ckpt_file_name": ckpt_file_name,
        "choice_func": choice_func,
        "net": net,
        "strict_load": strict_load,
        "allow_unverified": allow_unverified,
    }
    said: list[str] = []
    group = Group(resolve(SELF if comm is None else comm, os.environ), Waiter(agree_timeout_s))
    try:
        with deferred_interrupt():
            arguments = group.run(lambda: _checked(group, fs, given, strategy))
            loaded = _load(group, fs, arguments, net, said)
    finally:
        group.comm.free()
    for message in said:
        warnings.warn(message, StateWarning, stacklevel=2)
    return loaded


def _checked(
    group: Group, fs: FileSystem, given: Mapping[str, Any], strategy: Strategy | str | os.PathLike[str] | None
) -> Arguments:
    """The arguments; the strategy is read on root, which alone opens checkpoints."""
    cuts = as_strategy(strategy, fs) if group.is_root else None
    return replace(Arguments.checked(given), strategy=cuts, strategy_name=name_of(strategy))


def _load(group: Group, fs: FileSystem, arguments: Arguments, net: State | None, said: list[str]) -> dict[str, Any]:
    own = load_own(group, fs, arguments, said) if arguments.remove_redundancy and group.size > 1 else None
    if own is None:
        return Loading(group, fs, arguments, said).run(net)
    if net is not None:
        fill = fill_net(group, net, own, arguments.strict, True, alone=False)
        said += complaints(group, fill.param_not_load, fill.renamed)
    return own
