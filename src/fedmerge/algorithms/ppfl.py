"""PPFL: a client's model is a mixture, in parameters, of canonical models that all clients share.

Di, Yang, Ye and Chang, "PPFL: a personalized federated learning framework for heterogeneous
population", INFORMS Journal on Computing, arXiv 2310.14337: clients have a membership vector c_i
on the simplex, and their model is sum_j c_ij models_j (in its code, layer by layer). Two blocks
take turns: the membership moves by mirror descent with the models fixed, then the models by SGD
with the membership fixed. Deviations: the client moves its membership when it receives the models,
so that a round needs one message each way and not two; the penalty that draws clients together who
are known to be alike is left out, since no such knowledge is given; both blocks move in every
round, as in the authors' code, where the paper draws one.

SGD moves models_j by -lr c_ij g with the gradient g at the client's own model, the same g for all
j: so the client sends one row, sum of lr g, and c_i, and the server knows all d updates exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..params import Layout
from ..sums import ModelSum
from .base import Cost, Fold, Local, Setup, Tensors, Updates
from .components import Components
from .trainer import Trainer


@dataclass(frozen=True)
class PPFL(Components):
    """PPFL with `d` canonical models.

    Attributes:
        membership_lr: step of mirror descent on the memberships.
    """

    name: ClassVar[str] = "ppfl"
    usual: ClassVar[int] = 4
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 1.0, "membership_lr": 0.1}, {"lr": 0.1}, {"lr": 1.0}, {"membership_lr": 0.1},
        {"d": 8, "lr": 1.0}, {"d": 8, "lr": 1.0, "membership_lr": 0.1}, {"d": 2, "lr": 1.0},
    )  # fmt: skip
    membership_lr: float = 0.3

    def __post_init__(self) -> None:
        self._need(d=1, membership_lr=0)

    def update_shape(self, layout: Layout) -> tuple[int, ...]:
        return (layout.size,)

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        d = self.n_models
        return Cost(
            down=d, up=1 + d / setup.layout.size, client=d / setup.layout.size, server=d, passes=2
        )

    def memory(self, setup: Setup, k: int) -> Tensors:
        return {"membership": torch.full((k, self.n_models), 1 / self.n_models)}

    def _mixed(self, setup: Setup, message: Tensor, membership: Tensor) -> Tensor:
        mixed = torch.einsum("kd,kdp->kp", membership.to(message.dtype), message)
        counters = setup.layout.counters
        mixed[:, counters] = message[:, :, counters].amax(1)
        return mixed

    def _moved(self, setup: Setup, message: Tensor, membership: Tensor, trainer: Trainer) -> Tensor:
        """c_j <- c_j exp(-membership_lr <g, models_j>) / sum, with g at the mixed model."""
        n = setup.layout.n_params
        for step in trainer.steps(purpose="membership"):
            gradient = step.gradient(self._mixed(setup, message, membership))
            slope = torch.einsum("kp,kdp->kd", gradient, message[:, :, :n])
            logits = membership.clamp_min(1e-8).log() - self.membership_lr * slope
            membership = torch.softmax(logits, dim=-1).to(membership.dtype)
        return membership

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        membership = self._moved(setup, message, memory["membership"], trainer)
        start = self._mixed(setup, message, membership)
        end = start.clone()
        # sum_j c_j (c_j g): how far the mixed model moves with all canonical ones.
        length = membership.to(start.dtype).square().sum(1, keepdim=True)
        steps = torch.zeros(len(message), dtype=torch.int64)
        for step in trainer.steps():
            steps += step.active
            step.descend(end, trainer.lr * length)
        delta = setup.layout.update(start, end)
        delta[:, : setup.layout.n_params] /= length
        kept = {"membership": membership}
        return Local(delta, steps, kept, end, {"membership": membership})

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        moved = self._moved(setup, message, memory["membership"], trainer)
        return self._mixed(setup, message, moved)

    def fits(self, shared: Tensors, extra: Tensors) -> bool:
        own = extra.get("membership")
        if own is None or own.shape != (self.n_models,) or not own.dtype.is_floating_point:
            return False
        return bool((own >= 0).all()) and abs(float(own.sum()) - 1) < 1e-3

    def fold(
        self,
        setup: Setup,
        shared: Tensors,
        rows: Tensors,
        updates: Updates,
        fold: Fold,
        version: int,
    ) -> None:
        if fold.sum is None:
            fold.sum = ModelSum.for_layout(setup.layout, len(shared["models"]))
        n = updates.n_examples.double()
        share = updates.extra["membership"].double() * n[:, None]
        fold.sum.add(share[:, None], updates.delta)
        fold.parts.append({"n": n})

    def commit(
        self, setup: Setup, shared: Tensors, fold: Fold, version: int
    ) -> tuple[Tensors, Tensors]:
        if fold.sum is None:
            return shared, {}
        models, n = shared["models"], setup.layout.n_params
        moved = fold.sum.step(models)
        # The mean over all clients of c_ij delta_i, not over those of model j alone.
        used = (fold.sum.mass[0] / fold.gathered("n").sum())[:, None].to(models.dtype)
        moved[:, :n] = models[:, :n] - used * (models - moved)[:, :n]
        return {**shared, "models": moved}, {}
