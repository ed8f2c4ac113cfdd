"""What the terminal shows of runs: progress while they go on, and small tables at their end.

It prints what it is given; the table of a comparison and its statistics are the report's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table as Grid
from rich.text import Text

from ..errors import MissingExtraError
from ..report.about import refusals, refused_advice, refused_text
from ..report.overall import overviews, ranking, regrets
from ..report.page import write_report
from ..report.ranking import subject_of
from ..report.runs import is_fedmerge, twin_of
from ..report.tables import (
    findings,
    load_runs,
    models_text,
    print_table,
    size_text,
    value_text,
)
from .cells import RUNS, Cell
from .profile import PHASES, Profile
from .results import CLIENTS, RESULTS, collect

if TYPE_CHECKING:
    from ..data import ClientRow, Federation
    from ..report.runs import Run
    from ..sim import RoundLog
    from .tuning import Tuning


COST_COLUMNS = (
    ("down", "down"),
    ("up", "up"),
    ("client", "client"),
    ("server", "server"),
    ("per client", "server_per_client"),
    ("passes", "passes"),
)


@contextmanager
def _progress(title: str, total: int, quiet: bool) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    console, hidden = Console(stderr=True), _hidden(quiet)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        yield bar, bar.add_task(title, total=total, note="")


def _hidden(quiet: bool) -> bool:
    return quiet or not (sys.stdout.isatty() and sys.stderr.isatty())


@contextmanager
def waiting(what: str, quiet: bool = False) -> Iterator[None]:
    """Show what is waited for, as long as there is nothing to count."""
    with nullcontext() if _hidden(quiet) else Console(stderr=True).status(Text(what)):
        yield


@contextmanager
def rounds_bar(title: str, total: int, quiet: bool) -> Iterator[Callable[[RoundLog], None]]:
    """Show the rounds of one run; the function given takes the log of each."""
    note = ""
    with _progress(title, total, quiet) as (bar, task):

        def show(log: RoundLog) -> None:
            nonlocal note
            found = log.metrics.get("merged", {}).get("test", {})
            for metric in ("loss", "accuracy"):
                summary = found.get(metric)
                if summary is not None:
                    note = f"{metric} {summary.mean:.3f}"
            bar.update(task, completed=log.round, note=note)

        yield show


@contextmanager
def cells_bar(
    total: int, done: int, quiet: bool, tuned: bool
) -> Iterator[Callable[[Cell, int], None]]:
    """Show the runs of a comparison; the function given takes each that ended and the new total."""
    with _progress("trials and cells" if tuned else "cells", total, quiet) as (bar, task):
        bar.update(task, completed=done)

        def show(cell: Cell, total: int) -> None:
            kind = "" if cell.root == RUNS else "trial "
            bar.update(task, advance=1, total=total, note=f"{kind}{cell.name}")

        yield show


def tuning_notes(plan: Tuning, trials: int) -> list[str]:
    """Say what tuning did: nothing without it, and where a method has fewer points than asked."""
    # Of groups that were not tuned, the command says so by itself.
    made = {name: choice for name, choice in plan.choices().items() if not choice.failed}
    if not trials or not made:
        return []
    moved = sum(bool(choice.values) for choice in made.values())
    seeds = [n for choice in made.values() for n in choice.seeds]
    least, most = min(seeds), max(seeds)
    notes = [
        f"Tuning tried {trials} point{'s' * (trials > 1)} beside the defaults on "
        f"{most if least == most else f'{least} to {most}'} seed{'s' * (most > 1)} not reported, "
        "by validation data, and chose another than the defaults in "
        f"{moved} of {len(made)} groups (method, data and setting)."
    ]
    short = plan.short(trials)
    if short:
        named = ", ".join(f"{method} {n}" for method, n in short.items())
        notes.append(f"--trials {trials} is more than some grids have; all was tried of: {named}.")
    return notes


def print_result(result: Mapping[str, Any]) -> None:
    """Print what one run reached on test data, and what it cost."""
    grid = Grid("model", box=box.SIMPLE_HEAD)
    for heading in ("accuracy", "worst tenth", "loss"):
        grid.add_column(heading, justify="right")
    for model, scores in result["models"].items():
        values = [
            value_text(metric, scores[metric]) + _error_text(metric, scores)
            for metric in ("accuracy", "accuracy_worst_decile", "loss")
        ]
        grid.add_row(model, *values)
    gaps = [value_text(name, result[name]) for name in ("gap_train", "gap_test")]
    console = _console()
    _say(
        console,
        f"{result['method']} on {result['data']}/{result['setting']}, seed {result['seed']}, "
        f"{result['rounds']} rounds, test data",
    )
    console.print(grid)
    _say(
        console,
        f"local-global gap {gaps[0]} (train), {gaps[1]} (test)"
        f" · {size_text(result['bytes_up'])} up, {size_text(result['bytes_down'])} down"
        f" per client and round · {result['seconds']:.1f} s",
    )
    if "execution" in result:  # not in a result of an older version
        _say(console, result["execution"])
    if result["refused"]:
        _say(console, f"refused updates: {refused_text(result['refused'])}")
        for line in refused_advice(result["refused"]):
            _say(console, line)


def _error_text(metric: str, scores: Mapping[str, Any]) -> str:
    """The standard error of a mean over a sample of the clients; nothing of a mean over all."""
    error = scores.get(f"{metric}_error")
    return "" if error is None else f" ± {value_text(metric, error)}"


def print_profile(profile: Profile) -> None:
    """Print where the time of a run went."""
    grid = Grid("phase", box=box.SIMPLE_HEAD, title="Where the time went", title_justify="left")
    for heading in ("seconds", "share", "ms a round"):
        grid.add_column(heading, justify="right")
    grid.add_column("what")
    for phase, seconds, share, each in profile.rows():
        per_round = "–" if each is None else f"{1000 * each:.1f}"
        grid.add_row(phase, f"{seconds:.2f}", f"{share:.1%}", per_round, PHASES[phase])
    grid.add_section()
    grid.add_row("total", f"{profile.total:.2f}", "", "", f"{profile.rounds} rounds")
    _console().print(grid)


def print_clients(federation: Federation, rows: Sequence[ClientRow]) -> None:
    """Print one line for each client: its kind, the sizes of its splits, and its labels."""
    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    grid.add_column("client", no_wrap=True)
    grid.add_column("kind", no_wrap=True)
    for heading in ("train", "valid.", "test"):
        grid.add_column(heading, justify="right", no_wrap=True)
    if federation.task == "classification":
        grid.add_column(f"examples of label 0 to {federation.n_outputs - 1}")
    for row in rows:
        sizes = map(str, (row.n_train, row.n_validation, row.n_test))
        labels = [_labels(row.label_counts.tolist())] if len(row.label_counts) else []
        grid.add_row(Text(row.id), Text(row.kind or "–"), *sizes, *labels)
    console = _console()
    _say(console, f"{federation.name}: {len(rows)} clients")
    console.print(grid)


def _labels(counts: Sequence[int]) -> str:
    """Counts in the order of the labels; of many labels, the five that the client has most of."""
    if len(counts) <= 12:
        width = len(str(max(counts)))
        return " ".join(f"{n or '·':>{width}}" for n in counts)
    held = sorted((label for label, n in enumerate(counts) if n), key=lambda i: -counts[i])
    most = ", ".join(f"{label}: {counts[label]}" for label in held[:5])
    return f"{len(held)} labels; {most}{', …' if len(held) > 5 else ''}"


def print_comparison(cells: Sequence[Cell], out: Path, notes: Sequence[str] = ()) -> None:
    """Write the results and the page of what is finished; print the tables, findings and notes."""
    if not collect(out, cells):
        return
    page: str
    try:
        page = f"The page is {write_report(out)}"
    except MissingExtraError as error:
        page = f"There is no page: {error}, then `fedmerge report {out}`"
    names = {cell.name for cell in cells}
    runs = load_runs(out)
    asked = [run for run in runs if run.folder in names]
    console = _console()
    for data in dict.fromkeys(run.data for run in asked):
        # Settings with values to predict have no accuracy; they get a table of their own.
        for table in overviews([run for run in asked if run.data == data]):
            print_table(table, console)
    console.print(methods_grid(asked))
    found = findings(asked)
    lines = [found.headline, f"{page}; the numbers are in {out / RESULTS} and {CLIENTS}."]
    if len(runs) > len(asked):
        lines.append(f"The page also shows {len(runs) - len(asked)} earlier runs in {out}.")
    lines += found.not_won
    methods = {run.method for run in asked}
    subject = subject_of(run.method for run in asked)
    if not found.not_won and len(methods) > 1 and subject:
        but = f" but {twin_of(subject)}" if twin_of(subject) in methods else ""
        lines.append(f"There is no setting in which another method{but} had the better mean.")
    for line in (*lines, *refusals(asked), *notes):
        _say(console, line)


def methods_grid(runs: Sequence[Run]) -> Grid:
    """Return one row for each method: how it fares over all settings, and what it costs."""
    tables = overviews(runs)
    ranks = ranking(tables).means
    grid = Grid(
        title="Over all settings, and the cost in models",
        caption="regret: largest loss to the best mean of a setting (merged model, last round)"
        f"{_twins(regret.method for table in tables for regret in regrets(table))}\n"
        "down, up: a client and round; client, per client: kept by each client, and for it by the "
        "server\npasses: of local training in a round, FedAvg's is 1; fine-tuning before use "
        "is not in it",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    grid.add_column("method", no_wrap=True)
    regret_of: dict[str, dict[str, str]] = {run.method: {} for run in runs}
    for table in tables:
        grid.add_column(f"regret ({table.metric})", justify="right", no_wrap=True)
        for regret in regrets(table):
            text = value_text(table.metric, regret.largest and abs(regret.largest))
            text += f" in {regret.where}" if regret.largest else ""
            text += " (incomplete)" if regret.missing else ""
            regret_of[regret.method][table.metric] = text
    for heading in ("mean rank", *(heading for heading, _ in COST_COLUMNS)):
        grid.add_column(heading, justify="right", no_wrap=True)
    for method, texts in regret_of.items():
        lost = [texts.get(table.metric, "–") for table in tables]
        rank = f"{ranks[method]:.1f}" if method in ranks else "–"
        own = [run.cost for run in runs if run.method == method]
        costs = [models_text(cost[key] for cost in own if key in cost) for _, key in COST_COLUMNS]
        grid.add_row(Text(method), *lost, rank, *costs)
    return grid


def _twins(methods: Iterable[str]) -> str:
    """What regret does not count, where two methods are one training."""
    names = set(methods)
    pairs = [(name, twin_of(name)) for name in sorted(names) if is_fedmerge(name)]
    both = [f"{one} and {other}" for one, other in pairs if one < other and other in names]
    if not both:
        return ""
    return f"; {', '.join(both)} are one training, and neither is held against the other"


def _console() -> Console:
    """Standard output; where it is no terminal, wide enough that no number is cut off."""
    return Console(width=None if sys.stdout.isatty() else 240)


def _say(console: Console, line: str) -> None:
    """Print `line` as it is: a path must not be cut, nor a bracket taken for markup."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
