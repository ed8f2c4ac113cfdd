"""Methods whose client mixes several global models, outputs or weights: FedEM, MoE and PPFL.

Plain implementations; see `world` for what they are made of.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .world import Data, Model, World, assign, average, load, losses, vector


@dataclass(frozen=True)
class Mixed:
    """A client's mixture: the mean of its models' class probabilities, with its shares (d,)."""

    models: Sequence[nn.Module]
    shares: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        each = torch.stack([model(x).softmax(1) for model in self.models])
        return (self.shares[:, None, None] * each).sum(0)


def fedem(world: World, rounds: int, *, d: int = 3, refresh: bool = True) -> list[Model]:
    """Marfoq et al. 2021, algorithm 1: equations 7 (E-step), 8 (shares), 9 (models).

    At last every client does steps 7 and 8 with the final models, if `refresh`; it would otherwise
    mix them by its shares of the models before.
    """
    models = [world.make() for _ in range(d)]
    shares = [torch.full((d,), 1 / d) for _ in world.train]

    def duties(client: int) -> Tensor:
        each = torch.stack([losses(model, world.train[client]) for model in models])
        # From 1e-30: the logarithm of a share of 0 would be that of no model.
        joint = shares[client].clamp_min(1e-30)[:, None] * torch.exp(-each)
        return joint / joint.sum(0).clamp_min(1e-30)

    for _ in range(rounds):
        trained: list[list[nn.Module]] = [[] for _ in models]
        for i, data in enumerate(world.train):
            q = duties(i)
            shares[i] = q.mean(1)
            for j, model in enumerate(models):
                net = copy.deepcopy(model)
                world.fit(net, data, weight=q[j])
                trained[j].append(net)
        for model, nets in zip(models, trained, strict=True):
            assign(model.parameters(), average([net.parameters() for net in nets], world.sizes))
    if refresh:
        shares = [duties(i).mean(1) for i in range(len(shares))]
    return [Mixed(models, one) for one in shares]


class Gated(nn.Module):
    """Experts and a gate: log sum_j g_j(x) p_j(y | x), with g the softmax of a linear function."""

    def __init__(self, experts: Sequence[nn.Module], gate: nn.Linear) -> None:
        super().__init__()
        self.experts, self.gate = nn.ModuleList(experts), gate

    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([expert(x).log_softmax(1) for expert in self.experts], 1)
        return (self.gate(x.flatten(1)).log_softmax(1)[..., None] + each).logsumexp(1)


def moe(world: World, rounds: int, *, d: int = 4, gate_lr: float = 0.1) -> list[Model]:
    """Jacobs et al. 1991, their negative log-likelihood; the experts are averaged as by FedAvg.

    A client's gate stays with it, starts at equal shares, and learns at `gate_lr` of the learning
    rate of the experts.
    """
    experts = [world.make() for _ in range(d)]
    gates = [nn.Linear(x[0].numel(), d) for x, _ in world.train]
    for gate in gates:
        assign(gate.parameters(), [torch.zeros_like(p) for p in gate.parameters()])
    for _ in range(rounds):
        trained = []
        for gate, data in zip(gates, world.train, strict=True):
            net = Gated(copy.deepcopy(experts), gate)
            groups = [
                {"params": list(net.experts.parameters())},
                {"params": list(gate.parameters()), "lr": gate_lr * world.lr},
            ]
            optimizer = torch.optim.SGD(groups, lr=world.lr)
            for _ in range(world.epochs):
                for x, y, _ in world.loader(data):
                    optimizer.zero_grad()
                    functional.nll_loss(net(x), y).backward()
                    optimizer.step()
            trained.append(net.experts)
        for j, expert in enumerate(experts):
            mean = average([nets[j].parameters() for nets in trained], world.sizes)
            assign(expert.parameters(), mean)
    return [Gated(experts, gate) for gate in gates]


def ppfl(world: World, rounds: int, *, d: int = 4, membership_lr: float = 0.3) -> list[Model]:
    """Di et al. 2023: a client's weights are sum_j c_j models_j, with its membership c (d,).

    In each round c moves by mirror descent, c_j <- c_j exp(-membership_lr df/dc_j) / sum, with the
    models fixed; then all d models by SGD on the same f, with c fixed; the server averages each
    model over all clients. As in the library, a client moves c when it receives models, so that at
    last it moves once more; no clients are known to be alike.
    """
    net = world.make()
    models = torch.stack([vector(world.make()) for _ in range(d)])
    memberships = [torch.full((d,), 1 / d) for _ in world.train]
    n = torch.tensor(world.sizes).float()

    def gradient(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        load(net, weights)
        grads = torch.autograd.grad(functional.cross_entropy(net(x), y), list(net.parameters()))
        return torch.cat([g.flatten() for g in grads])

    def moved(c: Tensor, data: Data) -> Tensor:
        for _ in range(world.epochs):
            for x, y, _ in world.loader(data):
                slope = models @ gradient(c @ models, x, y)
                c = torch.softmax(c.log() - membership_lr * slope, 0)
        return c

    for _ in range(rounds):
        memberships = [moved(c, data) for c, data in zip(memberships, world.train, strict=True)]
        ends = []
        for c, data in zip(memberships, world.train, strict=True):
            mine = models.clone()
            for _ in range(world.epochs):
                for x, y, _ in world.loader(data):
                    # Of f(sum_j c_j models_j) by models_j.
                    mine -= world.lr * torch.outer(c, gradient(c @ mine, x, y))
            ends.append(mine)
        models = torch.einsum("i,ijp->jp", n / n.sum(), torch.stack(ends))
    used: list[Model] = []
    for c, data in zip(memberships, world.train, strict=True):
        own = world.make()
        load(own, moved(c, data) @ models)
        used.append(own)
    return used
