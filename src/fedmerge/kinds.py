"""Whether clients' kinds should settle, and the model that each settles on: pure functions.

Merging pays where what clients share is graded. Where they fall into plain kinds that share
nothing, any weight on another kind's models only disturbs, and a kind is best off with models of
its own. So it is, for a time, where like clients' updates go on pointing the same way: what they
have in common is then not learned from models that all share. Here it is told whether one of the
two is the case, from what clients' updates have shown so far. Peers are as in `peers`, which keeps
them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .peers import Peers, unit

APART = (2 / 3, 0.8)
"""By how much more clients must resemble their own kind than another: up to the first no kinds are
seen, from the second on they are plain. Without noise it is 2/3 where kinds have two of three
factors in common with others; plain kinds have .7 to 1, mixtures mostly .1 to .4."""
FEWEST = 5
"""Peers from which on likenesses are judged: those of fewer to others say too little."""
JOIN = 0.5
"""Mean likeness from which on two groups of clients are of one kind."""
SETTLING = 5
"""Rounds before which rows go home only as far as kinds are parting: what kinds can learn together
they learn first. A row that has taken part as often makes no steps of its own on its way."""
TOGETHER = 0.05
"""Mean cosine of two kinds' updates from which on they learn something together."""
LASTING = 12
"""Rounds from which on what like clients have in common should have begun to fade."""
FADING = 0.75
"""Share of its peak at which it has."""


def likenesses(past: Tensor) -> Tensor:
    """Return (n, n): how alike n clients are in whom they resemble, from -1 to 1; 0 with itself.

    The correlation, over all others, of their updates' cosines with the others'. Two clients of one
    kind resemble the same ones, which shows through the noise of each single cosine.

    Args:
        past: (n, ...) what each client's updates were so far, n of 3 or more.
    """
    cosine = directions(past, past.double().flatten(1).mean(0))
    cosine = cosine @ cosine.T
    cosine.fill_diagonal_(0)
    others = len(cosine) - 2
    # Sums over the others than the two, whose own entries are taken out (or are 0).
    total = cosine.sum(1, keepdim=True) - cosine
    square = cosine.square().sum(1, keepdim=True) - cosine.square()
    spread = (square - total.square() / others).clamp_min(0)
    shared = cosine @ cosine - total * total.T / others
    found = shared / (spread * spread.T).sqrt().clamp_min(1e-30)
    return found.clamp(-1, 1).fill_diagonal_(0)


def grouped(alike: Tensor) -> Tensor:
    """Return (n,) int64 kinds, from 0: groups joined while their mean likeness is above JOIN."""
    from scipy.cluster.hierarchy import average, fcluster
    from scipy.spatial.distance import squareform

    distance = (1 - alike).fill_diagonal_(0).numpy()
    kinds = fcluster(average(squareform(distance, checks=False)), 1 - JOIN, "distance")
    return torch.from_numpy(kinds).long() - 1


def plainness(alike: Tensor, kinds: Tensor) -> float:
    """Return from 0 to 1 how plainly clients belong to their kinds (n,), given how alike (n, n).

    It is told by how much more a client resembles the others of its kind than those of the kind
    that it resembles most after it, on average over clients; one alone of its kind counts as 0.
    Where kinds share some of what they are, or clients are mixtures, that is little.
    """
    member = torch.nn.functional.one_hot(kinds).double()
    count = member.sum(0)
    if len(count) < 2:
        return 0.0
    total = alike @ member
    own = total.gather(1, kinds[:, None])[:, 0] / (count[kinds] - 1).clamp_min(1)
    other = (total / count).scatter(1, kinds[:, None], -1.0).amax(1).clamp_min(0)
    apart = float(torch.where(count[kinds] > 1, own - other, 0.0).mean())
    none, plain = APART
    return min(1.0, max(0.0, (apart - none) / (plain - none)))


def in_common(alike: Tensor, sketch: Tensor) -> float:
    """Return how much the last updates of like clients point the same way.

    The mean cosine of two updates, less the mean update, weighted by the square of the likeness.

    Args:
        alike: (n, n), the `likenesses`. sketch: (n, ...) of each client's last update.
    """
    last = directions(sketch, sketch.double().flatten(1).mean(0))
    weight = alike.clamp(0, 1).square()
    return float((weight * (last @ last.T)).sum() / weight.sum().clamp_min(1e-30))


def lasting(common: float, peak: float) -> float:
    """Return from 0 to 1 how little what is `in_common` has faded from its peak so far.

    A peak of infinity says that it had faded before: late updates, which are short, can all seem
    alike beside a single wild one.
    """
    return max(0.0, (common / peak - FADING) / (1 - FADING)) if peak > 0 else 0.0


def parting(updates: Tensor, kinds: Tensor) -> float:
    """Return from 0 to 1 how little kinds of several clients learn from each other.

    It is 1 where their mean updates do not point the same way, by their mean cosine, and 0 from a
    cosine of TOGETHER on.

    Args:
        updates: (n, ...) of each client. kinds: (n,), with two or more of several clients.
    """
    means = [updates[kinds == k].double().flatten(1).mean(0) for k in _several(kinds)]
    towards = unit(torch.stack(means))
    # Of all pairs of kinds, without each one's cosine of 1 with itself.
    across = (float((towards @ towards.T).sum()) / len(means) - 1) / (len(means) - 1)
    return min(1.0, max(0.0, 1 - across / TOGETHER))


def _several(kinds: Tensor) -> list[int]:
    """The kinds of more than one client."""
    return [k for k, count in enumerate(torch.bincount(kinds).tolist()) if count > 1]


def homes(peers: Peers, rounds: int, peak: float) -> tuple[float, float, Tensor]:
    """Return how far kinds should settle, from 0 to 1, the peak so far, and each peer's home model.

    Kinds have different homes, those that their rows weigh most on the whole. -1 for all where
    kinds should not settle or are more than the models, and for a client that is like no other.

    Args:
        peers: n of them. rounds: that are done. peak: largest value of `in_common` before.

    Returns:
        Two numbers, of which the peak is infinite once `in_common` has faded, and (n, b) int64, the
        homes by block.
    """
    n, b, d = peers["logits"].shape
    nowhere = torch.full((n, b), -1)
    if n < FEWEST:
        return 0.0, peak, nowhere
    alike = likenesses(peers["past"])
    common = in_common(alike, peers["sketch"])
    peak = max(peak, common)
    kinds = grouped(alike)
    far = plainness(alike, kinds)
    if rounds >= LASTING:
        lasts = lasting(common, peak)
        far = max(far, lasts)
        peak = peak if lasts else math.inf
    several = _several(kinds)
    if not 1 < len(several) <= d:
        return 0.0, peak, nowhere
    if rounds < SETTLING:
        # So far and in the last round: either alone is at times by chance.
        far *= min(parting(peers["past"], kinds), parting(peers["sketch"], kinds))
    if not far:
        return 0.0, peak, nowhere
    from scipy.optimize import linear_sum_assignment

    weights = torch.softmax(peers["logits"], -1)
    mean = torch.stack([weights[kinds == k].mean(0) for k in several])
    for block in range(b):
        _, models = linear_sum_assignment(-mean[:, block].numpy())
        for k, model in zip(several, models.tolist(), strict=True):
            nowhere[kinds == k, block] = model
    return far, peak, nowhere


def settled(
    logits: Tensor, start: Tensor, past: Tensor, place: Tensor, peers: Peers, share: float
) -> Tensor:
    """Return rows (k, b, d), log-weights, of which those with a home have gone `share` of the way.

    Args:
        logits: (k, b, d) after the round's steps; a client whose kind is not known keeps them.
        start: (k, b, d) rows that go home.
        past: (k, b, s) of the clients, this update included. place: (k,) who they are.
        peers: as last seen, with their homes.
    """
    known = peers["home"][:, 0] >= 0
    if not known.any():
        return logits
    home, kind = torch.unique(peers["home"][known], dim=0, return_inverse=True)
    mean = peers["past"].double().flatten(1).mean(0)
    cosine = directions(past, mean) @ directions(peers["past"][known], mean).T
    # A client is no witness of its own kind.
    others = (place[:, None] != peers["place"][known]).double()
    member = torch.nn.functional.one_hot(kind, len(home)).double()
    near, nearest = ((cosine * others) @ member / (others @ member).clamp_min(1)).max(1)
    target = torch.nn.functional.one_hot(home[nearest], logits.shape[-1]).double()
    weights = torch.softmax(start.double(), -1)
    gone = ((1 - share) * weights + share * target).clamp_min(1e-300).log()
    return torch.where((near > 0)[:, None, None], gone, logits)


def directions(past: Tensor, mean: Tensor) -> Tensor:
    """Return (k, numbers) of length 1: which way `past` (k, ...) differs from the mean."""
    return unit(past.double().flatten(1) - mean)
