"""The command line as a whole: versions, help, errors, exit statuses, and where it is called from."""

from __future__ import annotations

import configparser
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import parckpt
from parckpt.cli import failure
from parckpt.cli.environment import drop_launcher_variables
from parckpt.cli.output import age, moment, plain, size
from parckpt.comm.launch import LAUNCHER_VARIABLES, launched_size
from parckpt.errors import classes_by_code
from parckpt.storage.filesystem import storage_error

COMMANDS = ("ls", "show", "status", "explain", "verify", "diff", "convert", "merge", "split", "copy")
COMMANDS += ("pin", "prune", "plan", "unlock")
OPERANDS = {"diff": 2, "convert": 2, "merge": 2, "split": 2, "copy": 2}
INSIDE_A_RANK = {
    **{"PMI_SIZE": "2", "PMI_RANK": "1", "PMI_FD": "99", "PMIX_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
    **{"OMPI_COMM_WORLD_RANK": "1", "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "2", "RANK_SIZE": "2"},
}


def test_version(call: Any, spawn: Any) -> None:
    assert call("--version").out == f"parckpt {parckpt.__version__}\n"
    assert spawn("--version").out == f"parckpt {parckpt.__version__}\n"


def test_console_script_is_what_python_m_runs() -> None:
    parser = configparser.ConfigParser()
    parser.read(Path(__file__).parents[2] / "setup.cfg")
    script = parser["options.entry_points"]["console_scripts"].strip()
    name, _, target = script.partition(" = ")
    module, _, attribute = target.partition(":")
    assert name == "parckpt"
    assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("words", [(), ("--help",), *((command, "--help") for command in COMMANDS)])
def test_help_fits_a_terminal(spawn: Any, words: tuple[str, ...]) -> None:
    text = spawn(*words, env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).out
    assert max(map(len, text.splitlines())) <= 80
    assert "parckpt" in text
    assert not re.search(r"rank_(?![<a-z])", text)  # Markdown takes <n> for HTML, and drops it
    if len(words) == 2:
        assert "--json" in text
    else:
        assert all(command in text for command in COMMANDS)
        assert all(f"{number}: " in text for number, _ in failure.exit_help())


def test_every_error_class_has_its_exit_status() -> None:
    unexpected = {code for code in classes_by_code() if failure.status_of_code(code) == failure.UNEXPECTED}
    assert unexpected == {"error", "internal"}
    statuses = [status for status, _ in failure.exit_help()]
    assert len(set(statuses)) == len(statuses)
    for code, cls in classes_by_code().items():
        error = cls("x")
        assert failure.status_of(error) == failure.status_of_code(code)
    documented = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for status, meaning in failure.exit_help():
        assert f"| {status} | {meaning} |" in documented


def test_usage_errors(call: Any) -> None:
    plain_error = call("ls", "--bogus")
    assert (plain_error.status, plain_error.out) == (2, "")
    assert "--bogus" in plain_error.err
    for words in (("ls", "--bogus", "--json"), ("bogus", "--json"), ("show", "--json")):
        found = call(*words)
        assert (found.status, found.json["error"]["code"]) == (2, "usage")


def test_unexpected_errors_are_one_line(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError("who divides?\nby zero")

    monkeypatch.setattr("parckpt.cli.ls.scan", broken)
    found = call("ls", tmp_path)
    assert found.status == 1
    assert found.err == "parckpt: unexpected ZeroDivisionError: who divides?\\nby zero (--debug shows where)\n"
    assert call("ls", tmp_path, "--json").json["error"]["code"] == "internal"
    traced = call("ls", tmp_path, "--debug")
    assert "Traceback" in traced.err
    assert traced.err.endswith("parckpt: unexpected ZeroDivisionError: who divides?\\nby zero\n")


@pytest.mark.parametrize(("code", "status"), [(13, 6), (5, 6), (2, 4), (20, 4)])
def test_what_the_file_system_refuses(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, status: int
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise storage_error("listdir", str(tmp_path), code)

    monkeypatch.setattr("parckpt.cli.ls.scan", refuse)
    found = call("ls", tmp_path, "--json")
    assert found.status == status
    assert found.json["error"]["code"] == {6: "storage", 4: "not-found"}[status]


def test_interrupt(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("parckpt.cli.ls.scan", interrupt)
    assert call("ls", tmp_path).status == 130


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_object_also_when_it_fails(spawn: Any, tmp_path: Path, command: str) -> None:
    found = spawn(command, *[tmp_path / "nowhere"] * OPERANDS.get(command, 1), "--json")
    assert found.status == 4
    assert found.json["error"]["code"] == "not-found"
    assert found.err == ""


def test_inside_a_rank(spawn: Any, published: Path) -> None:
    outside = spawn("ls", published, "--json")
    inside = spawn("ls", published, "--json", env=INSIDE_A_RANK)
    assert (inside.status, inside.err) == (0, "")
    assert inside.out == outside.out
    assert spawn("verify", published / "ranks-2_2", env=INSIDE_A_RANK).status == 0


def test_mpi_is_never_imported(published: Path) -> None:
    code = f"""
import os, sys
from parckpt.cli.main import main
for words in (["ls"], ["status"], ["verify"]):
    try:
        main([*words, {str(published)!r}, "--json"], prog_name="parckpt")
    except SystemExit as end:
        assert not end.code, end.code
assert not [name for name in sys.modules if name.startswith("mpi4py")]
assert not [name for name in os.environ if name.startswith(("PMI", "OMPI_"))]
"""
    environ = {**os.environ, **INSIDE_A_RANK}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_launcher_variables_are_dropped_and_the_job_is_not() -> None:
    environ = {**INSIDE_A_RANK, **dict.fromkeys(LAUNCHER_VARIABLES, "2"), "SLURM_JOB_ID": "17", "HOME": "/root"}
    drop_launcher_variables(environ)
    assert environ == {"SLURM_JOB_ID": "17", "HOME": "/root"}
    assert launched_size(environ) == 1


def test_a_reader_that_has_seen_enough(published: Path) -> None:
    command = f"{sys.executable} -m parckpt.cli show {published / 'ranks-2_2'} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("p", "")


def test_output_survives_any_encoding(spawn: Any, golden: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xe4.ckpt")
    (tmp_path / name).write_bytes((golden / "train" / "net-2_4.ckpt").read_bytes())
    (tmp_path / "é.ckpt").write_bytes(b"")
    for words in (("ls", tmp_path), ("ls", tmp_path, "--json"), ("verify", tmp_path)):
        found = spawn(*words, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"})
        assert "Traceback" not in found.err
        assert found.status in (0, 5)
    listed = json.loads(spawn("ls", tmp_path, "--json").out)["foreign"]
    assert {row["name"] for row in listed} == {name, "é.ckpt"}


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9_994, "9.99 kB"), (9_996, "10.0 kB"), (99_960, "100 kB")),
        *((999_499, "999 kB"), (999_500, "1.00 MB"), (123_456_789_012, "123 GB"), (10**21, "1000 EB")),
    ],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_words() -> None:
    assert [age(s) for s in (0, 119, 120, 7199, 7200, 172800, -5)] == [
        *("0 s", "119 s", "2.0 min", "120.0 min", "2.0 h", "2.0 days", "-5 s")
    ]
    assert plain("a\tb\x1b\u202e\udcffé") == "a\\tb\\x1b\\u202e\\udcffé"
    assert moment(None) == moment(float("inf")) == moment(1e300) == "-"
