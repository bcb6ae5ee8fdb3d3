"""Where the next checkpoint goes and what it is called where the program says so: callable prefix and directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from parckpt.core import naming
from parckpt.errors import ConfigError, ConfigTypeError

__all__ = ["DEFAULT_FAMILY", "Destination", "DirectoryRule", "NameRule", "Names", "Parameters"]

DEFAULT_FAMILY = "CKP"  # MindSpore's default prefix

NameRule = str | Callable[[Any], str]
DirectoryRule = str | os.PathLike[str] | Callable[[Any], str | os.PathLike[str]] | None

# MindSpore's limit. Checked here too, because the error of the file system comes only when something is written.
_MAX_DIRECTORY_LENGTH = 1024


@dataclass(frozen=True)
class Parameters:
    """What a callable prefix or directory is called with.

    All else that a training loop tells of itself (``epoch_num``, ``net_outputs``, whatever it has) can be asked for
    too, as attribute or item. The numbers are those of the run: a loop that begins anew after a restore counts from 1
    again, and names made of that would come again.

    Attributes
    ----------
    cur_step_num : int
        Global step, from 1; 0 when a run starts.
    cur_epoch_num : int
        From 1.
    batch_num : int
        Steps of an epoch. Where that is not known, all steps so far are one epoch.
    """

    cur_step_num: int
    cur_epoch_num: int
    batch_num: int
    loop: Any = field(default=None, repr=False)

    @classmethod
    def at(cls, step: int, steps_per_epoch: int | None, loop: Any = None) -> Parameters:
        """Those of a step's end; ``loop`` is what the training loop tells."""
        epoch, _ = naming.epoch_and_step(max(1, step), steps_per_epoch)
        return cls(step, epoch, steps_per_epoch or max(1, step), loop)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loop":
            raise AttributeError(name)
        # MindSpore's are a dict that may be asked for attributes: a missing one is a KeyError there.
        told = self.loop.get(name) if isinstance(self.loop, Mapping) else getattr(self.loop, name, None)
        if told is None:
            raise AttributeError(f"the training loop has told no {name}")
        return told

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError as error:
            raise KeyError(name) from error


@dataclass(frozen=True)
class Destination:
    """Where one checkpoint goes.

    Attributes
    ----------
    directory : str
        Absolute.
    name : str or None
        Name without extension; None: made of prefix, epoch and step.
    """

    directory: str
    name: str | None = None


@dataclass(frozen=True)
class Names:
    """What `ModelCheckpoint` was told about names.

    Attributes
    ----------
    prefix, directory : str or callable
        Checked, if it is a str; the directory then is absolute.
    family : str
        Names the lock and what the run finds again.
    """

    prefix: NameRule
    directory: str | Callable[[Any], str | os.PathLike[str]]
    family: str

    @classmethod
    def of(cls, prefix: NameRule, directory: DirectoryRule, family: str | None) -> Names:
        """Check what the user gave.

        Raises
        ------
        ConfigTypeError, ConfigError
            As `naming.check_prefix` and `_absolute`; or there are two families.
        """
        if callable(prefix):
            own = naming.check_prefix(DEFAULT_FAMILY if family is None else family)
        else:
            own = naming.check_prefix(prefix)
            if family not in (None, own):
                raise ConfigError(f"family={family!r} is for a callable prefix; here the family is {prefix!r}")
        return cls(prefix, directory if callable(directory) else _absolute(directory, "directory"), own)

    @property
    def are_fixed(self) -> bool:
        """Whether names follow from prefix, epoch and step, in one directory."""
        return not callable(self.prefix) and not callable(self.directory)

    @property
    def prefix_in_names(self) -> str | None:
        """The prefix from the first save on; None where earlier runs' names have a say, as in MindSpore."""
        return None if self.are_fixed else self.family

    def home(self, parameters: Any) -> str:
        """The directory that a run starts in. Not collective."""
        if not callable(self.directory):
            return self.directory
        return _absolute(self.directory(parameters), "what directory returned")

    def at(self, parameters: Any) -> Destination:
        """Where a save goes. Calls what the user gave; not collective.

        Raises
        ------
        ConfigTypeError, ConfigError
            What came back cannot be a name, or a directory.
        """
        name = naming.check_name(self.prefix(parameters)) if callable(self.prefix) else None
        return Destination(self.home(parameters), name)

    def describe(self) -> dict[str, Any]:
        """For the comparison over ranks; callables can only be compared by what they return."""
        return {"prefix": "<callable>", "family": self.family} if callable(self.prefix) else {"prefix": self.prefix}


def _absolute(directory: Any, what: str) -> str:
    if directory is None:
        if what != "directory":
            raise ConfigTypeError(f"{what} must be a str, not None")
        return os.getcwd()
    try:
        path = os.fspath(directory)
    except TypeError as error:
        raise ConfigTypeError(f"{what} must be a str, not {type(directory).__name__}") from error
    if not isinstance(path, str):
        raise ConfigTypeError(f"{what} must be a str, not {type(directory).__name__}")
    if not path.strip():
        raise ConfigError(f"{what} must not be blank")
    if len(path) > _MAX_DIRECTORY_LENGTH:
        raise ConfigError(f"{what} has {len(path)} characters, at most {_MAX_DIRECTORY_LENGTH} are possible")
    if "\0" in path:
        raise ConfigError(f"{what} must not hold a null character: {path!a}")
    return os.path.abspath(path)
