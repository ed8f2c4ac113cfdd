"""Clients as the data has them: subjects, users, hospitals, domains, or the user's own files.

It gathers their examples in a `Dataset` and takes them apart again; it changes no example.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fedmerge.data.clients import Client
from fedmerge.data.draws import generator
from fedmerge.data.files import Tables
from fedmerge.data.sources import Dataset
from fedmerge.data.splits import MIN_EXAMPLES, split_client, to_tensors
from fedmerge.data.stored import open_array
from fedmerge.errors import ConfigError, DataError


def gather(tables: Tables, name: str, *, standardise: bool = False) -> Dataset:
    """Return the examples of all clients of `tables` in one data set that knows their owners.

    Raises DataError where they are not numbers, or clients differ in shape or kind of target.
    """
    tensors, _, n_outputs = to_tensors(tables)
    x = torch.cat([x if isinstance(x, torch.Tensor) else x.read() for x, _ in tensors.values()])
    y = torch.cat([y for _, y in tensors.values()])
    sizes = torch.tensor([len(x) for x, _ in tensors.values()])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return Dataset(name, x, y, n_outputs, owner, tuple(tensors), standardise)


def stored_dataset(folder: Path) -> Dataset:
    """Return the data set in x.npy, y.npy and, for its own clients, client.npy; x stays there.

    x: (n, *features), y: (n,) or (n, t), client: (n,) names or numbers. Raises DataError where a
    file is missing or damaged, or they do not fit each other.
    """
    x, y = open_array(folder / "x.npy"), open_array(folder / "y.npy")
    tensors, _, n_outputs = to_tensors({folder.name: (x, np.array(y))})
    inputs, targets = tensors[folder.name]
    if not (folder / "client.npy").exists():
        return Dataset(folder.name, inputs, targets, n_outputs)
    names, owner = np.unique(np.array(open_array(folder / "client.npy")), return_inverse=True)
    owners = tuple(str(name) for name in names)
    return Dataset(folder.name, inputs, targets, n_outputs, torch.from_numpy(owner), owners)


def partition_natural(
    dataset: Dataset,
    n_clients: int | None = None,
    *,
    seed: int,
    train_fraction: float = 0.5,
    parts: int = 1,
    min_examples: int | None = None,
) -> tuple[Client, ...]:
    """Return the clients that the data has, or `n_clients` of them, drawn at random.

    parts: divide each one's examples at random into this many clients of near-equal size, whose
    kind is its name: many clients of few domains. min_examples: leave out owners with fewer
    examples; None keeps all. Raises DataError where the data has no or too few clients.
    """
    if dataset.owner is None:
        raise DataError(f'setting "natural": data "{dataset.name}" has no clients of its own')
    if parts < 1:
        raise ConfigError(f"parts: {parts}, wanted at least 1")
    members = _members(dataset)
    if min_examples is not None:
        members = {name: index for name, index in members.items() if len(index) >= min_examples}
        if not members:
            raise DataError(
                f'min_examples: {min_examples}, but no client of data "{dataset.name}" has as many'
            )
    kind: dict[str, str | None] = dict.fromkeys(members)
    if parts > 1:
        members, kind = _divided(members, parts, seed)
    short = {name: len(index) for name, index in members.items() if len(index) < MIN_EXAMPLES}
    if short and min_examples is None and parts == 1 and len(short) < len(members):
        name, n = next(iter(short.items()))
        raise DataError(
            f'client "{name}": {n} examples, wanted at least {MIN_EXAMPLES} (2 training, 1 '
            f"validation, 1 test); leave such clients out ({len(short)} of {len(members)}) with "
            f'the setting "natural:min_examples={MIN_EXAMPLES}", or give them more examples'
        )
    names = list(members)
    if n_clients is not None and n_clients != len(names):
        if n_clients > len(names):
            raise DataError(
                f'clients: {n_clients}, but "{dataset.name}" has {len(names)}; leave the number '
                f"out or say {len(names)}"
            )
        drawn = generator(seed, "natural").permutation(len(names))[:n_clients]
        names = [names[i] for i in sorted(drawn)]
    return tuple(
        split_client(
            name,
            dataset.x[members[name]],
            dataset.y[members[name]],
            members[name],
            seed=seed,
            train_fraction=train_fraction,
            kind=kind[name],
        )
        for name in names
    )


def _members(dataset: Dataset) -> dict[str, torch.Tensor]:
    """Return the examples of each owner, in the order of the data set."""
    assert dataset.owner is not None  # The caller has refused the data otherwise.
    order = torch.argsort(dataset.owner, stable=True)
    sizes = torch.bincount(dataset.owner, minlength=len(dataset.owners))
    pieces = torch.split(order, sizes.tolist())
    return dict(zip(dataset.owners, pieces, strict=True))


def _divided(
    members: Mapping[str, torch.Tensor], parts: int, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, str | None]]:
    pieces: dict[str, torch.Tensor] = {}
    kind: dict[str, str | None] = {}
    width = len(str(parts - 1))
    for owner, index in members.items():
        order = generator(seed, "parts", owner).permutation(len(index))
        for j, piece in enumerate(np.array_split(index.numpy()[order], parts)):
            name = f"{owner} {j:0{width}d}"
            pieces[name], kind[name] = torch.from_numpy(piece), owner
    return pieces, kind
