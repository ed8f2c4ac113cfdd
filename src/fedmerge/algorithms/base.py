"""What a method is: a frozen value with pure functions, one for each moment of a round.

    send -> local (at the client) -> fold ... fold -> commit

State goes in and comes out. `shared` is the server's state of size O(d P); `rows` is what the
server keeps for each client, `memory` what a client keeps for itself; both have a leading client
axis and are handed over for the clients of the cohort only. No function sees a client's name or
position, and none knows who runs local training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import ClassVar, Self, get_type_hints

import torch
from torch import Tensor

from ..errors import ConfigError
from ..local import Mixture
from ..params import Layout
from ..sums import ModelSum
from ..values import describe_type, is_value
from .trainer import Trainer

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Setup:
    """What every function of a method may know of the run.

    Attributes:
        layout: of the rows.
        initial: initial(j) is the j-th independent random initialisation (P,); at the server only,
            and not for `send` and `fold`, which may be done where the clients' data are.
        seed: of the run.
        n_inputs: numbers in one flattened input; 0 where it is not known.
    """

    layout: Layout
    initial: Callable[[int], Tensor]
    seed: int
    n_inputs: int = 0


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
            that send nothing, (k, r, P) from those that send several rows (`update_shape`).
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


@dataclass(frozen=True)
class Local:
    """What a client has after local training.

    Attributes:
        delta: (k, P), (k, 0) or (k, r, P), to be sent. steps: (k,) int64.
        memory: what the clients keep. own: (k, P) or a mixture, their own model at the end of
            training; None where nobody asks for it any more.
        extra: what else is sent.
    """

    delta: Tensor
    steps: Tensor
    memory: Tensors
    own: Tensor | Mixture | None
    extra: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What a method costs, in models of P numbers; declared by it, and tested against what it does.

    Attributes:
        down, up: received and sent by a client in a round.
        client: kept by each client from round to round.
        server: kept by the server, whatever the number of clients; at most, where that changes.
        server_per_client: kept by the server for each client.
        passes: local training in a round, in passes of FedAvg's (gradients computed for each
            example). Fine-tuning before a model is used is not in it, nor are models only judged.
    """

    down: float = 1.0
    up: float = 1.0
    client: float = 0.0
    server: float = 1.0
    server_per_client: float = 0.0
    passes: float = 1.0


@dataclass
class Fold:
    """What a round has gathered so far; `fold` adds to it in place, `commit` uses it up."""

    sum: ModelSum | None = None
    parts: list[Tensors] = field(default_factory=list)

    def join(self, other: Fold) -> None:
        """Add what another fold of the same round, over other clients, has gathered.

        So folding in two places is folding in one: `Algorithm.fold` only ever adds.
        """
        if self.sum is None:
            self.sum = other.sum
        elif other.sum is not None:
            self.sum.join(other.sum)
        self.parts += other.parts

    def gathered(self, name: str) -> Tensor:
        """The parts called `name`, in the order in which they were folded."""
        return torch.cat([part[name] for part in self.parts])


@dataclass(frozen=True)
class Algorithm:
    """Base of all methods: FedAvg's round, of which a method overrides what differs.

    Class attributes:
        name: as in the registry.
        sends_update: whether clients send a row back.
        streams: whether `fold` is done with the updates when it returns. Methods that keep them are
            given a copy.
        sends_by: the tables of rows that `send` reads, one of which at least changes whenever a row
            does, so that they name it in tickets; None for all.
        grid: what tuning may try: at most 8 points, each a value for some of the method's options
            or of `lr` and `epochs`, the most promising first; the defaults are tried as well.
            Rates are written for a usual one of 0.3, and go in proportion to that of a run.
    """

    name: ClassVar[str]
    sends_update: ClassVar[bool] = True
    streams: ClassVar[bool] = False
    sends_by: ClassVar[tuple[str, ...] | None] = None
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 1.0}, {"lr": 0.1}, {"lr": 0.5}, {"lr": 0.03},
    )  # fmt: skip

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
        """Raise ConfigError unless all options are of their types, and these in [least, 1e6].

        None, for a default, is.
        """
        kind: type = type(self)
        for option, wanted in _option_types(kind).items():
            value = getattr(self, option)
            if not is_value(value, wanted):
                given = f'"{value}"' if isinstance(value, str) else value
                raise ConfigError(
                    f"{self.name}: {option} = {given}: wanted {describe_type(wanted)}"
                )
        for option, bound in least.items():
            value = getattr(self, option)
            if value is not None and not bound <= value <= 1e6:
                limits = "above 0" if 0 < bound < 1 else f"{bound:g} or more"
                limits += ", at most 1000000"
                raise ConfigError(f"{self.name}: {option} = {value}: wanted {limits}")

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        """What the method costs once it is under way.

        Args:
            setup: the model and its inputs. n_clients: how many clients there are.
            epochs: of local training in a round.
        """
        return Cost()

    def travels(self, layout: Layout) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the parts of a row that are sent, both ways; the rest is never read."""
        return ((0, layout.size),)

    def update_shape(self, layout: Layout) -> tuple[int, ...]:
        """Shape of one client's delta: a row, or several where it sends several back."""
        return (layout.size,) if self.sends_update else (0,)

    def shared(self, setup: Setup) -> Tensors:
        """The server's state before the first round."""
        return {"models": setup.initial(0)[None]}

    def rows(self, setup: Setup, k: int) -> Tensors:
        """What the server keeps for each of k new clients.

        A table called "place" (k,) int64 is filled in by the server: the client's number, from 0 in
        the order of joining, for methods that keep whole models of other clients.
        """
        return {}

    def memory(self, setup: Setup, k: int) -> Tensors:
        """What each of k new clients keeps for itself."""
        return {}

    def send(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        """(k, r, P): the r models that each of k clients receives."""
        return shared["models"].expand(k, -1, -1)

    def send_into(self, setup: Setup, shared: Tensors, rows: Tensors, out: Tensor) -> Tensor:
        """As `send`, for len(out) clients; may write to `out`, and return a view of it."""
        return self.send(setup, shared, rows, len(out))

    def used(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        """As `send`, but to be used by the clients, not to be trained and sent back."""
        return self.send(setup, shared, rows, k)

    def told(self, shared: Tensors, k: int) -> Tensors:
        """What the server says to k clients with the models of `used`, each (k, ...): `personal`
        has it in its `memory`, so under other names than those of `memory`."""
        return {}

    def mixed(self, shared: Tensors) -> Tensor | None:
        """(d, P): the models that `used` mixes by `weights`, in methods that do."""
        return shared.get("models")

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        """What the clients do with their message (k, r, P)."""
        start = message[:, 0]
        end, steps = trainer.fit(start)
        return Local(setup.layout.update(start, end), steps, memory, end)

    def personal(
        self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer
    ) -> Tensor | Mixture:
        """(k, P) or a mixture: the model each client would use, given its message (k, r, P);
        evaluated as `merged`."""
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

    def reach(self, rows: Tensors, version: int) -> Tensor:
        """(k,) float64: how far each client's log-weights may move in this round."""
        raise NotImplementedError


@cache
def _option_types(kind: type) -> dict[str, object]:
    try:
        types = get_type_hints(kind)
    except NameError:  # a caller's own class may import its types for type checkers only
        return {}
    return {f.name: types[f.name] for f in fields(kind)}


def check_method(algorithm: object) -> None:
    """Raise ConfigError for what is no method, such as the name or the class of one."""
    if not isinstance(algorithm, Algorithm):
        given = f"a {type(algorithm).__name__}"
        if isinstance(algorithm, str):
            given = f'"{algorithm}"'
        elif isinstance(algorithm, type):
            given = f"the class {algorithm.__name__}"
        raise ConfigError(
            f'algorithm is {given}: wanted a method, e.g. FedMerge() or make_method("fedmerge")'
        )
