"""The report page: one file that a browser opens without a network, in light and in dark.

It gathers what the other modules computed and drew. Numbers are made in `ranking` and `overall`,
sentences in `findings` and `totals`, pictures in `figures`, each setting in `panels`; the page's
words, looks and behaviour are in page.html, panel.html, page.css and page.js.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fedmerge.errors import MissingExtraError, StateError
from fedmerge.report import figures
from fedmerge.report.about import configuration, facts, notices
from fedmerge.report.drawing import PALETTE, Style, method_styles, night
from fedmerge.report.findings import findings
from fedmerge.report.fit import fitted, share
from fedmerge.report.overall import Ranking, overviews, ranking, regrets
from fedmerge.report.panels import cell, method_name, panel, some
from fedmerge.report.ranking import METRICS, Table, comparison, unique
from fedmerge.report.reading import load_runs, unfinished
from fedmerge.report.runs import Run, finite
from fedmerge.report.statistics import ENOUGH, MARGIN, SIGNIFICANCE
from fedmerge.report.tables import models_text, value_text
from fedmerge.report.totals import totals

# (name of the view, metric or None for accuracy and loss, model, round)
_VIEWS = (
    ("merged, last round", None, "merged", "last"),
    ("merged, best validation round", None, "merged", "best"),
    ("tuned, last round", None, "tuned", "last"),
    ("tuned, best validation round", None, "tuned", "best"),
    ("worst tenth of clients", "accuracy_worst_decile", "merged", "last"),
    ("spread over clients", "accuracy_std", "merged", "last"),
    ("better off than Local", "better_than_local", "merged", "last"),
    ("better off than FedAvg", "better_than_fedavg", "merged", "last"),
    ("AUC", "auc", "merged", "last"),
)
_COSTS = (
    ("down", "cost_down"),
    ("up", "cost_up"),
    ("kept by a client", "cost_client"),
    ("kept by the server", "cost_server"),
    ("and for each client", "cost_server_per_client"),
    ("local passes", "cost_passes"),
)


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
    content = page_content(runs, unfinished(folder), lone=not (folder / "runs").is_dir())
    page = fitted(environment.get_template("page.html").render, content).lstrip()
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


def page_content(
    runs: Sequence[Run], open_runs: Sequence[str], *, lone: bool = False
) -> dict[str, Any]:
    """Return everything the template shows; `lone` for the folder of one run or server."""
    sums = totals(runs)
    methods = unique([*sums.ranking.means, *(run.method for run in runs)])  # the best first
    styles = method_styles(methods)
    of_column: dict[str, list[Run]] = {}
    for run in runs:
        of_column.setdefault(run.column, []).append(run)
    script = resources.files("fedmerge.report").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    groups = _groups(runs)
    return {
        "lone": lone,
        "findings": findings(runs),
        "totals": sums,
        "facts": facts(runs),
        "notices": notices(runs, open_runs),
        "groups": groups,
        "views": _views(runs, methods, styles),
        "compared": len(methods) > 1,
        "few": min(len({run.seed for run in part}) for part in of_column.values()),
        "regret": [
            figures.to_svg(figures.regret_picture(part, table.metric, styles))
            for table, part in zip(sums.tables, sums.regrets, strict=True)
            if len(table.methods) > 1
        ],
        "rank": figures.to_svg(figures.rank_picture(sums.ranking, styles))
        if len(sums.ranking.means) > 1
        else None,
        "panels": [
            panel(
                one["column"],
                of_column[one["column"]],
                styles,
                sums.subject,
                sums.duels,
                share(len(of_column)),
            )
            for group in groups
            for one in group["settings"]
        ],
        "configuration": configuration(runs),
        "palette": PALETTE,
        "night": night(),
        "margin": MARGIN,
        "enough": ENOUGH,
        "significance": SIGNIFICANCE,
        "script": script,
        "script_hash": f"sha256-{digest}",
    }


def _groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings by data set, for the navigation and the head of the table."""
    groups: dict[str, list[dict[str, str]]] = {}
    for column in unique(run.column for run in runs):
        run = next(run for run in runs if run.column == column)
        groups.setdefault(run.data, []).append({"column": column, "setting": run.setting})
    number = 0
    for settings in groups.values():
        for setting in settings:
            number += 1
            setting["number"] = str(number)
    return [{"data": data, "settings": settings} for data, settings in groups.items()]


def _views(
    runs: Sequence[Run], methods: Sequence[str], styles: Mapping[str, Style]
) -> list[dict[str, Any]]:
    """The tables over all settings, one view for each number that some run has; and the costs."""
    views = []
    for name, metric, model, at in _VIEWS:
        tables = [comparison(runs, model, metric, at)] if metric else overviews(runs, model, at)
        tables = [table for table in tables if some(table)]
        if tables:
            ranked = ranking(tables) if metric is None and len(methods) > 1 else None
            shown = [_table(table, ranked, methods, styles) for table in tables]
            views.append({"name": name, "tables": shown, "costs": None})
    costs = _costs(runs, methods, styles)
    return [*views, {"name": "cost", "tables": [], "costs": costs}]


def _table(
    table: Table,
    ranked: Ranking | None,
    methods: Sequence[str],
    styles: Mapping[str, Style],
) -> dict[str, Any]:
    """A table over settings; with `ranked`, it has the columns of rank and regret, too."""
    settings = [
        name
        for name in table.settings
        if any(table.entries[method, name].mean is not None for method in table.methods)
    ]
    lost = {regret.method: regret for regret in regrets(table)}
    rows = []
    for method in (name for name in methods if name in table.methods):
        head: list[str] = []
        if ranked is not None:
            regret, rank = lost[method], ranked.means.get(method)
            head = [
                "–" if rank is None else f"{rank:.1f}",
                value_text("accuracy", regret.largest),
                value_text("accuracy", regret.mean),
            ]
        rows.append(
            {
                **method_name(method, styles),
                "head": head,
                "cells": [cell(table, method, setting) for setting in settings],
            }
        )
    return {
        "title": table.title,
        "note": table.note,
        "settings": settings,
        "whole": ranked is not None,
        "rows": rows,
        "wide": len(settings) > 6,
    }


def _costs(
    runs: Sequence[Run], methods: Sequence[str], styles: Mapping[str, Style]
) -> dict[str, Any]:
    """What each method costs, in models."""
    return {
        "headings": [heading for heading, _ in _COSTS],
        "rows": [
            {
                **method_name(method, styles),
                "values": [_cost(runs, method, metric) for _, metric in _COSTS],
            }
            for method in methods
        ],
    }


def _cost(runs: Sequence[Run], method: str, metric: str) -> str:
    """A method's cost in models; a range where it differs between settings."""
    read = METRICS[metric].read
    seen = [read(run, "merged", "last") for run in runs if run.method == method]
    return models_text(value for value in seen if value is not None and finite(value))
