"""FeSEM: several centres; a client belongs to the one nearest to the weights it has trained.

Xie, Long, Shen, Zhou, Wang, Jiang and Zhang, "Multi-center federated learning", 2021 (arXiv
2005.01026; World Wide Web 2023), algorithm 1: E-step, every client to the centre of least squared
distance; M-step, every centre the mean of its clients' weights; then local training from the
centre. Deviation: for the first `warm` rounds all clients train one model, and the first E- and
M-steps are iterated to convergence (k-means), because centres at random are all far from clients
that start in one place: one of them would take everybody. Centres are the means of the round's
participants, as the weights of absent clients date from other rounds. A client that has not taken
part yet is sent the mean of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Cost, Setup, Tensors, Updates
from .gathering import Gathering
from .kmeans import k_means


@dataclass(frozen=True)
class FeSEM(Gathering):
    """FeSEM.

    Attributes:
        d: number of centres; None: 4, or one per client if there are fewer clients.
        warm: rounds of training one model before the first E-step, at least 1.
    """

    name: ClassVar[str] = "fesem"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"d": 8}, {"lr": 0.1}, {"lr": 0.5}, {"d": 12}, {"warm": 1}, {"d": 2}, {"d": 12, "warm": 10},
    )  # fmt: skip
    d: int | None = None
    warm: int = 5

    def __post_init__(self) -> None:
        self._need(d=1, warm=1)

    def resolve(self, n_clients: int | None) -> Self:
        made = super().resolve(n_clients)
        return made if made.d else replace(made, d=min(4, n_clients or 4))

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        return Cost(server=(self.d or 4) + 1, server_per_client=2 / setup.layout.size)

    def shared(self, setup: Setup) -> Tensors:
        # The last one is the mean of all clients.
        return {"models": setup.initial(0).repeat((self.d or 4) + 1, 1)}

    def rows(self, setup: Setup, k: int) -> Tensors:
        return {"centre": torch.full((k,), -1, dtype=torch.int64), **super().rows(setup, k)}

    def send(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        return shared["models"][rows["centre"]][:, None]

    def gather(self, setup: Setup, shared: Tensors, rows: Tensors, updates: Updates) -> Tensors:
        return {"end": setup.layout.end(shared["models"][rows["centre"]], updates.delta)}

    def renew(
        self, setup: Setup, shared: Tensors, seen: Tensors, version: int
    ) -> tuple[Tensors, Tensors]:
        end, models = seen["end"], shared["models"]
        d, weights = len(models) - 1, end[:, : setup.layout.n_params]
        if version + 1 < self.warm:
            centre = torch.full((len(end),), -1)
        elif version + 1 == self.warm:
            centre = k_means(weights, d, setup.seed)
        else:
            apart = weights[:, None].double() - models[:d, : setup.layout.n_params].double()
            centre = apart.square().sum(-1).argmin(1)
        member = torch.nn.functional.one_hot(centre % (d + 1), d + 1).double()
        member[:, d] = 1.0
        count = member.sum(0)[:, None]
        mean = (member.T @ end.double()) / count.clamp_min(1)
        mean[:, setup.layout.counters] = end[:, setup.layout.counters].double().amax(0)
        # Centres that nobody has used start out from the mean of all.
        idle = mean[d:] if version + 1 <= self.warm else models.double()
        models = torch.where(count > 0, mean, idle).to(models.dtype)
        return {**shared, "models": models}, {"centre": centre}
