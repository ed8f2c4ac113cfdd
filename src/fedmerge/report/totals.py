"""What holds over all settings, for one method, as numbers and as sentences.

The numbers are made in `overall`; this module picks, counts and words them, for and against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmerge.report.findings import called
from fedmerge.report.overall import Duel, Ranking, Regret, duels, overviews, ranking, regrets
from fedmerge.report.ranking import METRICS, Table, subject_of, unique
from fedmerge.report.runs import Run, finite, is_fedmerge, twin_of
from fedmerge.report.tables import value_text

_SAME = 1e-9  # ranks are means of halves


@dataclass(frozen=True)
class Figure:
    """One large number of the page's head, and the words under it."""

    value: str
    words: str


@dataclass(frozen=True)
class Totals:
    """What a comparison shows over all its settings.

    subject: the first FedMerge variant, or None. tables: accuracy, then loss where settings have
    no accuracy. regrets: of each table. duels: of the subject with all others but its twin, which
    is the same training.
    """

    subject: str | None
    tables: tuple[Table, ...]
    regrets: tuple[tuple[Regret, ...], ...]
    ranking: Ranking
    duels: tuple[Duel, ...]
    figures: tuple[Figure, ...]
    sentences: tuple[str, ...]


def totals(runs: Sequence[Run], model: str = "merged", at: str = "last") -> Totals:
    """Sum up `runs`."""
    tables = tuple(overviews(runs, model, at))
    lost = tuple(regrets(table) for table in tables)
    ranked = ranking(tables)
    subject = subject_of(run.method for run in runs)
    twin = twin_of(subject) if subject else None
    rivalling = [run for run in runs if run.method != twin]
    fought = duels(rivalling, subject, model) if subject else ()
    figures: list[Figure] = []
    sentences: list[str] = []
    rivals = [name for table in tables for name in table.methods if name != subject]
    if subject and rivals:
        variants = unique(run.method for run in runs if is_fedmerge(run.method))
        name = called(variants)
        for table, part in zip(tables, lost, strict=True):
            _regret(name, subject, table, part, figures, sentences)
        _rank(name, subject, ranked, figures, sentences)
        _shares(name, [run for run in runs if run.method == subject], model, figures, sentences)
        seeds = {run.seed for run in runs if run.method == subject}
        met = twin if len(rivalling) < len(runs) else None
        _duels(name, fought, len(seeds), sentences, met)
    said = tuple(sentence.replace("….", "…") for sentence in sentences)
    return Totals(subject, tables, lost, ranked, fought, tuple(figures), said)


def _regret(
    name: str,
    subject: str,
    table: Table,
    part: Sequence[Regret],
    figures: list[Figure],
    sentences: list[str],
) -> None:
    ours = next((regret for regret in part if regret.method == subject), None)
    if ours is None or ours.largest is None or ours.mean is None:
        return
    same = (subject, twin_of(subject))
    others = sorted(
        (r for r in part if r.method not in same and r.largest is not None and not r.missing),
        key=lambda regret: regret.largest or 0.0,
    )
    words = (
        "most accuracy lost to the best of a setting"
        if table.metric == "accuracy"
        else "most loss above that of the best of a setting"
    )
    largest = value_text(table.metric, ours.largest)
    text = (
        f"{name}'s regret, the {words}, is {largest} (in {ours.where}), {ours.mean:.3f} on average"
    )
    if ours.largest == 0:
        text = f"{name} has no regret in {table.metric}: no method is better in any setting"
    elif not finite(ours.largest):
        text = f"{name} diverged in {ours.where}, so its regret in {table.metric} has no bound"
    if others:
        first = others[0]
        theirs = value_text(table.metric, first.largest)
        smaller = [r for r in others if (r.largest or 0.0) < ours.largest]
        if smaller:
            text += f"; {_count(len(smaller), 'method')} with less: "
            text += ", ".join(
                f"{r.method} {value_text(table.metric, r.largest)}" for r in smaller[:3]
            )
            text += ", …" if len(smaller) > 3 else ""
        elif not finite(first.largest):
            text += "; every other method diverged in some setting"
        else:
            text += f"; the next is {first.method} with {theirs} (in {first.where})"
        words += f"; {first.method} {theirs}"
    sentences.append(text + ".")
    figures.append(Figure(largest, words))


def _rank(
    name: str, subject: str, ranked: Ranking, figures: list[Figure], sentences: list[str]
) -> None:
    if subject not in ranked.means or len(ranked.means) < 2:
        return
    mine = ranked.means[subject]
    place = 1 + sum(mean < mine - _SAME for mean in ranked.means.values())
    best = next(other for other in ranked.means if other != subject)
    level = [
        other
        for other, mean in ranked.means.items()
        if other != subject and abs(mean - mine) <= _SAME
    ]
    k, n = len(ranked.means), len(ranked.settings)
    # Ranks that differ must not be printed alike.
    digits = 1 if level or f"{mine:.1f}" != f"{ranked.means[best]:.1f}" else 2
    theirs = f"{ranked.means[best]:.{digits}f}"
    text = f"Its average rank is {mine:.{digits}f} over {_count(n, 'setting')}, "
    if place == 1 and level:
        text += f"the best of {k} methods together with {', '.join(level)}"
    elif place == 1:
        text += f"the best of {k} methods; next is {best} with {theirs}"
    else:
        text += f"place {place} of {k}; the best is {best} with {theirs}"
    if ranked.difference is not None:
        apart = sum(mean - mine >= ranked.difference for mean in ranked.means.values())
        text += (
            f"; by Nemenyi's critical difference ({ranked.difference:.1f}) that is beyond chance"
        )
        text += f" before {_count(apart, 'method')}" if apart else " before none"
    sentences.append(text + ".")
    figures.append(Figure(f"{mine:.{digits}f}", f"average rank of {k} methods; {best} {theirs}"))


def _shares(
    name: str, ours: Sequence[Run], model: str, figures: list[Figure], sentences: list[str]
) -> None:
    parts = []
    for metric, rival in (
        ("better_than_local", "local training"),
        ("better_than_fedavg", "FedAvg"),
    ):
        by_setting: dict[str, list[float]] = {}
        for run in ours:
            value = METRICS[metric].read(run, model, "last")
            if value is not None and finite(value):
                by_setting.setdefault(run.column, []).append(value)
        if not by_setting:
            continue
        means: Mapping[str, float] = {key: float(np.mean(v)) for key, v in by_setting.items()}
        mean, least = float(np.mean(list(means.values()))), min(means, key=lambda s: means[s])
        text = f"{_percent(mean)} are strictly better off than with {rival}"
        parts.append(text + (f" ({_percent(means[least])} in {least})" if len(means) > 1 else ""))
        figures.append(Figure(_percent(mean), f"of clients better off than with {rival}"))
    if parts:
        sentences.append(f"Of {name}'s clients, {' and '.join(parts)}.")


def _duels(
    name: str, fought: Sequence[Duel], seeds: int, sentences: list[str], twin: str | None
) -> None:
    tested = [duel for duel in fought if duel.p is not None]
    if not tested:
        if fought:
            sentences.append(
                "With one seed no difference between methods can be shown to be beyond chance."
                if seeds == 1
                else "No difference could be tested: methods diverged or have one seed in common."
            )
        return
    n = {verdict: sum(d.verdict == verdict for d in tested) for verdict in ("better", "worse")}
    open_ = len(tested) - n["better"] - n["worse"]
    others = "each other method" + (f" but {twin}" if twin else "")
    text = (
        f"Against {others} in each setting ({_count(len(tested), 'comparison')}), "
        f"{name} is better beyond chance in {n['better']}, worse in {n['worse']}, and not told "
        f"apart in {open_}"
    )
    if len(fought) > len(tested):
        text += f"; {len(fought) - len(tested)} more could not be tested"
    worst = sorted((d for d in tested if d.verdict == "worse"), key=lambda d: d.by_seed.mean)
    if worst:
        named = [f"{d.rival} in {d.setting} ({-d.by_seed.mean:.3f})" for d in worst[:4]]
        text += f"; worse than {', '.join(named)}" + (", …" if len(worst) > 4 else "")
    sentences.append(text + ".")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
