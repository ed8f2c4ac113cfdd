"""The partitioners of flwr-datasets, used as settings: "flwr:DirichletPartitioner:alpha=0.3".

They decide which client gets which example; splitting and checking are as in all settings.
"""

from __future__ import annotations

import inspect
import io
import json
import typing
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr
from typing import Any

import numpy as np

from fedmerge.data.clients import Client
from fedmerge.data.dealing import make_clients, need_examples, need_labels
from fedmerge.data.draws import generator
from fedmerge.data.quiet import quiet
from fedmerge.data.sources import Dataset
from fedmerge.data.splits import MIN_EXAMPLES
from fedmerge.errors import ConfigError, DataError, MissingExtraError, did_you_mean
from fedmerge.values import describe_type, read_value

LABEL, CLIENT, INDEX = "label", "client", "index"
"""Columns that partitioners see: the target, the natural client if there is one, the place."""

ENDING = "Partitioner"
"""How their classes' names end; it may be left out."""

BY_CLASS = ("Dirichlet", "Distribution", "InnerDirichlet", "Pathological")
"""Partitioners that count the examples of each class."""


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

    path: the partitioner's class, with or without "Partitioner" at its end. options: its
    parameters, as JSON texts; those it needs have these values where they are not given: the number
    of partitions is `n_clients`, the seed `seed`, and `partition_by` the column "label" ("client"
    in partitioners by natural id). The examples are shuffled by `seed` first. Raises ConfigError
    for an unknown name or option, DataError where it cannot divide the data or makes another number
    of clients.
    """
    kind = _find(path)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if name != "self"
    }
    hints = typing.get_type_hints(kind.__init__)
    given: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key not in parameters:
            raise ConfigError(
                f'setting "flwr:{path}": unknown option "{key}"{did_you_mean(key, parameters)}'
            )
        try:
            given[key] = _read(value, hints.get(key))
        except ValueError:
            raise ConfigError(
                f'setting "flwr:{path}": {key} = "{value}", wanted {describe_type(hints[key])}'
            ) from None
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
    if kind.__name__.removesuffix(ENDING) in BY_CLASS and given["partition_by"] == LABEL:
        need_labels(dataset, f"flwr:{path}")
    if given.get("num_partitions") is not None:
        need_examples(dataset, given["num_partitions"], MIN_EXAMPLES)
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
    # Those that divide columns make no federation of this kind; a function has no text.
    known = [
        one.removesuffix(ENDING)
        for one in partitioner.__all__
        if one != ENDING and not one.startswith(("Vertical", "IdToSizeFnc"))
    ]
    short = name.removesuffix(ENDING)
    if short in known:
        return getattr(partitioner, short + ENDING)
    near = did_you_mean(name.partition("Partition")[0], known)
    raise ConfigError(f'setting "flwr:{name}": no such partitioner{near}')


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


def _read(text: str, wanted: object) -> object:
    """Return the value in `text`; ValueError where `wanted` takes numbers only, and it is none."""
    if wanted in (int, float, bool, int | None) and text != "null":
        return read_value(text, wanted)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
