"""Which stored name fills which parameter, which types convert and which shapes fit: MindSpore's rules."""

from __future__ import annotations

import random
from typing import Any

import pytest

from parckpt.core import dtypes
from parckpt.core.netrules import converts, fits, never, not_loaded, pair

pytestmark = pytest.mark.fast

FLOATS = ["float16", "float32", "float64", "bfloat16"]
INTEGERS = ["int8", "int16", "int32", "int64", "int4"]
OTHERS = ["bool", "uint8", "uint16", "uint32", "uint64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"]


def test_types_convert_within_their_family_only() -> None:
    family = {**dict.fromkeys(FLOATS, "float"), **dict.fromkeys(INTEGERS, "int")}
    for stored in [*FLOATS, *INTEGERS, *OTHERS]:
        for wanted in [*FLOATS, *INTEGERS, *OTHERS]:
            expected = stored in family and family.get(stored) == family.get(wanted)
            assert converts(dtypes.by_name(stored), dtypes.by_name(wanted)) == expected, (stored, wanted)
            assert not never(dtypes.by_name(stored), dtypes.by_name(wanted))


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        ((2, 3), (2, 3), True),
        ((2, 3, 1, 1), (2, 3), True),
        ((1,), (), True),
        ((), (), True),
        ((), (1,), False),  # fewer dimensions are never enough
        ((2, 3), (2, 3, 1), False),
        ((2, 3, 2), (2, 3), False),
        ((1, 2, 3), (2, 3), False),
        ((3, 2), (2, 3), False),
        ((0, 1), (0,), True),
        ((2, 0), (2,), False),
    ],
)
def test_shapes_may_have_more_trailing_ones(stored: Any, wanted: Any, expected: bool) -> None:
    assert fits(stored, wanted) is expected


@pytest.mark.parametrize(
    ("wanted", "stored", "pairs"),
    [
        (["a", "b"], ["b", "a", "c"], {"a": "a", "b": "b"}),
        (["a", "b"], ["net.a", "net.b"], {"a": "net.a", "b": "net.b"}),
        (["a", "b"], ["a", "net.b"], {"a": "a", "b": "net.b"}),
        # One prefix after the other, each for all names behind it.
        (["a", "b", "c"], ["x.a", "x.b", "y.c", "y.a"], {"a": "x.a", "b": "x.b", "c": "y.c"}),
        # The order of the file decides between prefixes, not that of their names.
        (["a"], ["y.a", "x.a"], {"a": "y.a"}),
        # A prefix need not end with a dot, and what fills one may fill another.
        (["weight"], ["fc_weight"], {"weight": "fc_weight"}),
        (["a.w", "w"], ["a.w"], {"a.w": "a.w", "w": "a.w"}),
        (["a"], ["b"], {}),
        (["accu_grads.w"], ["net.accu_grads.w"], {}),
        ([], ["a"], {}),
        (["a"], [], {}),
    ],
)
def test_names_behind_a_prefix(wanted: list[str], stored: list[str], pairs: dict[str, str]) -> None:
    assert pair(wanted, stored, strict=False) == pairs
    assert pair(wanted, stored, strict=True) == {name: found for name, found in pairs.items() if name == found}


def test_what_is_not_loaded_but_for_gradients() -> None:
    assert not_loaded(["b", "a", "accu_grads.a", "c"], {"a": "a"}) == ["b", "c"]


def plain_pair(wanted: list[str], stored: list[str]) -> dict[str, str]:
    """The same by looking at every name."""
    found = {name: name for name in wanted if name in stored}
    left = [name for name in wanted if name not in found]
    while True:
        ends = ((name, other) for name in left for other in stored if other.endswith(name))
        name, other = next(ends, ("", ""))
        if not name:
            return found
        prefix = other[: -len(name)]
        behind = {one: prefix + one for one in left if prefix + one in stored}
        found.update(behind)
        left = [one for one in left if one not in behind]


def test_as_found_by_looking_at_every_name() -> None:
    source = random.Random(3)
    parts = ["a", "b", "ab", "w", "x.w"]
    for _ in range(2000):
        names = [".".join(source.choices(parts, k=source.randint(1, 3))) for _ in range(10)]
        wanted = list(dict.fromkeys(names[:5]))
        stored = list(dict.fromkeys(names[source.randint(3, 5) :]))
        assert pair(wanted, stored, strict=False) == plain_pair(wanted, stored)


def test_many_names() -> None:
    """Comparing each with each would take minutes."""
    wanted = [f"layers.{n}.weight" for n in range(20_000)]
    assert len(pair(wanted, [f"net.{name}" for name in reversed(wanted)], strict=False)) == 20_000
    assert pair(wanted, [f"{name}x" for name in wanted], strict=False) == {}
