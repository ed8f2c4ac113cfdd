"""A model step that a minority of dishonest clients cannot steer: weighted median, trimmed mean.

Coordinate by coordinate over the round's cohort, weighted for each model as the mean would be. It
needs all updates of a round at once, so memory is O(k P), where the mean needs O(d P).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .errors import ConfigError
from .sums import ModelSum

Robust = Literal["none", "median", "trimmed"]
CHUNK = 4096
"""Columns sorted at a time."""


@dataclass
class RobustSum(ModelSum):
    """A `ModelSum` whose mean over the cohort is a weighted median, or a trimmed mean.

    Yin, Chen, Kannan and Bartlett, "Byzantine-robust distributed learning", ICML 2018; here with a
    weight for each client and model. The trimmed mean leaves out `trim` of the weight at either
    end; the median is its limit at one half. Both are for parameters and buffers alike.
    """

    trim: float = 0.5
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, coef: Tensor, delta: Tensor) -> None:
        """See `ModelSum.add`; keeps the updates until `step`."""
        coef = coef.expand(-1, len(self.mass), -1)
        self.parts.append((coef.clone(), delta))
        self.mass += coef.sum(0)
        if len(self.counters):
            last = delta[:, -len(self.counters) :].double()
            self.counters = torch.maximum(self.counters, last.amax(0))

    def step(self, models: Tensor) -> Tensor:
        """See `ModelSum.step`."""
        if self.parts:
            coef = torch.cat([coef for coef, _ in self.parts])
            delta = torch.cat([delta for _, delta in self.parts])
            for start, stop, block in self.segments:
                for first in range(start, stop, CHUNK):
                    last = min(first + CHUNK, stop)
                    middle = trimmed_mean(delta[:, first:last], coef[:, block], self.trim)
                    # The mean is made of total / mass.
                    self.total[:, first:last] = middle * self.mass[block][:, None]
        return super().step(models)


def trimmed_mean(delta: Tensor, coef: Tensor, trim: float) -> Tensor:
    """Coordinate-wise weighted mean without the outermost weight.

    Args:
        delta: (k, n) updates. coef: (k, d) weights, not negative.
        trim: share of the weight that is left out at each end; 1/2 for the weighted median (the
            mean of both middle values where it falls between two).

    Returns:
        (d, n) float64; 0 for a model without weight.
    """
    values, order = delta.double().sort(0)
    n = values.shape[1]
    made = torch.zeros(coef.shape[1], n, dtype=torch.float64)
    for j in range(coef.shape[1]):
        weight = coef[:, j].double()
        if not weight.sum() > 0:
            continue
        upper = (weight / weight.sum())[order].cumsum(0)
        lower = torch.cat([torch.zeros(1, n, dtype=torch.float64), upper[:-1]])
        if trim >= 0.5:
            # Sums of shares: one half is met to rounding only.
            low = (upper >= 0.5 - 1e-12).to(torch.int64).argmax(0)
            high = (upper > 0.5 + 1e-12).to(torch.int64).argmax(0)
            pair = torch.stack([low, high])
            made[j] = values.gather(0, pair).mean(0)
        else:
            kept = (upper.clamp(max=1 - trim) - lower.clamp(min=trim)).clamp(min=0)
            made[j] = (kept * values).sum(0) / kept.sum(0)
    return made


def check_robust(kind: str, trim: float) -> float:
    """Return the share to trim for an option `robust`; 0 for none.

    Raises:
        ConfigError: an unknown name, or a share of one half or more.
    """
    if kind not in ("none", "median", "trimmed"):
        raise ConfigError(f'robust = "{kind}": wanted none, median or trimmed')
    if not 0 <= trim < 0.5:
        raise ConfigError(f"trim = {trim}: wanted 0 or more, less than 0.5")
    return {"none": 0.0, "median": 0.5, "trimmed": trim}[kind]
