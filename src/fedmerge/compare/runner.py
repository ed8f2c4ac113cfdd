"""Worker processes that run cells, one after the other, each living for many of them.

It survives a cell that raises and a worker that is killed, and leaves no process behind; what a
cell computes, and whether it has to run at all, is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
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


class Crew:
    """A context of worker processes; leaving it ends them all, whatever they are doing.

    Args:
        work: called as `work(config, folder)`; like `prepare`, a function of a module.
        size: number of processes.
        prepare: called once in each process, while the first cells are still being checked.
    """

    def __init__(self, work: Work, size: int, prepare: Callable[[], object] | None = None) -> None:
        # What a cell writes is whole, so its process may be killed at any instant.
        self._workers = Workers(size, _serve, work, prepare)
        self._cells: dict[Worker, Cell] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._workers.dismiss()

    def run(self, cells: Sequence[Cell], out: Path) -> Iterator[Outcome]:
        """Run `cells` in their folders inside `out`; yield each one's outcome as it ends.

        The longest cells go first, as far as finished cells of the same setting and method tell.
        """
        waiting = list(cells)
        seconds: dict[tuple[object, object], float] = {}
        while waiting or self._cells:
            for worker in list(self._workers):
                if worker not in self._cells and waiting:
                    cell = max(waiting, key=lambda one: seconds.get(_group(one), float("inf")))
                    waiting.remove(cell)
                    self._give(worker, cell, out)
            busy = {worker.pipe: worker for worker in self._cells}
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                outcome = _collect(worker, self._cells.pop(worker))
                if outcome.error is None:
                    seconds[_group(outcome.cell)] = outcome.seconds
                yield outcome

    def _give(self, worker: Worker, cell: Cell, out: Path) -> None:
        """Hand `cell` to `worker`, or to a new one where that one has died."""
        if worker.process.exitcode is not None:
            worker = self._workers.replace(worker)
        self._cells[worker] = cell
        with contextlib.suppress(OSError):  # died just now: `_collect` will see it
            worker.pipe.send((dict(cell.config), cell.folder(out)))


def _group(cell: Cell) -> tuple[object, object]:
    return cell.config["setting"], cell.config["method"]


def _collect(worker: Worker, cell: Cell) -> Outcome:
    """Return the outcome of the worker's cell; its death is one, too."""
    try:
        return Outcome(cell, *worker.pipe.recv())
    except (EOFError, OSError):
        how = worker.death()
        return Outcome(cell, f"its process {'was ' if how.startswith('killed') else ''}{how}")


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
            text = str(raised) if isinstance(raised, FedmergeError | OSError) else repr(raised)
            error, details = " ".join(text.split()), traceback.format_exc()
        pipe.send((error, details, time.monotonic() - start))
