"""Pictures and tables as files: complete, equal for equal runs, and escaped for their readers."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest

from fedmerge.errors import MissingExtraError, StateError
from fedmerge.report.export import escape, to_csv, to_latex, write_figures
from fedmerge.report.ranking import comparison
from report_fixture import write_folder
from test_report_tables import make

VALUES = {
    "a_b": {"fedmerge": [0.90, 0.92, 0.94], "x&y": [0.89, 0.93, 0.925], "low": [0.7, 0.71, 0.74]},
    "c": {"fedmerge": [0.5, 0.5, 0.5], "x&y": [0.6, 0.6, 0.6]},
}


def test_every_picture_comes_in_three_forms_and_repeats_to_the_byte(tmp_path: Path) -> None:
    write_folder(
        tmp_path, settings=("domain",), methods=("fedmerge", "fedavg"), seeds=(0, 1), rounds=4
    )
    out, written = write_figures(tmp_path)
    kinds = ("methods", "curves", "gap", "differences", "clients", "weights", "worth")
    stems = [f"domain-{kind}" for kind in kinds] + ["regret-accuracy", "ranks"]
    wanted = {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg", "pdf")}
    wanted |= {f"table-accuracy.{ending}" for ending in ("csv", "md", "tex")}
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(first) == wanted
    assert written == len(wanted)
    heads = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for name, data in first.items():
        assert data.startswith(heads.get(name.rsplit(".")[-1], b"")), name
    write_figures(tmp_path)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


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
    assert r"method & a\_b & c & largest regret \\" in text
    assert r"fedmerge & \textbf{0.920} {\scriptsize$\pm$ 0.020} &" in text
    assert r"x\&y & 0.915 {\scriptsize$\pm$ 0.022}\rlap{$^{\sim}$} & \textbf{0.600}" in text
    row = next(line for line in text.splitlines() if line.startswith("fedmerge"))
    assert row.endswith(r"& 0.100 \\")
    assert next(line for line in text.splitlines() if line.startswith("low")).endswith(
        r"& -- & 0.203 (incomplete) \\"
    )
    assert text.count("{") == text.count("}")


def test_latex_breaks_many_settings_into_parts() -> None:
    values = {f"s{i}": {"fedmerge": [0.5, 0.6], "local": [0.4, 0.5]} for i in range(8)}
    text = to_latex(comparison(make(values)))
    heads = [line for line in text.splitlines() if line.startswith("method")]
    assert [head.count("&") for head in heads] == [6, 3]
    assert [("regret" in head) for head in heads] == [False, True]
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2


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


def test_the_exported_scatter_shows_one_variant_alone(tmp_path: Path) -> None:
    methods = ("fedmerge", "fedmerge:rule=paper", "fedavg")
    write_folder(tmp_path, settings=("domain",), methods=methods, seeds=(0, 1), rounds=2)
    out, _ = write_figures(tmp_path)
    assert "of 64 (clients × seeds)" in (out / "domain-clients.svg").read_text()
