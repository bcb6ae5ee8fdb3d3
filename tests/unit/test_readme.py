"""What README.md and docs/ show works: code runs, commands and files exist, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from parckpt.cli.main import main
from parckpt.core.config import CheckpointConfig

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run(code: str, directory: Path) -> str:
    """Run in a process of its own: the code imports MPI, which must not be initialised in this one."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=directory,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    code = "\n".join(blocks(README, "python"))
    check = "\nprint(progress.step, lazy.step, rows.shape, rows[0, 0], with_names['model.bias'][0], with_names['lr'])"
    assert run(code + check, tmp_path).split() == ["0", "100", "(10,", "64)", "100.0", "50.0", "0.001"]
    assert run(code + check, tmp_path).split()[:2] == ["100", "100"]
    assert sorted(path.name for path in (tmp_path / "ckpts").glob("net-*")) == ["net-1_100", "net-1_60", "net-1_80"]


def test_the_example_has_fifteen_lines_of_code() -> None:
    lines = [line for line in blocks(README, "python")[0].splitlines() if line.strip()]
    imports = [line for line in lines if line.startswith(("import", "from"))]
    assert len(lines) - len(imports) <= 15


def test_commands_exist() -> None:
    names = {command.name for command in main.registered_commands}
    row = re.search(r"^\| Command line \|(.*)$", README, re.MULTILINE)
    assert row is not None
    assert set(re.findall(r"`(?:parckpt )?([a-z]+)`", row.group(1))) <= names
    told = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}" not in told and f"parckpt {name}" not in told] == []
    for block in blocks(README, "sh"):
        for script in re.findall(r"^scripts/\S+", block, re.MULTILINE):
            assert (ROOT / script).stat().st_mode & 0o100, script


def test_what_is_called_planned_is_refused() -> None:
    from parckpt.engine.notyet import refuse

    for options in ({"async_save": True}, {"exception_save": True}, {"enc_key": b"0" * 16}, {"format": "hdf5"}):
        CheckpointConfig(**options)  # type: ignore[arg-type]
        with pytest.raises(NotImplementedError, match="not implemented yet"):
            refuse(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_source_files_that_are_named_exist(page: Path) -> None:
    """Modules and tests that a page names, as `parckpt/engine/saver.py` or `tests/...`."""
    for path in re.findall(r"`((?:parckpt|tests|scripts|examples|docs)/[\w/.-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_functions_that_are_named_exist(page: Path) -> None:
    """`module.py`: `function` means that the module in parckpt/ has a class or function of that name."""
    named = re.findall(
        r"`((?:core|formats|storage|comm|engine)/\w+)\.py`:\s+`([\w.]+)`", page.read_text(encoding="utf-8")
    )
    assert len(named) >= 30 or page.name != "architecture.md"
    for module, name in named:
        source = (ROOT / "parckpt" / f"{module}.py").read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"^\s*(?:def|class) {part}\b", source, re.MULTILINE), f"{module}.py has no {part}"
