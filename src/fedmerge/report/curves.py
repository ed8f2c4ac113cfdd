"""Pictures over rounds: how methods learn, and how large the local-global gap is on the way.

They use matplotlib's object interface and leave no global state behind; looks and files are the
matter of `drawing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmerge.report.drawing import (
    INK,
    Style,
    apart,
    drawing,
    inches,
    method_styles,
    new_figure,
    quiet_grid,
    room_for,
    short_name,
    spread,
    symlog,
)
from fedmerge.report.overall import loss_unit
from fedmerge.report.ranking import unique
from fedmerge.report.runs import RoundPoint, Run, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

MANY_SEEDS = 5
"""From so many on a band is an interval of the mean, below it the span of the seeds."""
Styles = Mapping[str, Style]
Series = tuple[NDArray[np.float64], NDArray[np.float64]]  # rounds (t,), values (seeds, t)


def learning_curves(
    runs: Sequence[Run],
    model: str = "merged",
    styles: Styles | None = None,
    focus: Sequence[str] | None = None,
) -> Figure:
    """Draw mean test accuracy by round, a line for each method, with a band for its seeds.

    runs: of one setting. A regression setting shows its loss. styles: from `method_styles`, so
    that a method looks the same in every picture; made from `runs` if None. focus: the methods
    that are drawn in colour and named, all if None; the others are thin and grey. No two of them
    share a colour while colours last. The band is the 95% t interval of the mean, or the span of
    fewer than five seeds.
    """
    metric = "accuracy" if any(p.accuracy for run in runs for p in run.log) else "loss"

    def read(point: RoundPoint) -> float | None:
        return (point.accuracy if metric == "accuracy" else point.loss).get(model)

    with drawing():
        what = f"test {metric} of the {model} model"
        figure, axes = _round_axes(
            f"{what} by round, a line for each method", focus or _methods(runs)
        )
        _lines(axes, _by_method(runs, read), styles or method_styles(_methods(runs)), focus)
        _say_diverged(figure, runs, read)
        axes.set_title(f"mean {what}" + (", squared error" if metric == "loss" else ""), pad=10)
        return figure


def gap_over_rounds(
    runs: Sequence[Run],
    split: str = "test",
    styles: Styles | None = None,
    focus: Sequence[str] | None = None,
) -> Figure:
    """Draw the local-global gap by round, a line for each method, with a band for its seeds.

    It is in the unit of the loss. The axis turns symmetric-logarithmic when the gaps differ by more
    than a factor of 20.
    """

    def read(point: RoundPoint) -> float | None:
        gap = point.gap_test if split == "test" else point.gap_train
        lost = gap is None and any(not finite(loss) for loss in point.loss.values())
        return float("nan") if lost else gap

    with drawing():
        figure, axes = _round_axes(
            f"local-global gap on {split} data by round", focus or _methods(runs)
        )
        series = _by_method(runs, read)
        if series:
            sizes = np.abs(np.concatenate([values.ravel() for _, values in series.values()]))
            wide = symlog(axes, sizes)
            axes.axhline(0.0, color=INK, linewidth=0.8, alpha=0.6)
        else:
            wide = False
        _lines(axes, series, styles or method_styles(_methods(runs)), focus)
        _say_diverged(figure, runs, read)
        unit = loss_unit("accuracy" if any(p.accuracy for run in runs for p in run.log) else "loss")
        axes.set_title(f"{split} gap, {unit}" + (" (log scale)" if wide else ""), pad=10)
        return figure


def _methods(runs: Sequence[Run]) -> tuple[str, ...]:
    return unique(run.method for run in runs)


def _by_method(
    runs: Sequence[Run], read: Callable[[RoundPoint], float | None]
) -> dict[str, Series]:
    """Values by method over the rounds that all of its seeds have, so that no mean jumps.

    Of a method that diverged on some seeds these are the other seeds; of one that diverged on all,
    the rounds before, up to ten times the largest value of the methods that did not. What `read`
    returns is None in a round that was not evaluated.
    """
    series: dict[str, Series] = {}
    lost = []
    for method, read_seeds in _by_seed(runs, read).items():
        whole = [seen for seen in read_seeds if not _diverged(seen)]
        lost += [] if whole else [method]
        seeds = [{t: v for t, v in seen.items() if finite(v)} for seen in whole or read_seeds]
        seeds = [seen for seen in seeds if seen]
        rounds = sorted(set.intersection(*(set(seen) for seen in seeds))) if seeds else []
        if rounds:
            matrix = np.array([[seen[t] for t in rounds] for seen in seeds], dtype=np.float64)
            series[method] = (np.array(rounds, dtype=np.float64), matrix)
    calm = [np.abs(values).max() for method, (_, values) in series.items() if method not in lost]
    for method in series.keys() & lost if calm else ():
        rounds_, values = series[method]
        wild = (np.abs(values) > 10 * max(calm)).any(0)
        n = int(wild.argmax()) if wild.any() else len(wild)
        series[method] = (rounds_[:n], values[:, :n])
    return {method: pair for method, pair in series.items() if len(pair[0])}


def _by_seed(
    runs: Sequence[Run], read: Callable[[RoundPoint], float | None]
) -> dict[str, list[dict[int, float]]]:
    """Values by method, seed and round."""
    found: dict[str, list[dict[int, float]]] = {method: [] for method in _methods(runs)}
    for run in runs:
        values = {point.round: read(point) for point in run.log}
        found[run.method].append({t: v for t, v in values.items() if v is not None})
    return found


def _diverged(seen: Mapping[int, float]) -> bool:
    """Whether the last of a seed's values by round is not finite."""
    return bool(seen) and not finite(seen[max(seen)])


def _say_diverged(
    figure: Figure, runs: Sequence[Run], read: Callable[[RoundPoint], float | None]
) -> None:
    """Name the methods that diverged, under the axes: their lines are not over all seeds."""
    said = []
    for method, seeds in _by_seed(runs, read).items():
        n = sum(map(_diverged, seeds))
        said += [f"{short_name(method)} {n} of {len(seeds)}"] if n else []
    if said:
        text = "seeds that diverged: " + ", ".join(said[:3]) + (", …" if len(said) > 3 else "")
        figure.axes[0].set_xlabel("round", loc="left")
        figure.text(0.985, 0.03, text, ha="right", fontsize=7.5)


def _round_axes(label: str, methods: Sequence[str]) -> tuple[Figure, Axes]:
    figure = new_figure(5.2, 3.3, label)
    room = max(0.65, room_for(methods, 8.6)) / 5.2 + 0.06  # for the names at the ends of the lines
    axes = figure.add_axes((0.085, 0.135, 0.915 - room, 0.765))
    axes.set_xlabel("round")
    axes.spines["left"].set_visible(False)
    quiet_grid(axes, "y")
    return figure, axes


def _lines(
    axes: Axes, series: Mapping[str, Series], styles: Styles, focus: Sequence[str] | None
) -> None:
    """Draw the lines with their bands, and the name of each in `focus` at its end."""
    if not series:
        axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center")
        return
    styles = apart(styles, focus or list(series))
    for method, (rounds, values) in series.items():
        style = styles[method]
        if focus is not None and method not in focus:
            axes.plot(rounds, values.mean(0), color=INK, alpha=0.2, linewidth=0.8, zorder=1,
                      gid=f"method-{style.index}")  # fmt: skip
            continue
        if len(values) > 1:
            axes.fill_between(rounds, *_band(values), color=style.colour, alpha=0.14, linewidth=0,
                              zorder=style.order - 4, gid=f"band-{style.index}")  # fmt: skip
        axes.plot(
            rounds, values.mean(0), linestyle=style.line, color=style.colour,
            label=short_name(method), linewidth=style.width, zorder=style.order,
            gid=f"method-{style.index}",
            marker=style.marker if len(rounds) == 1 else "",
        )  # fmt: skip
    first = min(rounds[0] for rounds, _ in series.values())
    last = max(rounds[-1] for rounds, _ in series.values())
    axes.set_xlim(first - (last == first) * 0.5, last + (last == first) * 0.5)
    axes.get_xaxis().set_major_locator(_whole_numbers())
    height = inches(axes) * 72
    named = {name: pair for name, pair in series.items() if focus is None or name in focus}
    if 10.5 * len(named) > height:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.1), frameon=False, fontsize=6)
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    axes.autoscale_view()
    names = list(named)
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
            1.055, place, short_name(name), transform=axes.transAxes, va="center", fontsize=8.6,
            color=style.colour, fontweight="bold" if style.order > 5 else "normal",
            gid=f"label-{style.index}",
        )  # fmt: skip


def _band(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 95% t interval of the mean by round; of a few seeds, for which it is wild, their span."""
    n = len(values)
    if n < MANY_SEEDS:
        return values.min(0), values.max(0)
    from scipy import stats

    reach = stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / np.sqrt(n)
    return values.mean(0) - reach, values.mean(0) + reach


def _whole_numbers() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True, min_n_ticks=1)
