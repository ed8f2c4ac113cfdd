"""A finished run in plain JSON values.

It reads what the simulation measured; it computes no model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..data.clients import Client
from .log import Measured, RoundLog

MODELS = ("merged", "tuned", "local")


def summarise_run(
    history: Sequence[RoundLog],
    clients: Sequence[Client],
    latest: dict[str, dict[str, Measured]],
    weights: Tensor | None,
    blocks: Sequence[str],
) -> dict[str, Any]:
    """Figures of the test split at the last evaluated round, over clients and for each.

    Bytes are per client and round: the mean over all that took part.
    """
    took_part = sum(log.cohort for log in history)
    replied = sum(log.cohort - log.dropped for log in history)
    models = {}
    for model in (m for m in MODELS if m in latest):
        found = latest[model]["test"].summary()
        accuracy, loss = found["accuracy"], found["loss"]
        models[model] = {
            "accuracy": accuracy and accuracy.mean,
            "accuracy_std": accuracy and accuracy.std,
            "accuracy_worst_decile": accuracy and accuracy.worst_decile,
            "loss": loss and loss.mean,
        }
    evaluated = [log for log in history if log.metrics]
    refused: Counter[str] = Counter()
    for log in history:
        refused.update(log.refused)
    return {
        "rounds": len(history),
        "models": models,
        "gap_train": evaluated[-1].gap_train if evaluated else None,
        "gap_test": evaluated[-1].gap_test if evaluated else None,
        "bytes_up": sum(log.bytes_up for log in history) / replied if replied else 0.0,
        "bytes_down": sum(log.bytes_down for log in history) / took_part if took_part else 0.0,
        "refused": dict(refused),
        "clients": [_client(i, client, latest) for i, client in enumerate(clients)],
        "weights": None if weights is None else weights.tolist(),
        "blocks": None if weights is None else _named(blocks, weights.shape[1]),
    }


def _named(blocks: Sequence[str], b: int) -> list[str]:
    return list(blocks) if len(blocks) == b else ["all layers"]


def _client(i: int, client: Client, latest: dict[str, dict[str, Measured]]) -> dict[str, Any]:
    return {
        "id": client.id,
        "kind": client.kind,
        "n_train": len(client.train),
        "n_validation": len(client.validation),
        "n_test": len(client.test),
        "accuracy": {m: _plain(found["test"].accuracy[i]) for m, found in latest.items()},
        "loss": {m: _plain(found["test"].loss[i]) for m, found in latest.items()},
    }


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
