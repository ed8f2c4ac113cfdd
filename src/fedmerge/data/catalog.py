"""All data sets by name, and how a text such as "pacs:path=FOLDER:size=64" is turned into one.

It holds no loader itself. What it has loaded it keeps, as a comparison asks for the same data
hundreds of times; a changed file is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from fedmerge.data.files import TABLE_ENDINGS, load_csv, load_npz_folder
from fedmerge.data.hospitals import load_heart
from fedmerge.data.hub import load_hub
from fedmerge.data.images import load_fashion_mnist, load_mnist_5k
from fedmerge.data.natural import gather, stored_dataset
from fedmerge.data.options import PATH, convert, parse
from fedmerge.data.sensors import load_table, load_watch, load_wisdm
from fedmerge.data.sources import Dataset, load_diabetes, load_digits, load_gaussian
from fedmerge.data.text import load_text
from fedmerge.errors import DataError, did_you_mean

NATURAL_SOURCES: dict[str, Callable[..., Dataset]] = {
    "diabetes": load_diabetes,
    "femnist": load_hub,
    "heart": load_heart,
    "pacs": load_hub,
    "text": load_text,
    "watch": load_watch,
    "wisdm": load_wisdm,
}
"""Data sets that have clients of their own."""

SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": load_digits,
    "gaussian": load_gaussian,
    "mnist-5k": load_mnist_5k,
    "mnist-5k-14": partial(load_mnist_5k, pool=2),
    "fashion-mnist": load_fashion_mnist,
    "cifar100": load_hub,
    "hub": load_hub,
    "table": load_table,
    **NATURAL_SOURCES,
}
"""Every name, and the function that loads it with the options that may follow the name."""

USUAL: dict[str, dict[str, str]] = {
    "cifar100": {PATH: "uoft-cs/cifar100", "x": "img", "y": "fine_label"},
    "pacs": {PATH: "flwrlabs/pacs", "client": "domain", "size": "64"},
    "femnist": {
        PATH: "flwrlabs/femnist",
        "y": "character",
        "client": "writer_id",
        "clients": "100",
    },
}
"""Options that a data set has unless others are given: place on the hub, columns, size."""

OWN_CLIENTS = ("hub", "table")
"""Names that may or may not bring clients along; so may a path."""


def fits(data: str, natural: bool) -> bool:
    """Return whether `data` is meant for clients of its own (`natural`), or for made ones.

    It is a matter of sense, not of possibility: examples of natural clients can be pooled, too.
    Data of the user's own is meant for both.
    """
    name = data.partition(":")[0]
    if name not in SOURCES or name in OWN_CLIENTS:
        return True
    return natural == (name in NATURAL_SOURCES)


def load_source(text: str) -> Dataset:
    """Return the data set that `text` names, or the one in the user's own files at that path.

    Raises ConfigError for an unknown option, MissingExtraError where a package is missing, and
    DataError for an unknown name or data that cannot be used.
    """
    name, options = parse(text, "data") if text.partition(":")[0] in SOURCES else ("", {})
    stamp = _stamp(Path(options.get(PATH, "") if name else text))
    return _load(text, stamp)


@lru_cache(maxsize=4)
def _load(text: str, stamp: object) -> Dataset:
    if text.partition(":")[0] not in SOURCES:
        return _own_files(text)
    name, options = parse(text, "data")
    function = SOURCES[name]
    options = {**USUAL.get(name, {}), **options}
    values = convert(text, "data", function, options)
    return function(**values)


def _own_files(data: str) -> Dataset:
    path = Path(data)
    if path.suffix.lower() in TABLE_ENDINGS and not path.is_dir():
        return gather(load_csv(path), path.stem)
    if (path / "x.npy").exists():
        return stored_dataset(path)
    if path.is_dir():
        return gather(load_npz_folder(path), path.stem)
    raise DataError(
        f'data "{data}": neither a built-in data set nor the path of a folder, .csv, .tsv or '
        f".arff{did_you_mean(data, SOURCES)}"
    )


def _stamp(path: Path) -> object:
    """Return what changes when the file, or a file in the folder, is written anew."""
    if path == Path():
        return None
    try:
        files = [path, *(sorted(path.iterdir()) if path.is_dir() else ())]
        return tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in files)
    except OSError:
        return None
