"""`python -m benchmarks [group ...]`: measure, print tables, write JSON lines and Markdown.

What each group measures is in the module of its name.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from . import memory, rounds, scale, server, start
from .measure import Figure
from .output import machine, show, write
from .simulated import pin_threads
from .sizes import FULL, TINY, Sizes

GROUPS: dict[str, Callable[[Sizes, int], Iterator[Figure]]] = {
    "rounds": rounds.run,
    "server": server.run,
    "memory": memory.run,
    "scale": scale.run,
    "start": start.run,
}


def main(line: Sequence[str] | None = None) -> list[Figure]:
    """Run the groups that are asked for, all without an argument."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure fedmerge.")
    parser.add_argument("group", nargs="*", help=f"of {', '.join(GROUPS)}; all if none is given")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns (default 5)")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: see that everything runs")
    given = parser.parse_args(line)
    unknown = [name for name in given.group if name not in GROUPS]
    if unknown:
        parser.error(f'there is no group "{unknown[0]}": choose from {", ".join(GROUPS)}')
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats}: wanted 1 or more")
    pin_threads()
    console = Console()
    console.print(machine())
    figures: list[Figure] = []
    for name in given.group or GROUPS:
        made = []
        with console.status(name) as status:
            for figure in GROUPS[name](TINY if given.tiny else FULL, given.repeats):
                status.update(f"{name}: {figure.case} {figure.what}")
                made.append(figure)
        show(name, made, console)
        figures += made
        write(given.out, figures)  # After each group: an interrupted run keeps what it has.
        gc.collect()
    console.print(f"written to {given.out}")
    return figures


if __name__ == "__main__":
    main()
