"""Methods over all settings: average rank, regret, and FedMerge against each rival one by one.

It counts and compares what `ranking` has computed for single settings; it draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedmerge.report.ranking import METRICS, Table, comparison, unique
from fedmerge.report.runs import Run, finite, is_fedmerge, twin_of
from fedmerge.report.statistics import (
    SIGNIFICANCE,
    Interval,
    cluster_bootstrap,
    critical_difference,
    friedman,
    holm,
    paired_interval,
    ranks,
)


@dataclass(frozen=True)
class Regret:
    """What one method loses to the best of each setting, by mean over seeds.

    losses: by setting, 0 where it is the best, infinite where it diverged. missing: settings in
    which others ran and it did not.
    """

    method: str
    losses: Mapping[str, float]
    missing: tuple[str, ...]

    @property
    def largest(self) -> float | None:
        """The largest loss, None if it has no number at all."""
        return max(self.losses.values(), default=None)

    @property
    def where(self) -> str | None:
        """The setting of the largest loss."""
        return max(self.losses, key=lambda name: self.losses[name], default=None)

    @property
    def mean(self) -> float | None:
        """The mean loss over the settings that it has."""
        return float(np.mean(list(self.losses.values()))) if self.losses else None


@dataclass(frozen=True)
class Ranking:
    """Average ranks over the settings in which every ranked method ran.

    A method that diverged in a setting ranks last there.
    means: by method, best first. left_out: methods that lack more than half of the settings; they
    would take all others' settings away. p: Friedman's test; difference: Nemenyi's critical
    difference; both None with fewer than two settings or three methods.
    """

    means: Mapping[str, float]
    settings: tuple[str, ...]
    left_out: tuple[str, ...]
    p: float | None
    difference: float | None


@dataclass(frozen=True)
class Duel:
    """Our method minus one rival in one setting; above 0 is ours better.

    by_seed: decides, with p corrected by Holm over the rivals of the setting, None where there was
    no test: with fewer than two seeds in common, or where one of the two diverged, since the seeds
    that are left say nothing of that.
    by_client: the two-stage bootstrap, as a description.
    """

    rival: str
    setting: str
    by_seed: Interval
    by_client: Interval
    p: float | None

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "open" of our method."""
        if self.p is None or self.p >= SIGNIFICANCE:
            return "open"
        return "better" if self.by_seed.mean > 0 else "worse"


def regrets(table: Table) -> tuple[Regret, ...]:
    """Return each method's losses to the best in all settings of `table`.

    FedMerge with fine-tuning before use and without it is one training: neither loses to the other.
    """
    sign = METRICS[table.metric].better
    found = []
    for method in table.methods:
        rivals = [m for m in table.methods if not (is_fedmerge(method) and m == twin_of(method))]
        losses: dict[str, float] = {}
        for setting in table.settings:
            entry = table.entries[method, setting]
            if table.best(setting) is None:
                continue
            if finite(entry.mean):
                means = [table.entries[rival, setting].mean for rival in rivals]
                top = max(sign * (mean or 0.0) for mean in means if finite(mean))
                # Adding 0 makes -0 what it is.
                losses[setting] = top - sign * (entry.mean or 0.0) + 0.0
            elif entry.diverged:
                losses[setting] = math.inf
        missing = tuple(s for s in table.settings if s not in losses and table.best(s) is not None)
        found.append(Regret(method, losses, missing))
    return tuple(found)


def ranking(tables: Sequence[Table]) -> Ranking:
    """Rank the methods over the settings of all `tables`, which may differ in metric."""
    methods = unique(name for table in tables for name in table.methods)
    column: dict[str, dict[str, float]] = {}
    for table in tables:
        sign = METRICS[table.metric].better
        for setting in table.settings:
            column[setting] = {
                name: -math.inf if entry.diverged else sign * (entry.mean or 0.0)
                for name in table.methods
                if (entry := table.entries[name, setting]).n
            }
    held = {name: sum(name in seen for seen in column.values()) for name in methods}
    kept = [name for name in methods if 2 * held[name] > len(column)]
    shared = [setting for setting, seen in column.items() if all(name in seen for name in kept)]
    left_out = tuple(name for name in methods if name not in kept)
    if not kept or not shared:
        return Ranking({}, (), tuple(methods), None, None)
    values = np.array([[column[setting][name] for name in kept] for setting in shared])
    ranked = ranks(np.round(values, 12))
    means = dict(zip(kept, (float(mean) for mean in ranked.mean(0)), strict=True))
    enough = len(shared) >= 2 and len(kept) >= 3
    return Ranking(
        means=dict(sorted(means.items(), key=lambda pair: pair[1])),
        settings=tuple(shared),
        left_out=left_out,
        p=friedman(ranked),
        difference=critical_difference(len(kept), len(shared)) if enough else None,
    )


def duels(runs: Sequence[Run], subject: str, model: str = "merged") -> tuple[Duel, ...]:
    """Compare `subject` with every other method in every setting, by seed and by client.

    Accuracy decides, or the loss in a setting where `subject` has no accuracy.
    """
    by_cell: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        by_cell.setdefault((run.column, run.method), {})[run.seed] = run
    found: list[tuple[str, str, Interval, Interval]] = []
    for setting in unique(run.column for run in runs):
        mine = by_cell.get((setting, subject), {})
        metric = metric_of(list(mine.values()))
        read, sign = METRICS[metric].read, METRICS[metric].better
        for rival in unique(run.method for run in runs):
            theirs = by_cell.get((setting, rival), {})
            shared = sorted(mine.keys() & theirs.keys())
            if rival == subject or not shared:
                continue
            pairs = [(read(mine[s], model, "last"), read(theirs[s], model, "last")) for s in shared]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            gaps = [sign * (a - b) for a, b in known if finite(a) and finite(b)]
            clients = [_client_gaps(mine[s], theirs[s], metric, model) * sign for s in shared]
            if gaps:
                by_seed = paired_interval(gaps)
                if len(gaps) < len(known):
                    by_seed = replace(by_seed, p=None)
                found.append((rival, setting, by_seed, cluster_bootstrap(clients)))
    decided: list[Duel] = []
    for setting in unique(duel[1] for duel in found):
        # Over one setting's rivals only: over all settings the correction would hide losses, too.
        part = [duel for duel in found if duel[1] == setting]
        tested = [i for i, duel in enumerate(part) if duel[2].p is not None]
        adjusted = dict(zip(tested, holm([part[i][2].p or 0.0 for i in tested]), strict=True))
        decided += [Duel(*duel, adjusted.get(i)) for i, duel in enumerate(part)]
    return tuple(decided)


def metric_of(runs: Sequence[Run]) -> str:
    """Accuracy where any of `runs` has one, else the loss."""
    read = METRICS["accuracy"].read
    return "accuracy" if any(read(run, "merged", "last") is not None for run in runs) else "loss"


def loss_unit(metric: str) -> str:
    """Unit of the loss where `metric` decides: a setting without accuracy is a regression."""
    return "nats" if metric == "accuracy" else "squared error"


def overviews(runs: Sequence[Run], model: str = "merged", at: str = "last") -> list[Table]:
    """Return the table of accuracy and, where a setting has none, that of the loss."""
    of_column: dict[str, list[Run]] = {}
    for run in runs:
        of_column.setdefault(run.column, []).append(run)
    metric = {name: metric_of(part) for name, part in of_column.items()}
    return [
        comparison([run for run in runs if metric[run.column] == name], model, name, at)
        for name in ("accuracy", "loss")
        if name in metric.values()
    ]


def _client_gaps(ours: Run, theirs: Run, metric: str, model: str) -> NDArray[np.float64]:
    """(k,) differences of the clients that both runs have."""
    values = {client.id: getattr(client, metric).get(model) for client in theirs.clients}
    gaps = []
    for client in ours.clients:
        mine, other = getattr(client, metric).get(model), values.get(client.id)
        if finite(mine) and finite(other):
            gaps.append(mine - other)
    return np.array(gaps, dtype=np.float64)
