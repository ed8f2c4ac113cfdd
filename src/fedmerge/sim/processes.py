"""Clients' work in worker processes, results in the order of the tasks: the same bits for any
number of workers, also when one of them is killed.

What the work is, and how a group of clients is put together, is not decided here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import pickle
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch

from ..errors import ConfigError, FedmergeError, StateError
from ..workers import Worker, Workers
from .execute import ClientSide, Parcel, Task, Trained
from .log import Measured
from .mail import Answering, Asking, out_of_shared_memory

AT_ONCE = 2
"""Tasks that a worker has at a time, so that it need not wait for the next one."""
AHEAD = 2 * AT_ONCE
"""Tasks for each worker that have been begun and not handed over: results wait for their turn."""
ATTEMPTS = 3


@dataclass(eq=False)
class Job:
    """A task on its way.

    Attributes:
        measured: of `ClientSide.train`, or None for `ClientSide.evaluate`.
        size: examples in it, all steps being alike.
        lost: worker processes that have died of it.
    """

    task: Task
    measured: bool | None
    size: int = 1
    lost: int = 0
    result: Any = None


@dataclass(frozen=True)
class Failure:
    """An exception of a worker in place of a result."""

    error: Exception
    details: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Keep an exception, as text where it cannot be sent."""
        details = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # exceptions, too, raise what they like when they are pickled
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(error, details)

    @property
    def of_memory(self) -> bool:
        """Whether there was no memory left."""
        words = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
        return isinstance(self.error, MemoryError) or any(w in str(self.error) for w in words)

    def reraise(self, no_memory: str) -> NoReturn:
        """Raise it here, as ConfigError with `no_memory` if there was no memory left."""
        if self.of_memory:
            raise ConfigError(no_memory) from self.error
        if not isinstance(self.error, FedmergeError):
            self.error.add_note(self.details)
        raise self.error


@dataclass(eq=False)
class _Desk:
    """A worker process and its open jobs by slot, in the order in which it does them."""

    worker: Worker
    mail: Asking
    ready: bool = False
    jobs: dict[int, Job] = field(default_factory=dict)

    @property
    def load(self) -> tuple[bool, int]:
        """Whether it can take no more, and how much it has to do."""
        return len(self.jobs) == AT_ONCE, sum(job.size for job in self.jobs.values())

    def give(self, job: Job) -> None:
        slot = next(i for i in range(AT_ONCE) if i not in self.jobs)
        self.jobs[slot] = job
        with contextlib.suppress(ConnectionError):  # it shows when it is heard
            self.mail.ask(slot, (job.task, job.measured))


class Processes:
    """Worker processes, started with the first task and ended by `close`; then started anew.

    Args:
        side: what they do; the clients' data move into shared memory, once for all of them.
        workers: number of processes, of one thread each.

    Raises:
        ConfigError: no worker at all; when they start: a method or module that cannot be sent to
            another process, no shared memory; when they work: no memory.
        StateError: processes that die again and again.
    """

    def __init__(self, side: ClientSide, workers: int) -> None:
        if workers < 1:
            raise ConfigError(f"workers = {workers}: wanted 1 or more")
        self.side = side
        self.size = min(workers, -(-len(side.population.ids) // side.group))
        self._workers = Workers(0, _serve)
        self._desks: dict[Connection, _Desk] = {}
        self._failed_starts = 0

    def train(self, tasks: Iterable[Task], *, measured: bool) -> Iterator[Trained]:
        """See `ClientSide.train`."""
        return self._results(self._job(task, measured) for task in tasks)

    def evaluate(self, tasks: Iterable[Task]) -> Iterator[dict[str, dict[str, Measured]]]:
        """See `ClientSide.evaluate`."""
        return self._results(self._job(task, None) for task in tasks)

    def _job(self, task: Task, measured: bool | None) -> Job:
        count = self.side.population.splits["train"].count
        return Job(task, measured, int(count[task.places].sum()) + 1)

    def start(self) -> Workers:
        """Start the processes, unless they are there; see the class for what is raised."""
        if self._desks:
            return self._workers
        if multiprocessing.current_process().daemon:
            raise ConfigError(
                'execution = "processes" inside a worker process, which may not start others: use '
                'execution "auto" there'
            )
        self._parcel = Parcel.of(self.side, "processes")
        self._workers = Workers(self.size, _serve)
        for worker in self._workers:
            self._settle(worker)
        return self._workers

    def close(self) -> None:
        """End all processes."""
        self._workers.dismiss()
        self._desks.clear()
        self._failed_starts = 0

    # -- jobs --------------------------------------------------------------------------------------

    def _results(self, jobs: Iterator[Job]) -> Iterator[Any]:
        begun: deque[Job] = deque()
        again: deque[Job] = deque()
        finished = False
        workers = self._workers
        try:
            workers = self.start()
            while True:
                self._hand_out(jobs, begun, again)
                if not begun:
                    break
                if begun[0].result is None:
                    self._hear(again)
                else:
                    yield self._opened(begun.popleft())
            finished = True
        finally:
            # What the workers still do, on Ctrl-C, is wanted by nobody. This may come late, from
            # the garbage collector: others may be at work by then.
            if not finished and workers is self._workers:
                self.close()

    def _hand_out(self, jobs: Iterator[Job], begun: deque[Job], again: deque[Job]) -> None:
        while True:
            desk = min(self._desks.values(), key=lambda one: one.load)
            if desk.load[0]:
                return
            if again:
                desk.give(again.popleft())
                continue
            if len(begun) >= AHEAD * self.size:
                return
            job = next(jobs, None)
            if job is None:
                return
            begun.append(job)
            desk.give(job)

    def _hear(self, again: deque[Job]) -> None:
        """Take the answers that are there, at least one; replace workers that have died."""
        if not any(desk.jobs for desk in self._desks.values()):
            # Nobody would ever answer, and the wait below would not end.
            raise RuntimeError("a task is with no worker and has no result: a fault of fedmerge")
        for pipe in connection.wait(list(self._desks)):
            desk = self._desks[pipe]  # type: ignore[index]
            try:
                if desk.ready:
                    slot, result = desk.mail.hear()
                    desk.jobs.pop(slot).result = result
                else:
                    problem = desk.worker.pipe.recv()
                    if problem is not None:
                        raise problem
                    desk.ready = True
                    self._failed_starts = 0
            except (EOFError, OSError):
                # The earliest jobs first, since results wait for their turn.
                again.extendleft(reversed(self._replace(desk)))

    def _replace(self, desk: _Desk) -> list[Job]:
        """Put a new worker in the place of one that died; return the jobs it leaves behind."""
        how = desk.worker.death()
        left = list(desk.jobs.values())
        if not desk.ready:
            self._failed_starts += 1
            if self._failed_starts == ATTEMPTS:
                raise StateError(
                    f"worker processes were not able to start: {ATTEMPTS} times in a row one "
                    f'{how}; a script has to start its work under `if __name__ == "__main__":`'
                )
        elif left:
            left[0].lost += 1
            if left[0].lost == ATTEMPTS:
                raise StateError(
                    f"{self._named(left[0].task)}: its worker process {how}, {ATTEMPTS} times in a "
                    "row; a checkpoint stays as it is: see to the cause, such as memory, and go on "
                    'from there, or use execution "sequential"'
                )
        del self._desks[desk.worker.pipe]
        self._settle(self._workers.replace(desk.worker))
        return left

    def _opened(self, job: Job) -> Any:
        if isinstance(job.result, Failure):
            job.result.reraise(
                f"{self._named(job.task)}: a worker process is out of memory; use fewer workers "
                f"than {self.size}, or a smaller model or batch size"
            )
        return job.result

    def _named(self, task: Task) -> str:
        ids = self.side.population.ids
        return f"round {task.round}, {len(task.places)} clients from {ids[task.places[0]]} on"

    # -- processes ---------------------------------------------------------------------------------

    def _settle(self, worker: Worker) -> None:
        self._desks[worker.pipe] = _Desk(worker, Asking(worker.pipe, AT_ONCE))
        try:
            with contextlib.suppress(ConnectionError):
                worker.pipe.send(self._parcel)
        except RuntimeError as error:
            train = self._parcel.population.splits["train"]
            raise out_of_shared_memory(train.x.nbytes + train.y.nbytes) from error


def _serve(pipe: Connection) -> None:
    """Worker process: do the tasks that come through `pipe` until it closes."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the other end is gone
        side = _side(pipe)
        mail = Answering(pipe)
        while side is not None:
            slot, (task, measured) = mail.hear()
            try:
                mail.answer(slot, _done(side, task, measured))
            except Exception as error:
                mail.answer(slot, Failure.of(error))


def _side(pipe: Connection) -> ClientSide | None:
    parcel: Parcel = pipe.recv()
    try:
        side = parcel.open()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        pipe.send(
            ConfigError(
                f'execution = "processes": a worker process cannot load the model or method '
                f"({reason}); define them in a module that it can import"
            )
        )
        return None
    pipe.send(None)
    return side


def _done(side: ClientSide, task: Task, measured: bool | None) -> Any:
    if measured is None:
        return side.evaluate(task)
    done = side.train(task, measured=measured)
    # The largest part of a result, which nobody needs any more.
    local = dataclasses.replace(done.local, own=None)
    return dataclasses.replace(done, local=local)
