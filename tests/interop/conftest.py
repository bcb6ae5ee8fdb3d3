"""Comparison with the real MindSpore: collected only where it is installed (``scripts/test.sh --mindspore``)."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).parent

if importlib.util.find_spec("mindspore") is None:
    collect_ignore_glob = ["*"]
else:
    # Errors only: its warnings say what the tests provoke on purpose. Read when it is imported.
    os.environ.setdefault("GLOG_v", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mindspore  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Only our own warnings are errors here; what MindSpore warns about is its own affair."""
    for item in items:
        if HERE in item.path.parents:
            # In front, so that a test's own mark wins.
            mark = pytest.mark.filterwarnings("default", "error::parckpt.ParckptWarning")
            item.add_marker(mark, append=False)


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore leaves files (``rank_0/``, graphs) in the working directory."""
    monkeypatch.chdir(tmp_path)
