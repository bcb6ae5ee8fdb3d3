"""The console script: outside the package, because importing anything of that takes half a second.

Ctrl-C within that time ends the program without a traceback; there is nothing to clean up yet.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

__all__ = ["main"]

_INTERRUPTED = 130  # as parckpt.cli.failure.INTERRUPTED


def _end(*args: object) -> NoReturn:
    os._exit(_INTERRUPTED)  # an exception would be at the mercy of whatever is being imported


def main() -> None:
    """Run ``parckpt``."""
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored, as under nohup
    if is_ours:
        signal.signal(signal.SIGINT, _end)
    from parckpt.cli.main import main as command

    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command(prog_name="parckpt")
