"""Ctrl-C put off while what is being done would be lost half done.

It says when a signal is heard; what is kept then is the loop's.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def put_off() -> Iterator[None]:
    """Ctrl-C, or being told to end, is heard when the block is left; at once if it comes twice.

    Only in the main thread, the one that hears signals, and only what a Python function handles.
    """
    handled = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handled = {number: handler for number, handler in found.items() if callable(handler)}
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if len(heard) > 1:
            handled[signal.Signals(number)](number, frame)

    for number in handled:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
    if len(heard) == 1:
        handled[signal.Signals(heard[0])](heard[0], None)
