"""Data sets to make clients from: `Dataset`, and those that need nothing but scikit-learn.

It does not divide examples over clients; `catalog` has all data sets by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.data.clients import Task
from fedmerge.data.draws import generator
from fedmerge.data.stored import Inputs, Stored
from fedmerge.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples that are not yet divided over clients.

    x: (n, *features) float32, in memory or in a file; images are (n, channels, height, width).
    y: (n,) int64 class labels in 0..n_outputs-1, or (n, n_outputs) float32 targets.
    owner: (n,) int64, the natural client of each example as a place in `owners`, or None.
    standardise: features are to be scaled, and missing values (NaN) filled in, by the training
    examples' statistics once these are known; see `scaling`. x is (n, features) then.
    Raises DataError where x, y and owner do not fit each other.
    """

    name: str
    x: Inputs
    y: Tensor
    n_outputs: int
    owner: Tensor | None = None
    owners: tuple[str, ...] = ()
    standardise: bool = False

    def __post_init__(self) -> None:
        wanted: tuple[int, ...] = (len(self.x),)
        if self.task == "regression":
            wanted = (len(self.x), self.n_outputs)
        if tuple(self.y.shape) != wanted:
            raise DataError(
                f'data set "{self.name}": targets of shape {tuple(self.y.shape)}, wanted {wanted}'
            )
        if self.owner is not None and tuple(self.owner.shape) != (len(self.x),):
            raise DataError(
                f'data set "{self.name}": clients of shape {tuple(self.owner.shape)}, wanted '
                f"{(len(self.x),)}"
            )
        if self.standardise and len(self.x.shape) != 2:
            raise DataError(
                f'data set "{self.name}": inputs of shape {tuple(self.x.shape[1:])}, but only '
                "tables can be standardised; leave standardise out"
            )

    @property
    def is_image(self) -> bool:
        """Whether x is (n, channels, height, width)."""
        return len(self.x.shape) == 4

    @property
    def task(self) -> Task:
        """Regression where the targets are floats."""
        return "regression" if self.y.is_floating_point() else "classification"

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def whole(self) -> Tensor:
        """Return x in memory."""
        return self.x.read() if isinstance(self.x, Stored) else self.x


def load_digits() -> Dataset:
    """Return scikit-learn's handwritten digits: x (1797, 1, 8, 8) in [0, 1], 10 classes."""
    from sklearn import datasets  # Here, because importing it takes a second.

    pixels, labels = datasets.load_digits(return_X_y=True)
    x = torch.from_numpy((pixels / 16.0).astype(np.float32)).reshape(-1, 1, 8, 8)
    return Dataset("digits", x, torch.from_numpy(labels.astype(np.int64)), 10)


def load_gaussian(n: int = 4000, features: int = 20, seed: int = 0) -> Dataset:
    """Return x (n, features) standard normal, labelled by one linear teacher of 10 classes.

    The teacher's weights have unit length for every class, so the classes are near equal in
    size. Raises ConfigError where `n` or `features` is below 1.
    """
    if n < 1 or features < 1:
        raise ConfigError(f"gaussian: n {n} and features {features}, wanted at least 1 of each")
    draws = generator(seed, "gaussian")
    x = draws.standard_normal((n, features))
    teacher = draws.standard_normal((features, 10))
    labels = (x @ (teacher / np.linalg.norm(teacher, axis=0))).argmax(axis=1)
    return Dataset("gaussian", torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels), 10)


def load_diabetes() -> Dataset:
    """Return scikit-learn's diabetes study: 442 patients, disease progression in a year.

    x (442, 10): age, sex, body mass index, blood pressure, six blood values. Eight natural
    clients: women and men (the study does not say which code is which) in four age bands of
    near-equal size. Regression; to be standardised.
    """
    from sklearn import datasets

    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)
    band = np.searchsorted(np.quantile(x[:, 0], (0.25, 0.5, 0.75)), x[:, 0])
    ages = ("youngest", "younger", "older", "oldest")
    owner = [f"sex {int(sex)} {ages[b]}" for sex, b in zip(x[:, 1], band, strict=True)]
    return owned("diabetes", x, y[:, None].astype(np.float32), owner, 1, standardise=True)


def owned(
    name: str,
    x: NDArray[np.floating],
    y: NDArray[np.generic],
    owner: Sequence[str],
    n_outputs: int,
    *,
    standardise: bool = False,
) -> Dataset:
    """Return a data set with natural clients, which are in the order of their sorted names.

    owner: the name of each example's client.
    """
    owners, place = np.unique(np.asarray(owner, dtype=str), return_inverse=True)
    return Dataset(
        name,
        torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)),
        torch.from_numpy(y),
        n_outputs,
        torch.from_numpy(place.astype(np.int64)),
        tuple(owners.tolist()),
        standardise,
    )
