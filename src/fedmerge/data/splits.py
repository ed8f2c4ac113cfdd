"""The split of each client's examples, and federations from tensors of the user's own.

It does not decide which client gets which example: see `partition` for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedmerge.data.clients import Client, Federation, Task, check_federation, shape_error
from fedmerge.data.draws import generator
from fedmerge.data.stored import Inputs, Stored, make_split, stays_in_file
from fedmerge.errors import ConfigError, DataError

MIN_EXAMPLES = 4
"""Fewest examples of a client: 2 to train, 1 to validate, 1 to test."""

Examples = tuple[Tensor | ArrayLike, Tensor | ArrayLike]
"""Inputs x (n, *features) and targets y: (n,) whole numbers, or (n,) or (n, t) floats."""


def client_ids(n_clients: int) -> list[str]:
    """Return "c00", "c01", ...: names of one width, so that they sort in their order."""
    width = max(2, len(str(n_clients - 1)))
    return [f"c{i:0{width}d}" for i in range(n_clients)]


def split_client(
    client: str,
    x: Inputs,
    y: Tensor,
    source: Tensor,
    *,
    seed: int,
    train_fraction: float = 0.5,
    kind: str | None = None,
) -> Client:
    """Return the client with its n examples drawn into three splits by (`seed`, `client`).

    `train_fraction` of the examples is for training (at least 2), the rest is halved between
    validation and test (at least 1 each). Raises DataError below 4 examples and ConfigError
    where `train_fraction` is not between 0 and 1.
    """
    if not 0.0 < train_fraction < 1.0:
        raise ConfigError(f"train_fraction: {train_fraction}, wanted more than 0 and less than 1")
    n = int(x.shape[0])
    if n < MIN_EXAMPLES:
        raise DataError(
            f'client "{client}": {n} examples, wanted at least {MIN_EXAMPLES} (2 training, 1 '
            "validation, 1 test); leave it out or give it more examples"
        )
    n_train = min(max(round(train_fraction * n), 2), n - 2)
    n_validation = (n - n_train) // 2
    order = torch.from_numpy(generator(seed, "split", client).permutation(n))
    train, validation, test = (
        make_split(x[index], y[index], source[index])
        for index in torch.tensor_split(order, [n_train, n_train + n_validation])
    )
    return Client(client, train, validation, test, kind)


def from_tensors(
    clients: Mapping[str, Examples] | Sequence[Examples],
    *,
    name: str = "own",
    train_fraction: float = 0.5,
    seed: int = 0,
    kinds: Mapping[str, str] | Sequence[str] | None = None,
) -> Federation:
    """Return the federation of the user's own examples, split and checked.

    clients: (x, y) of each client, by its id or in a list (ids "c00", "c01", ...); tensors,
    arrays or nested lists. Inputs that are memory-mapped (numpy.load with mmap_mode="r") stay in
    their file, and a group of clients is read from there when it is used. Whole-number y makes
    the task classification, float y regression.
    kinds: true kind of each client, by id or in the order of `clients`.
    Raises DataError where the examples cannot be trained on (see `check_federation`).
    """
    tensors, task, n_outputs = to_tensors(clients)
    kind_of = _kinds(kinds, list(tensors))
    made = []
    first = 0
    for client, (x, y) in tensors.items():
        source = torch.arange(first, first + len(x))
        first += len(x)
        kind = kind_of.get(client)
        made.append(
            split_client(client, x, y, source, seed=seed, train_fraction=train_fraction, kind=kind)
        )
    shape = tuple(next(iter(tensors.values()))[0].shape[1:])
    federation = Federation(name, tuple(made), task, n_outputs, shape)
    check_federation(federation)
    return federation


def to_tensors(
    clients: Mapping[str, Examples] | Sequence[Examples],
) -> tuple[dict[str, tuple[Inputs, Tensor]], Task, int]:
    """Return the examples of each client as the tensors of a `Split`, the task and n_outputs.

    Raises DataError where they are no pairs, or not numbers, or clients differ in shape or kind of
    target.
    """
    if not isinstance(clients, Mapping):
        clients = dict(zip(client_ids(len(clients)), clients, strict=True))
    tensors: dict[str, tuple[Inputs, Tensor]] = {}
    for client, examples in clients.items():
        # Not any two of something: a tensor of two rows is no pair.
        if not isinstance(examples, Sequence) or len(examples) != 2:
            many = f" of {len(examples)}" if isinstance(examples, Sequence) else ""
            raise DataError(
                f'client "{client}": a {type(examples).__name__}{many}, wanted a pair (x, y) of '
                "inputs and targets"
            )
        x, y = examples
        tensors[client] = _inputs(client, x), _targets(client, y)
        _check_pair(client, *tensors[client], *next(iter(tensors.items())))
    if not tensors:
        raise DataError("clients: 0 given, wanted at least 1; check the data")
    targets = [y for _, y in tensors.values()]
    if targets[0].is_floating_point():
        return tensors, "regression", int(targets[0].shape[1])
    high = max((int(y.max()) for y in targets if len(y)), default=0)
    return tensors, "classification", count_classes(high, sum(len(y) for y in targets))


def count_classes(high: int, n_examples: int) -> int:
    """Return the number of classes where `high` is the greatest label.

    Raises DataError where there are fewer examples: one wide number would otherwise ask every
    model for that many outputs.
    """
    if high >= n_examples > 0:
        raise DataError(
            f"label {high}: wanted less than the number of examples, {n_examples}; number the "
            "classes from 0, or give float targets for regression"
        )
    return high + 1


def _check_pair(
    client: str, x: Inputs, y: Tensor, first: str, examples: tuple[Inputs, Tensor]
) -> None:
    if len(x) != len(y):
        raise DataError(f'client "{client}": {len(x)} inputs but {len(y)} targets, wanted as many')
    if x.shape[1:] != examples[0].shape[1:]:
        raise shape_error(first, tuple(examples[0].shape[1:]), client, tuple(x.shape[1:]))
    if y.dtype != examples[1].dtype or y.shape[1:] != examples[1].shape[1:]:
        raise DataError(
            f'targets of client "{client}" are {_target_name(y)}, those of client "{first}" '
            f"{_target_name(examples[1])}; give all clients targets of one kind"
        )


def _target_name(y: Tensor) -> str:
    return f"{y.shape[1]} floats an example" if y.is_floating_point() else "class labels"


def _array(client: str, part: str, value: Tensor | ArrayLike) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16, and float32 is where all floats end.
        value = (value.float() if value.is_floating_point() else value).numpy()
    try:
        array = np.asarray(value)
    except ValueError:
        raise DataError(
            f'client "{client}": {part} of unequal lengths, wanted a full array; pad or cut them'
        ) from None
    if array.dtype.kind not in "biuf":
        raise DataError(
            f'client "{client}": {part} of type {array.dtype}, wanted numbers; convert them'
        )
    return array


def _float32(array: NDArray[Any]) -> Tensor:
    with np.errstate(over="ignore"):  # Too large becomes infinite, which the guard reports.
        return torch.from_numpy(array.astype(np.float32))


def _inputs(client: str, value: Tensor | ArrayLike) -> Inputs:
    array = _array(client, "inputs", value)
    if array.ndim < 2:
        raise DataError(
            f'client "{client}": inputs of shape {array.shape}, wanted (examples, features, ...)'
        )
    if isinstance(value, np.memmap) and stays_in_file(value):
        return Stored.of(value)
    return _float32(array)


def _targets(client: str, value: Tensor | ArrayLike) -> Tensor:
    array = _array(client, "targets", value)
    if array.dtype.kind == "f":
        if array.ndim not in (1, 2):
            raise DataError(
                f'client "{client}": float targets of shape {array.shape}, wanted (examples,) or '
                "(examples, targets)"
            )
        return _float32(array.reshape(len(array), -1))
    if array.ndim != 1:
        raise DataError(
            f'client "{client}": class labels of shape {array.shape}, wanted (examples,)'
        )
    return torch.from_numpy(array.astype(np.int64))


def _kinds(kinds: Mapping[str, str] | Sequence[str] | None, ids: list[str]) -> Mapping[str, str]:
    if kinds is None:
        return {}
    if not isinstance(kinds, Mapping):
        if len(kinds) != len(ids):
            raise DataError(f"kinds: {len(kinds)} given, wanted one for each of {len(ids)} clients")
        return dict(zip(ids, kinds, strict=True))
    unknown = sorted(set(kinds) - set(ids))
    if unknown:
        raise DataError(f'kinds: no client "{unknown[0]}"; clients are {", ".join(ids[:5])}, ...')
    return kinds
