"""`python -m benchmarks.standings [NAME=FOLDER ...]`: write docs/results.md from docs/results.

There is a file of results for each comparison that the documentation speaks of, a line for each
run, and every number of the page is computed from it. NAME=FOLDER takes the file's lines from the
folder of a finished comparison first, given twice for a name from both; NAME+=FOLDER adds them to
those that are there, in place of the same runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .page import COMPARISONS, page
from .standing import Result, Standing, read, read_folder, write

DOCS = Path(__file__).resolve().parents[2] / "docs"


def main(line: Sequence[str] | None = None, docs: Path = DOCS) -> None:
    """Take in what is given, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.standings", description=__doc__)
    parser.add_argument(
        "taken",
        nargs="*",
        metavar="NAME=FOLDER",
        help=f"{'=, '.join(COMPARISONS)}=FOLDER, or {next(iter(COMPARISONS))}+=FOLDER",
    )
    given = parser.parse_args(line)
    taken: dict[str, list[Result]] = {}
    for pair in given.taken:
        name, _, folder = pair.partition("=")
        kept = docs / "results" / f"{name.removesuffix('+')}.csv"
        if kept.stem not in COMPARISONS or not (Path(folder) / "results.jsonl").is_file():
            names = " or ".join(COMPARISONS)
            parser.error(f'"{pair}": wanted {names}, "=" or "+=" and a finished folder')
        there = read(kept) if name.endswith("+") and kept.is_file() else ()
        try:
            taken.setdefault(kept.stem, list(there)).extend(read_folder(Path(folder)))
        except ValueError as error:
            parser.error(str(error))
    standings = {}
    for name, runs in taken.items():  # all is looked at before a file is touched
        try:
            standings[name] = Standing(runs)
        except ValueError as error:
            parser.error(f"{name}: {error}")
    for name, standing in standings.items():
        write(standing.results(), docs / "results" / f"{name}.csv")
    found = {name: docs / "results" / f"{name}.csv" for name in COMPARISONS}
    held = {name: Standing(read(file)) for name, file in found.items() if file.is_file()}
    (docs / "results.md").write_text(page(held), encoding="utf-8")


if __name__ == "__main__":
    main()
