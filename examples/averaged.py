"""A mean of each model over rounds, as FedMerge's clients use it, for other methods.

What would it do for them?

PYTHONPATH=examples fedmerge compare --participation 0.1 --methods fedmerge,averaged.FedAvg
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmerge import algorithms
from fedmerge.algorithms import Fold, Setup, Tensors

FOLLOWS = 0.1**0.5
"""Share of the way to its model that a mean goes in a round of a tenth of the clients."""


class Averaged(algorithms.Algorithm):
    """Mixed in before a method whose server keeps models, of which clients are sent one."""

    def shared(self, setup: Setup) -> Tensors:
        made = super().shared(setup)
        return {**made, "means": made["models"]}

    def used(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        return self.send(setup, {**shared, "models": shared["means"]}, rows, k)

    def commit(
        self, setup: Setup, shared: Tensors, fold: Fold, version: int
    ) -> tuple[Tensors, Tensors]:
        made, rows = super().commit(setup, shared, fold, version)
        means, models = shared["means"], made["models"]
        if len(means) == len(models):
            models = means + FOLLOWS * (models - means)  # else there are new ones
        return {**made, "means": models}, rows


@dataclass(frozen=True)
class FedAvg(Averaged, algorithms.FedAvg):
    name: ClassVar[str] = "fedavg, averaged"


@dataclass(frozen=True)
class FedAvgFT(Averaged, algorithms.FedAvgFT):
    name: ClassVar[str] = "fedavg-ft, averaged"


@dataclass(frozen=True)
class WarmIFCA(Averaged, algorithms.IFCA):
    name: ClassVar[str] = "ifca-warm, averaged"
    warm: int = 5


@dataclass(frozen=True)
class CFL(Averaged, algorithms.CFL):
    name: ClassVar[str] = "cfl, averaged"


@dataclass(frozen=True)
class PPFL(Averaged, algorithms.PPFL):
    name: ClassVar[str] = "ppfl, averaged"
