"""The state folder of a deployed server: one server at a time, everything whole at every instant.

    state.json, tensors-*.safetensors   the last commit (`fedmerge.store`)
    config.json, log.jsonl, result.json as in the folder of a run, for `fedmerge report`
    status.json                         what `fedmerge status` shows
    operator.json                       what the operator has said: labels, clients let back
    models/                             each client's model, at the end

It decides nothing about rounds.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import StateError
from ..store import write_atomic

STATUS, OPERATOR, LOCK = "status.json", "operator.json", "lock"
LOOK = 0.2
"""Seconds from one look whether the folder is free to the next."""


@contextmanager
def locked(
    folder: Path, wait: float = 0.0, told: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it when the process ends.

    Args:
        wait: seconds that another server is given to end. When a SuperLink is killed, its ServerApp
            sees that late, and takes some time to leave.
        told: is told in a line that this one waits.

    Raises:
        StateError: another server holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StateError(
            f"the state folder {folder} cannot be written: {error.strerror}; "
            "set fedmerge.state to a folder that the server may write to"
        ) from error
    try:
        end = time.monotonic() + wait
        while not _taken(handle):
            used = f"another server{_holder(handle)} is using the state folder {folder}"
            if time.monotonic() >= end:
                raise StateError(
                    f"{used}: stop its run (`flwr stop`), or give this one a folder of its own"
                )
            if told is not None:
                told(f"{used}; waiting up to {wait:g} s for its end")
                told = None
            time.sleep(LOOK)
        os.pwrite(handle, f"{os.getpid():<20}".encode(), 0)  # for the line above only
        yield
    finally:
        os.close(handle)


def is_held(folder: Path) -> bool | None:
    """Whether a server on this machine is using the folder; None where that cannot be seen."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(handle)
    return False


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _holder(handle: int) -> str:
    number = os.pread(handle, 20, 0).decode(errors="replace").strip()
    return f" (process {number})" if number.isdecimal() else ""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; empty where there is no such file.

    Raises:
        StateError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StateError(f"{path} cannot be read ({error}); remove it, or correct it") from error
    if not isinstance(value, dict):
        raise StateError(f"{path} holds no JSON object; remove it, or correct it")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by `value`. Raises StateError if it cannot be written."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_operator(folder: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Labels of clients, and when clients were let back (seconds since 1970)."""
    found = read_json(folder / OPERATOR)
    try:
        labels = {str(c): str(n) for c, n in found.get("labels", {}).items()}
        return labels, {str(c): float(at) for c, at in found.get("readmitted", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        path = folder / OPERATOR
        raise StateError(f"{path} is damaged ({error}); remove it, or correct it") from error


def write_operator(
    folder: Path, labels: Mapping[str, str], readmit: Iterator[str] | list[str]
) -> None:
    """Add labels and clients to let back to what the operator has said before."""
    old_labels, old_readmitted = read_operator(folder)
    now = time.time()
    write_json(
        folder / OPERATOR,
        {
            "labels": {**old_labels, **labels},
            "readmitted": {**old_readmitted, **dict.fromkeys(readmit, now)},
        },
    )
