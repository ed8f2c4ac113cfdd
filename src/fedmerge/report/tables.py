"""Tables of a comparison for the terminal and for Markdown, and the door to what they are made of.

The statistics are in `ranking`, the sentences in `findings` and the reading of folders in `runs`;
this module only renders.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fedmerge.report.findings import Findings, findings
from fedmerge.report.ranking import METRICS, Entry, Metric, Table, comparison
from fedmerge.report.reading import load_runs, unfinished
from fedmerge.report.runs import ClientResult, RoundPoint, Run, Scores

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "METRICS",
    "ClientResult",
    "Entry",
    "Findings",
    "Metric",
    "RoundPoint",
    "Run",
    "Scores",
    "Table",
    "comparison",
    "entry_text",
    "findings",
    "load_runs",
    "mark",
    "models_text",
    "print_table",
    "size_text",
    "to_markdown",
    "unfinished",
    "value_text",
]


def size_text(n: float) -> str:
    """Return a number of bytes for reading, in powers of 1000: 16840 is "16.8 kB"."""
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if abs(n) < 999.5:
            break
        n, unit = n / 1000, larger
    return f"{n:.0f} {unit}" if unit == "B" or n >= 99.95 else f"{n:.1f} {unit}"


def models_text(values: Iterable[float]) -> str:
    """Return a cost in models for reading; "4 to 12" where it depends on the data or on tuning."""
    known = sorted(set(values))
    if not known:
        return "–"
    ends = dict.fromkeys(_models(value) for value in (known[0], known[-1]))
    return " to ".join(ends)


def _models(value: float) -> str:
    if 0 < value < 0.05:
        return "<0.1"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def value_text(metric: str, value: float | None) -> str:
    """Return one number of `metric` for reading; a run that diverged says so."""
    if value is None:
        return "–"
    if value != value or value in (float("inf"), float("-inf")):
        return "diverged"
    if metric.startswith("bytes"):
        return size_text(value)
    text = f"{value:.{METRICS[metric].digits}f}"
    return text.replace("-", "−" if float(text) else "")


def entry_text(metric: str, entry: Entry) -> str:
    """Return "mean ± std" of an entry, without its mark; a lone seed has no ± part."""
    text = value_text(metric, entry.mean)
    if entry.diverged:
        return entry.divergence
    if entry.std is None or (metric.startswith("bytes") and entry.std == 0):
        return text
    return f"{text} ± {value_text(metric, entry.std)}"


def mark(entry: Entry) -> str:
    """Return "*" for the best, "~" for what is not significantly worse, "=" for shown near it."""
    return "*" if entry.best else ("~" if entry.tied else "") + ("=" if entry.near else "")


def print_table(table: Table, console: Console) -> None:
    """Print the table with its title, marks and legend to a rich console."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(title=Text(table.title), box=box.SIMPLE_HEAD, title_justify="left")
    grid.add_column("method", no_wrap=True)
    for setting in table.settings:
        grid.add_column(Text(setting), justify="right", no_wrap=True)
    widest = max([len(mark(entry)) for entry in table.entries.values()] + [1])
    for method in table.methods:
        row = [Text(method)]
        for setting in table.settings:
            entry = table.entries[method, setting]
            sign = mark(entry).ljust(widest)
            style = "bold" if entry.best else "dim" if not entry.n else ""
            row.append(Text(f"{entry_text(table.metric, entry)} {sign}", style=style))
        grid.add_row(*row)
    console.print(grid)
    console.print(Text(table.note, style="dim"))


def to_markdown(table: Table) -> str:
    """Return the table as GitHub Markdown: a title line, the table, the legend."""
    lines = [
        f"**{_cell(table.title)}**",
        "",
        "| method | " + " | ".join(map(_cell, table.settings)) + " |",
        "| --- |" + " ---: |" * len(table.settings),
    ]
    for method in table.methods:
        cells = [_cell(method)]
        for setting in table.settings:
            entry = table.entries[method, setting]
            text = entry_text(table.metric, entry)
            text = f"**{text}**" if entry.best else text
            cells.append(f"{text} {_cell(mark(entry))}".rstrip())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _cell(table.note), ""])


def _cell(text: str) -> str:
    for sign in "\\|*~<_`":
        text = text.replace(sign, "\\" + sign)
    return text
