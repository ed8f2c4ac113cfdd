"""The warm start of a SuperNode: clients forked on call, or started by Flower; no leftovers."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from fedmerge.deploy.warm import CLIENT, PRELOADED, STUB, _write_stub

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")

# Stands for the SuperNode: the forking process is its child, and ends after it.
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-m", "fedmerge.deploy.warm", sys.argv[1], str(os.getpid()),
                  *sys.argv[2:]], start_new_session=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with the stub, whose cold command says so, and a process that answers its calls."""
    cold = tmp_path / "cold"
    cold.write_text('#!/bin/sh\necho "cold $@"\n')
    cold.chmod(0o700)
    made = tmp_path / "node"
    made.mkdir()
    _write_stub(made, made / "socket", str(cold))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(made / "socket"), "no.such"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (made / "socket").exists():
            time.sleep(0.02)
        yield made
        parent.kill()
        _, said = parent.communicate(timeout=60)
        assert "before any work" not in said  # it had work
    finally:
        parent.kill()
        parent.wait()
        end = time.monotonic() + 60
        while made.exists() and time.monotonic() < end:
            time.sleep(0.05)
    assert not made.exists()  # it has seen that its parent is gone, and cleaned up


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(folder / CLIENT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


def has_torch(folder: Path) -> bool:
    """Whether the process that forks has loaded it by now."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            if b"fedmerge.deploy.warm" in command and str(folder / "socket").encode() in command:
                return "libtorch" in (path / "maps").read_text()
        except OSError:
            continue
    raise AssertionError("there is no such process")


def test_a_call_is_answered_by_a_fork_that_has_torch_loaded(folder: Path) -> None:
    assert not has_torch(folder)  # a node that is not let in need not load it
    start = time.monotonic()
    first = call(folder, "--help")  # waits until all is loaded
    loading = time.monotonic() - start
    assert first.stdout.startswith(f"usage: {CLIENT}")  # Flower's own command, on the caller's pipe
    assert "--runtime-api-address" in first.stdout
    assert has_torch(folder)
    start = time.monotonic()
    again = call(folder, "--help")
    assert again.stdout == first.stdout
    assert time.monotonic() - start < loading / 2
    assert "--token-file is required" in call(folder, "--insecure").stderr
    assert call(folder, "--help").stdout == first.stdout  # a fork that fails harms nobody
    for _ in range(3):  # nor does a caller that does not wait for its answer
        with socket.socket(socket.AF_UNIX) as hasty:
            hasty.connect(str(folder / "socket"))
            socket.send_fds(hasty, [b"no list"], [1, 2])
    assert call(folder, "--help").stdout == first.stdout


def test_a_parent_that_ended_before_the_first_look_leaves_nothing_behind(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    made = tmp_path / "node"
    made.mkdir()
    serve = (
        "import sys, pathlib, fedmerge.deploy.warm as w; w.PRELOADED = ();"
        "w.serve(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    )
    command = [sys.executable, "-c", serve, str(made / "socket"), str(gone.pid)]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    assert not made.exists()
    # A SuperNode that is not let in ends so; what it says itself is a number.
    assert "SuperNode has ended before any work came" in done.stderr
    assert "flwr supernode register" in done.stderr


def test_without_the_forking_process_flowers_own_command_runs(tmp_path: Path) -> None:
    cold = tmp_path / "cold command"
    cold.write_text('#!/bin/sh\necho "cold $@"\n')
    cold.chmod(0o700)
    _write_stub(tmp_path, tmp_path / "socket", str(cold))
    assert call(tmp_path, "--token", "a b").stdout == "cold --token a b\n"
    assert "import torch" not in STUB


def test_a_node_that_has_been_let_in_is_made_ready_before_it_is_called(tmp_path: Path) -> None:
    made = tmp_path / "node"
    made.mkdir()
    serve = (
        "import sys, pathlib, fedmerge.deploy.warm as w; w.LET_IN = 1.6;"
        "w._load = lambda names: print(*names, flush=True);"
        "w.serve(pathlib.Path(sys.argv[1]), int(sys.argv[2]), ['mine'])"
    )
    command = [sys.executable, "-c", serve, str(made / "socket"), str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            while not (made / "socket").exists():
                time.sleep(0.02)
            bound = time.monotonic()
            assert select.select([process.stdout], [], [], 60)[0]
            assert time.monotonic() - bound > 1.2
            assert process.stdout.readline().split() == [*PRELOADED, "mine"]
            time.sleep(1.2)  # as two more looks take
        finally:
            process.kill()
        assert process.stdout.read() == ""  # it does so once
