"""The settings in which methods are compared, by name, and the federation each one makes.

It is the one place that joins data, partition and guard; the ideas are in the other modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fedmerge.data.borrowed import partition_flwr
from fedmerge.data.catalog import load_source
from fedmerge.data.clients import Client, Federation, check_federation
from fedmerge.data.natural import partition_natural
from fedmerge.data.options import PATH, convert, parse
from fedmerge.data.partition import partition_cluster, partition_dirichlet
from fedmerge.data.scaling import standardise
from fedmerge.data.shifts import partition_concept, partition_concept_mix, partition_domain
from fedmerge.data.sources import Dataset
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
"""The setting that takes the clients as the data has them."""

FLWR = "flwr"
"""The setting that borrows a partitioner, named after it: "flwr:DirichletPartitioner:alpha=0.3"."""

PARTITIONS: dict[str, Callable[..., tuple[Client, ...]]] = {
    **SETTINGS,
    NATURAL: partition_natural,
    FLWR: partition_flwr,
}
"""Every name that a setting may begin with."""

COMMON = ("dataset", "n_clients", "seed", "train_fraction")
"""Parameters of a partition that are not options of its setting."""


def is_natural(setting: str) -> bool:
    """Return whether `setting`, with or without options, takes the clients that the data has."""
    return setting.partition(":")[0] == NATURAL


def make_federation(
    data: str,
    setting: str,
    n_clients: int | None = None,
    *,
    seed: int,
    train_fraction: float = 0.5,
) -> Federation:
    """Return the clients of `setting` on `data`, checked.

    data: a name in `SOURCES`, with options as "name:key=value:key=value", or the path of a
    folder of .npz files (one for each client) or of x.npy and y.npy, a .csv, .tsv or .arff file.
    setting: a name in `SETTINGS`, with options in the same way, for clients that are made of the
    pooled examples; "natural" for the clients that the data has; or "flwr:" and a partitioner of
    flwr-datasets.
    n_clients: clients to make; for "natural", None takes all, and a number draws as many.
    Raises ConfigError for an unknown name or option, DataError for data that cannot be used, and
    MissingExtraError where a package is missing.
    """
    name, options = parse(setting, "setting")
    if name not in PARTITIONS:
        raise ConfigError(f'setting "{setting}": unknown{did_you_mean(name, PARTITIONS)}')
    if name == FLWR and PATH not in options:
        raise ConfigError(
            f'setting "{setting}": wanted a partitioner, for example "flwr:IidPartitioner"'
        )
    if n_clients is None and name in SETTINGS:
        raise ConfigError(f'clients: none given, wanted a number for the setting "{setting}"')
    if name == FLWR:  # The options are the partitioner's own, which checks them itself.
        values: dict[str, object] = {PATH: options.pop(PATH), "options": options}
    else:
        values = convert(setting, "setting", PARTITIONS[name], options, hidden=COMMON)
    dataset = load_source(data)
    if name == NATURAL and dataset.owner is None:
        raise DataError(
            f'setting "natural": data "{data}" has no clients of its own; where a column '
            'names them, say so by "client=COLUMN"; otherwise choose from '
            f"{', '.join(sorted(SETTINGS))}, or give other data"
        )
    clients = PARTITIONS[name](
        dataset, n_clients, seed=seed, train_fraction=train_fraction, **values
    )
    return _federation(f"{dataset.name}/{setting}", dataset, clients)


def _federation(name: str, dataset: Dataset, clients: tuple[Client, ...]) -> Federation:
    if dataset.standardise:
        clients = standardise(clients, dataset.task)
    shape = tuple(clients[0].train.x.shape[1:]) if clients else tuple(dataset.x.shape[1:])
    federation = Federation(name, clients, dataset.task, dataset.n_outputs, shape)
    check_federation(federation)
    return federation
