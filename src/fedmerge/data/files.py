"""Clients in the user's own files: a folder of .npz, or a table with a client column.

It returns the examples of each client as they are; `from_tensors` splits and checks them.
"""

from __future__ import annotations

import csv
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import DataError, did_you_mean

Tables = dict[str, tuple[NDArray[Any], NDArray[Any]]]
"""Inputs x (n, *features) and targets y (n,) or (n, t) of each client, by its id."""

TABLE_ENDINGS = {".csv": ",", ".tsv": "\t", ".arff": ","}
"""Endings of tables, and what divides their cells."""

MISSING = ("", "?", "na", "nan")
"""Cells, in small letters, that stand for a missing number where one may be missing."""


def load_npz_folder(path: str | Path) -> Tables:
    """Return the clients of a folder: one .npz each, with arrays x and y.

    A client's id is its file's name without the ending. A file that also has an array `client`,
    (n,), holds several clients; their ids are its values. Raises DataError where the folder or
    an array is missing, or a client is in two files.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f'folder "{path}": not found, wanted a folder of .npz files')
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise DataError(f'folder "{path}": no .npz files, wanted one for each client')
    clients: Tables = {}
    origin: dict[str, str] = {}
    for file in files:
        for client, x, y in _npz_clients(file):
            if client in clients:
                raise DataError(
                    f'client "{client}": in "{origin[client]}" and in "{file.name}", wanted in '
                    "one file only; rename or join them"
                )
            clients[client], origin[client] = (x, y), file.name
    return clients


def load_csv(
    path: str | Path,
    client: str = "client",
    target: str = "y",
    *,
    drop: Sequence[str] = (),
    missing: bool = False,
) -> Tables:
    """Return the clients of a table with a header; .csv has commas, .tsv tabs, .arff attributes.

    Column `client` names the client of each row and column `target` has its label or value; all
    other columns but those in `drop` are features and must be numbers, or with `missing` may be
    empty, "?", "NA" or "NaN", which gives NaN. Whole numbers without a point are class
    labels as targets, other numbers are values to predict, and texts become class numbers in their
    sorted order.
    Raises DataError, with row (the header is row 1) and column, for cells that cannot be used.
    """
    columns, rows = _read_table(Path(path))
    for wanted in (client, target, *drop):
        if wanted not in columns:
            how = "" if wanted in drop else f' (or name yours as "table:{path}:client=...:y=...")'
            raise DataError(f'"{path}": no column "{wanted}"{did_you_mean(wanted, columns)}{how}')
    features = [i for i, name in enumerate(columns) if name not in (client, target, *drop)]
    if not features:
        raise DataError(f'"{path}": no feature columns besides "{client}" and "{target}"')
    at_client, at_target = columns.index(client), columns.index(target)
    x = np.array(
        [
            [
                math.nan
                if missing and row[i].strip().lower() in MISSING
                else _number(path, line, columns[i], row[i], drop)
                for i in features
            ]
            for line, row in rows
        ]
    )
    y = _read_targets(path, target, [(line, row[at_target]) for line, row in rows])
    members: dict[str, list[int]] = {}
    for i, (line, row) in enumerate(rows):
        if not row[at_client].strip():
            raise DataError(
                f'"{path}", row {line}, column "{client}": empty, wanted a client; fill it in or '
                "drop the row"
            )
        members.setdefault(row[at_client].strip(), []).append(i)
    return {name: (x[index], y[index]) for name, index in sorted(members.items())}


def _npz_clients(file: Path) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    try:
        # numpy leaves a broken file open when it opens the file itself.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        raise DataError(
            f'"{file}": not readable as .npz arrays of numbers; write it with numpy.savez'
        ) from None
    for wanted in ("x", "y"):
        if wanted not in arrays:
            raise DataError(f'"{file}": no array "{wanted}"{did_you_mean(wanted, arrays)}')
    x, y = arrays["x"], arrays["y"]
    if "client" not in arrays:
        yield file.stem, x, y
        return
    owner = arrays["client"]
    if not x.shape[:1] == y.shape[:1] == owner.shape or owner.ndim != 1:
        raise DataError(
            f'"{file}": x, y and client have shapes {x.shape}, {y.shape} and {owner.shape}, '
            "wanted one client for each example"
        )
    for value in np.unique(owner):
        yield str(value), x[owner == value], y[owner == value]


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header, and each row with its row number in the file."""
    if path.suffix.lower() not in TABLE_ENDINGS:
        raise DataError(f'"{path}": ends in "{path.suffix}", wanted .csv, .tsv or .arff')
    if not path.is_file():
        raise DataError(f'"{path}": no such file')
    arff = path.suffix.lower() == ".arff"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = _arff_header(file) if arff else []
            reader = csv.reader(
                file,
                delimiter=TABLE_ENDINGS[path.suffix.lower()],
                quotechar="'" if arff else '"',
                skipinitialspace=arff,
            )
            before = header[0][0] if arff else 0
            lines = header + [
                (before + reader.line_num, row)
                for row in reader
                if any(cell.strip() for cell in row) and not (arff and row[0].startswith("%"))
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'"{path}": not readable as UTF-8 text ({error}); save it so') from None
    except csv.Error as error:
        raise DataError(
            f'"{path}", row {before + reader.line_num}: not readable as cells ({error}); mend or '
            "drop the row"
        ) from None
    if len(lines) < 2:
        raise DataError(f'"{path}": empty, wanted a header and at least one row')
    columns = [name.strip() for name in lines[0][1]]
    if len(columns) == 1 and (other := re.search(r"[;\t,|]", columns[0])):
        divider = TABLE_ENDINGS[path.suffix.lower()]
        raise DataError(
            f'"{path}": its header has one column, {columns[0]!r}; divide cells by {divider!r} '
            f"instead of {other[0]!r}"
        )
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f'"{path}": two columns "{twice[0]}", wanted one; rename one of them')
    for line, row in lines[1:]:
        if len(row) != len(columns):
            raise DataError(
                f'"{path}", row {line}: {len(row)} cells, wanted {len(columns)} as in the header'
            )
    return columns, lines[1:]


def _arff_header(file: Iterable[str]) -> list[tuple[int, list[str]]]:
    """Read up to the line "@data"; return its number, with the names of the attributes.

    Kinds of attributes are not read: what a column holds is seen from its cells.
    """
    names: list[str] = []
    number = 0
    for line in file:
        number += 1
        word, *rest = line.split(None, 1) or [""]
        if word.lower() == "@attribute":
            name = re.match(r"""\s*(?:"([^"]*)"|'([^']*)'|(\S+))""", "".join(rest))
            names.append(next((part for part in name.groups() if part), "") if name else "")
        if word.lower() == "@data":
            break
    return [(number, names)]


def _number(
    path: str | Path, line: int, column: str, cell: str, drop: Sequence[str] | None = None
) -> float:
    """Return the number in `cell`; drop: columns left out already, None for a target's cell."""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        if drop is None:
            how = ""
        elif cell.strip().lower() in MISSING:
            how = f', or take empty cells for missing values with "table:{path}:standardise=true"'
        else:
            left_out = "+".join((*drop, column))
            how = f', or leave the column out with "table:{path}:drop={left_out}"'
        raise DataError(
            f'"{path}", row {line}, column "{column}": "{cell}", wanted a finite number; mend it '
            f"or drop the row{how}"
        )
    return value


def _read_targets(path: str | Path, column: str, cells: Sequence[tuple[int, str]]) -> NDArray[Any]:
    texts = [cell.strip() for _, cell in cells]
    for line, cell in cells:
        if not cell.strip():
            raise DataError(
                f'"{path}", row {line}, column "{column}": empty, wanted a target; fill it in or '
                "drop the row"
            )
    if not any(_is(float, text) for text in texts):
        names = sorted(set(texts))
        return np.searchsorted(names, texts)
    # One slip in a column of numbers must not turn each number into a class of its own.
    values = [_number(path, line, column, cell) for line, cell in cells]
    written = [_is(int, text) for text in texts]
    if not any(written) or not all(value.is_integer() for value in values):
        return np.array(values)
    if not all(written):
        odd = written.index(False)
        raise DataError(
            f'"{path}", row {cells[odd][0]}, column "{column}": "{texts[odd]}" among whole '
            "numbers; write all without a point for classes, or all with one for values to predict"
        )
    if max(map(abs, values)) >= 2**53:
        return np.array(values)
    if min(values) < 0:
        odd = values.index(min(values))
        raise DataError(
            f'"{path}", row {cells[odd][0]}, column "{column}": label {texts[odd]}, wanted 0 or '
            "more; number the classes from 0, or write all with a point for values to predict"
        )
    return np.array([int(text) for text in texts], dtype=np.int64)


def _is(kind: type[int] | type[float], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True
