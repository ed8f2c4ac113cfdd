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
from fedmerge.report.heatmap import Shown, families, sample, shown
from fedmerge.report.overall import loss_unit
from fedmerge.report.reading import load_history
from fedmerge.report.runs import ClientResult, Run, finite

MAX_CLIENTS = 300
MAX_ROUNDS = 20
MAX_BYTES = 100_000
"""Of one setting's weights over rounds."""
MAP = (520, 360)
"""Width and height of the client map, in its own units."""
_EDGE = 44  # what moves apart may take up three quarters of it
_PUSHES = 80


def most_clients(run: Run, methods: int, room: float) -> int:
    """Return how many clients of `run` fit into `room` bytes of the page, at most 300.

    Each is in the map, in the list and in the embedded numbers, with its value under each method.
    """
    labels = max((len(client.label_counts) for client in run.clients), default=0)
    b, d = (0, 0) if run.weights is None else run.weights.shape[1:]
    each = 750 + 6 * methods + 5 * labels + (4 * b + 5) * d + 8 * MAX_ROUNDS
    return max(4, min(MAX_CLIENTS, int(room / each)))


def history(run: Run, room: float = MAX_BYTES) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return rounds (T,) and weights (T, m, b, d) of `run`, its end alone where no more is kept.

    At most 20 rounds, evenly chosen and with the last, and so many that `room` bytes hold their
    weights (two fit always). Raises TypeError for a run without weights.
    """
    if run.weights is None:
        raise TypeError("this run has no weights")
    kept = load_history(run)
    if kept is None:
        return np.array([run.last.round]), run.weights[None]
    rounds, weights = kept
    most = max(2, min(MAX_ROUNDS, int(room / max(1, weights[0].size))))
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
    run: Run,
    rivals: Mapping[str, Run],
    weights: NDArray[np.float64],
    most: int = MAX_CLIENTS,
) -> dict[str, Any] | None:
    """Return the points of the client map and what colours them; None without weights.

    most: how many clients; of more, an even sample, the same as in `cards`.
    rivals: by name, the runs that a gain is measured against (same seed): more accuracy, or less
    loss in a regression.
    """
    points, share = plane(weights)
    chosen = sample(len(run.clients), most)
    points = points[:, chosen]
    low, high = points.min((0, 1)), points.max((0, 1))
    # One scale for both axes: a distance on the map is a distance of rows.
    room = np.array(MAP) - 2 * _EDGE
    scale = float((room / np.maximum(high - low, 1e-9)).min())
    middle = (low + high) / 2
    places = (points - middle) * scale * np.array([1, -1]) + np.array(MAP) / 2
    radius = round(float(np.clip(np.sqrt(0.04 * MAP[0] * MAP[1] / len(chosen)), 5, 9)), 1)
    places = np.round(np.stack([separated(one, 2 * radius + 1) for one in places]))
    clients = [run.clients[i] for i in chosen]
    family = families([client.kind for client in clients])
    kinds = sorted(set(family.values()))
    signs = [*string.ascii_lowercase, *string.ascii_uppercase]
    letters = {kind: signs[i] if i < len(signs) else "·" for i, kind in enumerate(kinds)}
    gains = {name: _gains(clients, other.clients) for name, other in rivals.items()}
    return {
        "size": MAP,
        "share": share,
        "radius": radius,
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
                "letter": letters.get(family.get(client.kind or "", ""), ""),
                "colour": FILLS[kinds.index(family[client.kind]) % len(FILLS)]
                if client.kind is not None
                else "var(--rule)",
                "gains": [_shade(gain[k], gain) for gain in gains.values()],
            }
            for k, client in enumerate(clients)
        ],
        "path": places.reshape(len(places), -1).tolist(),
    }


def separated(places: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Return the `places` (m, 2) of the map moved apart to about `gap`, each as little as needed.

    Many clients with equal weights would otherwise be one point. Those on one spot are set round
    it like the seeds of a sunflower; then pairs that are still too near push each other away.
    """
    m = len(places)
    near = np.linalg.norm(places[:, None] - places[None], axis=2) < gap / 2
    earlier = np.tril(near, -1).sum(1)  # clients on the spot before this one
    angle, far = earlier * 2.399963, 0.56 * gap * np.sqrt(earlier)
    moved: NDArray[np.float64] = places + (far * np.stack([np.cos(angle), np.sin(angle)])).T
    low, high = np.full(2, _EDGE / 4), np.array(MAP) - _EDGE / 4
    for _ in range(_PUSHES):
        apart = moved[:, None] - moved[None]
        distance = np.linalg.norm(apart, axis=2) + np.eye(m) * 1e9
        push = np.maximum(gap - distance, 0) / np.maximum(distance, 1e-9)
        if not push.any():
            break
        moved = np.clip(moved + 0.3 * (push[..., None] * apart).sum(1), low, high)
    return moved


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
        return {"sign": "?", "hue": "rule", "strength": 100, "value": "unknown"}
    sizes = [abs(value) for value in all_gains if value is not None]
    full = max(0.05, float(np.quantile(sizes, 0.9)))
    strength = round(100 * min(1.0, abs(gain) / full))
    sign = "+" if gain > 0 else "−" if gain < 0 else "="
    return {
        "sign": sign,
        "hue": "accent" if gain > 0 else "blue" if gain < 0 else "rule",
        "strength": max(strength, 12) if gain else 100,
        "value": f"{sign}{abs(gain):.3f}" if gain else "0",
    }


def cards(subject: Run, others: Sequence[Run], most: int = MAX_CLIENTS) -> dict[str, Any]:
    """Return what the page shows of each client of `subject`, and its accuracy in all runs.

    others: the runs of all methods with the same setting and seed. Accuracies (or losses of a
    regression) are in thousandths, a list in the order of `others`, or "diverged"; weights in
    hundredths.
    """
    metric = _metric(subject.clients)
    values = [_read(run, metric) for run in others]
    chosen = sample(len(subject.clients), most)
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
                "values": [seen.get(client.id) for seen in values],
                "row": None if rows is None else rows[i].tolist(),
                "worth": [_thousandths(value) for value in client.importance],
            }
            for i, client in ((i, subject.clients[i]) for i in chosen)
        ],
    }


def _read(run: Run, metric: str) -> dict[str, int | str | None]:
    """What is known of each client of a run, in thousandths.

    Files hold no loss of a diverged model, nor of a client that was not measured; but only the
    first leaves the mean without a value, too.
    """
    mean = run.last.models["merged"].loss if "merged" in run.last.models else None
    gone = "diverged" if metric == "loss" and not finite(mean) else None
    read = {c.id: _thousandths(getattr(c, metric).get("merged")) for c in run.clients}
    return {name: gone if value is None else value for name, value in read.items()}


def _thousandths(value: float | None) -> int | None:
    return round(1000 * value) if value is not None and finite(value) else None


def part_of(run: Run, weights: NDArray[np.float64]) -> Shown:
    """Return what the heat maps of `run` show, on one scale for all rounds."""
    return shown(run, float(weights.max()))
