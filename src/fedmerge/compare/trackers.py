"""Trackers: each round's figures and the final result of a run, written to TensorBoard or MLflow.

A tracker is a copy for the eyes. Nothing is read back from it, and a run never fails because of it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ConfigError, MissingExtraError, did_you_mean
from .folder import COMPARISON, CONFIG, FREE

if TYPE_CHECKING:
    from ..sim import RoundLog

EXPERIMENT = "fedmerge"
FOLDER = "fedmerge.folder"
"""Tag of an MLflow run: the run folder, by which a run that goes on is found again."""
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
"""Unless the user's environment has others: by default a server that is down costs minutes, and
MLflow tells on stderr what it does."""
SQLITE = "sqlite:///"
REASON = 250
"""Characters of a tracker's error that are shown: MLflow's advice is within them."""

_down: set[str] = set()
# Of this process: in a comparison, each cell would wait for the same tracker again.


class Tracker(Protocol):
    """Where figures go; every call may fail."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures as those of round `step`."""

    def close(self, status: str) -> None:
        """End the run: "FINISHED", or "KILLED" where it was stopped."""


class TensorBoard:
    """An event file in a folder that TensorBoard shows as one run.

    Args:
        where: folder of all runs. name: of this one.
    """

    def __init__(self, where: Path, name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._config = config
        self._open: Callable[[int], Any] = lambda step: SummaryWriter(
            str(where / name), purge_step=step
        )
        self._writer: Any = None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Tracker.write`."""
        if self._writer is None:
            # Rounds that a stopped run had written and that are run again are hidden.
            self._writer = self._open(step)
            text = json.dumps(dict(self._config), indent=2)
            self._writer.add_text("config", f"```json\n{text}\n```", step)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        """See `Tracker.close`."""
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """A run in the experiment "fedmerge" of an MLflow server or database.

    Args:
        where: tracking URI. name: of the run. folder: its run folder; a run that was stopped there
            is gone on with.
    """

    def __init__(
        self, where: str, name: str, config: Mapping[str, Any], folder: Path | None
    ) -> None:
        client, experiment = _experiment(where)
        from mlflow.entities import Metric, Param

        self._client, self._metric = client, Metric
        tags = {} if folder is None else {FOLDER: str(folder.resolve())}
        # Only a run that has begun here is gone on with: a folder may be used anew.
        begun = folder is not None and (folder / CONFIG).is_file()
        earlier = self._earlier(experiment, tags[FOLDER]) if begun else None
        if earlier is not None:
            self._run = earlier
            client.update_run(self._run, status="RUNNING")
            return
        self._run = str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
        params = [Param(key, str(value)) for key, value in config.items() if key not in FREE]
        client.log_batch(self._run, params=params)

    def _earlier(self, experiment: str, folder: str) -> str | None:
        """The latest run of that folder."""
        value = folder.replace("'", "\\'")
        runs = self._client.search_runs([experiment], f"tags.`{FOLDER}` = '{value}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Tracker.write`."""
        now = time.time_ns() // 1_000_000
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, status: str) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self._run, status)


def _experiment(where: str) -> tuple[Any, str]:
    """Return a client of the server or database `where`, and its experiment, made where it is not.

    A new database gets its tables; one in a file gets all of them or is not there.
    """
    for variable, value in PATIENCE.items():
        os.environ.setdefault(variable, value)
    from mlflow import MlflowClient

    with suppress(ImportError):  # not in every edition of MLflow
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 2  # by default a database that cannot be opened costs 109 s
        file, options = where.removeprefix(SQLITE), "?" in where
        if where.startswith(SQLITE) and file not in ("", ":memory:") and not options:
            _make_database(Path(file), utils)
    client = MlflowClient(tracking_uri=where)
    found = client.get_experiment_by_name(EXPERIMENT)
    return client, str(found.experiment_id if found else client.create_experiment(EXPERIMENT))


def _make_database(path: Path, utils: Any) -> None:
    """Make the SQLite database `path` with MLflow's tables, unless it is there.

    It takes seconds. What a process that was killed meanwhile leaves has some of the tables, which
    MLflow can neither use nor complete: so it has another name until all are there.
    """
    if _begun(path):
        return
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with _alone(path.parent):
        if _begun(path):  # another process has made it meanwhile
            return
        try:
            _remove(new)
            engine = utils.create_sqlalchemy_engine(f"{SQLITE}{new}")
            try:
                utils._initialize_tables(engine)
            finally:
                engine.dispose()
            _remove(path)  # a journal of an earlier database would be played back into this one
            new.replace(path)
        finally:
            _remove(new)


def _begun(path: Path) -> bool:
    """Whether there is something of a database: SQLite takes an empty file for none."""
    return path.exists() and (path.is_dir() or path.stat().st_size > 0)


def _remove(path: Path) -> None:
    """Remove a SQLite database and the files that belong to it."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for other processes that are here; the system lets go of it when this process ends."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError):  # a system, or a file system, without locks
            import fcntl

            held = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, held)
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


TRACKERS = ("tensorboard", "mlflow")


def check_trackers(names: Sequence[str]) -> None:
    """Say before any work what cannot be used.

    Args:
        names: "tensorboard" or "mlflow", or with a place, as "mlflow:http://host:5000".

    Raises:
        ConfigError: an unknown name. MissingExtraError: one that is not installed.
    """
    for name in names:
        kind, colon, where = name.partition(":")
        if kind not in TRACKERS or (colon and not where):
            raise ConfigError(f'--track "{name}"{did_you_mean(kind, TRACKERS)}')
        if importlib.util.find_spec(kind) is None:
            raise MissingExtraError("track")


def prepare(names: Sequence[str], out: Path) -> frozenset[str]:
    """Make MLflow ready for the processes of a comparison in `out`; return the names that are down.

    Two processes that make the tables of a new database on a server at once spoil it for each
    other.
    """
    for name in names:
        kind, _, where = name.partition(":")
        if kind == "mlflow":
            with _guarded(name):
                _experiment(where or _database(out))
    return frozenset(_down)


def leave_out(names: Collection[str]) -> None:
    """Do without the trackers `names` in this process, which others have found to be down."""
    _down.update(names)


class Tracked:
    """The trackers of one run; one that fails is named in a line and left out from then on."""

    def __init__(
        self, names: Sequence[str], config: Mapping[str, Any], folder: Path | None
    ) -> None:
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            if name not in _down:
                with _guarded(name):
                    self._trackers[name] = _open(name, config, folder)

    def on_round(self, log: RoundLog) -> None:
        """Write a round's figures."""
        self._each(lambda tracker: tracker.write(log.round, round_figures(log)))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result of the run, `final/...` and `best/...`."""
        self._each(lambda tracker: tracker.write(result["rounds"], result_figures(result)))

    def close(self, status: str) -> None:
        """End the run at all trackers."""
        self._each(lambda tracker: tracker.close(status))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            if name not in _down:
                with _guarded(name):
                    call(tracker)


@contextmanager
def _guarded(name: str) -> Iterator[None]:
    try:
        # Those of the trackers' own packages: nobody here can act on them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # whatever these packages raise: the run matters more
        _down.add(name)
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", REASON, placeholder=" …")
        line = f"--track {name} cannot be written ({reason}); the run goes on without it"
        print(f"fedmerge: {line}", file=sys.stderr)


@contextmanager
def _closing(tracked: Tracked) -> Iterator[Tracked]:
    try:
        yield tracked
    except BaseException:
        tracked.close("KILLED")
        raise
    tracked.close("FINISHED")


def tracked(
    names: Sequence[str], config: Mapping[str, Any], folder: Path | None
) -> AbstractContextManager[Tracked]:
    """Open the trackers `names` (see `check_trackers`) for one run.

    Without a place in their names, they write into the folder of the comparison, or of the run.

    Args:
        config: every setting of the run, JSON values. folder: of the run, or None.

    Raises:
        ConfigError, MissingExtraError: a name that cannot be used.
    """
    check_trackers(names)
    return _closing(Tracked(names, config, folder))


def _open(name: str, config: Mapping[str, Any], folder: Path | None) -> Tracker:
    kind, _, where = name.partition(":")
    home = folder or Path()
    if folder is not None and (folder.resolve().parents[1] / COMPARISON).is_file():
        home = folder.resolve().parents[1]
    named = "--".join(str(config[key]) for key in ("data", "setting", "method", "seed"))
    label = folder.resolve().name if folder else named.replace("/", "_")
    if kind == "tensorboard":
        return TensorBoard(Path(where) if where else home / "tensorboard", label, config)
    return MLflow(where or _database(home), label, config, folder)


def _database(home: Path) -> str:
    """Where MLflow writes if no place is named."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve()}/mlflow.db"


def round_figures(log: RoundLog) -> dict[str, float]:
    """The figures of a round by name, such as "merged/test/accuracy" for the mean over clients."""
    found: dict[str, float | None] = {"gap/train": log.gap_train, "gap/test": log.gap_test}
    for model, splits in log.metrics.items():
        for split, metrics in splits.items():
            for metric, summary in metrics.items():
                if summary is not None:
                    name = f"{model}/{split}/{metric}"
                    found[name] = summary.mean
                    found[f"{name}_std"] = summary.std
                    found[f"{name}_worst_decile"] = summary.worst_decile
    found |= {f"rows/{name}": value for name, value in (log.rows or {}).items()}
    found |= {"bytes/up": log.bytes_up, "bytes/down": log.bytes_down}
    found |= {"clients/sampled": log.cohort, "clients/dropped": log.dropped}
    found |= {f"seconds/{phase}": value for phase, value in log.seconds.items()}
    return _finite(found)


def result_figures(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a result by name, such as "final/merged/accuracy" and "best/round"."""
    found: dict[str, float | None] = {}
    for name, reached in (("final", result), ("best", result["best"])):
        found |= {f"{name}/{key}": reached[key] for key in ("round", "gap_train", "gap_test")}
        for model, scores in reached["models"].items():
            found |= {f"{name}/{model}/{metric}": value for metric, value in scores.items()}
    found["final/seconds"] = result["seconds"]
    return _finite(found)


def _finite(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {k: float(v) for k, v in figures.items() if v is not None and math.isfinite(v)}
