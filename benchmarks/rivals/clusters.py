"""Methods with several global models: IFCA, FedEM, FeSEM and CFL.

Plain implementations; see `world` for what they are made of.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor, nn

from .world import Model, World, assign, average, load, losses, vector


def ifca(world: World, rounds: int, *, d: int = 4) -> list[Model]:
    """Ghosh et al. 2020, algorithm 1 with model averaging, from d random models."""
    models = [world.make() for _ in range(d)]

    def nearest(client: int) -> int:
        found = [float(losses(model, world.train[client]).mean()) for model in models]
        return found.index(min(found))

    for _ in range(rounds):
        trained: list[list[nn.Module]] = [[] for _ in models]
        share: list[list[int]] = [[] for _ in models]
        for i, data in enumerate(world.train):
            j = nearest(i)
            net = copy.deepcopy(models[j])
            world.fit(net, data)
            trained[j].append(net)
            share[j].append(len(data[1]))
        for model, nets, n in zip(models, trained, share, strict=True):
            if nets:
                assign(model.parameters(), average([net.parameters() for net in nets], n))
    return [models[nearest(i)] for i in range(len(world.train))]


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


def fesem(world: World, rounds: int, *, d: int = 4) -> list[Model]:
    """Xie et al. 2021, algorithm 1, as it stands: random centres, random weights of each client.

    E-step: a client belongs to the nearest centre; M-step: a centre is the mean of its clients'
    weights, and stays if it has none; then each client trains from its centre.
    """
    net = world.make()
    centres = torch.stack([vector(world.make()) for _ in range(d)])
    clients = torch.stack([vector(world.make()) for _ in world.train])
    for _ in range(rounds):
        belongs = _nearest(clients, centres)
        centres = _means(clients, belongs, centres)
        for i, data in enumerate(world.train):
            load(net, centres[belongs[i]])
            world.fit(net, data)
            clients[i] = vector(net)
    # What a server would send next.
    belongs = _nearest(clients, centres)
    return _nets(world, _means(clients, belongs, centres)[belongs])


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points.double(), centres.double()).argmin(1)


def _means(points: Tensor, belongs: Tensor, before: Tensor) -> Tensor:
    found = [points[belongs == j].mean(0) for j in range(len(before))]
    return torch.stack([m if m.isfinite().all() else b for m, b in zip(found, before, strict=True)])


def _nets(world: World, weights: Tensor) -> list[Model]:
    made: list[Model] = []
    for one in weights:
        net = world.make()
        load(net, one)
        made.append(net)
    return made


def cfl(
    world: World, rounds: int, *, eps1: float = 0.4, eps2: float = 0.25, warm: int = 10
) -> list[Model]:
    """Sattler, Mueller and Samek 2021, algorithm 1: a cluster is parted in two when its mean update
    is short and some client's is long, by complete linkage on cosines.

    The paper's thresholds are lengths, which depend on the network: here eps1 is a share of the
    cluster's longest update, and eps2 of the longest of the first round.
    """
    net = world.make()
    models = [vector(net)]
    clusters = [list(range(len(world.train)))]
    n = torch.tensor(world.sizes).float()
    first = 0.0
    for t in range(rounds):
        grown: list[list[int]] = []
        moved: list[Tensor] = []
        longest_now = 0.0
        for members, model in zip(clusters, models, strict=True):
            updates = []
            for i in members:
                load(net, model)
                world.fit(net, world.train[i])
                updates.append(vector(net) - model)
            moves, share = torch.stack(updates), n[members]
            longest = float(moves.norm(dim=1).max())
            longest_now = max(longest_now, longest)
            mean = (share[:, None] * moves).sum(0) / share.sum()
            parts = [torch.arange(len(members))]
            first = first or longest_now
            short = float(mean.norm()) < eps1 * longest
            if t >= warm and len(members) > 2 and short and longest > eps2 * first:
                parts = _halves(moves)
            for part in parts:
                weight = share[part] / share[part].sum()
                grown.append([members[p] for p in part])
                moved.append(model + (weight[:, None] * moves[part]).sum(0))
        clusters, models = grown, moved
    weights = torch.empty(len(world.train), len(models[0]))
    for members, model in zip(clusters, models, strict=True):
        weights[members] = model
    return _nets(world, weights)


def _halves(moves: Tensor) -> list[Tensor]:
    unit = moves / moves.norm(dim=1, keepdim=True)
    apart = (1 - unit @ unit.T).clamp_min(0).double().fill_diagonal_(0)
    apart = (apart + apart.T) / 2
    side = fcluster(linkage(squareform(apart.numpy()), "complete"), 2, "maxclust")
    return [torch.from_numpy((side == s).nonzero()[0]) for s in (1, 2)]
