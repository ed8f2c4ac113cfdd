"""Motion of a person's watch or phone, one client for each person.

It reads the files and makes features of them; scaling and splitting are done elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.data.files import load_csv
from fedmerge.data.images import package_file
from fedmerge.data.natural import gather
from fedmerge.data.sources import Dataset, owned
from fedmerge.errors import ConfigError, DataError

Array = NDArray[np.float64]


def load_watch(window: int = 100) -> Dataset:
    """Return shoulder exercises seen by a smart-watch, one client for each of 10 subjects.

    window: samples of a window, at 50 a second; windows do not overlap, and what is left at the
    end of a recording is not used. With 100: x (2369, 36), 7 exercises. The 36 features are, for
    each of 6 axes (acceleration in g, turning in rad/s), mean, standard deviation, least,
    greatest, mean absolute step and mean crossings of the mean, without their names. Each subject
    did each exercise with both arms. From seglearn's file (Burns et al., arXiv 1802.01489), which
    is read without importing seglearn. Raises MissingExtraError without it.
    """
    if not 4 <= window <= 900:
        raise ConfigError(f"window: {window}, wanted 4 to 900 samples")
    # A dictionary, so numpy keeps it as a pickle; it is the installed package's own file.
    path = package_file("seglearn", "data/watch_dataset.npy")
    stored: dict[str, Any] = np.load(path, allow_pickle=True).item()
    x, y, owner = [], [], []
    for series, exercise, subject in zip(stored["X"], stored["y"], stored["subject"], strict=True):
        n = len(series) // window
        x.append(window_features(series[: n * window].reshape(n, window, -1)))
        y += [int(exercise)] * n
        owner += [f"subject {int(subject):02d}"] * n
    labels = np.asarray(y, dtype=np.int64)
    return owned("watch", np.concatenate(x), labels, owner, 7, standardise=True)


def window_features(windows: Array) -> Array:
    """Return (n, 6 * channels) features of windows (n, samples, channels); see `load_watch`."""
    centred = windows - windows.mean(axis=1, keepdims=True)
    crossings = (np.diff(centred > 0, axis=1)).mean(axis=1)
    parts = (
        windows.mean(axis=1),
        windows.std(axis=1),
        windows.min(axis=1),
        windows.max(axis=1),
        np.abs(np.diff(windows, axis=1)).mean(axis=1),
        crossings,
    )
    return np.concatenate(parts, axis=1)


def load_wisdm(path: str) -> Dataset:
    """Return activities seen by a phone, one client for each user: WISDM v1.1, transformed.

    path: WISDM_ar_v1.1_transformed.arff, or a .csv with its columns: user, class, UNIQUE_ID and
    43 features, of which some are missing. x (5418, 43), 6 activities, 36 users.
    """
    if Path(path).suffix.lower() == ".txt":
        raise DataError(
            f'"{path}": WISDM\'s raw signals, wanted their features; give the file '
            "WISDM_ar_v1.1_transformed.arff, which comes with it"
        )
    tables = load_csv(path, client="user", target="class", drop=("UNIQUE_ID",), missing=True)
    return gather(tables, "wisdm", standardise=True)


def load_table(
    path: str,
    client: str = "client",
    y: str = "y",
    drop: str = "",
    standardise: bool = False,
) -> Dataset:
    """Return a table of the user's own with the names of its columns.

    drop: columns that are no features, divided by "+". With `standardise`, features are scaled
    and missing ones filled in, by training examples. See `load_csv`.
    """
    left_out = tuple(drop.split("+")) if drop else ()
    tables = load_csv(path, client=client, target=y, drop=left_out, missing=standardise)
    return gather(tables, Path(path).stem, standardise=standardise)
