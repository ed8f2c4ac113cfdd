"""Where the clients' work is done: what `execution` stands for, and how "auto" finds it out.

Whoever does the work, this process (with one thread, as workers have) or workers, does it with the
same engine and gives the same bits, so time may decide between them, and a run that is stopped and
resumed may decide otherwise. "Stacked" and "sequential" agree to rounding only: time must not
decide between these two, as the same seed would then give another result on another day. There the
module decides (`Engine`).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator

import torch

from ..errors import ConfigError
from .cluster import Cluster
from .execute import ClientSide, Executor, InProcess, Task, Trained
from .log import Measured, RoundLog
from .processes import Processes

WORTH = 20.0
"""Least seconds that the rest of a run must seem to take before workers are tried: they need some
four to start, and what they save is less than half on two cores."""


class Auto:
    """Begins in this process, and moves to worker processes if that shows to be faster.

    The first round warms up and the second is timed; then, if there is enough left to do, workers
    get two, of which the first starts them. The better of the two goes on.

    Args:
        workers: most processes; 1 leaves everything here.

    Attributes:
        why: what was chosen, and the reason, in words.
    """

    def __init__(self, side: ClientSide, workers: int) -> None:
        self.side = side
        self._here = InProcess(side)
        self._apart = Processes(side, workers)
        self._now: InProcess | Processes = self._here
        self._warm = self._decided = False
        self._timed: dict[bool, float] = {}
        self._evaluated: bool | None = None
        self.why = "in this process"
        threads = torch.get_num_threads()
        if threads != 1:
            # A sum over several threads is not that of one to the bit, and workers have one.
            self._decide(self._here, f"it has {threads} threads")
        elif self._apart.size == 1:
            self._decide(self._here, "the clients make one stack" if workers > 1 else "one worker")
        elif multiprocessing.current_process().daemon:
            self._decide(self._here, "it is a worker process itself")

    def train(self, tasks: Iterable[Task], *, measured: bool) -> Iterator[Trained]:
        """See `ClientSide.train`."""
        if self._now is self._apart:
            try:
                self._apart.start()
            except ConfigError as error:  # what cannot be sent, or no memory to share
                self._decide(self._here, f"workers cannot be had ({error})")
        return self._now.train(tasks, measured=measured)

    def evaluate(self, tasks: Iterable[Task]) -> Iterator[dict[str, dict[str, Measured]]]:
        """See `ClientSide.evaluate`."""
        return self._now.evaluate(tasks)

    def close(self) -> None:
        """End the processes, if there are any."""
        self._apart.close()

    def after(self, log: RoundLog, left: int) -> None:
        """Learn from a round, with `left` more to come."""
        if self._decided:
            return
        if not self._warm:
            self._warm = True
            return
        # An evaluated round has more to do: like is held against like.
        evaluated = bool(log.metrics)
        if self._evaluated is None:
            self._evaluated = evaluated
        if evaluated != self._evaluated:
            return
        apart = self._now is self._apart
        self._timed[apart] = log.seconds["local"] + log.seconds["evaluate"]
        here = self._timed[False]
        if apart:
            there = self._timed[True]
            text = f"a round took {here:.2g} s here and {there:.2g} s in {self._apart.size} workers"
            self._decide(self._apart if there < here else self._here, text)
        elif here * left < WORTH:
            self._decide(self._here, f"the rest takes about {here * left:.2g} s")
        else:
            self._now, self._warm = self._apart, False

    def _decide(self, chosen: InProcess | Processes, reason: str) -> None:
        self._now, self._decided = chosen, True
        where = "in this process"
        if chosen is self._apart:
            where = _in(self._apart)
        else:
            self._apart.close()
        self.why = f"{where}, as {reason}"


def make_executor(
    side: ClientSide, execution: str, cohort: int, workers: int | None, address: str | None
) -> Executor | Cluster:
    """Return who does what `side` describes.

    Args:
        execution: of `EXECUTIONS`. cohort: usual number of clients in a round.
        workers: number of workers; None for as many as there are CPUs, but with "auto" for none:
            starting processes from a script that does not expect it would run the script again.
        address: of a Ray cluster.

    Raises:
        MissingExtraError, ConfigError: Ray is not there.
    """
    if execution == "processes":
        return Processes(side, workers or os.cpu_count() or 1)
    if execution == "ray":
        return Cluster(side, cohort, workers, address)
    if execution == "auto" and workers is not None:
        return Auto(side, workers)
    return InProcess(side)


def described(side: ClientSide, executor: Executor | Cluster) -> str:
    """How clients are trained, and why, in a line."""
    engine = side.engine
    how = "in stacks" if engine.net is not None else "one by one"
    reason = f" ({engine.reason})" if engine.reason else ""
    match executor:
        case Auto():
            where = executor.why
        case Processes():
            where = _in(executor)
        case Cluster():
            where = "on a Ray cluster"
        case _:
            where = "in this process"
    return f"Clients were trained {how}{reason}, {where}."


def _in(workers: Processes) -> str:
    return "in one worker process" if workers.size == 1 else f"in {workers.size} worker processes"
