"""Who runs local training in a simulation: groups of clients, each a stack or one after another.

It implements `Trainer` for a group; methods decide what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.clients import Client
from ..local import Engine, Examples, Proximal
from .log import SPLITS, Measured

GROUP = 16
"""Clients in a stack: more of them no longer fit a core's cache."""


@dataclass(frozen=True)
class Population:
    """All clients, their examples pooled by split.

    Attributes:
        ids: in the order in which the simulation was given the clients.
    """

    ids: tuple[str, ...]
    splits: dict[str, Examples]

    @classmethod
    def of(cls, clients: Sequence[Client]) -> Population:
        """Pool the clients' data; they are copied once."""
        pooled = {
            name: Examples.of([(getattr(c, name).x, getattr(c, name).y) for c in clients])
            for name in SPLITS
        }
        return cls(tuple(c.id for c in clients), pooled)

    def groups(self, places: Sequence[int]) -> Iterator[list[int]]:
        """Divide clients into groups of similar size, the same whatever order they come in."""
        count = self.splits["train"].count
        ordered = sorted(places, key=lambda i: (-count[i], self.ids[i]))
        for first in range(0, len(ordered), GROUP):
            yield ordered[first : first + GROUP]


@dataclass(frozen=True)
class GroupTrainer:
    """Local training and evaluation of a group of clients in one round."""

    engine: Engine
    population: Population
    places: list[int]
    seed: int
    round: int

    @property
    def n_examples(self) -> Tensor:
        """(k,) int64 training examples."""
        return torch.from_numpy(self._examples("train").count)

    def _examples(self, split: str) -> Examples:
        return self.population.splits[split].take(np.array(self.places, dtype=np.int64))

    def fit(
        self,
        rows: Tensor,
        *,
        epochs: int | None = None,
        proximal: Proximal | None = None,
        purpose: str = "train",
    ) -> tuple[Tensor, Tensor]:
        """See `Trainer.fit`."""
        return self.engine.fit(
            rows,
            self._examples("train"),
            [(self.round, self.population.ids[i], purpose) for i in self.places],
            seed=self.seed,
            epochs=self.engine.training.epochs if epochs is None else epochs,
            proximal=proximal,
        )

    def loss(self, rows: Tensor) -> Tensor:
        """See `Trainer.loss`."""
        return self.engine.evaluate(rows, self._examples("train"))[0]

    def measure(self, rows: Tensor) -> dict[str, Measured]:
        """Loss and accuracy of rows (k, P) on each split."""
        made = {}
        for split in SPLITS:
            loss, accuracy = self.engine.evaluate(rows, self._examples(split))
            made[split] = Measured(loss.numpy(), accuracy.numpy())
        return made
