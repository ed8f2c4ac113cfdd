"""The comparison in sentences: where FedMerge led, and, as plainly, where it did not.

Every sentence is computed from the runs; none claims more than the table it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmerge.report.ranking import METRICS, Entry, Table, comparison, unique
from fedmerge.report.runs import Run, finite, is_fedmerge, twin_of
from fedmerge.report.statistics import ENOUGH

NAMED = 4
"""Most settings that a headline names one by one."""


@dataclass(frozen=True)
class Findings:
    """What a comparison found.

    headlines: what was won and what was lost, by accuracy and by loss, and whether the seeds are
    enough to tell. not_won: one sentence for each setting where another method had the better mean.
    by_setting: one sentence for each setting. caveat: the test and its limits. name: of what the
    sentences are about. variants: what the other FedMerge variants are, and what is found of
    "fedmerge-ft"; empty if there are none.
    """

    headlines: tuple[str, ...]
    not_won: tuple[str, ...]
    by_setting: Mapping[str, str]
    caveat: str
    name: str = "FedMerge"
    variants: str = ""

    @property
    def headline(self) -> str:
        """All of it in one line."""
        return " ".join(self.headlines)


def findings(runs: Sequence[Run]) -> Findings:
    """Say what `runs` show of the merged model's test accuracy, or loss where there is no accuracy.

    The subject is the first FedMerge variant in the runs; other variants count as rivals, but for
    the same one with or without fine-tuning before use: its training is the same.
    """
    variants = unique(run.method for run in runs if is_fedmerge(run.method))
    settings = unique(run.column for run in runs)
    if not variants:
        tables = _tables(runs)
        said = {name: _leader(table, name) for table in tables for name in table.settings}
        headlines = tuple(_without_fedmerge(table) for table in tables)
        caveat = tables[0].note if tables else ""
        return Findings(headlines, (), {name: said[name] for name in settings}, caveat)
    subject = variants[0]
    twin = twin_of(subject)
    name = called(variants)
    tables = _tables([run for run in runs if run.method != twin])
    said = {s: _sentence(table, subject, name, s) for table in tables for s in table.settings}
    lost = {s for table in tables for s in _judged(table, subject) if not _won(table, subject, s)}
    said |= {
        s: _leader(table, s) for table in _tables(runs) for s in table.settings if s not in said
    }
    notes = [_variant(one, subject, twin) for one in variants if name == subject]
    if twin in variants:
        notes += _headlines(_tables([run for run in runs if run.method != subject]), twin, twin)
    ran = [t.entries[subject, s].n for t in tables for s in _judged(t, subject)]
    return Findings(
        headlines=(*_headlines(tables, subject, name), *_few(ran)),
        not_won=tuple(said[s] for s in settings if s in lost),
        by_setting={s: said[s] for s in settings},
        caveat=tables[0].note if tables else "",
        name=name,
        variants=" ".join(notes),
    )


def _tables(runs: Sequence[Run]) -> list[Table]:
    """The accuracy of the settings that have one, and the loss of the others."""
    scored = {run.column for run in runs if finite(_accuracy(run))}
    parts = (
        ("accuracy", [run for run in runs if run.column in scored]),
        ("loss", [run for run in runs if run.column not in scored]),
    )
    return [comparison(part, "merged", metric) for metric, part in parts if part]


def _headlines(tables: Sequence[Table], subject: str, name: str) -> list[str]:
    """What was won and lost in each table."""
    tables = [table for table in tables if subject in table.methods]
    return [_headline(table, subject, name, _judged(table, subject)) for table in tables]


def called(variants: Sequence[str]) -> str:
    """What the first of the FedMerge variants is called in sentences."""
    plain = len(variants) == 1 and not variants[0].startswith("fedmerge-ft")
    return "FedMerge" if plain else variants[0]


def _variant(method: str, subject: str, twin: str) -> str:
    """What a variant's name stands for, and how it is counted."""
    name, _, options = method.partition(":")
    what = f" with {options.replace(',', ', ')}" if options else ""
    if name == "fedmerge-ft":
        what += ", whose model a client fine-tunes while that helps it"
    what = what or " with its usual settings"
    role = "it counts as another method"
    if method == subject:
        role = "the sentences are about it"
    elif method == twin:
        role = f"it and {subject} are not counted against each other"
    return f"{method} is FedMerge{what}; {role}."


def _accuracy(run: Run) -> float | None:
    scores = run.last.models.get("merged")
    return None if scores is None else scores.accuracy


def _judged(table: Table, subject: str) -> list[str]:
    """The settings in which the subject ran beside others."""
    settings = table.settings if subject in table.methods else ()
    return [s for s in settings if _ran(table, subject, s) and len(_runners(table, s)) > 1]


def _won(table: Table, subject: str, setting: str) -> bool:
    return table.entries[subject, setting].best


def _few(seeds: Sequence[int]) -> list[str]:
    """What must be said with the headline if some setting has few seeds."""
    n = min(seeds, default=ENOUGH)
    if n >= ENOUGH:
        return []
    if n == 1:
        return ["One seed cannot tell a difference from chance."]
    return [f"With {n} seeds only large differences can be told from chance."]


def _number(table: Table) -> str:
    """Name of the number that is compared."""
    return f"{table.model}-model {'accuracy' if table.metric == 'accuracy' else 'loss'}"


def _format(value: float) -> str:
    return f"{value:.3f}"


def _has(table: Table, method: str, setting: str) -> bool:
    entry = table.entries.get((method, setting))
    return entry is not None and finite(entry.mean)


def _ran(table: Table, method: str, setting: str) -> bool:
    entry = table.entries.get((method, setting))
    return entry is not None and entry.n > 0


def _runners(table: Table, setting: str) -> list[str]:
    return [method for method in table.methods if _ran(table, method, setting)]


def _present(table: Table, setting: str) -> list[str]:
    return [method for method in table.methods if _has(table, method, setting)]


def _mean(table: Table, method: str, setting: str) -> float:
    mean = table.entries[method, setting].mean
    return float("nan") if mean is None else mean


def _runner_up(table: Table, subject: str, setting: str) -> str | None:
    """The best of the other methods, None if all of them diverged."""
    rivals = [method for method in _present(table, setting) if method != subject]
    sign = METRICS[table.metric].better
    return max(rivals, key=lambda method: sign * _mean(table, method, setting), default=None)


def _behind(table: Table, subject: str, rival: str, setting: str) -> Entry:
    """The entry that is not the best, of a pair of which one is."""
    ours, theirs = table.entries[subject, setting], table.entries[rival, setting]
    return theirs if ours.best else ours


def _distance(entry: Entry) -> float:
    """What an entry loses to the best on the seeds that both have, NaN if there are none.

    Below 0 it is the better on those, and the best has its better mean from other seeds.
    """
    return float("nan") if entry.behind is None else entry.behind.mean


def _headline(table: Table, subject: str, name: str, judged: Sequence[str]) -> str:
    if not judged:
        return _alone(table, subject, name)
    entries = {s: table.entries[subject, s] for s in judged}
    won = [s for s in judged if entries[s].best]
    n = len(judged)
    if n == 1 and not won:
        return _lost(table, subject, name, judged[0])
    if not won:
        text = f"{name} did not have the best {_number(table)} in any of the {n} settings"
    else:
        share = "both" if len(won) == n == 2 else f"all {n}" if len(won) == n else None
        where = judged[0] if n == 1 else f"{share or f'{len(won)} of {n}'} settings"
        text = f"{name} had the best {_number(table)} in {where}"
    # "Tied" only says that the seeds show no difference, so it is never counted as a win.
    counts = (
        ("it could not be told from the best", sum(e.tied for e in entries.values())),
        ("it was behind beyond chance", sum(map(_beyond_chance, entries.values()))),
        ("it diverged", sum(e.diverged > 0 for e in entries.values())),
    )
    parts = [
        f"in {'all' if count == n else f'{count} more' if won and not i else count} {words}"
        for i, (words, count) in enumerate(counts)
        if count
    ]
    text += f"; {_list(parts)}" if parts else ""
    rivals = {s: rival for s in won if (rival := _runner_up(table, subject, s))}
    leads = {s: _distance(_behind(table, subject, rivals[s], s)) for s in rivals}
    leads = {s: lead for s, lead in leads.items() if lead >= 0}
    if n == 1 and not rivals:
        return f"{text}, where every other method diverged on some seed."
    if not leads:
        return text + "."
    widest = max(leads, key=lambda s: leads[s])
    rival = rivals[widest]
    if leads[widest] < 0.0005:  # what would print as 0.000 is no lead
        level = f"level with {rival} to three decimals"
        return f"{text}, {level}." if n == 1 else f"{text}; at best {level}."
    behind = table.entries[rival, widest]
    doubt = f", {_chance(behind)}" if behind.tied or behind.shared < min(2, behind.n) else ""
    if n == 1:
        return f"{text}, with a lead of {_format(leads[widest])} over {rival}{doubt}."
    which = "its largest lead was" if len(won) > 1 else "its lead was"
    return f"{text}; {which} {_format(leads[widest])} over {rival} in {widest}{doubt}."


def _beyond_chance(entry: Entry) -> bool:
    """Whether an entry is behind the best by more than chance explains."""
    return entry.behind is not None and entry.shared > 1 and not entry.tied


def _lost(table: Table, subject: str, name: str, setting: str) -> str:
    """The headline about a single setting that was not won."""
    text = f"{name} did not have the best {_number(table)} in {setting}"
    entry = table.entries[subject, setting]
    if entry.diverged:
        return f"{text}: it {entry.divergence}."
    sign = METRICS[table.metric].better
    others = [sign * _mean(table, other, setting) for other in _present(table, setting)]
    place = 1 + sum(value > sign * (entry.mean or 0.0) for value in others)
    text += f": it was number {place} of {len(_runners(table, setting))}"
    if entry.tied:
        return f"{text}, but could not be told from the best."
    return f"{text}, behind the best beyond chance." if _beyond_chance(entry) else f"{text}."


def _alone(table: Table, subject: str, name: str) -> str:
    seen = [s for s in table.settings if _has(table, subject, s)]
    if not seen:
        return f"{name} has no finite {_number(table)} in these runs."
    values = sorted(_mean(table, subject, s) for s in seen)
    reached = _format(values[0]) if len(values) == 1 else f"{_format(values[0])} to "
    if len(values) > 1:
        reached += f"{_format(values[-1])} over {len(values)} settings"
    else:
        reached += f" in {seen[0]}"
    return (
        f"{name} reached a {_number(table)} of {reached}; there is no other method to judge it by."
    )


def _without_fedmerge(table: Table) -> str:
    led: dict[str, list[str]] = {}
    for setting in table.settings:
        best = table.best(setting)
        if best is not None:
            led.setdefault(best, []).append(setting)
    if len(table.methods) == 1:
        return f"FedMerge is not among these runs, which hold only {table.methods[0]}."
    if not led:
        return "FedMerge is not among these runs."
    if len(table.settings) > NAMED:
        most = sorted(led.items(), key=lambda pair: -len(pair[1]))
        parts = [f"{method} in {len(settings)}" for method, settings in most]
        parts[0] += f" of {len(table.settings)} settings"
    else:
        parts = [f"{method} in {_list(settings)}" for method, settings in led.items()]
    return (
        f"FedMerge is not among these runs; the best {_number(table)} was that of {_list(parts)}."
    )


def _leader(table: Table, setting: str) -> str:
    best = table.best(setting)
    if len(table.methods) == 1 and _has(table, table.methods[0], setting):
        value = _format(_mean(table, table.methods[0], setting))
        return f"In {setting}, {table.methods[0]} had a {_number(table)} of {value}."
    if best is None:
        return f"In {setting}, no method has a finite {_number(table)}."
    value = _format(_mean(table, best, setting))
    return f"In {setting}, {best} had the best {_number(table)} ({value})."


def _sentence(table: Table, subject: str, name: str, setting: str) -> str:
    """One setting in one sentence, for or against the subject."""
    if not _ran(table, subject, setting):
        return f"{name} has no {_number(table)} in {setting}. {_leader(table, setting)}"
    ours = table.entries[subject, setting]
    if ours.diverged:
        return f"In {setting}, {name} {ours.divergence}. {_leader(table, setting)}"
    mine = _format(_mean(table, subject, setting))
    if len(_runners(table, setting)) == 1:
        return f"In {setting}, {name} had {mine}, with no other method to judge it by."
    rival = _runner_up(table, subject, setting)
    if rival is None:
        return f"In {setting}, {name} had {mine}; every other method diverged on some seed."
    behind = _behind(table, subject, rival, setting)
    leader, other = (name, rival) if ours.best else (rival, name)
    values = [mine, _format(_mean(table, rival, setting))]
    gap = _distance(behind)
    if behind.shared < max(ours.n, table.entries[rival, setting].n):
        values = values if ours.best else values[::-1]
        means = f"In {setting}, {leader} had the better mean ({values[0]} against {values[1]}), but"
        seeds = "seed" if behind.shared == 1 else "seeds"
        if not behind.shared:
            return f"{means} the two have no seed in common, which says nothing."
        ahead = leader if gap >= 0 else other
        return (
            f"{means} over other seeds than {other}: on the {behind.shared} {seeds} that both have,"
            f" {ahead} was ahead by {_format(abs(gap))}, {_chance(behind)}."
        )
    if gap < 0.0005:
        return f"In {setting}, {name} and {rival} were level ({values[0]} against {values[1]})."
    if not ours.best:
        values.reverse()
    over = f" of {rival}" if ours.best else ""
    unit = "" if table.metric == "accuracy" else f" in {table.metric}"
    return (
        f"In {setting}, {leader} was ahead{over} by {_format(gap)}{unit} "
        f"({values[0]} against {values[1]}), {_chance(behind)}."
    )


def _chance(second: Entry) -> str:
    """What the test says of the distance between the best and the entry behind it."""
    n = second.shared
    if n < 2:
        shared = "one seed" if n else "no seed in common"
        return f"on {shared}, which cannot rule out chance"
    if second.tied:
        return f"within the noise of {n} seeds"
    if second.p is None:
        return f"by the same amount on each of {n} seeds"
    return f"a difference beyond chance (paired t-test over {n} seeds, corrected {_p(second.p)})"


def _p(value: float) -> str:
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
