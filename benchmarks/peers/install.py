"""Environments for peers: each of its own, made once and kept.

The version of torch is the one that runs here, so that all compute with the same kernels.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch


def environment(folder: Path, requirement: str) -> Path:
    """Return the interpreter of the environment in `folder` that has `requirement`.

    Raises:
        RuntimeError: it could not be installed; the text is the installer's last line.
    """
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pinned = f"torch=={torch.__version__.partition('+')[0]}"
    ready = folder / ".ready"
    wanted = f"{requirement} {pinned}"
    if ready.is_file() and ready.read_text() == wanted:
        return python
    constraints = folder / "constraints.txt"
    _run([sys.executable, "-m", "venv", str(folder)])
    constraints.write_text(pinned + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # First and alone: as somebody's dependency it may come with gigabytes of GPU libraries.
    _run([*install, pinned])
    _run([*install, "--constraint", str(constraints), requirement])
    ready.write_text(wanted)
    return python


def _run(line: list[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"{' '.join(line[1:4])} failed: {last[0]}")
