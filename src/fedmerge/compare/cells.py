"""What a comparison consists of: one cell for each setting, method and seed.

A cell is a name that is safe in file systems and the settings of one run as plain JSON; it neither
checks nor runs them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import ConfigError

RUNS = "runs"


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    name: str
    config: Mapping[str, Any]  # every setting of the run, JSON values

    def folder(self, out: Path) -> Path:
        """Return the cell's run folder inside the comparison's folder `out`."""
        return out / RUNS / self.name


def make_cells(
    configure: Callable[[str, str, int], Mapping[str, Any]],
    settings: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> tuple[Cell, ...]:
    """Return the cells of a comparison, ordered by setting, then method, then seed.

    Args:
        configure: returns all settings of the run of a setting, a method and a seed.

    Raises:
        ConfigError: two cells would share one folder.
    """
    cells: dict[str, Cell] = {}
    for setting, method, seed in product(settings, methods, seeds):
        name = cell_name(setting, method, seed)
        if name in cells:
            other = cells[name].config["method"]
            raise ConfigError(
                f'methods "{other}" and "{method}" would share the folder {RUNS}/{name}; '
                "compare them in two folders"
            )
        cells[name] = Cell(name, configure(setting, method, seed))
    return tuple(cells.values())


def cell_name(setting: str, method: str, seed: int) -> str:
    """Return e.g. ``concept-mix--ifca-warm-d=8--s0``: letters, digits, ``.=_-`` and no others."""
    parts = (setting, method.replace(":", "-"), f"s{seed}")
    return "--".join(re.sub(r"[^A-Za-z0-9.=_-]", "_", part) for part in parts)


def parse_names(option: str, text: str, every: Callable[[], Iterable[str]]) -> tuple[str, ...]:
    """Return the names in "a,b,c"; "all" stands for those that `every` returns.

    Raises:
        ConfigError: none given, an empty one, or one given twice.
    """
    names = tuple(every()) if text.strip() == "all" else tuple(map(str.strip, text.split(",")))
    if not all(names):
        raise ConfigError(f'{option}: got "{text}", wanted names divided by single commas')
    _refuse_repeats(option, names)
    return names


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds in "0-4" or "0,3,7-9", in the order given.

    Raises:
        ConfigError: not of that form, an empty range, or a seed given twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f'--seeds: got "{text}", wanted e.g. "0-4" or "0,3,7-9"')
        if last - first >= 10_000:
            raise ConfigError(f'--seeds: got "{text}", wanted a range of at most 10000 seeds')
        seeds.extend(range(first, last + 1))
    _refuse_repeats("--seeds", seeds)
    return tuple(seeds)


def _refuse_repeats(option: str, values: Sequence[str | int]) -> None:
    repeated = next((value for value in values if values.count(value) > 1), None)
    if repeated is not None:
        raise ConfigError(f'{option}: "{repeated}" is there twice; name each one once')
