"""Methods against settings: mean over seeds, the best, and what cannot be told from the best.

It holds numbers and the test behind them; how they are printed or drawn is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.report.runs import MODELS, ROUNDS, Run, finite, is_fedmerge, twin_of
from fedmerge.report.statistics import (
    MARGIN,
    SIGNIFICANCE,
    Interval,
    holm,
    not_behind_by,
    paired_interval,
)

Read = Callable[[Run, str, str], float | None]


@dataclass(frozen=True)
class Metric:
    """How one number of a run is read, named and ranked.

    better: +1 if higher is better, -1 if lower is, 0 for a cost or a diagnostic that has no best.
    """

    label: str
    better: int
    digits: int
    of_model: bool
    read: Read


def _of_model(name: str) -> Read:
    def read(run: Run, model: str, at: str) -> float | None:
        seen = run.at(at)
        scores = None if seen is None else seen.models.get(model)
        value: float | None = None if scores is None else getattr(scores, name)
        if value is not None and scores is not None and scores.loss is not None:
            # What a model that has diverged answers is no answer, whatever share of it is right.
            return value if finite(scores.loss) else math.nan
        return value

    return read


def _of_run(name: str) -> Read:
    return lambda run, model, at: getattr(run, name)


def _gap(name: str) -> Read:
    """A gap, NaN where there is none because the run diverged."""
    loss = _of_model("loss")

    def read(run: Run, model: str, at: str) -> float | None:
        gap: float | None = getattr(run, name)
        merged = loss(run, "merged", "last")
        return merged if gap is None and merged is not None and not finite(merged) else gap

    return read


def _cost(name: str) -> Read:
    return lambda run, model, at: run.cost.get(name)


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("test accuracy", 1, 3, True, _of_model("accuracy")),
    "accuracy_worst_decile": Metric(
        "test accuracy of the worst tenth of clients",
        1,
        3,
        True,
        _of_model("accuracy_worst_decile"),
    ),
    "accuracy_std": Metric(
        "standard deviation of test accuracy over clients", 0, 3, True, _of_model("accuracy_std")
    ),
    "auc": Metric("test area under the ROC curve", 1, 3, True, _of_model("auc")),
    "loss": Metric("test loss", -1, 3, True, _of_model("loss")),
    "better_than_local": Metric(
        "share of clients better off than with local training",
        0,
        2,
        True,
        _of_model("better_than_local"),
    ),
    "better_than_fedavg": Metric(
        "share of clients better off than with FedAvg", 0, 2, True, _of_model("better_than_fedavg")
    ),
    "gap_train": Metric("local-global gap, train", 0, 3, False, _gap("gap_train")),
    "gap_test": Metric("local-global gap, test", 0, 3, False, _gap("gap_test")),
    "bytes_down": Metric("bytes to a client, a round", 0, 0, False, _of_run("bytes_down")),
    "bytes_up": Metric("bytes from a client, a round", 0, 0, False, _of_run("bytes_up")),
    "seconds": Metric("seconds for the run", 0, 1, False, _of_run("seconds")),
    "cost_down": Metric("models to a client, a round", 0, 1, False, _cost("down")),
    "cost_up": Metric("models from a client, a round", 0, 1, False, _cost("up")),
    "cost_client": Metric("models kept by each client", 0, 1, False, _cost("client")),
    "cost_server": Metric("models kept by the server", 0, 1, False, _cost("server")),
    "cost_server_per_client": Metric(
        "models kept by the server for each client", 0, 1, False, _cost("server_per_client")
    ),
    "cost_passes": Metric("local work, in passes of FedAvg's", 0, 1, False, _cost("passes")),
}


@dataclass(frozen=True)
class Entry:
    """One method in one setting: mean and sample standard deviation over its n seeds.

    best: the best mean of the setting (of equals, FedMerge's or the first; none with a lone
    method). tied: not the best, and not significantly worse. near: shown to lose less than `MARGIN`
    to the best. p: of the paired test against the best, corrected for the tests of its family
    (`_column`), None where there was none. behind: what it loses to the best, by seed; None for the
    best itself. shared: number of seeds that this method and the best both have. diverged: number
    of seeds whose value is not finite; with any, the mean is NaN and the method comes after all
    that have one.
    """

    mean: float | None
    std: float | None
    n: int
    best: bool = False
    tied: bool = False
    near: bool = False
    p: float | None = None
    behind: Interval | None = None
    shared: int = 0
    diverged: int = 0

    @property
    def divergence(self) -> str:
        """On how many seeds it diverged, in words."""
        return f"diverged on {self.diverged} of {self.n} seed{'' if self.n == 1 else 's'}"


@dataclass(frozen=True)
class Table:
    """Entries by (method, setting); a pair that has no run has an entry with n = 0."""

    model: str
    metric: str
    methods: tuple[str, ...]
    settings: tuple[str, ...]
    entries: Mapping[tuple[str, str], Entry]
    note: str
    at: str = "last"

    @property
    def title(self) -> str:
        """What the numbers are, with the model they belong to."""
        spec = METRICS[self.metric]
        label = spec.label[0].upper() + spec.label[1:]
        if not spec.of_model:
            return label
        return f"{label}, {self.model} model" + (", best round" if self.at == "best" else "")

    def best(self, setting: str) -> str | None:
        """Return the method with the best mean of `setting`, or None where nothing is ranked."""
        return next((name for name in self.methods if self.entries[name, setting].best), None)


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct names, in the order of their first appearance."""
    return tuple(dict.fromkeys(names))


def comparison(
    runs: Sequence[Run], model: str = "merged", metric: str = "accuracy", at: str = "last"
) -> Table:
    """Compare the methods of `runs` in each setting on one metric of one evaluated model.

    model: "merged" (as received), "tuned" (after one local epoch) or "local" (end of local
    training); it does not matter for the metrics of a whole run. at: "last" for the last evaluated
    round, "best" for that of the least validation loss. Rows and columns keep the order in which
    `runs` first names them. Raises ConfigError for an unknown model, metric or round.
    """
    if metric not in METRICS:
        raise ConfigError(f'metric = "{metric}": not known{did_you_mean(metric, METRICS)}')
    if model not in MODELS:
        raise ConfigError(f'model = "{model}": not known{did_you_mean(model, MODELS)}')
    if at not in ROUNDS:
        raise ConfigError(f'at = "{at}": not known{did_you_mean(at, ROUNDS)}')
    spec = METRICS[metric]
    methods = unique(run.method for run in runs)
    settings = unique(run.column for run in runs)
    values: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        value = spec.read(run, model, at)
        if value is not None:
            values.setdefault((run.method, run.column), {})[run.seed] = value
    entries: dict[tuple[str, str], Entry] = {}
    for setting in settings:
        column = {name: values.get((name, setting), {}) for name in methods}
        for name, entry in _column(column, spec.better, subject_of(methods)).items():
            entries[name, setting] = entry
    note = _note(spec, entries.values(), methods)
    return Table(model, metric, methods, settings, entries, note, at)


def subject_of(methods: Iterable[str]) -> str | None:
    """The method that a page is about: the first FedMerge variant, if there is one."""
    return next((name for name in methods if is_fedmerge(name)), None)


def _column(
    column: Mapping[str, Mapping[int, float]], better: int, subject: str | None
) -> dict[str, Entry]:
    """Entries of one setting, from each method's value by seed.

    Tests are corrected in two families: the subject against each other method but its twin, which
    is the same training (as in `overall.duels`), and all others against the best. So there is one
    verdict on the subject and another method, wherever it is told.
    """
    means = {name: float(np.mean(list(seen.values()))) for name, seen in column.items() if seen}
    compared = better and len(column) > 1
    ranked = [name for name, mean in means.items() if compared and finite(mean)]
    # Of equals the subject, else the first: what is said must not depend on the order of methods.
    best = max(ranked, key=lambda name: (better * means[name], name == subject), default=None)
    rivals = [name for name in ranked if name != best]
    behind = {} if best is None else {
        name: behind_by_seed(column[name], column[best], better) for name in rivals
    }  # fmt: skip
    own: list[str] = []
    if subject in ranked:
        own = [name for name in ranked if name not in (subject, twin_of(subject))]
    if best == subject:
        duels = {name: behind[name] for name in own}
        verdicts = judge({n: gap for n, gap in behind.items() if n not in duels}) | judge(duels)
    else:
        verdicts = judge(behind)
        if subject is not None and best in own:
            gaps = {name: behind_by_seed(column[subject], column[name], better) for name in own}
            verdicts[subject] = judge(gaps)[best]
    entries = {}
    for name, seen in column.items():
        numbers = list(seen.values())
        steady = len(numbers) > 1 and finite(means[name])
        std = float(np.std(numbers, ddof=1)) if steady else None
        tied, near, p = verdicts.get(name, (False, False, None))
        shared = (
            len(seen.keys() & column[best].keys()) if best is not None and name in ranked else 0
        )
        entries[name] = Entry(
            means.get(name),
            std,
            len(numbers),
            name == best,
            tied,
            near,
            p,
            behind.get(name),
            shared,
            sum(not finite(value) for value in numbers),
        )
    return entries


def behind_by_seed(
    values: Mapping[int, float], best: Mapping[int, float], better: int = 1
) -> Interval:
    """Return what `values` lose to `best` on the seeds that both have; above 0 is worse."""
    shared = sorted(values.keys() & best.keys())
    return paired_interval([better * (best[seed] - values[seed]) for seed in shared])


def judge(behind: Mapping[str, Interval]) -> dict[str, tuple[bool, bool, float | None]]:
    """Decide for each method whether it is (not significantly worse, shown near, p).

    Both are paired t-tests over seeds, corrected by Holm for the number of methods in `behind`:
    the first two-sided against 0, the second one-sided against `MARGIN`. Where nothing can be
    tested only an equal value counts as not worse, and nothing as near. p is None there, and where
    the differences do not vary.
    """
    worse = {name: gap.p for name, gap in behind.items() if gap.p is not None}
    close = {name: p for name in worse if (p := not_behind_by(behind[name])) is not None}
    p_worse = dict(zip(worse, holm(list(worse.values())), strict=True))
    p_close = dict(zip(close, holm(list(close.values())), strict=True))
    verdicts: dict[str, tuple[bool, bool, float | None]] = {}
    for name, gap in behind.items():
        if name not in p_worse:
            verdicts[name] = (gap.n > 0 and abs(gap.mean) <= 1e-12, False, None)
            continue
        tied = p_worse[name] >= SIGNIFICANCE or gap.mean < 0
        near = p_close[name] < SIGNIFICANCE
        verdicts[name] = (tied, near, None if gap.constant else p_worse[name])
    return verdicts


def _note(spec: Metric, entries: Iterable[Entry], methods: Sequence[str]) -> str:
    counts = sorted({entry.n for entry in entries if entry.n})
    if not counts:
        return "No run has this number."
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    plural = "seed" if counts == [1] else "seeds"
    text = f"Mean ± sample standard deviation over {seeds} {plural}."
    if not spec.better:
        return text + " Nothing is marked here: this is a cost or a diagnostic, not a score."
    if len(methods) == 1:
        text = f"Values of {seeds} {plural}." if counts == [1] else text
        return text + " Nothing is marked here: there is no other method."
    if counts == [1]:
        return (
            f"Values of {seeds} {plural}. * has the best value. One seed allows no test, so the "
            "order of the methods may be chance."
        )
    return text + (
        " * has the best mean; ~ is not significantly worse than it (two-sided paired t-test over"
        f" the seeds, p ≥ {SIGNIFICANCE} after Holm's correction for the number of methods);"
        f" = is shown to lose less than {MARGIN} (one-sided, corrected alike)."
        f"{_family(methods)} {_power(counts[0])}"
    )


def _family(methods: Sequence[str]) -> str:
    subject = subject_of(methods)
    if subject is None or len(methods) == 2:
        return ""
    return f" Tests of {subject} with the others are corrected together, be it the best or not."


def _power(n: int) -> str:
    if n == 1:
        return "Where a method has one seed alone, its difference to the best cannot be tested."
    if n >= 10:
        return "A ~ still does not prove two methods equal."
    return (
        f"With only {n} seeds such a test can hardly show a difference: a ~ may well hide a real"
        " one, and does not prove two methods equal."
    )
