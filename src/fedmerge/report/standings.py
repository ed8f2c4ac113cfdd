"""Pictures over all settings: what each method loses to the best, and how it ranks.

Both have a row for each method, the best on top, so that 5 or 25 methods can be read alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge.report.drawing import (
    INK,
    PALETTE,
    SURFACE,
    Style,
    drawing,
    new_figure,
    quiet_grid,
    room_for,
    short_name,
)
from fedmerge.report.overall import Ranking, Regret
from fedmerge.report.runs import finite, is_fedmerge
from fedmerge.report.statistics import MARGIN, cliques

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICKS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0, 10.0)


def regret_picture(regrets: Sequence[Regret], metric: str, styles: Mapping[str, Style]) -> Figure:
    """Draw each method's loss to the best of every setting; the large mark is its largest.

    The axis is that of the square root, so that one wild method does not hide the others.
    """
    rows = sorted(
        (regret for regret in regrets if regret.largest is not None),
        key=lambda regret: (regret.largest or 0.0, regret.mean or 0.0),
    )
    with drawing():
        label = f"regret of each method in {metric}"
        figure, axes = _rows([regret.method for regret in rows], label, styles, 0.235)
        known = [loss for regret in rows for loss in regret.losses.values() if finite(loss)]
        top = max([*known, MARGIN * 2])
        axes.set_xscale("function", functions=(_root, np.square))
        axes.set_xlim(-0.0, top * 1.06)
        shown = [tick for tick in _TICKS if tick <= top * 1.03]
        axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
        axes.axvspan(0, MARGIN, color=PALETTE["green"][0], alpha=0.13, linewidth=0)
        for row, regret in enumerate(rows):
            style = styles[regret.method]
            losses = [loss for loss in regret.losses.values() if finite(loss)]
            axes.plot(losses, [row] * len(losses), "|", color=style.colour, alpha=0.55,
                      markersize=7, clip_on=False)  # fmt: skip
            largest = min(regret.largest or 0.0, top)
            axes.plot([0, largest], [row, row], color=style.colour, linewidth=1.1, alpha=0.45)
            axes.plot([largest], [row], style.marker, color=style.colour, clip_on=False,
                      markersize=7.5 if style.order > 5 else 5.5, markeredgecolor=SURFACE,
                      markeredgewidth=0.8, zorder=5)  # fmt: skip
            where = short_name(regret.where or "")
            text = f"{largest:.3f} {where if largest > 0 else ''}".rstrip()
            if not finite(regret.largest):
                text = f"diverged in {where}"
            text += " (incomplete)" if regret.missing else ""
            if _root(largest) < 0.62 * _root(top):
                place: dict[str, Any] = {"xytext": (8, 0), "ha": "left", "va": "center_baseline"}
            else:  # above the line, which has the other losses on it
                place = {"xytext": (-6, 2.2), "ha": "right", "va": "bottom"}
            axes.annotate(text, (largest, row), textcoords="offset points", fontsize=7.5,
                          alpha=0.85, zorder=6, **place)  # fmt: skip
        what = "Most accuracy lost to" if metric == "accuracy" else "Most loss above that of"
        _title(figure, f"{what} the best method of a setting")
        return figure


def rank_picture(ranking: Ranking, styles: Mapping[str, Style]) -> Figure:
    """Draw the average ranks with Nemenyi's critical difference.

    The shaded band holds what is not told apart from the best; each bar at the right joins
    methods that are not told apart from each other.
    """
    names, means = list(ranking.means), list(ranking.means.values())
    with drawing():
        figure, axes = _rows(names, "average rank of each method over the settings", styles)
        k = max(len(names), 2)
        difference = ranking.difference
        bars = cliques(means, difference) if difference is not None else []
        axes.set_xlim(0.7, k + 0.3)
        step = 1 if k <= 12 else 2
        axes.set_xticks(range(1, k + 1, step))
        if difference is not None and names:
            axes.axvspan(means[0], min(means[0] + difference, k + 0.3), color=INK, alpha=0.07,
                         linewidth=0)  # fmt: skip
            # One that is longer than the scale says so by having no end there.
            axes.plot([means[0], min(means[0] + difference, k + 0.3)], [-0.72, -0.72], color=INK,
                      linewidth=1.4, clip_on=False)  # fmt: skip
            axes.text(means[0], -0.95, f"critical difference {difference:.1f}", fontsize=8,
                      va="bottom")  # fmt: skip
        for i, (first, last) in enumerate(bars):
            x = 1.02 + 0.022 * (i % 6)
            axes.plot([x, x], [first - 0.25, last + 0.25], color=INK, linewidth=2, alpha=0.55,
                      transform=axes.get_yaxis_transform(), clip_on=False)  # fmt: skip
        for row, (name, mean) in enumerate(zip(names, means, strict=True)):
            style = styles[name]
            axes.axhline(row, color=INK, alpha=0.08, linewidth=0.6, zorder=0)
            axes.plot([mean], [row], style.marker, color=style.colour, markeredgecolor=SURFACE,
                      markersize=8 if style.order > 5 else 6, markeredgewidth=0.8,
                      zorder=5)  # fmt: skip
            axes.annotate(f"{mean:.1f}", (mean, row), (8, 0), textcoords="offset points",
                          va="center_baseline", fontsize=8, alpha=0.85)  # fmt: skip
        n = len(ranking.settings)
        _title(figure, f"Average rank over {n} setting{'' if n == 1 else 's'} (1 is best)")
        return figure


def _root(value: Any) -> Any:
    return np.sqrt(np.maximum(value, 0.0))


def _rows(
    names: Sequence[str], label: str, styles: Mapping[str, Style], high: float = 0.205
) -> tuple[Figure, Axes]:
    """A row for each name, `high` in inches."""
    tall = 0.95 + high * max(len(names), 1)
    figure = new_figure(5.4, tall, label)
    left = max(0.8, room_for(names, 9)) / 5.4 + 0.04
    axes = figure.add_axes((left, 0.3 / tall, 0.9 - left, 1 - 0.85 / tall))
    axes.set_yticks(range(len(names)), [short_name(name) for name in names])
    for name, text in zip(names, axes.get_yticklabels(), strict=True):
        if is_fedmerge(name) and styles[name].order > 5:
            text.set_fontweight("bold")
            text.set_color(styles[name].colour)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines[["left", "bottom"]].set_visible(False)
    quiet_grid(axes, "x")
    axes.tick_params(axis="y", pad=8)  # a mark at the left end must not touch the name
    return figure, axes


def _title(figure: Figure, text: str) -> None:
    figure.text(0.012, 1 - 0.2 / figure.get_size_inches()[1], text, fontsize=10.5,
                fontweight="bold")  # fmt: skip
