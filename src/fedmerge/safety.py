"""What a server does against dishonest clients and for the privacy of honest ones, in one value.

`Soup` asks it at each step of a round; by default it does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .algorithms import Algorithm, FedAvg, FedMerge, Fold, Setup, Tensors, Updates
from .errors import ConfigError
from .guard import Guard
from .params import Layout
from .privacy import Privacy, PrivateSum, noisy_rows
from .robust import RobustSum
from .sums import ModelSum

Reason = Literal[
    "unknown",
    "stale",
    "duplicate",
    "shape",
    "non-finite",
    "empty",
    "norm",
    "set aside",
    "foreign",
    "malformed",
]


@dataclass(frozen=True)
class Safety:
    """What is bounded, trimmed and made noisy.

    Attributes:
        guard: longest update, and patience with a client; None for no bound and no patience lost.
        trim: share of the cohort's weight that the model step leaves out at either end; 1/2 for the
            weighted median, 0 for the mean. Costs memory for all updates of a round.
        privacy: clipping and noise, or None.
    """

    guard: Guard = field(default_factory=lambda: Guard(factor=float("inf"), patience=0))
    trim: float = 0.0
    privacy: Privacy | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is done at all: updates may be folded where nobody judges them."""
        guarded = self.guard.factor < float("inf") or self.guard.patience > 0
        return not guarded and not self.trim and self.privacy is None

    def adapted(self, algorithm: Algorithm) -> Algorithm:
        """The method as it is run: with privacy, rows learn from nobody else's update.

        What they would learn from has no noise.
        """
        if self.privacy is not None and isinstance(algorithm, FedMerge):
            return replace(algorithm, peers=0)
        return algorithm

    def check(self, algorithm: Algorithm, layout: Layout) -> None:
        """Raise ConfigError for a method or a model that cannot be protected like this."""
        changed = bool(self.trim) or self.privacy is not None
        if changed and type(algorithm) not in (FedAvg, FedMerge):
            raise ConfigError(
                f'method "{algorithm.name}": a robust model step and privacy are worked out for '
                "fedmerge and fedavg only; leave them out, or use one of these"
            )
        if self.trim and self.privacy is not None:
            raise ConfigError("robust and privacy cannot be had together: leave out one of them")
        if self.privacy is not None and layout.size > layout.n_params:
            raise ConfigError(
                "privacy needs a model without buffers, whose values would be sent as they are: "
                "use GroupNorm in place of BatchNorm"
            )

    def judge(self, client: str, delta: Tensor, setup: Setup) -> Reason | None:
        """Say why a sound update is not taken all the same; remember its length if it is."""
        if client in self.guard.aside:
            return "set aside"
        if self.guard.factor == float("inf") or self.privacy is not None:
            # With privacy all are clipped; and a bound by the others' lengths, which have no noise,
            # would let one client decide whether another's update counts.
            return None
        length = _length(delta, setup.layout)
        if length > self.guard.bound(_model_length(setup)):
            return "norm"
        self.guard.take(length)
        return None

    def prepare(self, updates: Updates, layout: Layout) -> Updates:
        """The updates as they are folded."""
        if self.privacy is None:
            return updates
        ones = torch.ones_like(updates.n_examples)
        return replace(updates, delta=self.privacy.clipped(updates.delta), n_examples=ones)

    def sum(self, layout: Layout, shared: Tensors, version: int) -> ModelSum | None:
        """What a round is summed up in; None for what the method does by itself."""
        if self.privacy is not None:
            private = PrivateSum.for_layout(layout, len(shared["models"]))
            private.privacy, private.round = self.privacy, version
            return private
        if self.trim:
            robust = RobustSum.for_layout(layout, len(shared["models"]))
            robust.trim = self.trim
            return robust
        return None

    def finish(self, fold: Fold, *, any_folded: bool) -> Fold:
        """The round as the method's commit may see it."""
        if not any_folded:
            return Fold()
        if isinstance(fold.sum, PrivateSum):
            fold.sum.add_noise()
        return fold

    def noisy(self, algorithm: Algorithm, rows: Tensors, before: Tensors, version: int) -> Tensors:
        """The rows as they are kept, given those `before` the round."""
        if self.privacy is None or not self.privacy.row_noise or "logits" not in rows:
            return rows
        reach = algorithm.reach(before, version)
        return {**rows, "logits": noisy_rows(rows["logits"], reach, self.privacy, version)}


def _length(delta: Tensor, layout: Layout) -> float:
    steps = delta[..., : layout.n_params].double()
    return float(torch.linalg.vector_norm(steps))


@lru_cache(maxsize=8)
def _model_length(setup: Setup) -> float:
    return _length(setup.initial(0), setup.layout)
