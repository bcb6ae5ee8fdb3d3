"""Every exception and warning parckpt raises, grouped by what the catcher can do about it.

Each class has a stable ``code``. Errors cross ranks as ``(code, message, facts)``, never pickled; ``comm.outcome``
does that, so every class here can be rebuilt from those three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

__all__ = [
    "CheckpointExistsError",
    "CheckpointGoneError",
    "CheckpointNotFoundError",
    "ChecksumError",
    "ConfigError",
    "ConfigKeyError",
    "ConfigTypeError",
    "ConfigWarning",
    "DirectoryNotFoundError",
    "FileInTheWayError",
    "FormatError",
    "IntegrityError",
    "InternalError",
    "LayoutError",
    "LockedError",
    "NoSpaceError",
    "NotAFileError",
    "ParckptError",
    "ParckptWarning",
    "RankError",
    "SaveInProgressError",
    "StateMismatchError",
    "StateWarning",
    "StepMismatchError",
    "StorageError",
    "SyncError",
    "TimeoutExpiredError",
    "TruncatedError",
    "UnsupportedVersionError",
]


class ParckptError(Exception):
    """Base of every parckpt error.

    Parameters
    ----------
    message : str
        One sentence: what, where, expected, found.
    **facts
        Plain values (str, int, float, bool, None, lists and dicts of them) that a handler can use; they become
        attributes and travel to the other ranks with the message.

    Attributes
    ----------
    code : str
        Stable identifier of the class.
    failures : dict of int to str
        Rank to message, filled when the error was raised on all ranks because some failed; empty otherwise.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts: dict[str, Any] = facts
        self.failures: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        # Only called for names that are not found otherwise. `facts` itself is missing while unpickling.
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self).code, self.message, self.facts, self.failures))


class ConfigError(ParckptError, ValueError):
    """The caller asked for something impossible: fix the call."""

    code = "config"


class ConfigTypeError(ConfigError, TypeError):
    """As `ConfigError`, for an argument of a wrong type."""

    code = "config-type"


class NotAFileError(ConfigError, IsADirectoryError):
    """A file's name was asked for, and a directory has it."""

    code = "not-a-file"


class ConfigKeyError(ConfigError, KeyError):
    """As `ConfigError`, for a name that something given does not know."""

    code = "config-key"


class LayoutError(ParckptError, ValueError):
    """Shards overlap, leave gaps or disagree between ranks: fix the partitioning."""

    code = "layout"


class StepMismatchError(ParckptError, ValueError):
    """Ranks called different things, or with different steps, when all had to do the same."""

    code = "step-mismatch"


class StateMismatchError(ParckptError, ValueError, RuntimeError):
    """Checkpoint and target differ. (A RuntimeError, too, because that is what MindSpore raises.)

    Attributes
    ----------
    missing, unexpected : list of str
        Names the target has and the checkpoint lacks, and the reverse.
    mismatched : list of str
        One sentence for each name whose shape or dtype differs.
    """

    code = "state-mismatch"

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
        **facts: Any,
    ) -> None:
        super().__init__(
            message, missing=list(missing), unexpected=list(unexpected), mismatched=list(mismatched), **facts
        )


class CheckpointNotFoundError(ParckptError, FileNotFoundError, ValueError):
    """No checkpoint where one was expected. (A ValueError, too, because that is what MindSpore raises.)"""

    code = "not-found"


class CheckpointGoneError(CheckpointNotFoundError):
    """The checkpoint was deleted (by retention, say) while it was being read."""

    code = "gone"


class CheckpointExistsError(ParckptError, FileExistsError):
    """The name is taken by something that must not be replaced."""

    code = "exists"


class FormatError(ParckptError, ValueError):
    """Not bytes of the format they claim to be. Facts: ``path``, ``byte_offset``, ``field``."""

    code = "format"


class UnsupportedVersionError(FormatError):
    """Written by a newer parckpt than this one. Not damage: update parckpt."""

    code = "version"


class IntegrityError(ParckptError, ValueError):
    """Our bytes, damaged: try an older checkpoint. (A ValueError, too, because that is what MindSpore raises.)"""

    code = "integrity"


class ChecksumError(IntegrityError):
    """Stored bytes differ from their checksum. Facts: ``path``, ``chunk``, ``tensors``."""

    code = "checksum"


class TruncatedError(IntegrityError):
    """A file is shorter or longer than its manifest says, or missing."""

    code = "truncated"


class StorageError(ParckptError, OSError):
    """The file system said no. Facts: ``operation``, ``path``; ``errno`` is kept."""

    code = "storage"

    def __init__(self, message: str, *, errno: int | None = None, **facts: Any) -> None:
        super().__init__(message, errno=errno, **facts)
        self.errno = errno


class DirectoryNotFoundError(StorageError, FileNotFoundError):
    """The directory to write into is not there."""

    code = "no-directory"


class FileInTheWayError(StorageError, NotADirectoryError):
    """A file has the name that is a directory's."""

    code = "file-in-the-way"


class SyncError(StorageError):
    """A sync failed. The bytes must be taken for lost: it is never retried on the same file."""

    code = "sync"


class NoSpaceError(StorageError):
    """Not enough free space or quota for what was about to be written."""

    code = "no-space"


class LockedError(ParckptError):
    """Another job owns this directory and prefix. Fact: ``holder``."""

    code = "locked"


class RankError(ParckptError):
    """Another rank failed with something that is not a parckpt error. Facts: ``rank``, ``type``."""

    code = "rank"


class TimeoutExpiredError(ParckptError, TimeoutError):
    """A bounded wait ran out. Fact: ``missing`` ranks, as far as known."""

    code = "timeout"


class SaveInProgressError(ParckptError):
    """An earlier save is still running: wait for it, or skip this one."""

    code = "in-progress"


class InternalError(ParckptError):
    """A bug in parckpt."""

    code = "internal"


class ParckptWarning(UserWarning):
    """Base of every parckpt warning."""


class ConfigWarning(ParckptWarning):
    """An option has no effect, or not the one its name suggests."""


class StateWarning(ParckptWarning):
    """What was saved or loaded may not be what was meant."""


def classes_by_code() -> Mapping[str, type[ParckptError]]:
    """Every concrete error class by its ``code``."""
    found: dict[str, type[ParckptError]] = {}
    pending: list[type[ParckptError]] = [ParckptError]
    while pending:
        cls = pending.pop()
        if "code" in vars(cls):
            found[cls.code] = cls
        pending.extend(cls.__subclasses__())
    return found


def _rebuild(
    code: str, message: str, facts: Mapping[str, Any], failures: Mapping[int, str] | None = None
) -> ParckptError:
    cls = classes_by_code().get(code, ParckptError)
    error = cls(message, **dict(facts))
    error.failures = dict(failures or {})
    return error


def rebuild(code: str, message: str, facts: Mapping[str, Any]) -> ParckptError:
    """Make the error that another rank described; an unknown code gives the base class."""
    return _rebuild(code, message, facts)
