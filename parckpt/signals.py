"""Signals: the only module that touches handlers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["deferred_interrupt"]


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold SIGINT back until the block ends, then deliver it to the handler that was there.

    A KeyboardInterrupt between two collectives would leave the other ranks waiting. Only the main thread can hold it
    back, and only there is it raised; elsewhere, and where somebody outside Python handles it, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.getsignal(signal.SIGINT)
    if earlier is None:
        yield
        return
    arrived: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
        if arrived:
            signal.raise_signal(signal.SIGINT)
