"""``parckpt unlock``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parckpt.comm.wait import SystemClock


def _edit(directory: Path, **changes: Any) -> None:
    """Change what the lock of ``run`` says, keeping its length."""
    path = directory / ".run.lock"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content).ljust(1023) + "\n")


def test_gone_holder(call: Any, crashed: Callable[[str], Path]) -> None:
    directory = crashed("die-before-record")
    refused = call("unlock", directory)
    assert (refused.status, (directory / ".run.lock").exists()) == (3, True)
    assert "--yes" in refused.err
    assert "gone" in refused.out
    done = call("unlock", directory, "--yes", "--json")
    assert (done.status, done.json["unlocked"], done.json["holder"]["alive"]) == (0, True, False)
    assert not (directory / ".run.lock").exists()
    again = call("unlock", directory, "--json")
    assert (again.status, again.json["unlocked"], again.json["holder"]) == (0, False, None)


def test_living_holder_needs_force(call: Any, alive: tuple[Path, int]) -> None:
    directory, pid = alive
    refused = call("unlock", directory, "--yes", "--json")
    assert (refused.status, refused.json["error"]["code"]) == (7, "locked")
    assert str(pid) in refused.json["error"]["message"]
    assert (directory / ".run.lock").exists()
    assert call("unlock", directory, "--yes", "--force").status == 0
    assert not (directory / ".run.lock").exists()


def test_holder_on_another_machine(call: Any, crashed: Callable[[str], Path]) -> None:
    directory = crashed("die-before-record")
    _edit(directory, host="elsewhere", heartbeat=SystemClock().wall())
    refused = call("unlock", directory, "--yes")
    assert refused.status == 7
    assert "may well be alive" in refused.err
    assert "cannot be seen from this machine" in refused.out
    _edit(directory, host="elsewhere", heartbeat=SystemClock().wall() - 3600)
    assert call("unlock", directory, "--yes").status == 0


def test_which_prefix(call: Any, crashed: Callable[[str], Path]) -> None:
    directory = crashed("die-before-record")
    (directory / ".other.lock").write_text((directory / ".run.lock").read_text())
    several = call("unlock", directory, "--yes")
    assert several.status == 3
    assert "'other', 'run'" in several.err
    wrong = call("unlock", directory, "--yes", "--prefix", "rum")
    assert wrong.status == 4
    assert call("unlock", directory, "--yes", "--prefix", "other").status == 0
    assert (directory / ".run.lock").exists()
    assert not (directory / ".other.lock").exists()


def test_asks_at_a_terminal(call: Any, crashed: Callable[[str], Path], monkeypatch: Any) -> None:
    directory = crashed("die-before-record")
    monkeypatch.setattr("parckpt.cli.unlock._has_terminal", lambda: True)
    declined = call("unlock", directory, stdin="n\n")
    assert declined.status == 7
    assert "left as it is" in declined.err
    assert (directory / ".run.lock").exists()
    assert call("unlock", directory, stdin="y\n").status == 0
    assert not (directory / ".run.lock").exists()
