"""What local training consists of: its settings, the clients' examples, batches and the SGD step.

The batches of a client are drawn from (seed, round, client id) alone. Who computes the gradients,
for one client or for many at once, is in `engine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import ConfigError
from .rng import numpy_generators

Index = npt.NDArray[np.int64]
Loss = Literal["auto", "cross-entropy", "mse"]
Weighing = Callable[[Tensor], Tensor]
"""Makes the weights of examples of their losses; both (k, B), or (k, r, B)."""


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

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """x (*index, *features) and y of the examples at places of the pool."""
        if index.ndim == 1:
            return self.x.index_select(0, index), self.y.index_select(0, index)
        flat = index.reshape(-1)
        x, y = (part.index_select(0, flat) for part in (self.x, self.y))
        return x.view(*index.shape, *x.shape[1:]), y.view(*index.shape, *y.shape[1:])

    def take(self, clients: Index) -> Examples:
        """The same pool, seen by some of the clients only; nothing is copied."""
        return Examples(self.x, self.y, self.start[clients], self.count[clients])

    def seen_by(self, what: Callable[[Tensor], Tensor]) -> Examples:
        """A pool of what k clients make of their own examples' x, (k, n, *features)."""
        most = int(self.count.max(initial=0))
        place = np.minimum(np.arange(most), np.maximum(self.count, 1)[:, None] - 1)
        start = np.where(self.count > 0, self.start, 0)
        x, y = self.at(torch.from_numpy(start[:, None] + place))
        own = np.arange(len(start)) * most
        return Examples(what(x).flatten(0, 1), y.flatten(0, 1), own, self.count)


@dataclass(frozen=True)
class Proximal:
    """A pull mu / 2 ||p - anchor||^2 towards anchor (k, P)."""

    anchor: Tensor
    mu: float


@dataclass(frozen=True)
class Mixture:
    """A client's model that is several: its prediction is the mixture of theirs.

    Class probabilities are mixed for classification, outputs for regression.

    Attributes:
        rows: (k, r, P), the r models of each of k clients.
        weights: (k, r), their shares, summing to 1; or None, and
        gate: (k, r, F + 1): the shares of an example are softmax_j(gate_j . [its F inputs, 1]).
    """

    rows: Tensor
    weights: Tensor | None = None
    gate: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.weights is None) == (self.gate is None):
            raise ConfigError("a mixture has weights or a gate: wanted one of them")

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Sequence[int] | slice) -> Mixture:
        """The mixtures of some of the clients."""
        return Mixture(
            self.rows[places],
            None if self.weights is None else self.weights[places],
            None if self.gate is None else self.gate[places],
        )

    def log_shares(self, inputs: Tensor) -> Tensor:
        """(k, B, r) logarithm of each model's share, for inputs (k, B, *features)."""
        if self.weights is not None:
            return self.weights.log()[:, None].expand(-1, inputs.shape[1], -1)
        flat = inputs.flatten(2)
        gate = self.gate if self.gate is not None else flat.new_zeros(())
        return log_softmax(
            torch.baddbmm(gate[:, None, :, -1], flat, gate[:, :, :-1].transpose(1, 2))
        )


def log_softmax(x: Tensor) -> Tensor:
    """Log-softmax of x (k, B, n) over its last axis, which is short: over one that is not the last
    it takes a fifth of the time."""
    return torch.log_softmax(x.transpose(1, 2), dim=1).transpose(1, 2)


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
    made = np.empty((epochs, n), dtype=np.int64)
    made[:] = np.arange(n)
    return generator.permuted(made, axis=1, out=made)


@dataclass(frozen=True, eq=False)
class Schedule:
    """When each of k clients takes a step, with how many examples; not yet with which.

    Attributes:
        count, per_epoch: (k,) examples, and steps in an epoch. size: of a full batch.
        real: (k, steps) examples in the batch; 0 once a client has finished.
        share: (k, steps, size) an example's share of its batch's mean, 0 at places without one.
    """

    count: Index
    per_epoch: Index
    size: int
    real: Index
    share: Tensor

    @staticmethod
    def of(count: Index, epochs: int, size: int, dtype: torch.dtype) -> Schedule:
        """That of clients with `count` examples; kept, since most rounds have those of another."""
        return _schedule(count.tobytes(), epochs, size, dtype)

    def parts(self, step: int, worth: float) -> list[tuple[int, int, int]]:
        """(first, end, width) of the stacks to be computed at a step.

        Clients in order of falling numbers of steps: those still training come first. They are
        divided in two where that saves `worth` places without an example, or more.
        """
        return _parts(self, worth)[step]


@lru_cache(maxsize=32)
def _schedule(counts: bytes, epochs: int, size: int, dtype: torch.dtype) -> Schedule:
    count = np.frombuffer(counts, dtype=np.int64)
    per_epoch = -(-count // size)
    steps = per_epoch * epochs
    step = np.arange(int(steps.max(initial=0)))[None, :]
    begun = step % np.maximum(per_epoch, 1)[:, None] * size
    real = np.where(step < steps[:, None], np.minimum(size, count[:, None] - begun), 0)
    share = (np.arange(size) < real[..., None]) / np.maximum(real, 1)[..., None]
    return Schedule(count, per_epoch, size, real, torch.from_numpy(share).to(dtype))


@lru_cache(maxsize=32)
def _parts(schedule: Schedule, worth: float) -> list[list[tuple[int, int, int]]]:
    real = schedule.real
    k = len(real)
    active = (real > 0).sum(0)
    before = np.maximum.accumulate(real, axis=0)
    after = np.maximum.accumulate(real[::-1], axis=0)[::-1]
    first = np.arange(1, k)[:, None]
    whole = before[-1] * active
    halves = before[:-1] * first + after[1:] * np.maximum(active - first, 0)
    made = []
    for t, n in enumerate(active.tolist()):
        cut = int(halves[:, t].argmin()) + 1 if k > 1 else n
        if cut < n and whole[t] - halves[cut - 1, t] >= worth:
            made.append([(0, cut, int(before[cut - 1, t])), (cut, n, int(after[cut, t]))])
        else:
            made.append([(0, n, int(before[-1, t]))])
    return made


def plan(
    schedule: Schedule,
    start: Index,
    keys: Sequence[tuple[int | str, ...]],
    seed: int,
    epochs: int,
) -> Tensor:
    """Which example each client of `schedule` takes at each step.

    Args:
        start: (k,), where the clients' examples begin in the pool. keys: names of their draws.

    Returns:
        (k, steps, size) int64 into the pool; where there is no example, one of the client's own: of
        a model that has diverged nobody else's should be made. 0 for a client without any.
    """
    k, longest, size = schedule.share.shape
    index = np.zeros((k, longest * size), dtype=np.int64)
    index += np.where(schedule.count > 0, start, 0)[:, None]
    counts, lengths = schedule.count.tolist(), (schedule.per_epoch * size).tolist()
    generators = numpy_generators(seed, keys)
    for row, n, s, first, generator in zip(
        index, counts, lengths, start.tolist(), generators, strict=True
    ):
        own = row[: epochs * s].reshape(epochs, s)
        np.add(batches(n, epochs, generator), first, out=own[:, :n])
    return torch.from_numpy(index).view(k, longest, size)
