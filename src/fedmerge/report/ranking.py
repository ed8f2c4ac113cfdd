"""Methods against settings: mean over seeds, the best, and what cannot be told from the best.

It holds numbers and the test behind them; how they are printed or drawn is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.report.runs import MODELS, Run, finite

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Metric:
    """How one number of a run is read, named and ranked.

    better: +1 if higher is better, -1 if lower is, 0 for a cost or a diagnostic that has no best.
    """

    label: str
    better: int
    digits: int
    of_model: bool
    read: Callable[[Run, str], float | None]


def _of_model(name: str) -> Callable[[Run, str], float | None]:
    def read(run: Run, model: str) -> float | None:
        scores = run.models.get(model)
        value: float | None = None if scores is None else getattr(scores, name)
        return value

    return read


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("test accuracy", 1, 3, True, _of_model("accuracy")),
    "accuracy_worst_decile": Metric(
        "test accuracy of the worst tenth of clients",
        1,
        3,
        True,
        _of_model("accuracy_worst_decile"),
    ),
    "loss": Metric("test loss", -1, 3, True, _of_model("loss")),
    "gap_train": Metric("local-global gap, train", 0, 3, False, lambda run, _: run.gap_train),
    "gap_test": Metric("local-global gap, test", 0, 3, False, lambda run, _: run.gap_test),
    "bytes_down": Metric("bytes to a client, a round", 0, 0, False, lambda run, _: run.bytes_down),
    "bytes_up": Metric("bytes from a client, a round", 0, 0, False, lambda run, _: run.bytes_up),
    "seconds": Metric("seconds for the run", 0, 1, False, lambda run, _: run.seconds),
}


@dataclass(frozen=True)
class Entry:
    """One method in one setting: mean and sample standard deviation over its n seeds.

    best: the best mean of the setting (of equals, the first). tied: not the best, and not
    significantly worse. p: of the paired test against the best, None where there was none.
    shared: number of seeds that this method and the best both have.
    """

    mean: float | None
    std: float | None
    n: int
    best: bool = False
    tied: bool = False
    p: float | None = None
    shared: int = 0


@dataclass(frozen=True)
class Table:
    """Entries by (method, setting); a pair that has no run has an entry with n = 0."""

    model: str
    metric: str
    methods: tuple[str, ...]
    settings: tuple[str, ...]
    entries: Mapping[tuple[str, str], Entry]
    note: str

    @property
    def title(self) -> str:
        """What the numbers are, with the model they belong to."""
        spec = METRICS[self.metric]
        label = spec.label[0].upper() + spec.label[1:]
        return f"{label}, {self.model} model" if spec.of_model else label

    def best(self, setting: str) -> str | None:
        """Return the method with the best mean of `setting`, or None where nothing is ranked."""
        return next((name for name in self.methods if self.entries[name, setting].best), None)


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct names, in the order of their first appearance."""
    return tuple(dict.fromkeys(names))


def comparison(runs: Sequence[Run], model: str = "merged", metric: str = "accuracy") -> Table:
    """Compare the methods of `runs` in each setting on one metric of one evaluated model.

    model: "merged" (as received), "tuned" (after one local epoch) or "local" (end of local
    training); it does not matter for the metrics of a whole run. Rows and columns keep the order
    in which `runs` first names them. Raises ConfigError for an unknown model or metric.
    """
    if metric not in METRICS:
        raise ConfigError(f'metric = "{metric}": not known{did_you_mean(metric, METRICS)}')
    if model not in MODELS:
        raise ConfigError(f'model = "{model}": not known{did_you_mean(model, MODELS)}')
    spec = METRICS[metric]
    methods = unique(run.method for run in runs)
    settings = unique(run.setting for run in runs)
    values: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        value = spec.read(run, model)
        if value is not None:
            values.setdefault((run.method, run.setting), {})[run.seed] = value
    entries: dict[tuple[str, str], Entry] = {}
    for setting in settings:
        column = {name: values.get((name, setting), {}) for name in methods}
        for name, entry in _column(column, spec.better).items():
            entries[name, setting] = entry
    return Table(model, metric, methods, settings, entries, _note(spec, entries.values()))


def _column(column: Mapping[str, Mapping[int, float]], better: int) -> dict[str, Entry]:
    """Entries of one setting, from each method's value by seed."""
    means = {name: float(np.mean(list(seen.values()))) for name, seen in column.items() if seen}
    ranked = [name for name, mean in means.items() if better and finite(mean)]
    best = max(ranked, key=lambda name: better * means[name], default=None)
    entries = {}
    for name, seen in column.items():
        numbers = list(seen.values())
        steady = len(numbers) > 1 and finite(means[name])
        std = float(np.std(numbers, ddof=1)) if steady else None
        tied, p, shared = False, None, 0
        if best is not None and name in ranked:
            shared = len(seen.keys() & column[best].keys())
            if name != best:
                tied, p = not_worse(seen, column[best], better)
        entries[name] = Entry(means.get(name), std, len(numbers), name == best, tied, p, shared)
    return entries


def not_worse(
    values: Mapping[int, float], best: Mapping[int, float], better: int = 1
) -> tuple[bool, float | None]:
    """Test one method against the best, paired by the seeds both have: (not worse, p).

    The test is scipy's two-sided paired t-test at 0.05. Differences that do not vary need none:
    all zero is a tie, all alike and not zero is worse. With fewer than two shared seeds nothing
    can be tested, p is None, and only an equal value counts as not worse.
    """
    shared = sorted(values.keys() & best.keys())
    behind = better * np.array([best[seed] - values[seed] for seed in shared], dtype=np.float64)
    if not shared:
        return False, None
    # Rounding alone makes equal differences differ in the last bits; a t-test would take that
    # for a variance and return nonsense.
    if len(shared) < 2 or np.ptp(behind) <= 1e-12:
        mean = float(behind.mean())
        return abs(mean) <= 1e-12 or (len(shared) > 1 and mean < 0), None
    from scipy import stats

    p = float(stats.ttest_1samp(behind, 0.0).pvalue)
    return p >= SIGNIFICANCE or float(behind.mean()) < 0, p


def _note(spec: Metric, entries: Iterable[Entry]) -> str:
    counts = sorted({entry.n for entry in entries if entry.n})
    if not counts:
        return "No run has this number."
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    plural = "seed" if counts == [1] else "seeds"
    text = f"Mean ± sample standard deviation over {seeds} {plural}."
    if not spec.better:
        return text + " Nothing is marked here: this is a cost or a diagnostic, not a score."
    if counts == [1]:
        return (
            f"Values of {seeds} {plural}. * has the best value. One seed allows no test, so the "
            "order of the methods may be chance."
        )
    return text + (
        " * has the best mean; ~ is not significantly worse than it (two-sided paired t-test over"
        f" the seeds, p ≥ {SIGNIFICANCE}, not corrected for the number of methods)."
        f" {_power(counts[0])}"
    )


def _power(n: int) -> str:
    if n >= 10:
        return "A ~ still does not prove two methods equal."
    return (
        f"With only {n} seeds such a test can hardly show a difference: a ~ may well hide a real"
        " one, and does not prove two methods equal."
    )
