"""docs/api.md says what the signatures say: all public names, their parameters, types and defaults."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import parckpt

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "scripts" / "api_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its head."""
    section = PAGE.split(f"{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert lines is not None
    cells = [re.split(r"(?<!\\) ?\| ?", line.strip("|\n "))[:4] for line in lines.group().splitlines()]
    return [[cell.strip().strip("`").replace("\\|", "|") for cell in row] for row in cells[2:]]


def test_the_page_is_what_the_script_writes(script: ModuleType) -> None:
    assert script.page() == PAGE, "the signatures have changed: python scripts/api_page.py"


@pytest.mark.parametrize("name", ["CheckpointConfig", "ModelCheckpoint", "save_checkpoint", "load_checkpoint", "Shard"])
def test_every_parameter_is_there_with_its_type_and_default(name: str) -> None:
    heading = f"## {name}" if name in ("CheckpointConfig", "ModelCheckpoint") else f"### {name}"
    given = [one for one in inspect.signature(getattr(parckpt, name)).parameters.values() if one.name != "unknown"]
    found = rows(heading)
    assert [row[0] for row in found] == [one.name for one in given]
    for row, one in zip(found, given, strict=True):
        assert row[1] == one.annotation
        assert row[2] == written(one)
        assert row[3] == ("keyword" if one.kind is one.KEYWORD_ONLY else "position")


def written(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return ""
    is_mode = parameter.name in ("file_mode", "dir_mode") and isinstance(parameter.default, int)
    return oct(parameter.default) if is_mode else repr(parameter.default)


def test_every_public_name_is_on_the_page_once() -> None:
    headings = re.findall(r"^##+ (\w+)$", PAGE, re.MULTILINE)
    errors = [row[0] for row in rows("## Errors and warnings")]
    shown = [name for name in [*headings, *errors] if name in parckpt.__all__]
    assert sorted(shown) == sorted(parckpt.__all__)


def test_every_parameter_of_the_config_has_a_meaning() -> None:
    section = PAGE.split("## ModelCheckpoint", 1)[0]
    assert len(re.findall(r"^\| `\w+` \|", section, re.MULTILINE)) >= 40
    assert re.findall(r"^\|.*\|\s+\|$", section, re.MULTILINE) == []
