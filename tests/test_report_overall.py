"""Regret, ranks and duels over all settings, and the sentences that sum them up."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from fedmerge.report.findings import findings
from fedmerge.report.overall import duels, overviews, ranking, regrets
from fedmerge.report.runs import ClientResult, Evaluation, Run, Scores
from fedmerge.report.totals import totals
from test_report_tables import LOST, WON, make

THREE = {
    "a": {"fedmerge": [0.90, 0.92], "ditto": [0.80, 0.81], "local": [0.70, 0.71]},
    "b": {"fedmerge": [0.80, 0.82], "ditto": [0.83, 0.84], "local": [0.50, 0.52]},
    "c": {"fedmerge": [0.60, 0.62], "ditto": [0.61, 0.63], "local": [0.64, 0.66]},
}


def with_clients(run: Run, values: list[float]) -> Run:
    clients = tuple(
        ClientResult(f"c{i}", None, 1, 1, 1, {"merged": value}, {"merged": 1.0})
        for i, value in enumerate(values)
    )
    return replace(run, last=replace(run.last, clients=clients))


def test_regret_is_the_largest_loss_to_the_best_and_says_where() -> None:
    (table,) = overviews(make(THREE))
    ours, ditto, local = regrets(table)
    assert ours.losses == pytest.approx({"a": 0.0, "b": 0.025, "c": 0.04})
    assert (ours.largest, ours.where) == (pytest.approx(0.04), "c")
    assert ours.mean == pytest.approx(0.065 / 3)
    assert (ditto.largest, ditto.where) == (pytest.approx(0.105), "a")
    assert (local.largest, local.where) == (pytest.approx(0.325), "b")


def test_what_is_one_training_with_fedmerge_is_no_regret_of_it() -> None:
    values = {"a": {"fedmerge": [0.7], "fedmerge-ft": [0.9], "fedmerge:d=4": [0.75], "x": [0.8]}}
    (table,) = overviews(make(values))
    lost = {regret.method: regret.largest for regret in regrets(table)}
    assert lost == {
        "fedmerge": pytest.approx(0.1),
        "fedmerge-ft": 0.0,
        "fedmerge:d=4": pytest.approx(0.15),
        "x": pytest.approx(0.1),
    }


def test_regret_of_a_loss_counts_upwards_and_a_missing_setting_is_named() -> None:
    values = {"a": {"x": [None], "y": [None]}, "b": {"x": [None]}}
    loss = {"a": {"x": [0.5], "y": [0.7]}, "b": {"x": [0.1]}}
    (table,) = overviews(make(values, loss))
    x, y = regrets(table)
    assert x.losses == {"a": 0.0, "b": 0.0}
    assert y.losses == pytest.approx({"a": 0.2})
    assert y.missing == ("b",)
    (table,) = overviews(make({"a": {"x": [math.nan], "y": [0.5]}}))
    assert (regrets(table)[0].largest, regrets(table)[0].missing) == (math.inf, ())


def test_average_ranks_cover_settings_of_either_metric() -> None:
    values = {**THREE, "r": {name: [None, None] for name in THREE["a"]}}
    ones = {name: [1.0, 1.0] for name in THREE["a"]}
    loss = dict.fromkeys(THREE, ones) | {
        "r": {"fedmerge": [0.2, 0.2], "ditto": [0.1, 0.1], "local": [0.3, 0.3]}
    }
    ranked = ranking(overviews(make(values, loss)))
    # fedmerge 1 2 3 2, ditto 2 1 2 1, local 3 3 1 3
    assert ranked.means == {"ditto": 1.5, "fedmerge": 2.0, "local": 2.5}
    assert list(ranked.means) == ["ditto", "fedmerge", "local"]
    assert ranked.settings == ("a", "b", "c", "r")
    assert ranked.p is not None
    assert ranked.difference == pytest.approx(2.343 * math.sqrt(12 / 24), abs=1e-3)


def test_a_method_with_few_settings_does_not_take_those_of_all_others() -> None:
    values = {**THREE, "a": {**THREE["a"], "late": [0.5, 0.5]}}
    ranked = ranking(overviews(make(values)))
    assert ranked.left_out == ("late",)
    assert ranked.settings == ("a", "b", "c")
    assert ranking([]).means == {}


def test_duels_pair_seeds_and_clients_and_are_corrected_within_a_setting() -> None:
    values = {
        "s": {
            "fedmerge": [0.90, 0.92, 0.94],
            "ditto": [0.885, 0.90, 0.93],
            "local": [0.5, 0.52, 0.56],
        }
    }
    runs = [
        with_clients(run, [run.last.models["merged"].accuracy - 0.1, 0.7, 0.9])
        for run in make(values)
    ]
    ditto, local = duels(runs, "fedmerge")
    gaps = np.array([0.015, 0.02, 0.01])
    p = [
        float(stats.ttest_1samp(gaps, 0).pvalue),
        float(stats.ttest_1samp([0.4, 0.4, 0.38], 0).pvalue),
    ]
    assert ditto.by_seed.mean == pytest.approx(gaps.mean())
    assert ditto.by_client.mean == pytest.approx(gaps.mean() / 3)  # two of three clients are alike
    assert ditto.p == pytest.approx(max(p[0], 2 * p[1]))
    assert local.p == pytest.approx(2 * p[1])
    assert (ditto.verdict, local.verdict) == ("better", "better")
    other = duels(runs, "local")
    assert [(duel.rival, duel.verdict) for duel in other] == [
        ("fedmerge", "worse"),
        ("ditto", "worse"),
    ]
    alone = duels(make({"s": {"fedmerge": [0.9], "ditto": [0.5]}}), "fedmerge")
    assert (alone[0].p, alone[0].verdict) == (None, "open")


def test_the_sum_says_regret_rank_and_losses_as_plainly_as_wins() -> None:
    found = totals(make({"a": WON, "b": LOST, "c": WON}))
    regret, rank, fought = found.sentences
    assert regret == (
        "FedMerge's regret, the most accuracy lost to the best of a setting, is 0.395 "
        "(in b), 0.132 on average; the next is local with 0.390 (in a)."
    ) or regret.endswith("1 method with less: local 0.390.")
    assert rank == (
        "Its average rank is 1.3 over 3 settings, the best of 2 methods; next is local with 1.7."
    )
    assert fought.startswith("Against each other method in each setting (3 comparisons), FedMerge")
    assert "worse than local in b (0.395)" in fought
    assert [figure.value for figure in found.figures] == ["0.395", "1.3"]


def test_the_fine_tuned_form_is_no_rival_of_the_same_training() -> None:
    twins = {"fedmerge": WON["fedmerge"], "fedmerge-ft": LOST["local"], **WON}
    for first, other in (("fedmerge", "fedmerge-ft"), ("fedmerge-ft", "fedmerge")):
        values = {name: twins[name] for name in (first, other, "local")}
        found = totals(make({"a": values, "b": values}))
        assert found.subject == first
        assert [duel.rival for duel in found.duels] == ["local", "local"]
        said = f"Against each other method but {other} in each setting (2 comparisons), "
        assert found.sentences[-1].startswith(said)
    # What is no rival is named only where it is there.
    assert " but " not in totals(make({"a": WON})).sentences[-1]


def test_a_method_with_less_regret_is_named() -> None:
    found = totals(make(THREE))
    assert "; the next is ditto with 0.105 (in a)." in found.sentences[0]
    behind = {**THREE, "d": {"fedmerge": [0.1, 0.2], "ditto": [0.8, 0.81], "local": [0.8, 0.7]}}
    text = totals(make(behind)).sentences[0]
    assert "; 2 methods with less: ditto 0.105, local 0.325." in text


def test_a_list_that_is_cut_short_ends_once() -> None:
    behind = {f"m{i}": [0.8, 0.8] for i in range(5)} | {"fedmerge": [0.1, 0.2]}
    text = totals(make({"a": behind})).sentences[0]
    assert text.endswith("m0 0.000, m1 0.000, m2 0.000, …")


def test_shares_of_clients_are_means_over_settings_and_name_the_worst() -> None:
    runs = []
    for run in make(THREE):
        share = {"a": 0.9, "b": 0.6, "c": 0.3}[run.setting]
        scores = replace(
            run.last.models["merged"], better_than_local=share, better_than_fedavg=None
        )
        runs.append(replace(run, last=replace(run.last, models={"merged": scores})))
    found = totals(runs)
    assert (
        "Of FedMerge's clients, 60% are strictly better off than with local training (30% in c)."
        in found.sentences
    )
    assert "60%" in [figure.value for figure in found.figures]


def test_one_seed_and_no_rival_claim_nothing() -> None:
    found = totals(make({"a": {"fedmerge": [0.9], "local": [0.5]}}))
    assert found.sentences[-1] == (
        "With one seed no difference between methods can be shown to be beyond chance."
    )
    assert totals(make({"a": {"fedmerge": [0.9]}})).sentences == ()
    assert totals(make({"a": {"local": [0.9], "fedavg": [0.8]}})).subject is None


def test_the_best_round_is_summed_up_apart() -> None:
    runs = [
        replace(run, best=Evaluation(2, {"merged": Scores(0.5, 0.0, 0.5, 1.0)}))
        for run in make(THREE)
    ]
    (table,) = overviews(runs, at="best")
    assert [regret.largest for regret in regrets(table)] == [0.0, 0.0, 0.0]


def test_a_method_that_diverged_ranks_last_and_has_no_bound_on_its_regret() -> None:
    values = {**THREE, "d": {"fedmerge": [0.7, 0.7], "ditto": [0.9, math.nan], "local": [0.1, 0.1]}}
    runs = make(values)
    ranked = ranking(overviews(runs))
    # fedmerge 1 2 3 1, ditto 2 1 2 3, local 3 3 1 2
    assert ranked.means == {"fedmerge": 1.75, "ditto": 2.0, "local": 2.25}
    (table,) = overviews(runs)
    lost = {regret.method: regret for regret in regrets(table)}
    assert (lost["ditto"].largest, lost["ditto"].where) == (math.inf, "d")
    found = totals(make({"a": {"fedmerge": [0.5], "local": [math.inf]}}))
    assert found.sentences[0].endswith("; every other method diverged in some setting.")
    found = totals(make({**values, "e": {"fedmerge": [math.nan], "local": [0.5]}}))
    assert found.sentences[0].startswith("FedMerge diverged in e, so its regret in accuracy has no")


def test_a_duel_with_a_method_that_diverged_is_shown_on_the_other_seeds_and_not_tested() -> None:
    values = {
        "s": {"fedmerge": [0.9, 0.92, 0.91], "ditto": [0.1, 0.2, math.nan], "local": [0.1, 0.2, 0]}
    }
    ditto, local = duels(make(values), "fedmerge")
    assert (ditto.by_seed.mean, ditto.by_seed.n) == (pytest.approx(0.76), 2)
    assert (ditto.p, ditto.verdict, local.verdict) == (None, "open", "better")
    assert "; 1 more could not be tested" in totals(make(values)).sentences[-1]


def test_a_shared_first_place_is_no_win() -> None:
    found = totals(make({"a": WON, "b": LOST}))
    assert found.sentences[1] == (
        "Its average rank is 1.5 over 2 settings, the best of 2 methods together with local."
    )


def test_ranks_that_differ_are_not_printed_alike() -> None:
    many = {f"w{i}": WON for i in range(26)} | {f"l{i}": LOST for i in range(25)}
    assert (
        "is 1.49 over 51 settings, the best of 2 methods; next is local with 1.51"
        in (totals(make(many)).sentences[1])
    )


def test_there_is_one_verdict_on_fedmerge_and_another_method_wherever_it_is_told() -> None:
    rng = np.random.default_rng(3)
    names = ("fedmerge", "fedmerge-ft", "ditto", "local", "ifca", "apfl")
    values = {
        f"s{i}": {
            name: list(map(float, 0.8 + 0.03 * rng.normal() + 0.015 * rng.normal(size=4)))
            for name in names
        }
        for i in range(60)
    }
    runs = make(values)
    (table,) = overviews(runs)
    fought = {
        (d.setting, d.rival): d
        for d in duels([run for run in runs if run.method != "fedmerge-ft"], "fedmerge")
    }
    said = findings(runs)
    seen = {"best": 0, "tied": 0, "worse": 0, "twin": 0}
    for setting in table.settings:
        best = table.best(setting)
        assert best is not None
        if best == "fedmerge":
            seen["best"] += 1
            for rival in names[2:]:
                duel = fought[setting, rival]
                assert table.entries[rival, setting].p == pytest.approx(duel.p)
                assert table.entries[rival, setting].tied == (duel.verdict != "better")
        elif best == "fedmerge-ft":
            seen["twin"] += 1
        else:
            duel, ours = fought[setting, best], table.entries["fedmerge", setting]
            assert ours.p == pytest.approx(duel.p)
            assert ours.tied == (duel.verdict != "worse")
            seen["tied" if ours.tied else "worse"] += 1
            doubted = "within the noise" in said.by_setting[setting]
            assert doubted == ours.tied
            assert ours.tied or "beyond chance" in said.by_setting[setting]
    assert min(seen.values()) > 2, seen


def test_the_same_training_is_not_among_those_with_less_regret() -> None:
    values = {
        "a": {"fedmerge": [0.7, 0.8], "fedmerge-ft": [0.75, 0.85], "local": [0.78, 0.80]},
        "b": {"fedmerge": [0.9, 0.9], "fedmerge-ft": [0.9, 0.9], "local": [0.89, 0.89]},
    }
    said = totals(make(values)).sentences[0]
    assert "1 method with less: local" in said
