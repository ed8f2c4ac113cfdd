"""Figures with their spread, runs in turn with each other, and power laws fitted to curves.

It times what it is given; what is run, and what it means, is decided elsewhere.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of n measurements."""

    median: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise `values`, of which there is at least one."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def to_json(self) -> dict[str, float]:
        """Plain JSON values."""
        return {"median": self.median, "min": self.min, "max": self.max, "n": self.n}


@dataclass(frozen=True)
class Figure:
    """One line of the results.

    Attributes:
        group, case, what: which measurement: for example "rounds", "W1", "stacked".
        unit: of `spread`, for example "s".
        spread: None for what could not be measured; `note` then gives the reason.
        ratio: to the reference of the same turn, pair by pair, where there is one.
        at: the sizes it was measured at.
    """

    group: str
    case: str
    what: str
    unit: str
    spread: Spread | None
    ratio: Spread | None = None
    note: str = ""
    at: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "group": self.group,
            "case": self.case,
            "what": self.what,
            "unit": self.unit,
            "value": self.spread and self.spread.to_json(),
            "ratio": self.ratio and self.ratio.to_json(),
            "note": self.note,
            "at": dict(self.at),
        }


def seconds(work: Work) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternate(
    works: Mapping[str, Work], repeats: int, *, settle: bool = False
) -> dict[str, list[float]]:
    """Seconds of each work, `repeats` times in turn with the others, after a turn of warm-up.

    In turn, since a machine's speed drifts: the i-th measurements of two works belong together.

    Args:
        settle: run a work once, untimed, before it is timed. For works of a few milliseconds: a
            processor is slow for some time after it has slept or worked on something else.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            if settle:
                work()
            spent = seconds(work)
            if turn:
                taken[name].append(spent)
    return taken


def ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """The spread of values over reference, pair by pair."""
    return Spread.of([value / base for value, base in zip(values, reference, strict=True)])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The a of values ~ sizes^a: least squares in logarithms. Needs two different sizes."""
    x = [math.log(size) for size in sizes]
    y = [math.log(value) for value in values]
    centre, level = statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - centre) ** 2 for a in x)
    return sum((a - centre) * (b - level) for a, b in zip(x, y, strict=True)) / spread


def exponents(group: str, case: str, what: str, curve: Mapping[int, float]) -> list[Figure]:
    """The exponent of a curve {size: value} over all its points, and over its last two.

    A fixed cost flattens the small sizes: the last two points say more about what comes next.
    """
    sizes = sorted(curve)
    made = []
    for name, part in (("all sizes", sizes), ("two largest sizes", sizes[-2:])):
        if len(part) > 1 and (name == "all sizes" or len(sizes) > 2):
            fitted = exponent(part, [curve[s] for s in part])
            note = f"{part[0]:g} to {part[-1]:g}"
            label = f"{what}: exponent, {name}"
            made.append(
                Figure(group, case, label, "", Spread(fitted, fitted, fitted, 1), note=note)
            )
    return made
