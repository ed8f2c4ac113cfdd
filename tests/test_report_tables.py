"""The comparison and its marks, and the sentences made from them.

Nothing is drawn here; pictures and the page have tests of their own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from rich.console import Console
from scipy import stats

from fedmerge.errors import ConfigError
from fedmerge.report.ranking import behind_by_seed, judge
from fedmerge.report.runs import Evaluation, Run, Scores, is_fedmerge
from fedmerge.report.tables import (
    Findings,
    comparison,
    entry_text,
    findings,
    models_text,
    print_table,
    size_text,
    to_markdown,
)

Values = Mapping[str, Mapping[str, Sequence[float | None]]]


def make(values: Values, loss: Values | None = None) -> list[Run]:
    """Runs with these merged accuracies by setting, method and seed; loss 1 unless given."""
    return [
        Run(
            folder="",
            setting=setting,
            data="digits",
            method=method,
            seed=seed,
            rounds=1,
            seconds=1.0,
            last=Evaluation(
                1,
                {"merged": Scores(value, 0.0, value, loss[setting][method][seed] if loss else 1.0)},
            ),
            gap_train=None,
            gap_test=0.1,
            bytes_up=1000.0,
            bytes_down=1000.0,
        )
        for setting, column in values.items()
        for method, seeds in column.items()
        for seed, value in enumerate(seeds)
    ]


def said(values: Values, loss: Values | None = None) -> Findings:
    return findings(make(values, loss))


# ---- the comparison


@pytest.mark.parametrize(
    ("method", "ours"),
    [("fedmerge", True), ("fedmerge:d=8", True), ("fedmerge-paper", True), ("fedavg-ft", False)],
)
def test_fedmerge_is_known_in_its_variants(method: str, ours: bool) -> None:
    assert is_fedmerge(method) is ours


def test_means_deviations_and_marks_agree_with_hand_and_scipy() -> None:
    ours, close, far = [0.90, 0.92, 0.94], [0.89, 0.93, 0.925], [0.70, 0.73, 0.735]
    runs = make({"domain": {"fedmerge": ours, "ditto": close, "local": far}})
    table = comparison(runs)
    best, tied, worse = (table.entries[name, "domain"] for name in table.methods)
    assert best.mean == pytest.approx(0.92)
    assert best.std == pytest.approx(0.02)  # sample deviation: sqrt((0.02^2 + 0.02^2) / 2)
    assert (best.best, best.tied, best.n) == (True, False, 3)
    assert (tied.best, tied.tied, tied.shared) == (False, True, 3)
    # Two tests: Holm doubles the smaller p and leaves the larger.
    assert tied.p == pytest.approx(float(stats.ttest_rel(ours, close).pvalue))
    assert (worse.best, worse.tied, worse.near) == (False, False, False)
    assert worse.p == pytest.approx(2 * float(stats.ttest_rel(ours, far).pvalue))
    assert worse.p is not None
    assert worse.p < 0.05
    assert worse.behind is not None
    wanted = stats.ttest_rel(ours, far).confidence_interval(0.95)
    assert (worse.behind.low, worse.behind.high) == pytest.approx((wanted.low, wanted.high))


def test_a_correction_for_many_methods_can_undo_a_difference() -> None:
    ours, rival = [0.90, 0.92, 0.94], [0.88, 0.895, 0.925]
    p = float(stats.ttest_rel(ours, rival).pvalue)
    assert 0.01 < p < 0.05
    alone = comparison(make({"s": {"fedmerge": ours, "ditto": rival}}))
    assert not alone.entries["ditto", "s"].tied
    others = {f"m{i}": [0.7, 0.75, 0.9] for i in range(5)}
    crowd = comparison(make({"s": {"fedmerge": ours, "ditto": rival, **others}}))
    assert crowd.entries["ditto", "s"].tied
    assert crowd.entries["ditto", "s"].p == pytest.approx(6 * p)


def test_what_is_shown_to_be_near_the_best_is_marked_apart_from_what_is_not_told_apart() -> None:
    best = [0.900, 0.910, 0.920, 0.930]
    values = {
        "fedmerge": best,
        "close": [0.898, 0.909, 0.917, 0.928],  # about 0.002 behind, each time
        "wild": [0.80, 0.98, 0.85, 0.99],  # 0.01 behind on average, by luck
    }
    table = comparison(make({"s": values}))
    close, wild = (table.entries[name, "s"] for name in ("close", "wild"))
    assert (close.near, wild.near, wild.tied) == (True, False, True)


def test_the_best_round_has_a_table_of_its_own() -> None:
    (run,) = make({"s": {"fedmerge": [0.5]}})
    run = replace(run, best=Evaluation(3, {"merged": Scores(0.7, 0.0, 0.6, 1.0)}))
    table = comparison([run], at="best")
    assert table.entries["fedmerge", "s"].mean == 0.7
    assert table.title == "Test accuracy, merged model, best round"
    with pytest.raises(ConfigError, match='did you mean "best"'):
        comparison([run], at="bes")


def test_lower_is_better_for_loss_and_a_cost_has_no_best() -> None:
    values = {"domain": {"fedmerge": [0.9, 0.8], "local": [0.5, 0.7]}}
    loss = {"domain": {"fedmerge": [0.5, 0.6], "local": [0.1, 0.3]}}
    table = comparison(make(values, loss), metric="loss")
    assert table.best("domain") == "local"
    for metric in ("bytes_up", "seconds", "gap_test"):
        table = comparison(make(values), metric=metric)
        assert table.best("domain") is None
        assert not any(entry.tied for entry in table.entries.values())
        assert "Nothing is marked" in table.note


@pytest.mark.parametrize(
    ("values", "best", "tied", "tested"),
    [
        ([0.8, 0.7, 0.6], [0.9, 0.8, 0.7], False, False),  # always 0.1 behind: no variance, worse
        ([0.8, 0.7], [0.8, 0.7], True, False),  # equal
        ([0.8], [0.9], False, False),  # one seed tests nothing
        ([0.9], [0.9], True, False),
        ([0.8, 0.9], [0.9, 0.85], True, True),
    ],
)
def test_the_test_against_the_best(
    values: list[float], best: list[float], tied: bool, tested: bool
) -> None:
    gap = behind_by_seed(dict(enumerate(values)), dict(enumerate(best)))
    got, _, p = judge({"m": gap})["m"]
    assert got is tied
    assert (p is not None) is tested


def test_only_seeds_that_both_have_are_paired() -> None:
    gap = behind_by_seed({0: 0.5, 1: 0.6, 9: 0.0}, {0: 0.52, 1: 0.7, 5: 1.0})
    tied, _, p = judge({"m": gap})["m"]
    assert p == pytest.approx(float(stats.ttest_rel([0.5, 0.6], [0.52, 0.7]).pvalue))
    assert tied
    assert judge({"m": behind_by_seed({0: 0.5}, {1: 0.6})}) == {"m": (False, False, None)}


def test_a_method_that_leads_on_the_seeds_it_shares_with_the_best_is_not_worse() -> None:
    # The best mean comes from a seed of its own; on the three in common it is behind, for sure.
    gap = behind_by_seed({0: 0.80, 1: 0.81, 2: 0.82}, {0: 0.70, 1: 0.712, 2: 0.721, 3: 1.9})
    assert gap.p is not None
    assert gap.p < 0.01
    assert judge({"m": gap})["m"][0]


def test_of_equal_means_one_is_best_whatever_the_order_and_the_others_tied() -> None:
    for names in (("local", "fedmerge"), ("fedmerge", "local")):
        table = comparison(make({"s": {name: [0.5, 0.6] for name in names}}))
        assert table.best("s") == "fedmerge"
        assert table.entries["local", "s"].tied
    table = comparison(make({"s": {name: [0.5, 0.6] for name in ("ditto", "local")}}))
    assert table.best("s") == "ditto"
    assert table.entries["local", "s"].tied


def test_a_missing_pair_and_a_diverged_run_are_never_best() -> None:
    runs = make({"a": {"fedmerge": [math.nan, 0.9], "local": [0.1, 0.2]}, "b": {"local": [0.3]}})
    table = comparison(runs)
    assert table.best("a") == "local"
    assert entry_text("accuracy", table.entries["fedmerge", "a"]) == "diverged on 1 of 2 seeds"
    assert table.entries["fedmerge", "b"].n == 0
    assert entry_text("accuracy", table.entries["fedmerge", "b"]) == "–"


def test_a_run_that_diverged_has_no_gap_to_average() -> None:
    values: Values = {"a": {"local": [None, None]}}
    runs = make(values, {"a": {"local": [0.5, math.nan]}})
    runs[1] = replace(runs[1], gap_test=None)
    entry = comparison(runs, metric="gap_test").entries["local", "a"]
    assert entry_text("gap_test", entry) == "diverged on 1 of 2 seeds"


def test_the_note_says_the_test_and_its_limits() -> None:
    three = comparison(make({"s": {"a": [0.1] * 3, "b": [0.2] * 3}})).note
    assert "paired t-test" in three
    assert "With only 3 seeds such a test can hardly show a difference" in three
    one = comparison(make({"s": {"a": [0.1], "b": [0.2]}})).note
    assert "One seed allows no test" in one
    assert "~" not in one
    mixed = comparison(make({"s": {"a": [0.1], "b": [0.2, 0.3]}})).note
    assert "Where a method has one seed alone, its difference" in mixed
    ten = comparison(make({"s": {"a": [0.1] * 10, "b": [0.2] * 10}})).note
    assert "hardly" not in ten


def test_an_unknown_metric_or_model_is_an_error_with_a_hint() -> None:
    with pytest.raises(ConfigError, match='did you mean "accuracy"'):
        comparison([], metric="acuracy")
    with pytest.raises(ConfigError, match='did you mean "merged"'):
        comparison([], model="merge")


# ---- in print


def test_the_printed_table_bears_marks_and_legend() -> None:
    runs = make({"[red]s": {"fedmerge": [0.9, 0.92], "ditto": [0.89, 0.925], "x": [0.1, 0.1]}})
    console = Console(width=100, record=True, force_terminal=True, file=io.StringIO())
    print_table(comparison(runs), console)
    ansi = console.export_text(styles=True, clear=False)
    text = console.export_text()
    assert "0.910 ± 0.014 *" in text, text
    assert "0.907 ± 0.025 ~" in text
    assert "[red]s" in text  # a name is not markup
    assert "merged model" in text
    assert "paired t-test" in text
    assert "\x1b[1m0.910 ± 0.014 *" in ansi


def test_markdown_has_rows_marks_and_escaped_names() -> None:
    runs = make({"a|b": {"fedmerge": [0.9, 0.92], "ditto": [0.89, 0.925]}})
    text = to_markdown(comparison(runs))
    assert "| method | a\\|b |\n| --- | ---: |\n" in text
    assert "| fedmerge | **0.910 ± 0.014** \\* |" in text
    assert "| ditto | 0.907 ± 0.025 \\~ |" in text


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (16840, "16.8 kB"), (999_960, "1.0 MB"), (2.5e9, "2.5 GB")],
)
def test_sizes_are_readable(n: float, text: str) -> None:
    assert size_text(n) == text


# ---- sentences


def test_best_in_some_settings_names_the_lead_and_the_losses() -> None:
    found = said(
        {
            "mix": {"fedmerge": [0.9, 0.91], "ifca": [0.84, 0.84], "local": [0.5, 0.5]},
            "domain": {"fedmerge": [0.889, 0.890], "ditto": [0.901, 0.9021], "local": [0.5, 0.5]},
            "other": {"fedmerge": [0.80, 0.84], "ditto": [0.84, 0.81], "local": [0.5, 0.5]},
        }
    )
    assert found.headline == (
        "FedMerge had the best merged-model accuracy in 1 of 3 settings; in 1 more it could not be "
        f"told from the best and in 1 it was behind beyond chance; its lead was 0.065 over ifca in "
        f"mix.{FEW}"
    )
    assert found.not_won[0].startswith("In domain, ditto was ahead by 0.01")
    assert (
        "a difference beyond chance (paired t-test over 2 seeds, corrected p = " in found.not_won[0]
    )
    assert found.not_won[1] == (
        "In other, ditto was ahead by 0.005 (0.825 against 0.820), within the noise of 2 seeds."
    )
    assert len(found.not_won) == 2
    assert found.by_setting["mix"].startswith(
        "In mix, FedMerge was ahead of ifca by 0.065 (0.905 against 0.840), "
    )


FEW = " With 2 seeds only large differences can be told from chance."
WON = {"fedmerge": [0.9, 0.95], "local": [0.5, 0.57]}
LOST = {"fedmerge": [0.50, 0.56], "local": [0.9, 0.95]}
NEAR = {"fedmerge": [0.5, 0.6], "local": [0.61, 0.5]}


@pytest.mark.parametrize(
    ("values", "headline"),
    [
        (
            {"a": WON},
            "FedMerge had the best merged-model accuracy in a, with a lead of 0.390 over local.",
        ),
        (
            {"a": WON, "b": WON},
            "FedMerge had the best merged-model accuracy in both settings; "
            "its largest lead was 0.390 over local in a.",
        ),
        (
            {"a": WON, "b": WON, "c": WON},
            "FedMerge had the best merged-model accuracy in all 3 settings; "
            "its largest lead was 0.390 over local in a.",
        ),
        (
            {"a": WON, "b": LOST},
            "FedMerge had the best merged-model accuracy in 1 of 2 settings; "
            "in 1 it was behind beyond chance; its lead was 0.390 over local in a.",
        ),
        (
            {"a": LOST},
            "FedMerge did not have the best merged-model accuracy in a: it was number 2 of 2, "
            "behind the best beyond chance.",
        ),
        (
            {"a": LOST, "b": LOST},
            "FedMerge did not have the best merged-model accuracy in any of the 2 settings; "
            "in all it was behind beyond chance.",
        ),
        (
            {"a": NEAR},
            "FedMerge did not have the best merged-model accuracy in a: it was number 2 of 2, "
            "but could not be told from the best.",
        ),
        (
            {"a": NEAR, "b": LOST},
            "FedMerge did not have the best merged-model accuracy in any of the 2 settings; "
            "in 1 it could not be told from the best and in 1 it was behind beyond chance.",
        ),
        (
            {"a": NEAR, "b": NEAR},
            "FedMerge did not have the best merged-model accuracy in any of the 2 settings; "
            "in all it could not be told from the best.",
        ),
        (
            {"a": {"fedmerge": [0.5, 0.5], "local": [0.5, 0.5]}},
            "FedMerge had the best merged-model accuracy in a, level with local to three decimals.",
        ),
        (
            {"a": {"fedmerge": [0.5]}},
            "FedMerge reached a merged-model accuracy of 0.500 in a; "
            "there is no other method to judge it by.",
        ),
        (
            {"a": {"fedmerge": [0.5]}, "b": {"fedmerge": [0.7]}},
            "FedMerge reached a merged-model accuracy of 0.500 to 0.700 over 2 settings; "
            "there is no other method to judge it by.",
        ),
        (
            {"a": {"fedavg": [0.5], "local": [0.6]}, "b": {"fedavg": [0.5], "local": [0.3]}},
            "FedMerge is not among these runs; "
            "the best merged-model accuracy was that of local in a and fedavg in b.",
        ),
        ({"a": {"local": [0.5]}}, "FedMerge is not among these runs, which hold only local."),
        (
            {str(i): {"local": [0.5], "ditto": [0.6 - 0.15 * (i > 3)]} for i in range(5)},
            "FedMerge is not among these runs; the best merged-model accuracy was that of ditto in "
            "4 of 5 settings and local in 1.",
        ),
        ({}, ""),
    ],
)
def test_the_headline_in_every_case(values: Values, headline: str) -> None:
    if not values:
        assert findings([]).by_setting == {}
        return
    judged = "no other method" not in headline and "not among" not in headline
    assert said(values).headline == headline + (FEW if judged else "")


def test_one_seed_claims_nothing_of_chance() -> None:
    found = said({"a": {"fedmerge": [0.5], "local": [0.6]}})
    assert found.not_won == (
        "In a, local was ahead by 0.100 (0.600 against 0.500), "
        "on one seed, which cannot rule out chance.",
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "end"),
    [
        ([0.61, 0.5], [0.5, 0.6], f"0.005 over local, within the noise of 2 seeds.{FEW}"),
        ([0.6], [0.5], "0.100 over local. One seed cannot tell a difference from chance."),
        ([0.7, 0.71, 0.72, 0.73, 0.71, 0.72], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "0.215 over local."),
    ],
)
def test_a_headline_does_not_hide_that_its_lead_may_be_chance(
    ours: list[float], theirs: list[float], end: str
) -> None:
    found = said({"a": {"fedmerge": ours, "local": theirs}})
    assert found.headline == (
        f"FedMerge had the best merged-model accuracy in a, with a lead of {end}"
    )


def test_a_constant_difference_is_told_as_such() -> None:
    found = said({"a": {"fedmerge": [0.5, 0.6], "local": [0.6, 0.7]}})
    assert found.not_won[0].endswith(", by the same amount on each of 2 seeds.")


def test_of_two_variants_the_first_is_the_subject_by_its_full_name() -> None:
    found = said({"a": {"fedmerge:d=8": [0.5, 0.56], "fedmerge:d=2": [0.9, 0.95]}})
    assert found.headline.startswith("fedmerge:d=8 did not have the best")
    assert found.not_won[0].startswith("In a, fedmerge:d=2 was ahead by ")


def test_a_regression_setting_is_judged_by_its_loss() -> None:
    values: Values = {
        "mix": WON,
        "latent": {"fedmerge": [None, None], "local": [None, None]},
    }
    loss: Values = {
        "mix": {"fedmerge": [9, 9], "local": [1, 1]},
        "latent": {"fedmerge": [0.4, 0.499], "local": [0.2, 0.301]},
    }
    found = said(values, loss)
    assert found.headline == (
        "FedMerge had the best merged-model accuracy in mix, with a lead of 0.390 over local. "
        "FedMerge did not have the best merged-model loss in latent: it was number 2 of 2, behind "
        f"the best beyond chance.{FEW}"
    )
    assert found.not_won[0].startswith("In latent, local was ahead by 0.199 in loss (0.251 against")


def test_a_method_that_diverged_is_said_to_have_and_has_lost() -> None:
    found = said({"a": {"fedmerge": [math.nan, 0.5], "local": [0.6, 0.7]}})
    assert found.headline == (
        "FedMerge did not have the best merged-model accuracy in a: it diverged on 1 of 2 seeds."
        + FEW
    )
    assert found.not_won == (
        "In a, FedMerge diverged on 1 of 2 seeds. "
        "In a, local had the best merged-model accuracy (0.650).",
    )
    found = said({"a": LOST, "b": {"fedmerge": [math.nan, 0.5], "local": [0.6, 0.7]}})
    assert "; in 1 it was behind beyond chance and in 1 it diverged." in found.headline


def test_a_win_over_methods_that_diverged_claims_no_lead() -> None:
    found = said({"a": {"fedmerge": [0.5, 0.5], "local": [0.4, math.inf]}})
    assert found.headline == (
        "FedMerge had the best merged-model accuracy in a, where every other "
        f"method diverged on some seed.{FEW}"
    )
    assert found.by_setting["a"] == (
        "In a, FedMerge had 0.500; every other method diverged on some seed."
    )


def test_a_distance_is_that_on_the_seeds_that_both_have() -> None:
    runs = make({"a": {"fedmerge": [0.6, 0.9], "local": [0.598]}})
    found = findings(runs)
    assert found.by_setting["a"] == (
        "In a, FedMerge had the better mean (0.750 against 0.598), but over other seeds than local:"
        " on the 1 seed that both have, FedMerge was ahead by 0.002, on one seed, which cannot rule"
        " out chance."
    )
    assert "with a lead of 0.002 over local" in found.headline
    runs = make({"a": {"fedmerge": [0.6, 0.61, 0.9], "local": [0.62, 0.64]}})
    assert (
        "on the 2 seeds that both have, local was ahead by 0.025"
        in (findings(runs).by_setting["a"])
    )
    apart = [replace(run, seed=run.seed + 5 * (run.method == "local")) for run in runs]
    assert "have no seed in common" in findings(apart).by_setting["a"]


def test_a_sentence_gives_the_difference_that_the_tables_give() -> None:
    # The means print as 0.601 and 0.598; their difference is 0.0036.
    runs = make({"a": {"fedmerge": [0.6014, 0.6014], "local": [0.5978, 0.5978]}})
    assert "ahead of local by 0.004 (0.601 against 0.598)" in findings(runs).by_setting["a"]


def test_costs_are_short_and_ranges_where_they_differ() -> None:
    assert models_text([]) == "–"
    assert models_text([1.0, 1.0]) == "1"
    assert models_text([12, 4, 8]) == "4 to 12"
    assert models_text([0.0]) == "0"
    assert models_text([0.0003, 0.0052]) == "<0.1"
    assert models_text([0.837, 0.95]) == "0.84 to 0.95"


def test_fine_tuning_before_use_is_told_apart_and_counts_against_nobody() -> None:
    means = {"fedmerge": 0.9, "fedmerge-ft": 0.95, "fedmerge:d=2": 0.7, "fedavg": 0.8}
    runs = make({"domain": {m: [v, v + 0.001, v + 0.003] for m, v in means.items()}})
    found = findings(runs)
    assert found.headline.startswith("fedmerge had the best merged-model accuracy in domain")
    assert "over fedavg" in found.headline
    assert found.not_won == ()
    assert "fedmerge-ft is FedMerge, whose model a client fine-tunes" in found.variants
    assert "it and fedmerge are not counted against each other" in found.variants
    assert "fedmerge:d=2 is FedMerge with d=2; it counts as another method." in found.variants
    # The same training, fine-tuned, is judged by itself against the others.
    assert "fedmerge-ft had the best merged-model accuracy in domain" in found.variants
    assert "lead of 0.150 over fedavg" in found.variants
    two = [run for run in runs if run.method in ("fedmerge", "fedmerge-ft")]
    assert "there is no other method to judge it by" in findings(two).headline
    only = findings([run for run in runs if run.method != "fedmerge"])
    assert only.headline.startswith("fedmerge-ft had the best")
    assert "not counted" not in only.variants
    alone = findings([run for run in runs if run.method in ("fedmerge-ft", "fedavg")])
    assert alone.headline.startswith("fedmerge-ft had the best")
    assert alone.variants.startswith("fedmerge-ft is FedMerge, whose model a client fine-tunes")
