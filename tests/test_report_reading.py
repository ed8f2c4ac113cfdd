"""Folders read back: what the tables, the runs and their logs hold, and every way they can be bad.

Most folders are made up; one is written by the same code that a comparison uses.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from fedmerge.compare.results import collect
from fedmerge.errors import StateError
from fedmerge.report.about import notices
from fedmerge.report.ranking import comparison
from fedmerge.report.reading import load_history, load_runs, unfinished, unlisted
from fedmerge.report.runs import Evaluation, Run
from report_fixture import write_folder, write_run


def test_runs_are_read_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    methods = ("fedmerge", "local", "fedavg")
    write_folder(tmp_path, settings=("domain", "concept-mix"), methods=methods, rounds=4)
    runs = load_runs(tmp_path)
    assert [run.method for run in runs[:9:3]] == list(methods)
    assert [run.setting for run in runs] == ["domain"] * 9 + ["concept-mix"] * 9
    assert [run.seed for run in runs[:3]] == [0, 1, 2]


def test_a_run_holds_what_was_written(tmp_path: Path) -> None:
    result = write_run(tmp_path, "domain", "fedmerge", 1, rounds=4, clients=6)
    (run,) = load_runs(tmp_path)
    assert run.weights is not None
    assert run.weights.tolist() == result["weights"]
    assert run.last.models["tuned"].accuracy == result["models"]["tuned"]["accuracy"]
    assert run.clients[4].kind == "inverted"
    assert run.config["training"]["epochs"] == 2
    assert [point.round for point in run.log] == [1, 2, 3, 4]
    assert run.log[0].accuracy == {}
    assert run.log[0].gap_test is None
    assert run.log[3].accuracy["merged"] == pytest.approx(result["models"]["merged"]["accuracy"])


def test_a_single_run_folder_is_read_too(tmp_path: Path) -> None:
    write_run(tmp_path, "domain", "fedmerge", 0, rounds=2)
    (run,) = load_runs(next((tmp_path / "runs").iterdir()))
    assert run.method == "fedmerge"
    assert run.best is not None
    assert run.cost["server"] == 12
    assert len(run.clients[0].importance) == 5


def test_a_round_logged_twice_counts_once_and_the_last_holds(tmp_path: Path) -> None:
    write_run(tmp_path, "domain", "local", 0, rounds=2)
    path = next(tmp_path.glob("runs/*/log.jsonl"))
    last = json.loads(path.read_text().splitlines()[-1]) | {"gap_test": 7.0}
    path.write_text(path.read_text() + json.dumps(last) + "\n")
    (run,) = load_runs(tmp_path)
    assert [point.round for point in run.log] == [1, 2]
    assert run.log[-1].gap_test == 7.0


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("result.json", '{"setting": "dom', "not valid JSON at line 1, column 13"),
        ("result.json", "[1]", "got a list, wanted an object"),
        ("result.json", "{}", "the key 'clients' is missing"),
        ("log.jsonl", '{"round": 1}', "log.jsonl, line 1: not of the form"),
        ("log.jsonl", "{", "not valid JSON at line 1"),
        ("config.json", None, "config.json: cannot be read (FileNotFoundError)"),
    ],
)
def test_a_broken_file_gives_one_clear_line(
    tmp_path: Path, name: str, text: str | None, part: str
) -> None:
    write_run(tmp_path, "domain", "local", 0, rounds=2)
    path = next(tmp_path.glob(f"runs/*/{name}"))
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(StateError) as caught:
        load_runs(tmp_path)
    message = str(caught.value)
    assert part in message
    assert name in message
    assert message.endswith("delete its run folder and run it again")
    assert "\n" not in message


def test_weights_of_a_wrong_shape_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "domain", "fedmerge", 0, rounds=2)
    path = next(tmp_path.glob("runs/*/result.json"))
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"weights": result["weights"][1:]}))
    with pytest.raises(StateError, match=r"weights have shape \(31, 2, 5\), wanted \(32, 2\)"):
        load_runs(tmp_path)


def test_a_folder_without_results_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"no finished run .*fedmerge compare"):
        load_runs(tmp_path)


def test_unfinished_runs_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, "domain", "local", 0, rounds=2)
    write_run(tmp_path, "domain", "local", 1, rounds=2)
    (tmp_path / "runs/digits--domain--local--s1/result.json").unlink()
    assert unfinished(tmp_path) == ("digits--domain--local--s1",)
    assert [run.seed for run in load_runs(tmp_path)] == [0]


# ---- tables of the comparison


def test_the_tables_override_what_a_lone_run_cannot_know(tmp_path: Path) -> None:
    write_folder(tmp_path, settings=("domain",), methods=("fedmerge", "local"), seeds=(0,))
    ours, local = load_runs(tmp_path)
    share = sum(
        a.accuracy["merged"] > b.accuracy["merged"]
        for a, b in zip(ours.clients, local.clients, strict=True)
    ) / len(ours.clients)
    assert ours.last.models["merged"].better_than_local == share
    assert ours.last.models["merged"].better_than_fedavg is None
    assert ours.chosen == {"lr": 0.1}
    assert ours.cost["server"] == 12
    assert ours.best is not None
    assert ours.best.round == 58
    merged = ours.last.models["merged"].accuracy
    assert ours.best.models["merged"].accuracy == pytest.approx(merged * 0.99)
    assert ours.best.clients[3].loss["merged"] == 0.31
    assert sum(ours.clients[0].label_counts) == 28
    assert len(ours.clients[0].importance) == 5
    assert local.clients[0].importance == ()


def test_the_made_up_tables_are_those_that_a_comparison_writes(tmp_path: Path) -> None:
    write_folder(tmp_path, methods=("fedavg", "fedmerge", "local"), seeds=(0, 1), rounds=4)
    before = load_runs(tmp_path)
    collect(tmp_path)
    after = load_runs(tmp_path)
    assert len(before) == len(after) == 18
    for one, other in zip(before, after, strict=True):
        for field in fields(Run):
            if field.name not in ("weights", "last", "best"):
                assert getattr(one, field.name) == getattr(other, field.name), field.name
        for mine, theirs in ((one.last, other.last), (one.best, other.best)):
            assert isinstance(mine, Evaluation)
            assert isinstance(theirs, Evaluation)
            assert mine.models == theirs.models
            assert mine.clients == theirs.clients


def test_everything_but_logs_is_read_from_the_tables_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, settings=("domain",), methods=("fedmerge", "fedavg"), seeds=(0,))
    kept = load_runs(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    alone = load_runs(tmp_path)
    assert [run.last for run in alone] == [run.last for run in kept]
    assert [run.cost for run in alone] == [run.cost for run in kept]
    assert alone[0].log == ()


def test_a_run_that_finished_after_the_tables_is_shown_too(tmp_path: Path) -> None:
    write_folder(tmp_path, settings=("domain",), methods=("local",), seeds=(0,), rounds=4)
    assert not unlisted(tmp_path)
    write_run(tmp_path, "domain", "fedmerge", 0, 4)
    assert unlisted(tmp_path)
    assert [run.method for run in load_runs(tmp_path)] == ["local", "fedmerge"]


def test_a_table_that_is_lost_is_written_anew_unless_runs_are_lost_too(tmp_path: Path) -> None:
    write_folder(tmp_path, settings=("domain",), methods=("local",), seeds=(0, 1), rounds=4)
    (tmp_path / "clients.parquet").unlink()
    assert unlisted(tmp_path)
    shutil.rmtree(tmp_path / "runs" / "digits--domain--local--s1")
    assert not unlisted(tmp_path)
    assert not unlisted(tmp_path / "nothing")


def test_columns_bear_the_data_set_only_where_there_are_several(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", settings=("domain",), methods=("local",), seeds=(0,), rounds=2)
    assert [run.column for run in load_runs(tmp_path / "a")] == ["domain"]
    two = ("digits", "mnist5k")
    write_folder(
        tmp_path / "b", settings=("domain",), methods=("local",), seeds=(0,), rounds=2, data=two
    )
    assert [run.column for run in load_runs(tmp_path / "b")] == ["digits/domain", "mnist5k/domain"]


def test_the_weights_of_every_round_are_read(tmp_path: Path) -> None:
    write_folder(
        tmp_path, settings=("domain",), methods=("fedmerge", "local"), seeds=(0,), rounds=6
    )
    ours, local = load_runs(tmp_path)
    history = load_history(ours)
    assert history is not None
    rounds, weights = history
    assert rounds.tolist() == [2, 4, 6]
    assert weights.shape == (3, 32, 2, 5)
    np.testing.assert_allclose(weights[-1], ours.weights, atol=1e-6)
    assert load_history(local) is None


def test_weights_of_another_run_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "domain", "fedmerge", 0, 4)
    (run,) = load_runs(tmp_path)
    assert run.path is not None
    path = run.path / "weights.npz"
    np.savez(path, rounds=np.array([2]), weights=np.ones((1, 3, 2, 5), np.float32))
    with pytest.raises(StateError, match=r"weights.npz: .*weights have shape \(1, 3, 2, 5\)"):
        load_history(run)
    path.write_bytes(b"PK")
    with pytest.raises(StateError, match=r"weights.npz: cannot be read"):
        load_history(run)


# ---- folders that cannot be read


def test_a_folder_of_another_version_says_what_to_do(tmp_path: Path) -> None:
    write_run(tmp_path, "domain", "local", 0, 2)
    path = tmp_path / "comparison.json"
    path.write_text('{"format": 6}')
    with pytest.raises(StateError, match=r"format 6, wanted 7; .*new --out") as caught:
        load_runs(tmp_path)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(StateError, match=r"no comparison.json .*another version .*new --out"):
        load_runs(tmp_path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"at": "middle"}, 'line 1: .*got at = "middle"'),
        ({"model": "soup"}, 'line 1: .*model = "soup"'),
        ({"accuracy": "high"}, "line 1: .*could not convert"),
    ],
)
def test_a_row_that_makes_no_sense_is_named(
    tmp_path: Path, change: dict[str, object], part: str
) -> None:
    write_folder(tmp_path, settings=("domain",), methods=("local",), seeds=(0,), rounds=2)
    path = tmp_path / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StateError, match=f"results.jsonl, {part}"):
        load_runs(tmp_path)


def test_a_damaged_table_of_clients_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, settings=("domain",), methods=("local",), seeds=(0,), rounds=2)
    (tmp_path / "clients.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(StateError, match=r"clients.parquet: cannot be read .*fedmerge report"):
        load_runs(tmp_path)


def test_null_for_a_loss_is_a_model_that_diverged(tmp_path: Path) -> None:
    write_folder(tmp_path, settings=("domain",), methods=("local",), seeds=(0,), rounds=4)
    (path,) = tmp_path.glob("runs/*/result.json")
    lines = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
    lines[-1]["metrics"]["merged"]["test"]["loss"] = None
    (path.parent / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    text = "\n".join(json.dumps(row | {"loss": None}) for row in rows)
    (tmp_path / "results.jsonl").write_text(text)
    (run,) = load_runs(tmp_path)
    assert math.isnan(run.last.models["merged"].loss or 0.0)
    assert math.isnan(run.log[-1].loss["merged"])
    assert "merged" not in run.log[0].loss  # not evaluated
    entry = comparison([run], metric="loss").entries["local", "domain"]
    assert (entry.diverged, entry.divergence) == (1, "diverged on 1 of 1 seed")
    # Of its answers some are right by chance: they are no accuracy, though that decides there.
    (said,) = notices([run], ())
    assert "Not every run stayed finite: local in domain diverged on 1 of 1 seed." in said
    assert comparison([run]).entries["local", "domain"].divergence == entry.divergence
