"""The results of a comparison as one table: a row for each setting, method, seed and model.

It collects what finished runs have written and changes none of it; statistics and pictures are made
from these rows elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .cells import Cell
from .folder import check_config, read_result, write_lines

RESULTS = "results.jsonl"


def result_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each evaluated model of a finished run.

    Loss and gaps are in nats, mean per example; bytes are per client and round.
    """
    return [
        {
            "setting": result["setting"],
            "method": result["method"],
            "seed": result["seed"],
            "model": model,
            "accuracy": scores["accuracy"],
            "accuracy_worst_decile": scores["accuracy_worst_decile"],
            "loss": scores["loss"],
            "gap_train": result["gap_train"],
            "gap_test": result["gap_test"],
            "rounds": result["rounds"],
            "seconds": result["seconds"],
            "bytes_up": result["bytes_up"],
            "bytes_down": result["bytes_down"],
        }
        for model, scores in result["models"].items()
    ]


def unfinished_cells(cells: Iterable[Cell], out: Path) -> list[Cell]:
    """Return the `cells` that have no result in `out` yet.

    Raises:
        StateError: the folder of a cell holds a run with other settings.
    """
    todo = []
    for cell in cells:
        check_config(cell.folder(out), cell.config)
        if read_result(cell.folder(out)) is None:
            todo.append(cell)
    return todo


def collect_rows(cells: Iterable[Cell], out: Path) -> list[dict[str, Any]]:
    """Return the rows of all finished `cells`, in the order of the cells."""
    rows: list[dict[str, Any]] = []
    for cell in cells:
        result = read_result(cell.folder(out))
        if result is not None:
            rows.extend(result_rows(result))
    return rows


def write_rows(out: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write `rows` to results.jsonl in `out`, whole or not at all; return its path."""
    path = out / RESULTS
    write_lines(path, rows)
    return path
