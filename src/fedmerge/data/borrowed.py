"""The partitioners of flwr-datasets, used as settings: "flwr:DirichletPartitioner:alpha=0.3".

They decide which client gets which example; splitting and checking are as in all settings.
"""

from __future__ import annotations

import inspect
import io
import json
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr
from typing import Any

import numpy as np

from fedmerge.data.clients import Client
from fedmerge.data.dealing import make_clients
from fedmerge.data.draws import generator
from fedmerge.data.hub import quiet
from fedmerge.data.sources import Dataset
from fedmerge.errors import ConfigError, DataError, MissingExtraError, did_you_mean

LABEL, CLIENT, INDEX = "label", "client", "index"
"""Columns that partitioners see: the target, the natural client if there is one, the place."""


def partition_flwr(
    dataset: Dataset,
    n_clients: int | None,
    *,
    seed: int,
    train_fraction: float = 0.5,
    path: str,
    options: Mapping[str, str] | None = None,
) -> tuple[Client, ...]:
    """Return clients with the examples that a partitioner of flwr-datasets gives them.

    path: the partitioner's class. options: its parameters, as JSON texts; those it needs have
    these values where they are not given: the number of partitions is `n_clients`, the seed
    `seed`, and `partition_by` the column "label" ("client" in partitioners by natural id). The
    examples are shuffled by `seed` first. Raises ConfigError for an unknown name or option,
    DataError where it cannot divide the data or makes another number of clients.
    """
    kind = _find(path)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if name != "self"
    }
    options = options or {}
    for key in options:
        if key not in parameters:
            raise ConfigError(
                f'setting "flwr:{path}": unknown option "{key}"{did_you_mean(key, parameters)}'
            )
    given: dict[str, Any] = {key: _read(value) for key, value in options.items()}
    natural = "NaturalId" in path
    usual = {
        "num_partitions": n_clients,
        "partition_by": CLIENT if natural else LABEL,
        "seed": seed,
    }
    given = {**{k: v for k, v in usual.items() if k in parameters}, **given}
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and given.get(key) is None:
            example = f"flwr:{path}:{key}=..."
            raise ConfigError(f'setting "flwr:{path}": needs {key}; say "{example}"')
    try:
        partitioner = kind(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'setting "flwr:{path}": {_line(error)}') from None
    allocation = _divide(path, partitioner, dataset, seed)
    if n_clients not in (None, len(allocation)):
        raise DataError(
            f"clients: {n_clients}, but the setting makes {len(allocation)} of data "
            f'"{dataset.name}"; say {len(allocation)} or none'
        )
    return make_clients(dataset, allocation, seed=seed, train_fraction=train_fraction)


def _find(name: str) -> Any:
    try:
        from flwr_datasets import partitioner
    except ImportError:
        raise MissingExtraError("data") from None
    # Those that divide columns instead of examples make no federation of this kind.
    known = [
        one
        for one in partitioner.__all__
        if one != "Partitioner" and not one.startswith("Vertical")
    ]
    for candidate in (name, f"{name}Partitioner"):
        if candidate in known:
            return getattr(partitioner, candidate)
    raise ConfigError(f'setting "flwr:{name}": no such partitioner{did_you_mean(name, known)}')


def _divide(path: str, partitioner: Any, dataset: Dataset, seed: int) -> list[Any]:
    import datasets

    order = generator(seed, "flwr").permutation(len(dataset))
    target = dataset.y.numpy()[order]
    columns = {INDEX: order, LABEL: target if target.ndim == 1 else target[:, 0]}
    if dataset.owner is not None:
        columns[CLIENT] = np.asarray(dataset.owners)[dataset.owner.numpy()[order]]
    elif "NaturalId" in path:
        raise DataError(f'setting "flwr:{path}": data "{dataset.name}" has no clients of its own')
    try:
        # Their bars and remarks are about partitions, whose numbers the error or table tells.
        with quiet(), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            partitioner.dataset = datasets.Dataset.from_dict(columns)
            return [
                np.asarray(partitioner.load_partition(i)[INDEX][:], dtype=np.int64)
                for i in range(partitioner.num_partitions)
            ]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise DataError(
            f'setting "flwr:{path}": cannot divide data "{dataset.name}": {_line(error)}'
        ) from None


def _read(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
