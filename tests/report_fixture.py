"""Run folders of the documented form with made-up, plausible numbers, for the report's tests.

Nothing is trained here: every number is drawn from a seeded generator around a chosen level.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge.compare.folder import FORMAT

ALL_METHODS = (
    "fedmerge", "fedmerge-paper", "fedavg", "fedavg-ft", "fedprox", "local", "ifca", "ifca-warm",
    "ditto", "apfl", "fedper", "fedrep", "fedbabu", "fedamp", "fedfomo", "fedala", "apple",
    "fesem", "cfl", "fedem", "ppfl", "moe",
)  # fmt: skip
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
COST = {
    "fedavg": {
        "down": 1.0, "up": 1.0, "client": 0.0, "server": 1.0, "server_per_client": 0.0,
        "passes": 1.0,
    },
    "fedmerge": {
        "down": 1.0, "up": 1.0, "client": 0.0, "server": 12.0, "server_per_client": 0.4,
        "passes": 1.0,
    },
    "ifca-warm": {
        "down": 4.0, "up": 1.0, "client": 0.0, "server": 4.0, "server_per_client": 0.0,
        "passes": 1.0,
    },
    "local": {
        "down": 0.0, "up": 0.0, "client": 1.0, "server": 0.0, "server_per_client": 0.0,
        "passes": 1.0,
    },
}  # fmt: skip


def write_folder(
    folder: Path,
    *,
    settings: Sequence[str] = SETTINGS,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    rounds: int = 60,
    clients: int = 32,
    accuracy: Mapping[tuple[str, str, int], float] | None = None,
    data: Sequence[str] = ("digits",),
) -> Path:
    """Write a finished comparison; `accuracy` fixes the merged accuracy of chosen cells."""
    results = []
    for source in data:
        for setting in settings:
            for method in methods:
                for seed in seeds:
                    given = (accuracy or {}).get((setting, method, seed))
                    results.append(
                        write_run(folder, setting, method, seed, rounds, clients, given, source)
                    )
    write_tables(folder, results)
    return folder


def write_tables(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write results.jsonl and clients.parquet of `results`, as a finished comparison has them."""
    import pyarrow
    from pyarrow import parquet

    by_cell = {(r["data"], r["setting"], r["method"], r["seed"]): r for r in results}
    lines = [json.dumps(line) for r in results for line in _records(r, by_cell)]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [row for result in results for row in _client_rows(result)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "clients.parquet")


def write_run(
    folder: Path,
    setting: str,
    method: str,
    seed: int,
    rounds: int = 60,
    clients: int = 32,
    accuracy: float | None = None,
    data: str = "digits",
) -> dict[str, Any]:
    """Write one run folder under `folder`/runs and return its result."""
    name = method.split(":")[0]
    rng = np.random.default_rng([seed, *map(ord, data + setting + method)])
    levels = LEVEL.get(setting, LEVEL[SETTINGS[sum(map(ord, setting)) % 3]])
    column = METHODS.index(name) if name in METHODS else 1
    level = levels[METHODS.index(name)] if name in METHODS else _other_level(setting, name)
    level += rng.normal(0, 0.008)
    level = level if accuracy is None else accuracy
    kinds = KINDS.get(setting, [None])
    of_kind = [kinds[i % len(kinds)] for i in range(clients)]
    hard = np.random.default_rng([seed, *map(ord, setting)]).normal(0, 0.05, clients)
    per_client = np.clip(level + hard - hard.mean() + rng.normal(0, 0.02, clients), 0, 1)
    per_client = np.round(per_client * 28) / 28
    models = {
        model: {
            "accuracy": min(1.0, level + shift),
            "accuracy_std": float(per_client.std()),
            "accuracy_worst_decile": level + shift - 0.12,
            "auc": None,
            "loss": float(-np.log(max(level + shift, 1e-3))) * 1.4,
        }
        for model, shift in zip(MODELS, (0.0, 0.012, 0.008), strict=True)
    }
    evaluated = [t for t in range(1, rounds + 1) if t % 2 == 0 or t == rounds]
    weights = blocks = importance = None
    run = folder / "runs" / f"{data}--{setting}--{method.replace(':', '_')}--s{seed}"
    run.mkdir(parents=True)
    if name == "fedmerge":
        blocks = ["0", "2"]
        centre = {kind: rng.normal(0, 1.6, (2, 5)) for kind in kinds}
        logits = np.stack([centre[kind] + rng.normal(0, 0.5, (2, 5)) for kind in of_kind])
        grown = np.stack([logits * min(1.0, 1.5 * t / rounds) for t in evaluated])
        path = np.exp(grown) / np.exp(grown).sum(-1, keepdims=True)
        weights = path[-1].round(5).tolist()
        path[-1] = weights
        np.savez_compressed(
            run / "weights.npz", rounds=np.array(evaluated), weights=path.astype(np.float32)
        )
        importance = (path[-1].mean(1) ** 2 * rng.uniform(0.2, 2.0, (clients, 5))).round(5).tolist()
    size = 0 if name == "local" else 16840
    counts = rng.multinomial(28, rng.dirichlet(np.full(10, 0.6)), size=clients)
    result = {
        "setting": setting,
        "data": data,
        "method": method,
        "seed": seed,
        "rounds": rounds,
        "seconds": float(1.5 + column * 0.3 + rng.random()),
        "models": models,
        "round": rounds,
        "gap_train": 0.02,
        "gap_test": _gap(column, rounds, rounds),
        "best": {
            "round": evaluated[-2] if len(evaluated) > 1 else rounds,
            "models": _less(models),
            "gap_train": 0.03,
            "gap_test": 0.04,
            "clients": [
                {
                    "id": f"c{i:02d}",
                    "accuracy": {model: float(per_client[i]) * 0.99 for model in MODELS},
                    "auc": dict.fromkeys(MODELS),
                    "loss": dict.fromkeys(MODELS, 0.31),
                }
                for i in range(clients)
            ],
        },
        "bytes_up": size,
        "bytes_down": size,
        "refused": {},
        "cost": dict(COST.get(name, COST["fedavg"])),
        "clients": [
            {
                "id": f"c{i:02d}",
                "kind": of_kind[i],
                "n_train": 28,
                "n_validation": 14,
                "n_test": 28,
                "label_counts": counts[i].tolist(),
                "accuracy": {model: float(per_client[i]) for model in MODELS},
                "auc": dict.fromkeys(MODELS),
                "loss": dict.fromkeys(MODELS, 0.3),
            }
            for i in range(clients)
        ],
        "importance": importance,
        "chosen": {} if name == "local" else {"lr": 0.1},
        "weights": weights,
        "blocks": blocks,
    }
    config = {
        "data": data,
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
    facts = {"format": FORMAT, "preset": None, "tuning": {"trials": 4, "seeds": [90, 91]}}
    (folder / "comparison.json").write_text(json.dumps(facts), encoding="utf-8")
    return result


def _other_level(setting: str, name: str) -> float:
    rng = np.random.default_rng([*map(ord, setting + name)])
    return float(rng.uniform(0.66, 0.91))


def _less(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The scores of a round that is a little worse than the last."""
    return {
        model: {key: None if value is None else value * 0.99 for key, value in scores.items()}
        for model, scores in models.items()
    }


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


def _records(
    result: Mapping[str, Any], by_cell: Mapping[tuple[str, str, str, int], Mapping[str, Any]]
) -> Iterable[dict[str, Any]]:
    gaps = ("gap_train", "gap_test")
    whole = ("rounds", "seconds", "bytes_up", "bytes_down")
    cell = {key: result[key] for key in ("data", "setting", "method", "seed")}
    for at in ("last", "best"):
        best = result["best"]
        scored = result["models"] if at == "last" else best["models"]
        for model, scores in scored.items():
            yield {
                **cell,
                "at": at,
                "model": model,
                "round": (result if at == "last" else best)["round"],
                **scores,
                "better_than_local": _share(result, by_cell, "local", model, at),
                "better_than_fedavg": _share(result, by_cell, "fedavg", model, at),
                **{key: result[key] for key in whole},
                **{key: (result if at == "last" else best)[key] for key in gaps},
                "chosen": result["chosen"],
                **{f"cost_{key}": value for key, value in result["cost"].items()},
            }


def _share(
    result: Mapping[str, Any],
    by_cell: Mapping[tuple[str, str, str, int], Mapping[str, Any]],
    rival: str,
    model: str,
    at: str,
) -> float | None:
    other = by_cell.get((result["data"], result["setting"], rival, result["seed"]))
    if other is None:
        return None
    ours, theirs = ((r if at == "last" else r["best"])["clients"] for r in (result, other))
    pairs = zip(ours, theirs, strict=True)
    won = [a["accuracy"][model] > b["accuracy"]["merged"] for a, b in pairs]
    return sum(won) / len(won)


def _client_rows(result: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for at in ("last", "best"):
        for i, client in enumerate(result["clients"]):
            weights, worth = result["weights"], result["importance"]
            figures = (result if at == "last" else result["best"])["clients"][i]
            yield {
                **{key: result[key] for key in ("data", "setting", "method", "seed")},
                "at": at,
                "client": client["id"],
                **{key: client[key] for key in ("kind", "n_train", "n_validation", "n_test")},
                "label_counts": client["label_counts"],
                **{
                    f"{metric}_{model}": figures[metric][model]
                    for metric in ("accuracy", "auc", "loss")
                    for model in MODELS
                },
                "weights": np.ravel(weights[i]).tolist() if weights and at == "last" else None,
                "importance": worth[i] if worth and at == "last" else None,
            }
