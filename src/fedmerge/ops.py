"""Operations on the values of many clients at once, each client with parameters of its own.

Layers with parameters have a batched forward and backward over rows (k, P), written by hand; what
has no parameters treats examples one by one, so all clients' examples are simply its batch. Which
operations a module consists of is found out elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What a step knows beside its inputs.

    Attributes:
        rows: (k, P).
        draws: a generator for each client, for dropout; None when the network is used, not trained.
        real: (k,) examples of each client that are not padding, for dropout.
        views: of operations' parameters in the rows, by where they begin. To make them anew in
            every step would take a tenth of the time.
    """

    rows: Tensor
    draws: Sequence[torch.Generator] | None = None
    real: Sequence[int] = ()
    views: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)


class Sink(Protocol):
    """Takes the gradient of the stack's parameters, one after the other."""

    @property
    def only(self) -> slice:
        """The columns of the rows whose gradient is of use."""

    def put(self, part: slice, gradient: Tensor) -> None:
        """Take the gradient (k, ...) of the columns `part` of the rows."""


def overlap(one: slice, other: slice) -> bool:
    """Whether two parts of a row have a column in common."""
    return bool(one.start < other.stop and other.start < one.stop)


@dataclass(frozen=True)
class Gradient:
    """Keeps it, in out (k, P); what is not wanted stays as it is there, or does not."""

    out: Tensor
    only: slice

    def put(self, part: slice, gradient: Tensor) -> None:
        """See `Sink.put`."""
        self.out[:, part] = gradient.flatten(1)


@dataclass(frozen=True)
class Descent:
    """Steps down at once, for plain SGD: a gradient that is never put together costs less.

    Attributes:
        lr: for all, or (k, 1).
        views: of the parameters in the rows, as in `Batch`, and the part of each that learns.
    """

    rows: Tensor
    lr: float | Tensor
    only: slice
    views: dict[int, tuple[Tensor, slice]] = field(default_factory=dict)

    def put(self, part: slice, gradient: Tensor) -> None:
        """See `Sink.put`."""
        found = self.views.get(part.start)
        if found is None:
            first, end = max(part.start, self.only.start), min(part.stop, self.only.stop)
            learns = slice(first - part.start, end - part.start)
            found = self.views[part.start] = self.rows[:, first:end], learns
        here, learns = found
        slope = gradient.flatten(1)
        if slope.shape != here.shape:
            slope = slope[:, learns]
        if isinstance(self.lr, Tensor):
            here.addcmul_(slope, self.lr, value=-1)
        else:
            here.add_(slope, alpha=-self.lr)


class Op(Protocol):
    """One operation on values (k, B, *features)."""

    def forward(self, batch: Batch, *inputs: Tensor) -> tuple[Tensor, Any]:
        """The value, and what `backward` needs."""

    def backward(
        self, batch: Batch, kept: Any, grad: Tensor, sink: Sink, needed: bool
    ) -> Sequence[Tensor | None]:
        """Give the parameters' gradient to `sink`, if it wants it; return those of the inputs if
        needed.

        The sink may change the parameters: they are not read after that.
        """


@dataclass(frozen=True)
class Dense:
    """y = x W^T + b with W (k, n_out, n_in) and b (k, n_out) seen inside the rows."""

    weight: slice
    bias: slice | None
    n_in: int
    n_out: int

    def _views(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """W, its transpose and b (k, 1, n_out)."""
        found = batch.views.get(self.weight.start)
        if found is None:
            rows = batch.rows
            weight = rows[:, self.weight].view(len(rows), self.n_out, self.n_in)
            bias = None if self.bias is None else rows[:, self.bias].unsqueeze(1)
            found = batch.views[self.weight.start] = weight, weight.transpose(1, 2), bias
        return found

    def forward(self, batch: Batch, *inputs: Tensor) -> tuple[Tensor, Any]:
        x, shape = inputs[0], inputs[0].shape
        if len(shape) != 3:
            x = x.reshape(shape[0], -1, self.n_in)
        _, turned, bias = self._views(batch)
        y = torch.bmm(x, turned) if bias is None else torch.baddbmm(bias, x, turned)
        return y if len(shape) == 3 else y.view(*shape[:-1], self.n_out), x

    def backward(
        self, batch: Batch, kept: Any, grad: Tensor, sink: Sink, needed: bool
    ) -> Sequence[Tensor | None]:
        shape = grad.shape
        if len(shape) != 3:
            grad = grad.reshape(shape[0], -1, self.n_out)
        passed = None
        if needed:
            passed = torch.bmm(grad, self._views(batch)[0])
            if len(shape) != 3:
                passed = passed.view(*shape[:-1], self.n_in)
        if overlap(self.weight, sink.only):
            sink.put(self.weight, torch.bmm(grad.transpose(1, 2), kept))
        if self.bias is not None and overlap(self.bias, sink.only):
            sink.put(self.bias, grad.sum(1))
        return (passed,)


@dataclass(frozen=True)
class Lookup:
    """An embedding: y = W[x] with W (k, n, width) seen inside the rows."""

    weight: slice
    n: int
    width: int

    def _place(self, rows: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        client = torch.arange(len(rows)).view(-1, *[1] * (x.ndim - 1)).expand_as(x)
        return rows[:, self.weight].view(len(rows), self.n, self.width), (client, x)

    def forward(self, batch: Batch, *inputs: Tensor) -> tuple[Tensor, Any]:
        table, place = self._place(batch.rows, inputs[0])
        return table[place], inputs[0]

    def backward(
        self, batch: Batch, kept: Any, grad: Tensor, sink: Sink, needed: bool
    ) -> Sequence[Tensor | None]:
        if overlap(self.weight, sink.only):
            _, place = self._place(batch.rows, kept)
            found = grad.new_zeros(len(kept), self.n, self.width)
            sink.put(self.weight, found.index_put_(place, grad, accumulate=True))
        return (None,)


@dataclass(frozen=True)
class Affine:
    """y = w x + b, the second half of a norm. w and b have `shape`: the last axes of a value or,
    with `channels`, the first one of its features."""

    weight: slice
    bias: slice | None
    shape: tuple[int, ...]
    channels: bool

    def _around(self, ndim: int) -> tuple[int, int]:
        """How many axes lie before those of `shape` (the clients' not counted) and after."""
        after = ndim - 3 if self.channels else 0
        return ndim - 1 - len(self.shape) - after, after

    def _spread(self, rows: Tensor, part: slice, ndim: int) -> Tensor:
        before, after = self._around(ndim)
        return rows[:, part].view(len(rows), *[1] * before, *self.shape, *[1] * after)

    def forward(self, batch: Batch, *inputs: Tensor) -> tuple[Tensor, Any]:
        x = inputs[0]
        y = x * self._spread(batch.rows, self.weight, x.ndim)
        if self.bias is not None:
            y += self._spread(batch.rows, self.bias, x.ndim)
        return y, x

    def backward(
        self, batch: Batch, kept: Any, grad: Tensor, sink: Sink, needed: bool
    ) -> Sequence[Tensor | None]:
        before, after = self._around(grad.ndim)
        axes = [*range(1, 1 + before), *range(grad.ndim - after, grad.ndim)]
        passed = grad * self._spread(batch.rows, self.weight, grad.ndim) if needed else None
        if overlap(self.weight, sink.only):
            sink.put(self.weight, (grad * kept).sum(axes))
        if self.bias is not None and overlap(self.bias, sink.only):
            sink.put(self.bias, grad.sum(axes))
        return (passed,)


@dataclass(frozen=True)
class Drop:
    """Dropout; each client draws what it would draw if it trained alone."""

    p: float

    def forward(self, batch: Batch, *inputs: Tensor) -> tuple[Tensor, Any]:
        x = inputs[0]
        if batch.draws is None or self.p == 0:
            return x, None
        mask = torch.zeros_like(x)
        for i, n in enumerate(batch.real):
            draw = batch.draws[i]
            mask[i, :n] = torch.empty_like(x[i, :n]).bernoulli_(1 - self.p, generator=draw)
        mask /= 1 - self.p
        return x * mask, mask

    def backward(
        self, batch: Batch, kept: Any, grad: Tensor, sink: Sink, needed: bool
    ) -> Sequence[Tensor | None]:
        return (grad if kept is None else grad * kept,)


@dataclass(frozen=True)
class Rectify:
    """max(x, 0): the commonest activation, without autograd."""

    def forward(self, batch: Batch, *inputs: Tensor) -> tuple[Tensor, Any]:
        y = torch.relu(inputs[0])
        return y, y

    def backward(
        self, batch: Batch, kept: Any, grad: Tensor, sink: Sink, needed: bool
    ) -> Sequence[Tensor | None]:
        return (torch.ops.aten.threshold_backward(grad, kept, 0) if needed else None,)


@dataclass(frozen=True)
class Flat:
    """Axes `first` to `last` of values made one, the clients' not counted; without autograd."""

    first: int
    last: int

    def forward(self, batch: Batch, *inputs: Tensor) -> tuple[Tensor, Any]:
        x = inputs[0]
        return x.flatten(self.first + 1, self.last + (self.last >= 0)), x.shape

    def backward(
        self, batch: Batch, kept: Any, grad: Tensor, sink: Sink, needed: bool
    ) -> Sequence[Tensor | None]:
        return (grad.reshape(kept),)


@dataclass(frozen=True)
class Free:
    """A function without parameters that treats examples one by one: clients are more examples."""

    apply: Callable[..., Tensor]
    needed: bool = False  # as in `Node`: then autograd has to watch

    def forward(self, batch: Batch, *inputs: Tensor) -> tuple[Tensor, Any]:
        k, b = inputs[0].shape[:2]
        if batch.draws is None or not self.needed:
            y = self.apply(*[x.flatten(0, 1) for x in inputs])
            return y.view(k, b, *y.shape[1:]), None
        with torch.enable_grad():
            flat = [x.flatten(0, 1).detach().requires_grad_(x.is_floating_point()) for x in inputs]
            y = self.apply(*flat)
        return y.detach().view(k, b, *y.shape[1:]), (flat, y)

    def backward(
        self, batch: Batch, kept: Any, grad: Tensor, sink: Sink, needed: bool
    ) -> Sequence[Tensor | None]:
        flat, y = kept
        shape = grad.shape[:2]
        made = torch.autograd.grad(y, flat, grad.flatten(0, 1))
        return [g.view(*shape, *g.shape[1:]) for g in made]
