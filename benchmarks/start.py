"""How long it takes until something can be done: the command's help, and imports.

Every start is a process of its own; the bare interpreter's start is measured with them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .measure import Figure, Spread, Work, alternate
from .sizes import Sizes


def run(sizes: Sizes, repeats: int) -> Iterator[Figure]:
    """Seconds of each start, in turn."""
    starts = {"python, nothing else": [sys.executable, "-c", "pass"]}
    starts |= {statement: [sys.executable, "-c", statement] for statement in sizes.imports}
    starts["fedmerge --help"] = [*_command(), "--help"]
    taken = alternate({name: _start(line) for name, line in starts.items()}, repeats)
    for name, values in taken.items():
        yield Figure("start", "", name, "s", Spread.of(values))


def _command() -> list[str]:
    beside = shutil.which("fedmerge", path=str(Path(sys.executable).parent))
    return [beside] if beside else [sys.executable, "-m", "fedmerge"]


def _start(line: Sequence[str]) -> Work:
    return lambda: subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
