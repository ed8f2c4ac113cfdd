"""Local training: plain SGD from a received row, for one client or for a stack of them.

The batches of a client are drawn from (seed, round, client id) alone. Both ways give the same
numbers; what is sent, kept or merged is decided elsewhere.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import ConfigError, ModelError
from .ops import Batch
from .params import Layout
from .rng import derive, numpy_generator, torch_generator
from .stack import StackedNet

Index = npt.NDArray[np.int64]
Loss = Literal["auto", "cross-entropy", "mse"]
EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Training:
    """How a client trains.

    Attributes:
        lr: SGD learning rate.
        epochs: passes over the client's training data in a round.
        batch_size: examples in a step; the last step of a pass may have fewer.
        momentum: heavy-ball momentum, started anew in every round.
        weight_decay: lambda in lambda / 2 ||p||^2.
        clip: largest Euclidean norm of a step's gradient, or None.
        loss: "cross-entropy" (y: class numbers), "mse" (y: (n, t)), or "auto": what fits the data.
            Mean per example.
    """

    lr: float = 0.3
    epochs: int = 5
    batch_size: int = 16
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    loss: Loss = "auto"

    def __post_init__(self) -> None:
        wanted = {
            "lr": (self.lr > 0 and math.isfinite(self.lr), "a positive number"),
            "epochs": (self.epochs >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "momentum": (0 <= self.momentum < 1, "0 or more and less than 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "clip": (self.clip is None or self.clip > 0, "a positive number or nothing"),
            "loss": (self.loss in get_args(Loss), '"auto", "cross-entropy" or "mse"'),
        }
        for name, (good, text) in wanted.items():
            if not good:
                raise ConfigError(f"{name} = {getattr(self, name)}: wanted {text}")

    def for_data(self, *, classes: bool) -> Training:
        """The same, with the loss that fits class numbers, or targets, in place of "auto"."""
        fitting: Loss = "cross-entropy" if classes else "mse"
        if self.loss not in ("auto", fitting):
            kind = "class numbers" if classes else "targets that are not classes"
            raise ConfigError(f'loss = "{self.loss}": the data have {kind}, wanted "{fitting}"')
        return replace(self, loss=fitting)


@dataclass(frozen=True)
class Examples:
    """The examples of several clients in one pool; client i has x[start[i]:start[i] + count[i]].

    Attributes:
        x: (N, *features). y: (N,) int64 or (N, t) float.
        start, count: (k,) int64.
    """

    x: Tensor
    y: Tensor
    start: Index
    count: Index

    @classmethod
    def of(cls, splits: Sequence[tuple[Tensor, Tensor]]) -> Examples:
        """Pool the (x, y) of several clients; the data are copied once."""
        count = np.array([len(y) for _, y in splits], dtype=np.int64)
        start = np.concatenate([[0], np.cumsum(count)[:-1]]).astype(np.int64)
        x, y = torch.cat([x for x, _ in splits]), torch.cat([y for _, y in splits])
        return cls(x, y, start, count)

    def take(self, clients: Index) -> Examples:
        """The same pool, seen by some of the clients only; nothing is copied."""
        return Examples(self.x, self.y, self.start[clients], self.count[clients])


@dataclass(frozen=True)
class Proximal:
    """A pull mu / 2 ||p - anchor||^2 towards anchor (k, P)."""

    anchor: Tensor
    mu: float


class Engine:
    """Trains and evaluates rows of one architecture: alone, or stacked where its layers allow.

    Args:
        module: the architecture; copied, its values are not used.
        layout: its layout.
        training: how clients train.
        execution: "stacked" (one batched step for all given clients), "sequential" (one client
            after another) or "auto" (stacked where possible).

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
        self._module = copy.deepcopy(module)
        self.net: StackedNet | None = None
        if execution != "sequential":
            found = StackedNet.of(self._module, layout)
            if isinstance(found, StackedNet):
                self.net = found
            elif execution == "stacked":
                raise ConfigError(
                    f'execution = "stacked": {found} cannot be stacked; use "sequential" or "auto"'
                )

    def fit(
        self,
        rows: Tensor,
        examples: Examples,
        keys: Sequence[tuple[int | str, ...]],
        *,
        seed: int,
        epochs: int,
        proximal: Proximal | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Train each client from its row.

        Args:
            rows: (k, P), where each starts; not changed.
            examples: of k clients.
            keys: names of each client's draws, such as (round, client id).

        Returns:
            (k, P) end rows and (k,) int64 numbers of SGD steps.
        """
        self.layout.check(rows)
        size = self.training.batch_size
        steps = epochs * -(-examples.count // size)
        end = rows.clone()
        if self.net is not None:
            self._fit_stack(end, examples, keys, seed, epochs, steps, proximal)
        else:
            for i in range(len(rows)):
                self._fit_one(i, end, examples, keys[i], seed, epochs, proximal)
        return end, torch.from_numpy(steps)

    def evaluate(self, rows: Tensor, examples: Examples) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of each row on its own client's examples, without training.

        Returns:
            (k,) mean loss per example (nats or squared units; infinite for a model that has
            diverged) and (k,) share of right answers; NaN for a client without examples, and
            accuracies NaN for regression. Both float64.
        """
        return self.measure(rows, [examples])[0]

    def measure(self, rows: Tensor, parts: Sequence[Examples]) -> list[tuple[Tensor, Tensor]]:
        """As `evaluate`, on several parts of one pool at once."""
        self.layout.check(rows)
        if self.net is None:
            found = [
                [self._evaluate_one(row, part, i) for i, row in enumerate(rows)] for part in parts
            ]
        else:
            found = self._evaluate_stack(self.net, rows, parts)
        return [self._averages(sums, part) for sums, part in zip(found, parts, strict=True)]

    def _averages(
        self, sums: list[tuple[float, float]], examples: Examples
    ) -> tuple[Tensor, Tensor]:
        loss, right = torch.tensor(sums, dtype=torch.float64).reshape(-1, 2).unbind(1)
        count = torch.from_numpy(examples.count)
        # NaN is for what was not measured: a diverged model is the worst, and must count as that.
        loss = torch.where(loss.isnan() & (count > 0), math.inf, loss)
        if self.training.loss == "mse":
            right = torch.full_like(right, math.nan)
        return loss / count, right / count

    # -- one client after another -----------------------------------------------------------------

    def _criterion(self, output: Tensor, y: Tensor) -> Tensor:
        if self.training.loss == "cross-entropy":
            return functional.cross_entropy(output, y)
        _check_targets(output, y)
        return functional.mse_loss(output, y)

    def _forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            # Images with their channels last: a fifth faster through convolutions on a CPU.
            x = x.contiguous(memory_format=torch.channels_last)
        try:
            output: Tensor = self._module(x)
        except ValueError as error:
            if "more than 1 value" not in str(error):
                raise
            # BatchNorm has no variance of one example.
            raise ModelError(
                f"the model cannot be trained on a batch of {len(x)}: {error}; use another batch "
                "size, or GroupNorm in place of BatchNorm"
            ) from error
        return output

    def _fit_one(
        self,
        i: int,
        rows: Tensor,
        examples: Examples,
        key: tuple[int | str, ...],
        seed: int,
        epochs: int,
        proximal: Proximal | None,
    ) -> None:
        module, layout, row = self._module, self.layout, rows[i]
        layout.bind(module, row)
        module.train()
        parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        params = row[: layout.n_params]
        gradient = torch.empty_like(params)
        places = layout.gradient_places(module)
        pull = None if proximal is None else (proximal.anchor[i, : layout.n_params], proximal.mu)
        momentum = torch.zeros_like(params) if self.training.momentum else None
        if not examples.count[i]:
            return
        order = batches(examples.count[i], epochs, numpy_generator(seed, *key))
        plain = not (self.training.weight_decay or self.training.clip or momentum is not None)
        # Dropout and the like draw from torch's global generator: give it this client's own stream.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, *key, "layers"))
            for epoch in order:
                at = torch.from_numpy(epoch + examples.start[i])
                for batch in torch.split(at, self.training.batch_size):
                    output = self._forward(examples.x[batch])
                    loss = self._criterion(output, examples.y[batch])
                    parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
                    with torch.no_grad():
                        if plain and pull is None:
                            torch._foreach_add_(parameters, parts, alpha=-self.training.lr)
                            continue
                        for part, (start, stop) in zip(parts, places, strict=True):
                            gradient[start:stop] = part.reshape(-1)
                        sgd_step(params, gradient, momentum, pull, self.training)
        layout.collect(module, row)

    @torch.inference_mode()
    def _evaluate_one(self, row: Tensor, examples: Examples, i: int) -> tuple[float, float]:
        self.layout.bind(self._module, row.clone())
        self._module.eval()
        start, stop = examples.start[i], examples.start[i] + examples.count[i]
        loss, right = 0.0, 0.0
        for first in range(start, stop, EVALUATION_BATCH):
            last = min(first + EVALUATION_BATCH, stop)
            output, y = self._forward(examples.x[first:last]), examples.y[first:last]
            loss += self._criterion(output, y).item() * (last - first)
            if self.training.loss == "cross-entropy":
                right += (output.argmax(-1) == y).sum().item()
        return loss, right

    # -- a stack of clients ------------------------------------------------------------------------

    @torch.no_grad()
    def _fit_stack(
        self,
        rows: Tensor,
        examples: Examples,
        keys: Sequence[tuple[int | str, ...]],
        seed: int,
        epochs: int,
        steps: np.ndarray,
        proximal: Proximal | None,
    ) -> None:
        if self.net is None or not len(rows):
            return
        # Longest first: at every step those still training are a prefix of the stack.
        order = np.argsort(-steps, kind="stable")
        at = torch.from_numpy(order)
        work = rows[at]
        n = self.layout.n_params
        pull = None if proximal is None else (proximal.anchor[at, :n], proximal.mu)
        gradient = torch.zeros(len(rows), n, dtype=rows.dtype)
        momentum = torch.zeros_like(gradient) if self.training.momentum else None
        index, weight = _plan(examples, keys, order, seed, epochs, self.training.batch_size)
        share = weight.to(rows.dtype)
        active = (steps[order][None, :] > np.arange(index.shape[1])[:, None]).sum(1)
        real = (weight > 0).sum(2)
        width = real.amax(0).tolist()
        names = (keys[i] for i in order) if self.net.draws else ()
        draws = [torch_generator(seed, *key, "layers") for key in names]
        for t in range(index.shape[1]):
            k, b = int(active[t]), width[t]
            at_step = index[:k, t, :b]
            batch = Batch(work[:k], draws, real[:k, t].tolist() if draws else ())
            self.net.gradient(
                batch,
                examples.x[at_step],
                examples.y[at_step],
                share[:k, t, :b],
                gradient[:k],
                self.training.loss,
            )
            sgd_step(
                work[:k, :n],
                gradient[:k],
                None if momentum is None else momentum[:k],
                None if pull is None else (pull[0][:k], pull[1]),
                self.training,
            )
        rows[at] = work

    @torch.no_grad()
    def _evaluate_stack(
        self, net: StackedNet, rows: Tensor, parts: Sequence[Examples]
    ) -> list[list[tuple[float, float]]]:
        """Sums of loss and of right answers, by part and client; all parts in one pass."""
        index, real = (torch.from_numpy(a) for a in _padded(parts))
        x, y = parts[0].x, parts[0].y[index]
        output = net.forward(rows, x[index])
        if self.training.loss == "mse":
            _check_targets(output, y)
            each = (output - y).square().mean(-1)
            right = torch.zeros_like(each)
        else:
            each = functional.cross_entropy(output.transpose(1, 2), y, reduction="none")
            right = (output.argmax(-1) == y).to(each.dtype)
        # Where a padded place holds an infinite loss, 0 * inf would be NaN.
        sums = torch.stack([torch.where(real, each, 0.0), torch.where(real, right, 0.0)], dim=-1)
        widths = [int(part.count.max(initial=0)) for part in parts]
        made: list[list[tuple[float, float]]] = [
            [(loss, good) for loss, good in part.sum(1).tolist()]
            for part in torch.split(sums, widths, dim=1)
        ]
        return made


def _padded(parts: Sequence[Examples]) -> tuple[Index, npt.NDArray[np.bool_]]:
    """Where the examples of every client lie in the pool, part after part, and which are real."""
    places, reals = [], []
    for part in parts:
        column = np.arange(part.count.max(initial=0))[None, :]
        real = column < part.count[:, None]
        places.append(np.where(real, part.start[:, None] + column, 0))
        reals.append(real)
    return np.concatenate(places, axis=1), np.concatenate(reals, axis=1)


def _check_targets(output: Tensor, y: Tensor) -> None:
    # Unlike shapes would be broadcast against each other, and the model learn nonsense.
    if output.shape != y.shape:
        raise ModelError(
            f"the model has outputs of shape {tuple(output.shape[-1:])} for an example, "
            f"wanted {tuple(y.shape[-1:])}, that of its target"
        )


def sgd_step(
    params: Tensor,
    gradient: Tensor,
    momentum: Tensor | None,
    pull: tuple[Tensor, float] | None,
    training: Training,
) -> None:
    """One SGD step in place on `params` (P,) or (k, P); `gradient` and `momentum` are overwritten.

    The order is PyTorch's: the loss with its proximal pull, clipping, weight decay, momentum.
    """
    if pull is not None:
        anchor, mu = pull
        gradient.add_(params, alpha=mu).sub_(anchor, alpha=mu)
    if training.clip is not None:
        norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
        gradient.mul_((training.clip / (norm + 1e-6)).clamp_max(1.0))
    if training.weight_decay:
        gradient.add_(params, alpha=training.weight_decay)
    if momentum is not None:
        gradient = momentum.mul_(training.momentum).add_(gradient)
    params.add_(gradient, alpha=-training.lr)


def batches(n: int, epochs: int, generator: np.random.Generator) -> np.ndarray:
    """The order of a client's n examples in each epoch: (epochs, n), every row a permutation."""
    return generator.permuted(np.tile(np.arange(n), (epochs, 1)), axis=1)


def _plan(
    examples: Examples,
    keys: Sequence[tuple[int | str, ...]],
    order: np.ndarray,
    seed: int,
    epochs: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Which example each client takes at each step, and with which share of the batch's mean.

    Returns:
        index (k, steps, size) int64 into the pool and weight (k, steps, size) float64, rows in
        `order`; 0 in both where a batch is not full or a client has finished.
    """
    per_epoch = -(-examples.count // size)
    longest = int(per_epoch.max()) * epochs
    index = np.zeros((len(keys), longest, size), dtype=np.int64)
    weight = np.zeros((len(keys), longest, size))
    for place, i in enumerate(order):
        n, s = int(examples.count[i]), int(per_epoch[i])
        drawn = batches(n, epochs, numpy_generator(seed, *keys[i]))
        padded = np.zeros((epochs, s * size), dtype=np.int64)
        padded[:, :n] = drawn + examples.start[i]
        index[place, : epochs * s] = padded.reshape(epochs * s, size)
        fill = np.minimum(size, n - np.arange(s) * size)
        share = (np.arange(size)[None, :] < fill[:, None]) / fill[:, None]
        weight[place, : epochs * s] = np.tile(share, (epochs, 1))
    return torch.from_numpy(index), torch.from_numpy(weight)
