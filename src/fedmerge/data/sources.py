"""Data sets to make clients from: `Dataset`, and the built-in ones by name.

They hold examples only, not clients; a further source is one more loader in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmerge.data.clients import Task
from fedmerge.data.draws import generator
from fedmerge.errors import ConfigError, DataError, did_you_mean


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples that are not yet divided over clients.

    x: (n, *features) float32; images are (n, channels, height, width).
    y: (n,) int64 class labels in 0..n_outputs-1, or (n, n_outputs) float32 targets.
    Raises DataError where x and y do not fit each other.
    """

    name: str
    x: Tensor
    y: Tensor
    n_outputs: int

    def __post_init__(self) -> None:
        wanted: tuple[int, ...] = (len(self.x),)
        if self.task == "regression":
            wanted = (len(self.x), self.n_outputs)
        if tuple(self.y.shape) != wanted:
            raise DataError(
                f'data set "{self.name}": targets of shape {tuple(self.y.shape)}, wanted {wanted}'
            )

    @property
    def is_image(self) -> bool:
        """Whether x is (n, channels, height, width)."""
        return self.x.dim() == 4

    @property
    def task(self) -> Task:
        """Regression where the targets are floats."""
        return "regression" if self.y.is_floating_point() else "classification"

    def __len__(self) -> int:
        return int(self.x.shape[0])


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


SOURCES: dict[str, Callable[[], Dataset]] = {"digits": load_digits, "gaussian": load_gaussian}
"""Built-in data sets: the name, and the function that loads it."""


def load_source(name: str) -> Dataset:
    """Return the built-in data set `name`; raises ConfigError for an unknown name."""
    if name not in SOURCES:
        raise ConfigError(f'data "{name}": not a built-in data set{did_you_mean(name, SOURCES)}')
    return SOURCES[name]()
