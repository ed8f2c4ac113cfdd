"""Worker processes: what they are given when they start, and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fedmerge import workers
from fedmerge.workers import FORKING, Workers

MARK = "FEDMERGE_TEST_MARK"
linux = pytest.mark.skipif(not FORKING, reason="forks on Linux only")


def tell(pipe: Connection, *names: str) -> None:
    """Say what a worker finds."""
    modules = {name for name in ("torch", "fedmerge.sim") if name in sys.modules}
    held = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    pipe.send((os.getppid(), [os.environ.get(n) for n in names], modules, signal.SIGINT in held))
    pipe.recv()


def told(*names: str) -> list[tuple[int, list[str | None], set[str], bool]]:
    hired = Workers(2, tell, *names)
    try:
        return [worker.pipe.recv() for worker in hired]
    finally:
        hired.dismiss()


@linux
def test_all_are_forks_of_one_process_that_has_loaded_what_they_need() -> None:
    found = [*told(), *told()]
    parents = {parent for parent, *_ in found}
    assert len(parents) == 1
    assert os.getpid() not in parents
    assert all(modules == {"torch", "fedmerge.sim"} for _, _, modules, _ in found)


def test_they_have_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "before")
    assert [values for _, values, *_ in told(MARK)] == [["before"]] * 2
    monkeypatch.setenv(MARK, "after")
    assert [values for _, values, *_ in told(MARK)] == [["after"]] * 2
    monkeypatch.delenv(MARK)
    assert [values for _, values, *_ in told(MARK)] == [[None]] * 2


def test_ctrl_c_is_left_to_the_parent() -> None:
    assert all(held for *_, held in told())


def test_elsewhere_they_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FORKING", False)
    monkeypatch.setenv(MARK, "here")
    found = told(MARK)
    assert [(parent, values) for parent, values, *_ in found] == [(os.getpid(), ["here"])] * 2
    assert all(held for *_, held in found)


def marked(value: str) -> list[str]:
    """Commands of the processes that have MARK = `value` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={value}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append((path / "cmdline").read_text())
        except OSError:
            continue
    return found


@linux
def test_a_command_that_ends_early_leaves_nothing_that_is_still_loading(tmp_path: Path) -> None:
    environment = {**os.environ, MARK: str(tmp_path)}
    line = [sys.executable, "-m", "fedmerge", "compare", "--preset", "none", "--out", "o"]
    said = tmp_path / "said"
    with said.open("w") as file:  # a pipe would be read until all who hold it have ended
        done = subprocess.run(line, env=environment, cwd=tmp_path, stderr=file, check=False)
    assert done.returncode == 2
    assert "preset" in said.read_text()
    assert [one for one in marked(str(tmp_path)) if "forkserver" in one] == []
