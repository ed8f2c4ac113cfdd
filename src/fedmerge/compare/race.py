"""A race of points: all are tried on the first seed, those still in it on the next, and so on.

So seeds are spent where it is open which point is best (Maron and Moore, 1997; Birattari et al.,
2002). It reads what finished trials have written, and decides by validation data only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtr

from ..errors import StateError
from .folder import LOG

OUT = 0.3
"""A point is out once a one-sided paired t-test puts it behind the best with a p below this. A
stricter test costs more trials than it is worth: it tells apart points that are nearly as good."""
FEW = 4
SPREAD = 0.04
"""With fewer seeds than `FEW` differences may agree by chance: their standard deviation is taken to
be `SPREAD` at least, of accuracy or of a loss of one, in proportion of a larger loss, so that only
points far behind are out. With one seed those are that are behind by more than twice that."""
Scores = Sequence[float | None]
"""Of one point, for each seed that it was tried with; None where it diverged."""


def contenders(scores: Mapping[int, Scores]) -> tuple[int, ...]:
    """Return which points may still be the best, by their scores with the same seeds, in order.

    Those that diverged are out, and those that a paired t-test over the seeds puts behind the best
    mean (`OUT`). If all diverged, none is left.
    """
    known = {
        point: np.array(values, dtype=float)
        for point, values in scores.items()
        if all(value is not None for value in values)
    }
    if not known:
        return ()
    best = max(known.values(), key=lambda values: float(values.mean()))
    spread = SPREAD * max(1.0, abs(float(best.mean())))
    return tuple(p for p, values in known.items() if not _is_behind(best - values, spread))


def _is_behind(lead: np.ndarray[Any, np.dtype[np.float64]], spread: float) -> bool:
    """Whether what another leads by, for each seed, is beyond chance."""
    if len(lead) < 2:
        return bool(lead[0] > 2 * spread)
    error = max(spread if len(lead) < FEW else 0.0, lead.std(ddof=1)) / math.sqrt(len(lead))
    if not error:
        return bool(lead[0] > 0)
    return bool(stdtr(len(lead) - 1, -lead.mean() / error) < OUT)


def mean(scores: Scores) -> float | None:
    """Return the mean over tuning seeds; a point that diverged with one of them has none."""
    numbers = [value for value in scores if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers and len(numbers) == len(scores) else None


def score(folder: Path) -> float | None:
    """Return the score of a finished trial, higher is better; None where it diverged.

    It is the merged model's validation accuracy: the mean of that over all clients and of that over
    the worst tenth, which are the figures that a comparison judges by. The mean over all alone
    cannot tell points apart that are as good for most and differ in what they do to a few. Where
    there is no accuracy it is minus the mean validation loss. Both are of the last evaluated round,
    the one of which figures are reported: that of least loss would misjudge methods that overfit,
    whose accuracy still rises then.

    Raises:
        StateError: the log of the trial is lost or damaged.
    """
    path = folder / LOG
    try:
        found = [json.loads(line)["metrics"] for line in path.read_text("utf-8").splitlines()]
        evaluated = [models["merged"]["validation"] for models in found if models]
        if not evaluated:
            raise ValueError("no evaluated round")
        loss, accuracy = evaluated[-1]["loss"], evaluated[-1]["accuracy"]
        if loss is None:
            return None
        if accuracy is None:
            return -float(loss["mean"])
        return (float(accuracy["mean"]) + float(accuracy["worst_decile"])) / 2
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = error.strerror if isinstance(error, OSError) else f"damaged: {error}"
        raise StateError(f"{path}: {what}; remove {folder} to run that trial again") from error
