"""APPLE: a client's model is a weighted sum of all clients' core models, with weights it learns.

Luo and Wu, "Adapt to adaptation: learning personalization for cross-silo federated learning", IJCAI
2022, algorithm 1, with the exponential loss scheduler. Deviations: the weights start equal, not at
shares of examples, which no client knows of others; cores have a learning rate of their own, since
the gradient of a core is that of the sum times its weight, 1 / clients at first; limited downloads
are taken in turn, not drawn by weights, which so stay with the client; its own core comes back too.
Of the weights, that of a client's own core and the mean of the others' move in every step; what
sets the others apart moves once, after the last step, by the sum of its slopes: it moves little and
each of its slopes costs clients x P multiplications.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import Cost, Local, Setup, Tensors, Updates
from .gathering import Gathering
from .trainer import Trainer

FADED = 0.001  # what is left of the pull when it is dropped


@dataclass(frozen=True)
class APPLE(Gathering):
    """APPLE. In a client's weights its own core is number 0; the others follow as they joined.

    Attributes:
        clients: whose cores are weighed; None for those of the simulation.
        downloads: cores of others that a client receives in a round, None for all; it keeps those
            that it does not receive as they last were.
        weight_lr: learning rate of the weights.
        core_scale: learning rate of a core, in those of the run; None for the square root of the
            number of clients, between that which undoes its first weight, and 1.
        mu: of the pull mu / 2 ||weights - first ones||^2.
        fade: rounds of a client after which this pull, falling off exponentially, is dropped.
    """

    name: ClassVar[str] = "apple"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"core_scale": 32.0}, {"lr": 0.1}, {"lr": 0.5}, {"core_scale": 10.0, "lr": 0.1},
        {"weight_lr": 0.0001}, {"lr": 0.03}, {"mu": 0.01}, {"mu": 1.0},
    )  # fmt: skip
    clients: int | None = None
    downloads: int | None = None
    weight_lr: float = 0.001
    core_scale: float | None = None
    mu: float = 0.1
    fade: int = 12

    def __post_init__(self) -> None:
        self._need(clients=1, downloads=1, weight_lr=0, core_scale=0, mu=0, fade=1)

    def resolve(self, n_clients: int | None) -> Self:
        return replace(self, clients=n_clients) if self.clients is None else self

    def _turn(self, rounds: Tensor) -> Tensor:
        """(k, downloads): which cores clients receive after so many rounds (k, 1) of theirs."""
        others = (self.clients or 1) - 1
        n = min(others, self.downloads or others)
        return 1 + (rounds * n + torch.arange(n)) % max(1, others)

    def _limited(self) -> bool:
        return self.downloads is not None and self.downloads < (self.clients or 1) - 1

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        made = self.resolve(n_clients)
        clients = made.clients or 1
        kept = (clients + 1) / setup.layout.size + (clients if made._limited() else 0)
        down = 1.0 + made._turn(torch.zeros(1, 1)).shape[1]
        return Cost(down=down, client=kept, server=0.0, server_per_client=1.0)

    def shared(self, setup: Setup) -> Tensors:
        return {"models": setup.initial(0).repeat(self.clients or 1, 1)}

    def rows(self, setup: Setup, k: int) -> Tensors:
        return {"rounds": torch.zeros(k, 1, dtype=torch.int64), **super().rows(setup, k)}

    def memory(self, setup: Setup, k: int) -> Tensors:
        if self.clients is None:
            raise ConfigError(f"{self.name}: clients is not given: wanted how many there are")
        first = setup.initial(0)
        kept = {
            "weights": first.new_full((k, self.clients), 1 / self.clients),
            "rounds": torch.zeros(k, 1, dtype=torch.int64),
        }
        return kept | ({"cores": first.repeat(k, self.clients, 1)} if self._limited() else {})

    def _grown(self, setup: Setup, models: Tensor, places: Tensor) -> Tensor:
        """(c, P): the cores, with first ones for clients that have none yet."""
        lacking = max(0, int(places.max()) + 1 - len(models))
        return torch.cat([models, setup.initial(0).repeat(lacking, 1)]) if lacking else models

    def send(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        place, turn = rows["place"][:, None], self._turn(rows["rounds"])
        # The others in the order of joining: those before this client, then those after it.
        at = torch.cat([place, turn - (turn <= place).long()], dim=1)
        models = self._grown(setup, shared["models"], at)
        return models.index_select(0, at.flatten()).view(*at.shape, models.shape[1])

    def _cores(self, message: Tensor, memory: Tensors) -> Tensor:
        """(k, clients, P): the cores that clients know, each its own first; not to be changed."""
        if "cores" not in memory:
            return message
        at = self._turn(memory["rounds"])[..., None].expand(-1, -1, message.shape[2])
        cores = memory["cores"].scatter(1, at, message[:, 1:])
        cores[:, 0] = message[:, 0]
        return cores

    def _sum(self, setup: Setup, cores: Tensor, weights: Tensor) -> Tensor:
        """(k, P) weighted sum; buffers, of which there is no such sum, are the own core's."""
        made = torch.bmm(weights[:, None], cores)[:, 0]
        made[:, setup.layout.n_params :] = cores[:, 0, setup.layout.n_params :]
        return made

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        return self._sum(setup, self._cores(message, memory), memory["weights"])

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        n, clients = setup.layout.n_params, memory["weights"].shape[1]
        cores, weights, rounds = self._cores(message, memory), memory["weights"], memory["rounds"]
        rate = trainer.lr * (clients**0.5 if self.core_scale is None else self.core_scale)
        pull = self.mu * FADED ** (rounds / self.fade) * (rounds < self.fade)
        own, share = cores[:, 0].clone(), weights[:, :1]
        # Of the others only their mean moves step by step; see the module's docstring.
        others = weights[:, 1:]
        level = others.sum(1, keepdim=True) / max(1, clients - 1)  # nobody's for a client alone
        rest = torch.bmm((others - level)[:, None], cores[:, 1:])[:, 0]
        sums = cores[:, 1:].sum(1)
        start, total = level, torch.zeros_like(own[:, :n])
        count = torch.zeros(len(cores), dtype=torch.int64)
        for step in trainer.steps():
            mixed = torch.addcmul(rest, level, sums).addcmul_(share, own)
            mixed[:, n:] = own[:, n:]
            gradient = step.gradient(mixed)
            total += gradient
            count += step.active
            rates = self.weight_lr * step.active[:, None]
            of_mean = (sums[:, :n] * gradient).sum(1, keepdim=True) / max(1, clients - 1)
            of_own = (own[:, :n] * gradient).sum(1, keepdim=True)
            own[:, :n].addcmul_(gradient, share, value=-rate)
            own[:, n:] = mixed[:, n:]
            share = share - rates * (of_own + pull * (share - 1 / clients))
            level = level - rates * (of_mean + pull * (level - 1 / clients))
        slopes = torch.bmm(cores[:, 1:, :n], total[:, :, None])[:, :, 0]
        slopes += count[:, None] * pull * others
        apart = others - self.weight_lr * (slopes - slopes.mean(1, keepdim=True))
        weights = torch.cat([share, apart + (level - start)], dim=1)
        kept = {"weights": weights, "rounds": rounds + 1}
        if self._limited():
            kept["cores"] = torch.cat([own[:, None], cores[:, 1:]], dim=1)
        model = torch.bmm(weights[:, None, 1:], cores[:, 1:])[:, 0].addcmul_(share, own)
        model[:, n:] = own[:, n:]
        return Local(setup.layout.update(message[:, 0], own), count, kept, model)

    def gather(self, setup: Setup, shared: Tensors, rows: Tensors, updates: Updates) -> Tensors:
        return {"delta": updates.delta, "rounds": rows["rounds"]}

    def renew(
        self, setup: Setup, shared: Tensors, seen: Tensors, version: int
    ) -> tuple[Tensors, Tensors]:
        place = seen["place"]
        models = self._grown(setup, shared["models"], place)
        moved = models.index_copy(0, place, setup.layout.end(models[place], seen["delta"]))
        return {"models": moved}, {"rounds": seen["rounds"] + 1}
