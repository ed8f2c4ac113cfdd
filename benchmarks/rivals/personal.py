"""Methods with a model of its own for every client, from Ditto to APPLE.

Plain implementations; see `world` for what they are made of.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from .world import Data, Model, World, assign, average, load, losses, pull, vector


def ditto(world: World, rounds: int, *, lam: float = 0.1) -> list[Model]:
    """Li et al. 2021, algorithm 1: FedAvg, and personal models that are held near its model."""
    own = world.copies()
    shared = copy.deepcopy(own[0])
    for _ in range(rounds):
        trained = []
        for mine, data in zip(own, world.train, strict=True):
            net = copy.deepcopy(shared)
            world.fit(net, data)
            trained.append(net)
            world.fit(mine, data, penalty=pull(mine, shared, lam))
        assign(shared.parameters(), average([t.parameters() for t in trained], world.sizes))
    return list(own)


def apfl(world: World, rounds: int, *, alpha: float = 0.25) -> list[Model]:
    """Deng, Kamani and Mahdavi 2020, algorithm 1, with a fixed share alpha of the personal model:
    w <- w - lr grad f(w); v <- v - lr grad_v f(alpha v + (1 - alpha) w), both from the same w."""
    net, mixed = world.make(), world.make()
    w = vector(net)
    personal = [w.clone() for _ in world.train]

    def gradient(one: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = functional.cross_entropy(one(x), y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(one.parameters()))])

    for _ in range(rounds):
        ends = []
        for i, data in enumerate(world.train):
            local, v = w.clone(), personal[i]
            for _ in range(world.epochs):
                for x, y, _ in world.loader(data):
                    load(net, local)
                    load(mixed, alpha * v + (1 - alpha) * local)
                    of_local, of_mixed = gradient(net, x, y), gradient(mixed, x, y)
                    local = local - world.lr * of_local
                    v = v - world.lr * alpha * of_mixed
            personal[i] = v
            ends.append(local)
        n = torch.tensor(world.sizes).float()
        w = ((n / n.sum())[:, None] * torch.stack(ends)).sum(0)
    return [_net(world, alpha * v + (1 - alpha) * w) for v in personal]


def fedamp(
    world: World, rounds: int, *, sigma: float = 25.0, own: float | None = None, mu: float = 0.01
) -> list[Model]:
    """Huang et al. 2021, HeurFedAMP: attention by the cosine of models, then a proximal step.

    The proximal step, a minimum in the paper, is some epochs from the centre that is pulled to.
    """
    nets = world.copies()
    m = len(nets)
    mine = 1 / m if own is None else own
    clouds = [vector(net) for net in nets]
    for _ in range(rounds):
        for net, cloud, data in zip(nets, clouds, world.train, strict=True):
            load(net, cloud)
            world.fit(net, data, penalty=pull(net, net, mu))
        models = [vector(net) for net in nets]
        for i in range(m):
            others = [j for j in range(m) if j != i]
            near = [functional.cosine_similarity(models[i], models[j], dim=0) for j in others]
            xi = torch.exp(sigma * torch.stack(near))
            xi = (1 - mine) * xi / xi.sum()
            mixed = torch.stack([xi[at] * models[j] for at, j in enumerate(others)]).sum(0)
            clouds[i] = mine * models[i] + mixed
    return list(nets)


def fedfomo(
    world: World, rounds: int, *, others: int = 5, epsilon: float = 0.3, decay: float = 0.05
) -> list[Model]:
    """Zhang et al. 2021: first-order weights of downloaded models on validation data; models are
    downloaded by affinity, epsilon-greedily.

    Of a client's own, the model it started from is the theta of the paper's equation 4, and the
    one it has trained is among those weighed.
    """
    net = world.make()
    before = [vector(net) for _ in world.train]
    trained = [one.clone() for one in before]
    m = len(before)
    liking = torch.zeros(m, m)

    def loss(weights: Tensor, client: int) -> Tensor:
        load(net, weights)
        return losses(net, world.validation[client]).mean()

    def downloads(client: int, chance: float) -> list[int]:
        rest = [j for j in torch.randperm(m, generator=world.draw).tolist() if j != client]
        # Stable: models that are liked alike come in random order.
        rest.sort(key=lambda j: -float(liking[client, j]))
        chosen, rest = rest[:others], rest[others:]
        for at in range(len(chosen)):
            if rest and float(torch.rand((), generator=world.draw)) < chance:
                j = int(torch.randint(len(rest), (), generator=world.draw))
                chosen[at] = rest.pop(j)
        return chosen

    def moved(client: int, chosen: list[int], note: bool) -> Tensor:
        theta = before[client]
        base = loss(theta, client)
        step, total = torch.zeros_like(theta), 0.0
        for j in [*chosen, client]:
            away = trained[j] - theta
            if not away.any():
                continue
            weight = float((base - loss(trained[j], client)) / away.norm())
            if note and j != client:
                liking[client, j] += weight
            step += max(weight, 0.0) * away
            total += max(weight, 0.0)
        return theta + step / total if total > 0 else theta.clone()

    for t in range(rounds):
        chance = max(0.0, epsilon - decay * t)
        starts = [moved(i, downloads(i, chance) if t else [], note=True) for i in range(m)]
        for i, data in enumerate(world.train):
            load(net, starts[i])
            world.fit(net, data)
            before[i], trained[i] = starts[i], vector(net)
    chance = max(0.0, epsilon - decay * rounds)
    return [_net(world, moved(i, downloads(i, chance), note=False)) for i in range(m)]


def fedala(world: World, rounds: int, *, share: float = 0.8, eta: float = 1.0) -> list[Model]:
    """Zhang et al. 2023, algorithm 1, that mixes the last layer: weights W of each of its
    parameters, W <- clip(W - eta grad * (global - local)), learned until they settle at first and
    by one pass in each later round. Settled: the last ten passes' losses have a standard deviation
    below 0.1, as in the authors' code."""
    nets = world.copies()
    shared = copy.deepcopy(nets[0])
    weights: list[list[Tensor]] = [[] for _ in nets]

    def start(i: int, data: Data) -> nn.Module:
        mixed = copy.deepcopy(shared)
        top = _top(mixed)
        local = [p.detach().clone() for p in _top(nets[i])]
        whole = [p.detach().clone() for p in top]
        first = not weights[i]
        weights[i] = weights[i] or [torch.ones_like(p) for p in top]
        few = torch.randperm(len(data[1]), generator=world.draw)[: int(share * len(data[1]))]
        past: list[float] = []

        def mix() -> None:
            parts = zip(local, whole, weights[i], strict=True)
            assign(top, [a + (b - a) * w for a, b, w in parts])

        mix()
        while True:
            for x, y, _ in world.loader((data[0][few], data[1][few])):
                loss = functional.cross_entropy(mixed(x), y)
                slopes = torch.autograd.grad(loss, top)
                parts = zip(weights[i], slopes, whole, local, strict=True)
                weights[i] = [(w - eta * g * (b - a)).clamp(0, 1) for w, g, b, a in parts]
                mix()
            past.append(float(loss.detach()))
            settled = len(past) > 10 and float(torch.tensor(past[-10:]).std(correction=0)) < 0.1
            if not first or settled or len(past) == 100:
                return mixed

    for t in range(rounds):
        for i, data in enumerate(world.train):
            nets[i] = start(i, data) if t else copy.deepcopy(shared)
            world.fit(nets[i], data)
        assign(shared.parameters(), average([net.parameters() for net in nets], world.sizes))
    return [start(i, data) for i, data in enumerate(world.train)]


def apple(
    world: World, rounds: int, *, weight_lr: float = 0.001, mu: float = 0.1, fade: int = 12
) -> list[Model]:
    """Luo and Wu 2022, algorithm 1, with the exponential scheduler: core and weights move together
    in every step, each down the gradient of the loss of the weighted sum of all cores.

    The weights start at the clients' shares of the examples, and the core's learning rate is that
    of the run times the square root of the number of clients, as the library's is.
    """
    net = world.make()
    m = len(world.train)
    n = torch.tensor(world.sizes).float()
    first = n / n.sum()
    weights = [first.clone() for _ in range(m)]
    cores = vector(net).repeat(m, 1)
    for t in range(rounds):
        fading = 0.001 ** (t / fade) if t < fade else 0.0
        ends = []
        for i, data in enumerate(world.train):
            known, p = cores.clone(), weights[i]
            for _ in range(world.epochs):
                for x, y, _ in world.loader(data):
                    load(net, p @ known)
                    loss = functional.cross_entropy(net(x), y)
                    grads = torch.autograd.grad(loss, list(net.parameters()))
                    slope = torch.cat([g.flatten() for g in grads])
                    of_weights = known @ slope + fading * mu * (p - first)
                    known[i] -= world.lr * m**0.5 * p[i] * slope
                    p = p - weight_lr * of_weights
            weights[i] = p
            ends.append(known[i])
        cores = torch.stack(ends)
    return [_net(world, p @ cores) for p in weights]


def _top(net: nn.Module) -> list[nn.Parameter]:
    return list([one for one in net.modules() if isinstance(one, nn.Linear)][-1].parameters())


def _net(world: World, weights: Tensor) -> nn.Module:
    net = world.make()
    load(net, weights)
    return net
