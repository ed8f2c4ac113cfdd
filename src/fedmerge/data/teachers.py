"""The partition with generated labels: each client's teacher is a mixture of latent teachers.

The inputs are those of a data set, whose own labels are not used; the truth is known here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.data.clients import Client
from fedmerge.data.dealing import deal_evenly, make_clients, need_positive
from fedmerge.data.draws import generator
from fedmerge.data.sources import Dataset
from fedmerge.errors import ConfigError, did_you_mean

Array = NDArray[np.float64]
Mix = Literal["linear", "mlp", "sample"]

HIDDEN = 16
"""Hidden units of an MLP teacher."""


def partition_latent(
    dataset: Dataset,
    n_clients: int,
    *,
    seed: int,
    train_fraction: float = 0.5,
    mix: Mix = "linear",
    teachers: int = 4,
    alpha: float = 0.5,
) -> tuple[Client, ...]:
    """Return clients labelled by a Dirichlet(`alpha`) mixture of `teachers` latent teachers.

    mix: "linear" mixes the weights of linear teachers, "mlp" the parameters of tanh networks
    with one hidden layer, and "sample" draws one linear teacher for each example. The label is
    the greatest of the data set's `n_outputs` outputs over its standardised, flattened inputs;
    for regression the outputs are the targets. A client's kind is its strongest teacher and that
    one's share. Raises DataError where the data is too small.
    """
    if mix not in get_args(Mix):
        raise ConfigError(f'mix "{mix}": unknown{did_you_mean(mix, get_args(Mix))}')
    if teachers < 1:
        raise ConfigError(f"teachers: {teachers}, wanted at least 1")
    need_positive("alpha", alpha)
    allocation = deal_evenly(dataset, n_clients, seed)
    inputs = _standardised(dataset)
    make = _mlp_teachers if mix == "mlp" else _linear_teachers
    latent = make(inputs, teachers, dataset.n_outputs, generator(seed, "teachers", mix))
    draws = generator(seed, "mixture")
    shares = draws.dirichlet(np.full(teachers, alpha), size=n_clients)
    targets = np.empty((len(dataset), dataset.n_outputs))
    for index, share in zip(allocation, shares, strict=True):
        if mix == "sample":
            teacher = draws.choice(teachers, size=len(index), p=share)
            every = np.stack(
                [_outputs(inputs[index], [part[j] for part in latent]) for j in range(teachers)]
            )
            outputs = every[teacher, np.arange(len(index))]
        else:
            outputs = _outputs(inputs[index], [np.tensordot(share, part, 1) for part in latent])
        targets[index] = outputs
    kinds = [f"teacher {share.argmax()} ({share.max():.1f})" for share in shares]
    labels = targets.argmax(axis=1) if dataset.task == "classification" else np.float32(targets)
    labelled = replace(dataset, y=torch.from_numpy(labels))
    return make_clients(labelled, allocation, kinds, seed=seed, train_fraction=train_fraction)


def _standardised(dataset: Dataset) -> Array:
    flat = dataset.whole().numpy().reshape(len(dataset), -1).astype(np.float64)
    known = np.ma.masked_invalid(flat)
    scale = known.std(axis=0).filled(0.0)
    scale[scale == 0] = 1.0
    # A missing value counts as the mean.
    standard: Array = ((known - known.mean(axis=0)) / scale).filled(0.0)
    return standard


def _outputs(inputs: Array, layers: list[Array]) -> Array:
    """Return (n, classes) outputs of a teacher; layers: weight, bias, weight, bias, ..."""
    values: Array = inputs @ layers[0] + layers[1]
    for weight, bias in zip(layers[2::2], layers[3::2], strict=True):
        values = np.tanh(values) @ weight + bias
    return values


def _linear_teachers(
    inputs: Array, teachers: int, classes: int, draws: np.random.Generator
) -> list[Array]:
    """Return weights (teachers, features, classes) and biases (teachers, classes)."""
    weight = draws.standard_normal((teachers, inputs.shape[1], classes))
    return _evened(inputs, [weight, np.zeros((teachers, classes))])


def _mlp_teachers(
    inputs: Array, teachers: int, classes: int, draws: np.random.Generator
) -> list[Array]:
    """Return the weights and biases of both layers, each with the teachers on axis 0."""
    features = inputs.shape[1]
    first = draws.standard_normal((teachers, features, HIDDEN)) * (2.0 / features**0.5)
    bias = np.zeros((teachers, HIDDEN))
    second = draws.standard_normal((teachers, HIDDEN, classes))
    return _evened(inputs, [first, bias, second, np.zeros((teachers, classes))])


def _evened(inputs: Array, layers: list[Array]) -> list[Array]:
    """Scale and centre each teacher's outputs over the data, so that every class is met.

    The scale and the centre go into the last layer: mixing parameters then stays exact.
    """
    weight, bias = layers[-2].copy(), layers[-1].copy()
    for j in range(len(weight)):
        outputs = _outputs(inputs, [part[j] for part in layers])
        scale = outputs.std(axis=0)
        scale[scale == 0] = 1.0
        weight[j] /= scale
        bias[j] = (bias[j] - outputs.mean(axis=0)) / scale
    return [*layers[:-2], weight, bias]
