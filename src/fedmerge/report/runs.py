"""A finished run as a value: what it scored, what it cost, its clients and its log.

It knows no files (`reading` does) and computes no statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODELS = ("merged", "tuned", "local")
ROUNDS = ("last", "best")
"""Where a run is read: at its last evaluated round, or at that of the least validation loss."""
COSTS = ("down", "up", "client", "server", "server_per_client", "passes")


@dataclass(frozen=True)
class Scores:
    """One evaluated model over the clients' test data; accuracy is None for regression.

    loss: NaN where the model has diverged.
    better_than_local, better_than_fedavg: share of clients that fare strictly better than under
    that method; None where it was not run.
    """

    accuracy: float | None
    accuracy_std: float | None
    accuracy_worst_decile: float | None
    loss: float | None
    auc: float | None = None
    better_than_local: float | None = None
    better_than_fedavg: float | None = None


@dataclass(frozen=True)
class ClientResult:
    """One client in one run: sizes of its splits; test accuracy, loss and AUC by model.

    label_counts: examples of each label, () for regression. importance: (d,) by how much its
    validation loss rises when a global model is taken out of its mix; () without weights.
    """

    id: str
    kind: str | None
    n_train: int
    n_validation: int
    n_test: int
    accuracy: Mapping[str, float | None]
    loss: Mapping[str, float | None]
    auc: Mapping[str, float | None] = field(default_factory=dict)
    label_counts: tuple[int, ...] = ()
    importance: tuple[float, ...] = ()


@dataclass(frozen=True)
class RoundPoint:
    """One round of the log: mean test accuracy and loss by model (empty if not evaluated).

    A loss is NaN where the model has diverged.
    """

    round: int
    accuracy: Mapping[str, float]
    loss: Mapping[str, float]
    gap_train: float | None
    gap_test: float | None


@dataclass(frozen=True)
class Evaluation:
    """A run as it stood at one evaluated round; `clients` may be empty."""

    round: int
    models: Mapping[str, Scores]
    clients: tuple[ClientResult, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Run:
    """One finished run: its results, its configuration and its log.

    column: of the tables it belongs to: its setting, with its data set before it where the folder
    has several. last, best: at the last evaluated round, and at that of the least validation
    loss. weights: (m, b, d) merging weights at the end, row i is client i's, or None for a method
    without rows. gap: in the unit of the loss, which is nats, or squared
    error for a regression. bytes: per client and round. seconds: the whole run. cost: in models,
    by the names of `COSTS`. chosen: the values that tuning chose. path: of its own folder.
    """

    folder: str
    setting: str
    data: str
    method: str
    seed: int
    rounds: int
    seconds: float
    last: Evaluation
    gap_train: float | None
    gap_test: float | None
    bytes_up: float
    bytes_down: float
    best: Evaluation | None = None
    column: str = ""
    blocks: tuple[str, ...] | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    log: tuple[RoundPoint, ...] = field(default=(), repr=False)
    refused: Mapping[str, int] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    chosen: Mapping[str, Any] = field(default_factory=dict)
    weights: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)
    path: Path | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.column:
            object.__setattr__(self, "column", self.setting)

    @property
    def clients(self) -> tuple[ClientResult, ...]:
        """The clients at the last evaluated round."""
        return self.last.clients

    def at(self, where: str) -> Evaluation | None:
        """Return the run at its "last" or "best" round."""
        return self.last if where == "last" else self.best


def is_fedmerge(method: str) -> bool:
    """Whether a method string such as "fedmerge:d=8" names FedMerge in one of its variants."""
    return method.split(":")[0].split("-")[0] == "fedmerge"


def twin_of(method: str) -> str:
    """The same FedMerge with fine-tuning before use, or without it: one training with another."""
    name, colon, options = method.partition(":")
    name = "fedmerge" if name == "fedmerge-ft" else "fedmerge-ft"
    return f"{name}{colon}{options}"


def finite(value: float | None) -> bool:
    """Whether `value` is a number that can be averaged and compared."""
    return value is not None and math.isfinite(value)
