"""The peer's end of taking turns: one round when it is asked for, and a line about it.

It is imported in a peer's environment, where fedmerge is not installed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from ..tasks import Task


class Turns:
    """Runs `rounds` rounds, each begun by a line on the standard input.

    Whatever the peer prints goes to the standard error, so that the standard output is ours.
    """

    def __init__(self) -> None:
        torch.set_num_threads(1)
        path, rounds, workers = sys.argv[1:]
        self.path = Path(path)
        self.task = Task.load(self.path)
        self.rounds, self.workers = int(rounds), int(workers)
        self.steps = 0
        self._done = 0
        self._began: float | None = None
        self._answer = os.fdopen(os.dup(1), "w", buffering=1)
        self._ask = os.fdopen(os.dup(0))
        os.dup2(2, 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def next(self) -> None:
        """End the round that is running, if one is, and wait until the next may begin.

        Before it, `steps` is to have grown by the SGD steps of the round.
        """
        if self._began is not None:
            spent = time.perf_counter() - self._began
            self._done += 1
            print(json.dumps({"seconds": spent, "steps": self.steps}), file=self._answer)
        else:
            print(json.dumps({"ready": True}), file=self._answer)
        self.steps = 0
        if self._done < self.rounds:
            if not self._ask.readline():
                os._exit(1)  # Nobody is left to run for.
            self._began = time.perf_counter()
