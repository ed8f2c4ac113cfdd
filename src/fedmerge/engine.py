"""Who trains: one client after another, or a stack of them at once.

Both ways give the same numbers. What is sent, kept or merged is decided elsewhere, and a method
with a step of its own makes it from `Engine.steps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ModelError
from .local import (
    Examples,
    Index,
    Proximal,
    Schedule,
    Training,
    batches,
    plan,
    sgd_step,
)
from .network import Network
from .ops import Batch, Descent, Gradient, Sink
from .params import Layout
from .rng import derive, numpy_generators, torch_generator
from .stack import StackedNet
from .steps import Kept, Step

Key = tuple[int | str, ...]
HELD = 2**25 - 2**16
"""Bytes, just below the largest that glibc adapts itself to."""
SPLIT = 2**21
"""Numbers that padding must cost, in models of examples that are not there, for a step to be done
in two stacks: their calls take as long as so many."""


class Engine(Network):
    """Trains rows of one architecture, and evaluates them; see `Network`.

    Args:
        training: how clients train.
    """

    def __init__(
        self, module: nn.Module, layout: Layout, training: Training, execution: str = "auto"
    ) -> None:
        super().__init__(module, layout, training.loss, execution)
        self.training = training

    def fit(
        self,
        rows: Tensor,
        examples: Examples,
        keys: Sequence[Key],
        *,
        seed: int,
        epochs: int,
        proximal: Proximal | None = None,
        only: tuple[int, int] | None = None,
        lr_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Train each client from its row.

        Args:
            rows: (k, P), where each starts; not changed.
            examples: of k clients.
            keys: names of each client's draws, such as (round, client id).
            only: (start, stop) of the parameters that are trained, None for all of them.
            lr_scale: learning rate, in those of the run.

        Returns:
            (k, P) end rows and (k,) int64 numbers of SGD steps.
        """
        self.layout.check(rows)
        n = self.layout.n_params
        part = slice(*only) if only else slice(0, n)
        if not 0 <= part.start <= part.stop <= n:
            raise ModelError(f"only = {only}: wanted a part of the {n} parameters")
        steps = epochs * -(-examples.count // self.training.batch_size)
        # Having seen a block as large as this freed, glibc no longer gives freed memory back to the
        # system after every step, to ask for it again in the next: a tenth of the time of small
        # convolutions, and of stacks.
        torch.empty(HELD, dtype=torch.uint8)
        end = rows.clone()
        if not epochs:
            return end, torch.from_numpy(steps)
        how = replace(self.training, epochs=epochs, lr=lr_scale * self.training.lr)
        if self.net is None:
            self._fit_each(end, examples, keys, seed, how, proximal, part)
        elif len(rows):
            self._fit_stack(self.net, end, examples, keys, seed, how, steps, proximal, part)
        return end, torch.from_numpy(steps)

    def steps(
        self, examples: Examples, keys: Sequence[Key], *, seed: int, epochs: int
    ) -> Iterator[Step]:
        """The batches that `fit` takes, for a rule of the caller's own; see `algorithms.Step`."""
        size = self.training.batch_size
        schedule = Schedule.of(examples.count, epochs, size, self.layout.dtype)
        index = plan(schedule, examples.start, keys, seed, epochs)
        share, real = schedule.share.unbind(1), (schedule.share > 0).unbind(1)
        drawing = self.net is None or self.net.draws
        draws = [torch_generator(seed, *key, "layers") for key in keys if drawing]
        states = [d.get_state() for d in draws] if self.net is None else []
        active = torch.from_numpy(schedule.real > 0).unbind(1)
        busy, widths = (schedule.real > 0).sum(0).tolist(), schedule.real.max(0, initial=0).tolist()
        kept = Kept()
        for t, places in enumerate(index.unbind(1)):
            here = slice(None), slice(widths[t])
            parts = places[here], share[t][here], real[t][here]
            yield Step(self, examples, *parts, active[t], busy[t], draws, states, kept)

    # -- one client after another -----------------------------------------------------------------

    def _fit_each(
        self,
        rows: Tensor,
        examples: Examples,
        keys: Sequence[Key],
        seed: int,
        training: Training,
        proximal: Proximal | None,
        part: slice,
    ) -> None:
        here = examples.count.nonzero()[0].tolist()
        if not here or part.start == part.stop:
            return
        # What is the same for all clients is done once: with small models it would take as long as
        # their steps.
        self.layout.bind(self.module, rows[here[0]])
        self.module.train()
        everything = self.trained(slice(0, self.layout.n_params))
        chosen = self.trained(part)
        orders = numpy_generators(seed, (keys[i] for i in here))
        # Dropout and the like draw from torch's global generator: give it each client's own stream.
        with torch.random.fork_rng(devices=[]):
            for i, generator in zip(here, orders, strict=True):
                if self.layout.size > self.layout.n_params:
                    self.layout.bind(self.module, rows[i])
                else:
                    for parameter, (start, stop) in everything:
                        parameter.data = rows[i, start:stop].view(parameter.shape)
                # Not torch.manual_seed, which tells every kind of device.
                torch.default_generator.manual_seed(derive(seed, *keys[i], "layers"))
                order = batches(examples.count[i], training.epochs, generator) + examples.start[i]
                pull = None if proximal is None else (proximal.anchor[i, part], proximal.mu)
                self._fit_one(rows[i], examples, order, training, pull, part, chosen)
                self.layout.collect(self.module, rows[i])

    def _fit_one(
        self,
        row: Tensor,
        examples: Examples,
        order: np.ndarray,
        training: Training,
        pull: tuple[Tensor, float] | None,
        part: slice,
        chosen: Sequence[tuple[Tensor, tuple[int, int]]],
    ) -> None:
        """Train the module, whose values are in `row`, on the batches of `order` (epochs, n)."""
        params = row[part]
        parameters = [parameter for parameter, _ in chosen]
        momentum = torch.zeros_like(params) if training.momentum else None
        plain = not (training.weight_decay or training.clip or training.momentum) and pull is None
        gradient = row[:0] if plain else torch.zeros_like(row[: self.layout.n_params])
        # The parameters' memory, seen without autograd.
        values = [parameter.detach() for parameter in parameters]
        for epoch in torch.from_numpy(order):
            for batch in torch.split(epoch, training.batch_size):
                x, y = examples.at(batch)
                loss = self.criterion(self.forward(x), y)
                parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
                if plain:
                    torch._foreach_add_(values, parts, alpha=-training.lr)
                    continue
                for found, (_, (start, stop)) in zip(parts, chosen, strict=True):
                    gradient[start:stop] = found.reshape(-1)
                sgd_step(params, gradient[part], momentum, pull, training)

    def trained(self, part: slice) -> list[tuple[Tensor, tuple[int, int]]]:
        """The module's parameters inside a part of the row, each with its place.

        Raises:
            ModelError: the part cuts a parameter in two.
        """
        learned = [p for p in self.module.parameters() if p.requires_grad]
        chosen: list[tuple[Tensor, tuple[int, int]]] = []
        for parameter, (start, stop) in zip(
            learned, self.layout.gradient_places(self.module), strict=True
        ):
            if part.start <= start and stop <= part.stop:
                chosen.append((parameter, (start, stop)))
            elif start < part.stop and part.start < stop:
                raise ModelError(
                    f"only = {(part.start, part.stop)} cuts a parameter at {(start, stop)}: "
                    "wanted whole parameters"
                )
        return chosen

    # -- a stack of clients ------------------------------------------------------------------------

    @torch.no_grad()
    def _fit_stack(
        self,
        net: StackedNet,
        rows: Tensor,
        examples: Examples,
        keys: Sequence[Key],
        seed: int,
        training: Training,
        steps: Index,
        proximal: Proximal | None,
        part: slice,
    ) -> None:
        # Longest first: at every step those still training are a prefix of the stack.
        order = np.argsort(-steps, kind="stable")
        at = torch.from_numpy(order)
        sorted_already = bool((order[1:] > order[:-1]).all())
        work = rows if sorted_already else rows.index_select(0, at)
        n = self.layout.n_params
        pull = None if proximal is None else (proximal.anchor[at, part], proximal.mu)
        plain = not (training.weight_decay or training.clip or training.momentum) and pull is None
        gradient = torch.empty(len(rows), 0 if plain else n, dtype=rows.dtype)
        momentum = torch.zeros_like(gradient[:, part]) if training.momentum else None
        epochs, size = training.epochs, training.batch_size
        examples = examples.take(order)
        schedule = Schedule.of(examples.count, epochs, size, rows.dtype)
        names = [keys[i] for i in order]
        settled, rest = net.parted(part)
        # Once for every example, and for places that are filled up, in place of every epoch.
        if settled.nodes and examples.count.sum() * epochs > len(rows) * examples.count.max():
            examples, net = examples.seen_by(partial(settled.forward, work)), rest
        # Step by step, so that the places of a step lie side by side.
        index = plan(schedule, examples.start, names, seed, epochs).transpose(0, 1).contiguous()
        share = schedule.share.unbind(1)
        net = net.training(part)
        draws = [torch_generator(seed, *key, "layers") for key in names if net.draws]
        stacks: dict[tuple[int, int], tuple[Batch, Sink]] = {}
        for t, places in enumerate(index):
            for first, end, width in schedule.parts(t, SPLIT / self.layout.size):
                own = slice(first, end)
                if (first, end) not in stacks:
                    batch = Batch(work[own], draws[own])
                    descent, kept = Descent(work[own], training.lr, part), gradient[own]
                    stacks[first, end] = batch, descent if plain else Gradient(kept, part)
                batch, sink = stacks[first, end]
                if draws:
                    batch = replace(batch, real=schedule.real[own, t].tolist())
                x, y = examples.at(places[own, :width])
                net.gradient(batch, x, y, share[t][own, :width], sink, training.loss)
                if not plain:
                    sgd_step(
                        work[own, part],
                        gradient[own, part],
                        None if momentum is None else momentum[own],
                        None if pull is None else (pull[0][own], pull[1]),
                        training,
                    )
        if not sorted_already:
            rows[at] = work
