"""A network and what its outputs say of examples: for one client after another, or a stack of them.

Both ways give the same numbers. How it is trained is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import ConfigError, ModelError
from .local import Examples, Index, Loss, Mixture, log_softmax
from .params import Layout, copied
from .stack import StackedNet

Found = tuple[Tensor, Tensor, Tensor]
"""Loss, accuracy and area under the ROC curve of k clients; see `Network.measure`."""
EVALUATION_BATCH = 512
"""Most examples that go through a module at once where clients are not stacked."""
LARGEST_STACKED = 2**20
"""Largest row, in numbers, that "auto" stacks. Measured on one core, stacked over sequential: .07
at 2,410 numbers, .2 at 17 thousand, .6 at 160 thousand, .9 at 670 thousand, 1.3 at 4.3 million,
much the same for batches of 8 and 32: a large model keeps the core busy by itself, and several do
not fit its cache."""


class Network:
    """Evaluates rows of one architecture: one by one, or stacked where its layers allow.

    Args:
        module: the architecture; copied, its values are not used.
        layout: its layout.
        loss: "cross-entropy" or "mse".
        execution: "stacked" (one batched step for all given clients), "sequential" (one client
            after another) or "auto" (stacked where that is possible and faster). Which of the two
            is the module's affair alone, by its layers and its size: they agree to float rounding
            only, so a choice by time would make results depend on what else the machine was doing.

    Attributes:
        net: the stacked network, None where clients are taken one by one.
        reason: why they are, in words, unless it was asked for.

    Raises:
        ConfigError: "stacked" for a module with a layer that cannot be stacked; it is named.
    """

    def __init__(
        self, module: nn.Module, layout: Layout, loss: Loss, execution: str = "auto"
    ) -> None:
        if execution not in ("auto", "stacked", "sequential"):
            raise ConfigError(
                f'execution = "{execution}": wanted "auto", "stacked" or "sequential"'
            )
        self.layout = layout
        self.loss = loss
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
        if self.loss == "mse":
            right = torch.full_like(right, math.nan)
        return loss / count, right / count

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
        classes = self.loss != "mse"
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
        # Of equals max() takes the first, as argmax() does in eight times the time. What a model
        # that has diverged says is never right.
        right = (output.max(-1).indices == y) & each.isfinite()
        return each, right.to(each.dtype), margin

    def answers(self, output: Tensor) -> Tensor:
        """What outputs (k, B, outputs) say: the logarithms of the classes' probabilities, if there
        are classes."""
        return output if self.loss == "mse" else log_softmax(output)

    def judged(self, answers: Tensor, y: Tensor) -> Tensor:
        """(k, B) loss of each example."""
        if self.loss == "mse":
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
        if self.loss == "cross-entropy":
            loss = functional.cross_entropy(output, y, reduction=how)
        else:
            _check_targets(output, y)
            loss = functional.mse_loss(output, y, reduction=how)
        if weight is None:
            return loss
        return ((loss if loss.ndim == 1 else loss.mean(-1)) * weight).mean()


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
    """Area under the ROC curve: the chance that a case of class 1 scores above one of class 0; that
    is 0 where scores are not numbers."""
    ones, zeros = margin[y == 1].double(), margin[y == 0].double()
    if not len(ones) or not len(zeros):
        return math.nan
    if margin.isnan().any():
        return 0.0
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
