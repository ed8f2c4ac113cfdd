"""FedMerge as the authors' published code does it: the reference rule.

Chen, Zhou, Long, Jiang and Zhang, "FedMerge: federated personalization via model merging", AAAI
2026. Rows are scaled by the whole cohort before the models move, so the server holds the cohort's
updates, O(k P), until the round ends; the default rule does not need that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..local import Proximal
from ..merging import block_scores, merge_rows, merging_weights, paper_row_step
from ..sums import ModelSum
from .base import Algorithm, Cost, Fold, Local, Setup, Tensors, Updates
from .trainer import Trainer

BUNDLE = 8
"""Updates added to the sum at once, at least: each time, all of it is read and written."""


@dataclass(frozen=True)
class FedMergePaper(Algorithm):
    """FedMerge with the reference rule.

    Attributes:
        d: number of global models, each from a random initialisation of its own; None: 5, or one
            per client if there are fewer clients.
        logit_step: how far the fastest logit moves in a round.
        prox: weight of ||p - p_received||^2 in the local loss.
    """

    name: ClassVar[str] = "fedmerge:rule=paper"
    d: int | None = None
    logit_step: float = 0.01
    prox: float = 0.01

    def __post_init__(self) -> None:
        self._need(d=1, logit_step=0, prox=0)

    def resolve(self, n_clients: int | None) -> Self:
        made = super().resolve(n_clients)
        return made if made.d else replace(made, d=min(5, n_clients or 5))

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        d = self.d or 5
        return Cost(server=d, server_per_client=8 * d / setup.layout.n_bytes)

    def shared(self, setup: Setup) -> Tensors:
        return {"models": torch.stack([setup.initial(j) for j in range(self.d or 5)])}

    def rows(self, setup: Setup, k: int) -> Tensors:
        return {"logits": torch.zeros(k, 1, self.d or 5, dtype=torch.float64)}

    def weights(self, setup: Setup, rows: Tensors) -> Tensor:
        return merging_weights(rows["logits"])

    def send(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        return merge_rows(shared["models"], self.weights(setup, rows), setup.layout)[:, None]

    def send_into(self, setup: Setup, shared: Tensors, rows: Tensors, out: Tensor) -> Tensor:
        weights = self.weights(setup, rows)
        return merge_rows(shared["models"], weights, setup.layout, out[:, 0])[:, None]

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        start = message[:, 0]
        # ||.||^2 without the half of a proximal term: twice the weight.
        end, steps = trainer.fit(start, proximal=Proximal(start, 2 * self.prox))
        return Local(setup.layout.update(start, end), steps, memory, end)

    def fold(
        self,
        setup: Setup,
        shared: Tensors,
        rows: Tensors,
        updates: Updates,
        fold: Fold,
        version: int,
    ) -> None:
        fold.parts.append(
            {"logits": rows["logits"], "delta": updates.delta, "n": updates.n_examples.double()}
        )

    def commit(
        self, setup: Setup, shared: Tensors, fold: Fold, version: int
    ) -> tuple[Tensors, Tensors]:
        if not fold.parts:
            return shared, {}
        models, n = shared["models"], fold.gathered("n")
        head = [setup.layout.last_layer]
        scores = [block_scores(part["delta"], models, head)[:, 0] for part in fold.parts]
        logits = paper_row_step(
            fold.gathered("logits")[:, 0], torch.cat(scores), n, logit_step=self.logit_step
        )
        total = ModelSum.for_layout(setup.layout, len(models))
        share = (merging_weights(logits) * n[:, None])[:, None]
        first = 0
        for delta in _bundles(fold.parts):
            total.add(share[first : first + len(delta)], delta)
            first += len(delta)
        return {**shared, "models": total.step(models)}, {"logits": logits[:, None]}


def _bundles(parts: Sequence[Tensors]) -> Iterator[Tensor]:
    """The updates (k, P) part by part; small parts are copied together."""
    held: list[Tensor] = []
    for place, part in enumerate(parts, 1):
        held.append(part["delta"])
        if sum(map(len, held)) >= BUNDLE or place == len(parts):
            yield held[0] if len(held) == 1 else torch.cat(held)
            held = []
