"""What the page shows of one setting: its table, its pictures and its clients.

It picks runs and asks the other modules for numbers and pictures; it computes none itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedmerge.report import clients as of_clients
from fedmerge.report import figures
from fedmerge.report.curves import MANY_SEEDS
from fedmerge.report.drawing import PALETTE, Style, apart
from fedmerge.report.overall import Duel, loss_unit, metric_of
from fedmerge.report.ranking import METRICS, Entry, Table, comparison, unique
from fedmerge.report.runs import Run, finite, is_fedmerge
from fedmerge.report.tables import entry_text, mark, value_text

FOCUS = 5
"""Methods beside FedMerge that keep their colour where all would be too many to tell apart."""
# (heading, metric, model, round) of the table of one setting, left to right.
_COLUMNS = (
    ("accuracy", "accuracy", "merged", "last"),
    ("worst tenth", "accuracy_worst_decile", "merged", "last"),
    ("AUC", "auc", "merged", "last"),
    ("loss", "loss", "merged", "last"),
    ("spread over clients", "accuracy_std", "merged", "last"),
    ("better than Local", "better_than_local", "merged", "last"),
    ("better than FedAvg", "better_than_fedavg", "merged", "last"),
    ("best round", "accuracy", "merged", "best"),
    ("tuned", "accuracy", "tuned", "last"),
    ("test gap", "gap_test", "merged", "last"),
    ("down", "bytes_down", "merged", "last"),
    ("up", "bytes_up", "merged", "last"),
    ("seconds", "seconds", "merged", "last"),
)


def panel(
    name: str,
    runs: Sequence[Run],
    styles: Mapping[str, Style],
    subject: str | None,
    duels: Sequence[Duel],
    room: float = 200_000,
) -> dict[str, Any]:
    """Return the content of one setting; pictures that cannot be drawn are None.

    subject: the method that the whole page is about, even where another variant of it did better.
    room: bytes that its clients and their weights may take; of too many, a sample is shown.
    """
    metric = metric_of(runs)
    main = comparison(runs, "merged", metric)
    tables = [(heading, comparison(runs, model, key, at)) for heading, key, model, at in _COLUMNS]
    tables = [(heading, table) for heading, table in tables if some(table)]
    methods = ordered(main, name)
    ours = subject if subject in methods else None
    rivals = [method for method in methods if not is_fedmerge(method)]
    rival = "fedavg" if "fedavg" in rivals else rivals[0] if rivals else None
    mine = [run for run in runs if run.method == ours]
    theirs = [run for run in runs if run.method == rival]
    focus = focused(methods, subject)
    styles = apart(styles, focus or methods)
    pairs = figures.client_pairs(mine, theirs, metric)
    gaps = any(finite(point.gap_test) for run in runs for point in run.log)
    fought = [duel for duel in duels if duel.setting == name]
    return {
        "name": name,
        "metric": metric,
        "unit": loss_unit(metric),
        "columns": [heading for heading, _ in tables],
        "rows": [
            {
                **method_name(method, styles, focus),
                "cells": [cell(table, method, name) for _, table in tables],
                "behind": _behind(main.entries[method, name]),
                "chosen": _chosen([run for run in runs if run.method == method]),
            }
            for method in methods
        ],
        "tuned": any(run.chosen for run in runs),
        "diverged": any(entry.diverged for entry in main.entries.values()),
        "focus": focus,
        "many_seeds": MANY_SEEDS,
        "banded": len({run.seed for run in runs}) > 1,
        "curves": figures.to_svg(figures.learning_curves(runs, styles=styles, focus=focus)),
        "gap": figures.to_svg(figures.gap_over_rounds(runs, styles=styles, focus=focus))
        if gaps
        else None,
        "duels": figures.to_svg(figures.duel_intervals(fought, ours or "", metric))
        if fought
        else None,
        "scatter": figures.to_svg(figures.client_scatter(mine, theirs, metric)) if pairs else None,
        "side": "Above" if METRICS[metric].better > 0 else "Below",
        "ours": ours,
        "rival": rival,
        **_clients(runs, ours, methods, styles, room),
    }


def _clients(
    runs: Sequence[Run],
    ours: str | None,
    methods: Sequence[str],
    styles: Mapping[str, Style],
    room: float,
) -> dict[str, Any]:
    """The heat maps, the client map and the cards: of one seed, as clients differ between seeds.

    ours: the method whose clients are shown, any if None.
    """
    mine = [run for run in runs if ours is None or run.method == ours]
    subject = next((run for run in mine if run.weights is not None and run.weights.size), mine[0])
    same = {run.method: run for run in runs if run.seed == subject.seed}
    shown = [method for method in methods if method in same]
    most = of_clients.most_clients(subject, len(shown), 0.75 * room)
    data: dict[str, Any] = {
        "methods": [{"name": name, "index": styles[name].index} for name in shown],
        "ours": ours or "",
        **of_clients.cards(subject, [same[name] for name in shown], most),
    }
    content: dict[str, Any] = {"subject": subject, "heatmap": None, "worth": None, "map": None}
    if subject.weights is not None and subject.weights.size and subject.clients:
        rounds, weights = of_clients.history(subject, min(of_clients.MAX_BYTES, 0.18 * room))
        part = of_clients.part_of(subject, weights)
        against: dict[str, Run] = {name: same[name] for name in ("fedavg", "local") if name in same}
        content["map"] = of_clients.client_map(subject, against, weights, most)
        content["heatmap"] = figures.to_svg(figures.weights_heatmap(subject, part))
        if all(client.importance for client in subject.clients):
            content["worth"] = figures.to_svg(figures.importance_map(subject, part))
        data["weights"] = of_clients.weights_data(rounds, weights, part)
        data["path"] = content["map"].pop("path")
        content["rounds"] = rounds.tolist()
    content["listed"] = _listed(subject, same, data)
    content["data"] = embedded(data)
    return content


def embedded(data: Mapping[str, Any]) -> str:
    """Return `data` as JSON for a script element, which "</script>" in a name would end."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _listed(subject: Run, same: Mapping[str, Run], data: Mapping[str, Any]) -> dict[str, Any]:
    """The table of clients: our method and the two that it has to justify itself against."""
    named = [name for name in unique([subject.method, "local", "fedavg"]) if name in same]
    at = [i for i, method in enumerate(data["methods"]) if method["name"] in named]
    return {
        "methods": [data["methods"][i]["name"] for i in at],
        "rows": [
            {
                "id": client["id"],
                "kind": client["kind"],
                "n": client["n"],
                "values": [
                    v if v == "diverged" else value_text(data["metric"], v and v / 1000)
                    for v in (client["values"][i] for i in at)
                ],
            }
            for client in data["clients"]
        ],
    }


def ordered(table: Table, setting: str) -> list[str]:
    """Return the methods of a setting, the best mean first; those without a number come last."""
    sign = METRICS[table.metric].better

    def key(method: str) -> float:
        mean = table.entries[method, setting].mean
        return -sign * mean if mean is not None and finite(mean) else float("inf")

    return sorted((m for m in table.methods if table.entries[m, setting].n), key=key)


def focused(methods: Sequence[str], subject: str | None) -> list[str] | None:
    """Return the methods to be drawn in colour, from `methods` with the best first; None: all.

    subject: the method that the page is about; it is among them wherever it stands.
    """
    if len(methods) <= FOCUS + 3:
        return None
    variants = [name for name in methods if is_fedmerge(name)]
    ours = sorted(variants, key=lambda name: name != subject)[:2]
    return [*ours, *[name for name in methods if not is_fedmerge(name)][:FOCUS]]


def method_name(
    method: str, styles: Mapping[str, Style], focus: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return a method's name and looks; grey if it is not in `focus`, as in the pictures."""
    style = styles[method]
    variable = next(name for name, (light, _) in PALETTE.items() if light == style.colour)
    return {
        "method": method,
        "ours": is_fedmerge(method),
        "colour": f"var(--{variable})" if focus is None or method in focus else "var(--grey)",
        "marker": style.marker,
        "index": style.index,
    }


def cell(table: Table, method: str, setting: str) -> dict[str, Any]:
    """Return one cell of a table: its number, its deviation, its mark, and how far it is behind."""
    entry = table.entries[method, setting]
    value, _, std = entry_text(table.metric, entry).partition(" ± ")
    gap = entry.behind.mean if entry.behind is not None and finite(entry.behind.mean) else 0.0
    gap = float("inf") if entry.diverged and METRICS[table.metric].better else gap
    return {
        "value": value,
        "std": std,
        "mark": mark(entry),
        "best": entry.best,
        "shade": round(100 * min(1.0, (max(gap, 0.0) / 0.3) ** 0.5)) if gap > 0.0005 else 0,
    }


def some(table: Table) -> bool:
    """Whether a table has any number."""
    return any(entry.mean is not None for entry in table.entries.values())


def _behind(entry: Entry) -> str:
    """What a method loses to the best, with its interval and p."""
    gap = entry.behind
    if entry.diverged:
        return "diverged"
    if gap is None or not finite(gap.mean):
        return "–"
    mean, low, high = (value_text("accuracy", value) for value in (gap.mean, gap.low, gap.high))
    text = mean if gap.low is None else f"{mean} ({low} to {high})"
    if entry.p is not None:
        text += f", p {entry.p:.3f}" if entry.p >= 0.001 else ", p < 0.001"
    return text


def _chosen(runs: Sequence[Run]) -> str:
    """The tuned values, which are the same for all seeds of a method in a setting."""
    texts = unique(
        ", ".join(f"{key} {value}" for key, value in run.chosen.items()) or "defaults"
        for run in runs
    )
    return "; ".join(texts)
