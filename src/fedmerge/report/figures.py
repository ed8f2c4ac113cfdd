"""The report's pictures of accuracy and gap: each function takes runs and returns a Figure.

They use matplotlib's object interface and leave no global state behind; merging weights and the
split of the data are drawn in `heatmap`, and looks and files are the matter of `drawing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import ConfigError
from fedmerge.report.drawing import (
    INK,
    PALETTE,
    SURFACE,
    Style,
    drawing,
    inches,
    method_styles,
    new_figure,
    quiet_grid,
    save,
    spread,
    symlog,
    to_svg,
)
from fedmerge.report.heatmap import LabelCounts, data_split, row_order, weights_heatmap
from fedmerge.report.ranking import METRICS, unique
from fedmerge.report.runs import RoundPoint, Run, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

__all__ = [
    "LabelCounts",
    "Style",
    "client_pairs",
    "client_scatter",
    "data_split",
    "gap_over_rounds",
    "learning_curves",
    "method_dots",
    "method_styles",
    "row_order",
    "save",
    "to_svg",
    "weights_heatmap",
]

Styles = Mapping[str, Style]
Series = tuple[NDArray[np.float64], NDArray[np.float64]]  # rounds (t,), values (seeds, t)


def learning_curves(
    runs: Sequence[Run], model: str = "merged", styles: Styles | None = None
) -> Figure:
    """Draw mean test accuracy by round, a line for each method; the band spans the seeds.

    runs: of one setting. A regression setting shows its loss. styles: from `method_styles`, so
    that a method looks the same in every picture; made from `runs` if None.
    """
    metric = "accuracy" if any(p.accuracy for run in runs for p in run.log) else "loss"

    def read(point: RoundPoint) -> float | None:
        return (point.accuracy if metric == "accuracy" else point.loss).get(model)

    with drawing():
        what = f"test {metric} of the {model} model"
        figure, axes = _round_axes(f"{what} by round, a line for each method", _methods(runs))
        _lines(axes, _by_method(runs, read), styles or method_styles(_methods(runs)))
        axes.set_title(f"mean {what}" + (", nats" if metric == "loss" else ""), pad=10)
        return figure


def gap_over_rounds(
    runs: Sequence[Run], split: str = "test", styles: Styles | None = None
) -> Figure:
    """Draw the local-global gap in nats by round, a line for each method; the band spans seeds.

    The axis turns symmetric-logarithmic when the gaps differ by more than a factor of 20.
    """

    def read(point: RoundPoint) -> float | None:
        return point.gap_test if split == "test" else point.gap_train

    with drawing():
        figure, axes = _round_axes(f"local-global gap on {split} data by round", _methods(runs))
        series = _by_method(runs, read)
        if series:
            sizes = np.abs(np.concatenate([values.ravel() for _, values in series.values()]))
            wide = symlog(axes, sizes)
            axes.axhline(0.0, color=INK, linewidth=0.8, alpha=0.6)
        else:
            wide = False
        _lines(axes, series, styles or method_styles(_methods(runs)))
        axes.set_title(f"{split} gap, nats" + (" (log scale)" if wide else ""), pad=10)
        return figure


def method_dots(
    runs: Sequence[Run],
    model: str = "merged",
    metric: str = "accuracy",
    styles: Styles | None = None,
    title: str | None = None,
) -> Figure:
    """Draw one row for each method of one setting: its mean as a mark, its seeds as ticks."""
    methods = _methods(runs)
    looks = styles or method_styles(methods)
    spec = METRICS[metric]
    with drawing():
        height = 0.62 + 0.235 * len(methods)
        name = title or (runs[0].setting if runs else "")
        figure = new_figure(3.7, height, f"{spec.label} by method in {name}, {model} model")
        left = max(0.8, _room(methods, 9)) / 3.7 + 0.03
        axes = figure.add_axes((left, 0.27 / height, 0.97 - left, 1 - 0.58 / height))
        for row, method in enumerate(methods):
            read = [spec.read(run, model) for run in runs if run.method == method]
            seen = [value for value in read if value is not None and finite(value)]
            style = looks[method]
            axes.axhline(row, color=INK, alpha=0.1, linewidth=0.6)
            if seen:
                span = [min(seen), max(seen)]
                axes.plot(span, [row, row], color=style.colour, linewidth=1.2, alpha=0.55)
                axes.plot(seen, [row] * len(seen), "|", color=style.colour, markersize=7, alpha=0.8)
                axes.plot(
                    [float(np.mean(seen))], [row], style.marker, color=style.colour,
                    markersize=8 if style.order > 5 else 6, markeredgecolor=SURFACE,
                    markeredgewidth=0.8, zorder=style.order,
                )  # fmt: skip
        axes.set_yticks(range(len(methods)), [_short(name) for name in methods])
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
        axes.set_xlabel(f"test accuracy, {_short(theirs)}")
        axes.set_ylabel(f"test accuracy, {_short(ours)}")
        n = len(pairs)
        note = f"better with {_short(ours)}: {above} of {n} (clients × seeds)"
        bold = {"color": PALETTE["accent"][0], "fontweight": "bold"}
        figure.text(0.145, 0.955, note, fontdict=bold)
        note = f"better with {_short(theirs)}: {below}, equal: {n - above - below}"
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


def _methods(runs: Sequence[Run]) -> tuple[str, ...]:
    return unique(run.method for run in runs)


def _short(name: str) -> str:
    """A method's name cut in its middle, since variants differ at their ends: "fedmerge:d=8"."""
    return name if len(name) <= 22 else f"{name[:10]}…{name[-11:]}"


def _room(names: Sequence[str], size: float) -> float:
    """Inches that the longest of `names` takes at `size` points, judged by its letters."""
    return max((len(_short(name)) for name in names), default=0) * 0.63 * size / 72


def _by_method(
    runs: Sequence[Run], read: Callable[[RoundPoint], float | None]
) -> dict[str, Series]:
    """Values by method over the rounds that all of its seeds have, so that no mean jumps."""
    series: dict[str, Series] = {}
    for method in _methods(runs):
        seeds = []
        for run in runs:
            if run.method == method:
                values = {point.round: read(point) for point in run.log}
                seeds.append({t: v for t, v in values.items() if v is not None and finite(v)})
        rounds = sorted(set.intersection(*(set(seen) for seen in seeds)))
        if rounds:
            matrix = np.array([[seen[t] for t in rounds] for seen in seeds], dtype=np.float64)
            series[method] = (np.array(rounds, dtype=np.float64), matrix)
    return series


def _round_axes(label: str, methods: Sequence[str]) -> tuple[Figure, Axes]:
    figure = new_figure(5.2, 3.3, label)
    room = max(0.65, _room(methods, 8.6)) / 5.2 + 0.06  # for the names at the ends of the lines
    axes = figure.add_axes((0.085, 0.135, 0.915 - room, 0.765))
    axes.set_xlabel("round")
    axes.spines["left"].set_visible(False)
    quiet_grid(axes, "y")
    return figure, axes


def _lines(axes: Axes, series: Mapping[str, Series], styles: Styles) -> None:
    """Draw the lines with their bands, and each one's name at its end."""
    if not series:
        axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center")
        return
    for method, (rounds, values) in series.items():
        style = styles[method]
        axes.fill_between(
            rounds, values.min(0), values.max(0), color=style.colour, alpha=0.16, linewidth=0
        )
        axes.plot(
            rounds, values.mean(0), linestyle=style.line, color=style.colour, label=_short(method),
            linewidth=style.width, zorder=style.order,
            marker=style.marker if len(rounds) == 1 else "",
        )  # fmt: skip
    first = min(rounds[0] for rounds, _ in series.values())
    last = max(rounds[-1] for rounds, _ in series.values())
    axes.set_xlim(first - (last == first) * 0.5, last + (last == first) * 0.5)
    axes.get_xaxis().set_major_locator(_whole_numbers())
    height = inches(axes) * 72
    if 10.5 * len(series) > height:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.1), frameon=False, fontsize=6)
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    axes.autoscale_view()
    names = list(series)
    ends = [to_axes.transform((series[name][0][-1], series[name][1].mean(0)[-1])) for name in names]
    places = spread([float(end[1]) for end in ends], 10.5 / height)
    for name, end, place in zip(names, ends, places, strict=True):
        style = styles[name]
        axes.plot(
            [float(end[0]), 1.03, 1.045], [float(end[1]), place, place], color=style.colour,
            linewidth=0.6, alpha=0.7, transform=axes.transAxes, clip_on=False, zorder=2,
            scalex=False, scaley=False,
        )  # fmt: skip
        axes.text(
            1.055, place, _short(name), transform=axes.transAxes, va="center", fontsize=8.6,
            color=style.colour, fontweight="bold" if style.order > 5 else "normal",
        )  # fmt: skip


def _whole_numbers() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True)
