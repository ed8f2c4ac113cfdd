"""What methods have in common whose d models all go to every client and all come back.

It fixes how the models travel and how they are averaged; how a client trains them is the method's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from ..errors import ConfigError
from ..params import Layout
from ..sums import ModelSum
from .base import Algorithm, Cost, Fold, Setup, Tensors, Updates


@dataclass(frozen=True)
class Components(Algorithm):
    """d models from independent random initialisations, each averaged over the round's clients.

    Attributes:
        d: number of models; None: `usual`, or one per client if there are fewer clients.
    """

    usual: ClassVar[int] = 3
    d: int | None = None

    def __post_init__(self) -> None:
        self._need(d=1)

    def resolve(self, n_clients: int | None) -> Self:
        made = super().resolve(n_clients)
        return made if made.d else replace(made, d=min(self.usual, n_clients or self.usual))

    @property
    def n_models(self) -> int:
        """The number of models, once it is resolved."""
        if self.d is None:
            raise ConfigError(f"{self.name}: d is not set: call resolve(n_clients) first")
        return self.d

    def update_shape(self, layout: Layout) -> tuple[int, ...]:
        return (self.n_models, layout.size)

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        d = self.n_models
        return Cost(down=d, up=d, server=d, passes=d)

    def shared(self, setup: Setup) -> Tensors:
        return {"models": torch.stack([setup.initial(j) for j in range(self.n_models)])}

    def fold(
        self,
        setup: Setup,
        shared: Tensors,
        rows: Tensors,
        updates: Updates,
        fold: Fold,
        version: int,
    ) -> None:
        d = len(shared["models"])
        if fold.sum is None:
            fold.sum = ModelSum.for_layout(setup.layout, d)
        # Every update is of one model only: row (i, j) goes to model j, with weight n_i.
        own = torch.eye(d, dtype=torch.float64).repeat(len(updates), 1)
        share = own * updates.n_examples.double().repeat_interleave(d)[:, None]
        fold.sum.add(share[:, None], updates.delta.flatten(0, 1))
