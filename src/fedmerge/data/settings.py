"""The settings in which methods are compared, by name, and the federation each one makes.

It is the one place that joins data, partition and guard; the ideas are in the other modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fedmerge.data.clients import Client, Federation, check_federation
from fedmerge.data.files import TABLE_ENDINGS, Tables, load_csv, load_npz_folder
from fedmerge.data.partition import partition_cluster, partition_dirichlet
from fedmerge.data.shifts import partition_concept, partition_concept_mix, partition_domain
from fedmerge.data.sources import SOURCES, Dataset, load_source
from fedmerge.data.splits import from_tensors, to_tensors
from fedmerge.data.teachers import partition_latent
from fedmerge.errors import ConfigError, DataError, did_you_mean

SETTINGS: dict[str, Callable[..., tuple[Client, ...]]] = {
    "cluster": partition_cluster,
    "dirichlet": partition_dirichlet,
    "domain": partition_domain,
    "domain-mix": partial(partition_domain, mixed=True),
    "concept": partition_concept,
    "concept-mix": partition_concept_mix,
    "latent": partial(partition_latent, mix="linear"),
    "latent-mlp": partial(partition_latent, mix="mlp"),
    "latent-sample": partial(partition_latent, mix="sample"),
}
"""Settings that make clients: ``(dataset, n_clients, *, seed, train_fraction) -> clients``."""

NATURAL = "natural"
"""The setting that takes the clients as the user's own files have them."""


def make_federation(
    data: str,
    setting: str,
    n_clients: int | None = None,
    *,
    seed: int,
    train_fraction: float = 0.5,
) -> Federation:
    """Return the clients of `setting` on `data`, checked.

    data: a name in `SOURCES`, or the path of a folder of .npz files, a .csv or a .tsv file.
    setting: a name in `SETTINGS`, or "natural" for the clients in the user's own files; any
    other setting pools the examples of those files and makes its own clients.
    n_clients: clients to make; for "natural" None, or the number that the files have.
    Raises ConfigError for an unknown name and DataError for data that cannot be used.
    """
    if setting not in (*SETTINGS, NATURAL):
        raise ConfigError(
            f'setting "{setting}": unknown{did_you_mean(setting, [*SETTINGS, NATURAL])}'
        )
    if setting == NATURAL:
        return _natural(data, n_clients, seed, train_fraction)
    if n_clients is None:
        raise ConfigError(f'clients: none given, wanted a number for the setting "{setting}"')
    dataset = load_source(data) if data in SOURCES else _pooled(data)
    clients = SETTINGS[setting](dataset, n_clients, seed=seed, train_fraction=train_fraction)
    shape = tuple(dataset.x.shape[1:])
    name = f"{dataset.name}/{setting}"
    federation = Federation(name, clients, dataset.task, dataset.n_outputs, shape)
    check_federation(federation)
    return federation


def _natural(data: str, n_clients: int | None, seed: int, train_fraction: float) -> Federation:
    if data in SOURCES:
        raise DataError(
            f'setting "natural": data "{data}" has no clients of its own; give a folder of .npz '
            f"files or a table, or choose from {', '.join(sorted(SETTINGS))}"
        )
    clients = _load_files(data)
    if n_clients not in (None, len(clients)):
        raise DataError(
            f'clients: {n_clients}, but "{data}" has {len(clients)} and setting "natural" takes '
            f"them all; leave the number out or say {len(clients)}"
        )
    name = f"{Path(data).stem}/{NATURAL}"
    return from_tensors(clients, name=name, train_fraction=train_fraction, seed=seed)


def _load_files(data: str) -> Tables:
    path = Path(data)
    if path.suffix.lower() in TABLE_ENDINGS and not path.is_dir():
        return load_csv(path)
    if path.is_dir():
        return load_npz_folder(path)
    raise DataError(
        f'data "{data}": neither a built-in data set nor the path of a folder, .csv or .tsv'
        f"{did_you_mean(data, SOURCES)}"
    )


def _pooled(data: str) -> Dataset:
    tensors, _, n_outputs = to_tensors(_load_files(data))
    x = torch.cat([x for x, _ in tensors.values()])
    y = torch.cat([y for _, y in tensors.values()])
    return Dataset(Path(data).stem, x, y, n_outputs)
