"""The arguments of `load_checkpoint`, checked: in MindSpore's order, so that of two wrong ones the same is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from parckpt.core import checks
from parckpt.core.strategy import Strategy
from parckpt.errors import ConfigError, ConfigTypeError
from parckpt.formats.registry import FORMATS

__all__ = ["Arguments", "chooser"]


@dataclass(frozen=True)
class Arguments:
    """Checked arguments.

    Attributes
    ----------
    path : str
        Absolute.
    format : str or None
        None: by the extension.
    keep : callable
        Whether a name in the file is wanted; ConfigError if the caller's own rule fails.
    strategy : Strategy or None
        How the files of several ranks fit together; on root alone.
    strategy_name : str or None
        What ranks compare of it.
    """

    path: str
    keep: Callable[[str], bool]
    strict: bool = False
    crc_check: bool = False
    remove_redundancy: bool = False
    format: str | None = None
    dec_key: bytes | None = field(default=None, repr=False)
    allow_unverified: bool | None = None
    strategy: Strategy | None = None
    strategy_name: str | None = None

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> Arguments:
        """Check what the caller gave, in MindSpore's order: the first wrong one is named."""
        kept = checks.prefixes("specify_prefix", given["specify_prefix"])
        dropped = checks.prefixes("filter_prefix", given["filter_prefix"])
        dec_key, dec_mode = checks.decryption(given["dec_key"], given["dec_mode"])
        crc_check = checks.boolean("crc_check", given["crc_check"])
        remove_redundancy = checks.boolean("remove_redundancy", given["remove_redundancy"])
        form = given["format"]
        if form is not None and form not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {form!r}", parameter="format")
        path = _checked_path(given["ckpt_file_name"])
        form = _checked_format(path, form)
        if form == "safetensors" and (dec_key is not None or dec_mode != "AES-GCM"):
            name = "dec_mode" if dec_key is None else "dec_key"
            raise ConfigError(f"{name} needs format 'ckpt': safetensors has no encrypted form", parameter=name)
        strict = given["net"] is not None and checks.boolean("strict_load", given["strict_load"])
        keep = chooser(dropped, kept, given["choice_func"])
        return cls(
            path, keep, strict, crc_check, remove_redundancy, given["format"], dec_key, given["allow_unverified"]
        )


def _checked_path(name: Any) -> str:
    try:
        path = os.fspath(name)
    except TypeError:
        path = name
    if not isinstance(path, str):
        raise ConfigTypeError(f"ckpt_file_name must be a str, not {type(name).__name__}", parameter="ckpt_file_name")
    return os.path.abspath(path)


def _checked_format(path: str, form: str | None) -> str | None:
    """The format by name or, if there is one, by extension, which must agree; a step directory has none."""
    extension = os.path.splitext(path)[1]
    by_extension = next((name for name, known in FORMATS.items() if known.extension == extension), None)
    if form is not None and by_extension is not None and form != by_extension:
        raise ConfigError(
            f"{path} is by its extension {by_extension}, and format={form!r} was asked for", parameter="format"
        )
    return form or by_extension


def chooser(
    dropped: tuple[str, ...], kept: tuple[str, ...], choice_func: Callable[[str], bool] | None
) -> Callable[[str], bool]:
    """Which names are wanted: prefixes decide, and only without any the caller's own function does."""
    if dropped or kept:
        return lambda name: not name.startswith(dropped or ("\0",)) and (not kept or name.startswith(kept))
    if choice_func is None:
        return lambda name: True
    if not callable(choice_func):
        raise ConfigTypeError(
            f"choice_func must be callable, not {type(choice_func).__name__}", parameter="choice_func"
        )

    def choose(name: str) -> bool:
        try:
            return bool(choice_func(name))
        except Exception as error:
            raise ConfigError(
                f"choice_func fails for {name!r}: {type(error).__name__}: {error}", parameter="choice_func"
            ) from error

    return choose
