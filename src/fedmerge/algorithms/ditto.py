"""Ditto: a global model by FedAvg, and beside it a personal model held near the global one.

Li et al., "Ditto: fair and robust federated learning through personalization", ICML 2021,
algorithm 1. Local training is done twice in a round, so a round costs twice the computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..local import Proximal
from .base import Algorithm, Cost, Local, Setup, Tensors
from .trainer import Trainer


@dataclass(frozen=True)
class Ditto(Algorithm):
    """Ditto.

    Attributes:
        lam: lambda in lambda / 2 ||v - w||^2, which holds the personal model v near the received
            global model w.
    """

    name: ClassVar[str] = "ditto"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lam": 1.0}, {"lr": 0.1}, {"lr": 0.5}, {"lam": 0.01}, {"lr": 0.1, "lam": 1.0},
        {"lr": 0.1, "lam": 0.01},
    )  # fmt: skip
    lam: float = 0.1

    def __post_init__(self) -> None:
        self._need(lam=0)

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        return Cost(client=1, passes=2)

    def memory(self, setup: Setup, k: int) -> Tensors:
        return {"model": setup.initial(0).repeat(k, 1)}

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        start = message[:, 0]
        end, steps = trainer.fit(start)
        own, _ = trainer.fit(
            memory["model"], proximal=Proximal(start, self.lam), purpose="personal"
        )
        return Local(setup.layout.update(start, end), steps, {"model": own}, own)

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        return memory["model"]
