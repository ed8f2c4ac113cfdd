"""One mini-batch of several clients, from which a method with a step of its own makes it.

Losses and gradients of the batch are computed here with an `Engine`'s network; what is done with
them is the method's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .local import Examples
from .ops import Batch, Gradient

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Step:
    """One mini-batch of k clients; see `algorithms.Step` for what a method may ask of it.

    Attributes:
        index: (k, B) places in the pool. local: (k, B) places in the client's own training data.
        share: (k, B), an example's share of its batch's mean; 0 where there is none.
        draws: a generator for each client, for dropout; `states` holds theirs one by one.
    """

    engine: Engine
    examples: Examples
    index: Tensor
    local: Tensor
    share: Tensor
    real: Tensor
    draws: list[torch.Generator]
    states: list[Tensor]

    @property
    def active(self) -> Tensor:
        """(k,) bool: which clients still have a batch."""
        return self.real.any(1)

    @property
    def inputs(self) -> Tensor:
        """(k, B, *features) inputs of the batch."""
        return self.examples.at(self.index)[0]

    def take(self, table: Tensor) -> Tensor:
        """(k, B) of the batch's examples from a table (k, n) over the training examples."""
        return torch.where(self.real, table.gather(1, self.local), 0.0)

    def _each(self, r: int) -> Step:
        """The same batches for k * r clients: r times each of the k."""
        return replace(
            self,
            index=self.index.repeat_interleave(r, 0),
            local=self.local.repeat_interleave(r, 0),
            share=self.share.repeat_interleave(r, 0),
            real=self.real.repeat_interleave(r, 0),
            draws=[draw for draw in self.draws for _ in range(r)],
        )

    def losses(self, rows: Tensor) -> Tensor:
        """(k, B) loss of each example under rows (k, P); 0 at places that are not real.

        For rows (k, r, P), r models of each client, (k, r, B).
        """
        if rows.ndim == 3:
            flat = self._each(rows.shape[1]).losses(rows.flatten(0, 1))
            return flat.view(*rows.shape[:2], -1)
        return self.engine.judge(rows, self.examples, self.index, self.real)[0]

    def gradient(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """(k, n_params) gradient at rows (k, P) of the mean over the batch of weight * loss.

        For rows (k, r, P) and weight (k, r, B), (k, r, n_params). Buffers inside `rows` (statistics
        of BatchNorm) are updated in place, as in training.
        """
        if rows.ndim == 3:
            k, r = rows.shape[:2]
            if self.engine.net is not None:
                flat = None if weight is None else weight.flatten(0, 1)
                return self._each(r).gradient(rows.flatten(0, 1), flat).view(k, r, -1)
            each = [
                self.gradient(one, None if weight is None else weight[:, j])
                for j, one in enumerate(rows.unbind(1))
            ]
            return torch.stack(each, dim=1)
        here = self.active.nonzero()[:, 0]
        everyone = len(here) == len(rows)
        out = rows.new_zeros(len(rows), self.engine.layout.n_params)
        net = self.engine.net
        if net is None:
            for i in here.tolist():
                out[i] = self._gradient_of_one(rows[i], i, weight)
            return out
        share = self.share if weight is None else self.share * weight
        rows, index, real = (
            (rows, self.index, self.real)
            if everyone
            else (rows[here], self.index[here], self.real[here])
        )
        share = share if everyone else share[here]
        draws = [self.draws[i] for i in here.tolist()] if net.draws else []
        batch = Batch(rows, draws, real.sum(1).tolist() if draws else ())
        found = out if everyone else out[: len(here)].clone()
        x, y = self.examples.at(index)
        with torch.no_grad():
            net.gradient(batch, x, y, share, Gradient(found), self.engine.training.loss)
        if not everyone:
            out[here] = found
        return out

    def _gradient_of_one(self, row: Tensor, i: int, weight: Tensor | None) -> Tensor:
        engine, layout = self.engine, self.engine.layout
        n = int(self.real[i].sum())
        at = self.index[i, :n]
        layout.bind(engine.module, row)
        engine.module.train()
        chosen = engine.trained(slice(0, layout.n_params))
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.states[i])
            x, y = self.examples.at(at)
            share = None if weight is None else weight[i, :n]
            loss = engine.criterion(engine.forward(x), y, share)
            self.states[i] = torch.get_rng_state()
        parts = torch.autograd.grad(loss, [p for p, _ in chosen], materialize_grads=True)
        layout.collect(engine.module, row)
        out = row.new_zeros(layout.n_params)
        for found, (_, (start, stop)) in zip(parts, chosen, strict=True):
            out[start:stop] = found.reshape(-1)
        return out
