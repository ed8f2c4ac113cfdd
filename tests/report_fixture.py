"""Run folders of the documented form with made-up, plausible numbers, for the report's tests.

Nothing is trained here: every number is drawn from a seeded generator around a chosen level.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("fedmerge", "fedavg", "fedavg-ft", "fedprox", "local", "ifca-warm", "ditto")
SETTINGS = ("concept-mix", "domain", "dirichlet")
LEVEL = {
    "concept-mix": (0.95, 0.56, 0.58, 0.57, 0.74, 0.89, 0.83),
    "domain": (0.889, 0.86, 0.865, 0.862, 0.71, 0.80, 0.901),
    "dirichlet": (0.93, 0.79, 0.92, 0.80, 0.931, 0.84, 0.925),
}
KINDS = {
    "concept-mix": [f"swap {bits:03b}" for bits in range(8)],
    "domain": ["rot0", "rot90", "rot180", "rot270", "inverted"],
    "dirichlet": [None],
}
MODELS = ("merged", "tuned", "local")


def write_folder(
    folder: Path,
    *,
    settings: Sequence[str] = SETTINGS,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    rounds: int = 60,
    clients: int = 32,
    accuracy: Mapping[tuple[str, str, int], float] | None = None,
) -> Path:
    """Write runs/*/ and results.jsonl; `accuracy` fixes the merged accuracy of chosen cells."""
    lines = []
    for setting in settings:
        for method in methods:
            for seed in seeds:
                given = (accuracy or {}).get((setting, method, seed))
                result = write_run(folder, setting, method, seed, rounds, clients, given)
                lines.extend(json.dumps(line) for line in _records(result))
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_run(
    folder: Path,
    setting: str,
    method: str,
    seed: int,
    rounds: int = 60,
    clients: int = 32,
    accuracy: float | None = None,
) -> dict[str, Any]:
    """Write one run folder under `folder`/runs and return its result."""
    name = method.split(":")[0]
    rng = np.random.default_rng([seed, *map(ord, setting + method)])
    column = METHODS.index(name) if name in METHODS else 0
    level = LEVEL.get(setting, LEVEL["domain"])[column] + rng.normal(0, 0.01)
    level = level if accuracy is None else accuracy
    kinds = KINDS.get(setting, [None])
    of_kind = [kinds[i % len(kinds)] for i in range(clients)]
    per_client = np.clip(level + rng.normal(0, 0.05, clients), 0, 1)
    per_client = np.round(per_client * 14) / 14
    models = {
        model: {
            "accuracy": min(1.0, level + shift),
            "accuracy_std": 0.05,
            "accuracy_worst_decile": level + shift - 0.12,
            "loss": float(-np.log(max(level + shift, 1e-3))) * 1.4,
        }
        for model, shift in zip(MODELS, (0.0, 0.012, 0.008), strict=True)
    }
    weights = blocks = None
    if name == "fedmerge":
        blocks = ["0", "2"]
        centre = {kind: rng.normal(0, 1.6, (2, 5)) for kind in kinds}
        logits = np.stack([centre[kind] + rng.normal(0, 0.3, (2, 5)) for kind in of_kind])
        weights = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).round(5).tolist()
    size = 0 if name == "local" else 16840
    result = {
        "setting": setting,
        "data": "digits",
        "method": method,
        "seed": seed,
        "rounds": rounds,
        "seconds": float(1.5 + column * 0.3 + rng.random()),
        "models": models,
        "gap_train": 0.02,
        "gap_test": _gap(column, rounds, rounds),
        "bytes_up": size,
        "bytes_down": size,
        "refused": {},
        "clients": [
            {
                "id": f"c{i:02d}",
                "kind": of_kind[i],
                "n_train": 28,
                "n_validation": 14,
                "n_test": 14,
                "accuracy": {model: float(per_client[i]) for model in MODELS},
                "loss": dict.fromkeys(MODELS, 0.3),
            }
            for i in range(clients)
        ],
        "weights": weights,
        "blocks": blocks,
    }
    run = folder / "runs" / f"{setting}--{method.replace(':', '_')}--{seed}"
    run.mkdir(parents=True)
    config = {
        "data": "digits",
        "setting": setting,
        "method": method,
        "seed": seed,
        "clients": clients,
        "rounds": rounds,
        "participation": 1.0,
        "training": {"lr": 0.05, "epochs": 2, "batch": 16},
    }
    log = (_round(t, rounds, level, column, models, rng) for t in range(1, rounds + 1))
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (run / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log), encoding="utf-8")
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return result


def _gap(column: int, t: int, rounds: int) -> float:
    return (0.01, 0.9, 0.7, 0.8, 0.0, 0.05, 0.02)[column] + 1.2 * float(np.exp(-6 * t / rounds))


def _round(
    t: int,
    rounds: int,
    level: float,
    column: int,
    models: Mapping[str, Mapping[str, float]],
    rng: np.random.Generator,
) -> dict[str, Any]:
    rise = 1 - 0.85 * float(np.exp(-(3 + column) * t / rounds)) + float(rng.normal(0, 0.006))
    rise = 1.0 if t == rounds else rise
    metrics = {
        model: {
            split: {
                "accuracy": {
                    "mean": models[model]["accuracy"] * rise,
                    "std": 0.1,
                    "worst_decile": level * rise - 0.1,
                },
                "loss": {"mean": models[model]["loss"] / rise, "std": 0.1, "worst_decile": 1.0},
            }
            for split in ("train", "validation", "test")
        }
        for model in MODELS
    }
    gap = _gap(column, t, rounds) * (1.0 if t == rounds else float(rng.uniform(0.9, 1.1)))
    return {
        "round": t,
        "cohort": 32,
        "dropped": 0,
        "refused": {},
        "metrics": {} if t % 2 else metrics,
        "gap_train": None if t % 2 else gap / 2,
        "gap_test": None if t % 2 else gap,
        "rows": None,
        "bytes_up": 32 * 16840,
        "bytes_down": 32 * 16840,
        "seconds": {"send": 0.0, "local": 0.02, "fold": 0.0, "commit": 0.0, "evaluate": 0.01},
    }


def _records(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    whole = ("gap_train", "gap_test", "rounds", "seconds", "bytes_up", "bytes_down")
    return [
        {
            **{key: result[key] for key in ("setting", "method", "seed")},
            "model": model,
            **{key: scores[key] for key in ("accuracy", "accuracy_worst_decile", "loss")},
            **{key: result[key] for key in whole},
        }
        for model, scores in result["models"].items()
    ]
