"""The results of a folder of runs as two tables: of runs, `results.jsonl`, and of clients,
`clients.parquet`.

It collects what finished runs have written and changes none of it; statistics and pictures are made
from these tables elsewhere.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StateError
from .cells import RUNS, Cell
from .folder import RESULT, check_comparison, read_result, write_bytes, write_lines

if TYPE_CHECKING:
    import pyarrow

RESULTS = "results.jsonl"
CLIENTS = "clients.parquet"
MODELS = ("merged", "tuned", "local")
FIGURES = ("accuracy", "auc", "loss")
COSTS = ("down", "up", "client", "server", "server_per_client", "passes")
REFERENCES = ("local", "fedavg")
"""Methods that clients are compared with."""

Result = Mapping[str, Any]
Place = tuple[str, str, int]
"""Data set, setting and seed."""


def collect(out: Path, cells: Sequence[Cell] = ()) -> list[dict[str, Any]]:
    """Write both tables of all runs in `out` that are finished, each whole or not at all.

    Args:
        out: folder of a comparison, or of one run.
        cells: their runs come first, in this order; the others keep the order they had.

    Returns:
        The rows of results.jsonl: one for each run, "last" or "best" evaluated round, and model.

    Raises:
        StateError: a folder of another version, a file that is damaged, or one that cannot be
            written.
    """
    check_comparison(out)
    results = _read_results(out, cells)
    rows = list(result_rows(results))
    write_lines(out / RESULTS, rows)
    write_bytes(out / CLIENTS, _parquet(client_table(results)))
    return rows


def _read_results(out: Path, cells: Sequence[Cell]) -> list[Result]:
    """The results of all finished runs, in order."""
    folders = {path.parent for path in out.glob(f"{RUNS}/*/{RESULT}")}
    if (out / RESULT).is_file():
        folders.add(out)
    asked = {cell.folder(out): i for i, cell in enumerate(cells)}
    before = _order_before(out / RESULTS)
    found = []
    for folder in sorted(folders):
        result = read_result(folder)
        if result is None:  # removed meanwhile
            continue
        _check_form(folder, result)
        key = (*_place(result), result["method"])
        rank = (asked.get(folder, math.inf), before.get(key, math.inf), folder.name)
        found.append((rank, result))
    return [result for _, result in sorted(found, key=lambda one: one[0])]


def _order_before(path: Path) -> dict[tuple[Any, ...], int]:
    """Rank of each run in the table that is there; empty if there is none, or none of this form."""
    rank: dict[tuple[Any, ...], int] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rank.setdefault((*_place(row), row["method"]), len(rank))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return rank


def _check_form(folder: Path, result: Result) -> None:
    wanted = {"data", "setting", "method", "seed", "models", "clients", "best", "cost"}
    missing = sorted(wanted - result.keys())
    if missing:
        raise StateError(
            f"{folder / RESULT} has no {missing[0]}: another version of fedmerge wrote it; "
            f"remove {folder} to run it again, or use that version"
        )
    try:
        same = [c["id"] for c in result["clients"]] == [c["id"] for c in result["best"]["clients"]]
    except (LookupError, TypeError):
        same = False
    if not same:
        raise StateError(
            f"{folder / RESULT} is damaged (its clients are not those of its best round); "
            f"remove {folder} to run it again"
        )


def _place(result: Result) -> Place:
    return result["data"], result["setting"], result["seed"]


# -- runs ------------------------------------------------------------------------------------------


def result_rows(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Rows of finished runs: of each, for its last and its best evaluated round, every model.

    Loss and gaps are in nats (squared units for regression), mean per example; bytes are per client
    and round; costs in models; better_than_...: share of the clients that do better on test data
    than with the merged model of that method.
    """
    references = {
        (_place(result), result["method"]): result
        for result in results
        if result["method"] in REFERENCES
    }
    for result, at in itertools.product(results, ("last", "best")):
        reached = _at(result, at)
        rivals = {
            name: _clients_at(references.get((_place(result), name)), at) for name in REFERENCES
        }
        for model, scores in reached["models"].items():
            yield {
                **{key: result[key] for key in ("data", "setting", "method", "seed")},
                "at": at,
                "model": model,
                "round": reached["round"],
                "accuracy": scores["accuracy"],
                "accuracy_std": scores["accuracy_std"],
                # Of the mean, where an evaluation measures a sample of the clients.
                "accuracy_error": scores.get("accuracy_error"),
                "accuracy_worst_decile": scores["accuracy_worst_decile"],
                "auc": scores["auc"],
                "loss": scores["loss"],
                **{
                    f"better_than_{name}": _share_better(result, at, model, rivals[name])
                    for name in REFERENCES
                },
                "gap_train": reached["gap_train"],
                "gap_test": reached["gap_test"],
                **{k: result[k] for k in ("rounds", "seconds", "bytes_up", "bytes_down")},
                "chosen": result.get("chosen") or {},
                **{f"cost_{name}": result["cost"][name] for name in COSTS},
            }


def _at(result: Result, at: str) -> Mapping[str, Any]:
    """What a run had reached at its "last" evaluated round, or at its "best"."""
    return result["best"] if at == "best" else result


def _clients_at(result: Result | None, at: str) -> dict[str, Mapping[str, Any]] | None:
    return None if result is None else {c["id"]: c for c in _at(result, at)["clients"]}


def _share_better(
    result: Result, at: str, model: str, rivals: Mapping[str, Mapping[str, Any]] | None
) -> float | None:
    """Share of a run's clients that do strictly better than with the merged model of `rivals`.

    By accuracy, or by loss where there is none; clients that the other run has not are left out.
    """
    if rivals is None:
        return None
    better = []
    for client in _at(result, at)["clients"]:
        rival = rivals.get(client["id"])
        if rival is None or model not in client["loss"] or "merged" not in rival["loss"]:
            continue
        own, other = client["accuracy"][model], rival["accuracy"]["merged"]
        if own is None or other is None:
            # A loss that is not there is that of a model that has diverged.
            own = -_or_infinite(client["loss"][model])
            other = -_or_infinite(rival["loss"]["merged"])
        better.append(own > other)
    return sum(better) / len(better) if better else None


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


# -- clients ---------------------------------------------------------------------------------------


def client_table(results: Sequence[Result]) -> pyarrow.Table:
    """One row for each client of each run, for its last and its best evaluated round.

    Figures are of the client's test data. weights: its row, (b * d) numbers, block after block;
    importance: (d,), by how much its validation loss rises without each of the models; both for the
    last round only, null for methods without.
    """
    import pyarrow

    columns: dict[str, list[Any]] = {name: [] for name in _schema().names}
    for result, at in itertools.product(results, ("last", "best")):
        for i, (facts, figures) in enumerate(
            zip(result["clients"], _at(result, at)["clients"], strict=True)
        ):
            row = {
                **{key: result[key] for key in ("data", "setting", "method", "seed")},
                "at": at,
                "client": facts["id"],
                **{k: facts[k] for k in ("kind", "n_train", "n_validation", "n_test")},
                "label_counts": facts["label_counts"],
                **{f"{f}_{m}": figures[f].get(m) for f, m in itertools.product(FIGURES, MODELS)},
                "weights": _row_of(result.get("weights"), i, at, flat=True),
                "importance": _row_of(result.get("importance"), i, at, flat=False),
            }
            for name, value in row.items():
                columns[name].append(value)
    return pyarrow.table(columns, schema=_schema())


def _row_of(table: Sequence[Any] | None, i: int, at: str, *, flat: bool) -> list[Any] | None:
    if table is None or at != "last":
        return None
    return list(itertools.chain.from_iterable(table[i])) if flat else list(table[i])


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    text, whole, number = pa.string(), pa.int64(), pa.float64()
    return pa.schema(
        [
            *((name, text) for name in ("data", "setting", "method")),
            ("seed", whole),
            *((name, text) for name in ("at", "client", "kind")),
            *((name, whole) for name in ("n_train", "n_validation", "n_test")),
            ("label_counts", pa.list_(whole)),
            *((f"{f}_{m}", number) for f, m in itertools.product(FIGURES, MODELS)),
            ("weights", pa.list_(number)),
            ("importance", pa.list_(number)),
        ]
    )


def _parquet(table: pyarrow.Table) -> bytes:
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
