"""Local training only: every client keeps its own model and nothing travels.

The floor of every comparison: a client that does worse than this is better off alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Algorithm, Cost, Local, Setup, Tensors
from .trainer import Trainer


@dataclass(frozen=True)
class LocalOnly(Algorithm):
    """Each client trains its own model from one common random initialisation."""

    name: ClassVar[str] = "local"
    sends_update: ClassVar[bool] = False

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        return Cost(down=0, up=0, client=1, server=0)

    def shared(self, setup: Setup) -> Tensors:
        return {}

    def memory(self, setup: Setup, k: int) -> Tensors:
        return {"model": setup.initial(0).repeat(k, 1)}

    def send(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        return torch.empty(k, 0, setup.layout.size, dtype=setup.layout.dtype)

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        end, steps = trainer.fit(memory["model"])
        return Local(end.new_empty(len(end), 0), steps, {"model": end}, end)

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        return memory["model"]

    def fold(
        self,
        setup: Setup,
        shared: Tensors,
        rows: Tensors,
        updates: object,
        fold: object,
        version: int,
    ) -> None:
        """Nothing is gathered."""
