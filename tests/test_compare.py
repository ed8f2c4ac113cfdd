"""Comparisons: cells, the worker processes, what is on disk, and what a kill leaves.

The statistics and the page are tested with the report.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedmerge.cli import app
from fedmerge.compare.cells import Cell, cell_name, make_cells, parse_names, parse_seeds
from fedmerge.compare.folder import (
    FORMAT,
    check_beside,
    check_examples,
    locked,
    write_config,
    write_result,
)
from fedmerge.compare.runner import Crew, Outcome
from fedmerge.comparison import run_cell
from fedmerge.config import load_config
from fedmerge.errors import ConfigError, MissingExtraError, StateError

SOURCE = Path(__file__).parents[1] / "src"
ROWS = (
    "data setting method seed at model round accuracy accuracy_std accuracy_error "
    "accuracy_worst_decile auc loss "
    "better_than_local better_than_fedavg gap_train gap_test rounds seconds bytes_up bytes_down "
    "chosen cost_down cost_up cost_client cost_server cost_server_per_client cost_passes"
)
TINY = ("--clients", "4", "--rounds", "2", "--epochs", "1", "--hidden", "4", "--workers", "2")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# -- cells and names -------------------------------------------------------------------------------


def test_cells_have_safe_names() -> None:
    name = cell_name("digits", "concept-mix", "ifca-warm:d=8", 0)
    assert name == "digits--concept-mix--ifca-warm-d=8--s0"
    assert cell_name("/x y/é z.csv/", "a/b", "x:k=../é y", 12) == "__z.csv--a_b--x-k=..___y--s12"
    name = cell_name("hub:path=/a/b c:x=img", "flwr:P:alpha=1", "local", 3)
    assert name == "hub-path=b_c-x=img--flwr-P-alpha=1--local--s3"
    assert cell_name(r"C:\data\own", "natural", "local", 0) == "C-own--natural--local--s0"


def test_cells_come_in_the_order_asked_for() -> None:
    def configure(data: str, setting: str, method: str, seed: int) -> dict[str, Any]:
        return {"data": data, "setting": setting, "method": method, "seed": seed, "rounds": 3}

    pairs = [("q", "b"), ("p", "a"), ("p", "b")]
    cells = make_cells(configure, pairs, ["y", "x"], [2, 1])
    keys = ("data", "setting", "method", "seed")
    found = [tuple(cell.config[key] for key in keys) for cell in cells]
    assert found == [(*pair, m, n) for pair in pairs for m in "yx" for n in (2, 1)]
    assert {c.config["rounds"] for c in cells} == {3}
    assert cells[0].folder(Path("o")) == Path("o/runs/q--b--y--s2")
    with pytest.raises(ConfigError, match='methods "y:z" and "y-z" would share the folder'):
        make_cells(configure, pairs, ["y:z", "y-z"], [0])
    with pytest.raises(ConfigError, match=r'data sets "m/d\.csv" and "n/d\.csv" would share'):
        make_cells(configure, [("m/d.csv", "a"), ("n/d.csv", "a")], ["y"], [0])


def test_seeds() -> None:
    assert parse_seeds("0-4") == (0, 1, 2, 3, 4)
    assert parse_seeds("7, 3,0-1") == (7, 3, 0, 1)
    for text in ("", "1,", "a", "3-1", "-1", "1.5", "0-99999", "9" * 5000):
        with pytest.raises(ConfigError, match="--seeds: got"):
            parse_seeds(text)
    with pytest.raises(ConfigError, match='--seeds: "3" is there twice'):
        parse_seeds("0-4,3")


def test_names() -> None:
    assert parse_names("--methods", "b, a:k=1", list) == ("b", "a:k=1")
    lists = "flwr:Size:partition_sizes=[40,30]", "flwr:Shard:x=[[1,2],[3,4]]", "natural"
    assert parse_names("--settings", ",".join(lists), list) == lists
    assert parse_names("--methods", "all", lambda: ["x", "y"]) == ("x", "y")
    assert parse_names("--settings", "all,natural", lambda: ["x", "y"]) == ("x", "y", "natural")
    with pytest.raises(ConfigError, match='--methods: "a" is there twice'):
        parse_names("--methods", "a,b,a", list)
    with pytest.raises(ConfigError, match='--settings: got "a,,b", wanted names'):
        parse_names("--settings", "a,,b", list)


# -- worker processes ------------------------------------------------------------------------------


def work(config: dict[str, Any], folder: Path) -> None:
    """A cell that does what its method says."""
    match config["method"]:
        case "raise":
            raise StateError("first line\nsecond line")
        case "bug":
            raise KeyError("lost")
        case "words":
            raise RuntimeError("boom\nin two lines")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "killed once":
            if not (folder.parent / "killed").exists():
                (folder.parent / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "slow":
            time.sleep(0.3)
        case "first":  # ends once one of those that came later has begun
            until(folder.parent / "begun")
        case "later":  # ends once that has ended
            (folder.parent / "begun").touch()
            until(folder.parent / "first-1")
            time.sleep(0.2)
        case "forever":
            time.sleep(60)
    folder.mkdir(parents=True)
    (folder / "pid").write_text(str(os.getpid()))


def until(path: Path) -> None:
    """Wait for what another process writes."""
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def cells_of(*methods: str) -> list[Cell]:
    return [
        Cell(f"{method}-{i}", {"setting": "s", "method": method, "seed": i})
        for i, method in enumerate(methods)
    ]


def pids_of(crew: Crew) -> list[int]:
    return [worker.process.pid for worker in crew._workers if worker.process.pid]


def run(cells: list[Cell], out: Path, size: int) -> list[Outcome]:
    with Crew(work, size) as crew:
        return list(crew.run(cells, out))


def test_workers_live_for_many_cells(tmp_path: Path) -> None:
    outcomes = run(cells_of(*["fine"] * 6), tmp_path, 2)
    assert all(outcome.error is None for outcome in outcomes)
    pids = {(o.cell.folder(tmp_path) / "pid").read_text() for o in outcomes}
    assert len(outcomes) == 6
    assert len(pids) <= 2
    assert str(os.getpid()) not in pids


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("raise", "first line second line"),
        ("bug", "KeyError: 'lost'"),
        ("words", "RuntimeError: boom in two lines"),
        ("killed", "its process was killed by signal 9"),
        ("exit", "its process ended with exit code 3"),
    ],
)
def test_a_cell_that_fails_is_named_and_the_others_finish(
    tmp_path: Path, method: str, error: str
) -> None:
    outcomes = run(cells_of("fine", method, "fine", "fine"), tmp_path, 1)
    assert [(o.cell.name, o.error) for o in outcomes if o.error] == [(f"{method}-1", error)]
    assert sum(o.error is None for o in outcomes) == 3
    details = next(o.details for o in outcomes if o.error)
    assert ("Traceback" in details) == (method in ("raise", "bug", "words"))


def test_a_cell_whose_process_was_killed_is_tried_once_more(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    outcomes = run(cells_of("fine", "killed once", "fine"), tmp_path, 1)
    assert sorted(o.cell.name for o in outcomes) == ["fine-0", "fine-2", "killed once-1"]
    assert all(o.error is None for o in outcomes)
    assert (tmp_path / "runs" / "killed").exists()


def test_the_longest_cells_go_first(tmp_path: Path) -> None:
    cells = cells_of("fine", "slow", "fine", "slow")
    outcomes = run(cells, tmp_path, 1)
    # One of each kind to learn their times, then the slow one.
    assert [o.cell.name for o in outcomes] == ["fine-0", "slow-1", "slow-3", "fine-2"]


def test_cells_that_become_ready_are_run_and_keep_all_workers_busy(tmp_path: Path) -> None:
    there = cells_of("slow", "first")
    later = [Cell(f"later-{i}", {**there[0].config, "method": "later"}) for i in range(8)]
    told: list[str] = []

    def after(outcome: Outcome) -> list[Cell]:
        told.append(outcome.cell.name)
        return later if outcome.cell.name == "slow-0" else []

    with Crew(work, 2) as crew:
        outcomes = list(crew.run(there, tmp_path, after))
    names = [outcome.cell.name for outcome in outcomes]
    assert names == told
    assert sorted(names) == sorted(cell.name for cell in (*there, *later))
    # They began while the other worker was at work on what was there from the start.
    assert [outcome.error for outcome in outcomes if outcome.error] == []
    pids = {(cell.folder(tmp_path) / "pid").read_text() for cell in later}
    assert len(pids) == 2


def test_another_setting_tells_how_long_a_method_takes(tmp_path: Path) -> None:
    cells = [
        Cell(f"{method}-{setting}", {"data": "d", "setting": setting, "method": method})
        for setting in "ab"
        for method in ("fine", "slow")
    ]
    assert [o.cell.name for o in run(cells, tmp_path, 1)] == [
        "fine-a",
        "slow-a",
        "slow-b",
        "fine-b",
    ]


def test_leaving_the_crew_ends_its_processes_at_once(tmp_path: Path) -> None:
    with Crew(work, 2) as crew:
        outcomes = crew.run(cells_of("fine", "forever", "forever"), tmp_path)
        next(outcomes)
        pids = pids_of(crew)
    assert len(pids) == 2
    assert not any(map(alive, pids))


def test_ctrl_c_is_the_parents_matter_from_the_first_moment() -> None:
    with Crew(work, 1) as crew:
        (pid,) = pids_of(crew)
        for _ in range(5):
            os.kill(pid, signal.SIGINT)
            time.sleep(0.1)
        assert alive(pid)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from test_compare import Crew, cells_of, pids_of, work
if __name__ == "__main__":
    with Crew(work, 1) as crew:
        print(*pids_of(crew), flush=True)
        next(crew.run(cells_of("forever"), Path({str(tmp_path)!r})))
"""
    (tmp_path / "parent.py").write_text(code)
    path = os.pathsep.join([str(SOURCE), str(Path(__file__).parent)])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert parent.stdout is not None
    with parent.stdout as output:
        worker = int(output.readline())
    time.sleep(0.5)
    assert alive(worker)
    parent.kill()
    parent.wait()
    assert gone([worker])


def test_a_worker_that_died_while_idle_is_replaced(tmp_path: Path) -> None:
    with Crew(work, 1) as crew:
        for worker in crew._workers:
            worker.process.kill()
            worker.process.join()
        outcomes = list(crew.run(cells_of("fine"), tmp_path))
    assert [o.error for o in outcomes] == [None]


# -- the command -----------------------------------------------------------------------------------


def test_results_are_complete_and_in_the_order_asked_for(tmp_path: Path) -> None:
    names = ("--settings", "domain,concept-mix", "--methods", "fedmerge:d=2,fedavg")
    result = call("compare", *names, "--seeds", "1,0", *TINY, "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    rows = read_rows(tmp_path)
    assert all(" ".join(row) == ROWS for row in rows)
    assert [(r["setting"], r["method"], r["seed"], r["at"], r["model"]) for r in rows] == [
        (setting, method, seed, at, model)
        for setting in ("domain", "concept-mix")
        for method in ("fedmerge:d=2", "fedavg")
        for seed in (1, 0)
        for at in ("last", "best")
        for model in ("merged", "tuned", "local")
    ]
    assert {(r["data"], json.dumps(r["chosen"])) for r in rows} == {("digits", "{}")}
    stored = tmp_path / "runs" / "digits--domain--fedmerge-d=2--s1" / "result.json"
    expected = json.loads(stored.read_text())["models"]["tuned"]
    assert rows[1]["accuracy"] == expected["accuracy"]
    assert rows[1]["accuracy_worst_decile"] == expected["accuracy_worst_decile"]
    assert rows[1]["loss"] == expected["loss"]
    assert (tmp_path / "report.html").is_file()
    assert f"The page is {tmp_path / 'report.html'}" in result.stdout
    assert "FedMerge" in result.stdout
    told = ("was ahead", "were level", "no setting in which another method")
    assert any(text in result.stdout for text in told)

    # How each method fares over all settings, and what it costs.
    part = result.stdout.split("Over all settings")[1]
    shown = {line.split()[0]: line.split() for line in part.splitlines() if line[:5] == "  fed"}
    mean: dict[tuple[str, str], float] = {}
    for row in rows:
        if (row["at"], row["model"]) == ("last", "merged"):
            key = row["setting"], row["method"]
            mean[key] = mean.get(key, 0.0) + row["accuracy"] / 2
    for method, other in (("fedavg", "fedmerge:d=2"), ("fedmerge:d=2", "fedavg")):
        ahead = [mean[s, other] - mean[s, method] for s in ("domain", "concept-mix")]
        assert shown[method][1] == f"{max(0.0, *ahead):.3f}"
        rank = sum(1 + (d > 1e-12) + 0.5 * (abs(d) <= 1e-12) for d in ahead) / 2
        assert shown[method][-7] == f"{rank:.1f}"
    # down, up, client, server, per client, passes
    assert shown["fedavg"][-6:] == ["1", "1", "0", "1", "0", "1"]
    # Beside 2 models and their means, what is kept of 4 peers: sketches of 2 blocks, and 2 rows for
    # each of these.
    peers = 4 * 2 * (2 * 4 * 256 + 2 * 8 * 2 + 8) / (4 * 310)
    heading = 2 * (2 * 4 * 256 + 8) / (4 * 310)
    assert shown["fedmerge:d=2"][-6:-2] == ["1", "1", "0", f"{4 + peers + heading:.2g}"]

    # The page is an extra: without it, all the rest is there.
    def missing(_: Path) -> Path:
        raise MissingExtraError("report")

    (tmp_path / "results.jsonl").unlink()
    todo: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fedmerge.comparison.check_cells", lambda cells, quiet, out: todo.extend(cells)
        )
        patch.setattr("fedmerge.compare.screen.write_report", missing)
        again = call("compare", *names, "--seeds", "1,0", *TINY, "--out", tmp_path)
    assert again.exit_code == 0
    assert not todo
    assert 'pip install "fedmerge[report]"' in again.stdout
    assert read_rows(tmp_path) == rows

    # Another setting of a cell that is there stops everything before it starts.
    names = ("--settings", "dirichlet,domain", "--methods", "fedavg", "--seeds", "0")
    other = call("compare", *names, *TINY, "--lr", "0.2", "--out", tmp_path)
    assert other.exit_code == 2
    assert "digits--domain--fedavg--s0 holds a run with other settings: lr is 0.3" in other.stderr
    assert not (tmp_path / "runs" / "digits--dirichlet--fedavg--s0").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("domain", "fedavg,fedmerg"), 'there is no method "fedmerg"; did you mean "fedmerge"?'),
        (("domains", "fedavg"), 'setting "domains": unknown; did you mean "domain'),
        (("domain", "fedavg,ifca:d=5"), "d = 5 models for 4 clients"),
        (("domain", "fedavg,fedavg"), '"fedavg" is there twice'),
    ],
)
def test_what_cannot_run_is_said_before_anything_starts(
    tmp_path: Path, arguments: tuple[str, str], message: str
) -> None:
    names = ("--settings", arguments[0], "--methods", arguments[1], "--seeds", "0")
    result = call("compare", *names, *TINY, "--out", tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}  # the folder is not claimed


def one_killed(config: dict[str, Any], folder: Path) -> None:
    if config["seed"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    run_cell(config, folder)


def test_a_killed_worker_is_told_at_the_end(tmp_path: Path) -> None:
    names = (
        "--data",
        "gaussian",
        "--settings",
        "dirichlet",
        "--methods",
        "fedavg",
        "--seeds",
        "1,0",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmerge.comparison.run_cell", one_killed)
        result = call("compare", *names, *TINY, "--workers", "1", "--out", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "fedmerge: gaussian--dirichlet--fedavg--s1: its process was killed by signal 9",
        f"fedmerge: 1 of 2 cells failed; the others are kept in {tmp_path}, "
        "and the same command runs only those that failed again",
    ]
    assert [row["seed"] for row in read_rows(tmp_path)] == [0] * 6


@pytest.mark.parametrize(
    ("name", "value"),
    [("rounds", "3"), ("lr", "0.9"), ("clients", "5"), ("train_fraction", "0.4"), ("hidden", "5")],
)
def test_methods_are_compared_after_equal_training_only(
    tmp_path: Path, name: str, value: str
) -> None:
    names = ("--settings", "domain", "--seeds", "0", *TINY, "--out", tmp_path)
    made = tmp_path / "runs" / "digits--domain--fedavg--s0"
    config = load_config(
        None,
        {"setting": "domain", "clients": 4, "rounds": 2, "epochs": 1, "hidden": 4},
    ).model_dump(mode="json")
    facts = {"format": FORMAT, "trials": 0, "tuning_seeds": []}
    (tmp_path / "comparison.json").write_text(json.dumps(facts))
    write_config(made, {**config, "method": "fedavg", "evaluate_every": 2, "threads": 2})
    option = f"--{name.replace('_', '-')}"
    result = call("compare", "--methods", "local", *names, option, value)
    assert result.exit_code == 2
    assert result.stderr == (
        f"fedmerge: {made} holds a run with other settings: {name} is {config[name]} there and "
        f"{value} here; methods are compared after equal training only, so choose another --out\n"
    )
    # Runs of another setting are compared with others; what is not of the training may differ.
    own = {**config, "method": "local", "seed": 5, "chosen": "lr=0.1", "track": "tensorboard"}
    check_beside(tmp_path, [own, {**own, "setting": "dirichlet", name: json.loads(value)}])


def test_seeds_beyond_what_files_hold_are_refused_first(tmp_path: Path) -> None:
    names = ("--settings", "domain", "--methods", "fedavg", *TINY, "--out", tmp_path / "x")
    result = call("compare", *names, "--seeds", 2**63)
    assert (result.exit_code, result.stderr) == (
        2,
        "fedmerge: seed: got 9223372036854775808, wanted a whole number of at least 0 and at most "
        "9223372036854775807\n",
    )
    assert not (tmp_path / "x").exists()
    result = call("compare", *names, "--seeds", 2**63 - 1)
    assert (result.exit_code, result.stderr) == (0, "")
    assert read_rows(tmp_path / "x")[0]["seed"] == 2**63 - 1


def test_what_is_said_of_a_damaged_file_helps(tmp_path: Path) -> None:
    """Each piece of advice is followed to the letter; only a run that lost a file is run again."""
    names = ("--data", "gaussian", "--settings", "concept", "--methods", "fedavg", "--seeds", "0-1")
    tuning = ("--trials", "1", "--tuning-seeds", "1000")
    compare = ("compare", *names, *TINY, *tuning, "--workers", "1", "--out", tmp_path)
    report = ("report", tmp_path)
    runs = [tmp_path / "runs" / f"gaussian--concept--fedavg--s{seed}" for seed in (0, 1)]
    choice = tmp_path / "tuning" / "gaussian--concept--fedavg.json"
    facts = tmp_path / "comparison.json"

    def cut(path: Path, *command: object) -> str:
        """Damage `path`; return what the command says of it."""
        path.write_bytes(path.read_bytes()[:20])
        result = call(*command)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert str(path) in result.stderr
        return result.stderr

    def mended(*command: object, again: int = 0) -> None:
        """Follow the advice: the command works, and runs so many of the runs again."""
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/result.json")}
        result = call(*command)
        assert (result.exit_code, result.stderr) == (0, "")
        assert all((run / "result.json").is_file() for run in runs)
        after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/result.json")}
        assert sum(before.get(path) != time for path, time in after.items()) == again
        assert call(*report).exit_code == 0
        assert {row["seed"] for row in read_rows(tmp_path)} == {0, 1}

    assert call(*compare).exit_code == 0
    whole = facts.read_text()
    tables = {name: (tmp_path / name).read_bytes() for name in ("results.jsonl", "clients.parquet")}
    for name in tables:
        said = cut(tmp_path / name, *report)
        assert "remove it, and `fedmerge report` writes it anew from the runs" in said
        (tmp_path / name).unlink()
        mended(*report)
        assert (tmp_path / name).read_bytes() == tables[name]

    # comparison.json, damaged and lost.
    told = f"write {whole.strip()} into {facts}"
    for lose in (False, True):
        assert "`fedmerge compare` with the options that made it says how" in cut(facts, *report)
        assert told in cut(facts, *compare)
        if lose:
            facts.unlink()
            assert "to be told how to mend it" in call(*report).stderr
            assert told in call(*compare).stderr
        facts.write_text(whole)
        mended(*compare)

    # Files of a run: its settings, also of one that is not asked for, and its result.
    for command in (compare, (*compare, "--seeds", "0")):
        assert f"remove {runs[1]} to run it again" in cut(runs[1] / "config.json", *command)
        assert "delete its run folder and run it again" in call(*report).stderr
        shutil.rmtree(runs[1])
        mended(*compare, again=1)
    assert "remove it or choose another --out" in cut(runs[0] / "result.json", *compare)
    (runs[0] / "result.json").unlink()
    mended(*compare, again=1)

    # What tuning chose.
    assert "remove it, and give the command of the comparison again" in cut(choice, *report)
    assert "remove it or choose another --out" in cut(choice, *compare)
    choice.unlink()
    mended(*compare)


def test_a_folder_is_one_comparisons_at_a_time(tmp_path: Path) -> None:
    names = ("--data", "gaussian", "--settings", "concept", "--methods", "fedavg", "--seeds", "0")
    with locked(tmp_path):
        result = call("compare", *names, *TINY, "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (
        2,
        f"fedmerge: another comparison is running in {tmp_path}; wait for its end, or choose "
        "another --out\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert call("compare", *names, *TINY, "--out", tmp_path).exit_code == 0
    with locked(tmp_path):  # who only reads need not wait
        assert call("report", tmp_path).exit_code == 0


def test_why_cells_failed_is_said_though_tables_fail_too(tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "clients.parquet")

    names = ("--data", "gaussian", "--settings", "concept", "--methods", "fedavg", "--seeds", "0-1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmerge.comparison.run_cell", one_killed)
        patch.setattr("fedmerge.compare.results.write_bytes", full)
        result = call("compare", *names, *TINY, "--workers", "1", "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "fedmerge: gaussian--concept--fedavg--s1: its process was killed by signal 9",
        "fedmerge: clients.parquet: No space left on device; what is written stays whole",
    ]


# -- kills and Ctrl-C ------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def family(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(entry.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry.parent.name))
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_and_stopped_comparisons_go_on(tmp_path: Path) -> None:
    arguments = ["compare", "--data", "gaussian", "--settings", "concept", "--seeds", "0-1"]
    arguments += ["--methods", "fedavg,fedmerge:d=2", "--clients", "8", "--rounds", "30"]
    arguments += ["--out", str(tmp_path)]

    def start(workers: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fedmerge", *arguments, "--workers", workers],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            start_new_session=True,
        )

    def finished() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/result.json")}

    # Killed: nobody is left behind, and what is finished stays; nor does the folder stay locked.
    process = start("1")
    wait_until(lambda: len(finished()) >= 1, process)
    assert "another comparison is running in" in call(*arguments, "--workers", "1").stderr
    workers = family(process.pid)
    assert workers
    process.kill()
    process.communicate()
    assert gone(workers)
    kept = finished()
    assert 1 <= len(kept) < 4

    # Ctrl-C, as a terminal sends it: to all processes.
    process = start("2")
    wait_until(lambda: len(finished()) > len(kept), process)
    workers = family(process.pid)
    assert len(workers) >= 2
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("fedmerge: stopped; ")
    assert f"of 4 cells are finished and kept in {tmp_path}; the same command goes on" in errors
    assert errors.count("\n") == 1
    assert gone(workers)

    # Started again, it ends, and runs nothing twice.
    kept = finished()
    result = call(*arguments, "--workers", "1")
    assert result.exit_code == 0, result.stderr
    assert len(read_rows(tmp_path)) == 24
    assert {path: finished()[path] for path in kept} == kept


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_shows_what_is_waited_for_and_then_the_cells(
    tmp_path: Path, quiet: bool
) -> None:
    pty = pytest.importorskip("pty")
    arguments = ("compare", "--settings", "domain", "--methods", "local", "--seeds", "0")
    sizes = (
        "--rounds",
        "1",
        "--clients",
        "4",
        "--out",
        str(tmp_path / "out"),
        *["--quiet"] * quiet,
    )
    ours, theirs = pty.openpty()
    shown = b""
    with subprocess.Popen(
        [sys.executable, "-m", "fedmerge", *arguments, *sizes],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        with suppress(OSError):  # of a terminal that nobody holds any more
            while part := os.read(ours, 1 << 16):
                shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    assert b"The page is" in shown
    waited, counted = b"digits, domain: loading" in shown, b"1/1" in shown
    assert (waited, counted) == (not quiet, not quiet)


def test_what_a_method_of_ones_own_raises_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_method.py").write_text(
        "from dataclasses import dataclass\nfrom fedmerge import FedAvg\n"
        "@dataclass(frozen=True)\nclass Boom(FedAvg):\n    name = 'boom'\n"
        "    def shared(self, setup):\n        raise KeyError('lost')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("--settings", "concept", "--methods", "own_method.Boom", "--seeds", "0")
    result = call("compare", *names, "--data", "gaussian", *TINY, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "own_method.Boom in gaussian/concept: KeyError: 'lost'" in result.stderr


# -- data that have changed ------------------------------------------------------------------------


def write_table(path: Path, *, clients: int = 3, shift: float = 0.0, label: int = 0) -> None:
    lines = ["client,a,b,label"]
    for i in range(20 * clients):
        a, b = (i * 37 % 101) / 50 - 1, (i * 61 % 97) / 48 - 1
        lines.append(f"s{i % clients},{a + shift},{b},{int(a + b > 0) ^ (label and i == 7)}")
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("change", [{"shift": 0.01}, {"clients": 4}, {"label": 1}])
def test_methods_are_not_compared_on_data_that_have_changed(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    table, out = tmp_path / "d.csv", tmp_path / "out"

    def compare(methods: str) -> Result:
        data = ("--data", f"table:{table}:y=label", "--settings", "natural", "--seeds", "0")
        plain = ("--rounds", 1, "--lr", 0.1, "--hidden", 4, "--workers", 1, "--quiet")
        return call("compare", *data, "--methods", methods, *plain, "--out", out)

    write_table(table)
    assert compare("fedavg").exit_code == 0
    write_table(table, **change)
    refused = compare("fedavg,local")
    assert refused.exit_code == 2
    assert "was run with other examples than table:" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert [row["method"] for row in read_rows(out) if row["at"] == "last"].count("local") == 0
    write_table(table)
    assert compare("fedavg,local").exit_code == 0


def test_examples_that_another_processor_has_rounded_are_the_same(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    now = {"digest": "d", "sums": [1e-4, 5.0], "sizes": [300.0, 7.0]}
    write_config(run, {"data": "x", "setting": "s", "seed": 0})
    write_result(run, {"examples": {**now, "sums": [1.3e-4, 5.00001]}})
    check_examples(tmp_path, {("x", "s", 0): now, ("x", "s", 1): None})
    write_result(run, {"examples": {**now, "sums": [1e-4, 5.001]}})
    with pytest.raises(StateError, match="other examples than x has now"):
        check_examples(tmp_path, {("x", "s", 0): now})
    check_examples(tmp_path, {("x", "s", 1): now})
    write_result(run, {"examples": {"digest": "d"}})  # damaged
    with pytest.raises(StateError, match="other examples than x has now"):
        check_examples(tmp_path, {("x", "s", 0): now})
    write_result(run, {})  # of a version that did not keep it
    check_examples(tmp_path, {("x", "s", 0): now})


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ("{'lr': 0.1}", "its grid is {'lr': 0.1}, wanted points in a row; write e.g. grid = ("),
        ("({'lr': 'high'},)", "own_grid.Odd in gaussian/concept: TypeError: "),
    ],
)
def test_a_grid_of_ones_own_that_cannot_be_tried_is_told_in_a_line(
    grid: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_grid.py").write_text(
        "from dataclasses import dataclass\nfrom fedmerge import FedAvg\n"
        f"@dataclass(frozen=True)\nclass Odd(FedAvg):\n    name = 'odd'\n    grid = {grid}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_grid", raising=False)
    names = ("--settings", "concept", "--methods", "own_grid.Odd", "--seeds", "0", "--trials", "2")
    result = call("compare", *names, "--data", "gaussian", *TINY, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert told in result.stderr
