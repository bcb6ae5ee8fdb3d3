"""`load_param_into_net`: a dict of arrays into a state that is already there."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from parckpt.comm.collective import bcast_bytes
from parckpt.comm.launch import SELF, launched_by, resolve
from parckpt.comm.wait import AGREE_TIMEOUT_S, Waiter
from parckpt.core import checks
from parckpt.core.flat import TensorLeaf
from parckpt.core.netfill import Fill, check_entries, put
from parckpt.core.state import State, flatten
from parckpt.engine.group import Group
from parckpt.engine.loading import complaints
from parckpt.engine.local import as_state
from parckpt.errors import ConfigError, ConfigTypeError, StateWarning
from parckpt.signals import deferred_interrupt

__all__ = ["fill_net", "load_param_into_net"]


def load_param_into_net(
    net: State,
    parameter_dict: Mapping[str, Any],
    strict_load: bool = False,
    remove_redundancy: bool = False,
    *,
    comm: Any = None,
    agree_timeout_s: float = AGREE_TIMEOUT_S,
) -> tuple[list[str], list[str]]:
    """Fill a state in place from a dict of whole arrays, as `load_checkpoint` returns it.

    Collective over ``comm`` if that is given; else this process alone, without communication. Everything is checked
    before anything is changed.

    Parameters
    ----------
    net : mapping, callable or object with ``state_dict()``
        What to fill. A `Shard` gets its box of the whole array (or the array, if it has just the box's shape), a
        `PerRank` leaf what is called ``<name>@rank_<this rank>``.
    parameter_dict : dict
        Name to array, text, list or plain value. A shape may have more trailing ones than the net's, whose shape stays.
    strict_load : bool
        False: floating types are converted to floating ones and signed integers to signed integers, and a name that is
        missing may be found behind a common prefix (``net.w`` fills ``w``), which is warned about. True: neither.
    remove_redundancy : bool
        Every rank hands in only what its own file has; what it lacks comes from the lowest rank that has the same box.
        Needs ``comm``.

    Returns
    -------
    param_not_load : list of str
        Names of the net that were not filled (but for accumulated gradients, ``accu_grads*``). Root warns.
    ckpt_not_load : list of str
        Names of the dict of which the net has no equal; those that were found behind a prefix are among them.

    Raises
    ------
    ConfigTypeError
        Arguments of a wrong type; ``remove_redundancy`` without other ranks.
    StateMismatchError
        Shapes or types do not fit, all of them named; nothing was changed.
    """
    group = Group(resolve(SELF if comm is None else comm, os.environ), Waiter(agree_timeout_s))
    try:
        with deferred_interrupt():
            fill = fill_net(group, net, parameter_dict, strict_load, remove_redundancy, alone=comm is None)
            said = complaints(group, fill.param_not_load, fill.renamed)
    finally:
        group.comm.free()
    for message in said:
        warnings.warn(message, StateWarning, stacklevel=2)
    return fill.param_not_load, fill.ckpt_not_load


def fill_net(
    group: Group, net: Any, parameter_dict: Any, strict_load: Any, remove_redundancy: Any, *, alone: bool
) -> Fill:
    """What `load_param_into_net` does, on a group, without warnings. Collective."""
    fill = group.run(lambda: _planned(net, parameter_dict, strict_load, remove_redundancy, group, alone=alone))
    group.run(fill.apply)
    if group.size > 1:
        _fetch_missing(group, fill, remove_redundancy)
    return fill


def _planned(net: Any, parameter_dict: Any, strict: Any, remove_redundancy: Any, group: Group, *, alone: bool) -> Fill:
    """Check the arguments in MindSpore's order, then pair and compare."""
    state = as_state(net)
    entries = check_entries(parameter_dict)
    checks.boolean("strict_load", strict)
    if checks.boolean("remove_redundancy", remove_redundancy) and group.size == 1:
        raise ConfigTypeError(
            "remove_redundancy needs the ranks that have the rest: pass comm=MPI.COMM_WORLD",
            parameter="remove_redundancy",
        )
    flat = flatten(state, writable=True)
    if alone and launched_by(os.environ)[1] > 1:
        everything = [(leaf.name, leaf.per_rank) for leaf in flat.tensors]
        everything += [(leaf.name, leaf.per_rank) for leaf in flat.values]
        own = [name for name, per_rank in everything if per_rank and name not in entries]
        if own:
            raise ConfigError(f"{own[0]!r} is a PerRank, and without comm nobody knows which rank this is: pass comm")
    return Fill.plan(flat, entries, strict=strict, rank=group.rank)


# -- what other ranks have --------------------------------------------------------------------------------------------


def _fetch_missing(group: Group, fill: Fill, wanted: bool) -> None:
    """Take what this rank's dict lacks from the lowest rank that has the same boxes. Collective."""
    have = {} if not wanted else {_key(leaf): leaf for leaf in _shared(fill) if leaf.name in fill.pairs}
    need = {} if not wanted else {_key(leaf): leaf for leaf in _shared(fill) if leaf.name not in fill.pairs}
    said = [json.loads(data) for data in group.allgather(json.dumps([list(have), list(need)]).encode())]
    owners: dict[str, int] = {}
    for rank, (keys, _) in enumerate(said):
        for key in keys:
            owners.setdefault(key, rank)
    error: Exception | None = None
    for key in sorted({key for _, keys in said for key in keys} & set(owners)):
        own = _content(fill, have[key]) if owners[key] == group.rank else None
        data = bcast_bytes(group.comm, own, owners[key], group.waiter, f"the tensor {json.loads(key)[0]}")
        if key in need and error is None:
            try:
                _receive(fill, need[key], data)
            except Exception as problem:  # write_from is the caller's code: the other ranks wait
                error = problem
    group.agree(error)


def _shared(fill: Fill) -> list[TensorLeaf]:
    return [leaf for leaf in fill.flat.tensors if not leaf.per_rank]


def _key(leaf: TensorLeaf) -> str:
    """What must be the same for one rank's copy to be another's."""
    boxes = [[list(piece.offsets), list(piece.shape)] for piece in leaf.pieces]
    return json.dumps([leaf.name, leaf.dtype.name, list(leaf.global_shape), boxes])


def _content(fill: Fill, leaf: TensorLeaf) -> bytes:
    return b"".join(part.array.tobytes() for part in fill.parts if part.leaf is leaf)


def _receive(fill: Fill, leaf: TensorLeaf, data: bytes) -> None:
    start = 0
    for piece in leaf.pieces:
        nbytes = piece.size * leaf.dtype.itemsize
        put(piece, np.frombuffer(data[start : start + nbytes], leaf.dtype.numpy).reshape(piece.shape))
        start += nbytes
    fill.pairs[leaf.name] = leaf.name
