"""Pictures and tables of a comparison as files for papers, in a folder beside the page.

The pictures are those of `figures`, on a white ground; the table is written as CSV (one line for
each number), as Markdown and as LaTeX.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.errors import MissingExtraError, StateError
from fedmerge.report import clients as of_clients
from fedmerge.report import figures
from fedmerge.report.drawing import Style, method_styles
from fedmerge.report.overall import Regret, metric_of, regrets
from fedmerge.report.panels import focused, ordered
from fedmerge.report.ranking import Entry, Table, comparison, unique
from fedmerge.report.reading import load_runs
from fedmerge.report.runs import Run, finite
from fedmerge.report.tables import to_markdown, value_text
from fedmerge.report.totals import Totals, totals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = ("png", "svg", "pdf")
_WIDE = 6  # settings that fit on a page side by side
_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def write_figures(folder: Path) -> tuple[Path, int]:
    """Write `folder`/figures from the finished runs in `folder`; return it and how many files.

    Every picture is written as PNG, SVG and PDF, equal for equal runs. Raises StateError if there
    is no run, one is broken, or a file cannot be written, and MissingExtraError without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("report") from error
    runs = load_runs(folder)
    out = folder / "figures"
    sums = totals(runs)
    written = 0
    try:
        out.mkdir(exist_ok=True)
        for name, figure in _pictures(runs, sums):
            for ending in ENDINGS:
                figures.save(figure, out / f"{name}.{ending}")
                written += 1
        for table in sums.tables:
            texts = {"csv": to_csv(table), "md": to_markdown(table), "tex": to_latex(table)}
            for ending, text in texts.items():
                (out / f"table-{table.metric}.{ending}").write_text(text, encoding="utf-8")
                written += 1
    except OSError as error:
        what = f"{error.filename or out}: cannot be written ({error.strerror})"
        raise StateError(f"{what}; free or choose a folder") from error
    return out, written


def _pictures(runs: Sequence[Run], sums: Totals) -> Iterator[tuple[str, Figure]]:
    """(name of its files, picture), over all settings and for each."""
    methods = unique([*sums.ranking.means, *(run.method for run in runs)])
    styles = method_styles(methods)
    for table, part in zip(sums.tables, sums.regrets, strict=True):
        if len(table.methods) > 1:
            yield f"regret-{table.metric}", figures.regret_picture(part, table.metric, styles)
    if len(sums.ranking.means) > 1:
        yield "ranks", figures.rank_picture(sums.ranking, styles)
    taken: dict[str, int] = {}
    for column in unique(run.column for run in runs):
        stem = re.sub(r"[^A-Za-z0-9=.-]+", "-", column)
        taken[stem] = taken.get(stem, 0) + 1
        stem += f"-{taken[stem]}" if taken[stem] > 1 else ""
        own = [run for run in runs if run.column == column]
        for kind, figure in _of_setting(column, own, sums, styles):
            yield f"{stem}-{kind}", figure


def _of_setting(
    column: str, runs: Sequence[Run], sums: Totals, styles: Mapping[str, Style]
) -> Iterator[tuple[str, Figure]]:
    metric = metric_of(runs)
    methods = ordered(comparison(runs, "merged", metric), column)
    focus = focused(methods, sums.subject)
    yield "methods", figures.method_dots(runs, "merged", metric, styles, column)
    yield "curves", figures.learning_curves(runs, styles=styles, focus=focus)
    if any(finite(point.gap_test) for run in runs for point in run.log):
        yield "gap", figures.gap_over_rounds(runs, styles=styles, focus=focus)
    fought = [duel for duel in sums.duels if duel.setting == column]
    if fought and sums.subject:
        yield "differences", figures.duel_intervals(fought, sums.subject, metric)
    ours = [run for run in runs if run.method == sums.subject]
    theirs = [run for run in runs if run.method == "fedavg"]
    if figures.client_pairs(ours, theirs):
        yield "clients", figures.client_scatter(ours, theirs)
    weighed = next((run for run in ours if run.weights is not None and run.weights.size), None)
    if weighed is not None:
        _, weights = of_clients.history(weighed)
        part = of_clients.part_of(weighed, weights)
        yield "weights", figures.weights_heatmap(weighed, part)
        if all(client.importance for client in weighed.clients):
            yield "worth", figures.importance_map(weighed, part)


def to_csv(table: Table) -> str:
    """Return one line for each method and setting, with a head; nothing is rounded."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        ["metric", "model", "at", "setting", "method", "seeds", "diverged", "mean", "std", "best",
         "not_significantly_worse", "shown_not_worse", "behind_best", "behind_low", "behind_high",
         "p_corrected"]
    )  # fmt: skip
    for setting in table.settings:
        for method in table.methods:
            entry = table.entries[method, setting]
            gap = entry.behind
            behind = (None, None, None) if gap is None else (gap.mean, gap.low, gap.high)
            rows.writerow(
                [table.metric, table.model, table.at, setting, method, entry.n, entry.diverged,
                 entry.mean if finite(entry.mean) else None, entry.std, int(entry.best),
                 int(entry.best or entry.tied), int(entry.near), *behind, entry.p]
            )  # fmt: skip
    return text.getvalue()


def to_latex(table: Table) -> str:
    """Return the table for LaTeX with the package booktabs, in parts of at most six settings.

    Bold is the best of a setting, the sign of similarity what is not significantly worse; the last
    column is the regret over all settings.
    """
    lost = {regret.method: regret for regret in regrets(table)}
    parts = []
    for start in range(0, len(table.settings), _WIDE):
        settings = table.settings[start : start + _WIDE]
        last = start + _WIDE >= len(table.settings) and len(table.settings) > 1
        head = ["method", *settings, *(["largest regret"] if last else [])]
        lines = [
            f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            "\\toprule",
            " & ".join(escape(name) for name in head) + r" \\",
            "\\midrule",
        ]
        for method in table.methods:
            cells = [escape(method)]
            cells += [_latex_cell(table, table.entries[method, name]) for name in settings]
            cells += [_latex_regret(lost[method])] if last else []
            lines.append(" & ".join(cells) + r" \\")
        parts.append("\n".join([*lines, "\\bottomrule", "\\end{tabular}"]))
    note = "\n".join(f"% {line}" for line in (table.title, table.note))
    return f"{note}\n" + "\n\n\\medskip\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Return `text` so that LaTeX prints it as it is."""
    return "".join(_SIGNS.get(sign, sign) for sign in text)


def _latex_cell(table: Table, entry: Entry) -> str:
    if entry.mean is None or not finite(entry.mean):
        return "--" if entry.mean is None else "diverged"
    value = value_text(table.metric, entry.mean).replace("−", "$-$")
    text = f"\\textbf{{{value}}}" if entry.best else value
    if entry.std is not None:
        text += f" {{\\scriptsize$\\pm$ {value_text(table.metric, entry.std)}}}"
    return text + ("\\rlap{$^{\\sim}$}" if entry.tied else "")


def _latex_regret(regret: Regret) -> str:
    if regret.largest is None:
        return "--"
    return value_text("accuracy", regret.largest) + (" (incomplete)" if regret.missing else "")
