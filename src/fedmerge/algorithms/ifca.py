"""IFCA: every client trains the one of d global models that fits its data best.

Ghosh, Chung, Yin and Ramchandran, "An efficient framework for clustered federated learning",
NeurIPS 2020, algorithm 1 with model averaging. The warm start (some rounds of FedAvg, then k-means
of the clients' updates) is a common remedy for its dependence on the initial models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Algorithm, Cost, Fold, Local, Setup, Tensors, Updates
from .kmeans import k_means
from .trainer import Trainer


@dataclass(frozen=True)
class IFCA(Algorithm):
    """IFCA, plain (warm = 0: d independent random models) or warm-started.

    Attributes:
        d: number of models (clusters); every client receives all of them in every round. None: 4,
            or one per client if there are fewer.
        warm: rounds of FedAvg before the clients' updates are clustered.
    """

    name: ClassVar[str] = "ifca"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"d": 8}, {"lr": 0.1}, {"lr": 0.5}, {"d": 2}, {"lr": 0.1, "d": 8}, {"d": 12},
    )  # fmt: skip
    d: int | None = None
    warm: int = 0

    def __post_init__(self) -> None:
        self._need(d=1, warm=0)

    def resolve(self, n_clients: int | None) -> Self:
        made = super().resolve(n_clients)
        return made if made.d else replace(made, d=min(4, n_clients or 4))

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        d = self.d or 1
        return Cost(down=d, server=d)

    def shared(self, setup: Setup) -> Tensors:
        first = 1 if self.warm else (self.d or 1)
        return {"models": torch.stack([setup.initial(j) for j in range(first)])}

    def _choice(self, message: Tensor, trainer: Trainer) -> Tensor:
        if message.shape[1] == 1:
            return torch.zeros(len(message), dtype=torch.int64)
        losses = [trainer.loss(message[:, j]) for j in range(message.shape[1])]
        return torch.stack(losses, dim=1).argmin(1)

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        return message[torch.arange(len(message)), self._choice(message, trainer)]

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        choice = self._choice(message, trainer)
        start = message[torch.arange(len(message)), choice]
        end, steps = trainer.fit(start)
        return Local(setup.layout.update(start, end), steps, memory, end, {"choice": choice})

    def fits(self, shared: Tensors, extra: Tensors) -> bool:
        choice = extra.get("choice")
        if choice is None or choice.dtype != torch.int64 or choice.ndim:
            return False
        return 0 <= int(choice) < len(shared["models"])

    def coefficients(
        self, setup: Setup, shared: Tensors, rows: Tensors, updates: Updates
    ) -> Tensor:
        d = len(shared["models"])
        one_hot = torch.nn.functional.one_hot(updates.extra["choice"], d)
        return one_hot.double()[:, None]

    def _clusters_now(self, shared: Tensors, version: int) -> bool:
        return len(shared["models"]) == 1 < (self.d or 1) and version + 1 >= self.warm

    def fold(
        self,
        setup: Setup,
        shared: Tensors,
        rows: Tensors,
        updates: Updates,
        fold: Fold,
        version: int,
    ) -> None:
        super().fold(setup, shared, rows, updates, fold, version)
        if self._clusters_now(shared, version):
            fold.parts.append({"delta": updates.delta, "n": updates.n_examples.double()})

    def commit(
        self, setup: Setup, shared: Tensors, fold: Fold, version: int
    ) -> tuple[Tensors, Tensors]:
        if not fold.parts:
            return super().commit(setup, shared, fold, version)
        return {**shared, "models": self._clustered(setup, shared["models"], fold)}, {}

    def _clustered(self, setup: Setup, models: Tensor, fold: Fold) -> Tensor:
        """(d, P): the global model moved by the mean update of each cluster of updates."""
        d = self.d or 1
        delta, n = fold.gathered("delta"), fold.gathered("n")
        # K-means starts from drawn places: order by content, not by who came first.
        order = delta.double().sum(1).argsort(stable=True)
        delta, n = delta[order], n[order]
        label = k_means(delta[:, : setup.layout.n_params], d, setup.seed)
        # Fewer distinct updates than clusters: the models left over stay at the global one.
        start = models.expand(d, -1)
        total = type(fold.sum).for_layout(setup.layout, d) if fold.sum else None
        if total is None:
            return start.clone()
        one_hot = torch.nn.functional.one_hot(label, d).double()
        total.add((one_hot * n[:, None])[:, None], delta)
        return total.step(start)
