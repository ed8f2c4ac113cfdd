"""How far each model goes along the mean of its clients' updates: pure functions over numbers.

Less than the mean is for rounds whose clients use a model less than all do. More than the mean is
for models that are behind: clients train them to more right answers on data that they have not
trained on, or models go the same way round after round. And where a round has few of a model's
clients, clients use a mean of the model over rounds. As in `merging`, which says what the letters
mean, rows are those of the clients of a round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HELPS = 4.0
"""By how many times the mean of its updates a model goes further, for each unit of help, the log of
the ratio of wrong answers (`own.help_of`)."""
TURNS = 2.0
"""How much of that is dropped for a cosine of a model's step and its heading below 0: of -1 / TURNS
all of it. A model that turns back has gone too far."""
AGREES = 0.9
"""Cosine of a model's step and its heading above which it goes further than the round before."""
AHEAD = 1.0
"""By how many times the mean of its updates a model goes further at most for its heading."""


def model_pace(cohort: Tensor, others: Tensor) -> Tensor:
    """How far each model goes towards what a round's clients would have it be, (b, d) from 0 to 1.

    A model that they use less than all clients do is moved by those it is not for: it goes that
    share of the way. All of it if nobody else is known.

    Args:
        cohort: (k, b, d) merging weights of the round's clients. others: (n, b, d) of the rest.
    """
    used = cohort.mean(0)
    if not len(others):
        return torch.ones_like(used)
    by_all = (cohort.sum(0) + others.sum(0)) / (len(cohort) + len(others))
    return (used / by_all.clamp_min(1e-300)).clamp(max=1.0)


def bounded(share: Tensor, updates: Tensor, step: Tensor, wanted: Tensor, most: float) -> Tensor:
    """How many times the mean of its clients' updates each model goes, (d,) from 1 to `most`.

    Updates that differ are short in the mean: it leads less far than any of them. So a model may go
    further along it, up to half their mean squared length over that of their mean (Jhunjhunwala,
    Wang and Joshi, "FedExP", ICLR 2023): for updates that agree, or for one, that is nowhere.

    Args:
        share: (k, b, d) float64, what each client counts for in each model.
        updates: (k, b, s) their sketches. step: (b, d, s) of the models, their `mean_steps`.
        wanted: (d,) how far each model should go, if it may.
    """
    lengths = torch.einsum("kb,kbd->d", updates.double().square().sum(2), _parts(share))
    together = step.square().sum((0, 2))
    may = (lengths / together.clamp_min(1e-300) / 2).clamp(1.0, most)
    return torch.minimum(may, wanted.clamp_min(1.0))


def mean_steps(share: Tensor, updates: Tensor) -> Tensor:
    """Return (b, d, s) float64: the mean update of each model, of (k, b, d) and (k, b, s)."""
    return torch.einsum("kbs,kbd->bds", updates.double(), _parts(share))


def agreement(step: Tensor, heading: Tensor) -> Tensor:
    """(d,): the cosine of each model's step with its heading, 0 where it has none.

    Args:
        step: (b, d, s) of this round. heading: (b, d, s), which way it went before, a running mean.
    """
    lengths = step.square().sum((0, 2)) * heading.square().sum((0, 2))
    return (step * heading).sum((0, 2)) / lengths.sqrt().clamp_min(1e-300)


def ahead(further: Tensor, agrees: Tensor) -> Tensor:
    """By how many times its step each model goes further for its heading, (d,) from 0 to AHEAD.

    It grows in rounds that go on as those before, and falls in others.

    Args:
        further: (d,) that of the round before. agrees: (d,) of `agreement`.
    """
    return (further + agrees - AGREES).clamp(0, AHEAD)


def wanted(helped: Tensor, further: Tensor, agrees: Tensor) -> Tensor:
    """How many times its step each model should go, (d,), for either sign that it is behind.

    Args:
        helped: (), what training does for clients. further: (d,) of `ahead`, agrees: of
            `agreement`.
    """
    onward = (1 + TURNS * agrees).clamp(0, 1)
    return 1 + torch.maximum(HELPS * helped * onward, further)


def averaged(
    means: Tensor, models: Tensor, cohort: Tensor, others: Tensor, spans: Sequence[tuple[int, int]]
) -> Tensor:
    """Return the running means of the models after a round: (d, P), or (0, P) for the models alone.

    A round moves a model for those of its clients that are in it, the next one for others. So what
    clients use is the mean of where it has been of late (Polyak and Juditsky, 1992), over the more
    rounds the fewer of its clients are in one: it follows the model by the root of their share.
    With all of them in the round it is the model. So are its buffers.

    Args:
        means: (d, P) before the round; (0, P) if they were the models. models: (d, P), after it.
        cohort: (k, b, d) merging weights of the round's clients. others: (n, b, d) of the rest.
        spans: (start, stop) of the parameters of each block.
    """
    there = cohort.sum(0)
    every = there + others.sum(0)
    share = torch.where(every > 0, there / every, 1.0)
    if bool((share >= 1).all()):
        return models[:0]
    made = torch.empty_like(models)
    for (start, stop), way in zip(spans, share.sqrt().to(models.dtype)[..., None], strict=True):
        before, after = means[:, start:stop], models[:, start:stop]
        torch.lerp(before, after, way, out=made[:, start:stop])
    buffers = max(stop for _, stop in spans)
    made[:, buffers:] = models[:, buffers:]
    return made


def _parts(share: Tensor) -> Tensor:
    return share / share.sum(0).clamp_min(1e-300)
