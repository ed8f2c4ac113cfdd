"""The settings of a run: limits, files, messages, and that each one changes what a run does.

Whole commands are tested in test_cli.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from fedmerge import comparison
from fedmerge.compare.folder import read_result, write_result
from fedmerge.compare.race import score
from fedmerge.comparison import run_cell
from fedmerge.config import RunConfig, load_config
from fedmerge.data import Federation
from fedmerge.errors import ConfigError, StateError
from fedmerge.sim import RoundLog, Simulation
from fedmerge.sim.cluster import Cluster
from fedmerge.sim.execute import EXECUTIONS
from fedmerge.sim.processes import Processes
from fedmerge.sim.rounds import Round

TINY: dict[str, object] = {"clients": 4, "rounds": 2, "epochs": 1, "hidden": 4}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def test_cells_with_the_same_clients_share_them_and_give_what_a_run_alone_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    build = RunConfig.federation

    def counted(config: RunConfig) -> Federation:
        made.append(config.seed)
        return build(config)

    monkeypatch.setattr(RunConfig, "federation", counted)
    plan = [("fedmerge-ft", 1), ("fedbabu", 1), ("fedmerge-ft", 2), ("fedmerge-ft", 1)]
    for i, (method, seed) in enumerate(plan):
        config = load_config(None, {**TINY, "method": method, "seed": seed})
        run_cell(config.model_dump(mode="json"), tmp_path / str(i))
        clients = made[:]
        alone = config.run(tmp_path / f"{i}-alone")
        del made[len(clients) :]
        found = read_result(tmp_path / str(i))
        assert found is not None
        assert {**found, "seconds": 0} == {**alone, "seconds": 0}
    assert made == [1, 2]


def test_of_large_data_no_clients_but_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(seed: int) -> RunConfig:
        return load_config(None, {**TINY, "seed": seed})

    monkeypatch.setattr(comparison, "_kept", {})
    size = comparison._bytes(config(1).federation())
    monkeypatch.setattr(comparison, "ROOM", 2 * size)
    kept = [comparison._kept_federation(config(seed)) for seed in (1, 2, 3, 1)]
    assert kept[3] is kept[0]
    assert [key[3] for key in comparison._kept] == [2, 3, 1]
    comparison._kept_federation(config(4))  # three are too large together: the oldest goes
    assert [key[3] for key in comparison._kept] == [3, 1, 4]
    monkeypatch.setattr(comparison, "ROOM", size - 1)
    comparison._kept_federation(config(5))
    assert [key[3] for key in comparison._kept] == [5]


@pytest.mark.parametrize(
    "other",
    [
        {"data": "gaussian"},
        {"setting": "domain"},
        {"clients": 5},
        {"seed": 2},
        {"train_fraction": 0.3},
    ],
)
def test_other_clients_are_not_taken_for_those_that_are_kept(
    monkeypatch: pytest.MonkeyPatch, other: dict[str, object]
) -> None:
    monkeypatch.setattr(comparison, "_kept", {})
    first, second = (load_config(None, {**TINY, **own}) for own in ({}, other))
    kept = comparison._kept_federation(first)
    assert comparison._kept_federation(second) is not kept
    assert comparison._kept_federation(first) is kept


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def lines_without_times(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{**line, "seconds": 0} for line in found]


def test_of_a_trial_the_log_is_kept_by_which_it_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place says that it is one. Until it has ended it can be gone on with like any run."""
    saved: list[int] = []
    save = Simulation.save

    def counted(simulation: Simulation) -> None:
        saved.append(len(simulation.history))
        save(simulation)

    monkeypatch.setattr(Simulation, "save", counted)
    config = load_config(None, {**TINY, "rounds": 4})
    settings = config.model_dump(mode="json")
    trial, cell = tmp_path / "tuning" / "one", tmp_path / "runs" / "one"

    def stop(log: RoundLog) -> None:
        if log.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        config.run(trial, stop, checkpoint_seconds=0, trial=True)
    assert contents(trial) == {"config.json", "log.jsonl", "checkpoint"}
    assert saved.pop() == 2
    saved.clear()
    for folder in (trial, cell):
        run_cell(settings, folder)
    assert saved == [4]  # once, of the cell
    assert contents(trial) == {"config.json", "log.jsonl", "result.json"}
    assert contents(cell) == {*contents(trial), "checkpoint", "weights.npz"}
    assert lines_without_times(trial) == lines_without_times(cell)
    assert len(lines_without_times(trial)) == 4
    assert score(trial) == score(cell)
    found = read_result(trial)
    assert found is not None
    assert found["rounds"] == 4


def test_a_log_is_on_the_disk_before_the_result_that_stands_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    sync = os.fsync

    def watched(handle: int) -> None:
        sync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.append((path.name, path.read_bytes().count(b"\n") if path.is_file() else 0))

    monkeypatch.setattr(os, "fsync", watched)
    run_cell(load_config(None, TINY).model_dump(mode="json"), tmp_path / "tuning" / "one")
    assert [lines for name, lines in synced if name == "log.jsonl"] == [2]
    # Under the names that they are written as, before they get their own.
    names = [name for name, _ in synced if "." in name]
    assert [name.lstrip(".").split(".")[0] for name in names] == ["config", "log", "result"]


def test_defaults_are_those_of_the_evidence() -> None:
    assert load_config(None, {}).model_dump() == {
        "data": "digits",
        "setting": "concept-mix",
        "method": "fedmerge",
        "chosen": None,
        "model": "mlp",
        "hidden": 32,
        "clients": 32,
        "train_fraction": 0.5,
        "rounds": 60,
        "participation": 1.0,
        "dropout": 0.0,
        "epochs": 5,
        "lr": 0.3,
        "batch_size": 16,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "clip": None,
        "seed": 0,
        "evaluate_every": 1,
        "evaluate_on": 1.0,
        "execution": "auto",
        "workers": None,
        "address": None,
        "threads": 1,
        "track": None,
    }


def test_the_executions_are_those_of_the_simulation() -> None:
    assert get_args(RunConfig.model_fields["execution"].annotation) == EXECUTIONS


def test_every_field_says_what_it_is() -> None:
    assert all(field.description for field in RunConfig.model_fields.values())


def test_a_file_is_read_and_options_go_over_it(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('rounds = 7\nlr = 1\nclip = 2.5\nmethod = "ifca:d=2"\n')
    config = load_config(path, {"rounds": "9", "clip": "none"})
    assert (config.rounds, config.lr, config.clip, config.method) == (9, 1.0, None, "ifca:d=2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rond = 3", 'c.toml: unknown key "rond"; did you mean "rounds"?'),
        (
            "rounds = 0",
            "c.toml: rounds: got 0, wanted a whole number of at least 1 and at most 10000000",
        ),
        ("rounds = 2.5", "c.toml: rounds: got 2.5, wanted a whole number of at least 1"),
        ("rounds = true", "c.toml: rounds: got true, wanted a whole number of at least 1"),
        ("[training]\nlr = 1", 'c.toml: [training] is a table; write "key = value" lines only'),
        ("lr = inf", "c.toml: lr: got Infinity, wanted a number above 0 and at most 1000"),
        ("rounds = = 3", "c.toml is not a TOML file: Invalid value"),
        (
            'execution = "fast"\nclip = 0',
            'execution: got "fast", wanted one of auto, stacked, sequential, processes, ray',
        ),
        ('chosen = "lr"', 'chosen: got "lr", wanted key=value:key=value, each key once, or none'),
        ('chosen = "lr=1:lr=2"', 'chosen: got "lr=1:lr=2", wanted key=value:key=value'),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rounds", 0),
        ("rounds", "x"),
        ("hidden", 0),
        ("clients", 0),
        ("train_fraction", 0),
        ("train_fraction", 1),
        ("participation", 0),
        ("participation", 1.01),
        ("dropout", -0.1),
        ("dropout", 1),
        ("epochs", 0),
        ("lr", 0),
        ("lr", "nan"),
        ("batch_size", 0),
        ("momentum", 1),
        ("momentum", -0.1),
        ("weight_decay", -1),
        ("clip", 0),
        ("seed", -1),
        ("evaluate_every", 0),
        ("threads", 0),
        ("threads", 1025),
        ("hidden", 65537),
        ("seed", 2**63),
        *((name, 10**7 + 1) for name in ("clients", "rounds", "epochs", "batch_size")),
        ("evaluate_every", 10**7 + 1),
        ("workers", 0),
        ("data", ""),
        ("method", ""),
    ],
)
def test_values_outside_the_limits_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: got .*, wanted "):
        load_config(None, {name: value})


def test_what_tuning_chose_goes_in_the_place_of_the_others() -> None:
    config = load_config(None, {"method": "ditto", "lr": 0.3, "chosen": "lr=0.05:lam=2.5:epochs=2"})
    assert (config.method, config.lr, config.epochs) == ("ditto", 0.3, 5)
    settled = config.settled()
    assert (settled.method, settled.lr, settled.epochs) == ("ditto:lam=2.5", 0.05, 2)
    assert settled.chosen is None
    # It is the same run as the one that says so itself.
    tiny = {**TINY, "method": "ditto:lam=2.5", "lr": 0.05}
    said = load_config(None, tiny).run()
    tuned = load_config(None, {**TINY, "method": "ditto", "chosen": "lr=0.05:lam=2.5"}).run()
    assert tuned["chosen"] == {"lr": 0.05, "lam": 2.5}
    assert said["chosen"] == {}
    assert tuned["models"] == said["models"]
    assert tuned["models"] != load_config(None, {**TINY, "method": "ditto"}).run()["models"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("lr=-1", "lr: got -1, wanted a number above 0"),
        ("lamb=1", 'method "ditto" has no option "lamb"; did you mean "lam"'),
        ("lam=1", '"lam" is given twice'),
    ],
)
def test_what_cannot_have_been_chosen_is_refused(chosen: str, message: str) -> None:
    config = load_config(None, {**TINY, "method": "ditto:lam=2", "chosen": chosen})
    with pytest.raises(ConfigError, match=message):
        config.simulation(config.federation())


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(ConfigError, match='unknown key "epoch"; did you mean "epochs"'):
        load_config(None, {"epoch": 3})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml cannot be read: No such file"):
        load_config(tmp_path / "no.toml", {})


def test_clients_of_the_data_are_all_taken_unless_a_number_is_given() -> None:
    assert load_config(None, {"setting": "natural"}).clients is None
    assert load_config(None, {"setting": "natural", "clients": "3"}).clients == 3


def test_natural_clients_run_from_a_folder(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    for name in "abc":
        y = np.arange(12) % 2
        np.savez(tmp_path / f"{name}.npz", x=draws.normal(size=(12, 3)) + y[:, None], y=y)
    overrides = {**TINY, "data": str(tmp_path), "setting": "natural"}
    del overrides["clients"]
    result = load_config(None, {**overrides, "method": "fedavg"}).run()
    assert [client["id"] for client in result["clients"]] == ["a", "b", "c"]


def _outcome(changes: dict[str, object]) -> dict[str, Any]:
    """What a run did: its numbers without its names and without the time it took."""
    logs: list[dict[str, Any]] = []
    result = load_config(None, {**TINY, **changes}).run(
        on_round=lambda log: logs.append({**log.to_json(), "seconds": None})
    )
    named = ("setting", "data", "method", "chosen", "seed", "seconds")
    return {"logs": logs, **{key: value for key, value in result.items() if key not in named}}


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return _outcome({})


CHANGED: dict[str, object] = {
    "data": "gaussian",
    "setting": "domain",
    "method": "fedavg",
    "chosen": "lr=0.2",
    "model": "cnn",
    "hidden": 5,
    "clients": 5,
    "train_fraction": 0.6,
    "rounds": 3,
    "participation": 0.5,
    "dropout": 0.5,
    "epochs": 2,
    "lr": 0.2,
    "batch_size": 8,
    "momentum": 0.5,
    "weight_decay": 0.01,
    "clip": 0.1,
    "seed": 1,
    "evaluate_every": 2,
    "evaluate_on": 0.5,
}


def test_a_run_is_repeatable(base: dict[str, Any]) -> None:
    assert _outcome({}) == base


@pytest.mark.parametrize("name", RunConfig.model_fields)
def test_every_setting_arrives(name: str, base: dict[str, Any]) -> None:
    if name == "threads":
        config = load_config(None, {**TINY, "threads": 2})
        config.simulation(config.federation())
        assert torch.get_num_threads() == 2
    elif name == "execution":
        config = load_config(None, {**TINY, "execution": "sequential"})
        simulation = config.simulation(config.federation())
        assert simulation._side.engine.net is None
        config = load_config(None, {**TINY, "execution": "stacked"})
        assert config.simulation(config.federation())._side.engine.net is not None
    elif name == "track":
        with pytest.raises(ConfigError, match='--track "wandb"; choose from mlflow, tensorboard'):
            load_config(None, {**TINY, "track": "mlflow,wandb"}).run()
    elif name == "workers":
        config = load_config(None, {**TINY, "clients": 40, "execution": "processes", "workers": 2})
        executor = config.simulation(config.federation())._executor
        assert isinstance(executor, Processes)
        assert executor.size == 2
    elif name == "address":
        config = load_config(None, {**TINY, "execution": "ray", "address": "head:6379"})
        executor = config.simulation(config.federation())._executor
        assert isinstance(executor, Cluster)
        assert executor.address == "head:6379"
    else:
        assert json.dumps(_outcome({name: CHANGED[name]})) != json.dumps(base)


def test_a_folder_is_for_one_run(tmp_path: Path) -> None:
    load_config(None, {**TINY, "method": "local"}).run(tmp_path)
    with pytest.raises(StateError, match="epochs is 1 there and 2 here; choose another --out"):
        load_config(None, {**TINY, "method": "local", "epochs": 2}).run(tmp_path)
    (tmp_path / "config.json").write_text('{"rounds":')
    with pytest.raises(StateError, match=r"config\.json is damaged .*remove config\.json, log"):
        load_config(None, {**TINY, "method": "local"}).run(tmp_path)
    (tmp_path / "config.json").unlink()
    held = r"holds log\.jsonl but no config\.json; remove log\.jsonl, result\.json, checkpoint th"
    with pytest.raises(StateError, match=held):
        load_config(None, {**TINY, "method": "local"}).run(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint")
    assert load_config(None, {**TINY, "method": "local"}).run(tmp_path)["rounds"] == 2


def test_a_run_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    result = load_config(None, {**TINY, "workers": 1}).run(tmp_path)
    assert load_config(None, {**TINY, "workers": 2}).run(tmp_path) == result


def test_a_round_at_whose_end_ctrl_c_came_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, seen = Simulation._end, []
    config = load_config(None, {**TINY, "rounds": 4})

    def interrupted(simulation: Simulation, now: Round) -> RoundLog:
        if now.number == 2:
            signal.raise_signal(signal.SIGINT)
        return end(simulation, now)

    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            config.run(tmp_path, seen.append)
    assert [log.round for log in seen] == [1, 2]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "_begin", lambda *given: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            config.run(tmp_path, seen.append)
    assert [log.round for log in seen] == [1, 2]
    config.run(tmp_path, seen.append)
    assert [log.round for log in seen] == [1, 2, 3, 4]


def test_what_json_cannot_hold_is_written_as_null(tmp_path: Path) -> None:
    write_result(tmp_path, {"loss": math.inf, "all": [{"gap": math.nan}, 1.5], "n": 3})
    assert read_result(tmp_path) == {"loss": None, "all": [{"gap": None}, 1.5], "n": 3}
