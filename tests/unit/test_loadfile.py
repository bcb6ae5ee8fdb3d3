"""Which names `load_checkpoint` takes, and as what plain values come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parckpt.core.checks import prefixes
from parckpt.engine.loadargs import chooser
from parckpt.engine.loading import as_loaded
from parckpt.errors import ConfigError, ConfigTypeError

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
    ],
)
def test_choosing(dropped: Any, kept: Any, func: Any, taken: list[str]) -> None:
    keep = chooser(prefixes("filter_prefix", dropped), prefixes("specify_prefix", kept), func)
    assert [name for name in NAMES if keep(name)] == taken


@pytest.mark.parametrize("bad", ["", [""], ["a", ""], [], ()])
def test_empty_prefixes(bad: Any) -> None:
    with pytest.raises(ConfigError, match="specify_prefix must not be empty"):
        prefixes("specify_prefix", bad)


@pytest.mark.parametrize("bad", [[1], ["a", None], (b"a",), 5, b"a", {"a"}])
def test_prefixes_of_wrong_types(bad: Any) -> None:
    with pytest.raises(ConfigTypeError, match="filter_prefix"):
        prefixes("filter_prefix", bad)


def test_the_error_of_the_callers_rule_names_the_parameter() -> None:
    keep = chooser((), (), lambda name: 1 / 0)
    with pytest.raises(ConfigError, match=r"'net\.a': ZeroDivisionError") as caught:
        keep("net.a")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ConfigTypeError, match="choice_func"):
        chooser((), (), 5)  # type: ignore[arg-type]
    assert chooser(("a",), (), 5)("b")  # type: ignore[arg-type]  # not asked, so not looked at, as in MindSpore


@pytest.mark.parametrize("value", [True, 5, -(2**63), 2**64 - 1, 0.1, np.float32(0.5), np.int8(3)])
def test_numbers_become_arrays(value: Any) -> None:
    found = as_loaded(value)
    assert isinstance(found, np.ndarray)
    assert found.shape == ()
    assert found.item() == value


@pytest.mark.parametrize("value", ["text", 2**64, -(2**63) - 1, None, b"x", [1, 2], (1,), {"a": 1}])
def test_other_values_stay(value: Any) -> None:
    assert as_loaded(value) is value


def test_arrays_stay_themselves() -> None:
    array = np.zeros(3)
    assert as_loaded(array) is array
