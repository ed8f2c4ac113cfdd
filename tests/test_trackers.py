"""Trackers: what TensorBoard and MLflow hold after a run, and that a run does not fail with them.

What is read back is compared with the run's own log and result.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedmerge.compare import trackers
from fedmerge.compare.execute import execute
from fedmerge.compare.folder import COMPARISON
from fedmerge.compare.trackers import check_trackers, tracked
from fedmerge.comparison import prepare_worker
from fedmerge.config import RunConfig
from fedmerge.errors import ConfigError, MissingExtraError

CONFIG = RunConfig(
    clients=4, rounds=3, epochs=1, hidden=4, method="fedmerge:d=2", setting="domain", workers=1
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers that failed in another test are tried again; no waiting for those that are down."""
    monkeypatch.setattr(trackers, "_down", set())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in trackers.PATIENCE.items():
        monkeypatch.setenv(name, "1" if value.isdecimal() else value)


def run(folder: Path, names: list[str], stop_after: int | None = None) -> dict[str, Any]:
    """Run CONFIG in `folder`, watched by the trackers `names`; stop like Ctrl-C after a round."""
    config = CONFIG.model_dump(mode="json")

    def build(checkpoint: Path | None) -> Any:
        return CONFIG.simulation(CONFIG.federation(), checkpoint, 1e9)

    with tracked(names, config, folder) as tracker:

        def on_round(log: Any) -> None:
            tracker.on_round(log)
            if log.round == stop_after:
                raise KeyboardInterrupt

        result = execute(config, build, folder, on_round)
        tracker.finish(result)
    return result


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def expected(folder: Path) -> dict[str, list[float]]:
    """Series of a few figures, out of the run's own log."""
    logs = logged(folder)
    found = [log["metrics"] for log in logs]
    return {
        "merged/test/accuracy": [one["merged"]["test"]["accuracy"]["mean"] for one in found],
        "tuned/validation/loss_std": [one["tuned"]["validation"]["loss"]["std"] for one in found],
        "local/train/loss_worst_decile": [
            one["local"]["train"]["loss"]["worst_decile"] for one in found
        ],
        "gap/test": [log["gap_test"] for log in logs],
        "rows/entropy": [log["rows"]["entropy"] for log in logs],
        "bytes/up": [log["bytes_up"] for log in logs],
        "seconds/local": [log["seconds"]["local"] for log in logs],
    }


def final(result: dict[str, Any]) -> dict[str, float]:
    return {
        "final/merged/accuracy": result["models"]["merged"]["accuracy"],
        "final/tuned/loss": result["models"]["tuned"]["loss"],
        "final/gap_train": result["gap_train"],
        "best/round": result["best"]["round"],
        "best/merged/accuracy_worst_decile": result["best"]["models"]["merged"][
            "accuracy_worst_decile"
        ],
    }


# -- TensorBoard -----------------------------------------------------------------------------------


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_holds_every_round_and_the_result(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    result = run(tmp_path / "r", ["tensorboard"])
    found = read_events(tmp_path / "r" / "tensorboard" / "r")
    for tag, values in expected(tmp_path / "r").items():
        assert [step for step, _ in found[tag]] == [1, 2, 3]
        assert [value for _, value in found[tag]] == pytest.approx(values, rel=1e-6)
    for tag, value in final(result).items():
        assert found[tag] == [(3, pytest.approx(value, rel=1e-6))]
    assert not any(tag.endswith("/auc") for tag in found)  # ten classes


def test_tensorboard_shows_a_stopped_run_as_one(tmp_path: Path) -> None:
    """Stopped, and its checkpoint lost: rounds that are run again are there once."""
    pytest.importorskip("tensorboard")
    folder = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        run(folder, [f"tensorboard:{tmp_path / 'board'}"], stop_after=2)
    assert len(read_events(tmp_path / "board" / "r")["merged/test/loss"]) == 2
    for path in (folder / "checkpoint").iterdir():
        path.unlink()
    run(folder, [f"tensorboard:{tmp_path / 'board'}"])
    found = read_events(tmp_path / "board" / "r")
    for tag, values in expected(folder).items():
        assert [step for step, _ in found[tag]] == [1, 2, 3]
        assert [value for _, value in found[tag]] == pytest.approx(values, rel=1e-6)


def test_runs_of_a_comparison_are_written_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / COMPARISON).write_text("{}")
    run(tmp_path / "runs" / "a", ["tensorboard"])
    assert read_events(tmp_path / "tensorboard" / "a")


# -- MLflow ----------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("mlflow")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own packages
        yield f"sqlite:///{tmp_path}/store.db"


def runs_of(store: str) -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("fedmerge")
    return client, list(client.search_runs([experiment.experiment_id]))


def test_mlflow_holds_settings_rounds_and_result(tmp_path: Path, store: str) -> None:
    folder = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        run(folder, [f"mlflow:{store}"], stop_after=2)
    client, (stopped,) = runs_of(store)
    assert stopped.info.status == "KILLED"
    result = run(folder, [f"mlflow:{store}"])
    client, (found,) = runs_of(store)  # it went on with the same one
    assert (found.info.status, found.info.run_name) == ("FINISHED", "r")
    params = found.data.params
    assert params["method"] == "fedmerge:d=2"
    assert (params["rounds"], params["lr"], params["clip"]) == ("3", "0.3", "None")
    assert "workers" not in params
    for name, values in expected(folder).items():
        history = sorted(client.get_metric_history(found.info.run_id, name), key=lambda m: m.step)
        assert [one.step for one in history] == [1, 2, 3]
        assert [one.value for one in history] == pytest.approx(values, rel=1e-12)
    for name, value in final(result).items():
        assert found.data.metrics[name] == pytest.approx(value, rel=1e-12)
    shutil.rmtree(folder)  # what is run there now is another run, with an entry of its own
    run(folder, [f"mlflow:{store}"])
    client, both = runs_of(store)
    assert len(both) == 2
    for one in both:
        history = client.get_metric_history(one.info.run_id, next(iter(expected(folder))))
        assert sorted(point.step for point in history) == [1, 2, 3]


def test_no_run_of_a_comparison_is_lost(tmp_path: Path, store: str) -> None:
    """The database is made before the processes start, which would do so all at once."""
    names = ("--data", "gaussian", "--settings", "concept", "--methods", "fedavg,local")
    names += ("--seeds", "0-1", "--track", "mlflow")
    sizes = ("--clients", "4", "--rounds", "2", "--epochs", "1", "--hidden", "4", "--workers", "4")
    done = subprocess.run(
        [sys.executable, "-m", "fedmerge", "compare", *names, *sizes, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )
    assert (done.returncode, done.stderr) == (0, "")
    _, found = runs_of(f"sqlite:///{tmp_path}/mlflow.db")
    assert sorted(run.info.run_name for run in found) == [
        f"gaussian--concept--{method}--s{seed}" for method in ("fedavg", "local") for seed in (0, 1)
    ]
    assert {run.info.status for run in found} == {"FINISHED"}


PREPARE = (
    "from pathlib import Path; from fedmerge.compare import trackers; "
    "trackers.prepare(['mlflow'], Path())"
)


class Maker:
    """In place of MLflow's: makes a file, slowly, and counts; or fails in the middle."""

    def __init__(self, error: str = "") -> None:
        self.error, self.made = error, 0

    def create_sqlalchemy_engine(self, where: str) -> Maker:
        self.path = Path(where.removeprefix("sqlite:///"))
        return self

    def _initialize_tables(self, engine: object) -> None:
        self.path.write_bytes(b"half")
        time.sleep(0.2)
        if self.error:
            raise OSError(self.error)
        self.made += 1

    def dispose(self) -> None: ...


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_kill_while_the_tables_are_made_spoils_nothing(tmp_path: Path, store: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    places = [tmp_path / "mlflow.db", tmp_path / "mlflow.db.new"]
    with subprocess.Popen(
        [sys.executable, "-c", PREPARE], cwd=tmp_path, env=environment
    ) as process:
        while not any(path.exists() and path.stat().st_size for path in places):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert "mlflow.db.new" in files(tmp_path)
    assert "mlflow.db" not in files(tmp_path)
    assert trackers.prepare(["mlflow"], tmp_path) == frozenset()
    assert files(tmp_path) == ["mlflow.db"]
    assert runs_of(f"sqlite:///{tmp_path}/mlflow.db")[1] == []


def test_a_database_is_made_once(tmp_path: Path) -> None:
    maker, path = Maker(), tmp_path / "made" / "mlflow.db"
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: trackers._make_database(path, maker), range(4)))
    assert maker.made == 1
    assert files(path.parent) == ["mlflow.db"]


def test_a_database_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    path, maker = tmp_path / "mlflow.db", Maker()
    path.write_bytes(b"of an older MLflow")
    trackers._make_database(path, maker)
    assert path.read_bytes() == b"of an older MLflow"
    assert maker.made == 0


def test_a_database_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space left"):
        trackers._make_database(tmp_path / "mlflow.db", Maker("no space left"))
    assert files(tmp_path) == []


def test_a_journal_without_its_database_is_not_played_back(tmp_path: Path, store: str) -> None:
    """That of a database which was removed, or stopped before its first table."""
    (tmp_path / "store.db").touch()
    (tmp_path / "store.db-journal").write_bytes(b"of another")
    assert trackers.prepare([f"mlflow:{store}"], tmp_path) == frozenset()
    assert files(tmp_path) == ["store.db"]


# -- trackers that cannot be used ------------------------------------------------------------------


def test_a_tracker_that_is_down_is_named_once_and_the_run_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens here
        name = f"mlflow:http://127.0.0.1:{taken.getsockname()[1]}"
        result = run(tmp_path / "a", [name])
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert errors[0].startswith(f"fedmerge: --track {name} cannot be written (")
        assert errors[0].endswith("); the run goes on without it")
        assert result["rounds"] == len(logged(tmp_path / "a")) == 3
        # The next run of this process does not wait for it again.
        run(tmp_path / "b", [name])
        assert capsys.readouterr().err == ""
        assert (tmp_path / "b" / "result.json").is_file()
        # In a comparison the command finds out, and its processes do not try.
        trackers._down.clear()
        down = trackers.prepare([name, "tensorboard"], tmp_path)
        assert (down, len(capsys.readouterr().err.splitlines())) == ({name}, 1)
        trackers._down.clear()
        prepare_worker(down)
        run(tmp_path / "c", [name])
        assert capsys.readouterr().err == ""


def test_a_tracker_that_never_answers_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        result = run(tmp_path / "a", [f"mlflow:http://127.0.0.1:{silent.getsockname()[1]}"])
    assert "cannot be written" in capsys.readouterr().err
    assert result["rounds"] == 3


def test_a_database_that_cannot_be_opened_is_not_waited_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    from mlflow.store.db import utils

    name = f"mlflow:sqlite:///{tmp_path}"  # a folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "MAX_RETRY_COUNT", 10)
        start = time.monotonic()
        assert trackers.prepare([name], tmp_path) == {name}
        assert time.monotonic() - start < 30
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fedmerge: --track {name} cannot be written (")


def test_a_place_that_cannot_be_written_spoils_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("here")
    result = run(tmp_path / "a", [f"tensorboard:{tmp_path / 'file'}"])
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert result["rounds"] == 3
    alone = RunConfig.run(CONFIG, tmp_path / "b")
    assert result["models"] == alone["models"]
    assert (tmp_path / "file").read_text() == "here"


def test_a_tracker_that_breaks_in_the_middle_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")

    def broken(self: object, step: int, figures: object) -> None:
        steps.append(step)
        if step == 2:
            raise OSError("no space left")

    steps: list[int] = []
    monkeypatch.setattr(trackers.TensorBoard, "write", broken)
    run(tmp_path, ["tensorboard"])
    assert steps == [1, 2]
    assert "(OSError: no space left)" in capsys.readouterr().err


def test_a_long_error_is_cut_at_a_word_and_a_short_one_is_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in (("short", "no space\nleft"), ("long", "unreadable " * 100)):
        with trackers._guarded(name):
            raise OSError(text)
    short, long = capsys.readouterr().err.splitlines()
    assert "(OSError: no space left);" in short
    assert "unreadable …);" in long
    assert len(long) < 400


def test_names_are_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match='--track "tensorbord"; did you mean "tensorboard"'):
        check_trackers(["tensorbord"])
    with pytest.raises(ConfigError, match='--track "mlflow:"'):
        check_trackers(["mlflow:"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "fedmerge\[track\]"'):
        check_trackers(["mlflow"])
    with pytest.raises(MissingExtraError):
        tracked(["tensorboard"], {}, None)
