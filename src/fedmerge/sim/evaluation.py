"""What was measured of all clients at the end of a round, by model and split.

It holds figures and compares them; the models behind them were evaluated elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .log import MODELS, SPLITS, Array, Measured, Summary


@dataclass(frozen=True)
class Evaluation:
    """Figures of m clients; filled group by group, then left as it is.

    Attributes:
        round: after which it was made, from 1. m: number of clients.
        found: {model: {split: Measured}}, arrays (m,); clients not measured have NaN.
    """

    round: int
    m: int
    found: dict[str, dict[str, Measured]] = field(default_factory=dict)

    def put(self, model: str, places: list[int], figures: dict[str, Measured]) -> None:
        """Fill in what the clients at `places` have reached with `model`, by split."""
        splits = self.found.setdefault(model, {s: Measured.empty(self.m) for s in SPLITS})
        for split, one in figures.items():
            splits[split].put(places, one)

    def metrics(self) -> dict[str, Any]:
        """Summaries over clients, as `RoundLog.metrics` has them."""
        return {
            # Own models are those of the participants, who may be more than the sample, or others.
            model: {
                split: self.found[model][split].summary(sampled=model != "local")
                for split in SPLITS
            }
            for model in MODELS
            if model in self.found
        }

    def gap(self, split: str) -> float | None:
        """Mean over participants of the loss of the model they would use minus that of their own.

        Participants that were not evaluated do not count. None where there is no own model, nobody
        took part, or a model has diverged.
        """
        if "local" not in self.found or "merged" not in self.found:
            return None
        local, merged = (self.found[model][split].loss for model in ("local", "merged"))
        there = ~(np.isnan(local) | np.isnan(merged))
        with np.errstate(invalid="ignore"):
            gap: Array = merged[there] - local[there]
        return float(gap.mean()) if len(gap) and np.isfinite(gap).all() else None

    def validation_loss(self) -> float:
        """Mean over clients of the merged model's; infinite if one has diverged."""
        summary = Summary.of(self.found["merged"]["validation"].loss, high_is_bad=True)
        return math.inf if summary is None else summary.mean

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All figures under names that begin with `prefix`, for a checkpoint."""
        return {
            f"{prefix}.{model}.{split}": torch.from_numpy(
                np.stack([figures.loss, figures.accuracy, figures.auc])
            )
            for model, splits in self.found.items()
            for split, figures in splits.items()
        }

    @classmethod
    def of_tensors(cls, prefix: str, tensors: dict[str, Tensor], number: int, m: int) -> Self:
        """Read back what `tensors` made of the evaluation after round `number`."""
        made = cls(number, m)
        for name, figures in tensors.items():
            start, _, rest = name.partition(".")
            if start == prefix:
                model, split = rest.split(".")
                made.found.setdefault(model, {})[split] = Measured(*figures.numpy())
        return made


def better(one: Evaluation, best: Evaluation | None) -> Evaluation:
    """The one with the lower validation loss, the earlier if they are level: test data and
    training data have no say."""
    return one if best is None or one.validation_loss() < best.validation_loss() else best
