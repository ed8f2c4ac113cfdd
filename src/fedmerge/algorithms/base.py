"""What a method is: a frozen value with pure functions, one for each moment of a round.

    send -> local (at the client) -> fold ... fold -> commit

State goes in and comes out. `shared` is the server's state of size O(d P); `rows` is what the
server keeps for each client, `memory` what a client keeps for itself; both have a leading client
axis and are handed over for the clients of the cohort only. No function sees a client's name or
position, and none knows who runs local training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from ..errors import ConfigError
from ..local import Proximal
from ..merging import ModelSum
from ..params import Layout

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Setup:
    """What every function of a method may know of the run.

    Attributes:
        layout: of the rows.
        initial: initial(j) is the j-th independent random initialisation (P,); at the server only.
        seed: of the run.
    """

    layout: Layout
    initial: Callable[[int], Tensor]
    seed: int


@dataclass(frozen=True)
class Ticket:
    """Names the model a client was given: an update is taken once, for that model only.

    Attributes:
        client: the client's id.
        version: rounds the server had committed when it sent the model.
        row: digest of what the server kept for the client then.
    """

    client: str
    version: int
    row: str


@dataclass(frozen=True)
class Updates:
    """The updates of k clients, stacked on the first axis.

    Attributes:
        tickets: k tickets, as received with the models.
        delta: (k, P) start - end, with buffers as end values (`Layout.update`); (k, 0) from methods
            that send nothing.
        n_examples: (k,) int64 training examples.
        steps: (k,) int64 local SGD steps taken.
        lr: (k,) float64 learning rates used.
        extra: what else the method sends, each (k, ...).
    """

    tickets: tuple[Ticket, ...]
    delta: Tensor
    n_examples: Tensor
    steps: Tensor
    lr: Tensor
    extra: Tensors = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tickets)

    def take(self, places: Sequence[int]) -> Updates:
        """The updates at `places`, in that order."""
        at = torch.tensor(places, dtype=torch.int64)
        return Updates(
            tuple(self.tickets[i] for i in places),
            self.delta[at],
            self.n_examples[at],
            self.steps[at],
            self.lr[at],
            {name: value[at] for name, value in self.extra.items()},
        )


class Trainer(Protocol):
    """Local training on the data of k clients, whoever carries it out."""

    @property
    def n_examples(self) -> Tensor:
        """(k,) int64 training examples."""

    def fit(
        self,
        rows: Tensor,
        *,
        epochs: int | None = None,
        proximal: Proximal | None = None,
        purpose: str = "train",
    ) -> tuple[Tensor, Tensor]:
        """Train from rows (k, P); return end rows (k, P) and steps (k,).

        `epochs` None means those of the run. `purpose` names the draws of the batches.
        """

    def loss(self, rows: Tensor) -> Tensor:
        """(k,) mean loss of rows (k, P) on the clients' training data, float64."""


@dataclass(frozen=True)
class Local:
    """What a client has after local training.

    Attributes:
        delta: (k, P) or (k, 0), to be sent. steps: (k,) int64.
        memory: what the clients keep. own: (k, P), their own model at the end of training.
        extra: what else is sent.
    """

    delta: Tensor
    steps: Tensor
    memory: Tensors
    own: Tensor
    extra: Tensors = field(default_factory=dict)


@dataclass
class Fold:
    """What a round has gathered so far; `fold` adds to it in place, `commit` uses it up."""

    sum: ModelSum | None = None
    parts: list[Tensors] = field(default_factory=list)

    def gathered(self, name: str) -> Tensor:
        """The parts called `name`, in the order in which they were folded."""
        return torch.cat([part[name] for part in self.parts])


@dataclass(frozen=True)
class Algorithm:
    """Base of all methods: FedAvg's round, of which a method overrides what differs.

    Class attributes:
        name: as in the registry.
        sends_update: whether clients send a row back.
    """

    name: ClassVar[str]
    sends_update: ClassVar[bool] = True

    def resolve(self, n_clients: int | None) -> Self:
        """Return the method with what depends on the number of clients filled in and checked."""
        d: int | None = getattr(self, "d", None)
        if d is not None and n_clients is not None and d > n_clients:
            raise ConfigError(
                f"{self.name} has d = {d} models for {n_clients} clients: "
                f"wanted d of at most {n_clients}, or more clients"
            )
        return self

    def _need(self, **least: float) -> None:
        """Raise ConfigError unless each option is in [least, 1e6]; None, for a default, is."""
        for option, bound in least.items():
            value = getattr(self, option)
            if value is not None and not bound <= value <= 1e6:
                wanted = "above 0" if 0 < bound < 1 else f"{bound:g} or more"
                wanted += ", at most 1000000"
                raise ConfigError(f"{self.name}: {option} = {value}: wanted {wanted}")

    def shared(self, setup: Setup) -> Tensors:
        """The server's state before the first round."""
        return {"models": setup.initial(0)[None]}

    def rows(self, setup: Setup, k: int) -> Tensors:
        """What the server keeps for each of k new clients."""
        return {}

    def memory(self, setup: Setup, k: int) -> Tensors:
        """What each of k new clients keeps for itself."""
        return {}

    def send(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        """(k, r, P): the r models that each of k clients receives."""
        return shared["models"].expand(k, -1, -1)

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        """What the clients do with their message (k, r, P)."""
        start = message[:, 0]
        end, steps = trainer.fit(start)
        return Local(setup.layout.update(start, end), steps, memory, end)

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        """(k, P): the model each client would use, given its message (k, r, P); evaluated as
        `merged`."""
        return message[:, 0]

    def fits(self, shared: Tensors, extra: Tensors) -> bool:
        """Whether what one client sent beside its update is what the method can use."""
        return True

    def coefficients(
        self, setup: Setup, shared: Tensors, rows: Tensors, updates: Updates
    ) -> Tensor:
        """(k, b, d) or (k, 1, d) float64: how much of each update goes to each model, before n."""
        return torch.ones(len(updates), 1, 1, dtype=torch.float64)

    def fold(
        self,
        setup: Setup,
        shared: Tensors,
        rows: Tensors,
        updates: Updates,
        fold: Fold,
        version: int,
    ) -> None:
        """Add the updates of k clients to `fold`, given their rows as they were sent."""
        if fold.sum is None:
            fold.sum = ModelSum.for_layout(setup.layout, len(shared["models"]))
        share = self.coefficients(setup, shared, rows, updates)
        fold.sum.add(share * updates.n_examples.double()[:, None, None], updates.delta)

    def commit(
        self, setup: Setup, shared: Tensors, fold: Fold, version: int
    ) -> tuple[Tensors, Tensors]:
        """End the round: new shared state, and new rows of the folded clients in their order."""
        if fold.sum is None:
            return shared, {}
        return {**shared, "models": fold.sum.step(shared["models"])}, {}

    def weights(self, setup: Setup, rows: Tensors) -> Tensor | None:
        """(k, b, d) merging weights for a method that has them."""
        return None
