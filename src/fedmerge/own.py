"""Whether clients that may have a model each should have it: pure functions over numbers.

Training at a client shows how well it fits what it is given, and nothing of how well it would do.
So each client says by how much its training has lowered the number of its wrong answers on
validation data. While models are new that is much for everybody; where it is still something when
they have settled, a client needs more of a model of its own than merging has given it, and where it
is nothing, what training would change is noise. Peers are as in `peers`, which keeps them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .peers import Peers

MOST = 1.0
"""Largest help that counts: one client must not speak for all."""
NEWEST = 0.3
"""Weight of the last help in a running mean."""
NEW = 16
"""Rounds for which models are new, and training helps everybody."""
ENOUGH = 0.05
"""Help up to which a row stays where it is."""
FAR = 0.25
"""By how much more it goes as far as it may in a round."""
OFTEN = 10
"""Participations from which on that is enough. After fewer it takes the square of how many times
fewer as much: training helps whoever has had little of it, and a model that one client trains a few
times is no better."""


def help_of(before: Tensor, after: Tensor, floor: float) -> Tensor:
    """Return (k,) float64: by how much training has lowered a score, as the log of its ratio.

    From -MOST to MOST; 0 where it is not known.

    Args:
        before, after: (k,) of what was received and of what was trained from it; lower is better.
        floor: added to both; less is as good as none.
    """
    found = ((before.double() + floor) / (after.double() + floor)).log()
    return found.nan_to_num(0.0).clamp(-MOST, MOST)


def recent(helped: Tensor, latest: Tensor, first: Tensor | bool) -> Tensor:
    """Return the running mean with the latest value; the latest itself where it is the `first`."""
    return torch.where(torch.as_tensor(first), latest, helped + NEWEST * (latest - helped))


def share_of(
    helped: Tensor, overall: Tensor, taken_part: Tensor, missed: Tensor, settle: float
) -> Tensor:
    """Return (k,) shares of the way that rows go to a model of their own in this round.

    The help of one client is a guess from some tens of examples, so half of what is judged is the
    mean over all.

    Args:
        helped: (k,) recent help of each. overall: () that of all.
        taken_part: (k,) how often, this round included. missed: (k,) rounds since the last time.
        settle: most that a row goes in one round.
    """
    enough = ENOUGH * (OFTEN / taken_part.double()).clamp(min=1.0) ** 2
    go = settle * (((helped + overall) / 2 - enough) / FAR).clamp(0, 1)
    return 1 - (1 - go) ** missed


def own_models(peers: Peers) -> Tensor:
    """Return (n, b) int64: a different model for each peer, those that rows weigh most in all.

    -1 for all peers if they are more than the models.
    """
    n, b, d = peers["logits"].shape
    own = torch.full((n, b), -1)
    if n > d:
        return own
    from scipy.optimize import linear_sum_assignment

    weights = torch.softmax(peers["logits"], -1)
    for block in range(b):
        who, models = linear_sum_assignment(-weights[:, block].numpy())
        own[torch.from_numpy(who), block] = torch.from_numpy(models)
    return own


def towards_own(logits: Tensor, share: Tensor, place: Tensor, peers: Peers) -> Tensor:
    """Return rows (k, b, d), log-weights, that have gone their share (k,) of the way.

    Args:
        logits: (k, b, d) after all other steps; a client not seen before keeps them.
        place: (k,) who they are. peers: as last seen.
    """
    mine = place[:, None] == peers["place"]
    own = mine.long() @ own_models(peers)
    goes = mine.any(1) & (own >= 0).all(1) & (share > 0)
    target = torch.nn.functional.one_hot(own.clamp_min(0), logits.shape[-1]).double()
    share = share[:, None, None]
    gone = ((1 - share) * torch.softmax(logits.double(), -1) + share * target).clamp_min(1e-300)
    return torch.where(goes[:, None, None], gone.log(), logits)
