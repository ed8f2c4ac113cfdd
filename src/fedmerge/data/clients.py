"""The clients of a federation, the guard that checks them, and a description of them.

It neither loads nor makes data: see `sources`, `files` and `settings` for that.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.errors import ConfigError, DataError

Task = Literal["classification", "regression"]


class DataWarning(UserWarning):
    """Data that can be used, but not for all that it seems to offer."""


@dataclass(frozen=True, eq=False)
class Split:
    """The examples of one client's training, validation or test split.

    x: (n, *features) float32, inputs. y: (n,) int64 class labels, or (n, t) float32 targets.
    source: (n,) int64, the index of each example in the data set it came from, where known.
    """

    x: Tensor
    y: Tensor
    source: Tensor | None = None

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def loaded(self) -> Split:
        """Return the split with its examples in memory, for those who look at them repeatedly."""
        return self


@dataclass(frozen=True, eq=False)
class Client:
    """One client: its examples in three splits, and its true kind where that is known.

    id: stable name, for example "c07". kind: for example "swap 101", "rot90", "group 3".
    """

    id: str
    train: Split
    validation: Split
    test: Split
    kind: str | None = None

    def splits(self) -> Iterator[tuple[str, Split]]:
        """Yield each split with its name: training, validation, test."""
        yield "training", self.train
        yield "validation", self.validation
        yield "test", self.test


@dataclass(frozen=True, eq=False)
class Federation:
    """All clients of one experiment, and what a model for them takes and gives.

    name: for example "digits/concept-mix". n_outputs: number of classes, or of targets.
    input_shape: shape of one example's input, for example (1, 8, 8).
    """

    name: str
    clients: tuple[Client, ...]
    task: Task
    n_outputs: int
    input_shape: tuple[int, ...]


def federation_of(clients: Sequence[Client]) -> Federation:
    """Return the federation of `clients`: what a model takes and gives is read off their data.

    Raises ConfigError where there are none.
    """
    if not clients:
        raise ConfigError("clients is empty: wanted 1 client or more")
    first = clients[0].train
    shape = tuple(first.x.shape[1:])
    if first.y.dtype.is_floating_point:
        return Federation("clients", tuple(clients), "regression", first.y.shape[-1], shape)
    targets = [split.y for c in clients for _, split in c.splits() if len(split)]
    n_classes = max((int(y.max()) + 1 for y in targets), default=0)
    return Federation("clients", tuple(clients), "classification", n_classes, shape)


@dataclass(frozen=True, eq=False)
class ClientRow:
    """One client in numbers; label_counts: (n_outputs,) int64 over all splits, or (0,) without
    class labels."""

    id: str
    kind: str | None
    n_train: int
    n_validation: int
    n_test: int
    label_counts: NDArray[np.int64]


def describe(federation: Federation) -> list[ClientRow]:
    """Return one row for each client, in the federation's order."""
    rows = []
    for client in federation.clients:
        counts = np.zeros(0, dtype=np.int64)
        if federation.task == "classification":
            labels = torch.cat([split.y for _, split in client.splits()])
            counts = torch.bincount(labels, minlength=federation.n_outputs).numpy()
        sizes = len(client.train), len(client.validation), len(client.test)
        rows.append(ClientRow(client.id, client.kind, *sizes, counts))
    return rows


def sample_images(federation: Federation, most: int = 6) -> dict[str, list[NDArray[np.float64]]]:
    """Return some training images of each kind of client, from its first client.

    Arrays (height, width) or (height, width, 3) in 0..1; nothing where inputs are no images.
    """
    if len(federation.input_shape) != 3 or federation.input_shape[0] not in (1, 3):
        return {}
    images: dict[str, list[NDArray[np.float64]]] = {}
    for client in federation.clients:
        if (client.kind or "") not in images:
            x = client.train.x[:most].double().permute(0, 2, 3, 1)
            spread = float(x.max() - x.min()) or 1.0
            scaled = (x - x.min()) / spread
            images[client.kind or ""] = [np.asarray(one.squeeze(-1)) for one in scaled]
    return images


def check_federation(federation: Federation, *, whole: bool = True) -> None:
    """Raise DataError, in one line, for the first thing that makes `federation` unusable.

    Refused: no clients, two clients of one id, splits too small, tensors of another shape or
    type than the contract's, NaN or infinite values, labels out of range, one class only, and
    an example (by `source`) in two clients or two splits. A class that some client has, but none
    in its training split, cannot be learned; it gives a DataWarning. Clients that are not the
    `whole` federation may well lack classes that others have.

    A federation is looked at once: what is found good is not looked at again.
    """
    if federation in _good:
        return
    clients = federation.clients
    if not clients:
        raise DataError(
            f'federation "{federation.name}": 0 clients, wanted at least 1; check the data'
        )
    seen: set[str] = set()
    for client in clients:
        if client.id in seen:
            raise DataError(
                f'client id "{client.id}": given to two clients, wanted one; rename one of them'
            )
        seen.add(client.id)
        _check_sizes(client)
        for name, lazy in client.splits():
            split = lazy.loaded()
            _check_shapes(federation, client, name, split)
            _check_values(federation, client, name, split)
    if whole:
        _check_classes(federation)
    _check_sources(federation)
    _good.add(federation)


_good: WeakSet[Federation] = WeakSet()


def shape_error(
    first: str, shape: tuple[int, ...], second: str, other: tuple[int, ...]
) -> DataError:
    """Return the error for two clients whose inputs have different shapes."""
    return DataError(
        f'inputs of client "{second}" have shape {other}, those of client "{first}" {shape}; '
        "give all clients inputs of one shape"
    )


def _check_sizes(client: Client) -> None:
    n_train, n_validation, n_test = (len(split) for _, split in client.splits())
    if n_train < 2 or n_validation < 1 or n_test < 1:
        raise DataError(
            f'client "{client.id}": {n_train} training, {n_validation} validation and {n_test} '
            "test examples, wanted at least 2, 1 and 1; leave it out or give it more examples"
        )


def _check_shapes(federation: Federation, client: Client, name: str, split: Split) -> None:
    where = f'client "{client.id}", {name} split'
    shape = tuple(split.x.shape[1:])
    if shape != federation.input_shape:
        first = federation.clients[0]
        first_shape = tuple(first.train.x.shape[1:])
        if shape != first_shape:
            raise shape_error(first.id, first_shape, client.id, shape)
        raise DataError(
            f"{where}: inputs of shape {shape}, but the federation's input_shape is "
            f"{federation.input_shape}; correct one of them"
        )
    labelled = federation.task == "classification"
    wanted = (len(split),) if labelled else (len(split), federation.n_outputs)
    if tuple(split.y.shape) != wanted:
        raise DataError(f"{where}: targets of shape {tuple(split.y.shape)}, wanted {wanted}")
    if split.source is not None and tuple(split.source.shape) != (len(split),):
        raise DataError(
            f"{where}: source of shape {tuple(split.source.shape)}, wanted {(len(split),)}"
        )
    wanted_type = torch.int64 if labelled else torch.float32
    for part, tensor, dtype in (
        ("inputs", split.x, torch.float32),
        ("targets", split.y, wanted_type),
    ):
        if tensor.dtype != dtype:
            raise DataError(f"{where}: {part} of type {tensor.dtype}, wanted {dtype}; convert them")


def _check_values(federation: Federation, client: Client, name: str, split: Split) -> None:
    where = f'client "{client.id}", {name} split'
    for part, tensor in (("inputs", split.x), ("targets", split.y)):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise DataError(
                f"{where}: {bad} NaN or infinite values in its {part}, wanted 0; "
                "fill in or drop these examples"
            )
    if federation.task == "classification":
        low, high = int(split.y.min()), int(split.y.max())
        if low < 0 or high >= federation.n_outputs:
            raise DataError(
                f"{where}: label {low if low < 0 else high}, wanted 0 to "
                f"{federation.n_outputs - 1}; number the classes from 0"
            )


def _check_classes(federation: Federation) -> None:
    if federation.task != "classification":
        return
    labels: set[int] = set()
    trained: set[int] = set()
    for client in federation.clients:
        for _, split in client.splits():
            labels.update(torch.unique(split.y).tolist())
        trained.update(torch.unique(client.train.y).tolist())
    if len(labels) == 1:
        raise DataError(
            f'federation "{federation.name}": every example has label {labels.pop()}, wanted at '
            "least 2 classes; check the targets"
        )
    if unseen := sorted(labels - trained):
        examples = ", ".join(map(str, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
        warnings.warn(
            f'federation "{federation.name}": no client trains on label {examples}, which is in '
            "validation or test examples: no method can learn it; drop these examples, get more of "
            "them, or raise train_fraction",
            DataWarning,
            stacklevel=3,
        )


def _check_sources(federation: Federation) -> None:
    places: list[str] = []
    sources: list[NDArray[np.int64]] = []
    for client in federation.clients:
        for name, split in client.splits():
            if split.source is not None:
                places.append(f'client "{client.id}" ({name})')
                sources.append(split.source.numpy())
    if not sources:
        return
    owner = np.repeat(np.arange(len(places)), [len(source) for source in sources])
    source = np.concatenate(sources)
    order = np.argsort(source, kind="stable")
    source, owner = source[order], owner[order]
    clash = np.flatnonzero((source[1:] == source[:-1]) & (owner[1:] != owner[:-1]))
    if clash.size:
        at = clash[0]
        raise DataError(
            f"example {source[at]}: in {places[owner[at]]} and in {places[owner[at + 1]]}, wanted "
            "in one place only; split the data again"
        )
