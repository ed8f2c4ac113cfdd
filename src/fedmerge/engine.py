"""Who computes gradients and evaluates: one client after another, or a stack of them at once.

Both ways give the same numbers. What is sent, kept or merged is decided elsewhere, and a method
with a step of its own makes it from `Engine.steps`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import ConfigError, ModelError
from .local import (
    Examples,
    Index,
    Mixture,
    Proximal,
    Schedule,
    Training,
    batches,
    log_softmax,
    plan,
    sgd_step,
)
from .ops import Batch, Descent, Gradient
from .params import Layout, copied
from .rng import derive, numpy_generators, torch_generator
from .stack import StackedNet
from .steps import Step

Key = tuple[int | str, ...]
Found = tuple[Tensor, Tensor, Tensor]
"""Loss, accuracy and area under the ROC curve of k clients; see `Engine.measure`."""
EVALUATION_BATCH = 512
HELD = 2**25 - 2**16
"""Bytes, just below the largest that glibc adapts itself to."""
SPLIT = 2**21
"""Numbers that padding must cost, in models of examples that are not there, for a step to be done
in two stacks: their calls take as long as so many."""
LARGEST_STACKED = 2**20
"""Largest row, in numbers, that "auto" stacks. Measured on one core, stacked over sequential: .07
at 2,410 numbers, .2 at 17 thousand, .6 at 160 thousand, .9 at 670 thousand, 1.3 at 4.3 million,
much the same for batches of 8 and 32: a large model keeps the core busy by itself, and several do
not fit its cache."""


class Engine:
    """Trains and evaluates rows of one architecture: alone, or stacked where its layers allow.

    Args:
        module: the architecture; copied, its values are not used.
        layout: its layout.
        training: how clients train.
        execution: "stacked" (one batched step for all given clients), "sequential" (one client
            after another) or "auto" (stacked where that is possible and faster). Which of the two
            is the module's affair alone, by its layers and its size: they agree to float rounding
            only, so a choice by time would make results depend on what else the machine was doing.

    Attributes:
        net: the stacked network, None where clients are trained one by one.
        reason: why they are, in words, unless it was asked for.

    Raises:
        ConfigError: "stacked" for a module with a layer that cannot be stacked; it is named.
    """

    def __init__(
        self, module: nn.Module, layout: Layout, training: Training, execution: str = "auto"
    ) -> None:
        if execution not in ("auto", "stacked", "sequential"):
            raise ConfigError(
                f'execution = "{execution}": wanted "auto", "stacked" or "sequential"'
            )
        self.layout = layout
        self.training = training
        self.module = copied(module)
        self.net: StackedNet | None = None
        self.reason = ""
        if execution == "auto" and layout.size > LARGEST_STACKED:
            self.reason = f"at {layout.size:,} numbers a model, stacks are no faster"
        elif execution != "sequential":
            found = StackedNet.of(self.module, layout)
            if isinstance(found, StackedNet):
                self.net = found
                return
            self.reason = f"{found} cannot be stacked"
            if execution == "stacked":
                raise ConfigError(
                    f'execution = "stacked": {self.reason}; use "sequential" or "auto"'
                )

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
        share, real = schedule.share, schedule.share > 0
        drawing = self.net is None or self.net.draws
        draws = [torch_generator(seed, *key, "layers") for key in keys if drawing]
        states = [d.get_state() for d in draws] if self.net is None else []
        for t, width in enumerate(schedule.real.max(0, initial=0).tolist()):
            here = (slice(None), t, slice(width))
            yield Step(self, examples, index[here], share[here], real[here], draws, states)

    def losses(self, rows: Tensor, examples: Examples) -> Tensor:
        """(k, n) loss of each example of each client, without training; 0 beyond its last. For
        rows (k, r, P), r models of each client, (k, r, n)."""
        self.layout.check(rows)
        index, real = (torch.from_numpy(a) for a in _padded([examples]))
        if rows.ndim == 2:
            return self.judge(rows, examples, index, real)[0]
        r = rows.shape[1]
        index, real = (part.repeat_interleave(r, 0) for part in (index, real))
        return self.judge(rows.flatten(0, 1), examples, index, real)[0].view(len(rows), r, -1)

    def measure(self, model: Tensor | Mixture, parts: Sequence[Examples]) -> list[Found]:
        """How each client's model does on its own examples, on several parts of one pool at once.

        Args:
            model: rows (k, P), or mixtures of k clients.

        Returns:
            For each part (k,) mean loss per example (nats or squared units; infinite for a model
            that has diverged), (k,) share of right answers, and (k,) area under the ROC curve.
            All float64; NaN for a client without examples, accuracies NaN for regression, areas
            NaN unless there are two classes and the client has examples of both.
        """
        self.layout.check(model.rows if isinstance(model, Mixture) else model)
        index, real = (torch.from_numpy(a) for a in _padded(parts))
        each, right, margin = self.judge(model, parts[0], index, real)
        sums = torch.stack([each, right], dim=-1)
        widths = [int(part.count.max(initial=0)) for part in parts]
        made, first = [], 0
        for part, width in zip(parts, widths, strict=True):
            here = slice(first, first + width)
            first += width
            total = sums[:, here].double().sum(1)
            area = torch.full((len(part.count),), math.nan, dtype=torch.float64)
            if margin is not None:
                y = parts[0].y[index[:, here]]
                for i, n in enumerate(part.count):
                    area[i] = _area(margin[i, here][:n], y[i, :n])
            made.append((*self._averages(total, part), area))
        return made

    def _averages(self, total: Tensor, examples: Examples) -> tuple[Tensor, Tensor]:
        loss, right = total.unbind(1)
        count = torch.from_numpy(examples.count)
        # NaN is for what was not measured: a diverged model is the worst, and must count as that.
        loss = torch.where(loss.isnan() & (count > 0), math.inf, loss)
        if self.training.loss == "mse":
            right = torch.full_like(right, math.nan)
        return loss / count, right / count

    # -- outputs -----------------------------------------------------------------------------------

    @torch.no_grad()
    def judge(
        self, model: Tensor | Mixture, examples: Examples, index: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss (k, B), rightness (k, B) 0 or 1, and with two classes log-odds of the second one
        (k, B), of the examples of the pool at index (k, B); 0 at places that are not real."""
        if self.net is not None:
            found = self._judge(model, *examples.at(index))
            # A padded place may hold an infinite loss, and 0 * inf would be NaN.
            each, right = (torch.where(real, part, 0.0) for part in found[:2])
            return each, right, found[2]
        made = torch.zeros(3, *index.shape, dtype=self.layout.dtype)
        two = False
        for i in range(len(index)):
            own = model.take(slice(i, i + 1)) if isinstance(model, Mixture) else model[i : i + 1]
            for at in torch.split(real[i].nonzero()[:, 0], EVALUATION_BATCH):
                if len(at):
                    here = index[i, at]
                    found = self._judge(own, *examples.at(here[None]))
                    two = found[2] is not None
                    for part, value in zip(made, found, strict=True):
                        if value is not None:
                            part[i, at] = value[0]
        return made[0], made[1], made[2] if two else None

    def _judge(
        self, model: Tensor | Mixture, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        classes = self.training.loss != "mse"
        if isinstance(model, Mixture):
            shares = model.log_shares(x)
            outputs = [self.answers(self._outputs(rows, x)) for rows in model.rows.unbind(1)]
            stacked = torch.stack(outputs, dim=2)  # (k, B, r, outputs)
            if classes:
                output = (stacked + shares[..., None]).logsumexp(2)
            else:
                output = (stacked * shares.exp()[..., None]).sum(2)
        else:
            output = self.answers(self._outputs(model, x))
        each = self.judged(output, y)
        if not classes:
            return each, torch.zeros_like(each), None
        margin = output[..., 1] - output[..., 0] if output.shape[-1] == 2 else None
        # Of equals max() takes the first, as argmax() does in eight times the time.
        return each, (output.max(-1).indices == y).to(each.dtype), margin

    def answers(self, output: Tensor) -> Tensor:
        """What outputs (k, B, outputs) say: the logarithms of the classes' probabilities, if there
        are classes."""
        return output if self.training.loss == "mse" else log_softmax(output)

    def judged(self, answers: Tensor, y: Tensor) -> Tensor:
        """(k, B) loss of each example."""
        if self.training.loss == "mse":
            _check_targets(answers, y)
            return (answers - y).square().mean(-1)
        return -answers.gather(2, y[..., None])[..., 0]

    def _outputs(self, rows: Tensor, x: Tensor) -> Tensor:
        """(k, B, outputs), in evaluation mode; one client at a time where they are not stacked."""
        if self.net is not None:
            return self.net.forward(rows, x)
        self.layout.bind(self.module, rows[0].clone())
        self.module.eval()
        return self.forward(x[0])[None]

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the module as it is, for inputs (B, *features) of one client."""
        if x.ndim == 4:
            # Images with their channels last: a fifth faster through convolutions on a CPU.
            x = x.contiguous(memory_format=torch.channels_last)
        try:
            output: Tensor = self.module(x)
        except ValueError as error:
            if "more than 1 value" not in str(error):
                raise
            # BatchNorm has no variance of one example.
            raise ModelError(
                f"the model cannot be trained on a batch of {len(x)}: {error}; use another batch "
                "size, or GroupNorm in place of BatchNorm"
            ) from error
        return output

    def criterion(self, output: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean over a client's batch of its loss, each example times its weight (B,)."""
        how = "mean" if weight is None else "none"
        if self.training.loss == "cross-entropy":
            loss = functional.cross_entropy(output, y, reduction=how)
        else:
            _check_targets(output, y)
            loss = functional.mse_loss(output, y, reduction=how)
        if weight is None:
            return loss
        return ((loss if loss.ndim == 1 else loss.mean(-1)) * weight).mean()

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
        schedule = Schedule.of(examples.count[order], epochs, size, rows.dtype)
        names = [keys[i] for i in order]
        index = plan(schedule, examples.start[order], names, seed, epochs)
        net = net.training(part)
        draws = [torch_generator(seed, *key, "layers") for key in names if net.draws]
        for t in range(index.shape[1]):
            for first, end, width in schedule.parts(t, SPLIT / self.layout.size):
                own = slice(first, end)
                batch = Batch(
                    work[own], draws[own], schedule.real[own, t].tolist() if draws else ()
                )
                net.gradient(
                    batch,
                    *examples.at(index[own, t, :width]),
                    schedule.share[own, t, :width],
                    Descent(work[own], training.lr, part)
                    if plain
                    else Gradient(gradient[own], part),
                    training.loss,
                )
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


def _padded(parts: Sequence[Examples]) -> tuple[Index, np.ndarray]:
    """Where the examples of every client lie in the pool, part after part, and which are real."""
    places, reals = [], []
    for part in parts:
        column = np.arange(part.count.max(initial=0))[None, :]
        real = column < part.count[:, None]
        places.append(np.where(real, part.start[:, None] + column, 0))
        reals.append(real)
    return np.concatenate(places, axis=1), np.concatenate(reals, axis=1)


def _area(margin: Tensor, y: Tensor) -> float:
    """Area under the ROC curve: the chance that a case of class 1 scores above one of class 0."""
    ones, zeros = margin[y == 1].double(), margin[y == 0].double()
    if not len(ones) or not len(zeros):
        return math.nan
    ordered = zeros.sort().values
    below = torch.searchsorted(ordered, ones) + torch.searchsorted(ordered, ones, right=True)
    return float(below.double().mean()) / (2 * len(zeros))


def _check_targets(output: Tensor, y: Tensor) -> None:
    # Unlike shapes would be broadcast against each other, and the model learn nonsense.
    if output.shape != y.shape:
        raise ModelError(
            f"the model has outputs of shape {tuple(output.shape[-1:])} for an example, "
            f"wanted {tuple(y.shape[-1:])}, that of its target"
        )
