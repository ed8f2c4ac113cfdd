"""What a round leaves behind: one record of plain numbers, the same wherever the round was run.

It summarises; it decides nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
SPLITS = ("train", "validation", "test")
MODELS = ("merged", "tuned", "local")


@dataclass(frozen=True)
class Summary:
    """A figure over clients, each counted once.

    Attributes:
        mean: over clients. std: over clients. worst_decile: mean over the worst tenth of them (at
            least one client): the lowest accuracies, or the highest losses.
        error: standard error of the mean, where the n clients are a random sample of m: s sqrt((1 -
            n / m) / n) with the sample's s (n - 1), as drawing without replacement has it (Cochran,
            Sampling Techniques, 2.6). None where all clients were measured.
    """

    mean: float
    std: float
    worst_decile: float
    error: float | None = None

    @classmethod
    def of(cls, values: Array, *, high_is_bad: bool, sampled: bool = False) -> Self | None:
        """Summarise values (m,); NaN, a client that was not measured, is left out.

        `sampled` says that they were left out at random. None if none is left, or if one is
        infinite: a model that has diverged must not be hidden by leaving its client out of the
        mean.
        """
        known = np.sort(values[~np.isnan(values)])
        if not len(known) or np.isinf(known).any():
            return None
        tenth = math.ceil(len(known) / 10)
        worst = known[-tenth:] if high_is_bad else known[:tenth]
        error = None
        n, m = len(known), len(values)
        if sampled and 1 < n < m:
            error = float(known.std(ddof=1)) * math.sqrt((1 - n / m) / n)
        return cls(float(known.mean()), float(known.std()), float(worst.mean()), error)

    def to_json(self) -> dict[str, float]:
        """Plain JSON values."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Measured:
    """Per-client figures of one kind of model on one split.

    Attributes:
        loss: (m,), mean per example. accuracy: (m,). auc: (m,), area under the ROC curve. NaN where
            a client was not measured, accuracy for regression, and auc unless there are two
            classes and the client has examples of both.
    """

    loss: Array
    accuracy: Array
    auc: Array

    @classmethod
    def empty(cls, m: int) -> Self:
        """Figures of m clients of whom none has been measured."""
        return cls(*(np.full(m, np.nan) for _ in range(3)))

    def put(self, places: list[int], found: Measured) -> None:
        """Fill in, in place, the figures of the clients at `places`."""
        self.loss[places] = found.loss
        self.accuracy[places] = found.accuracy
        self.auc[places] = found.auc

    def summary(self, *, sampled: bool = False) -> dict[str, Summary | None]:
        """Accuracy, loss and area over clients; see `Summary.of`.

        The area has no error: clients without both classes have none either, not at random.
        """
        return {
            "accuracy": Summary.of(self.accuracy, high_is_bad=False, sampled=sampled),
            "loss": Summary.of(self.loss, high_is_bad=True, sampled=sampled),
            "auc": Summary.of(self.auc, high_is_bad=False),
        }


@dataclass(frozen=True)
class RoundLog:
    """One round.

    Attributes:
        round: from 1. cohort: clients sampled. dropped: of these, without a reply.
        refused: updates refused, by reason.
        metrics: {model: {split: {"accuracy": Summary, "loss": Summary, "auc": Summary}}} for
            `merged` (the model a client would use at the end of this round), `tuned` (that after
            one local epoch) and `local` (each participant's own model at the end of local
            training); loss in nats or squared units, mean per example; auc None unless there are
            two classes. Empty in rounds without evaluation.
        gap_train, gap_test: local-global gap: mean over participants of the loss of the model they
            would use next minus that of their own at the end of local training.
        rows: entropy (nats) and largest weight of the merging weights, mean over clients and
            blocks, and movement (total variation, mean over participants); None without weights.
        bytes_up, bytes_down: total of the round: of models what travels, and what a method sends
            beside them; without the tickets and counts that every update has.
        seconds: by phase: send, local, fold, commit, evaluate.
    """

    round: int
    cohort: int
    dropped: int
    refused: dict[str, int]
    metrics: dict[str, dict[str, dict[str, Summary | None]]]
    gap_train: float | None
    gap_test: float | None
    rows: dict[str, float] | None
    bytes_up: int
    bytes_down: int
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        # By hand: `asdict` copies every number by itself, and takes longer than the round's commit.
        metrics = {
            model: {
                split: {key: s and s.to_json() for key, s in pair.items()}
                for split, pair in splits.items()
            }
            for model, splits in self.metrics.items()
        }
        return {**vars(self), "metrics": metrics}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read back what `to_json` made."""
        metrics = {
            model: {
                split: {key: s and Summary(**s) for key, s in pair.items()}
                for split, pair in splits.items()
            }
            for model, splits in values["metrics"].items()
        }
        return cls(**{**values, "metrics": metrics})
