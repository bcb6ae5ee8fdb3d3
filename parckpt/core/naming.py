"""Every name parckpt gives to something on disk: how it is made, and how it is recognised.

Most names follow from a prefix: ``<prefix>-<epoch>_<step>``. `parse` and `parse_stem` accept nothing else than what
`Stem.__str__` and the functions below make: no leading zeros, no other digits than 0 to 9, no prefix that
`check_prefix` refuses. Where the program chose the name (a callable prefix, `save_checkpoint`), it is any that
`check_name` accepts; whose such a checkpoint is, only its manifest tells.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from parckpt.errors import ConfigError, ConfigTypeError

__all__ = [
    "ABORTED",
    "EXTENSIONS",
    "MANIFEST",
    "PLAN",
    "RECORD",
    "REWRITING",
    "Name",
    "Stem",
    "bad_name",
    "belongs",
    "check_name",
    "check_prefix",
    "epoch_and_step",
    "lock_name",
    "manifest_name",
    "numbered_prefix",
    "parse",
    "parse_hidden",
    "parse_rank_directory",
    "parse_stem",
    "rank_directory",
    "replaced_name",
    "run_name",
    "staging_name",
    "token",
    "trash_name",
]

# Inside a step directory.
MANIFEST = "manifest"
PLAN = "plan"
RECORD = "record"
ABORTED = "aborted"
REWRITING = "rewriting"  # not a save: a checkpoint is made from another one, and nobody else publishes it

# Format (as in CheckpointConfig) to the extension of its files.
EXTENSIONS = {"ckpt": "ckpt", "safetensors": "safetensors", "hdf5": "h5"}

# Linux names have at most 255 bytes; what is put around a prefix needs up to 90: two numbers of 19 digits,
# "_breakpoint", ".staging-" and a token.
_MAX_PREFIX_NBYTES = 160

Kind = Literal["step", "data", "manifest", "staging", "trash", "replaced", "bad"]

_NUMBER = r"(?:0|[1-9][0-9]{0,18})"
_STEM = re.compile(rf"(?P<prefix>.*)-(?P<epoch>{_NUMBER})_(?P<step>{_NUMBER})(?P<mark>_breakpoint)?", re.DOTALL)
_HIDDEN = re.compile(r"\.(?P<stem>.+)\.(?P<kind>staging|trash|replaced|bad)-(?P<token>[0-9a-f]{16})", re.DOTALL)
_MANIFEST = re.compile(r"(?P<stem>.*)\.(?P<token>[0-9a-f]{16})\.manifest", re.DOTALL)
_DATA = re.compile(rf"(?P<stem>.*)\.(?P<extension>{'|'.join(EXTENSIONS.values())})", re.DOTALL)
_RANK = re.compile(r"rank_(0|[1-9][0-9]{0,8})")


@dataclass(frozen=True, order=True)
class Stem:
    """What the names of one checkpoint have in common: ``<prefix>-<epoch>_<step in epoch>[_breakpoint]``."""

    prefix: str
    epoch: int
    step_in_epoch: int
    is_breakpoint: bool = False

    def __str__(self) -> str:
        return f"{self.prefix}-{self.epoch}_{self.step_in_epoch}{'_breakpoint' * self.is_breakpoint}"


@dataclass(frozen=True)
class Name:
    """A recognised name.

    Attributes
    ----------
    kind : str
        ``"step"`` (a step directory), ``"data"`` (an integrated file), ``"manifest"`` (beside such a file), or the
        hidden ones: ``"staging"``, ``"trash"``, ``"replaced"`` (moved aside while its successor takes the name),
        ``"bad"`` (the mark of a checkpoint that was set aside).
    token : str
        16 hex digits; empty for ``"step"`` and ``"data"``.
    extension : str
        Of ``"data"``; else empty.
    """

    kind: Kind
    stem: Stem
    token: str = ""
    extension: str = ""


def check_prefix(prefix: object) -> str:
    """Return `prefix` if names can be made with it.

    Raises
    ------
    ConfigTypeError, ConfigError
        If it is no str, holds "/" or control characters or no valid text, starts with "." (such names are
        parckpt's own) or is too long. The empty prefix is fine, as in MindSpore.
    """
    if not isinstance(prefix, str):
        raise ConfigTypeError(f"prefix must be a str, not {type(prefix).__name__}")
    if "/" in prefix or prefix.startswith(".") or any(ord(char) < 32 or ord(char) == 127 for char in prefix):
        raise ConfigError(f"prefix must not hold '/' or control characters nor start with '.': {prefix!a}")
    try:
        nbytes = len(prefix.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ConfigError(f"prefix is not valid Unicode text: {prefix!a}") from error
    if nbytes > _MAX_PREFIX_NBYTES:
        raise ConfigError(f"prefix has {nbytes} bytes; at most {_MAX_PREFIX_NBYTES} leave room for the rest of a name")
    return prefix


def check_name(name: object) -> str:
    """Return the `name` that a program chose for a checkpoint, without extension, if it can be one.

    Raises
    ------
    ConfigTypeError, ConfigError
        As `check_prefix`; besides, it must not be empty (the file would be hidden) nor look like something else that
        stands in a checkpoint directory or in a step directory.
    """
    if not isinstance(name, str):
        raise ConfigTypeError(f"prefix must return a str, not {type(name).__name__}")
    if not name:
        raise ConfigError("prefix returned an empty name")
    reserved = name in (MANIFEST, PLAN, RECORD, ABORTED) or parse_rank_directory(name) is not None
    if reserved or name.endswith(".manifest"):
        raise ConfigError(f"prefix returned {name!r}, a name that parckpt gives to parts of a checkpoint")
    try:
        return check_prefix(name)
    except ConfigError as error:
        raise ConfigError(f"prefix returned {name!a}: {error.message}") from error


def belongs(stem: str, family: str) -> bool:
    """Whether a stem is one that a run with the prefix `family` makes by itself, numbered on or not."""
    parsed = parse_stem(stem)
    if parsed is None or not parsed.prefix.startswith(family):
        return False
    rest = parsed.prefix[len(family) :]
    return rest == "" or (rest[0] == "_" and rest[1:].isascii() and rest[1:].isdigit())


def epoch_and_step(step: int, steps_per_epoch: int | None) -> tuple[int, int]:
    """Epoch (from 1) and step within it (1 to `steps_per_epoch`) of a global step; all is epoch 1 without that.

    Step 0, before the first, is step 0 of epoch 1.
    """
    if step < 0:
        raise ConfigError(f"a step must not be negative, not {step}")
    if steps_per_epoch is None or step == 0:
        return 1, step
    if steps_per_epoch < 1:
        raise ConfigError(f"steps_per_epoch must be at least 1, not {steps_per_epoch}")
    epoch, inner = divmod(step - 1, steps_per_epoch)
    return epoch + 1, inner + 1


def manifest_name(stem: Stem | str, token: str) -> str:
    """Manifest beside an integrated file."""
    return f"{stem}.{token}.manifest"


def staging_name(stem: Stem | str, token: str) -> str:
    """Directory of a save in progress."""
    return f".{stem}.staging-{token}"


def trash_name(stem: Stem | str, token: str) -> str:
    """What is being deleted."""
    return f".{stem}.trash-{token}"


def replaced_name(stem: Stem | str, token: str) -> str:
    """The old directory while the new one, with `token`, takes its name: valid, and looked for by restore."""
    return f".{stem}.replaced-{token}"


def bad_name(stem: Stem | str, token: str) -> str:
    """The mark of a checkpoint that was set aside."""
    return f".{stem}.bad-{token}"


def lock_name(prefix: str) -> str:
    """Lock of one prefix in a directory."""
    return f".{prefix}.lock"


def run_name(prefix: str) -> str:
    """File by which a restarted job knows that its first start saved here."""
    return f".{prefix}.run"


def rank_directory(rank: int) -> str:
    """Directory of one rank's files; the name that MindSpore's transform tools require."""
    return f"rank_{rank}"


def parse_rank_directory(name: str) -> int | None:
    """Rank of a `rank_directory` name, or None."""
    match = _RANK.fullmatch(name)
    return int(match[1]) if match else None


def parse_hidden(name: str) -> tuple[str, Kind, str] | None:
    """Stem (of any form), kind and token of ``.<stem>.<kind>-<token>``; None for other names."""
    match = _HIDDEN.fullmatch(name)
    return (match["stem"], match["kind"], match["token"]) if match else None  # type: ignore[return-value]


def parse_stem(text: str) -> Stem | None:
    """Stem of ``str(stem)``, or None."""
    match = _STEM.fullmatch(text)
    if match is None:
        return None
    try:
        prefix = check_prefix(match["prefix"])
    except ConfigError:
        return None
    return Stem(prefix, int(match["epoch"]), int(match["step"]), match["mark"] is not None)


def parse(name: str) -> Name | None:
    """Recognise the name of an entry of a checkpoint directory; None for anything that is not one of ours."""
    kind: Kind = "step"
    if match := _HIDDEN.fullmatch(name):
        kind = match["kind"]  # type: ignore[assignment]  # the pattern has exactly those words
    elif match := _MANIFEST.fullmatch(name):
        kind = "manifest"
    elif match := _DATA.fullmatch(name):
        kind = "data"
    parts = match.groupdict() if match else {"stem": name}
    stem = parse_stem(parts["stem"])
    if stem is None:
        return None
    return Name(kind, stem, parts.get("token", ""), parts.get("extension", ""))


def token(attempt: bytes, sequence: int, epoch: int, step: int, kind: str) -> str:
    """Name one save of one attempt: 16 hex digits that processes which cannot talk find alike.

    Parameters
    ----------
    attempt : bytes
        Random id that root broadcast when the run started.
    sequence : int
        Number of the save.
    epoch, step : int
        Where training stood.
    kind : str
        ``"save"`` or ``"breakpoint"``.
    """
    text = f"{attempt.hex()} {sequence} {epoch} {step} {kind}"
    return hashlib.sha256(b"parckpt token 1\n" + text.encode("utf-8")).hexdigest()[:16]


def numbered_prefix(
    prefix: str, files: Iterable[str], directories: Iterable[str] = (), *, is_breakpoint: bool = False
) -> str:
    """Number `prefix` on so that a new run does not mix its files with those already there: MindSpore's rule.

    Parameters
    ----------
    files, directories : iterable of str
        Names in the checkpoint directory. A step directory counts like a file.
    is_breakpoint : bool
        True: look at breakpoint files only; False: at all others.

    Notes
    -----
    ``-`` right after the prefix asks for number 1. If it comes later, one character (meant for the underscore) is
    skipped and the rest, if all digits, asks for the next number; so ``CKP12-1_1.ckpt`` makes ``CKP_3`` of ``CKP``.
    """
    stems = [name.rpartition(".")[0] for name in files if name.rpartition(".")[2] in EXTENSIONS.values()]
    stems += [name for name in directories if parse_stem(name) is not None]
    number = 0
    for stem in stems:
        rest = stem[len(prefix) :]
        if stem.endswith("_breakpoint") != is_breakpoint or not stem.startswith(prefix) or rest[:1].isalpha():
            continue
        dash = rest.find("-")
        digits = rest[1:dash]
        if dash == 0:
            number = max(number, 1)
        elif dash > 0 and digits.isascii() and digits.isdigit():
            number = max(number, int(digits) + 1)
    return f"{prefix}_{number}" if number else prefix
