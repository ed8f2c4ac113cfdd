"""FedProx: FedAvg with local training held near the global model.

Li et al., "Federated optimization in heterogeneous networks", MLSys 2020, algorithm 2. Partial work
of slow clients, the other half of that paper, is not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..local import Proximal
from .base import Algorithm, Local, Setup, Tensors
from .trainer import Trainer


@dataclass(frozen=True)
class FedProx(Algorithm):
    """FedProx.

    Attributes:
        mu: weight of mu / 2 ||p - p_received||^2 in the local loss.
    """

    name: ClassVar[str] = "fedprox"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 0.1}, {"mu": 0.01}, {"lr": 0.5}, {"mu": 1.0}, {"lr": 0.1, "mu": 0.01}, {"lr": 0.03},
    )  # fmt: skip
    mu: float = 0.1

    def __post_init__(self) -> None:
        self._need(mu=0)

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        start = message[:, 0]
        end, steps = trainer.fit(start, proximal=Proximal(start, self.mu))
        return Local(setup.layout.update(start, end), steps, memory, end)
