"""One mini-batch of several clients, from which a method with a step of its own makes it.

Losses and gradients of the batch are computed here with an `Engine`'s network; what is done with
them is the method's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .local import Examples, Weighing
from .ops import Batch, Descent, Gradient, Sink

if TYPE_CHECKING:
    from .engine import Engine
    from .stack import StackedNet


@dataclass
class Kept:
    """A stack of rows and its views: most methods go down on one from step to step."""

    rows: Tensor | None = None
    batch: Batch | None = None
    descent: Descent | None = None


@dataclass(frozen=True)
class Step:
    """One mini-batch of k clients; see `algorithms.Step` for what a method may ask of it.

    Attributes:
        index: (k, B) places in the pool.
        share: (k, B), an example's share of its batch's mean; 0 where there is none.
        active: (k,) bool, which clients still have a batch. busy: how many they are.
        draws: a generator for each client, for dropout; `states` holds theirs one by one.
        kept: views of the rows that the last step went down on, for the next.
    """

    engine: Engine
    examples: Examples
    index: Tensor
    share: Tensor
    real: Tensor
    active: Tensor
    busy: int
    draws: list[torch.Generator]
    states: list[Tensor]
    kept: Kept

    @property
    def inputs(self) -> Tensor:
        """(k, B, *features) inputs of the batch."""
        return self.examples.at(self.index)[0]

    def take(self, table: Tensor) -> Tensor:
        """(k, B) of the batch's examples from a table (k, n) over the training examples."""
        own = self.index - torch.from_numpy(self.examples.start)[:, None]
        return torch.where(self.real, table.gather(1, own.clamp_min(0)), 0.0)

    def _each(self, table: Tensor, r: int) -> Tensor:
        """(k * r, ...): r times each of (k, ...)."""
        return table if r == 1 else table.repeat_interleave(r, 0)

    def losses(self, rows: Tensor) -> Tensor:
        """(k, B) loss of each example under rows (k, P); 0 at places that are not real.

        For rows (k, r, P), r models of each client, (k, r, B).
        """
        r = rows.shape[1] if rows.ndim == 3 else 1
        index, real = self._each(self.index, r), self._each(self.real, r)
        found = self.engine.judge(rows.reshape(-1, rows.shape[-1]), self.examples, index, real)[0]
        return found.view(*rows.shape[:-1], -1)

    def gradient(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """(k, n_params) gradient at rows (k, P) of the mean over the batch of weight * loss.

        For rows (k, r, P) and weight (k, r, B), (k, r, n_params). Buffers inside `rows` (statistics
        of BatchNorm) are updated in place, as in training.
        """
        net, n = self.engine.net, self.engine.layout.n_params
        whole = net is not None and self.busy == len(rows)
        out = (rows.new_empty if whole else rows.new_zeros)(*rows.shape[:-1], n)
        if net is None:
            for place in self._places(rows):
                out[place] = self._gradient_of_one(rows, place, weight)
        elif whole:
            batch = Batch(rows.reshape(-1, rows.shape[-1]))
            self._stacked(net, rows, weight, batch, Gradient(out.view(-1, n), slice(0, n)))
        elif self._first_are_busy:
            first, part = slice(self.busy), None if weight is None else weight[: self.busy]
            out[first] = self._of(first).gradient(rows[first], part)
        else:
            at = self.active.nonzero()[:, 0]
            part = None if weight is None else weight.index_select(0, at)
            out.index_copy_(0, at, self._of(at).gradient(rows.index_select(0, at), part))
        return out

    def descend(
        self, rows: Tensor, lr: float | Tensor, weight: Tensor | Weighing | None = None
    ) -> None:
        """Take the step rows -= lr * gradient(rows, weight) in place, which costs less.

        Args:
            rows: (k, P) or (k, r, P), without gaps in memory.
            lr: for all, or (k, 1).
            weight: as in `gradient`, or a function that makes it of `losses(rows)`, so that these
                are not computed apart.
        """
        net, n = self.engine.net, self.engine.layout.n_params
        if (net is None or net.draws) and not (weight is None or isinstance(weight, Tensor)):
            # Losses are of the model as it is used, gradients are with dropout.
            weight = weight(self.losses(rows))
        if net is None:
            for place in self._places(rows):
                known = weight if isinstance(weight, Tensor) else None
                rate = lr[place[0]] if isinstance(lr, Tensor) else lr
                rows[place][:n] -= rate * self._gradient_of_one(rows, place, known)
        elif self.busy == len(rows):
            if isinstance(lr, Tensor) and rows.ndim == 3:
                lr = lr.repeat_interleave(rows.shape[1], 0)
            kept = self.kept
            if kept.rows is not rows or kept.batch is None or kept.descent is None:
                flat = rows.view(-1, rows.shape[-1])
                kept.rows, kept.batch = rows, Batch(flat)
                kept.descent = Descent(flat, lr, slice(0, n))
            self._stacked(net, rows, weight, kept.batch, replace(kept.descent, lr=lr))
        elif self._first_are_busy:
            first = slice(self.busy)
            rate = lr[first] if isinstance(lr, Tensor) else lr
            self._of(first).descend(rows[first], rate, _weights_of(len(rows), first, weight))
        else:
            # Not by a mask, with which a copy takes three times as long.
            at = self.active.nonzero()[:, 0]
            work = rows.index_select(0, at)
            rate = lr.index_select(0, at) if isinstance(lr, Tensor) else lr
            self._of(at).descend(work, rate, _weights_of(len(rows), at, weight))
            rows.index_copy_(0, at, work)

    @property
    def _first_are_busy(self) -> bool:
        """Whether those that still have a batch come first, as those with most examples do in a
        group of a simulation: then nothing need be copied."""
        return not bool(self.active[self.busy :].any())

    def _of(self, places: Tensor | slice) -> Step:
        """The batches of the clients at some places, all of which have one."""
        at = np.arange(len(self.index))[places if isinstance(places, slice) else places.numpy()]
        return replace(
            self,
            examples=self.examples.take(at),
            index=self.index[places],
            share=self.share[places],
            real=self.real[places],
            active=self.active[places],
            busy=len(at),
            draws=[self.draws[i] for i in at] if self.draws else [],
            kept=Kept(),
        )

    @torch.no_grad()
    def _stacked(
        self,
        net: StackedNet,
        rows: Tensor,
        weight: Tensor | Weighing | None,
        batch: Batch,
        sink: Sink,
    ) -> None:
        """Give the gradient at rows (k, P) or (k, r, P), which are flat in `batch`, to `sink`;
        every client has a batch."""
        engine, r = self.engine, rows.shape[1] if rows.ndim == 3 else 1
        draws = [draw for draw in self.draws for _ in range(r)]
        numbers = self._each(self.real, r).sum(1).tolist() if net.draws else ()
        batch = replace(batch, draws=draws, real=numbers)
        x, y = self.examples.at(self._each(self.index, r))
        every = self._each(self.share, r)
        share: Tensor | Weighing = every
        if isinstance(weight, Tensor):
            share = every * weight.reshape(every.shape)
        elif weight is not None:
            weigh, real = weight, self._each(self.real, r)

            def of_outputs(output: Tensor) -> Tensor:
                losses = torch.where(real, engine.judged(engine.answers(output), y), 0.0)
                found = weigh(losses.view(*rows.shape[:-1], -1))
                return every * found.reshape(every.shape)

            share = of_outputs
        net.gradient(batch, x, y, share, sink, engine.training.loss)

    def _places(self, rows: Tensor) -> Iterator[tuple[int, ...]]:
        """Where in (k, P) or (k, r, P) the models of clients are that have a batch."""
        models = itertools.product(*map(range, rows.shape[1:-1]))
        for i, own in itertools.product(self.active.nonzero()[:, 0].tolist(), list(models)):
            yield (i, *own)

    def _gradient_of_one(
        self, rows: Tensor, place: tuple[int, ...], weight: Tensor | None
    ) -> Tensor:
        engine, layout = self.engine, self.engine.layout
        row, i = rows[place], place[0]
        n = int(self.real[i].sum())
        at = self.index[i, :n]
        layout.bind(engine.module, row)
        engine.module.train()
        chosen = engine.trained(slice(0, layout.n_params))
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.states[i])
            x, y = self.examples.at(at)
            share = None if weight is None else weight[place][:n]
            loss = engine.criterion(engine.forward(x), y, share)
            self.states[i] = torch.get_rng_state()
        parts = torch.autograd.grad(loss, [p for p, _ in chosen], materialize_grads=True)
        layout.collect(engine.module, row)
        out = row.new_zeros(layout.n_params)
        for found, (_, (start, stop)) in zip(parts, chosen, strict=True):
            out[start:stop] = found.reshape(-1)
        return out


def _weights_of(
    k: int, places: Tensor | slice, weight: Tensor | Weighing | None
) -> Tensor | Weighing | None:
    """The same for the clients at some of k places; a function still sees all, some with loss 0."""
    if weight is None or isinstance(weight, Tensor):
        return None if weight is None else weight[places]

    def of_some(losses: Tensor) -> Tensor:
        every = losses.new_zeros(k, *losses.shape[1:])
        every[places] = losses
        return weight(every)[places]

    return of_some
