"""What this version does not do yet. The config accepts it, so that it is checked today as it will be then."""

from __future__ import annotations

from typing import Any

from parckpt.formats.registry import FORMATS

__all__ = ["refuse"]


def refuse(*, async_save: Any = False, enc_key: Any = None, exception_save: Any = False, format: str = "ckpt") -> None:
    """Raise NotImplementedError for options that would otherwise be ignored without a word."""
    if async_save:
        raise NotImplementedError("async_save is not implemented yet")
    if enc_key is not None:
        raise NotImplementedError("encryption is not implemented yet")
    if exception_save:
        raise NotImplementedError("exception_save is not implemented yet")
    if format not in FORMATS:
        raise NotImplementedError(f"format {format!r} is not implemented yet")
