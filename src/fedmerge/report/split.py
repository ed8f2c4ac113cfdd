"""The picture of how a setting divides the data: what labels each client holds.

It is drawn before any training; nothing here knows a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import ConfigError
from fedmerge.report.drawing import FILLS, drawing, new_figure, quiet_grid
from fedmerge.report.heatmap import MAX_ROWS, cut, groups, height, kind_strip, sample
from fedmerge.report.ranking import unique

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LabelCounts:
    """How many examples of each label one client has; counts: (c,), label 0 first."""

    client: str
    kind: str | None
    counts: Sequence[int]


def data_split(
    rows: Sequence[LabelCounts],
    title: str,
    *,
    labels: Sequence[str] | None = None,
    images: Mapping[str, Sequence[NDArray[np.float64]]] | None = None,
) -> Figure:
    """Draw how many examples of each label every client has, the clients grouped by kind.

    labels: names of the labels, their numbers if None. images: by kind (the empty string for
    clients without one), a few arrays (height, width) or (height, width, 3) in 0..1 to show beside
    it. Of more than 160 clients an even sample is drawn. Raises ConfigError without rows.
    """
    if not rows:
        raise ConfigError("data_split: got no clients, wanted at least one")
    kinds = unique(row.kind or "" for row in rows)
    grouped = [row for kind in kinds for row in rows if (row.kind or "") == kind]
    chosen = [grouped[i] for i in sample(len(grouped), MAX_ROWS)]
    n_labels = max(len(row.counts) for row in chosen)
    names = list(labels or map(str, range(n_labels)))
    if len(names) < n_labels:
        raise ConfigError(f"labels: got {len(names)} names, wanted one for each of {n_labels}")
    with drawing():
        tall = height(len(chosen)) + 0.15
        figure = new_figure(6.4, tall, title)
        span = 0.17 if images else 0.0
        axes = figure.add_axes((0.24, 0.5 / tall, 0.73 - span, 1 - 1.15 / tall))
        _label_bars(axes, chosen, n_labels, names)
        strip = figure.add_axes((0.205, 0.5 / tall, 0.018, 1 - 1.15 / tall))
        kind_strip(strip, [row.kind for row in chosen], coloured=False, letters=14)
        if images:
            _image_strips(figure, [row.kind or "" for row in chosen], images, tall)
        note = "" if len(chosen) == len(rows) else f" ({len(chosen)} of {len(rows)} clients)"
        figure.text(0.012, 1 - 0.2 / tall, title + note, fontsize=10.5, fontweight="bold")
        if n_labels <= 12:
            _label_key(figure, names[:n_labels], 1 - 0.43 / tall)
        return figure


def _label_bars(
    axes: Axes, rows: Sequence[LabelCounts], n_labels: int, names: Sequence[str]
) -> None:
    counts = np.zeros((len(rows), n_labels), dtype=np.int64)
    for i, row in enumerate(rows):
        counts[i, : len(row.counts)] = row.counts
    longest = max(1, int(counts.sum(1).max()))
    start = np.zeros(len(rows), dtype=np.int64)
    for label in range(n_labels):
        column = counts[:, label]
        axes.barh(
            range(len(rows)), column, left=start, height=0.82, color=_fill(label, n_labels), lw=0
        )
        wide = column > 0.035 * longest * max(1, len(names[label]))
        for i in range(len(rows)):
            if wide[i] and len(rows) <= 48:
                axes.text(
                    start[i] + column[i] / 2, i, names[label], ha="center", va="center_baseline",
                    fontsize=6, color="#23272e",
                )  # fmt: skip
        start += column
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, longest)
    axes.set_xlabel("examples")
    axes.spines[["left", "bottom"]].set_visible(False)
    quiet_grid(axes, "x")
    axes.set_yticks([])


def _label_key(figure: Figure, names: Sequence[str], y: float) -> None:
    figure.text(0.012, y, "label")
    place = 0.09
    for label, name in enumerate(names):
        figure.text(
            place, y, f" {cut(name, 10)} ", fontsize=7.5, color="#23272e",
            bbox={"facecolor": _fill(label, len(names)), "edgecolor": "none", "pad": 2.2},
        )  # fmt: skip
        place += 0.03 + 0.0125 * len(cut(name, 10))


def _image_strips(
    figure: Figure,
    kinds: Sequence[str],
    images: Mapping[str, Sequence[NDArray[np.float64]]],
    height: float,
) -> None:
    """Up to four images at the right of each group of clients, no taller than the group."""
    low, high = 0.5 / height, 1 - 0.65 / height
    row = (high - low) / len(kinds)
    width = figure.get_size_inches()[0]
    for start, stop, kind in groups(list(kinds)):
        side = min((stop - start) * row * height * 0.9, 0.26)
        middle = high - row * (start + stop) / 2
        for i, image in enumerate(list(images.get(kind or "", ()))[:4]):
            box = (0.825 + i * (side + 0.02) / width, middle - side / height / 2,
                   side / width, side / height)  # fmt: skip
            axes = figure.add_axes(box)
            axes.imshow(np.asarray(image), cmap="gray", interpolation="none")
            axes.set_axis_off()


def _fill(label: int, n_labels: int) -> str:
    if n_labels <= len(FILLS):
        return FILLS[label]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["viridis"](0.15 + 0.85 * label / (n_labels - 1)))
