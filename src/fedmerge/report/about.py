"""What was run, and what a reader must know before trusting the numbers, in words.

It reads configurations and gaps in the folder; it computes no statistics.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedmerge.report.overall import overviews
from fedmerge.report.ranking import unique
from fedmerge.report.reading import untuned
from fedmerge.report.runs import Run

# "chosen" are the values that tuning found; they stand with each setting.
_OF_THE_CELL = frozenset({"setting", "method", "seed", "out", "data", "name", "chosen"})


def facts(runs: Sequence[Run]) -> list[str]:
    """What was compared, in numbers."""
    counts = (
        ("setting", len(unique(run.column for run in runs))),
        ("method", len(unique(run.method for run in runs))),
        ("seed", len({run.seed for run in runs})),
        ("finished run", len(runs)),
    )
    data = ", ".join(unique(run.data for run in runs))
    return [f"data: {data}", *(f"{n} {word}{'' if n == 1 else 's'}" for word, n in counts)]


def notices(runs: Sequence[Run], open_runs: Sequence[str]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    said = []
    if open_runs:
        names = ", ".join(open_runs[:5]) + (", …" if len(open_runs) > 5 else "")
        verb = "run is" if len(open_runs) == 1 else "runs are"
        said.append(f"{len(open_runs)} {verb} not finished and not shown: {names}.")
    seeds = {run.seed for run in runs}
    have = {(run.column, run.method, run.seed) for run in runs}
    missing = [
        f"{method} in {setting} (seed {seed})"
        for setting in unique(run.column for run in runs)
        for method in unique(run.method for run in runs)
        for seed in sorted(seeds)
        if (setting, method, seed) not in have
    ]
    if missing:
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        said.append(
            f"Not every method has every setting and seed; {len(missing)} missing: {names}."
        )
    defaults = unique(f"{run.method} in {run.column}" for run in untuned(runs))
    if defaults:
        names = ", ".join(defaults[:5]) + (", …" if len(defaults) > 5 else "")
        said.append(
            f"Not tuned, as trials failed, and run with the method's defaults: {names}. "
            "This is no equal tuning."
        )
    diverged = [
        f"{method} in {setting} {entry.divergence}"
        for table in overviews(runs)
        for (method, setting), entry in table.entries.items()
        if entry.diverged
    ]
    if diverged:
        names = "; ".join(diverged[:5]) + ("; …" if len(diverged) > 5 else "")
        said.append(
            f"Not every run stayed finite: {names}. A method that diverged on any seed of a "
            "setting has no mean there and ranks last."
        )
    return said + refusals(runs)


def refusals(runs: Sequence[Run]) -> list[str]:
    """Which methods' updates were refused in how many runs, and what to do, in a line; or none."""
    parts, reasons = [], set[str]()
    for method in unique(run.method for run in runs if run.refused):
        own = [run for run in runs if run.method == method]
        hit = [run for run in own if run.refused]
        total = sum((Counter(run.refused) for run in hit), Counter[str]())
        reasons |= total.keys()
        parts.append(
            f"of {method}, {refused_text(total)} in {len(hit)} of {len(own)} "
            f"run{'s' * (len(own) > 1)} ({_list(unique(run.column for run in hit))})"
        )
    if not parts:
        return []
    return [" ".join((f"Updates were refused: {'; '.join(parts)}.", *refused_advice(reasons)))]


def refused_text(refused: Mapping[str, int]) -> str:
    """Numbers of refused updates by reason, as "3 empty, 12 non-finite"."""
    return ", ".join(f"{n} {reason}" for reason, n in sorted(refused.items()))


def refused_advice(reasons: Collection[str]) -> list[str]:
    """What to do where updates were refused for these reasons, in a sentence; none is known of
    some."""
    if "non-finite" not in reasons:
        return []
    return [
        "Non-finite ones mostly come of training that overflows, and nothing is learned from them: "
        'standardise a table (--data "table:FILE:standardise=true"), or lower the learning rate.'
    ]


def configuration(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(name, value) of what was run; a value that differs between runs says where it holds."""
    rows = [
        ("data", ", ".join(unique(run.data for run in runs))),
        ("settings", ", ".join(unique(run.column for run in runs))),
        ("methods", ", ".join(unique(run.method for run in runs))),
        ("seeds", ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))),
        ("rounds", _where([(run, str(run.rounds)) for run in runs])),
        ("clients", _where([(run, str(len(run.clients))) for run in runs])),
    ]
    for split in ("train", "validation", "test"):
        sizes: dict[str, list[int]] = {}
        for run in runs:
            sizes.setdefault(run.data, []).extend(getattr(c, f"n_{split}") for c in run.clients)
        held = [(run, _span(sizes[run.data])) for run in runs if sizes[run.data]]
        if held:
            rows.append((f"{split} examples of a client", _where(held)))
    named = {name for name, _ in rows}
    seen: dict[str, list[tuple[Run, str]]] = {}
    for run in runs:
        for key, value in _flat(run.config):
            if key.split(".")[0] not in _OF_THE_CELL and key not in named:
                seen.setdefault(key, []).append((run, value))
    return rows + [(key, _where(values)) for key, values in seen.items()]


def _span(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low}" if low == high else f"{low} to {high}"


def _where(values: Sequence[tuple[Run, str]]) -> str:
    """A value, or each value with what it holds for: data sets, else settings, else methods."""
    if len({value for _, value in values}) == 1:
        return values[0][1]
    for name in ("data", "column", "method"):
        held: dict[str, set[str]] = {}
        for run, value in values:
            held.setdefault(getattr(run, name), set()).add(value)
        if all(len(found) == 1 for found in held.values()):
            places: dict[str, list[str]] = {}
            for place, (value,) in held.items():
                places.setdefault(value, []).append(place)
            return "; ".join(f"{value} ({_list(place)})" for value, place in places.items())
    return f"{_list(list(unique(value for _, value in values)))}; it differs within a setting"


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{key}", text))
    return rows


def _list(values: Sequence[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:4])
    return shown if len(values) <= 4 else f"{shown}, … ({len(values)} values)"
