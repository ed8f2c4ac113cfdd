"""What a comparison consists of, from its options: presets, data with settings, what contradicts.

Nothing is run here, but for the paper's set-up in two rounds on small data.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedmerge.algorithms import METHODS, make_method
from fedmerge.compare.presets import PRESETS, Names, Protocol, make_protocol
from fedmerge.config import RunConfig, load_config
from fedmerge.errors import ConfigError

OWN = {"watch", "heart", "diabetes"}
"""Data sets with clients of their own, as far as these tests are concerned."""
NAMES = Names(
    lambda: ["concept", "domain"],
    lambda: ["fedavg", "fedmerge"],
    lambda data, setting: (data in OWN) == (setting == "natural"),
)


def protocol(**options: object) -> Protocol:
    return make_protocol(NAMES, **options)  # type: ignore[arg-type]


def test_without_a_preset_settings_and_methods_are_named() -> None:
    made = protocol(settings="domain,concept", methods="fedavg,ditto:lam=1")
    assert made.pairs == (("digits", "domain"), ("digits", "concept"))
    assert made.methods == ("fedavg", "ditto:lam=1")
    assert made.seeds == (0, 1, 2, 3, 4)
    assert (made.trials, made.tuning_seeds) == (0, ())
    assert made.sizes("digits", "domain", {"lr": "0.1"}) == {"lr": "0.1"}
    with pytest.raises(ConfigError, match="--settings is missing; name them, or take a --preset"):
        protocol(methods="fedavg")
    with pytest.raises(ConfigError, match="--methods is missing"):
        protocol(settings="domain")


def test_every_data_set_goes_with_the_settings_that_fit_it() -> None:
    made = protocol(data="digits,heart", settings="all,natural", methods="all")
    assert made.pairs == (("digits", "concept"), ("digits", "domain"), ("heart", "natural"))
    assert made.methods == ("fedavg", "fedmerge")


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ("digits,heart", "concept", r"--data heart fits no setting of this comparison \(concept\)"),
        ("digits", "concept,natural", r"--settings natural fits no data set .* \(digits\)"),
        ("heart", "domain", "--data heart fits no setting"),
    ],
)
def test_a_name_that_would_be_in_no_cell_is_refused(data: str, settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        protocol(data=data, settings=settings, methods="all")


def test_quick_is_what_the_demo_runs() -> None:
    made = protocol(preset="quick")
    assert made.pairs == tuple(("digits", s) for s in ("concept-mix", "domain", "dirichlet"))
    names = "fedmerge fedavg fedavg-ft fedprox local ifca-warm ditto"
    assert made.methods == tuple(names.split())
    assert made.seeds == (0, 1, 2)
    assert made.trials == 0
    # All else is as by default.
    assert made.sizes("digits", "domain", {}) == {}


def test_standard_has_all_methods_settings_and_five_seeds() -> None:
    made = protocol(preset="standard")
    assert len(made.seeds) == 5
    assert made.methods == ("fedavg", "fedmerge", "fedmerge:rule=paper")
    assert {s for d, s in made.pairs if d == "digits"} == {"concept", "domain"}
    mnist = {s for d, s in made.pairs if d.startswith("mnist-5k")}
    assert mnist == {"concept", "domain"}
    assert {(d, s) for d, s in made.pairs if d in OWN} == {(name, "natural") for name in OWN}
    assert made.trials > 0
    assert not set(made.tuning_seeds) & set(made.seeds)
    for data, setting in made.pairs:
        assert made.sizes(data, setting, {})["evaluate_every"] == 5
        assert ("clients" in made.sizes(data, setting, {})) == (setting != "natural")


def test_options_replace_what_a_preset_says() -> None:
    made = protocol(
        preset="standard",
        data="digits,other",
        settings="domain",
        methods="ditto",
        seeds="7",
        trials=4,
        tuning_seeds="8-9",
    )
    assert made.pairs == (("digits", "domain"), ("other", "domain"))
    assert (made.methods, made.seeds) == (("ditto",), (7,))
    assert (made.trials, made.tuning_seeds) == (4, (8, 9))
    # Options over the preset's sizes for the data, these over what it says for all data.
    rounds = PRESETS["standard"].data["digits"]["rounds"]
    assert made.sizes("digits", "domain", {})["rounds"] == rounds
    sizes = made.sizes("digits", "domain", {"rounds": "3", "clients": "9"})
    assert (sizes["rounds"], sizes["clients"], sizes["evaluate_every"]) == ("3", "9", 5)
    assert made.sizes("other", "domain", {}) == {"evaluate_every": 5}
    # Only a part is replaced, the rest is the preset's: settings that no data set has go.
    assert protocol(preset="standard", data="heart").pairs == (("heart", "natural"),)
    assert "clients" not in protocol(preset="standard").sizes("heart", "natural", {"clients": "9"})
    assert protocol(preset="standard", tuning=False).trials == 0
    assert protocol(preset="standard", tuning=False).tuning_seeds == ()
    assert protocol(preset="quick", trials=3).trials == 3


def test_a_preset_with_a_typo() -> None:
    with pytest.raises(ConfigError, match='no preset "standart"; did you mean "standard"'):
        protocol(preset="standart")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuning": False, "trials": 2}, "--no-tuning and --trials 2 contradict each other"),
        ({"tuning": False, "tuning_seeds": "9"}, "--tuning-seeds without tuning"),
        ({"trials": 0, "tuning_seeds": "9"}, "--tuning-seeds without tuning"),
        ({"tuning_seeds": "7-9", "seeds": "0,8"}, "--tuning-seeds: seed 8 is reported as well"),
        ({"tuning_seeds": "x"}, '--tuning-seeds: got "x"'),
        ({"data": "heart", "settings": "domain"}, "--data heart fits no setting"),
        # What is empty, as a variable of a script may be, is not the preset's.
        ({"seeds": ""}, '--seeds: got ""'),
        ({"settings": ""}, '--settings: got ""'),
        ({"methods": ""}, '--methods: got ""'),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        protocol(preset="standard", **options)


def test_tuning_seeds_are_never_reported_ones() -> None:
    assert protocol(preset="standard").tuning_seeds == tuple(range(1000, 1008))
    some = protocol(preset="standard", seeds="998-1000,1002").tuning_seeds
    assert some == (1001, *range(1003, 1010))
    assert protocol(preset="quick", trials=1, seeds="1000").tuning_seeds == tuple(range(1001, 1009))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_settings_of_runs_and_methods_that_are_there(name: str) -> None:
    preset = PRESETS[name]
    for data, sizes in preset.data.items():
        assert {*sizes, *preset.shared} <= RunConfig.model_fields.keys()
        load_config(None, {**preset.shared, **sizes, "data": data})
    for method in preset.methods.split(","):
        if method != "all":
            make_method(method)


def test_the_paper_is_the_papers_set_up() -> None:
    made = protocol(preset="paper")
    assert {data for data, _ in made.pairs} == {"cifar100"}
    # The reference rule beside the default, both with five models.
    assert made.methods[:2] == ("fedmerge:rule=paper:d=5", "fedmerge:d=5")
    sizes = made.sizes("cifar100", made.pairs[0][1], {})
    assert sizes == {
        "model": "resnet9",
        "hidden": 64,
        "clients": 50,
        "rounds": 500,
        "lr": 0.01,
        "epochs": 2,
        "batch_size": 32,
    }


@pytest.mark.filterwarnings("ignore::fedmerge.data.DataWarning")
def test_the_paper_runs_on_small_data_of_the_same_schema(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from fedmerge.cli import app

    draws = np.random.default_rng(0)
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(num_classes=100),
            "coarse_label": datasets.ClassLabel(num_classes=20),
        }
    )
    labels = np.arange(1600) % 100
    images = draws.integers(0, 256, (1600, 8, 8, 3), dtype=np.uint8)
    columns = {"img": list(images), "fine_label": labels, "coarse_label": labels // 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own, when it turns arrays into images
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "small")
    arguments = ["compare", "--preset", "paper", "--data", f"cifar100:path={tmp_path / 'small'}"]
    arguments += ["--methods", "fedmerge:rule=paper:d=5,fedmerge:d=5", "--seeds", "0"]
    arguments += ["--rounds", "2", "--clients", "6", "--hidden", "2", "--workers", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, (result.exception, result.stderr)
    text = (tmp_path / "out" / "results.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    best = [row for row in rows if row["at"] == "best" and row["model"] == "merged"]
    assert [(row["setting"], row["method"]) for row in best] == [
        (setting, method)
        for setting in ("cluster:groups=5:classes=30:alpha=10", "dirichlet:alpha=0.1")
        for method in ("fedmerge:rule=paper:d=5", "fedmerge:d=5")
    ]
    for folder in (tmp_path / "out" / "runs").iterdir():
        config = json.loads((folder / "config.json").read_text())
        assert (config["model"], config["lr"], config["epochs"]) == ("resnet9", 0.01, 2)
        # Five models, and 100 classes: the last layer has as many outputs.
        assert np.load(folder / "weights.npz")["weights"].shape[-1] == 5
    counts = json.loads((folder / "result.json").read_text())["clients"][0]["label_counts"]
    assert len(counts) == 100


@pytest.mark.parametrize("method", METHODS)
def test_every_point_of_every_grid_can_be_run(method: str) -> None:
    from fedmerge.compare.cells import TUNED, chosen_text

    grid = make_method(method).grid
    assert len(grid) <= 8
    for point in grid:
        assert point, "the defaults are tried anyway"
        settled = load_config(None, {"method": method, "chosen": chosen_text(point)}).settled()
        made = make_method(settled.method).resolve(64)
        for key, value in point.items():
            assert getattr(settled if key in TUNED else made, key) == value


def test_fedmerge_never_tunes_its_rule() -> None:
    for method in ("fedmerge", "fedmerge:rule=paper"):
        assert {key for point in make_method(method).grid for key in point} <= {"lr", "epochs"}
