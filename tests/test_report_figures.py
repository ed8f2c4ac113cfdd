"""The pictures: what they show, and the inline SVG made of them.

Looks are judged by eye, not here; these tests hold the numbers, the names and the form.
"""

from __future__ import annotations

import re
import sys
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb, to_rgba
from scipy import stats

from fedmerge.errors import ConfigError, MissingExtraError
from fedmerge.report import figures
from fedmerge.report.clients import separated
from fedmerge.report.drawing import INK, PALETTE, SURFACE, apart, drawing, night, spread
from fedmerge.report.figures import LabelCounts, method_styles, row_order, to_svg
from fedmerge.report.heatmap import families
from fedmerge.report.overall import duels, overviews, ranking, regrets
from fedmerge.report.reading import load_runs
from fedmerge.report.runs import ClientResult, Run
from report_fixture import METHODS, write_folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    return load_runs(write_folder(folder, settings=("concept-mix",), seeds=(0, 1), rounds=12))


def of(runs: Sequence[Run], method: str) -> list[Run]:
    return [run for run in runs if run.method == method]


def with_accuracies(run: Run, accuracies: Mapping[str, float]) -> Run:
    clients = tuple(
        ClientResult(name, None, 1, 1, 1, {"merged": value}, {})
        for name, value in accuracies.items()
    )
    return replace(run, last=replace(run.last, clients=clients))


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


# ---- order of rows


def test_equal_rows_come_out_side_by_side() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat(np.arange(6), 5))
    weights = rng.dirichlet(np.ones(4), size=(6, 2))[kinds]
    order = row_order(weights)
    assert sorted(order) == list(range(30))
    changes = np.count_nonzero(np.diff(kinds[order]))
    assert changes == 5  # six kinds in one piece each


def test_like_rows_stand_together_along_a_bow() -> None:
    # On a bow that turns back, neither coordinate alone gives the order.
    places = np.array([4, 1, 6, 3, 0, 5, 2])
    angle = np.pi * (0.3 + 0.2 * places)
    order = row_order(np.stack([np.cos(angle), np.sin(angle)], axis=1)[:, None])
    seen = places[order].tolist()
    assert seen in (sorted(seen), sorted(seen, reverse=True))


@pytest.mark.parametrize("m", [1, 2])
def test_one_or_two_rows_need_no_order(m: int) -> None:
    assert row_order(np.ones((m, 1, 3))) == list(range(m))


# ---- what is drawn


def test_learning_curves_draw_the_mean_over_seeds(runs: list[Run]) -> None:
    figure = figures.learning_curves(runs)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    ours = of(runs, "fedmerge")
    rounds = [point.round for point in ours[0].log if point.accuracy]
    wanted = np.mean([[p.accuracy["merged"] for p in run.log if p.accuracy] for run in ours], 0)
    assert np.asarray(lines["fedmerge"].get_xdata()).tolist() == rounds
    np.testing.assert_allclose(np.asarray(lines["fedmerge"].get_ydata(), dtype=float), wanted)
    assert set(METHODS) <= set(texts(figure))
    assert figure.axes[0].get_legend() is None


def scatter_of(runs: Sequence[Run], points: Sequence[tuple[float, float]]) -> Any:
    """The scatter of clients with these (x, y)."""
    x = {f"c{i}": point[0] for i, point in enumerate(points)}
    y = {f"c{i}": point[1] for i, point in enumerate(points)}
    (ours, _), (theirs, _) = of(runs, "fedmerge"), of(runs, "fedavg")
    return figures.client_scatter([with_accuracies(ours, y)], [with_accuracies(theirs, x)])


def areas(axes: Any) -> list[float]:
    return [float(s) for c in axes.collections for s in c.get_sizes() if len(c.get_offsets())]


def test_marks_of_the_scatter_have_a_largest_size_and_a_key(runs: list[Run]) -> None:
    spots = [(0.5, 0.9)] * 400 + [(0.9, 0.5)] * 40 + [(0.7, 0.7)]
    figure = scatter_of(runs, spots)
    assert max(areas(figure.axes[0])) < 200
    assert min(areas(figure.axes[0])) >= 4
    key = figure.axes[1]
    assert set(areas(figure.axes[0])) <= set(areas(key))
    assert {"clients on one spot", "201–400"} <= set(texts(figure))
    assert len(scatter_of(runs, spots[-1:]).axes) == 1  # all marks alike: no key


def test_a_scatter_of_very_many_clients_stays_small(runs: list[Run]) -> None:
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.uniform(0.5, 1, (4000, 2))]
    figure = scatter_of(runs, points)
    drawn = [tuple(p) for c in figure.axes[0].collections for p in c.get_offsets()]
    assert len(drawn) <= 61 * 61 + 61
    assert len(to_svg(figure)) < 150_000
    above = sum(y > x for x, y in points)
    assert f"better with fedmerge: {above} of 4000 (clients × seeds)" in texts(figure)


def bands(figure: Any) -> dict[str, Any]:
    return {c.get_gid(): c.get_paths()[0].get_extents() for c in figure.axes[0].collections}


def test_the_band_of_many_seeds_is_the_interval_of_their_mean(runs: list[Run]) -> None:
    (run, _) = of(runs, "fedavg")

    def shifted(by: float) -> Run:
        log = [
            replace(p, accuracy={"merged": p.accuracy["merged"] + by})
            for p in run.log
            if p.accuracy
        ]
        return replace(run, log=tuple(log))

    shifts = np.linspace(-0.1, 0.1, 9)
    mean = [p.accuracy["merged"] for p in run.log if p.accuracy]
    reach = stats.t.ppf(0.975, 8) * shifts.std(ddof=1) / 3
    (band,) = bands(figures.learning_curves([shifted(by) for by in shifts])).values()
    np.testing.assert_allclose([band.y0, band.y1], [min(mean) - reach, max(mean) + reach])
    (band,) = bands(figures.learning_curves([shifted(by) for by in (-0.1, 0.1)])).values()
    np.testing.assert_allclose([band.y0, band.y1], [min(mean) - 0.1, max(mean) + 0.1])
    assert not bands(figures.learning_curves([run]))  # one seed spans nothing


def test_curves_use_only_rounds_that_every_seed_has(runs: list[Run]) -> None:
    first, second = of(runs, "local")
    figure = figures.learning_curves([first, replace(second, log=second.log[:6])])
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "local"]
    assert max(np.asarray(line.get_xdata())) == 6


def test_one_round_has_one_whole_number_under_it(runs: list[Run]) -> None:
    one = [replace(run, log=run.log[:2]) for run in runs]
    axes = figures.learning_curves(one).axes[0]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [2.0]


def test_curves_of_a_regression_show_the_loss(runs: list[Run]) -> None:
    plain = [
        replace(run, log=tuple(replace(point, accuracy={}) for point in run.log)) for run in runs
    ]
    assert "mean test loss of the merged model, squared error" in texts(
        figures.learning_curves(plain)
    )


def test_nothing_logged_is_said(runs: list[Run]) -> None:
    empty = [replace(run, log=()) for run in runs]
    assert "nothing was logged" in texts(figures.learning_curves(empty))
    assert "nothing was logged" in texts(figures.gap_over_rounds(empty))


def test_the_log_scale_does_not_stretch_noise_around_zero(runs: list[Run]) -> None:
    axes = figures.gap_over_rounds(runs).axes[0]
    labels = [float(text.get_text().replace("−", "-")) for text in axes.get_yticklabels()]
    ticks = [abs(value) for value in labels if value]
    assert max(ticks) / min(ticks) <= 100


def test_the_gap_turns_logarithmic_only_when_it_is_wide(runs: list[Run]) -> None:
    assert figures.gap_over_rounds(runs).axes[0].get_yscale() == "symlog"
    assert figures.gap_over_rounds(of(runs, "fedavg")).axes[0].get_yscale() == "linear"


def test_many_methods_get_a_legend_instead_of_labels(runs: list[Run]) -> None:
    many = [replace(runs[0], method=f"m{i}") for i in range(30)]
    assert figures.learning_curves(many).axes[0].get_legend() is not None


def test_the_heat_map_shows_the_weights_in_the_order_of_its_names(runs: list[Run]) -> None:
    run = of(runs, "fedmerge")[0]
    figure = figures.weights_heatmap(run)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("block")]
    assert [axes.get_title(loc="left") for axes in panels] == ["block 0", "block 2"]
    names = [text.get_text() for text in panels[1].get_yticklabels()]
    at = {client.id: i for i, client in enumerate(run.clients)}
    assert run.weights is not None
    scale = np.ceil(run.weights.max() * 10) / 10
    for block, axes in enumerate(panels):
        drawn = np.asarray(axes.get_images()[0].get_array())[..., 3]
        np.testing.assert_allclose(drawn * scale, run.weights[[at[n] for n in names], block])
    assert {client.kind for client in run.clients} <= set(texts(figure))


def named(run: Run, names: Sequence[str], kinds: Sequence[str | None]) -> Run:
    """`run` whose clients have these names and kinds, over and over."""
    clients = tuple(
        replace(c, id=f"{names[i % len(names)]}{i}", kind=kinds[i % len(kinds)])
        for i, c in enumerate(run.clients)
    )
    return replace(run, last=replace(run.last, clients=clients))


@pytest.mark.parametrize("kinds", [[None], ["rot0+invert", "rot90"]])
def test_names_of_clients_are_whole_and_inside(
    runs: list[Run], kinds: Sequence[str | None]
) -> None:
    run = named(of(runs, "fedmerge")[0], ["Switzerland, east "], kinds)
    for figure in (figures.weights_heatmap(run), figures.importance_map(run)):
        assert {client.id for client in run.clients} <= set(texts(figure))
        figure.draw_without_rendering()
        ((left, _), (right, _)) = figure.bbox.get_points()
        for text in figure.findobj(matplotlib.text.Text):
            box = text.get_window_extent()
            assert not text.get_text() or (box.x0 >= left and box.x1 <= right), text.get_text()


def test_kinds_beyond_the_colours_are_coloured_by_family(runs: list[Run]) -> None:
    kinds = [f"teacher {i % 3} (0.{i})" for i in range(9)] + ["teacher 9 (x)", "teacher 9 (y)"]
    assert set(families(kinds).values()) == {f"teacher {i}" for i in (0, 1, 2, 9)}
    assert families(["a (1)", None, "a (2)"]) == {"a (1)": "a (1)", "a (2)": "a (2)"}
    figure = figures.weights_heatmap(named(of(runs, "fedmerge")[0], ["c"], kinds))
    strip = next(axes for axes in figure.axes if axes.patches)
    assert len({tuple(bar.get_facecolor()) for bar in strip.patches}) == 4
    assert set(kinds) <= set(texts(figure))  # the share can still be read


def test_the_key_of_worth_has_both_ends(runs: list[Run]) -> None:
    figure = figures.importance_map(of(runs, "fedmerge")[0])
    key = figure.axes[-1]
    low, zero, high = (text.get_text() for text in key.get_xticklabels())
    assert (low, zero) == (f"−{high}", "0")
    image = np.asarray(key.get_images()[0].get_array())[0]
    assert np.allclose(image[0, :3], to_rgb(PALETTE["purple"][0]))
    assert np.allclose(image[-1, :3], to_rgb(PALETTE["green"][0]))


def test_painted_colours_turn_into_those_of_the_dark_page() -> None:
    matrix = np.array(night().split(), dtype=float).reshape(4, 5)
    for name in ("accent", "green", "purple"):
        light, dark = (to_rgba(colour) for colour in PALETTE[name])
        np.testing.assert_allclose(matrix @ [*light, 1], dark, atol=2e-3)


def test_a_heat_map_of_many_clients_is_a_sample_and_says_so(runs: list[Run]) -> None:
    run = of(runs, "fedmerge")[0]
    assert run.weights is not None
    large = replace(
        run,
        last=replace(run.last, clients=run.clients * 10),
        weights=np.tile(run.weights, (10, 1, 1)),
    )
    assert any("160 of 320 clients" in text for text in texts(figures.weights_heatmap(large)))


def test_a_heat_map_needs_weights(runs: list[Run]) -> None:
    with pytest.raises(ConfigError, match=r'no merging weights .*method = "fedavg"'):
        figures.weights_heatmap(of(runs, "fedavg")[0])


def test_the_scatter_pairs_clients_by_id_and_seed_and_counts_sides(runs: list[Run]) -> None:
    ours, theirs = of(runs, "fedmerge"), of(runs, "fedavg")
    mine = [with_accuracies(ours[0], {"a": 0.9, "b": 0.5, "c": 0.7, "only": 1.0})]
    other = [
        with_accuracies(theirs[1], {"a": 1.0, "b": 1.0, "c": 1.0}),  # another seed: not paired
        with_accuracies(theirs[0], {"c": 0.7, "b": 0.6, "a": 0.3}),
    ]
    assert sorted(figures.client_pairs(mine, other)) == [(0.3, 0.9), (0.6, 0.5), (0.7, 0.7)]
    shown = texts(figures.client_scatter(mine, other))
    assert "better with fedmerge: 1 of 3 (clients × seeds)" in shown
    assert "better with fedavg: 1, equal: 1" in shown
    with pytest.raises(ConfigError, match="share no client"):
        figures.client_scatter(mine, other[:1])


def test_the_scatter_of_a_regression_is_of_losses_and_below_the_line_is_better(
    runs: list[Run],
) -> None:
    (ours, _), (theirs, _) = of(runs, "fedmerge"), of(runs, "fedavg")

    def with_losses(run: Run, losses: Mapping[str, float | None]) -> Run:
        clients = tuple(
            ClientResult(name, None, 1, 1, 1, {"merged": None}, {"merged": value})
            for name, value in losses.items()
        )
        return replace(run, last=replace(run.last, clients=clients))

    mine = [with_losses(ours, {"a": 0.5, "b": 2.0, "c": 4.0, "d": 1.0, "e": 1.0})]
    other = [with_losses(theirs, {"a": 1.0, "b": 3.0, "c": 3.0, "d": None, "e": 1.0})]
    assert figures.client_pairs(mine, other) == []
    wanted = [(1.0, 0.5), (3.0, 2.0), (3.0, 4.0), (1.0, 1.0)]
    assert figures.client_pairs(mine, other, "loss") == wanted  # d diverged
    figure = figures.client_scatter(mine, other, "loss")
    shown = texts(figure)
    assert "better with fedmerge: 2 of 4 (clients × seeds)" in shown
    assert "better with fedavg: 1, equal: 1" in shown
    assert "test loss, fedmerge" in shown
    low, high = figure.axes[0].get_ylim()
    assert low < 0.5
    assert high > 4
    drawn = {
        matplotlib.colors.to_hex(c.get_facecolor()[0]): sorted(map(tuple, c.get_offsets().tolist()))
        for c in figure.axes[0].collections
        if len(c.get_offsets())
    }
    assert drawn[PALETTE["accent"][0]] == [(1.0, 0.5), (3.0, 2.0)]  # where fedmerge is better
    assert drawn[PALETTE["blue"][0]] == [(3.0, 4.0)]


def test_dots_stand_at_the_mean(runs: list[Run]) -> None:
    axes = figures.method_dots(of(runs, "ditto")).axes[0]
    marks = [line for line in axes.get_lines() if len(np.asarray(line.get_xdata())) == 1]
    values = [run.last.models["merged"].accuracy for run in of(runs, "ditto")]
    assert [float(np.asarray(m.get_xdata())[0]) for m in marks] == [np.mean(values)]


def test_the_regret_picture_marks_the_largest_loss_and_its_setting(runs: list[Run]) -> None:
    (table,) = overviews(runs)
    lost = {regret.method: regret for regret in regrets(table)}
    figure = figures.regret_picture(list(lost.values()), "accuracy", method_styles(METHODS))
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == sorted(names, key=lambda name: lost[name].largest or 0.0)
    for row, name in enumerate(names):
        marks = [
            line for line in axes.get_lines() if np.asarray(line.get_ydata()).tolist() == [row]
        ]
        drawn = {float(np.asarray(line.get_xdata())[-1]) for line in marks}
        assert drawn == {lost[name].largest}
        where = " concept-mix" if lost[name].largest else ""
        assert f"{lost[name].largest:.3f}{where}" in texts(figure)


def test_the_rank_picture_joins_what_is_not_told_apart(runs: list[Run]) -> None:
    ranked = ranking(overviews(runs))
    figure = figures.rank_picture(ranked, method_styles(METHODS))
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(ranked.means)
    assert not any("critical" in text for text in texts(figure))  # one setting allows no test
    more = replace(ranked, settings=("a", "b"), difference=2.5)
    figure = figures.rank_picture(more, method_styles(METHODS))
    assert "critical difference 2.5" in texts(figure)
    bars = [
        np.asarray(line.get_ydata(), dtype=float).tolist()
        for line in figure.axes[0].get_lines()
        if line.get_linewidth() == 2
    ]
    # ranks 1 to 7: each bar spans three methods
    assert bars == [[i - 0.25, i + 2.25] for i in range(5)]


def test_differences_stand_at_their_means_and_are_filled_when_beyond_chance(
    runs: list[Run],
) -> None:
    fought = duels(runs, "fedmerge")
    axes = figures.duel_intervals(fought, "fedmerge").axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    by_name = {duel.rival: duel for duel in fought}
    assert names == sorted(names, key=lambda name: by_name[name].by_seed.mean)
    drawn = {}
    for marks in axes.collections:
        if marks.get_gid() in ("better", "worse", "open"):
            hollow = bool(np.allclose(marks.get_facecolor(), to_rgba(SURFACE)))
            drawn |= {names[int(y)]: (float(x), hollow) for x, y in marks.get_offsets()}
    assert drawn == {
        duel.rival: (duel.by_seed.mean, duel.verdict == "open") for duel in by_name.values()
    }
    low, high = axes.get_xlim()
    assert low < 0 < high


def test_an_interval_that_the_axis_cuts_ends_in_an_arrow(runs: list[Run]) -> None:
    fought = list(duels(runs, "fedmerge"))

    def arrows() -> list[str]:
        axes = figures.duel_intervals(fought, "fedmerge").axes[0]
        return [str(line.get_marker()) for line in axes.get_lines() if line.get_marker() in "<>"]

    assert arrows() == []
    wild = replace(fought[0].by_seed, low=-9.0)
    fought[0] = replace(fought[0], by_seed=wild)
    assert arrows() == ["<"]
    fought[0] = replace(fought[0], by_seed=replace(wild, high=9.0))
    assert arrows() == ["<", ">"]


def test_the_worth_of_models_is_drawn_in_the_order_of_the_weights(runs: list[Run]) -> None:
    run = of(runs, "fedmerge")[0]
    figure = figures.importance_map(run)
    panel = next(axes for axes in figure.axes if axes.get_yticklabels())
    names = [text.get_text() for text in panel.get_yticklabels()]
    by_id = {client.id: client.importance for client in run.clients}
    wanted = np.array([by_id[name] for name in names])
    drawn = np.asarray(panel.get_images()[0].get_array())[..., 3]
    scale = np.quantile(wanted, 0.98)
    np.testing.assert_allclose(drawn, np.clip(np.sqrt(wanted / scale), 0, 1))
    with pytest.raises(ConfigError, match="no merging weights"):
        figures.importance_map(of(runs, "fedavg")[0])


def test_svg_keeps_numbers_and_names_while_it_drops_bytes(runs: list[Run]) -> None:
    named = [replace(run, method=run.method.replace("ditto", "a z L 0.1234")) for run in runs]
    svg = to_svg(figures.learning_curves(named))
    assert ">a z L 0.1234</text>" in svg
    assert "font-family" not in svg
    assert "<g>" not in svg
    ET.fromstring(svg)
    (path,) = re.findall(r'<g data-method="0"><path d="([^"]*)"', svg)
    assert path.count("L") == 5  # rounds 2, 4, ..., 12


def test_the_data_split_stacks_counts_grouped_by_kind() -> None:
    rows = [
        LabelCounts("a", "x", [3, 0]),
        LabelCounts("b", "y", [1, 1]),
        LabelCounts("c", "x", [0, 2]),
    ]
    images = {"x": [np.zeros((8, 8))] * 6, "y": [np.zeros((8, 8, 3))]}
    figure = figures.data_split(rows, "digits", images=images)
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [3, 0, 1, 0, 2, 1]  # a, c, b; label 0 then 1
    assert [bar.get_x() for bar in bars[3:]] == [3, 0, 1]
    assert sum(len(axes.get_images()) for axes in figure.axes) == 4 + 1
    assert {"digits", "x", "y"} <= set(texts(figure))
    to_svg(figure)
    with pytest.raises(ConfigError, match="got 1 names, wanted one for each of 2"):
        figures.data_split(rows, "digits", labels=["zero"])
    with pytest.raises(ConfigError, match="no clients"):
        figures.data_split([], "digits")


# ---- looks


def test_each_method_keeps_its_look_and_differs_by_more_than_colour() -> None:
    styles = method_styles(METHODS)
    assert styles["fedmerge"].colour == PALETTE["accent"][0]
    assert method_styles(["fedavg", "fedmerge"])["fedmerge"].colour == PALETTE["accent"][0]
    rivals = [styles[name] for name in METHODS if name != "fedmerge"]
    assert len({style.marker for style in rivals}) == len(rivals)
    assert len({str(style.line) for style in rivals}) == len(rivals)
    assert PALETTE["accent"][0] not in {style.colour for style in rivals}
    many = method_styles([f"m{i}" for i in range(40)]).values()
    assert len({(style.colour, style.marker) for style in many}) == 40  # as in the tables


def test_named_methods_of_a_setting_share_no_colour(runs: list[Run]) -> None:
    names = ["fedmerge", *(f"m{i}" for i in range(20))]
    styles = method_styles(names)
    focus = ["fedmerge", "m3", "m10", "m0", "m7", "m14"]
    assert len({styles[name].colour for name in focus}) < len(focus)
    looks = apart(styles, focus)
    assert len({looks[name].colour for name in focus}) == len(focus)
    assert [looks[name].colour for name in ("fedmerge", "m3", "m0")] == [
        styles[name].colour for name in ("fedmerge", "m3", "m0")
    ]
    many = [replace(runs[0], method=name) for name in names]
    lines = figures.learning_curves(many, styles=styles, focus=focus).axes[0].get_lines()
    drawn = {line.get_label(): line.get_color() for line in lines if line.get_label() in focus}
    assert len(set(drawn.values())) == len(focus)


def linear(colour: str) -> Any:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


# What eyes without one kind of cone see, on linear RGB (Machado, Oliveira and Fernandes, 2009).
VISION = {
    "full": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red cone": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green cone": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
}


@pytest.mark.parametrize("theme", [0, 1])
def test_text_in_each_colour_can_be_read_on_its_page(theme: int) -> None:
    weights = [0.2126, 0.7152, 0.0722]
    ground = float(linear(("#fdfcf9", "#14171b")[theme]) @ weights)
    for name, colours in PALETTE.items():
        low, high = sorted((ground, float(linear(colours[theme]) @ weights)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("vision", VISION)
def test_colours_stay_apart_for_every_eye(theme: int, vision: str) -> None:
    def lab(colour: str) -> Any:
        seen = np.clip(np.array(VISION[vision]) @ linear(colour), 0, 1)
        to_xyz = [[0.4339, 0.3762, 0.19], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]]
        x, y, z = np.cbrt(np.array(to_xyz) @ seen)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    for (one, first), (other, second) in combinations(PALETTE.items(), 2):
        distance = np.linalg.norm(lab(first[theme]) - lab(second[theme]))
        assert distance > 8, (one, other)


def test_labels_are_spread_by_the_least_and_stay_inside() -> None:
    assert spread([0.2, 0.8], 0.1) == [0.2, 0.8]
    np.testing.assert_allclose(spread([0.5, 0.5], 0.1), [0.45, 0.55])
    np.testing.assert_allclose(spread([1.0, 0.99], 0.1), [1.0, 0.9])
    crowded = spread([0.3, 0.31, 0.1, 0.32, 0.9], 0.08)
    assert np.diff(sorted(crowded)).min() >= 0.08 - 1e-9
    assert np.argsort(crowded).tolist() == np.argsort([0.3, 0.31, 0.1, 0.32, 0.9]).tolist()


def test_clients_on_one_spot_are_moved_apart_a_little() -> None:
    spots = np.array([[100.0, 100.0]] * 20 + [[400.0, 300.0]])
    moved = separated(spots, 19)
    apart = np.sqrt(((moved[:, None] - moved[None]) ** 2).sum(2)) + np.eye(21) * 99
    assert apart.min() > 15
    assert np.abs(moved - spots).max() < 70
    np.testing.assert_allclose(moved[20], spots[20], atol=0.2)
    np.testing.assert_array_equal(moved, separated(spots, 19))
    corner = separated(np.array([[44.0, 44.0]] * 20), 19)
    assert corner.min() > 0


# ---- SVG


def test_svg_follows_the_page_and_repeats_to_the_byte(runs: list[Run]) -> None:
    svg = to_svg(figures.learning_curves(runs))
    assert svg == to_svg(figures.learning_curves(runs))
    assert "currentColor" in svg
    assert "var(--accent)" in svg
    assert INK not in svg
    assert SURFACE not in svg
    assert "<text" in svg  # text, not outlines
    assert "metadata" not in svg
    assert not re.search(r"fill: ?#fff", svg)  # nothing opaque behind the picture


def test_svg_writes_a_style_that_neighbours_share_once(runs: list[Run]) -> None:
    svg = to_svg(scatter_of(runs, [(i / 50, 0.99) for i in range(40)]))
    uses = re.findall(r"<use [^>]*>", svg)
    assert len(uses) == 40
    assert not any("style" in use for use in uses)
    assert "<style" not in svg  # it would hold for the whole page


def test_svg_is_named_and_its_ids_are_its_own(runs: list[Run]) -> None:
    one, two = to_svg(figures.learning_curves(runs)), to_svg(figures.gap_over_rounds(runs))
    root = ET.fromstring(one)
    assert "test accuracy" in root.attrib["aria-label"]
    assert root[0].tag.endswith("title")
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, own in zip((one, two), ids, strict=True):
        used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)
        assert {a or b for a, b in used} == own


def test_names_are_escaped_and_never_taken_for_formulas(runs: list[Run]) -> None:
    run = of(runs, "fedmerge")[0]
    names = ["<i>", "$x_1$", "$5", "a&b"]
    clients = tuple(
        replace(c, id=names[i % 4], kind=f"<k{i % 4}> $") for i, c in enumerate(run.clients)
    )
    named = replace(run, last=replace(run.last, clients=clients))
    svg = to_svg(figures.weights_heatmap(named), label='"<b>"')
    ET.fromstring(svg)
    assert "&lt;i&gt;" in svg
    assert "$x_1$" in svg
    assert "<i>" not in svg
    assert 'aria-label="&quot;&lt;b&gt;&quot;"' in svg


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_saved_files_repeat_to_the_byte(runs: list[Run], tmp_path: Path, ending: str) -> None:
    for name in ("a", "b"):
        figures.save(figures.method_dots(runs), tmp_path / f"{name}.{ending}")
    first, second = (tmp_path / f"{name}.{ending}" for name in ("a", "b"))
    assert first.stat().st_size > 1000
    assert first.read_bytes() == second.read_bytes()


def test_an_unknown_ending_is_an_error(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'got ending ".gif", wanted .png, .svg or .pdf'):
        figures.save(figures.method_dots(runs), tmp_path / "x.gif")


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_letters_that_the_font_lacks_are_not_warned_of_one_by_one(
    tmp_path: Path, ending: str
) -> None:
    rows = [LabelCounts("北京", "東京", [1, 1]), LabelCounts("서울", "東京", [1, 1])]
    figure = figures.data_split(rows, "上海")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.save(figure, tmp_path / f"a.{ending}")
        assert "上海" in to_svg(figure)


def test_other_warnings_are_seen_while_drawing() -> None:
    for text in ("Glyph", "missing from font(s) DejaVu Sans", "Tight layout not applied"):
        with pytest.warns(UserWarning, match=re.escape(text)), drawing():
            warnings.warn(text, stacklevel=1)


def test_settings_of_matplotlib_are_left_as_they_were(runs: list[Run]) -> None:
    before = dict(matplotlib.rcParams)
    to_svg(figures.method_dots(runs))
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_extra_is_named(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"fedmerge\[report\]"):
        figures.learning_curves(runs)


def diverged(run: Run, after: int) -> Run:
    """The run with losses and gaps that are not finite after a round."""
    log = tuple(
        replace(p, loss=dict.fromkeys(p.loss, np.nan), gap_test=None) if p.round > after else p
        for p in run.log
    )
    return replace(run, log=log)


def drawn(figure: Any, method: str) -> Any:
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == method]
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata(), dtype=float)


def test_a_method_that_diverged_is_drawn_over_the_seeds_it_has_and_named(runs: list[Run]) -> None:
    plain = [
        replace(run, log=tuple(replace(p, accuracy={}) for p in run.log))
        for run in of(runs, "fedavg")
    ]
    figure = figures.learning_curves([plain[0], diverged(plain[1], 4)])
    rounds, values = drawn(figure, "fedavg")
    assert rounds == [2, 4, 6, 8, 10, 12]
    np.testing.assert_allclose(values, [p.loss["merged"] for p in plain[0].log if p.loss])
    assert "seeds that diverged: fedavg 1 of 2" in texts(figure)
    figure = figures.learning_curves([diverged(plain[0], 6), diverged(plain[1], 4)])
    assert drawn(figure, "fedavg")[0] == [2, 4]
    figure = figures.learning_curves([diverged(plain[0], 6), diverged(plain[1], 0)])
    assert drawn(figure, "fedavg")[0] == [2, 4, 6]
    # What goes through the roof before it is lost must not press all others flat.
    calm = [replace(run, method="calm") for run in plain]
    rising = [diverged(run, 8) for run in plain]
    rising = [
        replace(
            run,
            log=tuple(replace(p, loss={"merged": 1e5}) if p.round == 8 else p for p in run.log),
        )
        for run in rising
    ]
    assert drawn(figures.learning_curves(rising), "fedavg")[0] == [2, 4, 6, 8]
    assert drawn(figures.learning_curves([*rising, *calm]), "fedavg")[0] == [2, 4, 6]
    figure = figures.gap_over_rounds([plain[0], diverged(plain[1], 4)])
    assert drawn(figure, "fedavg")[0] == [2, 4, 6, 8, 10, 12]
    assert "seeds that diverged: fedavg 1 of 2" in texts(figure)


def test_a_method_that_diverged_has_its_regret_at_the_edge(runs: list[Run]) -> None:
    lost = [
        replace(regret, losses={"concept-mix": np.inf}) if regret.method == "local" else regret
        for regret in regrets(overviews(runs)[0])
    ]
    figure = figures.regret_picture(lost, "accuracy", method_styles(METHODS))
    assert "diverged in concept-mix" in texts(figure)
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names[-1] == "local"
    assert np.isfinite(figure.axes[0].get_xlim()).all()


def test_the_methods_picture_says_who_diverged(runs: list[Run]) -> None:
    first, second = of(runs, "ditto")
    scores = replace(second.last.models["merged"], loss=np.nan)
    lost = replace(second, last=replace(second.last, models={"merged": scores}))
    assert "diverged on 1 of 2" in texts(figures.method_dots([first, lost], metric="loss"))
    assert "diverged on 1 of 2" not in texts(figures.method_dots([first, second], metric="loss"))


def test_few_clients_without_kinds_are_named_on_the_map() -> None:
    point = {"x": 10.0, "y": 20.0, "name": "north", "letter": "", "colour": "var(--rule)"}
    found = {"size": (520, 360), "radius": 9.0, "kinds": [], "share": 0.5, "points": [point] * 16}
    assert texts(figures.map_picture(found, "map")).count("north") == 16
    close = [
        {**point, "x": 390.0 + 40 * i, "y": 200.0 + 9 * i, "name": f"sex {i} younger"}
        for i in range(3)
    ]
    figure = figures.map_picture({**found, "points": close}, "map")
    axes = figure.axes[0]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("sex")]
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(box.x1 < axes.get_window_extent().x1 for box in boxes)
    found = {**found, "points": [point] * 17}
    assert "north" not in texts(figures.map_picture(found, "map"))
