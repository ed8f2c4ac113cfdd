"""Where the time of a run goes: its seconds by phase, from loading the library to the result.

It adds up what others have measured; the phases inside a round are timed by the simulation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..sim import RoundLog

PHASES: Mapping[str, str] = {
    "start": "loading the library",
    "data": "clients' data, first models, checkpoint read",
    "send": "merging and sending",
    "local": "local training, and own models measured",
    "fold": "folding the updates",
    "commit": "model and row updates",
    "evaluate": "evaluation of merged and tuned models",
    "log": "log lines, trackers, progress",
    "save": "checkpoints",
    "result": "the result, and its files",
    "other": "drawing cohorts, and the rest",
}
"""Phases of a run in their order, and what each of them is."""


class Profile:
    """Seconds by phase, wall clock, of what is run now; rounds run before are not in it.

    Attributes:
        seconds: by phase of `PHASES`, but for "other". rounds: that were run.
        execution: how clients were trained, and why so.
    """

    def __init__(self) -> None:
        self.seconds = {phase: 0.0 for phase in PHASES if phase != "other"}
        self.rounds = 0
        self.execution = ""
        self._began = time.perf_counter()
        self._total: float | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge what happens inside to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    def round(self, log: RoundLog) -> None:
        """Take in the phases of a round."""
        self.rounds += 1
        for phase, seconds in log.seconds.items():
            self.seconds[phase] += seconds

    def finish(self, saving: float, execution: str) -> None:
        """End the run, which has spent `saving` seconds on checkpoints."""
        self.seconds["save"] += saving
        self.execution = execution
        self._total = time.perf_counter() - self._began

    @property
    def total(self) -> float:
        """Seconds from the beginning to `finish`, or until now."""
        return time.perf_counter() - self._began if self._total is None else self._total

    def rows(self) -> list[tuple[str, float, float, float | None]]:
        """Phase, seconds, share of the total, and seconds a round; None where no round was run."""
        total = self.total
        spent = {**self.seconds, "other": max(0.0, total - sum(self.seconds.values()))}
        return [
            (phase, spent[phase], spent[phase] / total, spent[phase] / self.rounds)
            if self.rounds
            else (phase, spent[phase], spent[phase] / total, None)
            for phase in PHASES
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "rounds": self.rounds,
            "seconds": self.total,
            "phases": {
                phase: {"seconds": seconds, "share": share, "per_round": each}
                for phase, seconds, share, each in self.rows()
            },
            "execution": self.execution,
        }
