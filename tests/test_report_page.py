"""The report page as a browser gets it: complete, self-contained, escaped and repeatable.

The page is parsed, not rendered: no browser is needed here.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fedmerge.errors import MissingExtraError, StateError
from fedmerge.report import fit, write_report
from fedmerge.report.about import configuration, notices
from fedmerge.report.clients import history, most_clients
from fedmerge.report.fit import share
from fedmerge.report.page import page_content
from fedmerge.report.panels import focused
from fedmerge.report.reading import load_history, load_runs
from fedmerge.report.tables import value_text
from report_fixture import METHODS, SETTINGS, write_folder, write_run
from test_report_tables import make


class Page(HTMLParser):
    """Collects tags, addresses, ids and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "srcset", "action", "data"}:
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("compare"), seeds=(0, 1), rounds=12)


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_the_page_asks_nothing_of_the_network(text: str) -> None:
    page = Page(text)
    assert page.addresses
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not {"iframe", "img", "object"} & set(page.tags)
    assert page.tags.count("link") == 1  # the icon, which a browser would ask for otherwise
    assert "@import" not in text
    assert all(part.startswith("#") for part in text.split("url(")[1:])
    assert "default-src 'none'" in text


def test_only_the_pages_own_script_may_run(text: str) -> None:
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    kinds = re.findall(r"<script([^>]*)>", text)
    assert kinds == [' type="application/json"'] * len(SETTINGS) + [""]


def test_the_embedded_numbers_are_those_of_the_runs(folder: Path, text: str) -> None:
    data = [json.loads(d) for d in re.findall(r'json">(.*?)</script>', text)]
    runs = load_runs(folder)
    ours = next(run for run in runs if run.method == "fedmerge")
    ditto = next(run for run in runs if run.method == "ditto" and run.seed == ours.seed)
    first = data[0]
    place = [method["name"] for method in first["methods"]].index("ditto")
    for card, client, rival in zip(first["clients"], ours.clients, ditto.clients, strict=True):
        assert card["labels"] == list(client.label_counts)
        assert card["values"][place] == round(1000 * (rival.accuracy["merged"] or 0.0))
    kept = first["weights"]
    t, b, m, d = kept["shape"]
    history = load_history(ours)
    assert history is not None
    assert kept["rounds"] == history[0].tolist()
    raw = np.frombuffer(base64.b64decode(kept["bytes"]), np.uint8).reshape(t, b, m, d)
    wanted = history[1][:, kept["clients"]].transpose(0, 2, 1, 3)
    np.testing.assert_allclose(raw / 255 * kept["scale"], wanted, atol=kept["scale"] / 500)


def test_the_page_names_every_method_and_setting(text: str) -> None:
    words = set(Page(text).words)
    assert set(METHODS) <= words
    assert set(SETTINGS) <= words


def test_what_is_said_first_is_short(text: str) -> None:
    first = re.search(r"<h1>(.*?)</h1>", text)
    also = re.search(r'<p class="also">(.*?)</p>', text)
    assert first is not None
    assert also is not None
    assert first[1].startswith("FedMerge had the best")
    assert first[1].count(". ") == 0
    assert also[1] == "With 2 seeds only large differences can be told from chance."


def test_the_page_holds_its_parts(text: str) -> None:
    page = Page(text)
    joined = " ".join(page.words)
    assert joined.count("The same client with both methods") == len(SETTINGS)
    # curves, gap, differences, scatter, weights, map, worth; regret, ranks and a filter once
    assert page.tags.count("svg") == 7 * len(SETTINGS) + 3
    assert joined.count("The clients by likeness of their rows") == len(SETTINGS)
    for part in (
        "FedMerge had the best merged-model accuracy in",
        "Where FedMerge did not have the best mean",
        "In domain, ditto was ahead by",
        "FedMerge's regret, the most accuracy lost to the best of a setting, is 0.0",
        "Friedman’s test",
        "Test accuracy, merged model",
        "Test accuracy, merged model, best round",
        "Test accuracy, tuned model",
        "Test accuracy of the worst tenth of clients, merged model",
        "Share of clients better off than with local training, merged model",
        "Standard deviation of test accuracy over clients, merged model",
        "largest regret",
        "kept by the server",
        "lr 0.1",
        "worst tenth",
        "test gap",
        "With 2 seeds little can be shown",
        "16.8 kB",
        "training.epochs",
        "0, 1",
        "local-global gap",
        "paired t-test",
    ):
        assert part in joined, part
    assert len(page.ids) == len(set(page.ids))
    assert text.startswith("<!DOCTYPE html>")
    assert len(text) < 2_000_000


def test_equal_runs_give_equal_bytes(folder: Path, text: str) -> None:
    assert write_report(folder).read_bytes() == text.encode()
    assert {p.name for p in folder.iterdir()} == {
        "clients.parquet", "comparison.json", "report.html", "results.jsonl", "runs"
    }  # fmt: skip


def test_a_page_too_large_leaves_parts_out_and_says_so(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = load_runs(folder)
    content = page_content(runs, [])
    monkeypatch.setattr("fedmerge.report.page.load_runs", lambda _: runs)
    sizes = []
    for limit in (int(part * len(text.encode())) for part in (0.999, 0.8, 0.6, 0.4)):
        monkeypatch.setattr(fit, "LIMIT", limit)
        # A copy, as what is left out is taken from the content itself.
        fresh = copy.deepcopy(content)
        monkeypatch.setattr("fedmerge.report.page.page_content", lambda *_, c=fresh, **__: c)
        small = write_report(folder).read_text(encoding="utf-8")
        assert len(small.encode()) <= limit
        assert "this page leaves out what each model is worth" in small
        assert "fedmerge report --figures" in small
        page = Page(small)
        assert len(page.ids) == len(set(page.ids))
        assert "The methods stand in order of their average rank" in small or not fresh["views"]
        sizes.append(page.tags.count("svg"))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 6 * len(SETTINGS) + 3  # only the worth is gone
    monkeypatch.undo()
    assert write_report(folder).read_text(encoding="utf-8") == text


def test_many_settings_share_the_room_for_clients(folder: Path) -> None:
    run = next(run for run in load_runs(folder) if run.method == "fedmerge")
    most = [most_clients(run, 22, share(n)) for n in (1, 20, 200, 2000)]
    assert most == sorted(most, reverse=True)
    assert most[0] == 300
    assert most[-1] == 4
    assert most_clients(run, 22, share(20)) * 20 * 1000 < 5_000_000
    rounds, _ = history(run)
    fewer, _ = history(run, 3 * (run.weights[0].size * len(run.weights)))
    assert len(fewer) == 3 < len(rounds)
    assert fewer[-1] == rounds[-1]


def test_names_are_escaped(tmp_path: Path) -> None:
    result = write_run(tmp_path, "<script>alert(1)<script>", "fedmerge:x=<s>", 0, 4, clients=4)
    path = next(tmp_path.glob("runs/*/result.json"))
    for client in result["clients"]:
        client["id"] = client["kind"] = "</script><script>"
    path.write_text(json.dumps(result | {"data": "<img src=x>"}))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    tags = Page(text).tags
    assert not {"img", "s"} & set(tags)
    assert tags.count("script") == 2  # the page's own, and its data
    assert "&lt;script&gt;" in text
    assert "alert(1)<" not in text


def test_what_a_reader_must_know_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, "domain", "fedmerge", 0, 4)
    write_run(tmp_path, "domain", "fedmerge", 1, 4)
    write_run(tmp_path, "domain", "fedavg", 0, 4)
    write_run(tmp_path, "domain", "fedavg", 1, 4)
    (tmp_path / "runs/digits--domain--fedavg--s1/result.json").unlink()
    path = tmp_path / "runs/digits--domain--fedmerge--s1/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"refused": {"stale": 2}}))
    joined = " ".join(Page(write_report(tmp_path).read_text()).words)
    assert "1 run is not finished and not shown: digits--domain--fedavg--s1." in joined
    assert "1 missing: fedavg in domain (seed 1)." in joined
    assert "Updates were refused: of fedmerge, 2 stale in 1 of 2 runs (domain)." in joined


def test_one_method_one_setting_one_seed_make_a_page(tmp_path: Path) -> None:
    write_run(tmp_path, "dirichlet", "local", 0, 1, clients=1)
    page = Page(write_report(tmp_path).read_text())
    assert 'name="setting" id=' not in (tmp_path / "report.html").read_text()
    assert "FedMerge is not among these runs, which hold only local." in page.words


def make_regression(folder: Path) -> None:
    """Take the accuracies from the runs of a folder."""
    for path in folder.glob("runs/*/result.json"):
        result = json.loads(path.read_text())
        for scores in [*result["models"].values(), *result["best"]["models"].values()]:
            scores |= {"accuracy": None, "accuracy_std": None, "accuracy_worst_decile": None}
        for client in [*result["clients"], *result["best"]["clients"]]:
            client["accuracy"] = dict.fromkeys(client["accuracy"])
            client["label_counts"] = None
        path.write_text(json.dumps(result))
        log = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
        for record in log:
            for splits in record["metrics"].values():
                for summary in splits.values():
                    summary["accuracy"] = None
        (path.parent / "log.jsonl").write_text("\n".join(map(json.dumps, log)))


def test_a_regression_makes_a_page_about_loss(tmp_path: Path) -> None:
    for method in ("fedmerge", "fedavg"):
        write_run(tmp_path, "domain", method, 0, 2, clients=6)
    make_regression(tmp_path)
    joined = " ".join(Page(write_report(tmp_path).read_text()).words)
    assert "Test loss, merged model" in joined
    assert "Test accuracy" not in joined
    assert "FedMerge had the best merged-model loss in domain" in joined


def test_a_broken_run_leaves_the_old_page_alone(tmp_path: Path) -> None:
    write_run(tmp_path, "domain", "local", 0, 2)
    (tmp_path / "report.html").write_text("old")
    next(tmp_path.glob("runs/*/result.json")).write_text("{")
    with pytest.raises(StateError, match="not valid JSON"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"


def test_methods_too_many_to_tell_apart_are_grey_but_for_the_best(tmp_path: Path) -> None:
    methods = ("fedmerge", *(f"fedavg:m{i}" for i in range(12)))
    write_folder(tmp_path, settings=("domain",), methods=methods, seeds=(0, 1), rounds=4)
    text = write_report(tmp_path).read_text()
    (curves,) = re.findall(r'<figure class="lines"[^>]*>(<svg.*?</svg>)', text, re.DOTALL)[:1]
    lines = re.findall(r'<g data-method="(\d+)"><path [^>]*style="([^"]*)"', curves)
    assert len(lines) == 13
    grey = [index for index, style in lines if "stroke:currentColor" in style]
    assert len(grey) == 13 - 6  # all but FedMerge and the five best
    assert sum(f">{name}</text>" in curves for name in methods) == 6
    assert "all others are grey" in text
    swatch = re.findall(r'class="name" data-method="(\d+)".*?background: var\(--(\w+)\)', text)
    assert {index for index, colour in swatch if colour == "grey"} == set(grey)
    named = [colour for _, colour in swatch if colour != "grey"]
    assert len(named) == len(set(named)) == 6


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_without_the_extra_its_command_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"fedmerge\[report\]"):
        write_report(folder)


def test_importing_the_package_imports_no_extra() -> None:
    code = (
        "import sys, fedmerge.report; "
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'jinja2')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.fixture
def variants(tmp_path: Path) -> Path:
    """A comparison in which a variant named later does better than the first one."""
    methods = ("fedmerge", "fedmerge:rule=paper", "fedavg")
    better = {("domain", "fedmerge:rule=paper", seed): 0.95 for seed in (0, 1)}
    return write_folder(
        tmp_path, settings=("domain",), methods=methods, seeds=(0, 1), rounds=4, accuracy=better
    )


def test_one_variant_is_the_subject_of_every_part_of_the_page(variants: Path) -> None:
    text = write_report(variants).read_text()
    labels = re.findall(r'aria-label="(accuracy of [^"]*)"', text)
    assert labels == [
        "accuracy of fedmerge minus that of each other method",
        "accuracy of each client, fedmerge against fedavg",
    ]
    assert "Right of 0 fedmerge is better." in text
    assert "merging weights of fedmerge in domain" in text
    assert ": fedmerge, seed 0</h4>" in text
    (data,) = (json.loads(d) for d in re.findall(r'json">(.*?)</script>', text))
    assert data["ours"] == "fedmerge"


def test_the_subject_keeps_its_colour_where_two_variants_of_it_do_better() -> None:
    ranked = ["fedmerge:a", "fedmerge:b", "fedmerge", *(f"m{i}" for i in range(9))]
    assert focused(ranked, "fedmerge") == ["fedmerge", "fedmerge:a", "m0", "m1", "m2", "m3", "m4"]


def test_methods_that_diverged_are_said() -> None:
    runs = make({"domain": {"fedmerge": [0.5, 0.6], "fedavg": [0.4, float("nan")]}})
    assert notices(runs, ()) == [
        "Not every run stayed finite: fedavg in domain diverged on 1 of 2 seeds. A method that "
        "diverged on any seed of a setting has no mean there and ranks last."
    ]
    content = page_content(runs, ())
    rows = {row["method"]: row for row in content["views"][0]["tables"][0]["rows"]}
    assert rows["fedavg"]["cells"][0]["value"] == "diverged on 1 of 2 seeds"
    assert rows["fedavg"]["cells"][0]["shade"] == 100
    assert rows["fedavg"]["head"][:3] == ["2.0", "diverged", "diverged"]
    assert [row["behind"] for row in content["panels"][0]["rows"]] == ["–", "diverged"]
    assert content["panels"][0]["diverged"]


def test_refused_updates_are_said_of_each_method_and_what_to_do() -> None:
    runs = make({"domain": {"fedmerge": [0.5, 0.6], "fedavg": [0.4, 0.5], "local": [0.3, 0.3]}})
    refused = [{"non-finite": 8}, {"non-finite": 4, "empty": 1}, {"empty": 2}, {}, {}, {}]
    some = [replace(run, refused=one) for run, one in zip(runs, refused, strict=True)]
    (said,) = notices(some, ())
    assert said.startswith(
        "Updates were refused: of fedmerge, 1 empty, 12 non-finite in 2 of 2 runs (domain); "
        "of fedavg, 2 empty in 1 of 2 runs (domain). Non-finite ones mostly come of training "
    )
    assert "standardise=true" in said
    assert said.endswith("or lower the learning rate.")
    # What helps against others is not known.
    assert notices(some[2:3], ()) == [
        "Updates were refused: of fedavg, 2 empty in 1 of 1 run (domain)."
    ]
    assert notices(runs, ()) == []


def test_a_regression_is_told_in_squared_error_and_its_clients_gain(tmp_path: Path) -> None:
    for method in ("fedmerge", "fedavg"):
        write_run(tmp_path, "domain", method, 0, 2, clients=6)
    make_regression(tmp_path)
    (path,) = tmp_path.glob("runs/*fedavg*/result.json")
    result = json.loads(path.read_text())
    for client, loss in zip(result["clients"], (0.5, 0.2, 0.3, None, 0.3, 0.3), strict=True):
        client["loss"]["merged"] = loss  # ours is 0.3
    path.write_text(json.dumps(result))
    text = write_report(tmp_path).read_text()
    page = " ".join(Page(text).words)
    assert "Below the line fedmerge is better" in page
    assert "squared error (root scale)" in page
    assert "test gap, squared error" in page
    assert "by how much its validation loss (squared error) rises" in page
    assert re.findall(r'<text class="gain-1[^>]*>(.)</text>', text) == [
        "+",
        "−",
        "=",
        "?",
        "=",
        "=",
    ]
    assert "not known: a model diverged" in page
    (data,) = (json.loads(d) for d in re.findall(r'json">(.*?)</script>', text))
    assert data["unit"] == "squared error"


@pytest.mark.parametrize(("mean", "said"), [(None, "diverged"), (0.4, None)])
def test_a_client_without_a_loss_has_diverged_or_was_not_measured(
    tmp_path: Path, mean: float | None, said: str | None
) -> None:
    for method in ("fedmerge", "fedavg"):
        write_run(tmp_path, "domain", method, 0, 2, clients=3)
    make_regression(tmp_path)
    (path,) = tmp_path.glob("runs/*fedavg*/result.json")
    result = json.loads(path.read_text())
    result["models"]["merged"]["loss"] = mean
    for client, loss in zip(result["clients"], (0.5, None, 0.3), strict=True):
        client["loss"]["merged"] = loss
    path.write_text(json.dumps(result))
    text = write_report(tmp_path).read_text()
    (data,) = (json.loads(d) for d in re.findall(r'json">(.*?)</script>', text))
    place = [method["name"] for method in data["methods"]].index("fedavg")
    assert [client["values"][place] for client in data["clients"]] == [500, said, 300]


def test_a_lone_method_is_not_ranked(tmp_path: Path) -> None:
    write_folder(tmp_path, settings=("domain",), methods=("fedavg",), seeds=(0,), rounds=1)
    content = page_content(load_runs(tmp_path), ())
    (table,) = content["views"][0]["tables"]
    assert (table["whole"], table["rows"][0]["head"]) == (False, [])
    assert [cell["mark"] for cell in table["rows"][0]["cells"]] == [""]
    assert "there is no other method" in table["note"]
    text = write_report(tmp_path).read_text()
    assert "The bluer a cell" not in text
    assert 'class="best"' not in text
    assert "of one seed." in text
    assert "band:" not in text
    assert "In domain, fedavg had a merged-model accuracy of" in text
    (data,) = (json.loads(d) for d in re.findall(r'json">(.*?)</script>', text))
    assert data["ours"] == ""  # nobody is drawn as FedMerge is


def test_costs_stand_once_for_themselves(folder: Path) -> None:
    views = page_content(load_runs(folder), ())["views"]
    assert [view["name"] for view in views if view["costs"]] == ["cost"]
    rows = {row["method"]: row["values"] for row in views[-1]["costs"]["rows"]}
    assert rows["ifca-warm"] == ["4", "1", "0", "4", "0", "1"]
    assert all(len(row["head"]) in (0, 3) for v in views for t in v["tables"] for row in t["rows"])


def test_another_variant_is_explained_and_the_subject_named(variants: Path) -> None:
    words = " ".join(Page(write_report(variants).read_text()).words)
    assert "Where fedmerge did not have the best mean (1)" in words
    assert (
        "fedmerge is FedMerge with its usual settings; the sentences are about it. "
        "fedmerge:rule=paper is FedMerge with rule=paper; it counts as another method." in words
    )


def test_what_was_run_says_where_a_value_holds(tmp_path: Path) -> None:
    write_folder(
        tmp_path, settings=("domain",), methods=("fedavg", "local"), seeds=(0,), rounds=2,
        data=("digits", "heart"),
    )  # fmt: skip
    for path in tmp_path.glob("runs/*/config.json"):
        config = json.loads(path.read_text())
        config["training"]["lr"] = 0.3 if config["data"] == "heart" else 0.1
        config["hidden"] = 8 if config["method"] == "local" else 32
        config["threads"] = f"{config['data']} {config['method']}"
        path.write_text(json.dumps(config | {"chosen": "lr=0.5"}))
    for path in tmp_path.glob("runs/heart*/result.json"):
        result = json.loads(path.read_text())
        result["clients"][0]["n_train"] = 12
        path.write_text(json.dumps(result))
    (tmp_path / "results.jsonl").unlink()
    told = dict(configuration(load_runs(tmp_path)))
    assert told["training.lr"] == "0.1 (digits); 0.3 (heart)"
    assert told["train examples of a client"] == "28 (digits); 12 to 28 (heart)"
    assert told["hidden"] == "32 (fedavg); 8 (local)"
    assert told["threads"].endswith("heart local; it differs within a setting")
    assert told["training.epochs"] == "2"
    assert "chosen" not in told


def test_intervals_are_told_from_corrected_p_and_zero_has_no_sign(text: str) -> None:
    assert "behind the best (95% interval), corrected p" in text
    assert "so an interval without 0 can stand beside a p above 0.05" in text
    assert value_text("accuracy", -0.0004) == "0.000"
    assert value_text("accuracy", -0.0006) == "−0.001"
