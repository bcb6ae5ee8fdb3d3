"""`save_checkpoint`: one state under one name, by this process or by all ranks together."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from parckpt.comm.launch import SELF, launched_by, resolve
from parckpt.comm.wait import SystemClock, Waiter
from parckpt.core import appended
from parckpt.core.flat import FlatState
from parckpt.core.manifest import Facts
from parckpt.core.state import flatten
from parckpt.core.version import VERSION
from parckpt.engine import notyet
from parckpt.engine.belonging import Owner
from parckpt.engine.group import Group
from parckpt.engine.local import LocalState, as_state
from parckpt.engine.planning import check_replicas, make_plan, node_numbers
from parckpt.engine.rounds import compare_arguments
from parckpt.engine.saver import Saver, Ticket
from parckpt.engine.staging import Modes
from parckpt.engine.sweep import recover
from parckpt.errors import (
    ConfigError,
    ConfigTypeError,
)
from parckpt.formats.registry import FORMATS
from parckpt.signals import deferred_interrupt
from parckpt.storage.filesystem import FileSystem, PosixFileSystem
from parckpt.storage.identity import identify
from parckpt.storage.lock import Lock

__all__ = ["save_checkpoint"]

_TIMEOUT_S = 1800.0
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
    remove_redundancy: bool = False,
    split_replicas: bool | None = None,
    replica_check: bool = True,
    file_mode: int = 0o600,
    dir_mode: int = 0o700,
    agree_timeout_s: float = _TIMEOUT_S,
    filesystem: FileSystem | None = None,
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
        Values to store beside the tensors.
    choice_func : callable, optional
        Tensors whose name it maps to False are left out.
    crc_check : bool
        Add MindSpore's checksum. Our own are always on.
    format : {"ckpt", "safetensors"}

    Raises
    ------
    ConfigError
        Impossible arguments; `Shard` or `PerRank` in a launched world without ``comm``.
    LockedError
        Another process is saving under this name.
    ParckptError
        The save failed; the previous file is untouched.
    """
    fs = filesystem if filesystem is not None else PosixFileSystem()
    split = remove_redundancy if split_replicas is None else split_replicas
    options = {
        "integrated_save": integrated_save,
        "remove_redundancy": remove_redundancy,
        "split_replicas": split,
        "crc_check": crc_check,
        "replica_check": replica_check,
        "format": format,
        "file_mode": file_mode,
        "dir_mode": dir_mode,
    }

    def checked() -> str:
        notyet.refuse(async_save=async_save, enc_key=enc_key)
        return _file_path(ckpt_file_name, _form(format).extension)

    group = Group(resolve(SELF if comm is None else comm, os.environ), Waiter(agree_timeout_s))
    try:
        with deferred_interrupt():
            path = _agreed_path(group, checked, options)
            several = comm is not None and (remove_redundancy or not integrated_save)
            saving = _Saving(
                group,
                fs,
                path,
                _form(format),
                integrated=not several,
                remove_redundancy=remove_redundancy,
                split_replicas=split,
                crc_check=crc_check,
                replica_check=replica_check,
                modes=Modes(file_mode, dir_mode),
            )
            saving.run(lambda: _flat_to_save(save_obj, choice_func, comm), dict(append_dict or {}))
    finally:
        group.comm.free()


def _agreed_path(group: Group, checked: Callable[[], str], options: Mapping[str, Any]) -> str:
    """Check the arguments, which must be the same on all ranks. Collective."""
    if group.size == 1:
        return checked()
    path, error = "", None
    try:
        path = checked()
    except Exception as problem:  # the other ranks wait for the outcome
        error = problem
    group.agree(error)
    compare_arguments(group, {"ckpt_file_name": path, **options})
    return path


@dataclass(frozen=True)
class _Saving:
    """One `save_checkpoint` call."""

    group: Group
    fs: FileSystem
    path: str
    form: Any
    integrated: bool
    remove_redundancy: bool
    split_replicas: bool
    crc_check: bool
    replica_check: bool
    modes: Modes

    def run(self, flatten_state: Callable[[], FlatState], append: dict[str, Any]) -> None:
        directory, name = os.path.split(self.path)
        stem = name[: -len(self.form.extension)]
        locals_: list[LocalState] = []
        locks: list[Lock] = []
        try:
            self._agreed(lambda: locals_.append(LocalState.of(flatten_state())))
            local = locals_[0]
            planned = make_plan(
                self.group,
                local,
                node_numbers(self.group),
                integrated=self.integrated,
                remove_redundancy=self.remove_redundancy,
                split_replicas=self.split_replicas,
            )
            if self.replica_check:
                check_replicas(self.group, local, planned)
            attempt = self.group.bcast(secrets.token_bytes(16) if self.group.is_root else None).hex()
            saver = Saver(
                self.group,
                self.fs,
                SystemClock(),
                directory,
                self.form,
                crc_check=self.crc_check,
                modes=self.modes,
                check=lambda: locks[0].check(),
            )
            strings = _strings(local.flat) if self.form.name == "ckpt" else {}
            marks = {"remove_redundancy": "True"} if self.remove_redundancy else {}
            settled = appended.settle({**strings, **append}, 0, 0)
            ticket = Ticket(self._facts(stem, attempt, append), True, settled, marks)
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
            Lock.acquire(self.fs, directory, stem, identity, SystemClock(), _LOCK_STALE_S, mode=self.modes.file)
        )
        recover(self.fs, directory, Owner(stem, one_name=True), locks[0].check, self.modes)
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
            integrated=self.integrated,
            created=SystemClock().wall(),
            reason="save_checkpoint",
            remove_redundancy=self.remove_redundancy,
            crc_check=self.crc_check,
            writer=f"parckpt {VERSION}",
        )

    def _on_root(self, step: Callable[[], None]) -> None:
        self._agreed(step if self.group.is_root else lambda: None)

    def _agreed(self, step: Callable[[], None]) -> None:
        error: Exception | None = None
        try:
            step()
        except Exception as problem:  # the other ranks wait for the outcome
            error = problem
        if self.group.size == 1 and error is not None:
            raise error
        self.group.agree(error)


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


def _file_path(name: str | os.PathLike[str], extension: str) -> str:
    path = os.fspath(name)
    if not isinstance(path, str):
        raise ConfigTypeError(f"ckpt_file_name must be a str, not {type(name).__name__}")
    if not os.path.basename(path):
        raise ConfigError(f"ckpt_file_name {path!r} has no file name")
    path = path if path.endswith(extension) else path + extension
    if os.path.basename(path) == extension:
        raise ConfigError(f"ckpt_file_name {path!r} has no name before the extension")
    if os.path.basename(path).startswith("."):
        raise ConfigError(f"ckpt_file_name {path!r} begins with a dot: such names are what parckpt sweeps")
    return os.path.abspath(path)


def _form(name: Any) -> Any:
    if name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {name!r}", parameter="format")
    return FORMATS[name]
