"""Worker processes that run cells, one after the other, each living for many of them.

It survives a cell that raises and a worker that is killed, and leaves no process behind; what a
cell computes, whether it has to run at all, and what may run once it has ended, is decided
elsewhere.
"""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import FedmergeError
from ..workers import Worker, Workers
from .cells import Cell

Work = Callable[[dict[str, Any], Path], object]


@dataclass(frozen=True)
class Outcome:
    """How one cell ended."""

    cell: Cell
    error: str | None  # one line, or None where the cell is finished
    details: str = ""  # the traceback in the worker, where there is one
    seconds: float = 0.0
    died: bool = False  # its process ended before it did


class Crew:
    """A context of worker processes; leaving it ends them all, whatever they are doing.

    Args:
        work: called as `work(config, folder)`; like `prepare`, a function of a module.
        size: number of processes.
        prepare: called once in each process.
    """

    def __init__(self, work: Work, size: int, prepare: Callable[[], object] | None = None) -> None:
        # What a cell writes is whole, so its process may be killed at any instant.
        self._workers = Workers(size, _serve, work, prepare)
        self._cells: dict[Worker, Cell] = {}
        self._again: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._workers.dismiss()

    def run(
        self,
        cells: Iterable[Cell],
        out: Path,
        after: Callable[[Outcome], Iterable[Cell]] = lambda outcome: (),
    ) -> Iterator[Outcome]:
        """Run `cells` in their folders inside `out`; yield each one's outcome as it ends.

        The longest cells go first, as far as finished ones of the same data and method tell. One
        whose process dies, which memory that ran out for all may have killed, is tried once more.

        Args:
            after: called with each outcome; returns the cells that may run from then on.
        """
        queue = _Queue(cells)
        while queue or self._cells:
            for worker in list(self._workers):
                if worker not in self._cells and queue:
                    self._give(worker, queue.longest(), out)
            busy = {worker.pipe: worker for worker in self._cells}
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                outcome = _collect(worker, self._cells.pop(worker))
                if outcome.died and outcome.cell.name not in self._again:
                    self._again.add(outcome.cell.name)
                    queue.add([outcome.cell])
                    continue
                if outcome.error is None:
                    queue.learn(outcome.cell, outcome.seconds)
                queue.add(after(outcome))
                yield outcome

    def _give(self, worker: Worker, cell: Cell, out: Path) -> None:
        """Hand `cell` to `worker`, or to a new one where that one has died."""
        if worker.process.exitcode is not None:
            worker = self._workers.replace(worker)
        self._cells[worker] = cell
        with contextlib.suppress(OSError):  # died just now: `_collect` will see it
            worker.pipe.send((dict(cell.config), cell.folder(out)))


class _Queue:
    """Cells that wait, by how long they are expected to take: thousands of them, so in groups."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._waiting: dict[tuple[object, ...], deque[Cell]] = {}
        self._seconds: dict[tuple[object, ...], float] = {}
        self.add(cells)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, cells: Iterable[Cell]) -> None:
        for cell in cells:
            self._waiting.setdefault(_group(cell), deque()).append(cell)

    def longest(self) -> Cell:
        """Take out the cell that is expected to take longest; what is not known goes first."""
        group = max(self._waiting, key=self._expected)
        cells = self._waiting[group]
        cell = cells.popleft()
        if not cells:
            del self._waiting[group]
        return cell

    def learn(self, cell: Cell, seconds: float) -> None:
        group = _group(cell)
        self._seconds[group] = self._seconds[group[:2]] = seconds

    def _expected(self, group: tuple[object, ...]) -> float:
        # Another setting of the same data is near enough, until its own is known.
        return self._seconds.get(group, self._seconds.get(group[:2], math.inf))


def _group(cell: Cell) -> tuple[object, ...]:
    return tuple(cell.config.get(key) for key in ("data", "method", "setting"))


def _collect(worker: Worker, cell: Cell) -> Outcome:
    """Return the outcome of the worker's cell; its death is one, too."""
    try:
        return Outcome(cell, *worker.pipe.recv())
    except (EOFError, OSError):
        how = worker.death()
        how = f"its process {'was ' if how.startswith('killed') else ''}{how}"
        return Outcome(cell, how, died=True)


def _serve(pipe: Connection, work: Work, prepare: Callable[[], object] | None) -> None:
    """Worker process: run the cells that come through `pipe` until it closes."""
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
            text = str(raised)
            if not isinstance(raised, FedmergeError | OSError):
                text = "".join(traceback.format_exception_only(raised))
            error, details = " ".join(text.split()), traceback.format_exc()
        pipe.send((error, details, time.monotonic() - start))
