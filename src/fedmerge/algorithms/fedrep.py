"""FedRep: the client fits its own head to the shared body first, then the body to that head.

Collins, Hassani, Mokhtari and Shakkottai, "Exploiting shared representations for personalized
federated learning", ICML 2021, algorithm 1 with SGD for both parts. What travels and what is
averaged is as in FedPer; only the order of local training differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .base import Cost, Setup
from .fedper import FedPer
from .trainer import Trainer


@dataclass(frozen=True)
class FedRep(FedPer):
    """FedRep.

    Attributes:
        head_epochs: passes in which the head is trained and the body is not.
        body_epochs: passes, after these, in which the body is trained and the head is not; None for
            the epochs of the run.
    """

    name: ClassVar[str] = "fedrep"
    # The paper's own: ten passes for the head, one to five for the body.
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"head_epochs": 5}, {"lr": 0.1}, {"lr": 0.5}, {"body_epochs": 1},
        {"head_epochs": 5, "lr": 0.1}, {"body_epochs": 1, "lr": 0.1}, {"lr": 0.03},
    )  # fmt: skip
    head_epochs: int = 10
    body_epochs: int | None = None

    def __post_init__(self) -> None:
        self._need(head_epochs=1, body_epochs=1)

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        passes = (self.head_epochs + (self.body_epochs or epochs)) / epochs
        return replace(super().cost(setup, n_clients, epochs), passes=passes)

    def train(self, setup: Setup, start: Tensor, trainer: Trainer) -> tuple[Tensor, Tensor]:
        head = self.head(setup.layout)
        fitted, first = trainer.fit(start, epochs=self.head_epochs, only=head, purpose="head")
        end, then = trainer.fit(fitted, epochs=self.body_epochs, only=(0, head[0]))
        return end, first + then
