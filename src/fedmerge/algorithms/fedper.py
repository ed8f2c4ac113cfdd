"""FedPer: the layers below are averaged, the last one stays with the client.

Arivazhagan, Aggarwal, Singh and Choudhary, "Federated learning with personalization layers", 2019
(arXiv 1912.00818), algorithm 1, with one personalization layer. Both parts are trained jointly.
All clients start from one common head, so that a client that has not trained yet is no worse off.
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


@dataclass(frozen=True)
class FedPer(Algorithm):
    """FedPer; and what all methods with a personal head have in common.

    The head is the last layer. It is kept in `memory` and never sent.
    """

    name: ClassVar[str] = "fedper"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 1.0}, {"lr": 0.1}, {"lr": 0.5}, {"lr": 0.03},
    )  # fmt: skip

    def head(self, layout: Layout) -> tuple[int, int]:
        """(start, stop) of the last layer in a row. Raises ConfigError if there is no other."""
        start, stop = layout.last_layer
        if start == 0:
            raise ConfigError(
                f"{self.name}: the model has one layer only, which would be all head: wanted a "
                "model with a layer below it, or another method"
            )
        return start, stop

    def travels(self, layout: Layout) -> tuple[tuple[int, int], ...]:
        start, stop = self.head(layout)
        return tuple(part for part in ((0, start), (stop, layout.size)) if part[0] < part[1])

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        start, stop = self.head(setup.layout)
        kept = (stop - start) / setup.layout.size
        return Cost(down=1 - kept, up=1 - kept, client=kept)

    def shared(self, setup: Setup) -> Tensors:
        self.head(setup.layout)
        return super().shared(setup)

    def memory(self, setup: Setup, k: int) -> Tensors:
        start, stop = self.head(setup.layout)
        return {"head": setup.initial(0)[start:stop].repeat(k, 1)}

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        start, stop = self.head(setup.layout)
        received = message[:, 0]
        return torch.cat([received[:, :start], memory["head"], received[:, stop:]], dim=1)

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        start = self.personal(setup, message, memory, trainer)
        end, steps = self.train(setup, start, trainer)
        first, last = self.head(setup.layout)
        delta = setup.layout.update(start, end)
        delta[:, first:last] = 0.0
        return Local(delta, steps, {"head": end[:, first:last].clone()}, end)

    def train(self, setup: Setup, start: Tensor, trainer: Trainer) -> tuple[Tensor, Tensor]:
        """Rows (k, P) after local training from `start` (k, P), and the SGD steps taken (k,)."""
        return trainer.fit(start)
