"""What every plain implementation is made of: clients' data, networks, a shuffled loader, SGD.

Ordinary PyTorch, one client after another, with random draws of its own. Of fedmerge it has the
data and the network's layers only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Data = tuple[Tensor, Tensor]
Model = Callable[[Tensor], Tensor]
"""From inputs to a score for each class."""


@dataclass(frozen=True)
class World:
    """A federation, and how its clients train.

    Attributes:
        train, validation, test: (x, y) of each client.
        make: makes a network with new random weights.
        draw: what the order of the examples, and a method's own draws, come from.
    """

    train: list[Data]
    validation: list[Data]
    test: list[Data]
    make: Callable[[], nn.Module]
    draw: torch.Generator
    lr: float = 0.3
    epochs: int = 5
    batch_size: int = 16

    @property
    def sizes(self) -> list[int]:
        """Training examples of each client."""
        return [len(y) for _, y in self.train]

    def copies(self) -> list[nn.Module]:
        """A network for each client, all with the same random weights."""
        first = self.make()
        return [copy.deepcopy(first) for _ in self.train]

    def seed(self) -> int:
        """A new seed, for a library that draws from a generator of its own."""
        return int(torch.randint(2**31, (), generator=self.draw))

    def loader(self, data: Data) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One shuffled pass in batches: inputs, labels, and which examples they are."""
        x, y = data
        for places in torch.randperm(len(y), generator=self.draw).split(self.batch_size):
            yield x[places], y[places], places

    def fit(
        self,
        net: nn.Module,
        data: Data,
        *,
        epochs: int | None = None,
        part: Iterable[nn.Parameter] | None = None,
        penalty: Callable[[], Tensor] | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Train `net`, or a part of it, on the mean loss of each batch plus a penalty.

        `weight` (n,) multiplies the loss of each of the n examples.
        """
        params = list(net.parameters() if part is None else part)
        optimizer = torch.optim.SGD(params, lr=self.lr)
        for _ in range(self.epochs if epochs is None else epochs):
            for x, y, places in self.loader(data):
                losses = functional.cross_entropy(net(x), y, reduction="none")
                loss = (losses if weight is None else losses * weight[places]).mean()
                loss = loss if penalty is None else loss + penalty()
                optimizer.zero_grad()
                # Of what is trained only: gradients of the rest would pile up unused.
                loss.backward(inputs=params)
                optimizer.step()


def losses(net: nn.Module, data: Data) -> Tensor:
    """(n,) loss of each example."""
    with torch.no_grad():
        return functional.cross_entropy(net(data[0]), data[1], reduction="none")


def accuracy(model: Model, data: Data) -> float:
    """Share of the examples that are classified correctly."""
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).double().mean())


def pull(net: nn.Module, towards: nn.Module, mu: float) -> Callable[[], Tensor]:
    """The penalty mu / 2 ||net - towards||^2, with `towards` as it is now."""
    anchor = [p.detach().clone() for p in towards.parameters()]

    def penalty() -> Tensor:
        pairs = zip(net.parameters(), anchor, strict=True)
        return mu / 2 * torch.stack([(p - a).square().sum() for p, a in pairs]).sum()

    return penalty


def average(parts: Sequence[Iterable[nn.Parameter]], share: Sequence[float]) -> list[Tensor]:
    """The mean of the same parameters of several networks, with weights `share`."""
    total = sum(share)
    with torch.no_grad():
        return [
            torch.stack([p * (s / total) for p, s in zip(same, share, strict=True)]).sum(0)
            for same in zip(*parts, strict=True)
        ]


def assign(part: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    """Write values into parameters."""
    with torch.no_grad():
        for p, value in zip(part, values, strict=True):
            p.copy_(value)


def vector(net: nn.Module) -> Tensor:
    """All weights of a network in one vector (n_params,), a copy."""
    return parameters_to_vector(net.parameters()).detach().clone()


def load(net: nn.Module, weights: Tensor) -> None:
    """Write a vector (n_params,) into a network; the vector is not shared with it."""
    vector_to_parameters(weights.clone(), net.parameters())
