"""A finished run in plain JSON values.

It reads what the simulation measured; it computes no model.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..algorithms import Cost
from ..data.clients import ClientRow
from .checkpoint import Progress
from .evaluation import Evaluation
from .log import Summary


def summarise_run(
    progress: Progress,
    clients: Sequence[ClientRow],
    weights: Tensor | None,
    blocks: Sequence[str],
    importance: Tensor | None,
    cost: Cost,
) -> dict[str, Any]:
    """Figures of the test split over clients and for each, at the last evaluated round and, under
    "best", at the one with the lowest validation loss.

    Bytes are per client and round: the mean over all that took part.
    """
    history, last, best = progress.history, progress.latest, progress.best
    took_part = sum(log.cohort for log in history)
    replied = sum(log.cohort - log.dropped for log in history)
    refused: Counter[str] = Counter()
    for log in history:
        refused.update(log.refused)
    figures = [_client(last, i) for i in range(len(clients))]
    return {
        "rounds": len(history),
        **_reached(last),
        "bytes_up": sum(log.bytes_up for log in history) / replied if replied else 0.0,
        "bytes_down": sum(log.bytes_down for log in history) / took_part if took_part else 0.0,
        "refused": dict(refused),
        "cost": dataclasses.asdict(cost),
        "clients": [{**_facts(c), **one} for c, one in zip(clients, figures, strict=True)],
        "best": {
            **_reached(best),
            "clients": [{"id": c.id, **_client(best, i)} for i, c in enumerate(clients)],
        },
        "weights": None if weights is None else weights.tolist(),
        "blocks": None if weights is None else _named(blocks, weights.shape[1]),
        "importance": None if importance is None else [_plain_row(r) for r in importance.tolist()],
    }


def _named(blocks: Sequence[str], b: int) -> list[str]:
    return list(blocks) if len(blocks) == b else ["all layers"]


def _reached(evaluation: Evaluation | None) -> dict[str, Any]:
    """Figures over clients on test data."""
    if evaluation is None:
        return {"round": None, "models": {}, "gap_train": None, "gap_test": None}
    models = {}
    for model, splits in evaluation.metrics().items():
        accuracy, loss, auc = (splits["test"][key] for key in ("accuracy", "loss", "auc"))
        models[model] = {
            "accuracy": accuracy and accuracy.mean,
            **_error("accuracy", accuracy),
            "accuracy_std": accuracy and accuracy.std,
            "accuracy_worst_decile": accuracy and accuracy.worst_decile,
            "auc": auc and auc.mean,
            "loss": loss and loss.mean,
            **_error("loss", loss),
        }
    return {
        "round": evaluation.round,
        "models": models,
        "gap_train": evaluation.gap("train"),
        "gap_test": evaluation.gap("test"),
    }


def _error(name: str, summary: Summary | None) -> dict[str, float]:
    """The standard error of a mean over a sample of the clients; nothing of a mean over all."""
    if summary is None or summary.error is None:
        return {}
    return {f"{name}_error": summary.error}


def _facts(client: ClientRow) -> dict[str, Any]:
    return {
        "id": client.id,
        "kind": client.kind,
        "n_train": client.n_train,
        "n_validation": client.n_validation,
        "n_test": client.n_test,
        "label_counts": client.label_counts.tolist() if len(client.label_counts) else None,
    }


def _client(evaluation: Evaluation | None, i: int) -> dict[str, dict[str, float | None]]:
    """Figures of one client on test data, by model."""
    found = {} if evaluation is None else evaluation.found
    return {
        "accuracy": {model: _plain(splits["test"].accuracy[i]) for model, splits in found.items()},
        "auc": {model: _plain(splits["test"].auc[i]) for model, splits in found.items()},
        "loss": {model: _plain(splits["test"].loss[i]) for model, splits in found.items()},
    }


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain_row(values: Sequence[float]) -> list[float | None]:
    return [_plain(value) for value in values]
