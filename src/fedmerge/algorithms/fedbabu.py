"""FedBABU: only the body is learned together, under a head that is drawn once and never trained.

Oh, Kim and Yun, "FedBABU: toward enhanced representation for federated image classification", ICLR
2022, algorithm 1. A client's model is personal by being fine-tuned before it is used; what that
gives is evaluated as `merged` and never sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..errors import ConfigError, did_you_mean
from .base import Cost, Local, Setup, Tensors
from .fedper import FedPer
from .trainer import Trainer

PARTS = ("head", "whole")


@dataclass(frozen=True)
class FedBABU(FedPer):
    """FedBABU. The head is the same for all clients and known beforehand, so it does not travel.

    Attributes:
        finetune: epochs of local training before the model is used; 0 for none.
        part: what they train, "whole" (the model) or "head".
    """

    name: ClassVar[str] = "fedbabu"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"finetune": 20}, {"finetune": 20, "lr": 0.5}, {"finetune": 20, "lr": 0.1}, {"lr": 0.5},
        {"lr": 0.1}, {"part": "head"}, {"finetune": 1}, {"lr": 0.03},
    )  # fmt: skip
    finetune: int = 5
    part: str = "whole"

    def __post_init__(self) -> None:
        self._need(finetune=0)
        if self.part not in PARTS:
            raise ConfigError(f'{self.name}: part = "{self.part}"{did_you_mean(self.part, PARTS)}')

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        return replace(super().cost(setup, n_clients, epochs), client=0.0)

    def memory(self, setup: Setup, k: int) -> Tensors:
        return {}

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        received = message[:, 0]
        if not self.finetune:
            return received
        only = self.head(setup.layout) if self.part == "head" else None
        return trainer.fit(received, epochs=self.finetune, only=only, purpose="finetune")[0]

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        start = message[:, 0]
        end, steps = trainer.fit(start, only=(0, self.head(setup.layout)[0]))
        return Local(setup.layout.update(start, end), steps, memory, end)
