"""The last step of `fedmerge-ft` for other methods: what would it do for them?

PYTHONPATH=examples fedmerge compare --methods fedmerge-ft,fine_tuned.WarmIFCA,fine_tuned.FeSEM
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmerge import ConfigError, algorithms
from fedmerge.algorithms import Setup, Tensors, Trainer, fine_tuned_while_it_helps


class FineTuned(algorithms.Algorithm):
    """Mixed in before a method of one model: its clients fine-tune that as long as it helps."""

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        model = super().personal(setup, message, memory, trainer)
        if not isinstance(model, Tensor):
            raise ConfigError(f"{self.name} uses a mixture of models: wanted a method of one model")
        return fine_tuned_while_it_helps(model, 10, trainer)


@dataclass(frozen=True)
class WarmIFCA(FineTuned, algorithms.IFCA):
    name: ClassVar[str] = "ifca-warm, fine-tuned"
    warm: int = 5


@dataclass(frozen=True)
class FeSEM(FineTuned, algorithms.FeSEM):
    name: ClassVar[str] = "fesem, fine-tuned"


@dataclass(frozen=True)
class CFL(FineTuned, algorithms.CFL):
    name: ClassVar[str] = "cfl, fine-tuned"


@dataclass(frozen=True)
class PPFL(FineTuned, algorithms.PPFL):
    name: ClassVar[str] = "ppfl, fine-tuned"


@dataclass(frozen=True)
class FedAvg(FineTuned, algorithms.FedAvg):
    name: ClassVar[str] = "fedavg, fine-tuned"
