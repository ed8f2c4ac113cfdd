"""The clients of one run for the page: where each stands by its weights, and what is known of it.

Plain numbers and text, kept small enough to be embedded; the page's script and template draw them.
"""

from __future__ import annotations

import base64
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.report.drawing import FILLS
from fedmerge.report.heatmap import Shown, sample, shown
from fedmerge.report.overall import loss_unit
from fedmerge.report.reading import load_history
from fedmerge.report.runs import ClientResult, Run, finite

MAX_CLIENTS = 300
MAX_ROUNDS = 20
_MAX_BYTES = 100_000  # of one setting's weights over rounds
MAP = (520, 360)
"""Width and height of the client map, in its own units."""
_EDGE = 16


def history(run: Run) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return rounds (T,) and weights (T, m, b, d) of `run`, its end alone where no more is kept.

    At most 20 rounds, evenly chosen and with the last. Raises TypeError for a run without weights.
    """
    if run.weights is None:
        raise TypeError("this run has no weights")
    kept = load_history(run)
    if kept is None:
        return np.array([run.last.round]), run.weights[None]
    rounds, weights = kept
    most = max(2, min(MAX_ROUNDS, _MAX_BYTES // max(1, weights[0].size)))
    if len(rounds) > most:
        at = np.unique(np.linspace(0, len(rounds) - 1, most).round().astype(int))
        rounds, weights = rounds[at], weights[at]
    return rounds, weights


def weights_data(
    rounds: NDArray[np.int64], weights: NDArray[np.float64], part: Shown
) -> dict[str, Any]:
    """Return what the slider needs: a byte for each weight, by round, block, client and model."""
    kept = weights[:, list(part.clients)][:, :, list(part.blocks)].transpose(0, 2, 1, 3)
    share = np.clip(np.round(kept / part.scale * 255), 0, 255).astype(np.uint8)
    t, b, m, d = share.shape
    return {
        "rounds": rounds.tolist(),
        "shape": [t, b, m, d],
        "scale": part.scale,
        "clients": list(part.clients),
        "bytes": base64.b64encode(share.tobytes()).decode(),
    }


def plane(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return the rows (T, m, b, d) on a plane, (T, m, 2), and the share of variance it shows.

    The plane is that of the first two principal components of the last round's rows, so that the
    same place means the same row in every round.
    """
    t, m = weights.shape[:2]
    flat = weights.reshape(t, m, -1)
    centre = flat[-1].mean(0)
    _, sizes, axes = np.linalg.svd(flat[-1] - centre, full_matrices=False)
    axes = axes[:2]
    # The sign of a component is arbitrary: its largest entry is made positive.
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    points = (flat - centre) @ axes.T
    if points.shape[2] < 2:
        points = np.concatenate([points, np.zeros((t, m, 2 - points.shape[2]))], axis=2)
    total = float((sizes**2).sum())
    return points, float((sizes[:2] ** 2).sum()) / total if total > 0 else 1.0


def client_map(
    run: Run, rivals: Mapping[str, Run], weights: NDArray[np.float64]
) -> dict[str, Any] | None:
    """Return the points of the client map and what colours them; None without weights.

    rivals: by name, the runs that a gain is measured against (same seed): more accuracy, or less
    loss in a regression.
    """
    points, share = plane(weights)
    chosen = sample(len(run.clients), MAX_CLIENTS)
    points = points[:, chosen]
    low, high = points.min((0, 1)), points.max((0, 1))
    # One scale for both axes: a distance on the map is a distance of rows.
    room = np.array(MAP) - 2 * _EDGE
    scale = float((room / np.maximum(high - low, 1e-9)).min())
    middle = (low + high) / 2
    places = np.round((points - middle) * scale * np.array([1, -1]) + np.array(MAP) / 2)
    clients = [run.clients[i] for i in chosen]
    kinds = sorted({client.kind for client in clients if client.kind is not None})
    signs = [*string.ascii_lowercase, *string.ascii_uppercase]
    letters = {kind: signs[i] if i < len(signs) else "·" for i, kind in enumerate(kinds)}
    gains = {name: _gains(clients, other.clients) for name, other in rivals.items()}
    return {
        "size": MAP,
        "share": share,
        "kinds": [
            {"name": kind, "letter": letters[kind], "colour": FILLS[i % len(FILLS)]}
            for i, kind in enumerate(kinds)
        ],
        "gains": list(gains),
        "unknown": any(value is None for gain in gains.values() for value in gain),
        "points": [
            {
                "index": chosen[k],
                "x": float(places[-1, k, 0]),
                "y": float(places[-1, k, 1]),
                "name": client.id + (f", {client.kind}" if client.kind is not None else ""),
                "letter": letters.get(client.kind or "", ""),
                "colour": FILLS[kinds.index(client.kind) % len(FILLS)]
                if client.kind is not None
                else "var(--rule)",
                "gains": [_shade(gain[k], gain) for gain in gains.values()],
            }
            for k, client in enumerate(clients)
        ],
        "path": places.reshape(len(places), -1).tolist(),
    }


def _gains(ours: Sequence[ClientResult], theirs: Sequence[ClientResult]) -> list[float | None]:
    metric = _metric(ours)
    sign = 1 if metric == "accuracy" else -1
    values = {client.id: getattr(client, metric).get("merged") for client in theirs}
    gains: list[float | None] = []
    for client in ours:
        mine, other = getattr(client, metric).get("merged"), values.get(client.id)
        gains.append(sign * (mine - other) if finite(mine) and finite(other) else None)
    return gains


def _metric(clients: Sequence[ClientResult]) -> str:
    """What clients are judged by: accuracy, or the loss where nobody has one."""
    known = any(client.accuracy.get("merged") is not None for client in clients)
    return "accuracy" if known else "loss"


def _shade(gain: float | None, all_gains: Sequence[float | None]) -> dict[str, Any]:
    """The colour of a gain: its hue is its sign, its strength its size; a sign says it, too."""
    if gain is None:
        return {"sign": "?", "colour": "var(--rule)", "value": "unknown"}
    sizes = [abs(value) for value in all_gains if value is not None]
    full = max(0.05, float(np.quantile(sizes, 0.9)))
    strength = round(100 * min(1.0, abs(gain) / full))
    hue = "accent" if gain > 0 else "blue"
    sign = "+" if gain > 0 else "−" if gain < 0 else "="
    colour = f"color-mix(in srgb, var(--{hue}) {max(strength, 12)}%, var(--surface))"
    return {
        "sign": sign,
        "colour": colour if gain else "var(--rule)",
        "value": f"{sign}{abs(gain):.3f}" if gain else "0",
    }


def cards(subject: Run, others: Sequence[Run]) -> dict[str, Any]:
    """Return what the page shows of each client of `subject`, and its accuracy in all runs.

    others: the runs of all methods with the same setting and seed. Accuracies (or losses of a
    regression) are in thousandths, a list in the order of `others`; weights in hundredths.
    """
    metric = _metric(subject.clients)
    values = [
        {client.id: getattr(client, metric).get("merged") for client in run.clients}
        for run in others
    ]
    chosen = sample(len(subject.clients), MAX_CLIENTS)
    rows = None if subject.weights is None else np.round(subject.weights * 100).astype(int)
    return {
        "metric": metric,
        "unit": loss_unit(metric),
        "blocks": list(subject.blocks or ()),
        "clients": [
            {
                "index": i,
                "id": client.id,
                "kind": client.kind,
                "n": [client.n_train, client.n_validation, client.n_test],
                "labels": list(client.label_counts),
                "values": [_thousandths(seen.get(client.id)) for seen in values],
                "row": None if rows is None else rows[i].tolist(),
                "worth": [_thousandths(value) for value in client.importance],
            }
            for i, client in ((i, subject.clients[i]) for i in chosen)
        ],
    }


def _thousandths(value: float | None) -> int | None:
    return round(1000 * value) if value is not None and finite(value) else None


def part_of(run: Run, weights: NDArray[np.float64]) -> Shown:
    """Return what the heat maps of `run` show, on one scale for all rounds."""
    return shown(run, float(weights.max()))
