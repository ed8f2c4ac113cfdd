"""A network computed for many clients at once, each with weights of its own.

The module is traced into a graph of the operations in `ops`. A module with anything else in it
cannot be stacked, and it is named; such a one is trained one client after another.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from .ops import Affine, Batch, Dense, Drop, Flat, Free, Lookup, Op, Rectify, Sink, overlap
from .params import Layout

ELEMENTWISE_LAYERS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Softsign, nn.Tanh,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS = frozenset(
    {
        torch.abs, torch.add, torch.cos, torch.div, torch.exp, torch.mul, torch.neg, torch.relu,
        torch.sigmoid, torch.sin, torch.square, torch.sub, torch.tanh,
        operator.add, operator.mul, operator.neg, operator.sub, operator.truediv,
        functional.celu, functional.elu, functional.gelu, functional.hardswish,
        functional.hardtanh, functional.leaky_relu, functional.mish, functional.relu,
        functional.relu6, functional.selu, functional.sigmoid, functional.silu,
        functional.softplus, functional.softsign, functional.tanh,
    }
)  # fmt: skip
ELEMENTWISE_METHODS = frozenset({"abs", "exp", "neg", "relu", "sigmoid", "square", "tanh"})


@dataclass(frozen=True)
class Node:
    """An operation and the values it takes: their numbers, 0 being the network's input."""

    op: Op
    inputs: tuple[int, ...]
    needed: bool = False  # whether a gradient of its inputs is of use to a layer before it


@dataclass(frozen=True)
class StackedNet:
    """A graph of operations that reads its parameters from rows (k, P)."""

    nodes: tuple[Node, ...]
    draws: bool  # whether training draws random numbers

    @classmethod
    def of(cls, module: nn.Module, layout: Layout) -> StackedNet | str:
        """Translate `module`, or say in words what in it cannot be stacked."""
        for entry in layout.entries:
            if entry.kind != "parameter":
                owner = entry.name.rpartition(".")[0]
                kind = type(module.get_submodule(owner)).__name__
                return f'layer "{owner}" ({kind}), which has buffers,'
        was = module.training
        try:
            # Inside a Sequential, so that a module which is one layer is seen as a layer.
            graphs = [fx.Tracer().trace(nn.Sequential(module.train(on))) for on in (True, False)]
        except Exception as error:
            # Tracing runs the caller's own forward; whatever it raises, one by one still works.
            return f"{type(module).__name__}, whose forward cannot be traced ({error})"
        finally:
            module.train(was)
        if str(graphs[0]) != str(graphs[1]):
            return f"{type(module).__name__}, which computes something else when it is trained,"
        return _Translation(module, layout).run(graphs[0])

    def training(self, part: slice) -> StackedNet:
        """The same network, which computes no gradient that only other parameters need."""
        learned = [False]  # by value: does it depend on a parameter of that part?
        nodes = []
        for node in self.nodes:
            needed = any(learned[i] for i in node.inputs)
            learned.append(needed or any(overlap(own, part) for own in _columns(node.op)))
            op = replace(node.op, needed=needed) if isinstance(node.op, Free) else node.op
            nodes.append(Node(op, node.inputs, needed))
        return replace(self, nodes=tuple(nodes))

    def parted(self, part: slice) -> tuple[StackedNet, StackedNet]:
        """The layers before all that depend on parameters of `part`, and the others: while only
        these are trained, what those say of an example stays the same. No layers, if it does not.
        """
        weighty = [_columns(node.op) for node in self.nodes]
        learns = [any(overlap(own, part) for own in columns) for columns in weighty]
        cut = 0 if self.draws or True not in learns else learns.index(True)
        # Later layers may take the last value only.
        while any(0 <= i < cut for node in self.nodes[cut:] for i in node.inputs):
            cut -= 1
        cut *= any(weighty[:cut])  # what has no parameters costs next to nothing
        rest = [replace(n, inputs=tuple(i - cut for i in n.inputs)) for n in self.nodes[cut:]]
        return replace(self, nodes=self.nodes[:cut]), replace(self, nodes=tuple(rest))

    def forward(self, rows: Tensor, x: Tensor) -> Tensor:
        """Outputs (k, B, outputs) for inputs x (k, B, *features), in evaluation mode."""
        values = [x]
        batch = Batch(rows)
        for node in self.nodes:
            values.append(node.op.forward(batch, *[values[i] for i in node.inputs])[0])
        return values[-1]

    def gradient(
        self,
        batch: Batch,
        x: Tensor,
        y: Tensor,
        share: Tensor | Callable[[Tensor], Tensor],
        sink: Sink,
        loss: str,
    ) -> None:
        """Give the gradient of sum_b share_b loss_b of each client to `sink`.

        Args:
            x: (k, B, *features). y: (k, B) classes or (k, B, t) targets.
            share: (k, B), each example's share of the mean; 0 for a padded place. Or what makes
                it of the outputs (k, B, outputs).
        """
        values, kept = [x], []
        for node in self.nodes:
            value, keep = node.op.forward(batch, *[values[i] for i in node.inputs])
            values.append(value)
            kept.append(keep)
        grads: list[Tensor | None] = [None] * len(values)
        if not isinstance(share, Tensor):
            share = share(values[-1])
        grads[-1] = _loss_gradient(values[-1], y, share, loss)
        for place in range(len(self.nodes) - 1, -1, -1):
            node, grad = self.nodes[place], grads[place + 1]
            if grad is None:
                continue
            grads[place + 1] = None
            passed = node.op.backward(batch, kept[place], grad, sink, node.needed)
            for source, part in zip(node.inputs, passed, strict=True):
                if part is not None:
                    earlier = grads[source]
                    grads[source] = part if earlier is None else earlier + part


def _loss_gradient(output: Tensor, y: Tensor, share: Tensor, loss: str) -> Tensor:
    if loss == "mse":
        return (output - y) * (share.unsqueeze(2) * (2.0 / y.shape[2]))
    # Over an axis that is not the last: over the last one, which is short, it takes five times as
    # long.
    grad = torch.softmax(output.transpose(1, 2), dim=1).transpose(1, 2)
    minus = _minus_one(grad.dtype).expand(*y.shape, 1)
    return grad.scatter_add_(2, y.unsqueeze(2), minus).mul_(share.unsqueeze(2))


@cache
def _minus_one(dtype: torch.dtype) -> Tensor:
    return torch.full((1, 1, 1), -1.0, dtype=dtype)


def _columns(op: Op) -> list[slice]:
    """Where an operation's parameters are in a row."""
    own = (getattr(op, name, None) for name in ("weight", "bias"))
    return [part for part in own if part is not None]


class _Translation:
    """From a traced graph to nodes; `run` returns the reason where there is no way."""

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self.module = module
        self.places = {e.name: slice(e.start, e.stop) for e in layout.entries}
        self.size = layout.size
        self.nodes: list[Node] = []
        self.called: set[str] = set()
        self.used: set[str] = set()

    def run(self, graph: fx.Graph) -> StackedNet | str:
        number: dict[fx.Node, int] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                if number:
                    return "a module with several inputs"
                number[node] = 0
            elif node.op == "output":
                if node.args[0] not in number or number[node.args[0]] != len(self.nodes):
                    return "a module whose output is not one tensor"
            else:
                reason = self._add(node, number)
                if reason is not None:
                    return reason
                number[node] = len(self.nodes)
        if self.used != set(self.places):
            missing = sorted(set(self.places) - self.used)[0]
            return f'a module that does not use "{missing}"'
        made = StackedNet(tuple(self.nodes), any(isinstance(n.op, Drop) for n in self.nodes))
        return made.training(slice(0, self.size))

    def _add(self, node: fx.Node, number: dict[fx.Node, int]) -> str | None:
        inputs = tuple(number[n] for n in node.all_input_nodes if n in number)
        if node.op == "call_module":
            return self._layer(str(node.target).partition(".")[2], inputs)
        target: Any = node.target
        if node.op == "get_attr":
            return f'the parameter "{target.partition(".")[2]}", which is outside a known layer,'
        known = (node.op == "call_function" and target in ELEMENTWISE_FUNCTIONS) or (
            node.op == "call_method" and target in ELEMENTWISE_METHODS
        )
        if not (known or _keeps_examples(node)):
            return f'"{node.name}" ({getattr(target, "__name__", target)})'
        self._put(Free(_bound(node)), inputs)
        return None

    def _put(self, op: Op, inputs: tuple[int, ...]) -> None:
        self.nodes.append(Node(op, inputs))

    def _own(self, name: str) -> slice:
        self.used.add(name)
        return self.places[name]

    def _layer(self, name: str, inputs: tuple[int, ...]) -> str | None:
        layer = self.module.get_submodule(name)
        kind = type(layer).__name__
        named = f'layer "{name}" ({kind})' if name else f"a module of class {kind}"
        prefix = f"{name}." if name else ""
        own = {leaf for leaf, _ in layer.named_parameters()}
        if own and name in self.called:
            return f"{named}, used twice,"
        self.called.add(name)
        if any(f"{prefix}{leaf}" not in self.places for leaf in own):
            return f"{named} with a frozen or shared parameter"
        bias = f"{prefix}bias" if "bias" in own else None
        if type(layer) is nn.Linear:
            part = None if bias is None else self._own(bias)
            weight = self._own(f"{prefix}weight")
            self._put(Dense(weight, part, layer.in_features, layer.out_features), inputs)
        elif type(layer) is nn.Embedding and layer.max_norm is None and layer.padding_idx is None:
            weight = self._own(f"{prefix}weight")
            self._put(Lookup(weight, layer.num_embeddings, layer.embedding_dim), inputs)
        elif type(layer) in (nn.LayerNorm, nn.GroupNorm):
            plain: Any = copy.deepcopy(layer)
            shape = tuple(plain.weight.shape) if "weight" in own else ()
            plain.weight = plain.bias = None
            self._put(Free(plain), inputs)
            if own:
                part = None if bias is None else self._own(bias)
                affine = Affine(
                    self._own(f"{prefix}weight"), part, shape, type(layer) is nn.GroupNorm
                )
                self._put(affine, (len(self.nodes),))
        elif type(layer) is nn.Dropout:
            self._put(Drop(layer.p), inputs)
        elif type(layer) is nn.ReLU:
            self._put(Rectify(), inputs)
        elif type(layer) is nn.Flatten and layer.start_dim >= 1:
            self._put(Flat(layer.start_dim, layer.end_dim), inputs)
        elif type(layer) in (*ELEMENTWISE_LAYERS, nn.Identity) or (
            type(layer) is nn.Unflatten and isinstance(layer.dim, int) and layer.dim >= 1
        ):
            plain = copy.deepcopy(layer)
            if hasattr(plain, "inplace"):
                plain.inplace = False
            self._put(Free(plain), inputs)
        else:
            return named
        return None


def _keeps_examples(node: fx.Node) -> bool:
    """Flattening or averaging axes that are named and are not the examples' own (0)."""
    if node.target in (torch.flatten, "flatten"):
        start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        return isinstance(start, int) and start >= 1
    if node.target in (torch.mean, "mean", torch.sum, "sum"):
        axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        axes = axes if isinstance(axes, Sequence) else [axes]
        return all(isinstance(axis, int) and axis >= 1 for axis in axes)
    return False


def _bound(node: fx.Node) -> Callable[..., Tensor]:
    """The function of `node`, taking only its inputs; its constants are filled in."""
    places = {n: i for i, n in enumerate(node.all_input_nodes)}

    def apply(*inputs: Tensor) -> Tensor:
        def fill(value: Any) -> Any:
            return inputs[places[value]] if isinstance(value, fx.Node) else value

        args = [fill(value) for value in node.args]
        kwargs = {key: fill(value) for key, value in node.kwargs.items() if key != "inplace"}
        target: Any = node.target
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)  # type: ignore[no-any-return]
        return target(*args, **kwargs)  # type: ignore[no-any-return]

    return apply
