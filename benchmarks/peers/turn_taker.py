"""Our end of taking turns with a peer: start it, ask for a round, stop it.

What the peer computes is its own affair; only seconds and steps come back.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 900.0
"""Seconds after which a peer that says nothing is given up."""


class TurnTaker:
    """A peer in a process of its own.

    Args:
        python: interpreter of its environment. module: of this package, that runs it.
        task: file of the task. rounds: it will be asked for. workers: processes it may use.
        log: where what it prints goes.

    Attributes:
        start: seconds until it was ready. seconds: what it reports for each round, once asked.
    """

    def __init__(
        self, python: Path, module: str, task: Path, rounds: int, workers: int, log: Path
    ) -> None:
        self.seconds: list[float] = []
        self.steps = 0
        self._log = log
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        began = time.perf_counter()
        with log.open("w") as printed:
            self._process = subprocess.Popen(
                [
                    str(python.absolute()),
                    "-m",
                    f"benchmarks.peers.{module}",
                    str(task.resolve()),
                    str(rounds),
                    str(workers),
                ],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                start_new_session=True,  # With whatever it starts, it can be stopped as one.
            )
        try:
            self._read()
        except BaseException:
            self.close()
            raise
        self.start = time.perf_counter() - began

    def round(self) -> None:
        """Have it run one round."""
        if self._process.stdin is None:
            raise RuntimeError("the peer has no standard input")
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        said = self._read()
        self.seconds.append(float(said["seconds"]))
        self.steps = int(said["steps"])

    def _read(self) -> dict[str, Any]:
        out = self._process.stdout
        if out is None or not select.select([out], [], [], PATIENCE)[0]:
            raise RuntimeError(f"nothing heard for {PATIENCE:.0f} s")
        line = out.readline()
        if not line:
            lines = self._log.read_text().strip().splitlines()
            raise RuntimeError(f"it ended early: {lines[-1] if lines else 'no message'}")
        said: dict[str, Any] = json.loads(line)
        return said

    def close(self) -> None:
        """Let it end by itself, and end it if it does not."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
