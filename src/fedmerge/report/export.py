"""Pictures and tables of a comparison as files for papers, in a folder beside the page.

The pictures are those of `figures`, on a white ground; the table is written as CSV (one line for
each number), as Markdown and as LaTeX.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
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
_WIDE = 3  # settings that fit into the text width side by side, with deviations
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
            figure = figures.regret_picture(part, table.metric, styles)
            yield f"regret-{table.metric}", figures.for_paper(figure, "")
    if len(sums.ranking.means) > 1:
        yield "ranks", figures.for_paper(figures.rank_picture(sums.ranking, styles), "")
    taken: dict[str, int] = {}
    for column in unique(run.column for run in runs):
        stem = re.sub(r"[^A-Za-z0-9=.-]+", "-", column)
        taken[stem] = taken.get(stem, 0) + 1
        stem += f"-{taken[stem]}" if taken[stem] > 1 else ""
        own = [run for run in runs if run.column == column]
        n = len({run.seed for run in own})
        caption = f"{column}, {n} seed{'' if n == 1 else 's'}"
        for kind, figure in _of_setting(column, own, sums, styles):
            yield f"{stem}-{kind}", figures.for_paper(figure, caption)
        for kind, figure, run in _of_clients(own, sums.subject):
            of_run = column if kind == "split" else f"{column}, {run.method}"
            yield f"{stem}-{kind}", figures.for_paper(figure, f"{of_run}, seed {run.seed}")


def _of_setting(
    column: str, runs: Sequence[Run], sums: Totals, styles: Mapping[str, Style]
) -> Iterator[tuple[str, Figure]]:
    """The pictures over all seeds of a setting."""
    metric = metric_of(runs)
    methods = ordered(comparison(runs, "merged", metric), column)
    focus = focused(methods, sums.subject)
    best_first = [run for method in methods for run in runs if run.method == method]
    yield "methods", figures.method_dots(best_first, "merged", metric, styles, metric)
    yield "curves", figures.learning_curves(runs, styles=styles, focus=focus)
    if any(finite(point.gap_test) for run in runs for point in run.log):
        yield "gap", figures.gap_over_rounds(runs, styles=styles, focus=focus)
    fought = [duel for duel in sums.duels if duel.setting == column]
    if fought and sums.subject:
        yield "differences", figures.duel_intervals(fought, sums.subject, metric)
    ours = [run for run in runs if run.method == sums.subject]
    theirs = [run for run in runs if run.method == "fedavg"]
    if figures.client_pairs(ours, theirs, metric):
        yield "clients", figures.client_scatter(ours, theirs, metric)


def _of_clients(runs: Sequence[Run], subject: str | None) -> Iterator[tuple[str, Figure, Run]]:
    """The pictures of the clients of one run of a setting, with that run."""
    ours = [run for run in runs if run.method == subject]
    labelled = next(
        (run for run in (*ours, *runs) if any(client.label_counts for client in run.clients)), None
    )
    if labelled is not None:
        rows = [figures.LabelCounts(c.id, c.kind, c.label_counts) for c in labelled.clients]
        yield "split", figures.data_split(rows, "examples of each label by client"), labelled
    weighed = next((run for run in ours if run.weights is not None and run.weights.size), None)
    if weighed is None or not weighed.clients:
        return
    _, weights = of_clients.history(weighed)
    part = of_clients.part_of(weighed, weights)
    yield "weights", figures.weights_heatmap(weighed, part), weighed
    found = of_clients.client_map(weighed, {}, weights)
    if found is not None:
        label = f"map of the clients of {weighed.column} by their merging weights"
        yield "map", figures.map_picture(found, label), weighed
    if all(client.importance for client in weighed.clients):
        yield "worth", figures.importance_map(weighed, part), weighed


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
    """Return the table for LaTeX with the package booktabs, in parts of at most three settings.

    Bold is the best of a setting; the last column is the regret over all settings, where methods
    are compared over several. The legend stands under the table.
    """
    lost = {regret.method: regret for regret in regrets(table)}
    compared = len(table.settings) > 1 and len(table.methods) > 1
    parts = []
    for start in range(0, len(table.settings), _WIDE):
        settings = table.settings[start : start + _WIDE]
        last = compared and start + _WIDE >= len(table.settings)
        lines = [
            f"\\begin{{tabular}}{{l{'r' * (len(settings) + last)}}}",
            "\\toprule",
            *_latex_head(settings, table.settings, last),
            "\\midrule",
        ]
        for method in table.methods:
            cells = [escape(method)]
            cells += [_latex_cell(table, table.entries[method, name]) for name in settings]
            cells += [_latex_regret(lost[method])] if last else []
            lines.append(" & ".join(cells) + r" \\")
        parts.append("\n".join([*lines, "\\bottomrule", "\\end{tabular}"]))
    tables = "\n\n\\medskip\n\n".join(parts)
    return (
        "% Needs \\usepackage{booktabs}.\n{\\small\\setlength{\\tabcolsep}{5pt}%\n"
        f"{tables}\n\n"
        f"\\smallskip\n\\noindent\\footnotesize {_latex_note(table, compared)}\\par}}\n"
    )


def _latex_head(settings: Sequence[str], every: Sequence[str], regret: bool) -> list[str]:
    """The lines of a table's head: with several data sets, these stand above their settings."""
    pairs = [name.rpartition("/") for name in settings]
    if len({name.rpartition("/")[0] for name in every}) < 2:
        names = ["method", *settings]
        return [" & ".join(map(escape, [*names, *(["regret"] if regret else [])])) + r" \\"]
    over, rules, at = [""], [], 2
    for data, group in groupby(data for data, _, _ in pairs):
        n = len(list(group))
        over.append(f"\\multicolumn{{{n}}}{{c}}{{{escape(data)}}}")
        rules.append(f"\\cmidrule(lr){{{at}-{at + n - 1}}}")
        at += n
    names = ["method", *(setting for _, _, setting in pairs), *(["regret"] if regret else [])]
    return [
        " & ".join([*over, *([""] if regret else [])]) + r" \\",
        "".join(rules),
        " & ".join(map(escape, names)) + r" \\",
    ]


def _latex_note(table: Table, regret: bool) -> str:
    """Title and legend, in the signs that the cells bear."""
    note = f"{table.title}. {table.note}".replace("* has", "Bold is")
    text = escape(note).replace(escape("~"), "$\\sim$")
    for sign, command in (("±", "$\\pm$"), ("≥", "$\\geq$"), ("=", "$=$")):
        text = text.replace(sign, command)
    return text + (" Regret: the largest loss to the best of a setting." if regret else "")


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
    signs = ("\\sim" if entry.tied else "") + ("=" if entry.near else "")
    return text + (f"\\rlap{{$^{{{signs}}}$}}" if signs else "")


def _latex_regret(regret: Regret) -> str:
    if regret.largest is None:
        return "--"
    return value_text("accuracy", regret.largest) + (" (incomplete)" if regret.missing else "")
