"""FedEM: every client's data are a mixture of a few underlying distributions, one model for each.

Marfoq, Neglia, Bellet, Kameni and Vidal, "Federated multi-task learning under a mixture of
distributions", NeurIPS 2021, algorithm 1: E-step, M-step for the shares, weighted local training of
every model, average by numbers of examples. One deviation: where a client uses its models (not when
it trains them) it first does one E-step with the models just received, as the paper has it done by
clients that are new; otherwise its shares would be those of the models of the round before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..local import Mixture
from .base import Cost, Local, Setup, Tensors
from .components import Components
from .trainer import Trainer

LEAST = 1e-8
"""Least share of a model, so that it can come back."""


@dataclass(frozen=True)
class FedEM(Components):
    """FedEM; `d` is the paper's M, the number of underlying distributions (3 there)."""

    name: ClassVar[str] = "fedem"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"d": 4, "lr": 1.0}, {"lr": 1.0}, {"d": 8, "lr": 1.0}, {"lr": 0.1}, {"lr": 0.5},
        {"d": 2, "lr": 1.0}, {"d": 4},
    )  # fmt: skip

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        d = self.n_models
        return Cost(down=d, up=d, client=d / setup.layout.size, server=d, passes=d)

    def memory(self, setup: Setup, k: int) -> Tensors:
        return {"shares": torch.full((k, self.n_models), 1 / self.n_models)}

    def _expect(self, message: Tensor, shares: Tensor, trainer: Trainer) -> tuple[Tensor, Tensor]:
        """E-step and the shares' M-step: q (k, d, n) proportional to share_j p_j(y | x), and its
        mean over a client's examples, the new shares (k, d)."""
        prior = shares.clamp_min(LEAST).log()[..., None]
        duty = torch.softmax(prior - trainer.losses(message), dim=1)
        count = trainer.n_examples
        real = torch.arange(duty.shape[2]) < count[:, None]
        total = torch.where(real[:, None], duty, 0.0).sum(2)
        return duty, torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], shares)

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        duty, shares = self._expect(message, memory["shares"], trainer)
        end = message.clone()
        steps = torch.zeros(len(message), dtype=torch.int64)
        for step in trainer.steps():
            steps += step.active
            weight = torch.stack([step.take(one) for one in duty.unbind(1)], dim=1)
            step.descend(end, trainer.lr, weight)
        delta = setup.layout.update(message, end)
        return Local(delta, steps, {"shares": shares}, Mixture(end, weights=shares))

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Mixture:
        return Mixture(message, weights=self._expect(message, memory["shares"], trainer)[1])
