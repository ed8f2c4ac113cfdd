"""The clients' side of a simulation, and who carries it out: groups of clients, task by task.

Methods decide what is trained; the loop over rounds decides who takes part.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from ..algorithms import Algorithm, Local, Setup, Tensors, Ticket, Updates, tune
from ..engine import Engine
from ..errors import ConfigError
from ..local import Examples, Mixture, Proximal, Training
from ..params import Layout
from ..steps import Step
from .log import SPLITS, Measured
from .population import Population

EXECUTIONS = ("auto", "stacked", "sequential", "processes", "ray")
"""Ways of having clients' work done: here with one of the `Engine`'s, in other processes, or on the
machines of a Ray cluster."""
GROUPS = ((2**13, 32), (2**15, 20), (math.inf, 16))
"""Largest row, in numbers, and the clients in a stack of such rows: measured to be fastest. More of
them no longer fit a core's cache."""


@dataclass(frozen=True)
class GroupTrainer:
    """Local training and evaluation of a group of clients in one round."""

    engine: Engine
    population: Population
    places: list[int]
    seed: int
    round: int

    @property
    def n_examples(self) -> Tensor:
        """(k,) int64 training examples."""
        return torch.from_numpy(self.population.splits["train"].count[self.places])

    @property
    def lr(self) -> float:
        """See `Trainer.lr`."""
        training = self.engine.training
        if training.momentum or training.weight_decay or training.clip:
            raise ConfigError(
                "momentum, weight_decay and clip do not go with this method, whose local steps are "
                "its own and plain SGD: leave them out, or take another method"
            )
        return training.lr

    def _examples(self, split: str) -> Examples:
        return self.population.examples(self.places, split)[0]

    def _draws(self, purpose: str) -> list[tuple[int | str, ...]]:
        return [(self.round, self.population.ids[i], purpose) for i in self.places]

    def _epochs(self, epochs: int | None) -> int:
        return self.engine.training.epochs if epochs is None else epochs

    def fit(
        self,
        rows: Tensor,
        *,
        epochs: int | None = None,
        proximal: Proximal | None = None,
        only: tuple[int, int] | None = None,
        lr_scale: float = 1.0,
        purpose: str = "train",
    ) -> tuple[Tensor, Tensor]:
        """See `Trainer.fit`."""
        return self.engine.fit(
            rows,
            self._examples("train"),
            self._draws(purpose),
            seed=self.seed,
            epochs=self._epochs(epochs),
            proximal=proximal,
            only=only,
            lr_scale=lr_scale,
        )

    def steps(self, *, epochs: int | None = None, purpose: str = "train") -> Iterator[Step]:
        """See `Trainer.steps`."""
        return self.engine.steps(
            self._examples("train"),
            self._draws(purpose),
            seed=self.seed,
            epochs=self._epochs(epochs),
        )

    def loss(self, rows: Tensor, split: str = "train") -> Tensor:
        """See `Trainer.loss`."""
        return self.engine.measure(rows, [self._examples(split)])[0][0]

    def wrong(self, rows: Tensor, split: str = "train") -> Tensor:
        """See `Trainer.wrong`."""
        examples = self._examples(split)
        right = self.engine.measure(rows, [examples])[0][1]
        return ((1 - right) * torch.from_numpy(examples.count)).round()

    def losses(self, rows: Tensor) -> Tensor:
        """See `Trainer.losses`."""
        return self.engine.losses(rows, self._examples("train"))

    def gain(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """See `Trainer.gain`."""
        examples = self._examples("validation")
        losses = self.engine.losses(torch.stack([before, after], dim=1), examples).double()
        lower, n = losses[:, 0] - losses[:, 1], torch.from_numpy(examples.count)
        mean = lower.sum(1) / n
        real = torch.arange(lower.shape[1]) < n[:, None]
        off = torch.where(real, lower - mean[:, None], 0.0).square().sum(1)
        return mean, (off / (n * (n - 1))).sqrt()

    def measure(self, model: Tensor | Mixture) -> dict[str, Measured]:
        """How models of the clients do on each split."""
        found = self.engine.measure(model, self.population.examples(self.places, *SPLITS))
        return {
            split: Measured(*(part.numpy() for part in figures))
            for split, figures in zip(SPLITS, found, strict=True)
        }


@dataclass(frozen=True)
class Task:
    """What a group of clients has to do in a round.

    Attributes:
        places: of the clients in the population. round: from 1.
        message: (k, r, P), what they received. memory: what they keep.
        told: what the server has said beside, where the models are to be used.
    """

    places: list[int]
    round: int
    message: Tensor
    memory: Tensors
    told: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What a group of clients has after training, and how its own models do, if measured."""

    local: Local
    n_examples: Tensor
    own: dict[str, Measured] | None

    def updates(self, tickets: tuple[Ticket, ...], lr: float) -> Updates:
        """What the clients send back."""
        local, rates = self.local, torch.full((len(tickets),), lr, dtype=torch.float64)
        return Updates(tickets, local.delta, self.n_examples, local.steps, rates, local.extra)


@dataclass(frozen=True)
class ClientSide:
    """All that happens at clients; the same value does it in this process or in another.

    Attributes:
        module: the architecture; its values are not used. execution: of the `Engine`.
    """

    algorithm: Algorithm
    setup: Setup
    module: nn.Module
    training: Training
    population: Population
    seed: int
    execution: str = "auto"

    @cached_property
    def engine(self) -> Engine:
        """Trains and evaluates; made where it is used, since it cannot be sent."""
        return Engine(self.module, self.setup.layout, self.training, self.execution)

    @property
    def group(self) -> int:
        """Most clients in a task."""
        return next(clients for size, clients in GROUPS if self.setup.layout.size <= size)

    @cached_property
    def travelling(self) -> int:
        """How many numbers of a row are sent."""
        size = self.setup.layout.size
        parts = self.algorithm.travels(self.setup.layout)
        bounds = [0, *(bound for part in parts for bound in part), size]
        if bounds != sorted(bounds):
            raise ConfigError(
                f"{self.algorithm.name}: travels gives {parts}: wanted (start, stop) of parts of a "
                f"row of {size} numbers, in order, none twice"
            )
        return sum(stop - start for start, stop in parts)

    def wire(self, sent: Tensor) -> int:
        """Bytes on the wire: of rows (..., P) the parts that travel, of anything else all."""
        if sent.shape[-1:] != (self.setup.layout.size,):
            return sent.nbytes
        return sent.shape[:-1].numel() * self.travelling * sent.element_size()

    def trainer(self, places: list[int], number: int) -> GroupTrainer:
        """Local training of the clients at `places` in round `number`."""
        return GroupTrainer(self.engine, self.population, places, self.seed, number)

    def train(self, task: Task, *, measured: bool) -> Trained:
        """Local training, and with `measured` the evaluation of each client's own model."""
        trainer = self.trainer(task.places, task.round)
        local = self.algorithm.local(self.setup, task.message, task.memory, trainer)
        own = trainer.measure(local.own) if measured and local.own is not None else None
        return Trained(local, trainer.n_examples, own)

    def personal(self, task: Task) -> Tensor | Mixture:
        """(k, P) or mixtures: the models that the clients would use."""
        trainer = self.trainer(task.places, task.round)
        known = {**task.memory, **task.told}
        return self.algorithm.personal(self.setup, task.message, known, trainer)

    def evaluate(self, task: Task) -> dict[str, dict[str, Measured]]:
        """How `merged` does, the model each client would use, and `tuned`, after an epoch."""
        trainer = self.trainer(task.places, task.round)
        merged = self.personal(task)
        return {"merged": trainer.measure(merged), "tuned": trainer.measure(tune(merged, trainer))}


@dataclass(frozen=True)
class Parcel:
    """A `ClientSide` on its way to another process.

    What only the server needs stays behind: `Setup.initial` makes models there.
    """

    algorithm: bytes
    module: bytes
    layout: Layout
    training: Training
    population: Population
    seed: int
    n_inputs: int
    execution: str

    @classmethod
    def of(
        cls,
        side: ClientSide,
        execution: str,
        dumps: Callable[[object], bytes] = pickle.dumps,
    ) -> Parcel:
        """Pack `side`.

        Args:
            execution: as named to the user. dumps: pickles the method and the module.

        Raises:
            ConfigError: a method or a module that cannot be pickled; it is named.
        """
        return cls(
            _pickled("method", side.algorithm, execution, dumps),
            _pickled("model", side.module, execution, dumps),
            side.setup.layout,
            side.training,
            side.population,
            side.seed,
            side.setup.n_inputs,
            side.execution,
        )

    def open(self) -> ClientSide:
        """The same client side, in the process that received it."""
        algorithm, module = pickle.loads(self.algorithm), pickle.loads(self.module)
        setup = Setup(self.layout, _no_initial, self.seed, self.n_inputs)
        return ClientSide(
            algorithm, setup, module, self.training, self.population, self.seed, self.execution
        )


def _pickled(name: str, value: object, execution: str, dumps: Callable[[object], bytes]) -> bytes:
    try:
        return dumps(value)
    except Exception as error:  # objects raise what they like when they are pickled
        reason = " ".join(str(error).split())
        raise ConfigError(
            f'execution = "{execution}": the {name} ({type(value).__name__}) cannot be sent to '
            f"another process: {reason}; use functions and classes of a module's top level in it, "
            'or execution "stacked" or "sequential"'
        ) from error


def _no_initial(index: int) -> Tensor:
    raise RuntimeError("initial models are made at the server, not at clients")


class Executor(Protocol):
    """Has the clients' tasks done; results come in the order of the tasks.

    What no server gets may be missing from them: `Local.own`.
    """

    def train(self, tasks: Iterable[Task], *, measured: bool) -> Iterator[Trained]:
        """See `ClientSide.train`."""

    def evaluate(self, tasks: Iterable[Task]) -> Iterator[dict[str, dict[str, Measured]]]:
        """See `ClientSide.evaluate`."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class InProcess:
    """One group after the other, in this process."""

    side: ClientSide

    def train(self, tasks: Iterable[Task], *, measured: bool) -> Iterator[Trained]:
        """See `ClientSide.train`."""
        for task in tasks:
            yield self.side.train(task, measured=measured)

    def evaluate(self, tasks: Iterable[Task]) -> Iterator[dict[str, dict[str, Measured]]]:
        """See `ClientSide.evaluate`."""
        for task in tasks:
            yield self.side.evaluate(task)

    def close(self) -> None:
        """Nothing is held."""
