"""A SuperNode with a warm start: its client processes are forked from one that has torch loaded.

Flower starts a process for every message, and each loads Flower and torch anew: seconds of CPU time
for a model that trains in milliseconds. It is not another SuperNode: Flower's own runs, and finds
on its PATH a `flwr-clientapp` that asks for a fork. Each message still has a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import ConfigError
from ..flower.require import require_flower
from .preflight import check_node

CLIENT, NODE = "flwr-clientapp", "flower-supernode"
PRELOADED = ("torch", "flwr.supernode.cli", "fedmerge.flower.client")
POLL = ("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2")
"""Flower's setting, and seconds from one look for work within the node to the next; else 1."""
LOOK = 0.5
"""Seconds from one look whether the SuperNode still lives to the next."""
LET_IN = 8.0
"""Seconds after which a SuperNode that is not let in has ended. A supervisor starts it again and
again: not all of this is to be loaded each time."""
LONGEST = 65_536
REFUSED = (
    'fedmerge: the SuperNode has ended before any work came. If it says "Failed to activate '
    'SuperNode", the SuperLink does not let its key in: its operator registers it (`flwr supernode '
    "register`), or, if a node with this key was running before, it is let in within a minute"
)

STUB = """
import json, os, socket, sys
try:
    with socket.socket(socket.AF_UNIX) as call:
        call.connect({path!r})
        socket.send_fds(call, [json.dumps(sys.argv[1:]).encode()], [1, 2])
        taken = call.recv(1)
except OSError:
    taken = b""
if not taken:
    os.execv({real!r}, [{real!r}, *sys.argv[1:]])
"""
"""Hands its arguments and where it writes to the one that forks; without that, Flower's own."""


def run_node(arguments: Sequence[str], preload: Sequence[str] = ()) -> NoReturn:
    """Become a SuperNode, with these arguments of `flower-supernode`, and a warm start.

    Args:
        preload: modules to load once, beside torch, Flower and fedmerge.

    Raises:
        MissingExtraError, ConfigError: Flower is not installed, or in another version; or what
            `preflight` finds.
    """
    require_flower()
    check_node(arguments)
    scripts = str(Path(sys.executable).parent)
    path = scripts + os.pathsep + os.environ.get("PATH", "")
    node, client = shutil.which(NODE, path=path), shutil.which(CLIENT, path=path)
    if node is None or client is None:
        raise ConfigError(f'"{NODE}" is not installed: pip install "fedmerge[flower]"')
    os.environ.setdefault(*POLL)
    if sys.platform == "linux":  # elsewhere a fork of a process with libraries loaded is not safe
        folder = Path(tempfile.mkdtemp(prefix="fedmerge-node-"))  # for this user only
        address = folder / "socket"
        _write_stub(folder, address, client)
        # Its parent, by this number, is the SuperNode from the exec below on. It sees by itself
        # when that has ended, also by a kill of the whole group, and then removes the folder.
        command = [sys.executable, "-m", "fedmerge.deploy.warm", str(address), str(os.getpid())]
        command += preload
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        path = str(folder) + os.pathsep + path
    os.environ["PATH"] = path
    os.execv(node, [node, *arguments])


def _write_stub(folder: Path, address: Path, client: str) -> None:
    stub, command = folder / "stub.py", folder / CLIENT
    stub.write_text(STUB.format(path=str(address), real=client))
    python = shlex.quote(sys.executable)
    # Without site-packages, since it is started for every message.
    command.write_text(f'#!/bin/sh\nexec {python} -IS {shlex.quote(str(stub))} "$@"\n')
    command.chmod(0o700)


def serve(address: Path, parent: int, preload: Sequence[str] = ()) -> None:
    """Fork a client for every call, until `parent` has ended.

    What clients need is loaded with the first call, or once the SuperNode has been let in.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a client's end
    try:
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(str(address))
            door.listen()  # calls wait until all is loaded
            door.settimeout(LOOK)
            called = loaded = False
            begin = time.monotonic()
            while os.getppid() == parent:
                # Nobody calls; or the caller has gone, or no fork is to be had: then it is told
                # nothing, and starts Flower's own.
                with contextlib.suppress(OSError):
                    calls = bool(select.select([door], [], [], LOOK)[0])
                    if not loaded and (calls or time.monotonic() > begin + LET_IN):
                        _load((*PRELOADED, *preload))
                        loaded = True
                    if calls:
                        call, _ = door.accept()
                        called = True
                        with call:
                            _fork(door, call)
            if not called:
                print(REFUSED, file=sys.stderr)
    except OSError as error:
        print(f"fedmerge: no warm start of clients: {error}", file=sys.stderr)
    finally:
        shutil.rmtree(address.parent, ignore_errors=True)


def _load(names: Sequence[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # the client's own import says it again, to the server
            print(f"fedmerge: {name} cannot be loaded beforehand: {error}", file=sys.stderr)


def _fork(door: socket.socket, call: socket.socket) -> None:
    call.settimeout(None)
    body, handles, _, _ = socket.recv_fds(call, LONGEST, 2)
    try:
        if len(handles) != 2:
            return  # a caller that has gone
        if os.fork() == 0:
            _be_client(body, handles, door, call)
    finally:
        for handle in handles:
            os.close(handle)
    call.send(b"1")


def _be_client(body: bytes, handles: list[int], *ours: socket.socket) -> NoReturn:
    """Run Flower's own command in this process, and end it."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for one in ours:
            one.close()
        for mine, theirs in zip(handles, (1, 2), strict=True):
            os.dup2(mine, theirs)
        import numpy as np
        from flwr.supernode.cli import flwr_clientapp

        np.random.seed()
        sys.argv = [CLIENT, *json.loads(body)]
        flwr_clientapp()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
