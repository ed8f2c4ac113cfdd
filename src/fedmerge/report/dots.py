"""Pictures with a mark for each number: methods of a setting, clients, FedMerge against each rival.

They use matplotlib's object interface and leave no global state behind; looks and files are the
matter of `drawing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedmerge.errors import ConfigError
from fedmerge.report.drawing import (
    INK,
    PALETTE,
    SURFACE,
    Style,
    drawing,
    method_styles,
    new_figure,
    quiet_grid,
    room_for,
    short_name,
)
from fedmerge.report.overall import Duel
from fedmerge.report.ranking import METRICS, unique
from fedmerge.report.runs import Run, finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Styles = Mapping[str, Style]


def method_dots(
    runs: Sequence[Run],
    model: str = "merged",
    metric: str = "accuracy",
    styles: Styles | None = None,
    title: str | None = None,
) -> Figure:
    """Draw one row for each method of one setting: its mean as a mark, its seeds as ticks."""
    methods = unique(run.method for run in runs)
    looks = styles or method_styles(methods)
    spec = METRICS[metric]
    with drawing():
        height = 0.62 + 0.235 * len(methods)
        name = title or (runs[0].column if runs else "")
        figure = new_figure(3.7, height, f"{spec.label} by method in {name}, {model} model")
        left = max(0.8, room_for(methods, 9)) / 3.7 + 0.03
        axes = figure.add_axes((left, 0.27 / height, 0.97 - left, 1 - 0.58 / height))
        for row, method in enumerate(methods):
            read = [spec.read(run, model, "last") for run in runs if run.method == method]
            seen = [value for value in read if value is not None and finite(value)]
            style = looks[method]
            axes.axhline(row, color=INK, alpha=0.1, linewidth=0.6)
            known = sum(value is not None for value in read)
            if len(seen) < known:
                said = f"diverged on {known - len(seen)} of {known}"
                axes.text(1, row - 0.12, said, ha="right", va="bottom", fontsize=6,
                          transform=axes.get_yaxis_transform())  # fmt: skip
            if seen:
                span = [min(seen), max(seen)]
                axes.plot(span, [row, row], color=style.colour, linewidth=1.2, alpha=0.55)
                axes.plot(seen, [row] * len(seen), "|", color=style.colour, markersize=7, alpha=0.8)
                axes.plot(
                    [float(np.mean(seen))], [row], style.marker, color=style.colour,
                    markersize=8 if style.order > 5 else 6, markeredgecolor=SURFACE,
                    markeredgewidth=0.8, zorder=style.order,
                )  # fmt: skip
        axes.set_yticks(range(len(methods)), [short_name(name) for name in methods])
        for method, text in zip(methods, axes.get_yticklabels(), strict=True):
            if looks[method].order > 5:
                text.set_fontweight("bold")
                text.set_color(looks[method].colour)
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.margins(x=0.06)
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["left", "bottom"]].set_visible(False)
        quiet_grid(axes, "x")
        figure.text(0.015, 1 - 0.2 / height, name, fontsize=10.5, fontweight="bold")
        return figure


def client_scatter(fedmerge_runs: Sequence[Run], fedavg_runs: Sequence[Run]) -> Figure:
    """Draw each client's test accuracy with FedMerge (y) against the same client's with FedAvg (x).

    Clients are paired by seed and id, with the merged model. Where several fall on one point its
    area grows with their number. Raises ConfigError if the runs share no client.
    """
    pairs = client_pairs(fedmerge_runs, fedavg_runs)
    if not pairs:
        raise ConfigError("client_scatter: the two methods share no client with an accuracy")
    ours, theirs = fedmerge_runs[0].method, fedavg_runs[0].method
    points = Counter(pairs)
    above = sum(y > x for x, y in pairs)
    below = sum(y < x for x, y in pairs)
    with drawing():
        figure = new_figure(5.2, 4.6, f"accuracy of each client, {ours} against {theirs}")
        axes = figure.add_axes((0.145, 0.12, 0.765, 0.74))
        low = min(min(point) for point in points)
        axes.plot([low, 1], [low, 1], color=INK, linewidth=0.8, alpha=0.6)
        groups = (("accent", 1), ("slate", 0), ("blue", -1))
        markers = {1: "o", 0: "D", -1: "s"}
        for colour, side in groups:
            chosen = [p for p in points if np.sign(p[1] - p[0]) == side]
            axes.scatter(
                [x for x, _ in chosen], [y for _, y in chosen],
                s=[16 * points[p] for p in chosen], marker=markers[side],
                color=PALETTE[colour][0], alpha=0.72, linewidths=0.6, edgecolors=SURFACE, zorder=3,
                clip_on=False,
            )  # fmt: skip
        pad = 0.03 * (1 - low)
        axes.set_xlim(low - pad, 1 + pad)
        axes.set_ylim(low - pad, 1 + pad)
        axes.set_aspect("equal")
        quiet_grid(axes, "x")
        quiet_grid(axes, "y")
        axes.set_xlabel(f"test accuracy, {short_name(theirs)}")
        axes.set_ylabel(f"test accuracy, {short_name(ours)}")
        n = len(pairs)
        note = f"better with {short_name(ours)}: {above} of {n} (clients × seeds)"
        bold = {"color": PALETTE["accent"][0], "fontweight": "bold"}
        figure.text(0.145, 0.955, note, fontdict=bold)
        note = f"better with {short_name(theirs)}: {below}, equal: {n - above - below}"
        figure.text(0.145, 0.905, note)
        return figure


def client_pairs(ours: Sequence[Run], theirs: Sequence[Run]) -> list[tuple[float, float]]:
    """(x, y) = accuracy with `theirs` and with `ours` of each client that both have on a seed."""
    by_seed = {
        run.seed: {client.id: client.accuracy.get("merged") for client in run.clients}
        for run in theirs
    }
    pairs = []
    for run in ours:
        other = by_seed.get(run.seed, {})
        for client in run.clients:
            x, y = other.get(client.id), client.accuracy.get("merged")
            if x is not None and y is not None and finite(x) and finite(y):
                pairs.append((x, y))
    return pairs


def duel_intervals(duels: Sequence[Duel], subject: str, metric: str = "accuracy") -> Figure:
    """Draw `subject` minus each rival in one setting: a row for each, the closest rival first.

    The thick line is the 95% t interval over seeds, the thin one the two-stage bootstrap over seeds
    and clients; the mark is filled where the difference is beyond chance.
    """
    rows = sorted(duels, key=lambda duel: duel.by_seed.mean)
    colours = {"better": PALETTE["accent"][0], "worse": PALETTE["blue"][0], "open": INK}
    with drawing():
        height = 0.75 + 0.2 * len(rows)
        figure = new_figure(5.2, height, f"{metric} of {subject} minus that of each other method")
        left = max(0.8, room_for([duel.rival for duel in rows], 9)) / 5.2 + 0.03
        axes = figure.add_axes((left, 0.3 / height, 0.96 - left, 1 - 0.68 / height))
        for row, duel in enumerate(rows):
            colour, seed, client = colours[duel.verdict], duel.by_seed, duel.by_client
            axes.axhline(row, color=INK, alpha=0.08, linewidth=0.6)
            if client.low is not None and client.high is not None:
                axes.plot([client.low, client.high], [row, row], color=colour, linewidth=0.9)
            if seed.low is not None and seed.high is not None:
                axes.plot([seed.low, seed.high], [row, row], color=colour, linewidth=3, alpha=0.38)
            axes.plot(
                [seed.mean], [row], "o", color=colour, markersize=5.5, markeredgewidth=1.2,
                markerfacecolor=SURFACE if duel.verdict == "open" else colour, zorder=4,
            )  # fmt: skip
        means = [duel.by_seed.mean for duel in rows]
        reach = max([abs(mean) for mean in means] + [0.01])
        # A single wild interval must not squeeze all others into one spot.
        low, high = axes.get_xlim()
        axes.set_xlim(max(min([*means, 0]) - reach, min(low, -0.04 * reach)),
                      min(max([*means, 0]) + reach, max(high, 0.04 * reach)))  # fmt: skip
        axes.axvline(0.0, color=INK, linewidth=0.9, alpha=0.7)
        axes.set_yticks(range(len(rows)), [short_name(duel.rival) for duel in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=6)
        axes.spines[["left", "bottom"]].set_visible(False)
        quiet_grid(axes, "x")
        what = metric if metric == "accuracy" else "loss (turned round: right is better)"
        figure.text(0.012, 1 - 0.2 / height, f"{short_name(subject)} minus each method, {what}")
        return figure
