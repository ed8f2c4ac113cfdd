"""What a row learns from clients whose updates resemble its own: pure functions over numbers.

A row of its own gradient alone waits for the models to differ, and the models for the rows. Clients
of one kind push the models the same way from the first round on, so their steps are summed and
their rows drawn together, for as long as the likeness is there: it fades once what they have in
common is learned. Which clients train, and what else is done to a row, is decided elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARPNESS = 4
"""Power of the cosine: chance resemblance counts for nothing, that of a plain kind for much."""
FURTHEST = 0.2
"""Most that a log-weight moves by the steps of others in a round, in nats."""
AGREEMENT = 0.2
"""Share of the way to the mean row of those it resembles that a row goes in a round, at most."""
FIRST = 10
"""Updates of a client that are remembered in full."""
SUMMED = 32
"""Peers whose steps are summed; of more, the same share of the sum is taken."""

Peers = dict[str, Tensor]
"""The n clients last seen, latest first: "place" (n,) int64 who they are, "sketch" (n, b, s) of
their updates, "step" (n, b, d) of their log-weights in nats, on their own account, "logits"
(n, b, d) of their rows, both centred over the models; "past" (n, b, s), their updates so far as
`remembered`, and "home" (n, b) int64, the model their kind settles on, -1 for none (`kinds`)."""


def no_peers(b: int, d: int, sketch: int) -> Peers:
    """Return the table before anybody was seen."""
    return {
        "place": torch.zeros(0, dtype=torch.int64),
        "sketch": torch.zeros(0, b, sketch),
        "step": torch.zeros(0, b, d, dtype=torch.float64),
        "logits": torch.zeros(0, b, d, dtype=torch.float64),
        "past": torch.zeros(0, b, sketch),
        "home": torch.zeros(0, b, dtype=torch.int64),
    }


def centred(logits: Tensor) -> Tensor:
    """Return log-weights (..., d) less their mean over the models."""
    return logits - logits.mean(-1, keepdim=True)


def likeness(sketch: Tensor, place: Tensor, peers: Peers) -> Tensor:
    """Return (k, b, n): how much the updates of k clients resemble those of n peers, from 0 to 1.

    The cosine of two updates' difference from the mean update, where it is positive, to the power
    of `SHARPNESS`. A client is no peer of itself: that would only hurry each row on its own way.

    Args:
        sketch: (k, b, s), of the clients' updates. place: (k,), who the clients are.
        peers: as last seen.
    """
    theirs = peers["sketch"].double()
    mean = theirs.mean(0)
    cosine = torch.einsum("kbs,nbs->kbn", unit(sketch.double() - mean), unit(theirs - mean))
    others = place[:, None] != peers["place"]
    return cosine.clamp_min(0) ** SHARPNESS * others[:, None]


def drawn(logits: Tensor, alike: Tensor, peers: Peers, pull: float) -> Tensor:
    """Return rows (k, b, d) after they have moved with the peers they resemble, normalised.

    Args:
        logits: (k, b, d) after the rows' own steps.
        alike: (k, b, n), the `likeness`.
        pull: of a peer whose update is the same, in its own steps.
    """
    alike = alike * pull / max(1.0, len(peers["place"]) / SUMMED)
    along = torch.einsum("kbn,nbd->kbd", alike, peers["step"])
    along *= FURTHEST / along.abs().amax(-1, keepdim=True).clamp_min(FURTHEST)
    total = alike.sum(-1, keepdim=True)
    # The sum of the differences, over 1 more than the likeness: few that are a little alike do not
    # move it.
    away = torch.einsum("kbn,nbd->kbd", alike, peers["logits"]) - total * centred(logits)
    return torch.log_softmax(logits + along + AGREEMENT * away / (1 + total), dim=-1)


def remembered(past: Tensor, sketch: Tensor, before: Tensor) -> Tensor:
    """Return what k clients' updates were so far, (k, b, s): the first summed, of later ones less.

    What a client has in common with others shows while it learns that; later updates are its own.

    Args:
        past: (k, b, s) before this update. sketch: (k, b, s) of it.
        before: (k,) int64, how often the clients have taken part.
    """
    weight = (FIRST / (before + 1)).clamp(max=1.0) ** 2
    return past + weight.float()[:, None, None] * sketch


def renewed(peers: Peers, seen: Peers, most: int) -> Peers:
    """Return the table with the clients `seen` in this round first, `most` clients in all.

    Of more than that, a selection that does not depend on the order in which they came.
    """
    scrambled = (seen["place"] + 1) * 2654435761 % 2**32
    order = torch.argsort(scrambled)[:most]
    stay = ~torch.isin(peers["place"], seen["place"])
    return {name: torch.cat([seen[name][order], old[stay]])[:most] for name, old in peers.items()}


def unit(rows: Tensor) -> Tensor:
    """Return rows (..., n) scaled to length 1; a row of zeros stays."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / length.clamp_min(1e-30)
