"""Short texts with a label or a rating, by domain, as numbers that a small network can take.

Words are hashed, or a sentence model that stays frozen embeds them; no model is trained here, and
none is downloaded unless its name asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.data.quiet import quiet
from fedmerge.data.sources import Dataset, owned
from fedmerge.errors import ConfigError, DataError, MissingExtraError, did_you_mean

LEAST_RATING = 0.5
"""Ratings nearer to 0 than this are neither good nor bad, and left out."""

STRETCH = 10.0
"""Length of a vector of hashed words; from length 1 a network learns at no usual rate."""

LONGEST = 128
"""Tokens of a text that a sentence model reads."""

CLIENT_COLUMNS = ("client", "domain")
"""Columns that name a text's client unless another one is asked for; the first one found is it."""

Row = tuple[str, str, str | None]
"""Text, label or rating, and client where it is known."""


def load_text(
    path: str, features: int = 2048, model: str | None = None, client: str | None = None
) -> Dataset:
    """Return the texts of a .tsv or .txt file, or of all in a folder, as inputs.

    Cells are divided by tabs. With a header, columns `text` and `label` or `rating` are read;
    without, a row's last cell is the text and the one before it the rating. The header's column
    `client` names each text's client, None standing for one called "client" or "domain"; without
    such a column, each file of a folder is a client. A rating above 0 is label 1, below it 0, and
    one nearer to 0 than 0.5 is left out; labels become class numbers in sorted order.
    features: length of the vector of hashed words. model: path or name of a sentence model for
    `transformers`, used instead. Raises DataError for files that cannot be used.
    """
    place = Path(path)
    files = sorted(p for p in place.glob("*") if _is_table(p)) if place.is_dir() else [place]
    if not files:
        raise DataError(f'folder "{path}": no .tsv or .txt files, wanted one for each client')
    rows: list[Row] = []
    rated = set()
    for file in files:
        found, has_ratings = _read(file, client, file.stem if place.is_dir() else None)
        rows += found
        if found:
            rated.add(has_ratings)
    if not rows:
        raise DataError(
            f'"{path}": no texts with a tab between rating and text, or all ratings are nearer '
            f"to 0 than {LEAST_RATING}"
        )
    if len(rated) > 1:
        raise DataError(f'"{path}": some files have labels, others ratings; wanted one of them')
    texts, targets, owner = zip(*rows, strict=True)
    classes = ["0", "1"] if rated == {True} else sorted(set(targets))
    y = np.searchsorted(classes, targets).astype(np.int64)
    x = hashed_words(texts, features) if model is None else embedded(texts, model)
    if owner[0] is None:
        return Dataset(place.stem, torch.from_numpy(x), torch.from_numpy(y), len(classes))
    return owned(place.stem, x, y, owner, len(classes))


def hashed_words(texts: Sequence[str], features: int) -> NDArray[np.float32]:
    """Return (n, features): signed counts of words, hashed, in vectors of length `STRETCH`."""
    from sklearn.feature_extraction.text import HashingVectorizer

    if features < 2:
        raise ConfigError(f"features: {features}, wanted at least 2")
    hashing = HashingVectorizer(n_features=features, dtype=np.float32)
    counts: NDArray[np.float32] = hashing.transform(texts).toarray()
    return counts * np.float32(STRETCH)


def embedded(texts: Sequence[str], model: str, batch: int = 64) -> NDArray[np.float32]:
    """Return (n, width) embeddings by a frozen sentence model: the mean over a text's tokens.

    They are scaled to a mean square of 1 for each text. model: folder, or name on the hub. Raises
    MissingExtraError without transformers, DataError where the model cannot be loaded.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise MissingExtraError("text") from None
    try:
        with quiet("transformers"):
            tokenizer = AutoTokenizer.from_pretrained(model)
            network = AutoModel.from_pretrained(model).eval()
    except (OSError, ValueError):
        raise DataError(
            f'model "{model}": cannot be loaded; give the folder of a model that transformers has '
            "saved, or a name on the hub where that can be reached"
        ) from None
    # Texts of like length in one batch need the least filling up.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts: dict[int, NDArray[np.float32]] = {}
    for start in range(0, len(order), batch):
        index = order[start : start + batch]
        tokens = tokenizer(
            [texts[i] for i in index],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )
        with torch.inference_mode():
            states = network(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None].to(states.dtype)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        means = means / means.square().mean(dim=1, keepdim=True).sqrt()
        parts.update(zip(index, means.float().numpy(), strict=True))
    return np.stack([parts[i] for i in range(len(texts))])


def _is_table(path: Path) -> bool:
    hidden = path.name.startswith((".", "_"))
    return path.suffix.lower() in (".tsv", ".txt") and path.is_file() and not hidden


def _read(path: Path, client: str | None, usual: str | None) -> tuple[list[Row], bool]:
    """Return the rows of a file that can be used, and whether they had ratings.

    client: the column of clients, or None for the usual ones. usual: the client without one.
    """
    try:
        # Quotes are part of a text, and a text may be long: this is not csv's format.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; give a .tsv or .txt file, or a "
            "folder of them"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f'"{path}": not readable as UTF-8 text ({error}); save it so') from None
    table = [(i, line.split("\t")) for i, line in enumerate(lines, start=1) if line.strip()]
    header = _header(path, table[0][1] if table else [], client)
    at = {name: i for i, name in enumerate(header or ())} or {"text": -1, "rating": -2}
    owner = next(
        (name for name in (CLIENT_COLUMNS if client is None else (client,)) if name in at), None
    )
    has_ratings = "label" not in at
    rows: list[Row] = []
    for number, cells in table[header is not None :]:
        if header is None and len(cells) < 2:
            continue  # A licence or a note, which has no tabs.
        if header is not None and len(cells) != len(header):
            raise DataError(
                f'"{path}", row {number}: {len(cells)} cells, wanted {len(header)} as in the header'
            )
        name = usual if owner is None else cells[at[owner]].strip()
        target = cells[at["rating" if has_ratings else "label"]].strip()
        if has_ratings:
            rating = _rating(path, number, target)
            if abs(rating) < LEAST_RATING:
                continue
            target = str(int(rating > 0))
        if not target or name == "":
            raise DataError(f'"{path}", row {number}: no label or client, wanted both')
        rows.append((cells[at["text"]], target, name))
    return rows, has_ratings


def _header(path: Path, cells: list[str], client: str | None) -> list[str] | None:
    """Return the names of the columns, or None where the first row is no header."""
    names = [cell.strip() for cell in cells]
    if not {"text", "rating", "label"} & {name.lower() for name in names}:
        if client is not None:
            raise DataError(f'"{path}": no header, wanted one with the column "{client}"')
        return None
    wanted = ["text", *([] if client is None else [client])]
    for name in wanted:
        if name not in names:
            raise DataError(f'"{path}": no column "{name}"{did_you_mean(name, names)}')
    if not {"rating", "label"} & set(names):
        raise DataError(f'"{path}": no column "rating" or "label"{did_you_mean("label", names)}')
    return names


def _rating(path: Path, number: int, cell: str) -> float:
    try:
        rating = float(cell)
    except ValueError:
        rating = float("nan")
    if not np.isfinite(rating):
        raise DataError(
            f'"{path}", row {number}: rating "{cell}", wanted a finite number, or a first row that '
            "names the columns text and label or rating"
        )
    return rating
