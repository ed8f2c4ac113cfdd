"""Worker processes, each at the other end of a pipe, that never outlive who hired them.

It starts them, says how they ended and ends them; what they do, and what to make of the death of
one, is decided elsewhere. On Linux they are forked from one process that has torch loaded, so that
loading it, which takes seconds, is done once however many start.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess, SpawnProcess
from typing import Any

FORKING = sys.platform == "linux"
"""Elsewhere a fork of a process with libraries loaded is not safe."""
PRELOADED = ("torch", "fedmerge.sim", "fedmerge.data")


def get_ready(*modules: str) -> None:
    """Begin to load what workers need, these modules too, so that they start at once later.

    The first call decides, as there is one such process. Loading takes it seconds, which nobody
    waits for, and it ends with this one.
    """
    if FORKING:
        forkserver.set_forkserver_preload([*PRELOADED, *modules])
        with _interrupts_held():
            forkserver.ensure_running()
        atexit.unregister(_end_loading)  # so that it is there once
        atexit.register(_end_loading)


def _end_loading() -> None:
    """End the process while it may still be loading, before it can see by itself that it is over.

    Who reads what this program writes would wait for it.
    """
    pid = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


@dataclass(eq=False)
class Worker:
    """A process and the pipe to it; the pipe ends when the process does."""

    process: SpawnProcess | ForkServerProcess
    pipe: Connection

    def death(self) -> str:
        """How a process that has ended, or is about to, has ended: "killed by signal 9"."""
        self.process.join()
        code = self.process.exitcode or 0
        return f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


class Workers:
    """Some processes that all do the same; `dismiss` ends them, whatever they are doing.

    Args:
        size: number of processes at first.
        work: called in each of them as `work(pipe, *arguments)`; a function of a module, which
            returns when the pipe is closed.

    Attributes:
        here: the processes.
    """

    def __init__(self, size: int, work: Callable[..., None], *arguments: Any) -> None:
        self.here: list[Worker] = []
        self._work = work
        self._arguments = arguments
        try:
            for _ in range(size):
                self.hire()
        except BaseException:
            self.dismiss()
            raise

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.here)

    def hire(self) -> Worker:
        """Start one more process."""
        return self._start(len(self.here))

    def replace(self, lost: Worker) -> Worker:
        """Put a new process in the place of one that has ended."""
        new = self._start(self.here.index(lost))
        lost.process.kill()
        lost.process.join()
        lost.pipe.close()
        return new

    def dismiss(self) -> None:
        """Kill all processes and wait until they are gone."""
        for worker in self.here:
            worker.process.kill()
        for worker in self.here:
            worker.process.join()
            worker.pipe.close()
        self.here.clear()

    def _start(self, place: int) -> Worker:
        get_ready()
        # Both have a `Process` of their own, which their common base does not know.
        context: Any = multiprocessing.get_context("forkserver" if FORKING else "spawn")
        here, there = context.Pipe()
        arguments = (there, dict(os.environ), self._work, self._arguments)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        worker = Worker(process, here)
        with _interrupts_held():
            process.start()
            atexit.unregister(_end_loading)  # it has loaded
            # Inside, so that a Ctrl-C just now does not leave a process that nobody knows of.
            self.here[place : place + 1] = [worker]
        there.close()  # so that the death of the worker shows as the end of `here`
        return worker


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


def _serve(
    pipe: Connection,
    environment: dict[str, str],
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """What runs in a worker process."""
    if hasattr(signal, "pthread_sigmask"):
        # Held already, unless somebody else has started the process that this is a fork of.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # A fork has the environment of when the process that it is a fork of was started.
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(pipe, *arguments)


def _end_with_parent() -> None:
    """Leave no orphan when the parent is killed in a way that lets it clean nothing up."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
