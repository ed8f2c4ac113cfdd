"""How the report's pictures look, and how one becomes a file.

It knows colours, fonts and files; what is drawn is decided in `figures` and `heatmap`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import ConfigError, MissingExtraError
from fedmerge.report.runs import is_fedmerge

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1f24"  # text and axes; becomes currentColor in inline SVG
SURFACE = "#fefefd"  # what a picture lies on; becomes the page's surface colour
# One name, its colour on a light page and on a dark one. Hues follow Okabe and Ito; they and their
# lightness are set so that all stay apart under each colour blindness and can be read as text.
PALETTE: Mapping[str, tuple[str, str]] = {
    "accent": ("#d14109", "#ff7a3c"),
    "blue": ("#00489c", "#4a93f0"),
    "green": ("#00815c", "#2fb88a"),
    "purple": ("#b93c98", "#f58fd0"),
    "slate": ("#39434f", "#8e99a6"),
    "sky": ("#2379b1", "#8fd6f7"),
    "ochre": ("#5c5000", "#f2d24a"),
    "brown": ("#a5605d", "#c08a60"),
}
# Paul Tol's "light" scheme: fills that bear dark text on either page, for kinds and labels.
FILLS = (
    "#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#44bb99", "#99ddff", "#bbcc33", "#c9b3e6",
    "#aaaa00", "#d3d7dc",
)  # fmt: skip
_RIVALS = tuple(name for name in PALETTE if name != "accent")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_DASHES: tuple[Any, ...] = (
    (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.5, 1.4, 1.5)), (0, (3, 1.3)),
    (0, (8, 2)), (0, (4, 1.3, 1.3, 1.3, 1.3, 1.3)), (0, (2, 2.2)),
)  # fmt: skip
_RC: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedmerge",
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3
    "text.parse_math": False,  # a client may be called "$5"
    "font.family": ["sans-serif"],
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Style:
    """How one method is drawn: colour, dashes, marker and width, so that colour is no lone cue.

    order: above 5 for FedMerge. index: its place among the methods; in SVG its line, band and name
    bear it.
    """

    colour: str
    line: Any
    marker: str
    width: float
    order: int
    index: int = 0


def method_styles(methods: Sequence[str]) -> dict[str, Style]:
    """Give each method its style by its place in `methods`; FedMerge is always the strong one."""
    styles: dict[str, Style] = {}
    ours = rivals = 0
    for index, name in enumerate(methods):
        if is_fedmerge(name):
            line = "-" if ours == 0 else _DASHES[(ours - 1) % len(_DASHES)]
            colour = PALETTE["accent"][0]
            marker = _MARKERS[ours % len(_MARKERS)]
            styles[name] = Style(colour, line, marker, 2.3, 10 - min(ours, 4), index)
            ours += 1
        else:
            colour = PALETTE[_RIVALS[rivals % len(_RIVALS)]][0]
            marker = _MARKERS[(rivals + 1) % len(_MARKERS)]
            # Methods that have to share a colour differ in their dashes.
            dashes = _DASHES[(rivals + rivals // len(_RIVALS)) % len(_DASHES)]
            styles[name] = Style(colour, dashes, marker, 1.3, 5, index)
            rivals += 1
    return styles


def apart(styles: Mapping[str, Style], methods: Sequence[str]) -> dict[str, Style]:
    """Return `styles` with other colours for those of `methods` that would share one.

    The first keeps its colour, a later one takes the first that is free; only when all are taken
    do two look alike, but for their dashes.
    """
    free = [PALETTE[name][0] for name in _RIVALS]
    looks, clashing = dict(styles), []
    for name in methods:
        if styles[name].colour in free:
            free.remove(styles[name].colour)
        elif not is_fedmerge(name):
            clashing.append(name)
    for name, colour in zip(clashing, free, strict=False):
        looks[name] = replace(styles[name], colour=colour)
    return looks


@contextmanager
def drawing() -> Iterator[None]:
    """Hold matplotlib's settings at the report's for the block; they are as before after it."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("report") from error
    settings: Any = dict(_RC)  # matplotlib types its keys as a list of literals
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Of every letter of a Chinese name; the page is shown in fonts of its reader's.
        warnings.filterwarnings("ignore", r"Glyph \d+ \(.*\) missing from ", UserWarning)
        yield


def new_figure(width: float, height: float, label: str) -> Figure:
    """Return an empty figure of `width` x `height` inches; `label` tells it to a screen reader."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.set_label(label)
    return figure


def inches(axes: Axes) -> float:
    """Return the height of `axes` in inches."""
    figure = axes.get_figure(root=True)
    return 0.0 if figure is None else axes.get_position().height * figure.get_size_inches()[1]


def quiet_grid(axes: Axes, axis: str) -> None:
    """Draw faint grid lines along "x" or "y", behind the data, and no tick marks."""
    axes.set_axisbelow(True)
    lines = axes.get_xaxis() if axis == "x" else axes.get_yaxis()
    lines.grid(True, color=INK, alpha=0.13, linewidth=0.6)
    axes.tick_params(length=0, pad=4)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move `places` apart to at least `gap`, each as little as possible, and keep them in 0..1.

    Clusters that overlap are centred on their mean (pooling of adjacent violators).
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    pools: list[tuple[float, int]] = []  # (mean of place minus its offset, members)
    for rank, i in enumerate(order):
        mean, count = places[i] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, members = pools.pop()
            mean = (mean * count + other * members) / (count + members)
            count += members
        pools.append((mean, count))
    flat = [mean for mean, count in pools for _ in range(count)]
    room = 1 - gap * (len(places) - 1)
    moved = [0.0] * len(places)
    for rank, i in enumerate(order):
        moved[i] = min(max(flat[rank], 0.0), max(room, 0.0)) + rank * gap
    return moved


def short_name(name: str) -> str:
    """A method's name cut in its middle, since variants differ at their ends: "fedmerge:d=8"."""
    return name if len(name) <= 22 else f"{name[:10]}…{name[-11:]}"


def room_for(names: Sequence[str], size: float) -> float:
    """Inches that the longest of `names` takes at `size` points, judged by its letters."""
    return max((len(short_name(name)) for name in names), default=0) * 0.63 * size / 72


def symlog(axes: Axes, sizes: NDArray[np.float64]) -> bool:
    """Scale y symmetric-logarithmically if `sizes` differ by over 20 times; say whether it did."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    sizes = sizes[sizes > 0]
    if not len(sizes) or sizes.max() <= 20 * np.quantile(sizes, 0.05):
        return False
    # Linear below the power of ten under the small gaps, but only the two largest decades are
    # stretched: more would draw noise around 0 as leaps.
    low = max(np.floor(np.log10(np.quantile(sizes, 0.05))), np.ceil(np.log10(sizes.max())) - 2)
    axes.set_yscale("symlog", linthresh=float(10.0**low), linscale=0.6)
    powers = 10.0 ** np.arange(low, np.ceil(np.log10(sizes.max())) + 1)
    ticks = sorted({0.0, *(float(p) for p in powers), *(float(-p) for p in powers)})
    axis = axes.get_yaxis()
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    return True


def night() -> str:
    """Return the matrix (of feColorMatrix) that turns the colours of pixels into a dark page's.

    It is exact for the three colours that the heat maps are painted in, at every opacity.
    """
    from matplotlib.colors import to_rgb

    names = ("accent", "green", "purple")
    light, dark = (np.array([to_rgb(PALETTE[name][i]) for name in names]).T for i in (0, 1))
    rows = np.zeros((4, 5))
    rows[:3, :3] = dark @ np.linalg.inv(light)
    rows[3, 3] = 1
    return " ".join(f"{value:.4g}" for value in rows.ravel())


def save(figure: Figure, path: Path) -> None:
    """Write `figure` to a .png, .svg or .pdf file on a white ground, by the ending of `path`.

    The file is as large as what is drawn, which may be more or less than the canvas.
    """
    ending = path.suffix.lower()
    metadata: dict[str, Any] = {
        ".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {},
    }  # fmt: skip
    if ending not in metadata:
        raise ConfigError(f'path = "{path.name}": got ending "{ending}", wanted .png, .svg or .pdf')
    with drawing():
        figure.savefig(
            path, format=ending[1:], dpi=300, facecolor="white", metadata=metadata[ending],
            bbox_inches="tight", pad_inches=0.03,
        )  # fmt: skip
