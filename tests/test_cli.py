"""The command line as a user meets it: options, messages, exit codes, kills and Ctrl-C.

What a run computes is tested elsewhere; here it only has to be the same after an interruption.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from fedmerge.cli import app
from fedmerge.compare.cells import Cell
from fedmerge.comparison import check_cells
from fedmerge.config import RunConfig, load_config
from fedmerge.data import DataWarning, make_federation
from fedmerge.errors import MissingExtraError

SOURCE = Path(__file__).parents[1] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}
TINY = ("--clients", "4", "--rounds", "2", "--epochs", "1", "--hidden", "4")
LONG = ("--data", "gaussian", "--setting", "concept", "--clients", "8", "--method", "fedmerge:d=3")


def command(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedmerge", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,  # a terminal sends Ctrl-C to a whole group of processes
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Return exit code, output and lines of errors."""
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors.splitlines()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("seconds", "execution")}


# -- the process as a whole ------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from fedmerge.cli import app
from fedmerge.compare.cells import Cell
try:
    app(["--help"])
finally:
    print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert "compare" in done.stdout
    loaded = done.stdout.splitlines()[-1].split()
    assert not {"torch", "numpy", "sklearn", "scipy", "matplotlib"} & set(loaded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--round", "3"], 'unknown option "--round"; did you mean "--rounds"?'),
        (["run", "--rounds", "0"], 'rounds: got "0", wanted a whole number of at least 1'),
        (["run", "--out", ""], "Invalid value for '--out': got \"\", wanted a path"),
        (["compare", "--out", ""], "Invalid value for '--out': got \"\", wanted a path"),
        (["runn"], "No such command 'runn'. Did you mean 'run'?"),
    ],
)
def test_a_slip_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, output, errors = finish(command(*arguments))
    assert (code, output, len(errors)) == (2, "", 1)
    assert errors[0].startswith(f"fedmerge: {message}")
    assert errors[0].count("Did you mean") <= 1


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output, errors = finish(command("run", *TINY, "--out", tmp_path / "file" / "x"))
    assert (code, output, len(errors)) == (2, "", 1)
    assert "cannot be written (Not a directory); choose another folder" in errors[0]


def test_a_run_in_the_folder_of_a_comparison_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text("{}")
    result = call("run", *TINY, "--out", tmp_path, "--quiet")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"--out {tmp_path} holds a comparison, wanted a run or nothing" in result.stderr
    assert "choose another folder" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.json"]


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("run", *LONG, "--rounds", "40", "--out", out, "--checkpoint-seconds", "0")
    process = command(*arguments)
    wait_until(lambda: len(lines(out / "log.jsonl")) >= 8, process)
    process.kill()
    finish(process)
    assert not (out / "result.json").exists()
    before = lines(out / "log.jsonl")
    with (out / "log.jsonl").open("a") as file:
        file.write('{"round": 9, "coh')  # as a kill in the middle of a write leaves it

    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    after = lines(out / "log.jsonl")
    assert [json.loads(line)["round"] for line in after] == list(range(1, 41))
    # Rounds that were done are not done again: they hold the times of the first process.
    assert after[:7] == before[:7]

    whole = tmp_path / "whole"
    assert call("run", *LONG, "--rounds", "40", "--out", whole).exit_code == 0
    resumed, straight = (json.loads((f / "result.json").read_text()) for f in (out, whole))
    assert timeless(resumed) == timeless(straight)
    for one, other in zip(after, lines(whole / "log.jsonl"), strict=True):
        assert timeless(json.loads(one)) == timeless(json.loads(other))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_a_run_and_says_so(tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    process = command("run", *LONG, "--rounds", "400", "--out", out)
    wait_until(lambda: len(lines(out / "log.jsonl")) >= 3, process)
    os.killpg(process.pid, number)
    code, _, errors = finish(process)
    assert (code, len(errors)) == (130, 1)
    assert errors[0].startswith("fedmerge: stopped after round ")
    assert f"{out} keeps what was done, and the same command goes on from there" in errors[0]
    kept = json.loads((out / "checkpoint" / "state.json").read_text())["facts"]["history"]
    assert len(kept) >= 3


# -- options ---------------------------------------------------------------------------------------

OTHER: dict[str, object] = {
    "data": "gaussian",
    "setting": "domain",
    "method": "ifca:d=2",
    "chosen": "lr=0.25:warm=2",
    "model": "cnn",
    "hidden": 7,
    "clients": 9,
    "train_fraction": 0.6,
    "rounds": 11,
    "participation": 0.5,
    "dropout": 0.25,
    "epochs": 3,
    "lr": 0.2,
    "batch_size": 8,
    "momentum": 0.5,
    "weight_decay": 0.01,
    "clip": 0.125,
    "seed": 13,
    "evaluate_every": 2,
    "evaluate_on": 0.5,
    "execution": "sequential",
    "workers": 3,
    "address": "auto",
    "threads": 2,
    "track": "tensorboard",
}


NAMED = ("data", "setting", "method", "chosen", "seed", "workers", "address")
"""Settings that `fedmerge compare` has no option for, or another one."""


def options(values: dict[str, object]) -> list[str]:
    return [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Catch the settings with which `fedmerge run` would run."""
    caught: list[RunConfig] = []

    def stop(config: RunConfig, *_: object) -> None:
        caught.append(config)
        raise MissingExtraError("none")

    monkeypatch.setattr(RunConfig, "run", stop)
    return caught


def test_every_setting_is_an_option_of_run(asked: list[RunConfig]) -> None:
    assert OTHER.keys() == RunConfig.model_fields.keys()
    call("run", *options(OTHER))
    assert asked[0].model_dump() == OTHER


def test_options_override_the_file(asked: list[RunConfig], tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("rounds = 7\nlr = 0.5\n")
    call("run", tmp_path / "c.toml", "--rounds", "8")
    assert asked[0] == load_config(None, {"rounds": 8, "lr": 0.5})


def test_every_other_setting_is_an_option_of_compare(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caught: list[Any] = []

    class NoCrew:
        def __init__(self, work: object, size: int, prepare: object) -> None:
            caught.append(size)

        def __enter__(self) -> NoCrew:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def run(self, cells: Any, out: Path, after: object) -> list[Any]:
            caught.extend(cells)
            return []

    monkeypatch.setattr("fedmerge.compare.runner.Crew", NoCrew)
    monkeypatch.setattr("fedmerge.comparison.check_cells", lambda cells, quiet, out: None)
    own = {key: value for key, value in OTHER.items() if key not in NAMED}
    names = ("--data", f"gaussian,{tmp_path / 'own.csv'}", "--settings", "domain,natural")
    names += ("--methods", "fedavg", "--seeds", "3,5")
    result = call("compare", *names, "--out", tmp_path, "--workers", "2", *options(own))
    assert result.exit_code == 0, result.stderr
    size, *cells = caught
    assert size == 2
    # What has no clients of its own does not go with the setting "natural".
    assert [cell.name for cell in cells] == [
        "gaussian--domain--fedavg--s3",
        "gaussian--domain--fedavg--s5",
        "own.csv--domain--fedavg--s3",
        "own.csv--domain--fedavg--s5",
        "own.csv--natural--fedavg--s3",
        "own.csv--natural--fedavg--s5",
    ]
    for cell in cells:
        named = {key: cell.config[key] for key in NAMED}
        assert named["workers"] is None  # --workers is that of the comparison itself
        assert named["chosen"] is None
        assert named["address"] is None
        assert {**own, **named} == cell.config
        data = Path(named["data"]).name
        assert cell.name == f"{data}--{named['setting']}--fedavg--s{named['seed']}"


def test_help_names_every_setting_with_its_default() -> None:
    text = " ".join(call("run", "--help").stdout.replace("│", "").split())
    for name, field in RunConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        default = "none" if field.default is None else field.default
        assert f"(default {default})" in text


# -- run -------------------------------------------------------------------------------------------


def test_run_prints_its_result_and_no_progress_without_a_terminal() -> None:
    result = call("run", *TINY)
    assert (result.exit_code, result.stderr) == (0, "")
    for text in ("accuracy", "worst tenth", "merged", "tuned", "local", "per client and round"):
        assert text in result.stdout


def test_a_profile_says_where_the_time_went(tmp_path: Path) -> None:
    shown = call("run", *TINY, "--profile", "--out", tmp_path)
    assert shown.exit_code == 0, shown.stderr
    found = json.loads((tmp_path / "profile.json").read_text())
    logs = [json.loads(line)["seconds"] for line in lines(tmp_path / "log.jsonl")]
    assert found["rounds"] == len(logs) == 2
    phases = found["phases"]
    for phase in ("send", "local", "fold", "commit", "evaluate"):
        seconds = sum(log[phase] for log in logs)
        assert phases[phase]["seconds"] == pytest.approx(seconds)
        assert phases[phase]["per_round"] == pytest.approx(seconds / 2)
    for phase in ("start", "data", "log", "save", "result", "other"):
        assert phases[phase]["seconds"] > 0
    assert sum(one["seconds"] for one in phases.values()) == pytest.approx(found["seconds"])
    assert sum(one["share"] for one in phases.values()) == pytest.approx(1)
    result = json.loads((tmp_path / "result.json").read_text())
    assert found["execution"] == result["execution"]
    assert result["execution"] in shown.stdout
    for phase in phases:
        assert f"\n  {phase} " in shown.stdout
    again = call("run", *TINY, "--profile", "--out", tmp_path)  # nothing was run, so no profile
    assert "Where the time went" not in again.stdout
    assert json.loads((tmp_path / "profile.json").read_text()) == found


def test_a_finished_run_is_shown_and_not_run_again(tmp_path: Path) -> None:
    first = call("run", *TINY, "--out", tmp_path / "r")
    time_of_result = (tmp_path / "r" / "result.json").stat().st_mtime_ns
    again = call("run", *TINY, "--out", tmp_path / "r")
    assert again.exit_code == 0
    assert "nothing was run again" in again.stdout
    assert again.stdout.endswith(first.stdout)
    assert (tmp_path / "r" / "result.json").stat().st_mtime_ns == time_of_result


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    call("run", *TINY, "--out", tmp_path / "r")
    result = call("run", *TINY, "--lr", "0.25", "--out", tmp_path / "r")
    assert result.exit_code == 2
    assert "lr is 0.3 there and 0.25 here; choose another --out" in result.stderr


def test_settings_that_cannot_be_run_do_not_claim_the_folder(tmp_path: Path) -> None:
    result = call("run", *TINY, "--method", "ifca:d=9", "--out", tmp_path / "r")
    assert result.exit_code == 2
    assert "d = 9 models for 4 clients" in result.stderr
    assert call("run", *TINY, "--out", tmp_path / "r").exit_code == 0


def test_a_cut_checkpoint_is_one_line(tmp_path: Path) -> None:
    call("run", *TINY, "--out", tmp_path)
    (tmp_path / "result.json").unlink()
    (state,) = (tmp_path / "checkpoint").glob("tensors-*")
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    result = call("run", *TINY, "--out", tmp_path)
    assert result.exit_code == 2
    assert "is damaged" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log.jsonl")

    monkeypatch.setattr("fedmerge.compare.folder.append_log", full)
    result = call("run", *TINY, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("fedmerge: log.jsonl: No space left on device")
    assert result.stderr.count("\n") == 1


def test_the_traceback_is_there_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("run", *TINY, "--method", "fedavgg")
    assert "Traceback" not in call(*arguments).stderr
    monkeypatch.setenv("FEDMERGE_DEBUG", "1")
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


# -- data and report -------------------------------------------------------------------------------


def test_data_shows_the_clients_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "p.png"
    result = call("data", "domain", "--clients", "5", "--seed", "1", "--out", picture)
    assert result.exit_code == 0, result.stderr
    assert "digits/domain: 5 clients" in result.stdout
    assert result.stdout.count("rot") + result.stdout.count("invert") == 5
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result.stdout != call("data", "domain", "--clients", "5", "--out", picture).stdout


def test_data_of_an_unknown_setting_is_one_line() -> None:
    result = call("data", "domains")
    assert result.exit_code == 2
    assert 'did you mean "domain' in result.stderr


def test_what_is_odd_about_the_data_is_one_line(tmp_path: Path) -> None:
    """Said by the command, and not again by each of its processes."""
    draws = np.random.default_rng(0)
    (tmp_path / "own").mkdir()
    for name in "ab":
        # One example of each label: some labels are in no training split.
        np.savez(tmp_path / "own" / f"{name}.npz", x=draws.normal(size=(20, 3)), y=np.arange(20))
    names = ("--data", tmp_path / "own", "--settings", "natural", "--methods", "fedavg")
    sizes = ("--rounds", "1", "--epochs", "1", "--hidden", "4", "--seeds", "0-2", "--workers", "1")
    code, _, errors = finish(command("compare", *names, *sizes, "--out", tmp_path / "out"))
    assert (code, len(errors)) == (0, 1), errors
    assert errors[0].startswith('fedmerge: warning: federation "own/natural": no client trains on')


def test_what_is_odd_about_the_data_of_any_seed_is_said(tmp_path: Path) -> None:
    table = tmp_path / "own.csv"
    rows = [f"{'ab'[i % 2]},{i},{2 if i == 0 else i // 2 % 2}" for i in range(20)]
    table.write_text("\n".join(["client,f,y", *rows]) + "\n")

    def is_odd(seed: int) -> bool:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            make_federation(str(table), "natural", seed=seed)
        return bool(found)

    good = next(seed for seed in range(20) if not is_odd(seed))
    odd = next(seed for seed in range(20) if is_odd(seed))
    shared = {"data": str(table), "setting": "natural", "method": "fedavg"}
    cells = [Cell(f"s{seed}", {**shared, "seed": seed}) for seed in (good, odd)]
    with pytest.warns(DataWarning, match="no client trains on label 2"):
        check_cells(cells)


def test_refused_updates_are_said_with_what_to_do(tmp_path: Path) -> None:
    """After a run and after a comparison, which ranks methods that have learned nothing."""
    rows = [f"{site},{1e30 * (i + 1)},{i % 2}" for site in "abcd" for i in range(20)]
    data = tmp_path / "x.csv"
    data.write_text("\n".join(["client,x,y", *rows]))
    usual = ("--data", str(data), "--rounds", "2", "--lr", "0.1", "--workers", "1", "--quiet")
    advice = 'standardise a table (--data "table:FILE:standardise=true")'
    ran = call("run", "--setting", "natural", "--method", "fedavg", *usual)
    assert "refused updates: 8 non-finite\n" in ran.stdout
    assert advice in ran.stdout
    asked = ("--settings", "natural", "--methods", "fedmerge,fedavg", "--seeds", "0-1")
    compared = call("compare", *asked, *usual, "--out", str(tmp_path / "o"))
    (line,) = (line for line in compared.stdout.splitlines() if line.startswith("Updates"))
    assert line.startswith(
        "Updates were refused: of fedmerge, 16 non-finite in 2 of 2 runs (natural); "
        "of fedavg, 16 non-finite in 2 of 2 runs (natural). "
    )
    assert advice in line


OWN = """
from dataclasses import dataclass
import torch
from fedmerge import FedAvg

@dataclass(frozen=True)
class Mine(FedAvg):
    name = "mine"
"""


def write_own(folder: Path, body: str, patch: pytest.MonkeyPatch) -> None:
    """Make `body` a function of the method own_run.Mine."""
    (folder / "own_run.py").write_text(f"{OWN}    {body}\n")
    patch.syspath_prepend(str(folder))
    patch.delitem(sys.modules, "own_run", raising=False)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("def send(self, *_): return None", "AttributeError: 'NoneType' object has no attribute"),
        ("def send(self, *_): return torch.zeros(4, 1, 3)", "a row has 3 numbers of torch.float32"),
        ("def local(self, setup, message, *_): return message", "AttributeError: 'Tensor' object"),
        ("def commit(self, setup, shared, *_): return shared", "ValueError: not enough values"),
        ("def commit(self, *a): return super().commit(*a) if a[-1] < 1 else 1 / 0", "ZeroDivision"),
    ],
)
def test_what_a_method_of_ones_own_raises_in_a_run_is_told_in_a_line(
    body: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_own(tmp_path, body, monkeypatch)
    result = call("run", *TINY, "--data", "gaussian", "--method", "own_run.Mine", "--quiet")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"fedmerge: own_run.Mine: {told}")


def test_the_traceback_of_a_method_of_ones_own_is_there_for_those_who_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_own(tmp_path, "def send(self, *_): return 1 / 0", monkeypatch)
    monkeypatch.setenv("FEDMERGE_DEBUG", "1")
    result = call("run", *TINY, "--data", "gaussian", "--method", "own_run.Mine", "--quiet")
    assert 'own_run.py", line 9, in send' in result.stderr
    assert result.stderr.splitlines()[-1].startswith("fedmerge: own_run.Mine: ZeroDivisionError")


def test_what_a_method_of_fedmerge_raises_stays_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedmerge.algorithms.FedAvg.send", lambda *_: 1 / 0)
    result = call("run", *TINY, "--data", "gaussian", "--method", "fedavg", "--quiet")
    assert isinstance(result.exception, ZeroDivisionError)


def test_report_makes_the_page_of_one_run(tmp_path: Path) -> None:
    call("run", *TINY, "--out", tmp_path)
    result = call("report", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert str(tmp_path / "report.html") in result.stdout
    assert (tmp_path / "report.html").is_file()
    assert call("report", tmp_path / "nothing").exit_code == 2
