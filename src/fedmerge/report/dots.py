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
    from matplotlib.axes import Axes
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
        diverged: list[tuple[int, str, list[float]]] = []
        for row, method in enumerate(methods):
            read = [spec.read(run, model, "last") for run in runs if run.method == method]
            seen = [value for value in read if value is not None and finite(value)]
            style = looks[method]
            axes.axhline(row, color=INK, alpha=0.1, linewidth=0.6)
            known = sum(value is not None for value in read)
            if len(seen) < known:
                diverged.append((row, f"diverged on {known - len(seen)} of {known}", seen))
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
        low, high = axes.get_xlim()
        for row, said, seen in diverged:
            # On the side that the marks leave free.
            right = not seen or max(seen) < (low + high) / 2
            axes.text(float(right), row, said, ha="right" if right else "left", fontsize=6,
                      va="center_baseline", transform=axes.get_yaxis_transform(),
                      bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 0.8})  # fmt: skip
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["left", "bottom"]].set_visible(False)
        quiet_grid(axes, "x")
        figure.text(0.015, 1 - 0.2 / height, name, fontsize=10.5, fontweight="bold")
        return figure


def client_scatter(
    fedmerge_runs: Sequence[Run], fedavg_runs: Sequence[Run], metric: str = "accuracy"
) -> Figure:
    """Draw each client's test accuracy with FedMerge (y) against the same client's with FedAvg (x).

    Of its test loss with `metric` "loss".

    Clients are paired by seed and id, with the merged model. Those that fall on one spot are one
    mark, whose area grows with their number up to a largest one; a key says how many each size is.
    Raises ConfigError if the runs share no client.
    """
    pairs = client_pairs(fedmerge_runs, fedavg_runs, metric)
    if not pairs:
        raise ConfigError(f"client_scatter: the two methods share no client with a known {metric}")
    ours, theirs = fedmerge_runs[0].method, fedavg_runs[0].method
    name, better = METRICS[metric].label, METRICS[metric].better
    points, low, high = _spots(pairs, metric)
    most = max(points.values())
    # The marks together must leave room between them, and one client must be no more than a dot.
    full = max(16.0, min(_LARGEST, 16.0 * most, _MARKED * most / len(pairs)))
    ahead = sum(better * (y - x) > 0 for x, y in pairs)
    behind = sum(better * (y - x) < 0 for x, y in pairs)
    with drawing():
        figure = new_figure(5.2, 4.85, f"{metric} of each client, {ours} against {theirs}")
        axes = figure.add_axes((0.145, 0.165, 0.765, 0.702))
        axes.plot([low, high], [low, high], color=INK, linewidth=0.8, alpha=0.6)
        for colour, marker, side in _SIDES:
            for size in sorted(
                {_size(count / most, full) for count in points.values()}, reverse=True
            ):
                chosen = [
                    (x, y)
                    for (x, y, sign), count in points.items()
                    if sign == side and _size(count / most, full) == size
                ]
                axes.scatter(
                    [x for x, _ in chosen], [y for _, y in chosen], s=size, marker=marker,
                    color=PALETTE[colour][0], alpha=0.72, linewidths=0.6, edgecolors=SURFACE,
                    zorder=3, clip_on=False,
                )  # fmt: skip
        _size_key(figure, most, full)
        pad = 0.035 * max(high - low, 1e-9)
        axes.set_xlim(low - pad, high + pad)
        axes.set_ylim(low - pad, high + pad)
        axes.set_aspect("equal")
        quiet_grid(axes, "x")
        quiet_grid(axes, "y")
        axes.set_xlabel(f"{name}, {short_name(theirs)}")
        axes.set_ylabel(f"{name}, {short_name(ours)}")
        n = len(pairs)
        note = f"better with {short_name(ours)}: {ahead} of {n} (clients × seeds)"
        bold = {"color": PALETTE["accent"][0], "fontweight": "bold"}
        figure.text(0.145, 0.955, note, fontdict=bold)
        note = f"better with {short_name(theirs)}: {behind}, equal: {n - ahead - behind}"
        figure.text(0.145, 0.905, note)
        return figure


_SIDES = (("slate", "D", 0), ("accent", "o", 1), ("blue", "s", -1))
_LARGEST = 190.0  # square points, of the mark of the most clients on one spot
_MARKED = 6000.0  # square points, of all marks together
_SPOTS = 60  # marks that have room side by side


def _spots(
    pairs: Sequence[tuple[float, float]], metric: str
) -> tuple[Counter[tuple[float, float, int]], float, float]:
    """How many pairs fall on each (x, y, side), and the ends of both axes.

    The side is 1 where y is better than x, -1 where it is worse. Where the spots would be too many
    to tell apart, those nearer than a mark's width are one spot.
    """
    better = METRICS[metric].better
    low = min(min(pair) for pair in pairs)
    high = 1.0 if metric == "accuracy" else max(max(pair) for pair in pairs)
    exact = Counter((x, y, int(np.sign(better * (y - x)))) for x, y in pairs)
    step = max(high - low, 1e-9) / _SPOTS
    if len(exact) <= _SPOTS * 4:
        return exact, low, high

    def near(value: float) -> float:
        return round(low + step * round((value - low) / step), 6)

    found = Counter((near(x), near(y), int(np.sign(better * (y - x)))) for x, y in pairs)
    return found, low, high


def _size(share: float, full: float) -> float:
    """The area of a mark, in steps that the eye can tell; at least one that can be seen."""
    for step in (0.06, 0.12, 0.25, 0.5):
        if share <= step:
            return max(4.0, full * step)
    return full


def _size_key(figure: Figure, most: int, full: float) -> None:
    """What each size of a mark stands for, at the bottom right; nothing if all stand for one."""
    sizes: dict[float, list[int]] = {}
    for count in range(1, most + 1):
        sizes.setdefault(_size(count / most, full), []).append(count)
    if len(sizes) < 2:
        return
    axes = figure.add_axes((0, 0, 1, 0.06))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    x = 0.03
    axes.text(x, 0.5, "clients on one spot", va="center", fontsize=8)
    x += 0.25
    for size, counts in sizes.items():
        text = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        axes.scatter([x], [0.5], s=size, marker="o", color=INK, alpha=0.5, linewidths=0)
        axes.text(x + 0.024, 0.5, text, va="center", fontsize=8)
        x += 0.06 + 0.0135 * len(text)


def client_pairs(
    ours: Sequence[Run], theirs: Sequence[Run], metric: str = "accuracy"
) -> list[tuple[float, float]]:
    """(x, y) = accuracy with `theirs` and with `ours` of each client that both have on a seed.

    Or its "loss" as `metric`. Clients whose model has diverged are left out.
    """
    by_seed = {
        run.seed: {client.id: getattr(client, metric).get("merged") for client in run.clients}
        for run in theirs
    }
    pairs = []
    for run in ours:
        other = by_seed.get(run.seed, {})
        for client in run.clients:
            x, y = other.get(client.id), getattr(client, metric).get("merged")
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
        for row in range(len(rows)):
            axes.axhline(row, color=INK, alpha=0.08, linewidth=0.6)
        for verdict, colour in colours.items():
            chosen = [(row, duel) for row, duel in enumerate(rows) if duel.verdict == verdict]
            clients = [(row, duel.by_client) for row, duel in chosen]
            seeds = [(row, duel.by_seed) for row, duel in chosen]
            for spans, width, alpha in ((clients, 0.9, 1.0), (seeds, 3.0, 0.38)):
                known = [
                    (row, s.low, s.high)
                    for row, s in spans
                    if s.low is not None and s.high is not None
                ]
                axes.hlines(
                    [row for row, _, _ in known], [low for _, low, _ in known],
                    [high for _, _, high in known], color=colour, linewidth=width, alpha=alpha,
                    capstyle="round",
                )  # fmt: skip
            axes.scatter(
                [duel.by_seed.mean for _, duel in chosen], [row for row, _ in chosen], s=30,
                facecolor=SURFACE if verdict == "open" else colour, edgecolor=colour,
                linewidths=1.2, zorder=4, gid=verdict,
            )  # fmt: skip
        means = [duel.by_seed.mean for duel in rows]
        reach = max([abs(mean) for mean in means] + [0.01])
        # A single wild interval must not squeeze all others into one spot.
        low, high = axes.get_xlim()
        axes.set_xlim(max(min([*means, 0]) - reach, min(low, -0.04 * reach)),
                      min(max([*means, 0]) + reach, max(high, 0.04 * reach)))  # fmt: skip
        _mark_cut(axes, rows)
        axes.axvline(0.0, color=INK, linewidth=0.9, alpha=0.7)
        axes.set_yticks(range(len(rows)), [short_name(duel.rival) for duel in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=6)
        axes.spines[["left", "bottom"]].set_visible(False)
        quiet_grid(axes, "x")
        what = metric if metric == "accuracy" else "loss (turned round: right is better)"
        figure.text(0.012, 1 - 0.2 / height, f"{short_name(subject)} minus each method, {what}")
        return figure


def _mark_cut(axes: Axes, rows: Sequence[Duel]) -> None:
    """An arrow head where an interval goes on beyond the axis."""
    low, high = axes.get_xlim()
    for row, duel in enumerate(rows):
        spans = (duel.by_seed, duel.by_client)
        if any(span.low is not None and span.low < low for span in spans):
            axes.plot([low], [row], "<", color=INK, markersize=4, alpha=0.7, clip_on=False)
        if any(span.high is not None and span.high > high for span in spans):
            axes.plot([high], [row], ">", color=INK, markersize=4, alpha=0.7, clip_on=False)
