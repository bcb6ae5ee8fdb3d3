"""Which names `load_checkpoint` takes, and as what plain values come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parckpt.errors import ConfigError, ConfigTypeError
from parckpt.loadfile import _as_loaded, _chooser

pytestmark = pytest.mark.fast

NAMES = ["net.a", "net.b", "network", "optim.a", "a"]


@pytest.mark.parametrize(
    ("dropped", "kept", "func", "taken"),
    [
        (None, None, None, NAMES),
        ("net.", None, None, ["network", "optim.a", "a"]),
        ("net", None, None, ["optim.a", "a"]),
        (["net.a", "optim"], None, None, ["net.b", "network", "a"]),
        (None, "net.", None, ["net.a", "net.b"]),
        (None, ("a", "optim"), None, ["optim.a", "a"]),
        ("net.a", "net", None, ["net.b", "network"]),
        (None, None, lambda name: name.endswith(".a"), ["net.a", "optim.a"]),
        ("a", None, lambda name: False, ["net.a", "net.b", "network", "optim.a"]),
        ([], [], None, NAMES),
    ],
)
def test_choosing(dropped: Any, kept: Any, func: Any, taken: list[str]) -> None:
    keep = _chooser(dropped, kept, func)
    assert [name for name in NAMES if keep(name)] == taken


@pytest.mark.parametrize("bad", ["", [""], ["a", ""]])
def test_empty_prefixes(bad: Any) -> None:
    for given in ((bad, None), (None, bad)):
        with pytest.raises(ConfigError, match="must not be empty"):
            _chooser(*given, None)


@pytest.mark.parametrize("bad", [[1], ["a", None], (b"a",)])
def test_prefixes_of_wrong_types(bad: Any) -> None:
    with pytest.raises(ConfigTypeError, match="filter_prefix"):
        _chooser(bad, None, None)
    with pytest.raises(ConfigTypeError, match="specify_prefix"):
        _chooser(None, bad, None)


@pytest.mark.parametrize("value", [True, 5, -(2**63), 2**64 - 1, 0.1, np.float32(0.5), np.int8(3)])
def test_numbers_become_arrays(value: Any) -> None:
    found = _as_loaded(value)
    assert isinstance(found, np.ndarray)
    assert found.shape == ()
    assert found.item() == value


@pytest.mark.parametrize("value", ["text", 2**64, -(2**63) - 1, None, b"x", [1, 2], (1,), {"a": 1}])
def test_other_values_stay(value: Any) -> None:
    assert _as_loaded(value) is value


def test_arrays_stay_themselves() -> None:
    array = np.zeros(3)
    assert _as_loaded(array) is array
