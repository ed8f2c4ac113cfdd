"""A network of dense layers computed for many clients at once, each with weights of its own.

Forward and backward are written by hand over rows (k, P): one batched product serves all clients of
a layer. Only chains of the layers listed in `_PARTS` can be stacked; others train one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .params import Layout


class _Part(Protocol):
    def forward(self, rows: Tensor, x: Tensor) -> tuple[Tensor, object]:
        """Rows (k, P) and inputs (k, B, *features) to outputs, and what `backward` needs."""

    def backward(
        self, rows: Tensor, kept: object, grad: Tensor, out: Tensor, need_input: bool
    ) -> Tensor | None:
        """Write the parameters' gradient into out (k, P); return the gradient of the input."""


@dataclass(frozen=True)
class _Dense:
    """y = x W^T + b with W (k, out, in) and b (k, out) seen inside the rows."""

    weight: tuple[int, int]
    bias: tuple[int, int] | None
    n_in: int
    n_out: int

    def _weight(self, rows: Tensor) -> Tensor:
        start, stop = self.weight
        return rows[:, start:stop].view(len(rows), self.n_out, self.n_in)

    def forward(self, rows: Tensor, x: Tensor) -> tuple[Tensor, object]:
        shape = x.shape
        x = x.reshape(shape[0], -1, self.n_in)
        weight = self._weight(rows).transpose(1, 2)
        if self.bias is None:
            y = torch.bmm(x, weight)
        else:
            y = torch.baddbmm(rows[:, slice(*self.bias)].unsqueeze(1), x, weight)
        return y.view(*shape[:-1], self.n_out), x

    def backward(
        self, rows: Tensor, kept: object, grad: Tensor, out: Tensor, need_input: bool
    ) -> Tensor | None:
        x = kept
        if not isinstance(x, Tensor):
            raise TypeError("dense layers keep their input")
        shape = grad.shape
        grad = grad.reshape(shape[0], -1, self.n_out)
        start, stop = self.weight
        torch.bmm(
            grad.transpose(1, 2), x, out=out[:, start:stop].view(len(out), self.n_out, self.n_in)
        )
        if self.bias is not None:
            torch.sum(grad, dim=1, out=out[:, slice(*self.bias)])
        if not need_input:
            return None
        return torch.bmm(grad, self._weight(rows)).view(*shape[:-1], self.n_in)


@dataclass(frozen=True)
class _Pointwise:
    """An activation; `slope(x, y)` is its derivative, from its input and output."""

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]

    def forward(self, rows: Tensor, x: Tensor) -> tuple[Tensor, object]:
        y = self.apply(x)
        return y, (x, y)

    def backward(
        self, rows: Tensor, kept: object, grad: Tensor, out: Tensor, need_input: bool
    ) -> Tensor | None:
        if not isinstance(kept, tuple):
            raise TypeError("activations keep their input and output")
        return grad * self.slope(*kept) if need_input else None


@dataclass(frozen=True)
class _Flatten:
    """All features of an example in one axis."""

    def forward(self, rows: Tensor, x: Tensor) -> tuple[Tensor, object]:
        return x.flatten(2), x.shape

    def backward(
        self, rows: Tensor, kept: object, grad: Tensor, out: Tensor, need_input: bool
    ) -> Tensor | None:
        if not isinstance(kept, torch.Size):
            raise TypeError("flatten keeps a shape")
        return grad.view(kept) if need_input else None


def _gelu_slope(x: Tensor, y: Tensor) -> Tensor:
    normal = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return normal + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _silu_slope(x: Tensor, y: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _activation(module: nn.Module) -> _Pointwise | None:
    # The exact class: a subclass may compute something else.
    if type(module) is nn.ReLU:
        return _Pointwise(torch.relu, lambda x, y: y > 0)
    if type(module) is nn.Tanh:
        return _Pointwise(torch.tanh, lambda x, y: 1 - y * y)
    if type(module) is nn.Sigmoid:
        return _Pointwise(torch.sigmoid, lambda x, y: y * (1 - y))
    if type(module) is nn.GELU and module.approximate == "none":
        return _Pointwise(functional.gelu, _gelu_slope)
    if type(module) is nn.SiLU:
        return _Pointwise(functional.silu, _silu_slope)
    return None


@dataclass(frozen=True)
class StackedNet:
    """A chain of parts that reads its parameters from rows (k, P)."""

    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, module: nn.Module, layout: Layout) -> StackedNet | str:
        """Translate `module`, or say in words which layer of it cannot be stacked."""
        places = {e.name: (e.start, e.stop) for e in layout.entries}
        parts: list[_Part] = []
        for name, layer in _chain(module, ""):
            prefix = f"{name}." if name else ""
            if type(layer) is nn.Identity:
                continue
            if type(layer) is nn.Linear and f"{prefix}weight" in places:
                bias = places.get(f"{prefix}bias")
                if (bias is None) != (layer.bias is None):
                    return f'"{name}" with a frozen bias'
                parts.append(
                    _Dense(places[f"{prefix}weight"], bias, layer.in_features, layer.out_features)
                )
            elif type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
                parts.append(_Flatten())
            elif (activation := _activation(layer)) is not None:
                parts.append(activation)
            else:
                kind = type(layer).__name__
                return f'layer "{name}" ({kind})' if name else f"a module of class {kind}"
        if not parts or not all(e.kind == "parameter" for e in layout.entries):
            return "a module with buffers or without layers"
        return cls(tuple(parts))

    def forward(self, rows: Tensor, x: Tensor) -> Tensor:
        """Outputs (k, B, outputs) for inputs x (k, B, *features)."""
        for part in self.parts:
            x, _ = part.forward(rows, x)
        return x

    def gradient(
        self, rows: Tensor, x: Tensor, y: Tensor, share: Tensor, out: Tensor, loss: str
    ) -> None:
        """Write the gradient of sum_b share_b loss_b of each client into out (k, P).

        Args:
            rows: (k, P). x: (k, B, *features). y: (k, B) classes or (k, B, t) targets.
            share: (k, B), each example's share of the mean; 0 for a padded place.
        """
        kept: list[object] = []
        for part in self.parts:
            x, keep = part.forward(rows, x)
            kept.append(keep)
        if loss == "cross-entropy":
            grad = torch.softmax(x, dim=-1)
            grad.scatter_add_(2, y.unsqueeze(2), grad.new_full((1, 1, 1), -1.0).expand(*y.shape, 1))
            grad *= share.unsqueeze(2)
        else:
            grad = (x - y) * (share.unsqueeze(2) * (2.0 / y.shape[2]))
        for place in range(len(self.parts) - 1, -1, -1):
            passed = self.parts[place].backward(rows, kept[place], grad, out, place > 0)
            if passed is not None:
                grad = passed


def _chain(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The layers of nested nn.Sequential in order; any other module as it is."""
    if type(module) is not nn.Sequential:
        return [(name, module)]
    prefix = f"{name}." if name else ""
    # Not named_children(): it names a layer that is used twice only once.
    return [
        pair
        for child, part in module._modules.items()
        if part is not None
        for pair in _chain(part, prefix + child)
    ]
