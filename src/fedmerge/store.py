"""Tensors and facts on disk, written so that a kill at any instant leaves the last whole state.

A state is two files: tensors (safetensors, a new name for every save) and `state.json`, which names
them with their checksum and is replaced last; that replacement is the commit. It knows no methods.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from .errors import StateError

FORMAT = 2
INDEX = "state.json"


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`: readers see the old file or the new one, never a part.

    Raises:
        StateError: the file cannot be written; the old one is still whole.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_state(folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write `tensors` and `facts` (JSON values) as the state of `folder`.

    Raises:
        StateError: the folder cannot be written; the state before is still whole.
    """
    data = save({name: value.contiguous() for name, value in tensors.items()})
    checksum = hashlib.blake2b(data, digest_size=16).hexdigest()
    name = f"tensors-{checksum}.safetensors"
    write_atomic(folder / name, data)
    index = {"format": FORMAT, "tensors": name, "bytes": len(data), "facts": dict(facts)}
    write_atomic(folder / INDEX, _signed(json.dumps(index).encode()))
    # Tensors of the states before, and what saves that were killed have left.
    for pattern in ("tensors-*.safetensors", ".tensors-*", f".{INDEX}.*"):
        for stale in folder.glob(pattern):
            if stale.name != name:
                with contextlib.suppress(OSError):
                    stale.unlink()


_SIGNATURE = b', "checksum": "'


def _signed(text: bytes) -> bytes:
    """A JSON object with the checksum of its text as its last entry."""
    checksum = hashlib.blake2b(text, digest_size=16).hexdigest()
    return text[:-1] + _SIGNATURE + checksum.encode() + b'"}'


def _is_signed(text: bytes) -> bool:
    # Of the text, not of the values: for many clients, to write them again takes longer.
    own, found, _ = text.rpartition(_SIGNATURE)
    return bool(found) and _signed(own + b"}") == text


DIGESTS = {
    "model": "another (other layers or sizes)",
    "clients": "others (other names, or numbers of examples)",
    "data": "other than now: examples have changed since",
}
"""What to say of facts whose values are long, or say nothing to people."""


def of_another_run(where: str, name: str, then: Any, now: Any) -> StateError:
    """The error for a state whose fact `name` is not what it should be; of options only those that
    differ are named."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        keys = ["name"] if "name" in keys else keys  # another method has other options
        then, now = (", ".join(f"{key}={one.get(key)}" for key in keys) for one in (then, now))
    differs = DIGESTS.get(name, f"{then}, wanted {now}")
    return StateError(
        f"{where} is of another run: its {name} is {differs}; use another folder, or the settings "
        "it was made with"
    )


def has_state(folder: Path) -> bool:
    """Say whether `folder` holds a state."""
    return (folder / INDEX).is_file()


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read back what `save_state` wrote.

    Raises:
        StateError: nothing there, a file that is damaged, or a format of another version.
    """
    path = folder / INDEX
    advice = f"restore it from a copy, or remove {folder} to start again"
    try:
        text = path.read_bytes()
        index = json.loads(text)
        found, name, size = index["format"], index["tensors"], index["bytes"]
        facts: dict[str, Any] = index["facts"]
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is damaged ({error}); {advice}") from error
    if found != FORMAT:
        raise StateError(
            f"{path} has format {found}, this version reads {FORMAT}; "
            "use the version that wrote it, or another folder"
        )
    if not _is_signed(text):
        raise StateError(f"{path} is damaged (its checksum does not fit); {advice}")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise StateError(f"{folder / name} cannot be read: {error.strerror}; {advice}") from error
    checksum = hashlib.blake2b(data, digest_size=16).hexdigest()
    if name != f"tensors-{checksum}.safetensors":
        raise StateError(
            f"{folder / name} is damaged: {len(data)} bytes, {size} were written; {advice}"
        )
    return load(data), facts
