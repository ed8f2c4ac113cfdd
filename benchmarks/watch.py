"""Looking at something every so often, in a thread of its own, while other work goes on."""

from __future__ import annotations

import threading
from typing import Self


class Watch:
    """Calls `look` every `interval` seconds while it is entered."""

    interval = 0.5

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def look(self) -> None:
        """What is done each time."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            self.look()
