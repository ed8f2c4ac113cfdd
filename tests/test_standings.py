"""The page of results: its numbers by hand, and that it is the one its runs give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.standings.__main__ import DOCS
from benchmarks.standings.__main__ import main as write_page
from benchmarks.standings.page import COMPARISONS, page, short
from benchmarks.standings.standing import Result, Standing, read, score_of, worst_of

from fedmerge.report.statistics import paired_interval

SCORES = {
    ("a", "fedmerge"): (0.80, 0.84, 0.82),
    ("a", "fedmerge-ft"): (0.90, 0.94, 0.92),
    ("a", "ditto"): (0.86, 0.85, 0.90),
    ("a", "local"): (0.60, 0.65, 0.58),
    ("b", "fedmerge"): (0.70, 0.72, 0.71),
    ("b", "fedmerge-ft"): (0.70, 0.72, 0.71),
    ("b", "ditto"): (0.50, 0.52, 0.51),
    ("b", "local"): (0.712, 0.735, 0.719),
}


@pytest.fixture
def standing() -> Standing:
    """Two settings with accuracy, one with a loss, three seeds."""
    found = [
        Result("x", setting, method, seed, score, score - 0.2, "lr=0.5")
        for (setting, method), scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]
    losses = {"fedmerge": -0.5, "fedmerge-ft": -0.5, "ditto": -0.4, "local": -0.6}
    for method, loss in losses.items():
        found += [Result("y", "c", method, seed, loss - seed / 10, None, "") for seed in range(3)]
    return Standing(found)


def test_a_loss_is_to_the_best_other_method_and_never_to_its_own_twin(standing: Standing) -> None:
    assert standing.losses("fedmerge") == pytest.approx({"x/a": 0.05, "x/b": 0.012})
    assert standing.losses("fedmerge-ft") == pytest.approx({"x/a": 0.0, "x/b": 0.012})
    assert standing.losses("ditto") == pytest.approx({"x/a": 0.05, "x/b": 0.212})


def test_differences_are_paired_by_seed_and_corrected_for_the_rivals(standing: Standing) -> None:
    found = standing.behind("x/b", "fedmerge", score_of)
    assert list(found) == ["ditto", "local"]
    interval, p = found["local"]
    assert interval == paired_interval([0.712 - 0.70, 0.735 - 0.72, 0.719 - 0.71])
    assert interval.p is not None
    assert found["ditto"][0].p == 0
    assert p == pytest.approx(interval.p)  # the larger of two: not multiplied
    assert standing.behind("x/a", "fedmerge", worst_of)["ditto"][0].mean == pytest.approx(0.05)


def test_ranks_are_over_all_settings_and_of_one_twin(standing: Standing) -> None:
    assert standing.ranks(twin="fedmerge-ft") == pytest.approx(
        {"fedmerge": 2.0, "ditto": (1 + 3 + 1) / 3, "local": (3 + 1 + 3) / 3}
    )


def test_what_the_page_says_in_words(standing: Standing) -> None:
    text = page({"all": standing})
    assert "4 methods, 3 settings with 3 seeds (0, 1, 2); 36 runs." in text
    assert "**fedmerge** loses .031 in the mean and .050 (`x/a`) at most; it is best in 0" in text
    assert "| all | `fedmerge` | .031 | .050 (`x/a`) | 0 of 2 | 0 |" in text
    assert "| x/a | .820 | **.920** | .870 (ditto) | .050 ± " in text
    assert "| y/c (loss) | .600 | .600 | **.500** (ditto) | .100 ± .000 | .100 ± .000 |" in text
    assert "| ditto | .870 | .510 |" in text


def test_a_method_that_is_not_in_all_settings_is_judged_where_it_is(standing: Standing) -> None:
    found = [run for runs in standing.runs.values() for run in runs.values()]
    some = Standing(run for run in found if (run.where, run.method) != ("y/c", "local"))
    assert some.complete == ("fedmerge", "fedmerge-ft", "ditto")
    assert some.losses("fedmerge") == pytest.approx({"x/a": 0.05, "x/b": 0.012})  # of local in b
    assert list(some.ranks(twin="fedmerge-ft")) == ["ditto", "fedmerge"]
    text = page({"all": some})
    assert "4 methods, 3 settings with 3 seeds (0, 1, 2); 33 runs." in text
    assert text.count("\n| local |") == 1  # with its means in a and b, no losses


def test_settings_with_other_seeds_are_told_apart(standing: Standing) -> None:
    for method in ("fedmerge", "fedmerge-ft", "ditto", "local"):
        for seed in (0, 2):
            del standing.runs["y/c", method][seed]
    told = "4 methods, 2 settings with 3 seeds (0, 1, 2), 1 setting with 1 seed (1); 28 runs."
    assert told in page({"all": standing})


def test_the_page_in_the_documentation_is_what_its_runs_give() -> None:
    files = {name: DOCS / "results" / f"{name}.csv" for name in COMPARISONS}
    held = {name: Standing(read(file)) for name, file in files.items() if file.is_file()}
    assert held
    assert (DOCS / "results.md").read_text(encoding="utf-8") == page(held)
    compared = (DOCS / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert set(short(held)) <= set(compared)


def test_a_folder_is_taken_in_and_a_wrong_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, docs = tmp_path / "run", tmp_path / "docs"
    folder.mkdir()
    (docs / "results").mkdir(parents=True)
    base = {"data": "x", "setting": "a", "loss": 0.7, "chosen": {"lr": 0.5, "mu": 1}}
    lines = [
        {**base, "method": m, "seed": seed, "at": at, "model": model, "accuracy": accuracy,
         "accuracy_worst_decile": 0.25}
        for m, accuracy in (("fedmerge", 0.5), ("fedmerge-ft", 0.5), ("local", 0.25))
        for seed in (0, 1)
        for at in ("last", "best")
        for model in ("merged", "tuned")
    ]  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page([f"10={folder}"], docs)
    assert (docs / "results" / "10.csv").read_text().splitlines()[:2] == [
        "data,setting,method,seed,score,worst_tenth,chosen",
        'x,a,fedmerge,0,0.50000,0.25000,"lr=0.5, mu=1"',
    ]
    assert "With 10 % of the clients" in (docs / "results.md").read_text()
    other = tmp_path / "other"
    other.mkdir()
    more = "".join(json.dumps({**line, "setting": "b"}) + "\n" for line in lines)
    (other / "results.jsonl").write_text(more)
    write_page([f"10={folder}", f"10={other}"], docs)
    assert "2 settings with 2 seeds (0, 1); 12 runs." in (docs / "results.md").read_text()
    again = [{**line, "accuracy": 0.75} for line in lines if line["method"] == "local"]
    new = [{**line, "method": "ditto"} for line in lines if line["method"] == "local"]
    (other / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in again + new))
    write_page([f"10+={other}"], docs)
    added = (docs / "results" / "10.csv").read_text()
    assert added.count("x,a,local,") == added.count("x,a,ditto,") == 2
    assert added.count("x,b,local,") == 2
    assert "x,a,local,0,0.75000" in added
    assert "2 settings with 2 seeds (0, 1); 14 runs." in (docs / "results.md").read_text()
    before = added
    fewer = "".join(
        json.dumps({**line, "method": "ditto"}) + "\n" for line in lines if line["seed"]
    )
    (other / "results.jsonl").write_text(fewer)
    with pytest.raises(SystemExit):
        write_page([f"10={folder}", f"10={other}"], docs)
    told = capsys.readouterr().err
    assert "10: x/a: not all methods have the same seeds: [(0, 1), (1,)]" in told
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps({**lines[0], "seed": 2, "accuracy": None, "loss": float("nan")}))
    with pytest.raises(SystemExit):
        write_page([f"10={folder}"], docs)
    assert f"{folder}: fedmerge, seed 2, diverged" in capsys.readouterr().err
    assert (docs / "results" / "10.csv").read_text() == before
    for wrong in (f"20={folder}", f"10={docs}"):
        with pytest.raises(SystemExit):
            write_page([wrong], docs)
        told = capsys.readouterr().err
        assert f'"{wrong}": wanted all or all-again or all-third or 30 or 30-again or ' in told


def test_comparisons_of_the_same_share_are_also_taken_together() -> None:
    def held(score: float, seed: int) -> Standing:
        methods = {"fedmerge": score, "fedmerge-ft": score, "ditto": 0.5}
        return Standing([Result("x", "a", m, seed, s, 0.1, "") for m, s in methods.items()])

    first, again = held(0.48, 0), held(0.46, 1)
    lost = [line.split(" | ")[2] for line in short({"10": first, "10-again": again})][2:]
    assert lost == [".020", ".020", ".040", ".040", ".030", ".030"]
    names = [line.split(" | ")[0] for line in short({"10": first, "10-again": again})][2::2]
    assert names == ["| 10 %", "| 10 %, again", "| 10 %, both"]
    assert len(list(short({"all": first, "10": again}))) == 2 + 4
    assert len(list(short({"30": first, "10-again": again}))) == 2 + 4
    third = held(0.32, 2)
    table = [row.split(" | ") for row in short({"10": first, "10-again": again, "10-third": third})]
    assert [row[0] for row in table[6::2]] == ["| 10 %, a third time", "| 10 %, all three"]
    assert [row[2] for row in table[6::2]] == [".180", ".080"]
