"""Files of a results folder as plain values, each fault of one told in a line that says what to do.

It knows JSON, Parquet and NumPy files; what their keys mean is the matter of `runs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.compare.folder import FORMAT
from fedmerge.errors import StateError

AGAIN = "delete its run folder and run it again"
ANEW = "remove it, and `fedmerge report` writes it anew from the runs"
TUNE = "remove it, and give the command of the comparison again"
ADVICE = {
    "results.jsonl": ANEW,
    "clients.parquet": ANEW,
    "comparison.json": "`fedmerge compare` with the options that made it says how to mend it",
}
"""What to do about a file that is damaged, by its name."""


def check_format(folder: Path) -> dict[str, Any]:
    """Return the facts of the comparison in `folder`; empty for the folder of a lone run.

    Raises StateError if it holds no finished run, or was written by another version.
    """
    path = folder / "comparison.json"
    if path.is_file():
        facts = read_object(path)
        found = facts.get("format")
        if found != FORMAT:
            raise StateError(
                f"{folder}: its results have format {found!r}, wanted {FORMAT}; use the version of "
                "fedmerge that wrote them, or run `fedmerge compare` with a new --out"
            )
        return facts
    if (folder / "result.json").is_file():
        return {}
    if next(folder.glob("runs/*/result.json"), None) is not None:
        raise StateError(
            f"{folder}: no comparison.json beside its runs, so another version of fedmerge wrote "
            "them, or it is lost; run `fedmerge compare` with a new --out, or with the options "
            "that made them, to be told how to mend it"
        )
    raise no_run(folder)


def no_run(folder: Path) -> StateError:
    """The error for a folder without a finished run."""
    if (folder / "status.json").is_file():
        return StateError(
            f"{folder}: the server has evaluated no round yet; wait for the end of the next one, "
            "and if fedmerge.evaluate_every is 0, set it"
        )
    return StateError(
        f"{folder}: no finished run (no result.json in it, nor in its runs/*/); "
        "run `fedmerge compare --out` with this folder first"
    )


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that `path` holds."""
    return _parse(read_text(path), path)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of each line of `path`."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        yield number, _parse(line, path, number)


def read_text(path: Path) -> str:
    """Return the text of `path`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(_fault(path, f"cannot be read ({type(error).__name__})")) from error


def read_columns(path: Path) -> dict[str, list[Any]]:
    """Return the columns of a Parquet file as lists; {} where there is no such file."""
    if not path.is_file():
        return {}
    import pyarrow
    from pyarrow import parquet

    try:
        columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        raise StateError(_fault(path, f"cannot be read ({type(error).__name__})")) from error
    return columns


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file by name; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise StateError(_fault(path, f"cannot be read ({type(error).__name__})")) from error


def number(value: Any) -> float | None:
    """A float, or None for null; a number that is not finite (a diverged run) stays as it is."""
    return None if value is None else float(value)


def wrong_form(path: Path, error: Exception, line: int | None = None) -> StateError:
    """The error for a file that can be read and does not hold what it should."""
    what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
    what = " ".join(what.split())
    return StateError(_fault(path, f"not of the form that fedmerge writes ({what})", line))


def _fault(path: Path, what: str, line: int | None = None) -> str:
    """What is the matter with `path`, and what to do."""
    place = str(path) if line is None else f"{path}, line {line}"
    choice = path.parent.name == "tuning"
    return f"{place}: {what}; {TUNE if choice else ADVICE.get(path.name, AGAIN)}"


def _parse(text: str, path: Path, line: int | None = None) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno if line is None else line}, column {error.colno}"
        raise StateError(_fault(path, f"not valid JSON at {where} ({error.msg})")) from error
    if not isinstance(value, dict):
        raise wrong_form(path, TypeError(f"got a {type(value).__name__}, wanted an object"), line)
    return value
