"""Methods with several global models, of which a client uses one: IFCA, FeSEM and CFL.

Plain implementations; see `world` for what they are made of.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.cluster.vq import kmeans, vq
from scipy.spatial.distance import squareform
from torch import Tensor, nn

from .world import Model, World, assign, average, load, losses, vector


def ifca(world: World, rounds: int, *, d: int = 4) -> list[Model]:
    """Ghosh et al. 2020, algorithm 1 with model averaging, from d random models."""
    return _ifca(world, rounds, [world.make() for _ in range(d)])


def ifca_warm(world: World, rounds: int, *, d: int = 4, warm: int = 5) -> list[Model]:
    """The same from models that FedAvg has made: in the last of `warm` rounds, the clients' updates
    are put in d clusters by k-means, and each cluster's mean update makes a model."""
    net = world.make()
    model = vector(net)
    n = torch.tensor(world.sizes).float()
    for t in range(min(warm, rounds)):
        ends = []
        for data in world.train:
            load(net, model)
            world.fit(net, data)
            ends.append(vector(net))
        moves = torch.stack(ends) - model
        if t + 1 == warm:
            points = moves.double().numpy()
            # The best of ten starts.
            centres, _ = kmeans(points, d, iter=10, seed=world.seed())
            label = torch.from_numpy(vq(points, centres)[0])
            shares = [torch.where(label == j, n, 0.0) for j in label.unique()]
            made = [model + (one / one.sum()) @ moves for one in shares]
            return _ifca(world, rounds - warm, _networks(world, torch.stack(made)))
        model = model + (n / n.sum()) @ moves
    return list(_networks(world, model.repeat(len(world.train), 1)))


def _ifca(world: World, rounds: int, models: Sequence[nn.Module]) -> list[Model]:
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
    return list(_networks(world, _means(clients, belongs, centres)[belongs]))


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points.double(), centres.double()).argmin(1)


def _means(points: Tensor, belongs: Tensor, before: Tensor) -> Tensor:
    found = [points[belongs == j].mean(0) for j in range(len(before))]
    return torch.stack([m if m.isfinite().all() else b for m, b in zip(found, before, strict=True)])


def _networks(world: World, weights: Tensor) -> list[nn.Module]:
    made = [world.make() for _ in weights]
    for net, one in zip(made, weights, strict=True):
        load(net, one)
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
    return list(_networks(world, weights))


def _halves(moves: Tensor) -> list[Tensor]:
    unit = moves / moves.norm(dim=1, keepdim=True)
    apart = (1 - unit @ unit.T).clamp_min(0).double().fill_diagonal_(0)
    apart = (apart + apart.T) / 2
    side = fcluster(linkage(squareform(apart.numpy()), "complete"), 2, "maxclust")
    return [torch.from_numpy((side == s).nonzero()[0]) for s in (1, 2)]
