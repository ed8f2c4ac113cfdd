"""Data sets of the Hugging Face hub, or on disk in that library's format, by column names.

It loads and converts; which columns a well-known data set has is said in `catalog`. Without
network, only what is cached or on disk can be loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.data.quiet import quiet
from fedmerge.data.sources import Dataset, owned
from fedmerge.data.splits import count_classes
from fedmerge.data.text import embedded, hashed_words
from fedmerge.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset as Table

SAVED = ("dataset_dict.json", "state.json")
"""Files of which a folder written by `save_to_disk` has one."""

DEEP = ("I;16", "I;16L", "I;16B")
"""Pillow's modes of grey images with 16 bits a pixel."""


def load_hub(
    path: str,
    x: str = "image",
    y: str = "label",
    client: str | None = None,
    config: str | None = None,
    split: str | None = None,
    clients: int | None = None,
    size: int | None = None,
    features: int = 2048,
    model: str | None = None,
    standardise: bool = False,
) -> Dataset:
    """Return the data set `path` of the hub, or of a folder.

    The folder is one written by `save_to_disk`, or has parquet files as the hub keeps them.
    x: column of images, texts, or rows of numbers, or several columns of single numbers divided
    by "+". y: column of labels or values. client: column that names each example's client, or
    None. config, split: the hub's names; without a split, all are put together. clients: keep the
    examples of this many clients, the first in sorted order. size: side of the square that images
    are resized to, in pixels; without it all must have one size. features, model: for texts, see
    `text`. standardise: for numbers, see `scaling`. Images become (channels, height, width) in
    [0, 1], in colour only if the first one is. Whole numbers are class labels, names become class
    numbers in sorted order, other numbers are values to predict. Raises MissingExtraError without
    the extra "data", and DataError for what cannot be fetched, found or used.
    """
    with quiet():
        table = _table(path, config, split)
        columns = x.split("+")
        for wanted in (*columns, y, *([] if client is None else [client])):
            if wanted not in table.column_names:
                raise DataError(
                    f'data "{path}": no column "{wanted}"{did_you_mean(wanted, table.column_names)}'
                )
        if not len(table):
            raise DataError(f'data "{path}": no examples, wanted some; check its splits')
        for column in (*columns, *([] if client is None else [client])):
            if column == client or not _is_number(table.features[column]):
                _need_all(path, table, column)
        owner = None if client is None else [str(name) for name in table[client]]
        if clients is not None:
            table, owner = _first_clients(path, table, owner, clients)
        inputs = _inputs(path, table, columns, size, features, model)
        labels, n_outputs = _targets(path, table, y)
    name = Path(path).name
    if owner is None:
        tensors = torch.from_numpy(inputs), torch.from_numpy(labels)
        return Dataset(name, *tensors, n_outputs, standardise=standardise)
    return owned(name, inputs, labels, owner, n_outputs, standardise=standardise)


def _table(path: str, config: str | None, split: str | None) -> Table:
    import datasets

    saved = any((Path(path) / name).exists() for name in SAVED)
    if saved and config is not None:
        raise ConfigError(
            f'data "{path}": config "{config}", but a saved set has one; leave it out'
        )
    named = path.isidentifier() and not Path(path).is_dir()
    # The name of a format would take whatever files there are in the current folder.
    if named and importlib.util.find_spec(f"datasets.packaged_modules.{path}") is not None:
        raise DataError(
            f'data "{path}": a format, no data set; give the folder of the files, or a name on the '
            "Hugging Face hub"
        )
    try:
        loaded = (
            datasets.load_from_disk(path) if saved else datasets.load_dataset(path, name=config)
        )
    except ConnectionError:
        call = ", ".join(f"'{part}'" for part in (path, config) if part is not None)
        raise DataError(
            f'data "{path}": no such folder, and the Hugging Face hub cannot be reached; where it '
            f'can, save it by python -c "import datasets; datasets.load_dataset({call})'
            ".save_to_disk('FOLDER')\", and give the folder as the option path=FOLDER"
        ) from None
    except IndexError:  # Their own reader's, for a saved set without any example.
        raise DataError(f'data "{path}": no examples, wanted some') from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = " ".join(str(error).split())
        raise DataError(
            f'data "{path}": cannot be loaded ({what}); give a name on the Hugging Face hub, or a '
            "folder written by save_to_disk or of parquet files"
        ) from None
    if not isinstance(loaded, datasets.DatasetDict):
        if split is not None:
            raise ConfigError(f'data "{path}": split "{split}", but it has no splits; leave it out')
        return loaded
    if split is None:
        try:
            return datasets.concatenate_datasets(list(loaded.values()))
        except ValueError:
            raise DataError(
                f'data "{path}": its splits have columns of different types; choose one of '
                f"{', '.join(loaded)} with the option split"
            ) from None
    if split not in loaded:
        raise ConfigError(f'data "{path}": no split "{split}"{did_you_mean(split, loaded)}')
    return loaded[split]


def _is_number(feature: object) -> bool:
    """Whether a column has one number an example, where a missing one can be filled in."""
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.startswith(("int", "uint", "float", "bool"))


def _need_all(path: str, table: Table, column: str) -> None:
    """Raise DataError where an example has nothing in `column`."""
    at = table.data.column(column).is_null().index(True).as_py()
    if at >= 0:
        raise DataError(
            f'data "{path}", column "{column}": example {at} has none, wanted one in each; fill it '
            "in, or leave such examples out with the filter method of datasets"
        )


def _first_clients(
    path: str, table: Table, owner: list[str] | None, clients: int
) -> tuple[Table, list[str]]:
    if owner is None:
        raise ConfigError(f'data "{path}": clients = {clients} needs the column of clients, client')
    names = np.unique(owner)
    if not 1 <= clients <= len(names):
        raise ConfigError(f'data "{path}": clients = {clients}, wanted 1 to {len(names)}')
    kept = np.flatnonzero(np.isin(owner, names[:clients]))
    return table.select(kept), [owner[i] for i in kept]


def _inputs(
    path: str,
    table: Table,
    columns: list[str],
    size: int | None,
    features: int,
    model: str | None,
) -> NDArray[np.float32]:
    import datasets

    kinds = [table.features[column] for column in columns]
    if len(columns) == 1 and isinstance(kinds[0], datasets.Image):
        return _images(path, table, columns[0], size)
    texts = isinstance(kinds[0], datasets.Value) and kinds[0].dtype in ("string", "large_string")
    if len(columns) == 1 and texts:
        words = list(table[columns[0]])
        return hashed_words(words, features) if model is None else embedded(words, model)
    arrays = [np.asarray(table.with_format("numpy")[column][:]) for column in columns]
    try:
        array = np.stack(arrays, axis=1) if len(columns) > 1 else arrays[0]
        whole = array.dtype == np.uint8 and array.ndim > 2
        array = array.astype(np.float32) / (np.float32(255) if whole else np.float32(1))
    except (ValueError, TypeError):
        raise DataError(
            f'data "{path}", column "{"+".join(columns)}": rows of unequal length, or no numbers; '
            "wanted images, texts, or rows of numbers of one length"
        ) from None
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim == 3:
        return array[:, None]
    channels_last = array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] > 3
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if channels_last else array


def _images(path: str, table: Table, column: str, size: int | None) -> NDArray[np.float32]:
    where = f'data "{path}", column "{column}"'
    images = _decoded(where, table[column])
    first = next(images)
    deep = first.mode in DEEP
    grey = deep or first.mode in ("1", "L", "LA")
    shape = (size, size) if size is not None else first.size
    # Filled row by row: a list of images beside the array would need the memory twice.
    channels = () if grey else (3,)
    pixels = np.empty((len(table), shape[1], shape[0], *channels), np.uint16 if deep else np.uint8)
    for i, image in enumerate(chain([first], images)):
        if image.mode in ("I", "F") or (image.mode in DEEP) != deep:
            raise DataError(
                f"{where}: images of mode {first.mode} and, in example {i}, {image.mode}, wanted "
                "all of 8 bits or all of 16 bits a pixel; convert them"
            )
        if size is not None:
            image = image.resize(shape)
        elif image.size != shape:
            raise DataError(
                f"{where}: images of {shape} and of {image.size} pixels, "
                "wanted one size; give the option size, for example size=32"
            )
        # Converting 16 bits to 8 would cut off all above 255.
        pixels[i] = np.asarray(image if deep else image.convert("L" if grey else "RGB"))
    placed = pixels[:, None] if grey else np.moveaxis(pixels, -1, 1)
    return np.divide(placed, np.float32(np.iinfo(pixels.dtype).max), dtype=np.float32)


def _decoded(where: str, column: Collection[Any]) -> Iterator[Any]:
    images = iter(column)
    for i in range(len(column)):
        try:
            yield next(images)
        except (OSError, SyntaxError):  # Pillow's, for content that it cannot read.
            raise DataError(
                f"{where}: the image of example {i} cannot be read; mend it, or drop the example"
            ) from None


def _targets(path: str, table: Table, column: str) -> tuple[NDArray[Any], int]:
    import datasets

    feature = table.features[column]
    values = np.asarray(table[column][:])
    if values.ndim == 1 and values.dtype.kind in "US":
        names, labels = np.unique(values, return_inverse=True)
        return labels.astype(np.int64), len(names)
    if values.ndim == 1 and values.dtype.kind in "iub":
        if values.dtype.kind == "i" and values.min() < 0:
            raise DataError(f'data "{path}", column "{column}": label {values.min()}, wanted 0 up')
        if isinstance(feature, datasets.ClassLabel):
            return values.astype(np.int64), feature.num_classes
        return values.astype(np.int64), count_classes(int(values.max()), len(values))
    if values.ndim in (1, 2) and values.dtype.kind == "f":
        targets = values.astype(np.float32).reshape(len(values), -1)
        return targets, targets.shape[1]
    raise DataError(
        f'data "{path}", column "{column}": wanted labels, names or numbers, all of them there'
    )
