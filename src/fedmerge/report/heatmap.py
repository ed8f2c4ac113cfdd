"""Pictures with a row for each client: its merging weights, and what each global model is worth.

Rows are put in an order in which likeness can be seen; nothing is averaged away or rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import ConfigError
from fedmerge.report.drawing import FILLS, INK, PALETTE, drawing, inches, new_figure
from fedmerge.report.overall import loss_unit, metric_of
from fedmerge.report.runs import ClientResult, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 160  # more could be told apart neither on a screen nor on paper
MAX_BLOCKS = 8
_NAMED_ROWS = 64
_LETTERS = 20  # of a client's name or kind


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


@dataclass(frozen=True)
class Shown:
    """Which clients, in which order, and which blocks of a run the pictures of its weights show.

    scale: the weight that is drawn in full colour.
    """

    clients: tuple[int, ...]
    blocks: tuple[int, ...]
    scale: float


def shown(run: Run, most: float | None = None) -> Shown:
    """Choose and order the clients of `run`; of more than 160, or of 8 blocks, an even sample.

    most: the largest weight to be drawn, that of the run's end if None. Raises ConfigError if the
    run has no weights.
    """
    if run.weights is None or not run.weights.size:
        raise ConfigError(f'run "{run.folder}": has no merging weights (method = "{run.method}")')
    m, b, _ = run.weights.shape
    clients, blocks = sample(m, MAX_ROWS), sample(b, MAX_BLOCKS)
    weights = run.weights[np.ix_(clients, blocks)]
    top = float(weights.max()) if most is None else most
    scale = max(0.1, math.ceil(top * 10 - 1e-9) / 10)
    return Shown(tuple(clients[i] for i in row_order(weights)), tuple(blocks), scale)


def weights_heatmap(run: Run, part: Shown | None = None) -> Figure:
    """Draw a run's merging weights: a row for each client, a panel for each block of layers.

    The strip at the left has a colour and a name for each true kind of client, where kinds are
    known; it took no part in the ordering. part: what to show, from `shown`; its title says so if
    that is a sample. Raises ConfigError if the run has no weights.
    """
    part = part or shown(run)
    weights = np.asarray(run.weights)  # shown() has refused a run without
    m, b, d = weights.shape
    clients = [run.clients[i] for i in part.clients]
    blocks = [(run.blocks or [str(i) for i in range(b)])[i] for i in part.blocks]
    with drawing():
        tall = height(len(clients))
        figure = new_figure(
            5.2, tall, f"merging weights of {run.method} in {run.column}, seed {run.seed}"
        )
        (left, right), bottom = _sides(clients), 0.62 / tall
        top = 1 - 0.52 / tall
        width = (right - left) / len(blocks)
        for i, block in enumerate(blocks):
            axes = figure.add_axes((left + i * width, bottom, width * 0.93, top - bottom))
            values = weights[list(part.clients), part.blocks[i]] / part.scale
            _panel(axes, _opacity(values), f"weights-{i}")
            step = max(1, math.ceil(d / (20 / len(blocks))))
            axes.set_xticks(range(0, d, step), [str(j + 1) for j in range(0, d, step)])
            name = block if len(block) <= 30 // len(blocks) else block[: 30 // len(blocks)] + "…"
            axes.set_title(f"block {name}" if len(blocks) <= 3 else name, fontsize=8.5, pad=5)
            axes.set_yticks([])
            if i == (len(blocks) - 1 if _kinds_known(clients) else 0):
                _name_rows(axes, clients)
        strip = figure.add_axes((left - 0.03, bottom, 0.022, top - bottom))
        kind_strip(strip, [client.kind for client in clients])
        _scale_bar(figure, part.scale, right, tall)
        sampled = [] if len(clients) == m else [f"{len(clients)} of {m} clients"]
        sampled += [] if len(blocks) == b else [f"{len(blocks)} of {b} blocks"]
        what = "merging weights" + (f" ({', '.join(sampled)})" if sampled else "")
        figure.text(0.012, 1 - 0.17 / tall, f"{what}, row = client, column = global model")
        return figure


def importance_map(run: Run, part: Shown | None = None) -> Figure:
    """Draw by how much each client's loss rises when one global model is taken out of its mix.

    The rows are those of `weights_heatmap`. Purple cells, of the opposite sign, are models without
    which the client would do better. Raises ConfigError if the run has no such numbers.
    """
    part = part or shown(run)
    clients = [run.clients[i] for i in part.clients]
    if not all(client.importance for client in clients):
        raise ConfigError(f'run "{run.folder}": nobody measured what each model is worth')
    values = np.array([client.importance for client in clients], dtype=np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    # One client that cannot do without its model must not make all others look indifferent.
    scale = max(float(np.quantile(np.abs(values), 0.98)), 1e-6)
    with drawing():
        tall = height(len(clients))
        figure = new_figure(
            5.2, tall, f"worth of each global model to each client of {run.column}, seed {run.seed}"
        )
        (left, right), bottom = _sides(clients), 0.62 / tall
        top = 1 - 0.52 / tall
        axes = figure.add_axes((left, bottom, right - left, top - bottom))
        image = _signed(np.sign(values) * np.sqrt(np.abs(values) / scale))
        _panel(axes, image, "importance")
        d = values.shape[1]
        step = max(1, math.ceil(d / 20))
        axes.set_xticks(range(0, d, step), [str(j + 1) for j in range(0, d, step)])
        axes.set_yticks([])
        _name_rows(axes, clients)
        strip = figure.add_axes((left - 0.03, bottom, 0.022, top - bottom))
        kind_strip(strip, [client.kind for client in clients])
        unit = loss_unit(metric_of([run]))
        _scale_bar(figure, scale, right, tall, f"{unit} (root scale)", signed=True)
        what = "rise of the loss without a model, column = global model"
        figure.text(0.012, 1 - 0.17 / tall, what)
        return figure


def _panel(axes: Axes, image: NDArray[np.float64], gid: str) -> None:
    axes.imshow(image, aspect="auto", interpolation="none", interpolation_stage="rgba", gid=gid)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=8, pad=3)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_alpha(0.35)


def _kinds_known(clients: Sequence[ClientResult]) -> bool:
    return any(client.kind is not None for client in clients)


def _sides(clients: Sequence[ClientResult]) -> tuple[float, float]:
    """Where the cells begin and end, so that there is room for kinds at the left and names at the
    right, or for names at the left where no kind is known.
    """
    names = [cut(client.id, _LETTERS) for client in clients] if len(clients) <= _NAMED_ROWS else []
    kinds = [cut(client.kind, _LETTERS) for client in clients if client.kind is not None]
    named, kind = (0.02 + 0.0125 * max(map(len, some), default=0) for some in (names, kinds))
    return (max(0.1, kind + 0.04), 1 - max(0.04, named)) if kinds else (max(0.04, named), 0.97)


def _name_rows(axes: Axes, clients: Sequence[ClientResult]) -> None:
    if len(clients) <= _NAMED_ROWS:
        axes.set_yticks(range(len(clients)), [cut(c.id, _LETTERS) for c in clients])
        if _kinds_known(clients):
            axes.get_yaxis().tick_right()
        axes.tick_params(axis="y", labelsize=8, pad=3)


def _opacity(share: NDArray[np.float64], colour: str = "accent") -> NDArray[np.float64]:
    """One colour whose opacity is the share, so that any page shows through: (*share, 4)."""
    from matplotlib.colors import to_rgb

    image = np.empty((*share.shape, 4))
    image[..., :3] = to_rgb(PALETTE[colour][0])
    image[..., 3] = np.clip(share, 0.0, 1.0)
    return image


def kind_strip(
    axes: Axes, kinds: Sequence[str | None], coloured: bool = True, letters: int = _LETTERS
) -> None:
    """A colour for each kind (or plain ink, where colour means something else), and its name
    wherever a stretch of it is tall enough for text.
    """
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    family = families(kinds)
    if not family:
        return
    known = sorted(set(family.values()))
    points = inches(axes) * 72 / len(kinds)
    named = kinds if points >= 8 else [family.get(kind or "") for kind in kinds]
    for start, stop, kind in groups(named):
        if kind is None:
            continue
        middle, height = (start + stop - 1) / 2, stop - start - 0.12
        colour = FILLS[known.index(family.get(kind, kind)) % len(FILLS)] if coloured else INK
        axes.barh(middle, 1, height=height, color=colour, lw=0, alpha=1 if coloured else 0.3)
        if (stop - start) * points >= 8:
            axes.text(-0.45, middle, cut(kind, letters), ha="right", va="center_baseline",
                      fontsize=8)  # fmt: skip


def families(kinds: Sequence[str | None]) -> dict[str, str]:
    """What each known kind is coloured by: itself, or, if there are more kinds than colours, its
    name up to a bracket ("teacher 2" of "teacher 2 (0.7)").
    """
    known = sorted({kind for kind in kinds if kind is not None})
    return {kind: kind.partition(" (")[0] if len(known) > len(FILLS) else kind for kind in known}


def groups(kinds: Sequence[str | None]) -> list[tuple[int, int, str | None]]:
    """(start, stop, kind) of each stretch of equal neighbours."""
    cuts = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    edges = [0, *cuts, len(kinds)]
    return [(a, b, kinds[a]) for a, b in pairwise(edges)]


def _signed(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Green whose opacity is the share, purple where it is negative: (*share, 4)."""
    image = _opacity(np.abs(share), "green")
    image[share < 0, :3] = _opacity(np.ones(1), "purple")[0, :3]
    return image


def _scale_bar(
    figure: Figure,
    scale: float,
    right: float,
    height: float,
    name: str = "weight",
    signed: bool = False,
) -> None:
    axes = figure.add_axes((right - 0.28, 0.26 / height, 0.26, 0.09 / height))
    low = -scale if signed else 0.0
    share = np.linspace(low / scale, 1, 65)[None]
    image = _signed(share) if signed else _opacity(share)
    axes.imshow(image, aspect="auto", interpolation="none", extent=(low, scale, 0, 1))
    axes.set_yticks([])
    ticks = sorted({low, 0.0, scale})
    axes.set_xticks(ticks, [f"{tick:.2g}".replace("-", "−") for tick in ticks])
    axes.tick_params(length=0, pad=2, labelsize=8)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_alpha(0.35)
    figure.text(right - 0.3, 0.265 / height, name, ha="right", fontsize=8)


def height(rows: int) -> float:
    """Inches of a picture with this many rows."""
    return 1.2 + min(max(0.14 * rows, 0.9), 7.6)


def sample(n: int, most: int) -> list[int]:
    """Evenly spaced numbers below n: all of them, or `most`."""
    return list(range(n)) if n <= most else [i * n // most for i in range(most)]


def cut(name: str, most: int) -> str:
    """A name of at most this many letters."""
    return name if len(name) <= most else name[: most - 1] + "…"
