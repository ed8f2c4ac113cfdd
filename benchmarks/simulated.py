"""A task run by the simulator: clients with its data, and rounds that can be timed one by one.

No evaluation takes part: it is never due.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmerge import Algorithm, Client, FedmergeError, RoundLog, Simulation, Split, Training
from fedmerge.sim import execute

from .tasks import Task, names

NEVER = 10**9
Failure = (FedmergeError, ImportError, RuntimeError, OSError)
"""What a way of execution that cannot run here may raise."""


def executions() -> tuple[str, ...]:
    """Every value of `execution` that this version of the package knows."""
    return tuple(getattr(execute, "EXECUTIONS", ("auto", "sequential", "stacked")))


def takes_workers() -> bool:
    """Whether this version of the simulator can be given a number of workers."""
    return "workers" in inspect.signature(Simulation.__init__).parameters


def clients_of(data: Sequence[tuple[Tensor, Tensor]]) -> list[Client]:
    """Clients that train on `data`; validation and test, which nobody looks at, are a few of it."""
    made = []
    for name, (x, y) in zip(names(len(data)), data, strict=True):
        few = Split(x[:2], y[:2])
        made.append(Client(name, Split(x, y), few, few))
    return made


class Simulated:
    """One simulation, advanced round by round.

    Attributes:
        seconds: of each round so far. overhead: share of each that was not local training.
    """

    def __init__(self, task: Task, method: Algorithm, **options: object) -> None:
        training = Training(lr=task.lr, epochs=task.epochs, batch_size=task.batch_size)
        self.simulation = Simulation(
            method,
            clients_of(task.data),
            task.make,
            training=training,
            rounds=NEVER,
            evaluate_every=NEVER,
            **options,  # type: ignore[arg-type]
        )
        self._rounds = self.simulation.rounds()
        self.seconds: list[float] = []
        self.overhead: list[float] = []

    def round(self) -> RoundLog:
        """Run one round."""
        began = time.perf_counter()
        log = next(self._rounds)
        spent = time.perf_counter() - began
        self.seconds.append(spent)
        self.overhead.append(1 - log.seconds["local"] / (spent - log.seconds["evaluate"]))
        return log

    def close(self) -> None:
        """Stop whatever the simulation has started."""
        self._rounds.close()
        close = getattr(self.simulation, "close", None)
        if callable(close):
            close()


def one_line(error: BaseException) -> str:
    """The reason that an error gives, short enough for a table."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def pin_threads() -> None:
    """One thread: what is compared is work, not how it is divided."""
    torch.set_num_threads(1)
