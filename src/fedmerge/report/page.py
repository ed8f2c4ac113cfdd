"""The report page: one file that a browser opens without a network, in light and in dark.

It gathers what the other modules computed and drew; numbers are made in `ranking`, sentences in
`findings`, pictures in `figures`, and the page's words and looks are in page.html and page.css.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmerge.errors import MissingExtraError, StateError
from fedmerge.report import figures
from fedmerge.report.drawing import PALETTE, Style, method_styles
from fedmerge.report.findings import findings
from fedmerge.report.ranking import METRICS, Table, comparison, unique
from fedmerge.report.runs import Run, finite, is_fedmerge, load_runs, unfinished
from fedmerge.report.tables import entry_text, mark

# (heading, metric) of the table of one setting, left to right; all of the merged model.
_COLUMNS = (
    ("accuracy", "accuracy"),
    ("worst tenth", "accuracy_worst_decile"),
    ("loss, nats", "loss"),
    ("test gap, nats", "gap_test"),
    ("down", "bytes_down"),
    ("up", "bytes_up"),
    ("seconds", "seconds"),
)
_OF_THE_CELL = frozenset({"setting", "method", "seed", "out", "data", "name"})


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from the finished runs in `folder` and return its path.

    The file is replaced in one step, is equal for equal runs, and asks nothing of the network.
    Raises StateError if there is no run, or one is broken, or the page cannot be written, and
    MissingExtraError without matplotlib and jinja2.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401  (said here, before any work is done)
    except ImportError as error:
        raise MissingExtraError("report") from error
    runs = load_runs(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedmerge", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(_content(runs, unfinished(folder))).lstrip()
    path = folder / "report.html"
    try:
        _replace(path, page)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StateError(
            f"{path}: cannot be written ({reason}); free or choose a folder"
        ) from error
    return path


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".report-", suffix=".html")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _content(runs: Sequence[Run], open_runs: Sequence[str]) -> dict[str, Any]:
    """Everything the template shows."""
    settings = unique(run.setting for run in runs)
    methods = unique(run.method for run in runs)
    styles = method_styles(methods)
    of_setting = {name: [run for run in runs if run.setting == name] for name in settings}
    overview = [_table(table, styles) for table in _overviews(runs, "merged")]
    more = [
        _table(table, styles)
        for model in ("tuned", "local")
        for metric in ("accuracy", "accuracy_worst_decile", "loss")
        if _some(table := comparison(runs, model, metric))
    ]
    return {
        "findings": findings(runs),
        "facts": _facts(runs),
        "notices": _notices(runs, open_runs),
        "overview": overview,
        "more": more,
        "dots": [
            figures.to_svg(figures.method_dots(part, "merged", _metric(part), styles, name))
            for name, part in of_setting.items()
        ],
        "settings": [_setting(name, part, styles) for name, part in of_setting.items()],
        "configuration": _configuration(runs),
        "palette": PALETTE,
    }


def _metric(runs: Sequence[Run]) -> str:
    """Accuracy where any of the runs has one, else the loss."""
    read = METRICS["accuracy"].read
    return "accuracy" if any(read(run, "merged") is not None for run in runs) else "loss"


def _overviews(runs: Sequence[Run], model: str) -> list[Table]:
    settings = unique(run.setting for run in runs)
    chosen = unique(_metric([run for run in runs if run.setting == name]) for name in settings)
    return [comparison(runs, model, metric) for metric in chosen]


def _some(table: Table) -> bool:
    return any(entry.mean is not None for entry in table.entries.values())


def _table(table: Table, styles: Mapping[str, Style]) -> dict[str, Any]:
    return {
        "title": table.title,
        "note": table.note,
        "settings": table.settings,
        "rows": [
            {
                **_name(method, styles),
                "cells": [_cell(table, method, setting) for setting in table.settings],
            }
            for method in table.methods
        ],
    }


def _name(method: str, styles: Mapping[str, Style]) -> dict[str, Any]:
    colour = styles[method].colour
    variable = next(name for name, (light, _) in PALETTE.items() if light == colour)
    return {"method": method, "ours": is_fedmerge(method), "colour": f"var(--{variable})"}


def _cell(table: Table, method: str, setting: str) -> dict[str, Any]:
    entry = table.entries[method, setting]
    value, _, std = entry_text(table.metric, entry).partition(" ± ")
    return {"value": value, "std": std, "mark": mark(entry), "best": entry.best}


def _setting(name: str, runs: Sequence[Run], styles: Mapping[str, Style]) -> dict[str, Any]:
    """One setting: its table and its pictures; those that cannot be drawn are None."""
    tables = [(heading, comparison(runs, "merged", metric)) for heading, metric in _COLUMNS]
    tables = [(heading, table) for heading, table in tables if _some(table)]
    methods = unique(run.method for run in runs)
    ours = next((method for method in methods if is_fedmerge(method)), None)
    rivals = [method for method in methods if not is_fedmerge(method)]
    rival = "fedavg" if "fedavg" in rivals else rivals[0] if rivals else None
    mine = [run for run in runs if run.method == ours]
    theirs = [run for run in runs if run.method == rival]
    weighed = next((run for run in mine if run.weights is not None and run.weights.size), None)
    pairs = figures.client_pairs(mine, theirs)
    gaps = any(finite(point.gap_test) for run in runs for point in run.log)
    return {
        "name": name,
        "metric": _metric(runs),
        "columns": [heading for heading, _ in tables],
        "rows": [
            {
                **_name(method, styles),
                "cells": [_cell(table, method, name) for _, table in tables],
            }
            for method in methods
        ],
        "curves": figures.to_svg(figures.learning_curves(runs, styles=styles)),
        "gap": figures.to_svg(figures.gap_over_rounds(runs, styles=styles)) if gaps else None,
        "heatmap": figures.to_svg(figures.weights_heatmap(weighed)) if weighed else None,
        "weighed": weighed,
        "scatter": figures.to_svg(figures.client_scatter(mine, theirs)) if pairs else None,
        "ours": ours,
        "rival": rival,
    }


def _facts(runs: Sequence[Run]) -> list[str]:
    counts = (
        ("setting", len(unique(run.setting for run in runs))),
        ("method", len(unique(run.method for run in runs))),
        ("seed", len({run.seed for run in runs})),
        ("finished run", len(runs)),
    )
    data = ", ".join(unique(run.data for run in runs))
    return [f"data: {data}", *(f"{n} {word}{'' if n == 1 else 's'}" for word, n in counts)]


def _notices(runs: Sequence[Run], open_runs: Sequence[str]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    notices = []
    if open_runs:
        names = ", ".join(open_runs[:5]) + (", …" if len(open_runs) > 5 else "")
        verb = "run is" if len(open_runs) == 1 else "runs are"
        notices.append(f"{len(open_runs)} {verb} not finished and not shown: {names}.")
    seeds = {run.seed for run in runs}
    have = {(run.setting, run.method, run.seed) for run in runs}
    missing = [
        f"{method} in {setting} (seed {seed})"
        for setting in unique(run.setting for run in runs)
        for method in unique(run.method for run in runs)
        for seed in sorted(seeds)
        if (setting, method, seed) not in have
    ]
    if missing:
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        notices.append(
            f"Not every method has every setting and seed; {len(missing)} missing: {names}."
        )
    for run in runs:
        if run.refused:
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(run.refused.items()))
            cell = f"{run.method} in {run.setting}, seed {run.seed}"
            notices.append(f"Updates were refused in {cell}: {reasons}.")
    return notices


def _configuration(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(name, value) of what was run; a value that differs between runs is given as a list."""
    rows = [
        ("data", ", ".join(unique(run.data for run in runs))),
        ("settings", ", ".join(unique(run.setting for run in runs))),
        ("methods", ", ".join(unique(run.method for run in runs))),
        ("seeds", ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))),
        ("rounds", _list(sorted({run.rounds for run in runs}))),
        ("clients", _list(sorted({len(run.clients) for run in runs}))),
    ]
    for split in ("train", "validation", "test"):
        sizes = [getattr(c, f"n_{split}") for run in runs for c in run.clients]
        if sizes:
            span = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
            rows.append((f"{split} examples of a client", span))
    named = {name for name, _ in rows}
    seen: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in _flat(run.config):
            if key.split(".")[0] not in _OF_THE_CELL and key not in named:
                seen.setdefault(key, {})[value] = None
    return rows + [(key, _list(list(values))) for key, values in seen.items()]


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{key}", text))
    return rows


def _list(values: Sequence[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:4])
    return shown if len(values) <= 4 else f"{shown}, … ({len(values)} values)"
