"""Finished runs read back from disk: what `fedmerge run` and `fedmerge compare` left in a folder.

It only reads and checks; it computes no statistics and draws nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import StateError

MODELS = ("merged", "tuned", "local")


@dataclass(frozen=True)
class Scores:
    """One evaluated model over the clients' test data; accuracy is None for regression."""

    accuracy: float | None
    accuracy_std: float | None
    accuracy_worst_decile: float | None
    loss: float | None


@dataclass(frozen=True)
class ClientResult:
    """One client at the end of a run: sizes of its splits, test accuracy and loss by model."""

    id: str
    kind: str | None
    n_train: int
    n_validation: int
    n_test: int
    accuracy: Mapping[str, float | None]
    loss: Mapping[str, float | None]


@dataclass(frozen=True)
class RoundPoint:
    """One round of the log: mean test accuracy and loss by model (empty if not evaluated)."""

    round: int
    accuracy: Mapping[str, float]
    loss: Mapping[str, float]
    gap_train: float | None
    gap_test: float | None


@dataclass(frozen=True)
class Run:
    """One finished run: its result, its configuration and its log.

    weights: (m, b, d) merging weights at the end of the run, row i is client i's, or None for a
    method without rows. gap: nats. bytes: per client and round. seconds: the whole run.
    """

    folder: str
    setting: str
    data: str
    method: str
    seed: int
    rounds: int
    seconds: float
    models: Mapping[str, Scores]
    gap_train: float | None
    gap_test: float | None
    bytes_up: float
    bytes_down: float
    clients: tuple[ClientResult, ...]
    blocks: tuple[str, ...] | None
    config: Mapping[str, Any] = field(repr=False)
    log: tuple[RoundPoint, ...] = field(repr=False)
    refused: Mapping[str, int] = field(default_factory=dict)
    weights: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)


def is_fedmerge(method: str) -> bool:
    """Whether a method string such as "fedmerge:d=8" names FedMerge in one of its variants."""
    return method.split(":")[0].split("-")[0] == "fedmerge"


def load_runs(folder: Path) -> list[Run]:
    """Read every finished run of `folder`, which `fedmerge compare` or `fedmerge run` wrote.

    The order is that of `results.jsonl` where there is one (the order the user asked for), then
    by folder name. Raises StateError for a file that is missing, broken or of the wrong form,
    and where there is no finished run at all.
    """
    folders = [path.parent for path in sorted(folder.glob("runs/*/result.json"))]
    if (folder / "result.json").is_file():
        folders.insert(0, folder)
    if not folders:
        raise StateError(
            f"{folder}: no finished run (no result.json in it, nor in its runs/*/); "
            "run `fedmerge compare --out` with this folder first"
        )
    runs = [_load_run(path) for path in folders]
    order = _asked_order(folder / "results.jsonl")
    return sorted(
        runs, key=lambda run: order.get((run.setting, run.method, run.seed), len(order))
    )  # sorted() is stable: runs that results.jsonl does not name stay by folder name


def unfinished(folder: Path) -> tuple[str, ...]:
    """Return the names of the runs in `folder` that were started and have no result yet."""
    started = {path.parent for path in folder.glob("runs/*/config.json")}
    return tuple(sorted(p.name for p in started if not (p / "result.json").is_file()))


def _asked_order(path: Path) -> dict[tuple[str, str, int], int]:
    """Rank of each (setting, method, seed) by its first line in results.jsonl; may be empty."""
    if not path.is_file():
        return {}
    rank: dict[tuple[str, str, int], int] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        record = _parse(line, path, number)
        try:
            rank.setdefault((record["setting"], record["method"], record["seed"]), len(rank))
        except (KeyError, TypeError) as error:
            raise _wrong_form(path, error, number) from error
    return rank


def _load_run(folder: Path) -> Run:
    path = folder / "result.json"
    result = _parse(_read(path), path)
    config = _parse(_read(folder / "config.json"), folder / "config.json")
    log = _load_log(folder / "log.jsonl")
    try:
        clients = tuple(_client(record) for record in result["clients"])
        blocks = result["blocks"]
        return Run(
            folder=folder.name,
            setting=str(result["setting"]),
            data=str(result["data"]),
            method=str(result["method"]),
            seed=int(result["seed"]),
            rounds=int(result["rounds"]),
            seconds=float(result["seconds"]),
            models={name: _scores(record) for name, record in result["models"].items()},
            gap_train=_number(result["gap_train"]),
            gap_test=_number(result["gap_test"]),
            bytes_up=float(result["bytes_up"]),
            bytes_down=float(result["bytes_down"]),
            clients=clients,
            blocks=None if blocks is None else tuple(str(name) for name in blocks),
            config=dict(config),
            log=log,
            refused={str(reason): int(n) for reason, n in result["refused"].items()},
            weights=_weights(result["weights"], len(clients), blocks),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _wrong_form(path, error) from error


def _load_log(path: Path) -> tuple[RoundPoint, ...]:
    points: dict[int, RoundPoint] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        record = _parse(line, path, number)
        try:
            point = _point(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _wrong_form(path, error, number) from error
        points[point.round] = point  # a resumed run may have logged a round twice: the last holds
    return tuple(points[number] for number in sorted(points))


def _point(record: Mapping[str, Any]) -> RoundPoint:
    means: dict[str, dict[str, float]] = {"accuracy": {}, "loss": {}}
    for model, splits in record["metrics"].items():
        for metric, values in means.items():
            summary = splits["test"][metric]
            if summary is not None and summary["mean"] is not None:
                values[str(model)] = float(summary["mean"])
    return RoundPoint(
        round=int(record["round"]),
        accuracy=means["accuracy"],
        loss=means["loss"],
        gap_train=_number(record["gap_train"]),
        gap_test=_number(record["gap_test"]),
    )


def _client(record: Mapping[str, Any]) -> ClientResult:
    kind = record["kind"]
    return ClientResult(
        id=str(record["id"]),
        kind=None if kind is None else str(kind),
        n_train=int(record["n_train"]),
        n_validation=int(record["n_validation"]),
        n_test=int(record["n_test"]),
        accuracy={name: _number(value) for name, value in (record["accuracy"] or {}).items()},
        loss={name: _number(value) for name, value in (record["loss"] or {}).items()},
    )


def _scores(record: Mapping[str, Any]) -> Scores:
    return Scores(
        accuracy=_number(record["accuracy"]),
        accuracy_std=_number(record["accuracy_std"]),
        accuracy_worst_decile=_number(record["accuracy_worst_decile"]),
        loss=_number(record["loss"]),
    )


def _weights(nested: Any, m: int, blocks: Any) -> NDArray[np.float64] | None:
    if nested is None:
        return None
    weights = np.asarray(nested, dtype=np.float64)
    wanted = (m, len(blocks or ()))
    if weights.ndim != 3 or weights.shape[:2] != wanted:
        raise ValueError(f"weights have shape {weights.shape}, wanted {wanted} and models last")
    return weights


def _number(value: Any) -> float | None:
    """A float, or None for null; a number that is not finite (a diverged run) stays as it is."""
    return None if value is None else float(value)


def finite(value: float | None) -> bool:
    """Whether `value` is a number that can be averaged and compared."""
    return value is not None and math.isfinite(value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(
            f"{path}: cannot be read ({error.__class__.__name__}); "
            "delete its run folder and run it again"
        ) from error


def _parse(text: str, path: Path, line: int | None = None) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno if line is None else line}, column {error.colno}"
        raise StateError(
            f"{path}: not valid JSON at {where} ({error.msg}); "
            "delete its run folder and run it again"
        ) from error
    if not isinstance(value, dict):
        raise _wrong_form(path, TypeError(f"got a {type(value).__name__}, wanted an object"), line)
    return value


def _wrong_form(path: Path, error: Exception, line: int | None = None) -> StateError:
    what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
    place = str(path) if line is None else f"{path}, line {line}"
    what = " ".join(what.split())
    return StateError(
        f"{place}: not of the form that fedmerge writes ({what}); "
        "delete its run folder and run it again"
    )
