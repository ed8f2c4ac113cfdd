"""Worker processes that run cells, one after the other, each living for many of them.

It survives a cell that raises and a worker that is killed, and leaves no process behind; what a
cell computes, and whether it has to run at all, is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import FedmergeError
from .cells import Cell

Work = Callable[[dict[str, Any], Path], object]


@dataclass(frozen=True)
class Outcome:
    """How one cell ended."""

    cell: Cell
    error: str | None  # one line, or None where the cell is finished
    details: str = ""  # the traceback in the worker, where there is one
    seconds: float = 0.0


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    cell: Cell | None = None


@dataclass
class Crew:
    """A context of worker processes; leaving it ends them all, whatever they are doing.

    Args:
        work: called as `work(config, folder)`; like `prepare`, a function of a module.
        size: number of processes.
        prepare: called once in each process, while the first cells are still being checked.
    """

    work: Work
    size: int
    prepare: Callable[[], object] | None = None
    _workers: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> Self:
        try:
            for _ in range(self.size):
                self._workers.append(self._hire())
        except BaseException:
            self._dismiss()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._dismiss()

    def run(self, cells: Sequence[Cell], out: Path) -> Iterator[Outcome]:
        """Run `cells` in their folders inside `out`; yield each one's outcome as it ends.

        The longest cells go first, as far as finished cells of the same setting and method tell.
        """
        waiting = list(cells)
        seconds: dict[tuple[object, object], float] = {}
        while waiting or any(worker.cell for worker in self._workers):
            for place, worker in enumerate(self._workers):
                if worker.cell is None and waiting:
                    cell = max(waiting, key=lambda one: seconds.get(_group(one), float("inf")))
                    waiting.remove(cell)
                    self._workers[place] = self._give(worker, cell, out)
            busy = {worker.pipe: worker for worker in self._workers if worker.cell is not None}
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                outcome = _collect(worker)
                worker.cell = None
                if outcome.error is None:
                    seconds[_group(outcome.cell)] = outcome.seconds
                yield outcome

    def _give(self, worker: _Worker, cell: Cell, out: Path) -> _Worker:
        """Hand `cell` to `worker`, or to a new one where that one has died."""
        if worker.process.exitcode is not None:
            worker.pipe.close()
            worker = self._hire()
        worker.cell = cell
        with contextlib.suppress(OSError):  # died just now: `_collect` will see it
            worker.pipe.send((dict(cell.config), cell.folder(out)))
        return worker

    def _hire(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, self.work, self.prepare), daemon=True)
        with _interrupts_held():
            process.start()
        there.close()  # so that the death of the worker shows as the end of `here`
        return _Worker(process, here)

    def _dismiss(self) -> None:
        for worker in self._workers:
            worker.process.kill()  # at any instant: what a cell writes is whole
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()


def _group(cell: Cell) -> tuple[object, object]:
    return cell.config["setting"], cell.config["method"]


def _collect(worker: _Worker) -> Outcome:
    """Return the outcome of the worker's cell; its death is one, too."""
    cell = worker.cell
    if cell is None:
        raise RuntimeError("a worker without a cell has no outcome")
    try:
        return Outcome(cell, *worker.pipe.recv())
    except (EOFError, OSError):
        worker.process.join()
        code = worker.process.exitcode or 0
        reason = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return Outcome(cell, f"its process was {reason}" if code < 0 else f"its process {reason}")


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start a child with Ctrl-C blocked for good: only the parent answers it, with one line."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # else started below, where it would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, work: Work, prepare: Callable[[], object] | None) -> None:
    """Worker process: run the cells that come through `pipe` until it closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare()
    while True:
        try:
            config, folder = pipe.recv()
        except (EOFError, OSError):
            return
        start, error, details = time.monotonic(), None, ""
        try:
            work(config, folder)
        except Exception as raised:
            # The worker goes on with other cells, so every kind of error ends here, as text.
            text = str(raised) if isinstance(raised, FedmergeError | OSError) else repr(raised)
            error, details = " ".join(text.split()), traceback.format_exc()
        pipe.send((error, details, time.monotonic() - start))


def _end_with_parent() -> None:
    """Leave no orphan when the parent is killed in a way that lets it clean nothing up."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
