"""The simulation: the one loop over rounds, for every method and every way of executing it.

A round is send, local training, fold, commit, evaluate. It moves no bytes over a network; see
`fedmerge.soup` for the server it shares with a deployment.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..algorithms import Algorithm, Tensors, Ticket, check_method
from ..data.clients import Client, Federation, check_federation, describe, federation_of
from ..errors import ConfigError, ModelError, did_you_mean
from ..local import Mixture, Training
from ..params import Blocks, ModelSource, build
from ..soup import Soup
from ..storage import Kept
from ..store import has_state
from . import checkpoint as saved
from .choice import Auto, described, make_executor
from .clock import Clock
from .cluster import Cluster
from .cohort import Draws
from .evaluation import Evaluation
from .execute import EXECUTIONS, ClientSide, Task, Trained
from .log import Measured, RoundLog
from .mixing import importance, row_statistics
from .population import Population
from .results import summarise_run
from .signals import put_off


@dataclass
class Round:
    """What a round gathers while it is under way; grows in place.

    Attributes:
        number: from 1. cohort, replying: places of the clients sampled, and of those that reply.
        evaluated: whether it ends with an evaluation, `evaluation`.
        working: the tasks that are being done, with their tickets. memory: what clients keep.
    """

    number: int
    cohort: list[int]
    replying: set[int]
    evaluated: bool
    evaluation: Evaluation
    clock: Clock = field(default_factory=Clock)
    working: deque[tuple[Task, tuple[Ticket, ...]]] = field(default_factory=deque)
    memory: list[tuple[list[int], Tensors]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    bytes_up: int = 0
    bytes_down: int = 0


class Simulation:
    """Many clients and their server in one process.

    Args:
        algorithm: the method.
        clients: a federation, or its clients; results do not depend on their order.
        model: a function that makes the module, or a module. A function is called anew for every
            independent initialisation; a module begins with its own values, and its layers are
            reset for every further one.
        training: how clients train.
        rounds: how many to run in all, also when resumed.
        participation: share of the clients in a round's cohort, at least one client.
        dropout: chance that a client of the cohort never replies.
        seed: of every draw: cohorts, batches, initial models.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
        evaluate_on: share of the clients that `merged` and `tuned` are evaluated on, at least two,
            drawn anew for each evaluation; means then have a standard error, and the round of least
            validation loss is one of a lucky sample, too.
        execution: "auto", "stacked" or "sequential" (`Engine`), in this process; "processes" for
            worker processes, "ray" for actors on a Ray cluster, each doing as "auto" does. With
            "auto" and a number of workers, in worker processes if the first rounds show that this
            is faster (the same bits): a script then needs `if __name__ == "__main__":`.
        workers: number of worker processes or actors; None for one on each CPU, but with "auto"
            for none.
        address: of a running Ray cluster, "host:port" or "auto"; None for one of this run's own.
        blocks: the blocks of layers that have a row of merging weights each (`Layout.of`).
        storage: dtype of the server's models: "float32", "bfloat16", or "model" for the module's.
        models_in: folder for the server's models, if they are to be in files (`Soup`).
        checkpoint: folder to save to and to resume from; None for none.
        checkpoint_seconds: least time between saves; the end and an interruption always save.

    Attributes:
        draws: who takes part in what. saving: seconds spent on checkpoints by this process.
        saves_last: whether to save after the last round, too; on an interruption always.

    Raises:
        ConfigError, DataError, ModelError: settings, data or a model that cannot be used.
        StateError: a checkpoint that is damaged, of another run, or of more rounds.
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
        evaluate_on: float = 1.0,
        execution: str = "auto",
        workers: int | None = None,
        address: str | None = None,
        blocks: Blocks = "layer",
        storage: Kept = "model",
        models_in: Path | str | None = None,
        checkpoint: Path | str | None = None,
        checkpoint_seconds: float = 30.0,
    ) -> None:
        check_method(algorithm)
        for name, good, value, wanted in (
            ("rounds", rounds >= 1, rounds, "1 or more"),
            ("participation", 0 < participation <= 1, participation, "more than 0, at most 1"),
            ("evaluate_on", 0 < evaluate_on <= 1, evaluate_on, "more than 0, at most 1"),
            ("dropout", 0 <= dropout < 1, dropout, "0 or more and less than 1"),
            ("evaluate_every", evaluate_every >= 1, evaluate_every, "1 or more"),
            ("workers", workers is None or workers >= 1, workers, "1 or more, or None"),
        ):
            if not good:
                raise ConfigError(f"{name} = {value}: wanted {wanted}")
        if execution not in EXECUTIONS:
            raise ConfigError(f'execution = "{execution}"{did_you_mean(execution, EXECUTIONS)}')
        if address is not None and execution != "ray":
            raise ConfigError(f'address = "{address}" is of a Ray cluster: wanted execution "ray"')
        federation = clients if isinstance(clients, Federation) else federation_of(clients)
        check_federation(federation)
        self._federation = federation
        self.clients = federation.clients
        self.algorithm = algorithm.resolve(len(self.clients))
        classes = federation.task == "classification"
        self.training = (training or Training()).for_data(classes=classes)
        self.n_rounds = rounds
        self.seed, self.evaluate_every = seed, evaluate_every
        n_inputs = math.prod(federation.input_shape)
        self.soup = Soup(
            self.algorithm,
            model,
            seed=seed,
            blocks=blocks,
            n_inputs=n_inputs,
            storage=storage,
            models_in=models_in,
        )
        self._population = Population.of(self.clients)
        self.draws = Draws(self._population.ids, seed, participation, dropout, evaluate_on)
        self._side = ClientSide(
            self.algorithm,
            self.soup.setup,
            build(model, seed),
            self.training,
            self._population,
            seed,
            "auto" if execution in ("processes", "ray") else execution,
        )
        _ = self._side.travelling  # a method that has it wrong is told so now
        self._executor = make_executor(self._side, execution, self.draws.size, workers, address)
        self.soup.join(sorted(self._population.ids))
        self._progress = saved.Progress(self.algorithm.memory(self.soup.setup, len(self.clients)))
        self._folder = None if checkpoint is None else Path(checkpoint)
        self._interval = checkpoint_seconds
        self.saving = 0.0
        self.saves_last = True
        self._whole = True
        self._check_outputs()
        if self._folder is not None and has_state(self._folder):
            self._progress = saved.load(
                self._folder, self._identity(), self.soup, self._progress, rounds
            )
        self._saved_rounds = len(self.history)

    # -- the loop ----------------------------------------------------------------------------------

    @property
    def history(self) -> list[RoundLog]:
        """A log for each round that is done."""
        return self._progress.history

    @property
    def _memory(self) -> Tensors:
        return self._progress.memory

    def rounds(self) -> Generator[RoundLog]:
        """Run the rounds that are not done yet, and yield the log of each.

        Worker processes live from the first round to the last, or until the generator is closed.
        """
        saved_at = time.monotonic()
        with closing(self._executor):
            try:
                while len(self.history) < self.n_rounds:
                    log = self._round(len(self.history) + 1)
                    if isinstance(self._executor, Auto):
                        self._executor.after(log, self.n_rounds - log.round)
                    if self._folder and time.monotonic() - saved_at > self._interval:
                        self.save()
                        saved_at = time.monotonic()
                    yield log
            finally:
                # Also on Ctrl-C. What fails inside a commit leaves a state of neither round: keep
                # the older.
                new = self._whole and len(self.history) > self._saved_rounds
                if self._folder and new and (self.saves_last or len(self.history) < self.n_rounds):
                    self.save()

    def _round(self, number: int) -> RoundLog:
        """One round: send, local training, fold, commit, evaluate."""
        self.soup.abandon()  # what an interrupted attempt at this round has left
        now = self._begin(number)
        clock = now.clock
        if isinstance(self._executor, Cluster):
            self._train_apart(now, self._executor)
        else:
            trained = self._executor.train(self._send(now), measured=now.evaluated)
            for done in clock.over("local", trained):
                with clock("fold"):
                    self._fold(now, done)
        with put_off():  # in between the state is of neither round
            return self._end(now)

    def _end(self, now: Round) -> RoundLog:
        """Commit and evaluate; the round is in the history then."""
        with now.clock("commit"):
            before = self.soup.weights()
            self._whole = False
            folded = self.soup.commit()
            for places, memory in now.memory:
                for name, value in memory.items():
                    self._memory[name][places] = value
            rows = self._row_statistics(before, folded)
        if now.evaluated:
            with now.clock("evaluate"):
                self._evaluate(now.evaluation)
        found = now.evaluation
        log = RoundLog(
            round=now.number,
            cohort=len(now.cohort),
            dropped=len(now.cohort) - len(now.replying),
            refused=dict(now.refused),
            metrics=found.metrics(),
            gap_train=found.gap("train"),
            gap_test=found.gap("test"),
            rows=rows,
            bytes_up=now.bytes_up,
            bytes_down=now.bytes_down,
            seconds=now.clock.seconds,
        )
        self.history.append(log)
        self._whole = True
        return log

    def _begin(self, number: int) -> Round:
        cohort = self.draws.cohort(number)
        replying = {i for i in cohort if not self.draws.drops(number, i)}
        evaluated = number % self.evaluate_every == 0 or number == self.n_rounds
        return Round(number, cohort, replying, evaluated, Evaluation(number, len(self.clients)))

    def _send(self, now: Round) -> Iterator[Task]:
        """The tasks of the clients that reply, group by group; all of the cohort are sent to."""
        for group in self._population.groups(now.cohort, self._side.group):
            with now.clock("send"):
                sent = self.soup.send([self._population.ids[i] for i in group])
                now.bytes_down += self._side.wire(sent.message)
                there = [p for p, i in enumerate(group) if i in now.replying]
                if not there:
                    continue
                # Not copied if it is for all: it may be one model, seen once for each client.
                message = sent.message if len(there) == len(group) else sent.message[there]
                task = self._task([group[p] for p in there], now.number, message)
                now.working.append((task, tuple(sent.tickets[p] for p in there)))
            yield task

    def _fold(self, now: Round, done: Trained) -> None:
        """Take in what the next of the working groups has done."""
        task, tickets = now.working.popleft()
        updates = done.updates(tickets, self.training.lr)
        now.bytes_up += sum(map(self._side.wire, (updates.delta, *updates.extra.values())))
        now.refused.update(r.reason for r in self.soup.fold(updates))
        now.memory.append((task.places, done.local.memory))
        if done.own is not None:
            now.evaluation.put("local", task.places, done.own)

    def _train_apart(self, now: Round, cluster: Cluster) -> None:
        """Send, local training and fold, where the clients' data are."""
        with now.clock("local"):
            harvest = cluster.train(
                self.soup, now.number, now.cohort, now.replying, self._memory, now.evaluated
            )
        with now.clock("fold"):
            self.soup.absorb(harvest.gathered)
        now.refused.update(r.reason for r in harvest.gathered.refusals)
        now.memory += harvest.memory
        now.bytes_up, now.bytes_down = harvest.bytes_up, harvest.bytes_down
        for places, found in harvest.found:
            for model, measured in found.items():
                now.evaluation.put(model, places, measured)

    def _row_statistics(
        self, before: Tensor | None, folded: Sequence[str]
    ) -> dict[str, float] | None:
        after = self.soup.weights()
        if before is None or after is None:
            return None
        place = {name: i for i, name in enumerate(self.soup.clients)}
        return row_statistics(before, after, [place[name] for name in folded])

    def _evaluate(self, evaluation: Evaluation) -> None:
        """Measure what every client would use now, and that after one local epoch."""
        for places, found in self._measured(evaluation.round + 1):
            for model, measured in found.items():
                evaluation.put(model, places, measured)
        self._progress.evaluated(evaluation)
        weights = self.soup.weights(self._population.ids)
        if weights is not None:
            self._progress.weights.add(evaluation.round, weights)

    def _measured(self, number: int) -> Iterator[tuple[list[int], dict[str, dict[str, Measured]]]]:
        chosen = self.draws.evaluated(number - 1)
        if isinstance(self._executor, Cluster):
            yield from self._executor.evaluate(self.soup, number, self._memory, chosen).found
            return
        groups = list(self._population.groups(chosen, self._side.group))
        tasks = (self._unsent(places, number) for places in groups)
        yield from zip(groups, self._executor.evaluate(tasks), strict=True)

    def _task(self, places: list[int], number: int, message: Tensor) -> Task:
        memory = {name: table[places] for name, table in self._memory.items()}
        return Task(places, number, message, memory)

    def _unsent(self, places: list[int], number: int) -> Task:
        """The task of clients that are given what they would use now."""
        message = self.soup.used([self._population.ids[i] for i in places])
        return replace(self._task(places, number, message), told=self.soup.told(len(places)))

    def personal(self, ids: Sequence[str]) -> Tensor | Mixture:
        """(k, P) or mixtures: the model that each of the clients `ids` would use now."""
        place = {name: i for i, name in enumerate(self._population.ids)}
        unknown = [name for name in ids if name not in place]
        if unknown:
            raise ConfigError(f'there is no client "{unknown[0]}" in this simulation')
        task = self._unsent([place[name] for name in ids], len(self.history) + 1)
        return self._side.personal(task)

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
        """The run in plain JSON values: as of the last evaluated round, and of the best one."""
        weights = self.soup.weights(self._population.ids)
        layout = self.soup.setup.layout
        made = summarise_run(
            self._progress,
            describe(self._federation),
            weights,
            layout.blocks,
            self.importance(),
            self.algorithm.cost(self.soup.setup, len(self.clients), self.training.epochs),
        )
        return {**made, "examples": self._population.summary()}

    def importance(self) -> Tensor | None:
        """(m, d) float64: by how much each client's validation loss would rise now if one of the
        models were taken out of its mix; None for methods that do not mix models by weights."""

        def loss(places: list[int], rows: Tensor) -> Tensor:
            return self._side.trainer(places, len(self.history)).loss(rows, "validation")

        return importance(
            self.algorithm.mixed(self.soup.shared),
            self.soup.weights(self._population.ids),
            self.soup.setup.layout,
            self._population.groups(range(len(self.clients)), self._side.group),
            loss,
        )

    def weight_history(self) -> dict[str, np.ndarray[Any, Any]]:
        """rounds (T,) and merging weights (T, m, b, d) float32 after each evaluated round, row i
        client i's; empty for methods without."""
        return self._progress.weights.arrays()

    def save(self) -> None:
        """Write the checkpoint, atomically. Raises StateError if it cannot be written."""
        if self._folder is None:
            raise ConfigError("this simulation has no checkpoint folder: pass checkpoint=FOLDER")
        began = time.perf_counter()
        saved.save(self._folder, self._identity(), self.soup, self._progress)
        self._saved_rounds = len(self.history)
        self.saving += time.perf_counter() - began

    @property
    def chosen(self) -> str:
        """How clients are trained, and why so, in a line."""
        return described(self._side, self._executor)

    def _identity(self) -> dict[str, Any]:
        return {
            "training": dataclasses.asdict(self.training),
            "participation": self.draws.participation,
            "dropout": self.draws.dropout,
            "evaluate_every": self.evaluate_every,
            "evaluate_on": self.draws.evaluate_on,
            "clients": [[c.id, len(c.train), len(c.validation), len(c.test)] for c in self.clients],
            "data": self._population.digest,
        }
