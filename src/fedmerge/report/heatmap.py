"""Pictures with one row for each client: its merging weights, and what labels its data hold.

Rows are put in an order in which likeness can be seen; nothing is averaged away or rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import ConfigError
from fedmerge.report.drawing import FILLS, INK, PALETTE, drawing, inches, new_figure, quiet_grid
from fedmerge.report.ranking import unique
from fedmerge.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 160  # more could be told apart neither on a screen nor on paper
MAX_BLOCKS = 8
_NAMED_ROWS = 64


@dataclass(frozen=True)
class LabelCounts:
    """How many examples of each label one client has; counts: (c,), label 0 first."""

    client: str
    kind: str | None
    counts: Sequence[int]


def row_order(weights: NDArray[np.float64]) -> list[int]:
    """Return an order of the rows of `weights` (m, b, d) that puts like next to like.

    Average-linkage clustering on Euclidean distance with optimal leaf ordering; equal rows come
    out side by side.
    """
    flat = weights.reshape(len(weights), -1)
    if len(flat) < 3:
        return list(range(len(flat)))
    from scipy.cluster.hierarchy import leaves_list, linkage

    # Leaf ordering only sees distances, and ties among them are many; joining equal rows first
    # keeps each such group in one piece.
    rows, index = np.unique(flat, axis=0, return_inverse=True)
    order = leaves_list(linkage(rows, "average", optimal_ordering=True)) if len(rows) > 2 else None
    rank = np.arange(len(rows)) if order is None else np.argsort(order)
    return [int(i) for i in np.argsort(rank[index.ravel()], kind="stable")]


def weights_heatmap(run: Run) -> Figure:
    """Draw a run's merging weights: a row for each client, a panel for each block of layers.

    The strip at the left has a colour and a name for each true kind of client, where kinds are
    known; it took no part in the ordering. Of more than 160 clients or 8 blocks an even sample is
    drawn, and the title says so. Raises ConfigError if the run has no weights.
    """
    if run.weights is None or not run.weights.size:
        raise ConfigError(f'run "{run.folder}": has no merging weights (method = "{run.method}")')
    m, b, d = run.weights.shape
    chosen, shown = _sample(m, MAX_ROWS), _sample(b, MAX_BLOCKS)
    weights = run.weights[np.ix_(chosen, shown)]
    order = row_order(weights)
    weights, clients = weights[order], [run.clients[chosen[i]] for i in order]
    blocks = [(run.blocks or [str(i) for i in range(b)])[i] for i in shown]
    with drawing():
        height = _height(len(clients))
        figure = new_figure(
            5.2, height, f"merging weights of {run.method} in {run.setting}, seed {run.seed}"
        )
        left, right, bottom = 0.21, 0.9, 0.62 / height
        top = 1 - 0.52 / height
        width = (right - left) / len(blocks)
        scale = max(0.1, math.ceil(float(weights.max()) * 10 - 1e-9) / 10)
        for i, block in enumerate(blocks):
            axes = figure.add_axes((left + i * width, bottom, width * 0.93, top - bottom))
            _weights_panel(axes, weights[:, i], scale)
            step = max(1, math.ceil(d / (20 / len(blocks))))
            axes.set_xticks(range(0, d, step), [str(j + 1) for j in range(0, d, step)])
            name = block if len(block) <= 30 // len(blocks) else block[: 30 // len(blocks)] + "…"
            axes.set_title(f"block {name}" if len(blocks) <= 3 else name, fontsize=8.5, pad=5)
            axes.set_yticks([])
            if i == len(blocks) - 1 and len(clients) <= _NAMED_ROWS:
                axes.set_yticks(range(len(clients)), [_short(c.id, 7) for c in clients])
                axes.get_yaxis().tick_right()
                axes.tick_params(axis="y", labelsize=6.4, pad=2)
        strip = figure.add_axes((left - 0.03, bottom, 0.022, top - bottom))
        _kind_strip(strip, [client.kind for client in clients])
        _scale_bar(figure, scale, left, right, height)
        sampled = [] if len(chosen) == m else [f"{len(chosen)} of {m} clients"]
        sampled += [] if len(shown) == b else [f"{len(shown)} of {b} blocks"]
        what = "merging weights" + (f" ({', '.join(sampled)})" if sampled else "")
        figure.text(0.012, 1 - 0.17 / height, f"{what}, row = client, column = global model")
        return figure


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
    chosen = [grouped[i] for i in _sample(len(grouped), MAX_ROWS)]
    n_labels = max(len(row.counts) for row in chosen)
    names = list(labels or map(str, range(n_labels)))
    if len(names) < n_labels:
        raise ConfigError(f"labels: got {len(names)} names, wanted one for each of {n_labels}")
    with drawing():
        height = _height(len(chosen)) + 0.15
        figure = new_figure(6.4, height, title)
        span = 0.17 if images else 0.0
        axes = figure.add_axes((0.24, 0.5 / height, 0.73 - span, 1 - 1.15 / height))
        _label_bars(axes, chosen, n_labels, names)
        strip = figure.add_axes((0.205, 0.5 / height, 0.018, 1 - 1.15 / height))
        _kind_strip(strip, [row.kind for row in chosen], coloured=False)
        if images:
            _image_strips(figure, [row.kind or "" for row in chosen], images, height)
        note = "" if len(chosen) == len(rows) else f" ({len(chosen)} of {len(rows)} clients)"
        figure.text(0.012, 1 - 0.2 / height, title + note, fontsize=10.5, fontweight="bold")
        if n_labels <= 12:
            _label_key(figure, names[:n_labels], 1 - 0.43 / height)
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
    place = 0.075
    for label, name in enumerate(names):
        figure.text(
            place, y, f" {_short(name, 10)} ", fontsize=7.5, color="#23272e",
            bbox={"facecolor": _fill(label, len(names)), "edgecolor": "none", "pad": 2.2},
        )  # fmt: skip
        place += 0.03 + 0.0125 * len(_short(name, 10))


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
    for start, stop, kind in _groups(list(kinds)):
        side = min((stop - start) * row * height * 0.9, 0.26)
        middle = high - row * (start + stop) / 2
        for i, image in enumerate(list(images.get(kind or "", ()))[:4]):
            box = (0.825 + i * (side + 0.02) / width, middle - side / height / 2,
                   side / width, side / height)  # fmt: skip
            axes = figure.add_axes(box)
            axes.imshow(np.asarray(image), cmap="gray", interpolation="none")
            axes.set_axis_off()


def _weights_panel(axes: Axes, weights: NDArray[np.float64], scale: float) -> None:
    """Weights (m, d) as one colour whose opacity is the weight, so that any page shows through."""
    axes.imshow(
        _opacity(weights / scale), aspect="auto", interpolation="none", interpolation_stage="rgba"
    )
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=7.5, pad=3)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_alpha(0.35)


def _opacity(share: NDArray[np.float64]) -> NDArray[np.float64]:
    from matplotlib.colors import to_rgb

    image = np.empty((*share.shape, 4))
    image[..., :3] = to_rgb(PALETTE["accent"][0])
    image[..., 3] = np.clip(share, 0.0, 1.0)
    return image


def _kind_strip(axes: Axes, kinds: Sequence[str | None], coloured: bool = True) -> None:
    """A colour for each kind (or plain ink, where colour means something else), and its name
    wherever a stretch of it is tall enough for text.
    """
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    known = sorted({kind for kind in kinds if kind is not None})
    if not known:
        return
    points = inches(axes) * 72 / len(kinds)
    for start, stop, kind in _groups(kinds):
        if kind is None:
            continue
        middle, height = (start + stop - 1) / 2, stop - start - 0.12
        colour = FILLS[known.index(kind) % len(FILLS)] if coloured else INK
        axes.barh(middle, 1, height=height, color=colour, lw=0, alpha=1 if coloured else 0.3)
        if (stop - start) * points >= 6.5:
            size = 8 if (stop - start) * points >= 9 else 6.4
            axes.text(-0.45, (start + stop - 1) / 2, _short(kind, 13), ha="right",
                      va="center_baseline", fontsize=size)  # fmt: skip


def _groups(kinds: Sequence[str | None]) -> list[tuple[int, int, str | None]]:
    """(start, stop, kind) of each stretch of equal neighbours."""
    cuts = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    edges = [0, *cuts, len(kinds)]
    return [(a, b, kinds[a]) for a, b in pairwise(edges)]


def _scale_bar(figure: Figure, scale: float, left: float, right: float, height: float) -> None:
    axes = figure.add_axes((right - 0.26, 0.26 / height, 0.24, 0.09 / height))
    image = _opacity(np.linspace(0, 1, 64)[None])
    axes.imshow(image, aspect="auto", interpolation="none", extent=(0, scale, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([0, scale], ["0", f"{scale:.1f}"])
    axes.tick_params(length=0, pad=2, labelsize=7.5)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_alpha(0.35)
    figure.text(right - 0.275, 0.265 / height, "weight", ha="right", fontsize=7.5)


def _fill(label: int, n_labels: int) -> str:
    if n_labels <= len(FILLS):
        return FILLS[label]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["viridis"](0.15 + 0.85 * label / (n_labels - 1)))


def _height(rows: int) -> float:
    return 1.2 + min(max(0.125 * rows, 0.9), 6.4)


def _sample(n: int, most: int) -> list[int]:
    """Evenly spaced numbers below n: all of them, or `most`."""
    return list(range(n)) if n <= most else [i * n // most for i in range(most)]


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
