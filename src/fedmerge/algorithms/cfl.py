"""CFL: FedAvg whose clients are parted in two wherever their updates point in different directions.

Sattler, Mueller and Samek, "Clustered federated learning: model-agnostic distributed multitask
optimization under privacy constraints", IEEE TNNLS 2021 (arXiv 1910.01991): a cluster is parted
when its mean update is short (norm below eps1) while some client's is long (above eps2), into the
two parts of complete linkage on the cosines of the updates, as in the authors' code. Clusters form
a tree; a client that was absent when its cluster was parted trains the cluster's last model and
goes to the part whose mean update has the larger cosine with its own (the paper's parameter tree).
Deviation: eps1 is in units of the cluster's longest update and eps2 in units of the longest update
of the first round, because absolute norms depend on the network and the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..sums import ModelSum
from .base import Cost, Setup, Tensors, Updates
from .gathering import Gathering


@dataclass(frozen=True)
class CFL(Gathering):
    """CFL.

    Attributes:
        eps1: a cluster whose mean update is shorter than this share of its longest one is parted,
        eps2: if its longest one is longer than this share of the first round's longest.
        warm: rounds before the first parting.
    """

    name: ClassVar[str] = "cfl"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"eps1": 0.25}, {"lr": 0.1}, {"lr": 0.5}, {"eps1": 0.6}, {"eps1": 0.25, "lr": 0.5},
        {"eps1": 0.6, "warm": 5}, {"eps1": 0.4, "warm": 20}, {"eps1": 0.6, "eps2": 0.5},
    )  # fmt: skip
    eps1: float = 0.4
    eps2: float = 0.25
    warm: int = 10

    def __post_init__(self) -> None:
        self._need(eps1=0, eps2=0, warm=0)

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        # At most: a tree of 2 n - 3 nodes (two clients stay together), with two models each.
        server = max(2, 4 * n_clients - 6)
        return Cost(server=server, server_per_client=2 / setup.layout.size)

    def shared(self, setup: Setup) -> Tensors:
        models = setup.initial(0)[None]
        return {
            "models": models,  # of every node of the tree; a node that was parted keeps its last
            "parts": torch.full((1, 2), -1, dtype=torch.int64),  # nodes it was parted into
            "direction": torch.zeros_like(models),  # mean update of its members at the parting
            "longest": torch.zeros(1, dtype=torch.float64),  # update of the first round
        }

    def rows(self, setup: Setup, k: int) -> Tensors:
        return {"node": torch.zeros(k, dtype=torch.int64), **super().rows(setup, k)}

    def send(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        return shared["models"][rows["node"]][:, None]

    def gather(self, setup: Setup, shared: Tensors, rows: Tensors, updates: Updates) -> Tensors:
        n = updates.n_examples.double()
        return {"delta": updates.delta, "n": n, "node": rows["node"]}

    def renew(
        self, setup: Setup, shared: Tensors, seen: Tensors, version: int
    ) -> tuple[Tensors, Tensors]:
        delta, n, node = seen["delta"], seen["n"], seen["node"]
        moves = delta[:, : setup.layout.n_params].double()
        tree, size = dict(shared), setup.layout.n_params
        if version == 0:
            tree["longest"] = moves.norm(dim=1).max()[None]
        inner = tree["parts"][node, 0] >= 0
        for i in inner.nonzero()[:, 0].tolist():
            # Its update is of a model that nobody trains any more: it only shows where it belongs.
            pair = tree["parts"][node[i]]
            found = functional.cosine_similarity(
                moves[i : i + 1], tree["direction"][pair][:, :size].double()
            )
            node[i] = pair[int(found.argmax())]
        for leaf in sorted(set(node[~inner].tolist())):
            here = ((node == leaf) & ~inner).nonzero()[:, 0]
            if version >= self.warm and self._parts(moves[here], n[here], tree["longest"]):
                second = _bipartition(moves[here])
                node[here] = len(tree["models"]) + second
                means = [_mean(delta[here][second == s], n[here][second == s]) for s in (0, 1)]
                tree = _grown(tree, leaf, torch.stack(means))
        total = ModelSum.for_layout(setup.layout, len(tree["models"]))
        share = functional.one_hot(node, len(tree["models"])).double() * (n * ~inner)[:, None]
        total.add(share[:, None], delta)
        tree["models"] = total.step(tree["models"])
        return tree, {"node": node}

    def _parts(self, moves: Tensor, n: Tensor, first: Tensor) -> bool:
        """Whether the clients of a cluster, with these updates (k, n_params), are to be parted."""
        longest = moves.norm(dim=1).max()
        short = _mean(moves, n).norm() < self.eps1 * longest
        return len(moves) > 2 and bool(short) and bool(longest > self.eps2 * first)


def _mean(moves: Tensor, n: Tensor) -> Tensor:
    return ((n / n.sum()) @ moves.double()).to(moves.dtype)


def _bipartition(moves: Tensor) -> Tensor:
    """(k,) 0 or 1: complete linkage of the updates (k, n_params) by cosine, cut in two."""
    from sklearn.cluster import AgglomerativeClustering

    unit = functional.normalize(moves, dim=1)
    apart = (1 - unit @ unit.T).clamp_min(0).fill_diagonal_(0)
    linkage = AgglomerativeClustering(n_clusters=2, metric="precomputed", linkage="complete")
    return torch.from_numpy(linkage.fit_predict(apart.numpy())).long()


def _grown(tree: Tensors, leaf: int, means: Tensor) -> Tensors:
    """The tree with two new nodes under `leaf`, which start from its model."""
    at = len(tree["models"])
    parts = torch.cat([tree["parts"], torch.full((2, 2), -1)])
    parts[leaf] = torch.tensor([at, at + 1])
    return {
        **tree,
        "models": torch.cat([tree["models"], tree["models"][[leaf, leaf]]]),
        "parts": parts,
        "direction": torch.cat([tree["direction"], means]),
    }
