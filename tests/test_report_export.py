"""Pictures and tables as files: complete, equal for equal runs, and escaped for their readers."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedmerge.errors import MissingExtraError, StateError
from fedmerge.report import export
from fedmerge.report.export import escape, to_csv, to_latex, write_figures
from fedmerge.report.ranking import comparison
from report_fixture import KINDS, METHODS, write_folder, write_run
from test_report_page import make_regression
from test_report_tables import make

VALUES = {
    "a_b": {"fedmerge": [0.90, 0.92, 0.94], "x&y": [0.89, 0.93, 0.925], "low": [0.7, 0.71, 0.74]},
    "c": {"fedmerge": [0.5, 0.5, 0.5], "x&y": [0.6, 0.6, 0.6]},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    methods = ("fedavg", "local", "fedmerge")
    write_folder(folder, settings=("domain",), methods=methods, seeds=(0, 1), rounds=4)
    return write_figures(folder)[0]


def test_every_picture_comes_in_three_forms_and_repeats_to_the_byte(exported: Path) -> None:
    kinds = (
        "methods",
        "curves",
        "gap",
        "differences",
        "clients",
        "split",
        "weights",
        "map",
        "worth",
    )
    stems = [f"domain-{kind}" for kind in kinds] + ["regret-accuracy", "ranks"]
    wanted = {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg", "pdf")}
    wanted |= {f"table-accuracy.{ending}" for ending in ("csv", "md", "tex")}
    first = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert set(first) == wanted
    heads = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for name, data in first.items():
        assert data.startswith(heads.get(name.rsplit(".")[-1], b"")), name
    out, written = write_figures(exported.parent)
    assert (out, written) == (exported, len(wanted))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


@pytest.fixture
def svg_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read the text of a picture: the other forms take twice as long."""
    monkeypatch.setattr(export, "ENDINGS", ("svg",))


@pytest.mark.usefixtures("svg_only")
def test_a_regression_has_the_clients_under_both_methods_too(tmp_path: Path) -> None:
    for method in ("fedmerge", "fedavg"):
        write_run(tmp_path, "domain", method, 0, 2, clients=6)
    make_regression(tmp_path)
    out, _ = write_figures(tmp_path)
    text = (out / "domain-clients.svg").read_text()
    assert {"test loss, fedmerge", "test loss, fedavg"} <= set(
        re.findall(r">([^<>]+)</text>", text)
    )


def test_csv_holds_every_number_unrounded() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison(make(VALUES))))))
    assert len(rows) == 6
    by_cell = {(row["setting"], row["method"]): row for row in rows}
    best = by_cell["a_b", "fedmerge"]
    assert float(best["mean"]) == pytest.approx(0.92, abs=1e-15)
    assert (best["best"], best["seeds"], best["behind_best"]) == ("1", "3", "")
    tied, low = by_cell["a_b", "x&y"], by_cell["a_b", "low"]
    assert (tied["not_significantly_worse"], low["not_significantly_worse"]) == ("1", "0")
    assert float(low["behind_best"]) == pytest.approx(0.92 - 2.15 / 3)
    assert float(low["behind_low"]) < float(low["behind_best"]) < float(low["behind_high"])
    assert by_cell["c", "low"]["mean"] == ""


def test_latex_escapes_names_and_marks_the_best_and_the_not_worse() -> None:
    text = to_latex(comparison(make(VALUES)))
    assert r"method & a\_b & c & regret \\" in text
    assert r"fedmerge & \textbf{0.920} {\scriptsize$\pm$ 0.020} &" in text
    assert r"x\&y & 0.915 {\scriptsize$\pm$ 0.022}\rlap{$^{\sim}$} & \textbf{0.600}" in text
    row = next(line for line in text.splitlines() if line.startswith("fedmerge"))
    assert row.endswith(r"& 0.100 \\")
    assert next(line for line in text.splitlines() if line.startswith("low")).endswith(
        r"& -- & 0.203 (incomplete) \\"
    )
    assert text.count("{") == text.count("}")
    # The legend is printed, in the signs of the cells.
    note = next(line for line in text.splitlines() if line.startswith(r"\noindent"))
    assert r"Test accuracy, merged model. Mean $\pm$ sample" in note
    assert r"Bold is the best mean; $\sim$ is not significantly worse" in note
    assert "*" not in note
    assert "Regret: the largest loss to the best" in note


def test_latex_breaks_many_settings_into_parts() -> None:
    values = {f"s{i}": {"fedmerge": [0.5, 0.6], "local": [0.4, 0.5]} for i in range(8)}
    text = to_latex(comparison(make(values)))
    heads = [line for line in text.splitlines() if line.startswith("method")]
    assert [head.count("&") for head in heads] == [3, 3, 3]
    assert [("regret" in head) for head in heads] == [False, False, True]
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3


def test_every_sign_that_latex_takes_for_a_command_is_escaped() -> None:
    assert escape(r"50% of a_b & c#1 {x} $y ~z ^w \v <u> |") == (
        r"50\% of a\_b \& c\#1 \{x\} \$y \textasciitilde{}z \textasciicircum{}w "
        r"\textbackslash{}v \textless{}u\textgreater{} \textbar{}"
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, settings=("domain",), methods=("local",), seeds=(0,), rounds=2)
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(StateError, match=r"figures: cannot be written"):
        write_figures(tmp_path)


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"fedmerge\[report\]"):
        write_figures(tmp_path)


@pytest.mark.usefixtures("svg_only")
def test_the_exported_scatter_shows_one_variant_alone(tmp_path: Path) -> None:
    methods = ("fedmerge", "fedmerge:rule=paper", "fedavg")
    write_folder(tmp_path, settings=("domain",), methods=methods, seeds=(0, 1), rounds=2)
    out, _ = write_figures(tmp_path)
    assert "of 64 (clients × seeds)" in (out / "domain-clients.svg").read_text()


def test_latex_marks_what_is_shown_near_the_best() -> None:
    best = [0.900, 0.910, 0.920, 0.930]
    near = [0.898, 0.909, 0.917, 0.928]
    text = to_latex(comparison(make({"s": {"fedmerge": best, "close": near}})))
    assert r"\rlap{$^{=}$}" in text or r"\rlap{$^{\sim=}$}" in text
    assert "$=$ is shown to lose less than 0.01" in text


def test_latex_puts_data_sets_above_their_settings() -> None:
    names = ("digits/a_b", "org/mnist-5k/a_b", "org/mnist-5k/c")
    values = {name: {"fedmerge": [0.5, 0.6], "local": [0.4, 0.5]} for name in names}
    text = to_latex(comparison(make(values)))
    assert r" & \multicolumn{1}{c}{digits} & \multicolumn{2}{c}{org/mnist-5k} &  \\" in text
    assert r"\cmidrule(lr){2-2}\cmidrule(lr){3-4}" in text
    assert r"method & a\_b & a\_b & c & regret \\" in text


def typeset(text: str, folder: Path) -> str:
    """Have LaTeX set a table on a page of an article; return what it says."""
    begin, end = r"\documentclass{article}\usepackage{booktabs}\begin{document}", r"\end{document}"
    (folder / "page.tex").write_text("\n".join((begin, text, end)))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="LaTeX is not installed")
def test_latex_sets_tables_that_fit_its_page(tmp_path: Path) -> None:
    made = ("concept-mix", "concept", "domain", "domain-mix", "cluster", "dirichlet", "latent",
            "latent-mlp", "latent-sample")  # fmt: skip
    scores = {"fedmerge:rule=paper": [0.951, 0.962, 0.951], "x&y": [0.952, 0.961, 0.953]}
    for names in (made, [f"{data}/{name}" for data in ("digits", "mnist-5k-14") for name in made]):
        said = typeset(to_latex(comparison(make(dict.fromkeys(names, scores)))), tmp_path)
        assert "Overfull" not in said
    strange = {r"data/50% of a_b & c#1 {x} $y ~z ^w \v": scores, "c": scores}
    assert "page.pdf (1 page" in typeset(to_latex(comparison(make(strange))), tmp_path)


def test_every_picture_says_of_what_it_is(exported: Path) -> None:
    for kind in ("methods", "curves", "gap", "differences", "clients"):
        assert ">domain, 2 seeds</text>" in (exported / f"domain-{kind}.svg").read_text(), kind
    for kind in ("weights", "map", "worth"):
        text = (exported / f"domain-{kind}.svg").read_text()
        assert ">domain, fedmerge, seed 0</text>" in text, kind
    assert ">domain, seed 0</text>" in (exported / "domain-split.svg").read_text()


def test_the_files_have_the_best_method_first_and_the_map_every_client(exported: Path) -> None:
    text = (exported / "domain-methods.svg").read_text()
    names = [name for name in re.findall(r">([^<>]+)</text>", text) if name in METHODS]
    assert names == ["fedmerge", "fedavg", "local"]
    text = (exported / "domain-map.svg").read_text()
    letters = re.findall(r">([a-e])</text>", text)
    assert len(letters) == 32
    assert {f">{kind}</text>" in text for kind in KINDS["domain"]} == {True}


def test_text_can_be_read_in_a_column_and_pdf_holds_fonts_that_journals_take(
    exported: Path,
) -> None:
    for path in exported.glob("domain-*.svg"):
        text = path.read_text()
        (width,) = re.findall(r'<svg [^>]*width="([\d.]+)pt"', text)
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:bold )?([\d.]+)px", text)]
        scale = 3.3 * 72 / float(width)
        assert max(sizes) * scale >= 6.3, path.name
        # The names of clients are bound to their rows, and the bars of a split to their labels.
        assert min(sizes) * scale >= (3.5 if "split" in path.name else 4.8), path.name
    for path in exported.glob("*.pdf"):
        assert b"/Type3" not in path.read_bytes(), path.name
