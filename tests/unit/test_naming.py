"""Names on disk: made, recognised, everything else rejected; prefix numbering as MindSpore's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parckpt.core import naming
from parckpt.core.naming import Name, Stem, epoch_and_step, numbered_prefix, parse, parse_stem
from parckpt.errors import ConfigError, ConfigTypeError

pytestmark = pytest.mark.fast

DATA = Path(__file__).parents[1] / "data" / "vectors"
PREFIXES = json.loads((DATA / "prefix_vectors.json").read_text())["dedupe"]
TOKEN = "0123456789abcdef"
STEM = Stem("llama", 3, 41)


@pytest.mark.parametrize("case", PREFIXES, ids=lambda case: f"{case['prefix']}-{case['existing']}-{case['breakpoint']}")
def test_prefixes_are_numbered_as_mindspore_does(case):
    found = numbered_prefix(case["prefix"], case["existing"], is_breakpoint=case["breakpoint"])
    assert found == case["result"]


@pytest.mark.parametrize(
    ("files", "directories", "numbered"),
    [
        ([], ["CKP-1_1"], "CKP_1"),
        ([], ["CKP_4-1_1"], "CKP_5"),
        ([], ["CKP-1_1_breakpoint"], "CKP"),
        ([], [".CKP-1_1.staging-" + TOKEN, "CKP-logs", "CKP-1", "rank_0"], "CKP"),
        (["CKP-1_1.h5"], [], "CKP_1"),
        (["CKP-1_1_breakpoint.safetensors"], [], "CKP"),
        ([f"CKP-1_1.{TOKEN}.manifest"], [], "CKP"),
        (["CKP_²-1_1.ckpt"], [], "CKP"),
        (["CKP_" + "9" * 200 + "-1_1.ckpt"], [], "CKP_1" + "0" * 200),
    ],
)
def test_step_directories_count_like_files(files, directories, numbered):
    assert numbered_prefix("CKP", files, directories) == numbered


ENTRIES = [
    ("llama-3_41", Name("step", STEM)),
    ("llama-3_41.ckpt", Name("data", STEM, extension="ckpt")),
    ("llama-3_41.safetensors", Name("data", STEM, extension="safetensors")),
    ("llama-3_41.h5", Name("data", STEM, extension="h5")),
    (naming.manifest_name(STEM, TOKEN), Name("manifest", STEM, TOKEN)),
    (naming.staging_name(STEM, TOKEN), Name("staging", STEM, TOKEN)),
    (naming.trash_name(STEM, TOKEN), Name("trash", STEM, TOKEN)),
    (naming.replaced_name(STEM, TOKEN), Name("replaced", STEM, TOKEN)),
    (naming.bad_name(STEM, TOKEN), Name("bad", STEM, TOKEN)),
    ("llama-3_41_breakpoint.ckpt", Name("data", Stem("llama", 3, 41, True), extension="ckpt")),
    ("-1_0", Name("step", Stem("", 1, 0))),
    ("a-1_1.ckpt-2_2.ckpt", Name("data", Stem("a-1_1.ckpt", 2, 2), extension="ckpt")),
]


@pytest.mark.parametrize(("text", "name"), ENTRIES)
def test_names_are_recognised(text, name):
    assert parse(text) == name


def test_names_are_as_documented():
    assert [text for text, name in ENTRIES[4:7]] == [
        f"llama-3_41.{TOKEN}.manifest",
        f".llama-3_41.staging-{TOKEN}",
        f".llama-3_41.trash-{TOKEN}",
    ]
    assert len({text for text, _ in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "llama",
        "llama-3",
        "llama_3-4",
        "llama-03_41",
        "llama-3_041",
        "llama-3_41 ",
        "llama-3_41\n",
        "llama-3_-1",
        "llama-٣_٤",
        "llama-3_41.CKPT",
        "llama-3_41.ckpt.tmp",
        "llama-3_41.hdf5",
        "llama-3_41_Breakpoint",
        "llama-3_" + "9" * 20,
        f"llama-3_41.{TOKEN[:-1]}.manifest",
        f"llama-3_41.{TOKEN.upper()}.manifest",
        f"llama-3_41.manifest-{TOKEN}",
        f".llama-3_41.staging-{TOKEN}x",
        f".llama-3_41.stagings-{TOKEN}",
        f".llama.staging-{TOKEN}",
        f"llama-3_41.staging-{TOKEN}",
        f"..llama-3_41.trash-{TOKEN}",
        f".a/b-3_41.trash-{TOKEN}",
        ".llama-3_41.ckpt",
        ".llama-3_41",
        "a\x00b-1_1",
        "../x-1_1",
    ],
)
def test_everything_else_is_rejected(text):
    assert parse(text) is None


prefixes = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="/"), max_size=20)
numbers = st.integers(0, 10**19 - 1)


@given(prefixes.filter(lambda text: not text.startswith(".")), numbers, numbers, st.booleans())
def test_what_is_made_is_recognised(prefix, epoch, step, is_breakpoint):
    stem = Stem(naming.check_prefix(prefix), epoch, step, is_breakpoint)
    assert parse_stem(str(stem)) == stem
    for text, name in ENTRIES[:9]:
        assert parse(text.replace("llama-3_41", str(stem))) == Name(name.kind, stem, name.token, name.extension)


@given(st.text(max_size=40) | st.from_regex(r"\.?[a-z.-]{0,4}-[0-9]{1,3}_[0-9]{1,3}(\.[a-z-]{0,8}[0-9a-f]{0,17})?"))
def test_what_is_recognised_is_what_would_be_made(text):
    name = parse(text)
    if name is None:
        return
    made = {
        "step": str(name.stem),
        "data": f"{name.stem}.{name.extension}",
        "manifest": naming.manifest_name(name.stem, name.token),
        "staging": naming.staging_name(name.stem, name.token),
        "trash": naming.trash_name(name.stem, name.token),
        "replaced": naming.replaced_name(name.stem, name.token),
        "bad": naming.bad_name(name.stem, name.token),
    }
    assert made[name.kind] == text


@pytest.mark.parametrize("prefix", ["", "CKP", "a-b_c.d", "模型", "x" * 160])
def test_prefixes(prefix):
    assert naming.check_prefix(prefix) == prefix
    longest = naming.manifest_name(Stem(prefix, 10**19 - 1, 10**19 - 1, True), TOKEN)
    assert len(longest.encode()) <= 255


@pytest.mark.parametrize(
    "prefix", ["a/b", "/", ".hidden", "..", "a\nb", "a\x00", "\x7f", "\ud800", "x" * 161, "ä" * 81]
)
def test_prefixes_that_make_no_names(prefix):
    with pytest.raises(ConfigError, match="prefix"):
        naming.check_prefix(prefix)


@pytest.mark.parametrize("prefix", [None, 1, b"CKP"])
def test_prefixes_of_wrong_types(prefix):
    with pytest.raises(ConfigTypeError):
        naming.check_prefix(prefix)


@pytest.mark.parametrize(
    ("step", "per_epoch", "expected"),
    [(1, 4, (1, 1)), (4, 4, (1, 4)), (5, 4, (2, 1)), (8, 4, (2, 4)), (9, None, (1, 9)), (0, 4, (1, 0)), (3, 1, (3, 1))],
)
def test_epochs_count_from_one_and_their_last_step_is_not_zero(step, per_epoch, expected):
    assert epoch_and_step(step, per_epoch) == expected


def test_epochs_of_impossible_steps():
    with pytest.raises(ConfigError):
        epoch_and_step(-1, 4)
    with pytest.raises(ConfigError):
        epoch_and_step(1, 0)


def test_tokens_depend_on_everything_and_nothing_else():
    base = (b"attempt", 1, 2, 3, "save")
    others = [(b"Attempt", 1, 2, 3, "save"), (b"attempt", 12, 3, 3, "save"), (b"attempt", 1, 2, 4, "save")]
    others += [(b"attempt", 1, 23, 3, "save"), (b"attempt", 1, 2, 3, "breakpoint")]
    tokens = {naming.token(*arguments) for arguments in [base, base, *others]}
    assert len(tokens) == 6
    assert parse(naming.staging_name(STEM, naming.token(*base))).token == naming.token(*base)
    # On disk for good, other versions must find the same names: checked with sha256sum.
    assert naming.token(*base) == "955f62c8016f046f"


@pytest.mark.parametrize(("name", "rank"), [("rank_0", 0), ("rank_4095", 4095), ("rank_01", None), ("rank_", None)])
def test_rank_directories(name, rank):
    assert naming.parse_rank_directory(name) == rank
    assert rank is None or naming.rank_directory(rank) == name
    assert naming.parse_rank_directory(name + "\n") is None
