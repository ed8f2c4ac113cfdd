"""The client map as a picture for files: the page draws its own, which moves and can be pressed.

Where the points stand and what colours them is decided in `clients`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmerge.report.drawing import SURFACE, drawing, new_figure
from fedmerge.report.heatmap import cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNKNOWN = "#d3d7dc"
_COLUMNS = 3
_NAMED = 16
"""Clients that are named where no kinds tell them apart."""
_SIDES = (
    ("center", 0, 12), ("center", 0, -12), ("left", 8, 0), ("right", -8, 0),
    ("center", 0, 23), ("center", 0, -23),
)  # fmt: skip
"""Where a name may stand: how it is aligned, and how far from its point, in points of print."""


def map_picture(found: Mapping[str, Any], label: str) -> Figure:
    """Draw `found`, from `clients.client_map`: a point for each client, with its true kind."""
    wide, high = found["size"]
    kinds = found["kinds"]
    rows = -(-len(kinds) // _COLUMNS)
    with drawing():
        tall = 5.2 * high / wide + 0.4
        figure = new_figure(5.2, tall + 0.21 * rows, label)
        below = 0.21 * rows / (tall + 0.21 * rows)
        axes = figure.add_axes((0.02, below, 0.96, 1 - below - 0.3 / tall))
        for point in found["points"]:
            colour = point["colour"] if kinds and point["letter"] else _UNKNOWN
            axes.plot([point["x"]], [point["y"]], "o", color=colour, markeredgecolor=SURFACE,
                      markersize=1.44 * found["radius"], markeredgewidth=0.7)  # fmt: skip
            axes.text(point["x"], point["y"], point["letter"], ha="center", va="center_baseline",
                      fontsize=7, color="#23272e")  # fmt: skip
        if not kinds and len(found["points"]) <= _NAMED:
            _name(axes, found["points"], 5.2 * 72 * 0.96 / wide, wide)
        axes.set_xlim(0, wide)
        axes.set_ylim(high, 0)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
        axes.spines[:].set_alpha(0.35)
        for i, kind in enumerate(kinds):
            x, y = 0.03 + (i % _COLUMNS) / _COLUMNS, below - 0.21 * (i // _COLUMNS + 1) / tall
            figure.text(
                x,
                y,
                f" {kind['letter']} ",
                fontsize=7,
                color="#23272e",
                bbox={"facecolor": kind["colour"], "edgecolor": "none", "pad": 1.5},
            )
            figure.text(x + 0.045, y, cut(kind["name"], 18), fontsize=7.5)
        text = f"clients by likeness of their rows, {100 * found['share']:.0f}% of the variance"
        figure.text(0.02, 1 - 0.2 / tall, text)
        return figure


def _name(axes: Axes, points: Sequence[Mapping[str, Any]], scale: float, wide: float) -> None:
    """Write names beside their points, where they do not cover what is there nor leave the map.

    scale: points of print in a unit of the map, which is `wide` units wide.
    """
    spots = [(point["x"] * scale, point["y"] * scale) for point in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    # Names do not go beyond the edges.
    taken += [(-999.0, 0, 0, 999), (wide * scale, 0, 999, 999)]
    for (x, y), point in zip(spots, points, strict=True):
        text = cut(point["name"], 18)
        boxes = [_box(x + dx, y - dy, 4.4 * len(text), align) for align, dx, dy in _SIDES]
        best = min(range(len(boxes)), key=lambda i: sum(_meet(boxes[i], one) for one in taken))
        taken.append(boxes[best])
        align, dx, dy = _SIDES[best]
        axes.annotate(text, (point["x"], point["y"]), (dx, dy), ha=align, va="center_baseline",
                      textcoords="offset points", fontsize=7)  # fmt: skip


def _box(x: float, y: float, wide: float, align: str) -> tuple[float, float, float, float]:
    left = x - wide * {"left": 0.0, "center": 0.5, "right": 1.0}[align]
    return left, y - 5, left + wide, y + 5


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
