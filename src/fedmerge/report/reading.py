"""Finished runs read back from disk: what `fedmerge run` and `fedmerge compare` left in a folder.

It only reads and checks; it computes no statistics and draws nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.report.files import (
    check_format,
    no_run,
    number,
    read_arrays,
    read_columns,
    read_lines,
    read_object,
    wrong_form,
)
from fedmerge.report.rounds import load_log
from fedmerge.report.runs import (
    COSTS,
    MODELS,
    ROUNDS,
    ClientResult,
    Evaluation,
    Run,
    Scores,
)

Key = tuple[str, str, str, int]  # data, setting, method, seed


def load_runs(folder: Path) -> list[Run]:
    """Read every finished run of `folder`, which `fedmerge compare` or `fedmerge run` wrote.

    The order is that of `results.jsonl` where there is one (the order the user asked for), then
    by folder name. Raises StateError for a file that is missing, broken or of the wrong form,
    for a folder of another version, and where there is no finished run at all.
    """
    compared = bool(check_format(folder))
    paths = [path.parent for path in sorted(folder.glob("runs/*/result.json"))] if compared else []
    if (folder / "result.json").is_file():
        paths.insert(0, folder)
    runs = {_key(run): run for run in map(_load_run, paths)}
    rows = _by_run(folder / "results.jsonl")
    clients = _clients_by_run(folder / "clients.parquet") if rows else {}
    found = [
        _filled(runs.pop(key, None), key, of_run, clients.get(key, {}))
        for key, of_run in rows.items()
    ]
    found += runs.values()  # finished after results.jsonl was written, or a lone run
    if not found:
        raise no_run(folder)
    if len({run.data for run in found}) > 1:
        return [replace(run, column=f"{run.data}/{run.setting}") for run in found]
    return found


def load_history(run: Run) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """Return the evaluated rounds (T,) and the merging weights (T, m, b, d) at each, or None."""
    stored = read_arrays(run.path / "weights.npz") if run.path is not None else {}
    if not {"rounds", "weights"} <= stored.keys() or not stored["weights"].size:
        return None
    rounds, weights = stored["rounds"], stored["weights"]
    wanted = (len(rounds), *(weights.shape[1:] if run.weights is None else run.weights.shape))
    if weights.shape != wanted or weights.ndim != 4:
        path = (run.path or Path()) / "weights.npz"
        raise wrong_form(path, ValueError(f"weights have shape {weights.shape}, wanted {wanted}"))
    return rounds.astype(np.int64), weights.astype(np.float64)


def unlisted(folder: Path) -> bool:
    """Whether a table of `folder` is missing, or runs have finished since they were written.

    Not where folders of runs are gone, which only the tables still know of.
    """
    finished = sum(1 for _ in folder.glob("runs/*/result.json"))
    listed = len(_by_run(folder / "results.jsonl"))
    lost = not (folder / "clients.parquet").is_file()
    return finished > listed or (0 < finished == listed and lost)


def unfinished(folder: Path) -> tuple[str, ...]:
    """Return the names of the runs in `folder` that were started and have no result yet."""
    started = {path.parent for path in folder.glob("runs/*/config.json")}
    return tuple(sorted(p.name for p in started if not (p / "result.json").is_file()))


def untuned(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Return the runs that have their method's defaults because trials of its tuning failed."""
    return tuple(run for run in runs if run.path is not None and _failed_trials(run.path))


def _failed_trials(folder: Path) -> bool:
    """Whether what tuning chose for the run in `folder` is for want of trials."""
    path = folder.parent.parent / "tuning" / f"{folder.name.rpartition('--s')[0]}.json"
    return path.is_file() and bool(read_object(path).get("failed"))


def _key(run: Run) -> Key:
    return run.data, run.setting, run.method, run.seed


def _by_run(path: Path) -> dict[Key, list[dict[str, Any]]]:
    """The rows of results.jsonl by run, in the order of the file; {} where there is none."""
    rows: dict[Key, list[dict[str, Any]]] = {}
    if not path.is_file():
        return rows
    for line, row in read_lines(path):
        try:
            key = (row["data"], row["setting"], row["method"], row["seed"])
            _row_scores(row)
            rows.setdefault(key, []).append(row)
        except (KeyError, TypeError, ValueError) as error:
            raise wrong_form(path, error, line) from error
    return rows


def _row_scores(row: Mapping[str, Any]) -> tuple[str, str, Scores]:
    """(at, model, scores) of a row."""
    where, model = row["at"], row["model"]
    if where not in ROUNDS or model not in MODELS:
        raise ValueError(f'got at = "{where}", model = "{model}"')
    return where, model, _scores(row)


def _clients_by_run(path: Path) -> dict[Key, dict[str, tuple[ClientResult, ...]]]:
    """The clients of clients.parquet by run and round."""
    columns = read_columns(path)
    found: dict[Key, dict[str, list[ClientResult]]] = defaultdict(lambda: defaultdict(list))
    try:
        for row in _dicts(columns):
            key = (row["data"], row["setting"], row["method"], row["seed"])
            found[key][row["at"]].append(
                ClientResult(
                    id=row["client"],
                    kind=row["kind"],
                    n_train=row["n_train"],
                    n_validation=row["n_validation"],
                    n_test=row["n_test"],
                    accuracy={m: row[f"accuracy_{m}"] for m in MODELS},
                    loss={m: row[f"loss_{m}"] for m in MODELS},
                    auc={m: row[f"auc_{m}"] for m in MODELS},
                    label_counts=tuple(row["label_counts"] or ()),
                    importance=_known(row["importance"]),
                )
            )
    except (KeyError, TypeError) as error:
        raise wrong_form(path, error) from error
    return {
        key: {where: tuple(clients) for where, clients in of_run.items()}
        for key, of_run in found.items()
    }


def _dicts(columns: Mapping[str, Sequence[Any]]) -> Iterable[dict[str, Any]]:
    return (
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    )


def _filled(
    run: Run | None,
    key: Key,
    rows: Sequence[Mapping[str, Any]],
    clients: Mapping[str, tuple[ClientResult, ...]],
) -> Run:
    """The run with what the tables of the comparison say of it; its folder may be gone."""
    models: dict[str, dict[str, Scores]] = {}
    for row in rows:
        where, model, scores = _row_scores(row)
        models.setdefault(where, {})[model] = scores
    first, last = rows[0], next((row for row in rows if row["at"] == "last"), rows[0])
    held = run.clients if run is not None else ()
    seen = {
        where: Evaluation(
            next(int(row["round"]) for row in rows if row["at"] == where),
            of_model,
            clients.get(where) or (held if where == "last" else ()),
        )
        for where, of_model in models.items()
    }
    common: dict[str, Any] = {
        "last": seen.get("last", Evaluation(int(last["round"]), {})),
        "best": seen.get("best"),
        "cost": {name: float(first[f"cost_{name}"]) for name in COSTS if f"cost_{name}" in first},
        "chosen": dict(first.get("chosen") or {}),
    }
    if run is not None:
        return replace(run, **common)
    data, setting, method, seed = key
    return Run(
        folder="",
        setting=setting,
        data=data,
        method=method,
        seed=seed,
        rounds=int(last["rounds"]),
        seconds=float(last["seconds"]),
        gap_train=number(last["gap_train"]),
        gap_test=number(last["gap_test"]),
        bytes_up=float(last["bytes_up"]),
        bytes_down=float(last["bytes_down"]),
        **common,
    )


def _load_run(folder: Path) -> Run:
    path = folder / "result.json"
    result, config = read_object(path), read_object(folder / "config.json")
    log = load_log(folder / "log.jsonl")
    try:
        facts = result["clients"]
        worth = result.get("importance") or [()] * len(facts)
        clients = tuple(map(_client, facts, facts, worth))
        blocks = result["blocks"]
        models = {name: _scores(record) for name, record in result["models"].items()}
        best = result["best"]
        return Run(
            folder=folder.name,
            setting=str(result["setting"]),
            data=str(result["data"]),
            method=str(result["method"]),
            seed=int(result["seed"]),
            rounds=int(result["rounds"]),
            seconds=float(result["seconds"]),
            last=Evaluation(int(result["round"] or 0), models, clients),
            best=_best(best, facts) if best["models"] else None,
            gap_train=number(result["gap_train"]),
            gap_test=number(result["gap_test"]),
            bytes_up=float(result["bytes_up"]),
            bytes_down=float(result["bytes_down"]),
            blocks=None if blocks is None else tuple(str(name) for name in blocks),
            config=dict(config),
            log=log,
            refused={str(reason): int(n) for reason, n in result["refused"].items()},
            cost={name: float(result["cost"][name]) for name in COSTS},
            chosen=dict(result.get("chosen") or {}),
            weights=_weights(result["weights"], len(clients), blocks),
            path=folder,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise wrong_form(path, error) from error


def _best(record: Mapping[str, Any], facts: Sequence[Mapping[str, Any]]) -> Evaluation:
    models = {name: _scores(scores) for name, scores in record["models"].items()}
    clients = tuple(
        _client(fact, figures) for fact, figures in zip(facts, record["clients"], strict=True)
    )
    return Evaluation(int(record["round"]), models, clients)


def _client(
    facts: Mapping[str, Any], figures: Mapping[str, Any], worth: Sequence[float | None] = ()
) -> ClientResult:
    kind = facts["kind"]
    by_model = {
        name: {model: number(value) for model, value in (figures[name] or {}).items()}
        for name in ("accuracy", "loss", "auc")
    }
    return ClientResult(
        id=str(facts["id"]),
        kind=None if kind is None else str(kind),
        n_train=int(facts["n_train"]),
        n_validation=int(facts["n_validation"]),
        n_test=int(facts["n_test"]),
        label_counts=tuple(int(n) for n in facts["label_counts"] or ()),
        importance=_known(worth),
        **by_model,
    )


def _known(worth: Sequence[float | None] | None) -> tuple[float, ...]:
    """What models are worth, NaN where the loss without one is not finite."""
    return tuple(float("nan") if value is None else float(value) for value in worth or ())


def _scores(record: Mapping[str, Any]) -> Scores:
    optional = ("auc", "better_than_local", "better_than_fedavg")
    loss = number(record["loss"])
    return Scores(
        accuracy=number(record["accuracy"]),
        accuracy_std=number(record["accuracy_std"]),
        accuracy_worst_decile=number(record["accuracy_worst_decile"]),
        # Files hold null for a loss that is not finite: this model has diverged.
        loss=float("nan") if loss is None else loss,
        **{name: number(record.get(name)) for name in optional},
    )


def _weights(nested: Any, m: int, blocks: Any) -> NDArray[np.float64] | None:
    if nested is None:
        return None
    weights = np.asarray(nested, dtype=np.float64)
    wanted = (m, len(blocks or ()))
    if weights.ndim != 3 or weights.shape[:2] != wanted:
        raise ValueError(f"weights have shape {weights.shape}, wanted {wanted} and models last")
    return weights
