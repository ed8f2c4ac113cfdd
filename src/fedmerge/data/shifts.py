"""Partitions that change inputs or labels: domains of images, and concepts (label relations).

Examples are dealt to the clients evenly and at random, so nothing but the shift differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.data.clients import Client
from fedmerge.data.dealing import (
    balanced,
    deal_evenly,
    make_clients,
    need_examples,
    need_images,
    need_labels,
)
from fedmerge.data.draws import generator
from fedmerge.data.sources import Dataset
from fedmerge.data.splits import MIN_EXAMPLES
from fedmerge.errors import ConfigError, DataError

DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "rot0": lambda x: x,
    "rot90": lambda x: torch.rot90(x, 1, dims=(-2, -1)),
    "rot180": lambda x: torch.rot90(x, 2, dims=(-2, -1)),
    "invert": lambda x: x.max() + x.min() - x,
}
"""Domains by name; each takes all images of a data set, (n, channels, height, width)."""


def partition_domain(
    dataset: Dataset,
    n_clients: int,
    *,
    seed: int,
    train_fraction: float = 0.5,
    mixed: bool = False,
) -> tuple[Client, ...]:
    """Return clients that see the images in a domain of `DOMAINS`, in near-equal numbers.

    With `mixed` a client has two domains: each example is in the first with the client's own
    probability, uniform in 0.2-0.8, and else in the second. Rotation is counter-clockwise;
    inversion swaps the data set's least and greatest value. Raises DataError for anything but
    square images.
    """
    need_images(dataset, "domain-mix" if mixed else "domain")
    allocation = deal_evenly(dataset, n_clients, seed)
    draws = generator(seed, "domain")
    options = list(combinations(DOMAINS, 2)) if mixed else [(name, name) for name in DOMAINS]
    chosen = [options[k] for k in balanced(n_clients, len(options), draws)]
    views = {name: view(dataset.whole()) for name, view in DOMAINS.items()}
    x = dataset.whole().clone()
    for index, (first, second) in zip(allocation, chosen, strict=True):
        in_first = draws.random(len(index)) < draws.uniform(0.2, 0.8)
        x[index[in_first]] = views[first][index[in_first]]
        x[index[~in_first]] = views[second][index[~in_first]]
    kinds = [f"{first}+{second}" if mixed else first for first, second in chosen]
    shifted = replace(dataset, x=x)
    return make_clients(shifted, allocation, kinds, seed=seed, train_fraction=train_fraction)


def partition_concept(
    dataset: Dataset,
    n_clients: int,
    *,
    seed: int,
    train_fraction: float = 0.5,
    concepts: int = 4,
) -> tuple[Client, ...]:
    """Return clients whose labels are permuted in one of `concepts` ways, in near-equal numbers.

    The first way is no change; the others are drawn at random and differ (with few classes there
    are fewer of them: 2 for 2 classes). Raises DataError where the data is not labelled.
    """
    need_labels(dataset, "concept")
    need_examples(dataset, n_clients, MIN_EXAMPLES)
    if concepts < 1:
        raise ConfigError(f"concepts: {concepts}, wanted at least 1")
    draws = generator(seed, "concept")
    identity = tuple(range(dataset.n_outputs))
    ways = {identity: None}  # A dict, because it keeps the order of drawing.
    while len(ways) < min(concepts, math.factorial(dataset.n_outputs)):
        ways[tuple(draws.permutation(dataset.n_outputs).tolist())] = None
    relations = np.array(list(ways))
    chosen = balanced(n_clients, len(relations), draws)
    kinds = [f"concept {k}" for k in chosen]
    return _relabelled(dataset, relations[chosen], kinds, seed, train_fraction)


def partition_concept_mix(
    dataset: Dataset, n_clients: int, *, seed: int, train_fraction: float = 0.5
) -> tuple[Client, ...]:
    """Return clients with three independent label swaps on or off: 8 kinds from 3 factors.

    The classes are divided at random into three groups; a factor that is on shifts the labels
    of its group cyclically by one. Each client switches each factor on with probability 1/2;
    its kind tells them, for example "swap 101". Raises DataError below 6 classes.
    """
    need_labels(dataset, "concept-mix")
    need_examples(dataset, n_clients, MIN_EXAMPLES)
    if dataset.n_outputs < 6:
        raise DataError(
            f'setting "concept-mix": needs at least 6 classes, but data set "{dataset.name}" has '
            f'{dataset.n_outputs}; use the setting "concept"'
        )
    draws = generator(seed, "concept-mix")
    groups = np.array_split(draws.permutation(dataset.n_outputs), 3)
    switches = draws.integers(0, 2, size=(n_clients, 3))
    relations = np.tile(np.arange(dataset.n_outputs), (n_clients, 1))
    for relation, on in zip(relations, switches, strict=True):
        for group in (group for group, is_on in zip(groups, on, strict=True) if is_on):
            relation[group] = np.roll(group, -1)
    kinds = ["swap " + "".join(map(str, on)) for on in switches]
    return _relabelled(dataset, relations, kinds, seed, train_fraction)


def _relabelled(
    dataset: Dataset,
    relations: NDArray[np.int64],
    kinds: list[str],
    seed: int,
    train_fraction: float,
) -> tuple[Client, ...]:
    """Return clients in which label c has become relations[i, c]; relations: (clients, classes)."""
    allocation = deal_evenly(dataset, len(relations), seed)
    y = dataset.y.clone()
    for index, relation in zip(allocation, relations, strict=True):
        y[index] = torch.from_numpy(relation)[dataset.y[index]]
    shifted = replace(dataset, y=y)
    return make_clients(shifted, allocation, kinds, seed=seed, train_fraction=train_fraction)
