"""What a comparison consists of: one cell for each data set, setting, method and seed.

A cell is a name that is safe in file systems and the settings of one run as plain JSON; it neither
checks nor runs them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError

RUNS = "runs"
TUNED = ("lr", "epochs")
"""Settings of a run that tuning may choose, beside the options of the method."""
Pair = tuple[str, str]
"""A data set and a setting."""


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    name: str
    config: Mapping[str, Any]  # every setting of the run, JSON values
    root: str = RUNS  # the folder, inside the comparison's, that holds the cell's

    def folder(self, out: Path) -> Path:
        """Return the cell's run folder inside the comparison's folder `out`."""
        return out / self.root / self.name

    def with_chosen(self, values: Mapping[str, object]) -> Cell:
        """Return the cell with the values that tuning has chosen for it."""
        return replace(self, config={**self.config, "chosen": chosen_text(values)})


def make_cells(
    configure: Callable[[str, str, str, int], Mapping[str, Any]],
    pairs: Iterable[Pair],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> tuple[Cell, ...]:
    """Return the cells of a comparison, ordered by data and setting, then method, then seed.

    Args:
        configure: returns all settings of the run of a data set, a setting, a method and a seed.

    Raises:
        ConfigError: two cells would share one folder.
    """
    cells: dict[str, Cell] = {}
    for data, setting in pairs:
        for method in methods:
            for seed in seeds:
                name = cell_name(data, setting, method, seed)
                config = configure(data, setting, method, seed)
                if name in cells:
                    raise ConfigError(_clash(name, cells[name].config, config))
                cells[name] = Cell(name, config)
    return tuple(cells.values())


def _clash(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    what = "methods" if one["data"] == other["data"] else "data sets"
    key = "method" if what == "methods" else "data"
    return (
        f'{what} "{one[key]}" and "{other[key]}" would share the folder {RUNS}/{name}; '
        "compare them in two folders"
    )


def cell_name(data: str, setting: str, method: str, seed: int) -> str:
    """Return e.g. ``digits--concept-mix--ifca-warm-d=8--s0``: ASCII letters, digits and ``.=_-``.

    Of a path, only the last part is kept.
    """
    return f"{group_name(data, setting, method)}--s{seed}"


def group_name(data: str, setting: str, method: str) -> str:
    """Return what the names of a method's cells on one data set and setting begin with."""
    last = re.sub(r"[^:=]*[/\\]+([^/\\:=]+)[/\\]*", r"\1", data)
    return "--".join(map(safe, (last, setting, method)))


def safe(text: str) -> str:
    """Return `text` with everything but ASCII letters, digits and ``.=_-`` replaced."""
    return re.sub(r"[^A-Za-z0-9.=_-]", "_", text.replace(":", "-"))


def chosen_text(values: Mapping[str, object]) -> str | None:
    """Return values that tuning chose as a run's setting `chosen`: "key=value:key=value"."""
    return ":".join(f"{key}={value}" for key, value in values.items()) or None


def chosen_values(text: str | None) -> dict[str, Any]:
    """Read back what `chosen_text` made.

    Raises:
        ConfigError: not of that form, or a key that is there twice.
    """
    values: dict[str, Any] = {}
    for pair in text.split(":") if text else ():
        key, equals, value = pair.partition("=")
        if not (key and equals and value) or key in values:
            raise ConfigError(f'chosen: got "{text}", wanted key=value:key=value, each key once')
        values[key] = _value(value)
    return values


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_names(option: str, text: str, every: Callable[[], Iterable[str]]) -> tuple[str, ...]:
    """Return the names in "a,b,c"; "all" stands for those that `every` returns.

    A comma in brackets is part of a name, as in "flwr:Size:partition_sizes=[40,30]".

    Raises:
        ConfigError: none given, an empty one, or one given twice.
    """
    parts = [part.strip() for part in _divided(text)]
    names = tuple(name for part in parts for name in (every() if part == "all" else (part,)))
    if not all(names):
        raise ConfigError(f'{option}: got "{text}", wanted names divided by single commas')
    _refuse_repeats(option, names)
    return names


def _divided(text: str) -> list[str]:
    """Return the parts of `text` between the commas that are in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def parse_seeds(text: str, option: str = "--seeds") -> tuple[int, ...]:
    """Return the seeds in "0-4" or "0,3,7-9", in the order given.

    Raises:
        ConfigError: not of that form, an empty range, or a seed given twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,19})\s*(?:-\s*([0-9]{1,19})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f'{option}: got "{text}", wanted e.g. "0-4" or "0,3,7-9"')
        if last - first >= 10_000:
            raise ConfigError(f'{option}: got "{text}", wanted a range of at most 10000 seeds')
        seeds.extend(range(first, last + 1))
    _refuse_repeats(option, seeds)
    return tuple(seeds)


def _refuse_repeats(option: str, values: Sequence[str | int]) -> None:
    repeated = next((value for value in values if values.count(value) > 1), None)
    if repeated is not None:
        raise ConfigError(f'{option}: "{repeated}" is there twice; name each one once')
