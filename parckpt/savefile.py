"""`save_checkpoint`: one state under one name, by this process or by all ranks together."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from parckpt.comm.launch import SELF, launched_by, resolve
from parckpt.comm.wait import AGREE_TIMEOUT_S, SystemClock, Waiter
from parckpt.core import appended
from parckpt.core.flat import FlatState
from parckpt.core.manifest import Facts
from parckpt.core.state import flatten
from parckpt.core.version import VERSION
from parckpt.engine.belonging import Owner
from parckpt.engine.group import Group
from parckpt.engine.local import LocalState, as_state
from parckpt.engine.planning import check_replicas, make_plan, node_numbers
from parckpt.engine.rounds import compare_arguments
from parckpt.engine.saveargs import Arguments, check_directory
from parckpt.engine.saver import Saver, Ticket
from parckpt.engine.sweep import recover
from parckpt.errors import ConfigError, ConfigWarning
from parckpt.formats.base import Format
from parckpt.signals import deferred_interrupt
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.storage.identity import identify
from parckpt.storage.lock import Lock

__all__ = ["save_checkpoint"]

_LOCK_STALE_S = 600.0


def save_checkpoint(
    save_obj: Any,
    ckpt_file_name: str | os.PathLike[str],
    integrated_save: bool = True,
    async_save: bool | str = False,
    append_dict: Mapping[str, Any] | None = None,
    enc_key: bytes | None = None,
    enc_mode: str = "AES-GCM",
    choice_func: Callable[[str], bool] | None = None,
    crc_check: bool = False,
    format: str = "ckpt",
    *,
    comm: Any = None,
    remove_redundancy: bool | None = None,
    incremental: Any = False,
    global_step_num: int | None = None,
    split_replicas: bool | None = None,
    replica_check: bool = True,
    file_mode: int = 0o600,
    dir_mode: int = 0o700,
    agree_timeout_s: float = AGREE_TIMEOUT_S,
    filesystem: FileSystem | None = None,
    **unknown: Any,
) -> None:
    """Save a state under a name; what had the name is replaced only when the new one is durable.

    Without ``comm`` this process saves alone, whatever launched it; with ``comm`` the call is collective.

    Parameters
    ----------
    save_obj : mapping, callable, object with ``state_dict()``, or list of ``{"name": ..., "data": ...}``
    ckpt_file_name : str or path-like
        The format's extension is added if it is missing. Several files (``integrated_save=False`` or
        ``remove_redundancy=True`` with ``comm``) become a directory of this name without the extension.
    append_dict : mapping, optional
        Values to store beside the tensors: int, float, bool, str, ndarray or `Leaf`. None may have a tensor's name.
    choice_func : callable, optional
        Tensors whose name it maps to False are left out.
    crc_check : bool
        Add MindSpore's checksum. Our own are always on.
    format : {"ckpt", "safetensors"}
    remove_redundancy : bool, optional
        With ``comm``: write what several ranks hold alike once, in a file per rank.
    incremental, global_step_num
        MindSpore's two other keywords, without effect.

    Raises
    ------
    ConfigError, ConfigTypeError
        Impossible arguments, the first in MindSpore's order; `Shard` or `PerRank` in a launched world without ``comm``.
    NotAFileError, DirectoryNotFoundError
        The name is a directory's; the directory to save into is not there.
    LockedError
        Another process is saving under this name.
    ParckptError
        The save failed; the previous file is untouched.
    """
    given = dict(locals())
    fs = filesystem if filesystem is not None else PosixFileSystem()
    group = Group(resolve(SELF if comm is None else comm, os.environ), Waiter(agree_timeout_s))
    try:
        with deferred_interrupt():
            look = fs if group.is_root else None
            arguments = group.run(lambda: Arguments.checked(given, look, together=comm is not None))
            compare_arguments(group, arguments.compared())
            _Saving(group, fs, arguments).run(lambda: _flat_to_save(save_obj, choice_func, comm))
    finally:
        group.comm.free()
    for message in arguments.warnings if group.is_root else ():
        warnings.warn(message, ConfigWarning, stacklevel=2)


@dataclass(frozen=True)
class _Saving:
    """One `save_checkpoint` call."""

    group: Group
    fs: FileSystem
    arguments: Arguments

    @property
    def form(self) -> Format:
        return self.arguments.form

    def run(self, flatten_state: Callable[[], FlatState]) -> None:
        """Save. Collective."""
        arguments = self.arguments
        directory, name = os.path.split(arguments.path)
        stem = name[: -len(self.form.extension)]
        locks: list[Lock] = []
        try:
            local = self.group.run(lambda: LocalState.of(flatten_state()))
            self._on_root(lambda: check_directory(self.fs, arguments.path))
            planned = make_plan(
                self.group,
                local,
                node_numbers(self.group),
                integrated=not arguments.several,
                remove_redundancy=arguments.remove_redundancy,
                split_replicas=arguments.split_replicas,
            )
            if arguments.replica_check:
                check_replicas(self.group, local, planned)
            attempt = self.group.bcast(secrets.token_bytes(16) if self.group.is_root else None).hex()
            saver = Saver(
                self.group,
                self.fs,
                SystemClock(),
                directory,
                self.form,
                crc_check=arguments.crc_check,
                modes=arguments.modes,
                check=lambda: locks[0].check(),
            )
            strings = _strings(local.flat) if self.form.name == "ckpt" else {}
            # Appended values may be read by user code.
            settled = self.group.run(lambda: appended.settle({**strings, **arguments.append}, 0, 0))
            ticket = Ticket(self._facts(stem, attempt, arguments.append), True, settled, arguments.marks)
            self._on_root(lambda: self._begin(directory, stem, attempt, locks, saver, planned, ticket))
            saver.save(local, planned, ticket)
        finally:
            for lock in locks:
                lock.release()

    def _begin(
        self, directory: str, stem: str, attempt: str, locks: list[Lock], saver: Saver, planned: Any, ticket: Ticket
    ) -> None:
        identity = identify(os.environ, attempt)
        locks.append(
            Lock.acquire(
                self.fs, directory, stem, identity, SystemClock(), _LOCK_STALE_S, mode=self.arguments.modes.file
            )
        )
        recover(self.fs, directory, Owner(stem, one_name=True), locks[0].check, self.arguments.modes)
        try:
            saver.begin(planned, ticket)
        except Exception as error:
            saver.reject(saver.staging(ticket), error)
            raise

    def _facts(self, stem: str, attempt: str, append: Mapping[str, Any]) -> Facts:
        step = append.get("step_num", 0)
        epoch = append.get("epoch_num", 0)
        return Facts(
            stem=stem,
            token=attempt[:16],
            attempt=attempt,
            run_id=attempt,
            family=stem,
            prefix=stem,
            sequence=1,
            step=step if type(step) is int and step >= 0 else 0,
            epoch=epoch if type(epoch) is int and epoch >= 0 else 0,
            step_in_epoch=0,
            world_size=self.group.size,
            format=self.form.name,
            integrated=not self.arguments.several,
            created=SystemClock().wall(),
            reason="save_checkpoint",
            remove_redundancy=self.arguments.remove_redundancy,
            crc_check=self.arguments.crc_check,
            writer=f"parckpt {VERSION}",
        )

    def _on_root(self, step: Callable[[], None]) -> None:
        self.group.run(step if self.group.is_root else lambda: None)


def _flat_to_save(save_obj: Any, choice_func: Callable[[str], bool] | None, comm: Any) -> FlatState:
    flat = flatten(as_state(save_obj), writable=False)
    if comm is None:
        _refuse_parts(flat)
    if choice_func is None:
        return flat
    tensors = tuple(leaf for leaf in flat.tensors if choice_func(leaf.name))
    plain = tuple(leaf for leaf in flat.values if choice_func(leaf.name))
    return replace(flat, tensors=tensors, values=plain)


def _strings(flat: FlatState) -> dict[str, str]:
    """Texts that stand in a ckpt file, too, as MindSpore writes them; safetensors has none but in the manifest."""
    return {leaf.name: leaf.value for leaf in flat.values if isinstance(leaf.value, str) and not leaf.per_rank}


def _refuse_parts(flat: FlatState) -> None:
    variable, size = launched_by(os.environ)
    if size == 1:
        return
    parts = [leaf.name for leaf in flat.tensors if leaf.split or leaf.per_rank]
    parts += [leaf.name for leaf in flat.values if leaf.per_rank]
    if parts:
        raise ConfigError(
            f"{parts[0]!r} is a Shard or PerRank, and {variable}={size} says that there are other ranks: "
            "pass comm=MPI.COMM_WORLD to save all of them together, or comm=parckpt.SELF for this process alone"
        )
