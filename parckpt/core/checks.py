"""Checks of single arguments. Each returns the value, or raises an error that carries the argument's name.

An error's fact ``parameter`` is that name. Where MindSpore raises TypeError a `ConfigTypeError` is raised, and where
it raises ValueError a `ConfigError` or again a `ConfigTypeError`, which is both.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from parckpt.core import dtypes
from parckpt.core.adapting import as_leaf
from parckpt.core.leaves import Leaf, plain_array
from parckpt.errors import ConfigError, ConfigTypeError

__all__ = ["append_dict", "appended", "boolean", "choice", "count", "decryption", "encryption", "mode", "network"]
__all__ += ["prefixes", "seconds", "text", "unknown"]

# Length in bytes of the keys each mode takes.
_KEY_NBYTES = {"AES-GCM": (16, 24, 32), "AES-CBC": (16, 24, 32), "SM4-CBC": (16,)}
_COUNTERS = ("epoch_num", "step_num")


def _kind(value: object) -> str:
    return type(value).__name__


def count(name: str, value: Any, *, least: int = 0, none: bool = False) -> Any:
    """An int of at least `least`, or None where `none` allows it."""
    if value is None and none:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigTypeError(f"{name} must be an int, not {value!r} of type {_kind(value)}", parameter=name)
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}", parameter=name)
    return value


def boolean(name: str, value: Any) -> bool:
    """True or False themselves, nothing that merely looks so."""
    if value is not True and value is not False:
        raise ConfigTypeError(f"{name} must be a bool, not {value!r} of type {_kind(value)}", parameter=name)
    return bool(value)


def text(name: str, value: Any) -> str:
    """A str."""
    if not isinstance(value, str):
        raise ConfigTypeError(f"{name} must be a str, not {_kind(value)}", parameter=name)
    return value


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """One of a few words."""
    words = list(allowed)
    if text(name, value) not in words:
        listed = ", ".join(repr(word) for word in words)
        raise ConfigError(f"{name} must be one of {listed}, not {value!r}{_meant(value, words)}", parameter=name)
    return str(value)


def seconds(name: str, value: Any) -> float:
    """A positive, finite number of seconds: every wait has a bound."""
    if type(value) not in (int, float):
        raise ConfigTypeError(f"{name} must be a number of seconds, not {value!r}", parameter=name)
    if not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} must be positive and finite, not {value!r}", parameter=name)
    return float(value)


def mode(name: str, value: Any, needed: int) -> int:
    """Permission bits that leave the owner what parckpt itself needs."""
    bits = count(name, value)
    if bits > 0o7777 or bits & needed != needed:
        raise ConfigError(f"{name} must be at most 0o7777 and include {needed:#o}, not {bits:#o}", parameter=name)
    return int(bits)


def network(value: Any) -> Any:
    """What `saved_network` may be: None, a mapping, a callable, or an object with ``state_dict()``; no class."""
    if value is None or isinstance(value, Mapping):
        return value
    if not isinstance(value, type) and (callable(value) or callable(getattr(value, "state_dict", None))):
        return value
    raise ConfigTypeError(
        f"saved_network must be None, a mapping, a callable or an object with state_dict(), not {_kind(value)}",
        parameter="saved_network",
    )


def asynchronous(value: Any) -> bool | str:
    """What `async_save` may be."""
    if type(value) is bool:
        return value
    if not isinstance(value, str):
        raise ConfigTypeError(f"async_save must be a bool or a str, not {_kind(value)}", parameter="async_save")
    return choice("async_save", value, ("process", "thread"))


def encryption(enc_key: Any, enc_mode: Any) -> tuple[bytes | None, str]:
    """A key and its mode. No message ever quotes the key."""
    if enc_key is not None and not isinstance(enc_key, bytes):
        raise ConfigTypeError(f"enc_key must be None or bytes, not {_kind(enc_key)}", parameter="enc_key")
    enc_mode = choice("enc_mode", enc_mode, _KEY_NBYTES)
    if enc_key is not None:
        _check_key("enc_key", enc_key, enc_mode)
    return enc_key, enc_mode


def decryption(dec_key: Any, dec_mode: Any) -> tuple[bytes | None, str]:
    """A key to read with and its mode; without a key any text passes for a mode, as in MindSpore."""
    if dec_key is not None and not isinstance(dec_key, bytes):
        raise ConfigTypeError(f"dec_key must be None or bytes, not {_kind(dec_key)}", parameter="dec_key")
    text("dec_mode", dec_mode)
    if dec_key is not None:
        choice("dec_mode", dec_mode, _KEY_NBYTES)
        _check_key("dec_key", dec_key, dec_mode)
    return dec_key, dec_mode


def _check_key(name: str, key: bytes, word: str) -> None:
    if len(key) not in _KEY_NBYTES[word]:
        allowed = " or ".join(str(nbytes) for nbytes in _KEY_NBYTES[word])
        raise ConfigError(f"{name} must have {allowed} bytes for {word}, not {len(key)}", parameter=name)


def prefixes(name: str, given: Any) -> tuple[str, ...]:
    """Beginnings of names: a str, or a list or tuple of them, none empty; None gives no tuple elements."""
    if given is None:
        return ()
    if not isinstance(given, (str, list, tuple)):
        raise ConfigTypeError(f"{name} must be a str or a list of str, not {_kind(given)}", parameter=name)
    found = (given,) if isinstance(given, str) else tuple(given)
    if not found:
        raise ConfigError(f"{name} must not be empty: None takes every name", parameter=name)
    for position, prefix in enumerate(found):
        if not isinstance(prefix, str):
            raise ConfigTypeError(f"{name}[{position}] must be a str, not {_kind(prefix)}", parameter=name)
        if not prefix:
            raise ConfigError(f"{name} must not be empty: every name begins with ''", parameter=name)
    return found


def append_dict(append_info: Any) -> dict[str, Any] | None:
    """Make the dict of values to store beside the state out of the `append_info` argument.

    The counters named as words come first, with 0; then what the dict says, which may also override the counters.
    """
    where = "append_info"
    if append_info is None:
        return None
    if type(append_info) is not list:
        _refuse(where, f"must be None or a list, not {_kind(append_info)}")
    found: dict[str, Any] = {}
    given: dict[str, Any] | None = None
    for element in append_info:
        if isinstance(element, str):
            if element not in _COUNTERS:
                raise ConfigError(
                    f"append_info takes the words {_COUNTERS[0]!r} and {_COUNTERS[1]!r}, not {element!r}"
                    f"{_meant(element, _COUNTERS)}; other values go into a dict",
                    parameter=where,
                )
        elif not isinstance(element, dict):
            _refuse(where, f"holds str and dict, not {_kind(element)}")
        elif given is not None:
            _refuse(where, "must hold at most one dict")
        else:
            given = element
    found.update((word, 0) for word in _COUNTERS if word in append_info)
    for key, value in (given or {}).items():
        _check_append(where, key, value)
        found[key] = value
    return found if append_info else None


def appended(given: Any) -> dict[str, Any]:
    """The `append_dict` argument of `save_checkpoint`: values to store beside the state."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        _refuse("append_dict", f"must be None or a dict, not {_kind(given)}")
    for key, value in given.items():
        _check_append("append_dict", key, value)
    return dict(given)


def _check_append(where: str, key: Any, value: Any) -> None:
    if not isinstance(key, str):
        _refuse(where, f"keys must be str, not {_kind(key)}")
    if key in _COUNTERS and type(value) not in (bool, int, float):
        raise ConfigError(
            f"{where}[{key!r}] must be a number, because the current one is added to it, not {value!r}", parameter=where
        )
    if plain_array(value):
        dtypes.from_numpy(value.dtype)
        return
    # numpy's float64 is a float, and stored as one of 64 bits; its other scalars MindSpore does not take.
    if as_leaf(value) is not None:
        return
    if not isinstance(value, (bool, int, float, str, Leaf)) or isinstance(value, np.ndarray):
        _refuse(where, f"[{key!r}] must be int, float, bool, str, a numpy array or a parckpt.Leaf, not {_kind(value)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ConfigError(f"{where}[{key!r}] does not fit 64 bits: {value}", parameter=where)


def _refuse(where: str, complaint: str) -> NoReturn:
    space = "" if complaint.startswith("[") else " "
    raise ConfigTypeError(f"{where}{space}{complaint}", parameter=where)


def unknown(function: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse keywords that are no parameter, with the nearest one that is."""
    known = list(known)
    for name in names:
        raise ConfigTypeError(f"{function} has no parameter {name!r}{_meant(name, known)}", parameter=name)


def _meant(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), {name.lower(): name for name in known}, n=1, cutoff=0.6)
    return next((f"; did you mean {name!r}?" for name in known if near and name.lower() == near[0]), "")
