"""The words and tables of docs/results.md, all of them computed from runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from fedmerge.report.statistics import SIGNIFICANCE

from .standing import OURS, Result, Standing, score_of, worst_of

TOGETHER = {2: "both", 3: "all three"}
"""What the comparisons of one share of the clients are called together."""
_SHARES = {
    "all": ("all", "All clients in every round"),
    "30": ("30 %", "With 30 % of the clients in a round"),
    "10": ("10 %", "With 10 % of the clients in a round"),
}
COMPARISONS = {
    f"{share}{end}": (f"{shown}{once_more}", f"{heading}{on_others}")
    for share, (shown, heading) in _SHARES.items()
    for end, once_more, on_others in (
        ("", "", ""),
        ("-again", ", again", ", tuned and run on other seeds"),
        ("-third", ", a third time", ", tuned and run on other seeds yet"),
    )
}
"""How each is named in a table, and its heading."""
NEAR = 0.01
"""A loss that does not count."""


def page(comparisons: Mapping[str, Standing]) -> str:
    """docs/results.md."""
    lines = [
        "# Results, run by run",
        "",
        "Of the standard comparison, as far as its runs are kept in [results](results), from which",
        "`python -m benchmarks.standings` writes this. What was done and what it shows is in",
        "[comparison.md](comparison.md). All is of the last round and of the model that clients",
        "would use: as it is merged, but in `fedmerge-ft` and in rivals that fine-tune or keep a",
        "part of their own. Means over clients and seeds; intervals of 95 % over seeds, paired;",
        "p is Holm's, over the rivals of a setting. `fedmerge` and `fedmerge-ft` are one training,",
        "and neither is held against the other.",
        "",
        "## In short",
        "",
        "What is lost to the best rival of a setting with accuracy, and how many comparisons with",
        "one rival in one setting are beyond chance (those with values to predict counted):",
        "",
        *short(comparisons),
    ]
    for name, standing in comparisons.items():
        lines += ["", f"## {COMPARISONS[name][1]}", "", *_summary(standing)]
        lines += ["", "### What each method loses to the best", "", *_losses(standing)]
        lines += ["", "### FedMerge and the best rival", "", *_against(standing, score_of)]
        lines += ["", "### The worst tenth of the clients", "", *_against(standing, worst_of)]
        for data in dict.fromkeys(where.partition("/")[0] for where in standing.settings):
            here = [s for s in standing.settings if s.startswith(f"{data}/")]
            if here != [f"{data}/natural"]:
                lines += ["", f"### {data}", "", *_means(standing, here)]
        natural = [s for s in standing.settings if s.endswith("/natural")]
        if natural:
            lines += ["", "### Natural clients", "", *_means(standing, natural)]
    return "\n".join([*lines, ""])


@dataclass(frozen=True)
class _Facts:
    """What holds of one variant over all settings.

    lost: to the best rival, by setting with accuracy. better, worse, tenth: comparisons with one
    rival in one setting that are beyond chance; of mean accuracy or loss, and, behind only, of the
    worst tenth.
    """

    lost: Mapping[str, float]
    compared: int
    better: int
    worse: Sequence[str]
    tenth: Sequence[str]

    @staticmethod
    def of(standing: Standing, method: str) -> _Facts:
        means = _sure(standing, method, standing.settings, score_of)
        tenths = _sure(standing, method, standing.accurate, worst_of)
        worse, tenth = (
            [f"{rival} in `{s}` ({_text(by)})" for s, rival, by in sure if by > 0]
            for sure in (means, tenths)
        )
        return _Facts(
            standing.losses(method),
            sum(len(standing.rivals(s, method)) for s in standing.settings),
            len(means) - len(worse),
            worse,
            tenth,
        )

    @property
    def largest(self) -> str:
        where = max(self.lost, key=lambda s: self.lost[s])
        return f"{_text(self.lost[where])} (`{where}`)"

    @property
    def best(self) -> int:
        return sum(not v for v in self.lost.values())

    @property
    def near(self) -> int:
        return sum(v <= NEAR for v in self.lost.values())


def _sure(
    standing: Standing, method: str, settings: Sequence[str], of: Callable[[Result], float]
) -> list[tuple[str, str, float]]:
    """(setting, rival, what `method` is behind) where that is beyond chance."""
    return [
        (s, rival, behind.mean)
        for s in settings
        for rival, (behind, p) in standing.behind(s, method, of).items()
        if p < SIGNIFICANCE
    ]


def short(comparisons: Mapping[str, Standing]) -> Iterator[str]:
    """The table of what both variants lose in each comparison."""
    yield from _head(
        "clients in a round", "", "mean loss", "largest", "best in", f"within {NEAR}",
        "worse than a rival", "better", "worst tenth behind",
    )  # fmt: skip
    shown: dict[str, Standing] = {}
    for share, (named, _) in _SHARES.items():
        own = {n: one for n, one in comparisons.items() if n.partition("-")[0] == share}
        shown |= {COMPARISONS[name][0]: one for name, one in own.items()}
        if len(own) > 1:
            runs = [run for one in own.values() for run in one.results()]
            shown[f"{named}, {TOGETHER[len(own)]}"] = Standing(runs)
    for name, standing in shown.items():
        for method in OURS:
            facts, n = _Facts.of(standing, method), len(standing.accurate)
            yield _row(
                name,
                f"`{method}`",
                _text(mean(facts.lost.values())),
                facts.largest,
                f"{facts.best} of {n}",
                facts.near,
                f"{len(facts.worse)} of {facts.compared}",
                facts.better,
                len(facts.tenth),
            )


def _summary(standing: Standing) -> Iterator[str]:
    """What holds over all settings, of both variants."""
    n = sum(map(len, standing.runs.values()))
    yield f"{len(standing.methods)} methods, {_seeds(standing)}; {n:,} runs."
    for method in OURS:
        facts = _Facts.of(standing, method)
        ranked = standing.ranks(OURS[1 - OURS.index(method)])
        second = next(name for name in ranked if name != method)
        yield ""
        yield (
            f"**{method}** loses {_text(mean(facts.lost.values()))} in the mean and "
            f"{facts.largest} at most; it is best in {facts.best} of the "
            f"{len(standing.accurate)} settings with accuracy, and within {NEAR} of the best in "
            f"{facts.near}. Average rank {ranked[method]:.1f} of {len(ranked)} ({second} "
            f"{ranked[second]:.1f}). Of {facts.compared} comparisons with one rival in one setting "
            f"it is better beyond chance in {facts.better}, worse in {_listed(facts.worse)}. "
            f"The worst tenth is behind a rival's beyond chance in {_listed(facts.tenth)}."
        )


def _seeds(standing: Standing) -> str:
    """How many settings have been run with which seeds."""
    found: dict[tuple[int, ...], set[str]] = {}
    for (where, _), runs in standing.runs.items():
        found.setdefault(tuple(sorted(runs)), set()).add(where)
    return ", ".join(
        f"{_n(settings, 'setting')} with {_n(seeds, 'seed')} ({', '.join(map(str, seeds))})"
        for seeds, settings in found.items()
    )


def _n(things: Collection[object], word: str) -> str:
    return f"{len(things)} {word}{'s' * (len(things) != 1)}"


def _losses(standing: Standing) -> Iterator[str]:
    yield from _head("method", "largest", "where", "mean", f"within {NEAR}", "best")
    lost = {method: standing.losses(method) for method in standing.complete}
    for method in sorted(lost, key=lambda m: mean(lost[m].values())):
        own = lost[method]
        where = max(own, key=lambda s: own[s])
        near, best = sum(v <= NEAR for v in own.values()), sum(not v for v in own.values())
        yield _row(_name(method), _text(own[where]), where, _text(mean(own.values())), near, best)


def _against(standing: Standing, of: Callable[[Result], float]) -> Iterator[str]:
    """Both variants beside the rival that is best in a setting, and the rates that were chosen."""
    ours = [f"`{method}`" for method in OURS]
    lost = ("loss", "loss, `-ft`", "p", "p, `-ft`")
    yield from _head("", *ours, "best rival", *lost, "chosen")
    settings = standing.settings if of is score_of else standing.accurate
    for where in settings:
        seen = {
            m: mean(map(of, standing.runs[where, m].values()))
            for m in standing.methods
            if (where, m) in standing.runs
        }
        rivals = standing.rivals(where, OURS[0])
        best = max(rivals, key=lambda m: seen[m])
        top = _text(max(seen[m] for m in (*OURS, best)))
        shown = {m: _text(seen[m]) for m in (*OURS, best)}
        bold = {m: f"**{text}**" if text == top else text for m, text in shown.items()}
        held = [standing.behind(where, m, of)[best] for m in OURS]
        yield _row(
            where if where in standing.accurate else f"{where} (loss)",
            *(bold[m] for m in OURS),
            f"{bold[best]} ({best})",
            *(f"{_text(i.mean, signed=True)} ± {_text((i.high or 0.0) - i.mean)}" for i, _ in held),
            *(f"{p:.2f}" for _, p in held),
            "; ".join(dict.fromkeys(_chosen(standing, where, m) for m in OURS)),
        )


def _means(standing: Standing, settings: Sequence[str]) -> Iterator[str]:
    accurate = standing.accurate
    natural = settings[0].endswith("/natural")
    names = [s.split("/")[0 if natural else 1] for s in settings]
    loss = ["" if s in accurate else " (loss)" for s in settings]
    yield from _head("", *(name + text for name, text in zip(names, loss, strict=True)))
    here = [m for m in standing.methods if all((s, m) in standing.runs for s in settings)]
    tops = {s: max(standing.mean(s, m) for m in here) for s in settings}
    for method in here:
        cells = []
        for where in settings:
            text, top = _text(standing.mean(where, method)), _text(tops[where])
            cells.append(f"**{text}**" if text == top else text)
        yield _row(_name(method), *cells)


def _chosen(standing: Standing, where: str, method: str) -> str:
    return next(iter(standing.runs[where, method].values())).chosen or "defaults"


def _name(method: str) -> str:
    return f"**{method}**" if method in OURS else method


def _listed(texts: Sequence[str]) -> str:
    return f"{len(texts)}: {', '.join(texts)}" if texts else "none"


def _text(value: float, signed: bool = False) -> str:
    """Three digits without the zero in front; the sign only if asked for, and never of zero."""
    text = f"{abs(value):.3f}".removeprefix("0")
    return f"-{text}" if signed and round(value, 3) < 0 else text


def _head(*cells: str) -> tuple[str, str]:
    return _row(*cells), _row(*("---",) * len(cells))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
