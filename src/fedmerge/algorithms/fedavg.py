"""Federated averaging, and the same with fine-tuning at the client before use.

McMahan et al., "Communication-efficient learning of deep networks from decentralized data",
AISTATS 2017. One global model; the round itself is that of the base class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Algorithm, Setup, Tensors
from .trainer import Trainer, fine_tuned


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """FedAvg."""

    name: ClassVar[str] = "fedavg"
    streams: ClassVar[bool] = True


@dataclass(frozen=True)
class FedAvgFT(Algorithm):
    """FedAvg, whose model each client fine-tunes before it is used.

    Attributes:
        finetune: epochs of local training before the model is used; 0 for none. They change what is
            evaluated as `merged`, never what is sent back.
    """

    name: ClassVar[str] = "fedavg-ft"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"finetune": 20}, {"lr": 0.5}, {"finetune": 20, "lr": 0.5}, {"lr": 0.1}, {"finetune": 1},
        {"lr": 0.1, "finetune": 20}, {"lr": 0.03, "finetune": 20},
    )  # fmt: skip
    finetune: int = 5

    def __post_init__(self) -> None:
        self._need(finetune=0)

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        return fine_tuned(message[:, 0], self.finetune, trainer)
