"""The simulation: the one loop over rounds, for every method and every way of executing it.

A round is send, local training, fold, commit, evaluate. It moves no bytes over a network; see
`fedmerge.soup` for the server it shares with a deployment.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..algorithms import Algorithm, Tensors, Ticket, Updates
from ..data.clients import Client, Federation, check_federation
from ..errors import ConfigError, ModelError, StateError, did_you_mean
from ..local import Training
from ..params import Blocks, ModelSource, build
from ..rng import numpy_generator
from ..soup import Soup
from ..store import has_state, load_state, save_state
from .execute import EXECUTIONS, ClientSide, Executor, InProcess, Population, Task, Trained
from .log import SPLITS, Array, Measured, RoundLog
from .processes import Processes
from .results import MODELS, summarise_run

T = TypeVar("T")
PerClient = dict[str, dict[str, Measured]]


class Simulation:
    """Many clients and their server in one process.

    Args:
        algorithm: the method.
        clients: a federation, or its clients; results do not depend on their order.
        model: a function that makes the module, or a module. A function is called anew for every
            independent initialisation; a module's layers are reset.
        training: how clients train.
        rounds: how many to run in all, also when resumed.
        participation: share of the clients in a round's cohort, at least one client.
        dropout: chance that a client of the cohort never replies.
        seed: of every draw: cohorts, batches, initial models.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
        execution: "auto", "stacked" or "sequential" (`Engine`), in this process; "processes" for
            worker processes, each doing as "auto" does.
        workers: number of worker processes; None for one on each CPU.
        blocks: the blocks of layers that have a row of merging weights each (`Layout.of`).
        checkpoint: folder to save to and to resume from; None for none.
        checkpoint_seconds: least time between saves; the end and an interruption always save.

    Raises:
        ConfigError, DataError, ModelError: settings, data or a model that cannot be used.
        StateError: a checkpoint that is damaged or of another run.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        clients: Federation | Sequence[Client],
        model: ModelSource,
        *,
        training: Training | None = None,
        rounds: int = 60,
        participation: float = 1.0,
        dropout: float = 0.0,
        seed: int = 0,
        evaluate_every: int = 1,
        execution: str = "auto",
        workers: int | None = None,
        blocks: Blocks = "layer",
        checkpoint: Path | str | None = None,
        checkpoint_seconds: float = 30.0,
    ) -> None:
        for name, good, value, wanted in (
            ("rounds", rounds >= 1, rounds, "1 or more"),
            ("participation", 0 < participation <= 1, participation, "more than 0, at most 1"),
            ("dropout", 0 <= dropout < 1, dropout, "0 or more and less than 1"),
            ("evaluate_every", evaluate_every >= 1, evaluate_every, "1 or more"),
            ("workers", workers is None or workers >= 1, workers, "1 or more, or None"),
        ):
            if not good:
                raise ConfigError(f"{name} = {value}: wanted {wanted}")
        if execution not in EXECUTIONS:
            raise ConfigError(f'execution = "{execution}"{did_you_mean(execution, EXECUTIONS)}')
        federation = clients if isinstance(clients, Federation) else _federation(clients)
        check_federation(federation)
        self.clients = federation.clients
        self.algorithm = algorithm.resolve(len(self.clients))
        classes = federation.task == "classification"
        self.training = (training or Training()).for_data(classes=classes)
        self.n_rounds = rounds
        self.participation, self.dropout = participation, dropout
        self.seed, self.evaluate_every = seed, evaluate_every
        self.soup = Soup(self.algorithm, model, seed=seed, blocks=blocks)
        self.history: list[RoundLog] = []
        self._population = Population.of(self.clients)
        self._side = ClientSide(
            self.algorithm,
            self.soup.setup,
            build(model, seed),
            self.training,
            self._population,
            seed,
            "auto" if execution == "processes" else execution,
        )
        self._executor: Executor = InProcess(self._side)
        if execution == "processes":
            self._executor = Processes(self._side, workers or os.cpu_count() or 1)
        self.soup.join(sorted(self._population.ids))
        self._memory: Tensors = self.algorithm.memory(self.soup.setup, len(self.clients))
        self._latest: PerClient = {}
        self._folder = None if checkpoint is None else Path(checkpoint)
        self._interval = checkpoint_seconds
        self._saved_rounds = 0
        self._whole = True
        self._check_outputs()
        if self._folder is not None and has_state(self._folder):
            self._resume(self._folder)

    # -- the loop ----------------------------------------------------------------------------------

    def rounds(self) -> Generator[RoundLog]:
        """Run the rounds that are not done yet, and yield the log of each.

        Worker processes live from the first round to the last, or until the generator is closed.
        """
        saved_at = time.monotonic()
        with closing(self._executor):
            try:
                while len(self.history) < self.n_rounds:
                    log = self._round(len(self.history) + 1)
                    if self._folder and time.monotonic() - saved_at > self._interval:
                        self.save()
                        saved_at = time.monotonic()
                    yield log
            finally:
                # Also on Ctrl-C. Inside a commit the state is neither of two rounds: keep the
                # older.
                if self._folder and self._whole and len(self.history) > self._saved_rounds:
                    self.save()

    def _round(self, number: int) -> RoundLog:
        clock = _Clock()
        self.soup.abandon()  # what an interrupted attempt at this round has left
        cohort = self._cohort(number)
        replying = {i for i in cohort if not self._drops(number, i)}
        evaluated = number % self.evaluate_every == 0 or number == self.n_rounds
        refused: Counter[str] = Counter()
        kept: list[tuple[list[int], Tensors]] = []
        figures = _PerClientArrays(len(self.clients))
        bytes_up = bytes_down = 0
        working: deque[tuple[Task, tuple[Ticket, ...]]] = deque()

        def tasks() -> Iterator[Task]:
            nonlocal bytes_down
            for group in self._population.groups(cohort):
                with clock("send"):
                    sent = self.soup.send([self._population.ids[i] for i in group])
                    bytes_down += sent.message.nbytes
                    there = [p for p, i in enumerate(group) if i in replying]
                    if not there:
                        continue
                    task = self._task([group[p] for p in there], number, sent.message[there])
                    working.append((task, tuple(sent.tickets[p] for p in there)))
                yield task

        for done in clock.over("local", self._executor.train(tasks(), measured=evaluated)):
            task, tickets = working.popleft()
            with clock("fold"):
                updates = self._updates(tickets, done)
                bytes_up += updates.delta.nbytes
                refused.update(r.reason for r in self.soup.fold(updates))
                kept.append((task.places, done.local.memory))
                if done.own is not None:
                    figures.put("local", task.places, done.own)
        with clock("commit"):
            before = self.soup.weights()
            self._whole = False
            folded = self.soup.commit()
            for places, memory in kept:
                for name, value in memory.items():
                    self._memory[name][places] = value
        if evaluated:
            with clock("evaluate"):
                self._evaluate(figures, number + 1)
                self._latest = figures.made
        log = RoundLog(
            round=number,
            cohort=len(cohort),
            dropped=len(cohort) - len(replying),
            refused=dict(refused),
            metrics=_summaries(figures.made) if evaluated else {},
            gap_train=_gap(figures.made, "train"),
            gap_test=_gap(figures.made, "test"),
            rows=self._row_statistics(before, folded),
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            seconds=clock.seconds,
        )
        self.history.append(log)
        self._whole = True
        return log

    def _cohort(self, number: int) -> list[int]:
        """Places of the sampled clients; drawn over sorted ids, so their order does not matter."""
        ids = self._population.ids
        by_id = sorted(range(len(ids)), key=ids.__getitem__)
        k = max(1, round(self.participation * len(ids)))
        if k == len(ids):
            return by_id
        drawn = numpy_generator(self.seed, "cohort", number).choice(len(ids), k, replace=False)
        return [by_id[i] for i in np.sort(drawn)]

    def _drops(self, number: int, place: int) -> bool:
        if not self.dropout:
            return False
        name = self._population.ids[place]
        return numpy_generator(self.seed, "dropout", number, name).random() < self.dropout

    def _task(self, places: list[int], number: int, message: Tensor) -> Task:
        memory = {name: table[places] for name, table in self._memory.items()}
        return Task(places, number, message, memory)

    def _updates(self, tickets: tuple[Ticket, ...], done: Trained) -> Updates:
        lr = torch.full((len(tickets),), self.training.lr, dtype=torch.float64)
        local = done.local
        return Updates(tickets, local.delta, done.n_examples, local.steps, lr, local.extra)

    def _evaluate(self, figures: _PerClientArrays, number: int) -> None:
        """Measure what every client would use now, and that after one local epoch."""
        groups = list(self._population.groups(range(len(self.clients))))
        tasks = (self._unsent(places, number) for places in groups)
        for places, found in zip(groups, self._executor.evaluate(tasks), strict=True):
            for model, measured in found.items():
                figures.put(model, places, measured)

    def _unsent(self, places: list[int], number: int) -> Task:
        """The task of clients that would be sent their models now."""
        message = self.soup.message([self._population.ids[i] for i in places])
        return self._task(places, number, message)

    def personal(self, ids: Sequence[str]) -> Tensor:
        """(k, P): the model that each of the clients `ids` would use now."""
        place = {name: i for i, name in enumerate(self._population.ids)}
        unknown = [name for name in ids if name not in place]
        if unknown:
            raise ConfigError(f'there is no client "{unknown[0]}" in this simulation')
        task = self._unsent([place[name] for name in ids], len(self.history) + 1)
        return self._side.personal(task)

    def _row_statistics(
        self, before: Tensor | None, folded: Sequence[str]
    ) -> dict[str, float] | None:
        after = self.soup.weights()
        if before is None or after is None:
            return None
        place = {name: i for i, name in enumerate(self.soup.clients)}
        at = [place[name] for name in folded]
        moved = 0.5 * (after[at] - before[at]).abs().sum(-1)
        return {
            "entropy": float(torch.special.entr(after).sum(-1).mean()),
            "largest": float(after.amax(-1).mean()),
            "movement": float(moved.mean()) if at else 0.0,
        }

    def _check_outputs(self) -> None:
        """One evaluation of one client shows a model that does not fit the data, in one line."""
        try:
            self._side.trainer([0], 0).loss(self.soup.setup.initial(0)[None])
        except (RuntimeError, IndexError, ValueError) as error:
            shape = tuple(self.clients[0].train.x.shape[1:])
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"the model cannot be trained on inputs of shape {shape} with "
                f"{self.training.loss}: {reason}"
            ) from error

    # -- results and checkpoints -------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """The run in plain JSON values, as of the last evaluated round."""
        weights = self.soup.weights(self._population.ids)
        return summarise_run(
            self.history, self.clients, self._latest, weights, self.soup.setup.layout.blocks
        )

    def save(self) -> None:
        """Write the checkpoint, atomically. Raises StateError if there is no folder to write to."""
        if self._folder is None:
            raise ConfigError("this simulation has no checkpoint folder: pass checkpoint=FOLDER")
        tensors, facts = self.soup.state()
        tensors |= {f"memory.{name}": table for name, table in self._memory.items()}
        for model, splits in self._latest.items():
            for split, found in splits.items():
                tensors[f"latest.{model}.{split}.loss"] = torch.from_numpy(found.loss)
                tensors[f"latest.{model}.{split}.accuracy"] = torch.from_numpy(found.accuracy)
        history = [log.to_json() for log in self.history]
        save_state(self._folder, tensors, facts | {"run": self._identity(), "history": history})
        self._saved_rounds = len(self.history)

    def _resume(self, folder: Path) -> None:
        tensors, facts = load_state(folder)
        self.soup.restore(tensors, facts, str(folder))
        for name, own in self._identity().items():
            if facts.get("run", {}).get(name) != own:
                found = facts.get("run", {}).get(name)
                raise StateError(
                    f"{folder} is of another run: its {name} is {found}, wanted {own}; "
                    "use another folder, or the settings it was made with"
                )
        self.history = [RoundLog.from_json(values) for values in facts["history"]]
        self._saved_rounds = len(self.history)
        self._memory = {name: tensors[f"memory.{name}"] for name in self._memory}
        self._latest = defaultdict(dict)
        for name in tensors:
            if name.startswith("latest.") and name.endswith(".loss"):
                _, model, split, _ = name.split(".")
                accuracy = tensors[f"latest.{model}.{split}.accuracy"]
                self._latest[model][split] = Measured(tensors[name].numpy(), accuracy.numpy())

    def _identity(self) -> dict[str, Any]:
        return {
            "training": dataclasses.asdict(self.training),
            "participation": self.participation,
            "dropout": self.dropout,
            "evaluate_every": self.evaluate_every,
            "clients": [[c.id, len(c.train), len(c.validation), len(c.test)] for c in self.clients],
        }


def _federation(clients: Sequence[Client]) -> Federation:
    """Clients of the caller's own: what a model takes and gives is read off their data."""
    if not clients:
        raise ConfigError("clients is empty: wanted 1 client or more")
    first = clients[0].train
    shape = tuple(first.x.shape[1:])
    if first.y.dtype.is_floating_point:
        return Federation("clients", tuple(clients), "regression", first.y.shape[-1], shape)
    targets = [split.y for c in clients for _, split in c.splits() if len(split)]
    n_classes = max((int(y.max()) + 1 for y in targets), default=0)
    return Federation("clients", tuple(clients), "classification", n_classes, shape)


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("send", "local", "fold", "commit", "evaluate"), 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def over(self, phase: str, items: Iterator[T]) -> Iterator[T]:
        """Charge the making of `items` to `phase`, but for what is charged elsewhere meanwhile."""
        while True:
            start, others = time.perf_counter(), sum(self.seconds.values())
            item = next(items, None)
            spent = time.perf_counter() - start
            self.seconds[phase] += spent - (sum(self.seconds.values()) - others)
            if item is None:
                return
            yield item


class _PerClientArrays:
    """Per-client figures, filled group by group; NaN for clients not measured."""

    def __init__(self, m: int) -> None:
        self._m = m
        self.made: PerClient = {}

    def put(self, model: str, places: list[int], found: dict[str, Measured]) -> None:
        splits = self.made.setdefault(model, {s: self._empty() for s in SPLITS})
        for split, values in found.items():
            splits[split].loss[places] = values.loss
            splits[split].accuracy[places] = values.accuracy

    def _empty(self) -> Measured:
        return Measured(np.full(self._m, np.nan), np.full(self._m, np.nan))


def _summaries(made: PerClient) -> dict[str, Any]:
    return {m: {s: made[m][s].summary() for s in SPLITS} for m in MODELS if m in made}


def _gap(made: PerClient, split: str) -> float | None:
    if "local" not in made or "merged" not in made:
        return None
    local = made["local"][split].loss
    measured = ~np.isnan(local)
    with np.errstate(invalid="ignore"):
        gap: Array = made["merged"][split].loss[measured] - local[measured]
    # Not finite where a model has diverged.
    return float(gap.mean()) if len(gap) and np.isfinite(gap).all() else None
