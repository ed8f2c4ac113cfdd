"""FedALA: a client starts from a mix, parameter by parameter, of its own model and the global one.

Zhang, Hua, Wang, Song, Xue, Ma and Guan, "FedALA: adaptive local aggregation for personalized
federated learning", AAAI 2023, algorithm 1. Whether the weights have converged is judged by their
loss on all of the client's training data after each pass, not by that of the last batch; batches
that are not full count too, since small clients have no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..params import Layout
from .base import Algorithm, Cost, Local, Setup, Tensors
from .trainer import Trainer

WINDOW = 10
"""Passes over which the loss must have settled."""


@dataclass(frozen=True)
class FedALA(Algorithm):
    """FedALA.

    Attributes:
        layers: how many layers, from the last one down, are mixed; the others are the global
            model's.
        share: of a client's training data that the weights are learned on, drawn in each round.
        eta: learning rate of the weights.
        threshold: when a client first learns weights it goes on until the standard deviation of its
            last 10 losses (nats) is below this,
        passes: or for so many passes; one pass in every later round.
    """

    name: ClassVar[str] = "fedala"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"layers": 2}, {"lr": 0.5}, {"layers": 2, "lr": 0.5}, {"lr": 0.1}, {"eta": 0.1},
        {"layers": 2, "eta": 0.1}, {"eta": 10.0}, {"lr": 0.03},
    )  # fmt: skip
    layers: int = 1
    share: float = 0.8
    eta: float = 1.0
    threshold: float = 0.01
    passes: int = 50

    def __post_init__(self) -> None:
        self._need(layers=1, eta=0, threshold=0, passes=1)
        if not 0 < self.share <= 1:
            raise ConfigError(f"{self.name}: share = {self.share}: wanted above 0, at most 1")

    def _mixed_from(self, layout: Layout) -> int:
        """Where the mixed layers begin in a row; at 0 if the model has no more layers than they."""
        owned = [e for e in layout.entries if e.kind == "parameter"]
        owners = list(dict.fromkeys(e.name.rpartition(".")[0] for e in owned))[-self.layers :]
        return min(e.start for e in owned if e.name.rpartition(".")[0] in owners)

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        mixed = setup.layout.n_params - self._mixed_from(setup.layout)
        passes = 1 + self.share / epochs
        return Cost(client=1 + (mixed + 1) / setup.layout.size, passes=passes)

    def memory(self, setup: Setup, k: int) -> Tensors:
        first = setup.initial(0)
        n_mixed = setup.layout.n_params - self._mixed_from(setup.layout)
        return {
            "model": first.repeat(k, 1),
            "weights": first.new_ones(k, n_mixed),
            "rounds": torch.zeros(k, dtype=torch.int64),
        }

    def _aggregate(
        self, setup: Setup, received: Tensor, memory: Tensors, trainer: Trainer
    ) -> tuple[Tensor, Tensor]:
        """(k, P) where clients start, and their weights (k, n) of the global model in the mix."""
        mixed = slice(self._mixed_from(setup.layout), setup.layout.n_params)
        weights, rounds = memory["weights"], memory["rounds"]
        # Before its first training a client has no model of its own to mix in.
        own = torch.where(rounds[:, None] > 0, memory["model"], received)[:, mixed]
        gap = received[:, mixed] - own

        def mix() -> Tensor:
            rows = received.clone()
            rows[:, mixed] = own + gap * weights
            return rows

        learning, losses = rounds > 0, []
        for number in range(self.passes):
            if not learning.any():
                break
            seen = torch.zeros_like(rounds)
            for step in trainer.steps(epochs=1, purpose=f"aggregate {number}"):
                using = learning & (seen < self.share * trainer.n_examples)
                if not using.any():
                    break
                slope = step.gradient(mix())[:, mixed] * gap
                stepped = (weights - self.eta * slope).clamp(0.0, 1.0)
                weights = torch.where(using[:, None], stepped, weights)
                seen += step.real.sum(1)
            learning = learning & (rounds == 1)
            if learning.any():
                losses.append(trainer.loss(mix()))
            if len(losses) >= WINDOW:
                spread = torch.stack(losses[-WINDOW:]).std(0, correction=0)
                learning = learning & (spread >= self.threshold)
        return mix(), weights

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        return self._aggregate(setup, message[:, 0], memory, trainer)[0]

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        start, weights = self._aggregate(setup, message[:, 0], memory, trainer)
        end, steps = trainer.fit(start)
        kept = {"model": end, "weights": weights, "rounds": memory["rounds"] + 1}
        return Local(setup.layout.update(message[:, 0], end), steps, kept, end)
