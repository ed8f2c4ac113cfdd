"""FedAMP: the server keeps a model for each client, mixed from those of clients with similar ones.

Huang, Chu, Zhou, Wang, Liu, Pei and Zhang, "Personalized cross-silo federated learning on non-IID
data", AAAI 2021. The cloud model of client i is u_i = sum_j xi_ij w_j over the clients' trained
models, and the client then minimises its loss + mu / 2 ||w - u_i||^2, with mu the paper's
lambda / alpha. attention = "cosine" is the paper's HeurFedAMP, its version for deep networks:
xi_ij = (1 - xi_ii) exp(sigma cos(w_i, w_j)) / sum over h != i of the same. "distance" is FedAMP:
xi_ij = alpha A'(||w_i - w_j||^2) with A'(x) = exp(-x / sigma) / sigma.

Deviations: sigma of "distance" is in units of their mean squared distance, and alpha the
largest that leaves every client `own` of its own model: absolute values would have to be found
anew for each network. Of absent clients the server mixes the models that they trained last; a
client that has not taken part yet is sent the mean of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..local import Proximal
from .base import Cost, Local, Setup, Tensors, Updates
from .gathering import Gathering
from .trainer import Trainer


@dataclass(frozen=True)
class FedAMP(Gathering):
    """FedAMP.

    Attributes:
        attention: "cosine" or "distance".
        sigma: sharpness of "cosine" (larger: fewer neighbours), width of "distance"; None: 25, 1.
        own: share xi_ii of a client's own model; None: 1 / clients that have taken part.
        mu: weight of the proximal term.
    """

    name: ClassVar[str] = "fedamp"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"sigma": 50.0}, {"sigma": 100.0}, {"lr": 0.5}, {"lr": 0.1}, {"sigma": 10.0},
        {"attention": "distance", "sigma": 0.1}, {"sigma": 100.0, "mu": 0.1},
    )  # fmt: skip
    attention: str = "cosine"
    sigma: float | None = None
    own: float | None = None
    mu: float = 0.01

    def __post_init__(self) -> None:
        self._need(sigma=1e-9, own=0, mu=0)
        if self.attention not in ("cosine", "distance"):
            raise ConfigError(
                f'{self.name}: attention = "{self.attention}": wanted "cosine" or "distance"'
            )
        if self.own is not None and self.own > 1:
            raise ConfigError(f"{self.name}: own = {self.own}: wanted 1 or less")

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        return Cost(client=1, server=1, server_per_client=1)

    def shared(self, setup: Setup) -> Tensors:
        return {
            "initial": setup.initial(0)[None],
            "models": setup.initial(0)[:0].reshape(0, setup.layout.size),
            "seen": torch.zeros(0, dtype=torch.bool),
        }

    def memory(self, setup: Setup, k: int) -> Tensors:
        return {"model": setup.initial(0).repeat(k, 1)}

    def _clouds(self, setup: Setup, shared: Tensors, rows: Tensors) -> Tensor:
        """(k, P): the cloud models of these clients, of what all have trained last."""
        place, seen = rows["place"], shared["seen"]
        if not seen.any():
            return shared["initial"].repeat(len(place), 1)
        models = shared["models"][seen].double()
        # Where each is among those seen; the last row is for the others.
        at = torch.full((max(len(seen), int(place.max()) + 1),), len(models))
        at[seen.nonzero()[:, 0]] = torch.arange(len(models))
        xi = self.attended(models[:, : setup.layout.n_params])
        xi = torch.cat([xi, torch.full((1, len(models)), 1 / len(models), dtype=xi.dtype)])
        cloud = xi[at[place]] @ models
        counters = setup.layout.counters
        cloud[:, counters] = models[:, counters].amax(0)
        return cloud.to(setup.layout.dtype)

    def send(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        return self._clouds(setup, shared, rows)[:, None]

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        cloud = message[:, 0]
        end, steps = trainer.fit(cloud, proximal=Proximal(cloud, self.mu))
        return Local(setup.layout.update(cloud, end), steps, {"model": end}, end)

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        return memory["model"]

    def gather(self, setup: Setup, shared: Tensors, rows: Tensors, updates: Updates) -> Tensors:
        return {"end": setup.layout.end(self._clouds(setup, shared, rows), updates.delta)}

    def renew(
        self, setup: Setup, shared: Tensors, seen: Tensors, version: int
    ) -> tuple[Tensors, Tensors]:
        place, old = seen["place"], len(shared["models"])
        m = max(old, int(place.max()) + 1)
        models = torch.cat([shared["models"], shared["initial"].repeat(m - old, 1)])
        met = torch.cat([shared["seen"], torch.zeros(m - old, dtype=torch.bool)])
        models[place], met[place] = seen["end"], True
        return {**shared, "models": models, "seen": met}, {}

    def attended(self, models: Tensor) -> Tensor:
        """xi (k, k) for trained models (k, n_params) float64; not negative, rows sum to 1."""
        k = len(models)
        if k == 1:
            return models.new_ones(1, 1)
        own = 1 / k if self.own is None else self.own
        gram = models @ models.T
        square = gram.diagonal()
        if self.attention == "cosine":
            norm = square.sqrt().clamp_min(1e-30)
            cosine = gram / (norm[:, None] * norm)
            sigma = 25.0 if self.sigma is None else self.sigma
            xi = (sigma * cosine).fill_diagonal_(-torch.inf).softmax(1) * (1 - own)
        else:
            distance = (square[:, None] + square - 2 * gram).clamp_min(0).fill_diagonal_(0)
            mean = distance.sum() / (k * (k - 1))
            width = mean * (1.0 if self.sigma is None else self.sigma)
            slope = (-distance / width.clamp_min(1e-30)).exp().fill_diagonal_(0)
            xi = slope * (1 - own) / slope.sum(1).max().clamp_min(1e-30)
        return xi + torch.diag(1 - xi.sum(1))
