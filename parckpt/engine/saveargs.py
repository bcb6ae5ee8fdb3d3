"""The arguments of `save_checkpoint`, checked: in MindSpore's order, so that of two wrong ones the same is named."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from parckpt.core import checks, naming
from parckpt.engine import notyet
from parckpt.engine.staging import Modes
from parckpt.errors import ConfigError, ConfigTypeError, DirectoryNotFoundError, NotAFileError
from parckpt.formats.base import Format
from parckpt.formats.registry import FORMATS
from parckpt.storage.filesystem import FileSystem, try_stat

__all__ = ["Arguments", "check_directory", "file_form", "file_path"]


@dataclass(frozen=True)
class Arguments:
    """Checked arguments.

    Attributes
    ----------
    path : str
        Absolute, with the extension, also where a directory without it is made.
    several : bool
        A file per rank, in a directory.
    marks : mapping
        What MindSpore puts into the file's metadata, where the format has any.
    warnings : tuple of str
        What was asked for and has no effect.
    """

    path: str
    form: Format
    several: bool
    remove_redundancy: bool
    split_replicas: bool
    crc_check: bool
    replica_check: bool
    append: dict[str, Any]
    marks: dict[str, str]
    modes: Modes
    warnings: tuple[str, ...]

    @classmethod
    def checked(cls, given: Mapping[str, Any], fs: FileSystem | None, *, together: bool) -> Arguments:
        """Check what the caller gave. Not collective.

        Parameters
        ----------
        fs : FileSystem or None
            Where to look whether a directory has the name; None on ranks that leave that to root.
        together : bool
            The call is one of several ranks.
        """
        checks.unknown("save_checkpoint", given["unknown"], given)
        form = file_form(given["format"])
        _check_object(given["save_obj"])
        path = file_path(given["ckpt_file_name"], form.extension)
        if fs is not None:
            _check_name(fs, (path, os.path.abspath(given["ckpt_file_name"])))
        integrated = checks.boolean("integrated_save", given["integrated_save"])
        asynchronous = checks.asynchronous(given["async_save"])
        append = checks.appended(given["append_dict"])
        encrypts = _check_encryption(given["enc_key"], given["enc_mode"])
        crc_check = checks.boolean("crc_check", given["crc_check"])
        spared = given["remove_redundancy"]
        if spared is not None:
            checks.boolean("remove_redundancy", spared)
        if form.name != "ckpt":
            _check_plain_only(form.name, given)
        if encrypts and crc_check:
            raise ConfigError("crc_check cannot be used with enc_key: MindSpore cannot read the result")
        if given["split_replicas"] is not None:
            checks.boolean("split_replicas", given["split_replicas"])
        notyet.refuse(async_save=asynchronous, enc_key=given["enc_key"])
        return cls(
            path=path,
            form=form,
            several=together and (bool(spared) or not integrated),
            remove_redundancy=bool(spared),
            split_replicas=bool(spared) if given["split_replicas"] is None else given["split_replicas"],
            crc_check=crc_check,
            replica_check=checks.boolean("replica_check", given["replica_check"]),
            append=append,
            marks={} if spared is None else {"remove_redundancy": str(spared)},
            modes=Modes(
                checks.mode("file_mode", given["file_mode"], 0o600), checks.mode("dir_mode", given["dir_mode"], 0o700)
            ),
            warnings=_void(given),
        )

    def compared(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {
            "ckpt_file_name": self.path,
            "format": self.form.name,
            "integrated_save": not self.several,
            "remove_redundancy": self.remove_redundancy,
            "split_replicas": self.split_replicas,
            "crc_check": self.crc_check,
            "replica_check": self.replica_check,
            "file_mode": self.modes.file,
            "dir_mode": self.modes.directory,
        }


def check_directory(fs: FileSystem, path: str) -> None:
    """DirectoryNotFoundError if there is no directory to write a file into."""
    directory = os.path.dirname(path)
    if try_stat(fs, directory) is None:
        raise DirectoryNotFoundError(
            f"{directory} does not exist: make it before saving {os.path.basename(path)} into it",
            errno=errno.ENOENT,
            path=directory,
        )


def _check_name(fs: FileSystem, paths: Iterable[str]) -> None:
    """Refuse a name that a directory has, unless that is a checkpoint of ours, which may be replaced."""
    for path in paths:
        stat = try_stat(fs, path)
        if stat is not None and stat.is_dir and try_stat(fs, os.path.join(path, naming.MANIFEST)) is None:
            raise NotAFileError(f"ckpt_file_name {path} is a directory; expected the name of a file in it", path=path)


def file_form(name: Any) -> Format:
    """The format of a name."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {name!r}", parameter="format")
    return FORMATS[name]


def file_path(name: Any, extension: str) -> str:
    """Absolute path with the extension, which is added where it is missing."""
    try:
        path = os.fspath(name)
    except TypeError:
        path = name
    if not isinstance(path, str):
        raise ConfigTypeError(f"ckpt_file_name must be a str, not {type(name).__name__}", parameter="ckpt_file_name")
    if os.path.basename(path) in ("", ".", ".."):
        raise NotAFileError(f"ckpt_file_name {path!r} names a directory; expected a file", path=path)
    path = path if path.endswith(extension) else path + extension
    if os.path.basename(path) == extension:
        raise ConfigError(f"ckpt_file_name {path!r} has no name before the extension", parameter="ckpt_file_name")
    if os.path.basename(path).startswith("."):
        raise ConfigError(
            f"ckpt_file_name {path!r} begins with a dot: such names are what parckpt sweeps", parameter="ckpt_file_name"
        )
    return os.path.abspath(path)


def _check_object(save_obj: Any) -> None:
    """Only what kind of thing it is: reading it may be expensive, and comes last."""
    kinds: tuple[Callable[[Any], bool], ...] = (
        lambda value: isinstance(value, (Mapping, list)),
        callable,
        lambda value: hasattr(value, "state_dict"),
    )
    if not any(kind(save_obj) for kind in kinds):
        raise ConfigTypeError(
            "save_obj must be a mapping, a callable, a list of {'name': ..., 'data': ...} or have state_dict(), "
            f"not {type(save_obj).__name__}",
            parameter="save_obj",
        )


def _check_encryption(enc_key: Any, enc_mode: Any) -> bool:
    if enc_key is not None:
        checks.encryption(enc_key, enc_mode)
    checks.text("enc_mode", enc_mode)
    return enc_key is not None


def _check_plain_only(form: str, given: Mapping[str, Any]) -> None:
    defaults = {"enc_key": None, "enc_mode": "AES-GCM", "incremental": False, "global_step_num": None}
    for name, default in defaults.items():
        if given[name] != default:
            raise ConfigError(f"{name} needs format 'ckpt': {form} has nothing of the kind", parameter=name)


def _void(given: Mapping[str, Any]) -> tuple[str, ...]:
    said = {
        f"enc_mode={given['enc_mode']!r} has no effect without enc_key: nothing is encrypted": (
            given["enc_key"] is None and given["enc_mode"] != "AES-GCM"
        ),
        "incremental has no effect: there are no MapParameters to save in parts": bool(given["incremental"]),
        "global_step_num has no effect: append_dict={'step_num': ...} stores the step": (
            given["global_step_num"] is not None
        ),
    }
    return tuple(message for message, applies in said.items() if applies)
