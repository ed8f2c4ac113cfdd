"""Small synthetic clients, modules and servers that the tests of the core share.

Everything is drawn from a seed given by the caller; nothing here tests anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.algorithms import METHODS, Algorithm, Updates, make_method
from fedmerge.data import Client, Split
from fedmerge.local import Training
from fedmerge.params import ModelSource
from fedmerge.sim import RoundLog, Simulation
from fedmerge.soup import Sent, Soup

N_FEATURES = 5
N_CLASSES = 3
ALL_METHODS = (*METHODS, "fedmerge:rule=paper")
TRAINING = Training(lr=0.2, epochs=2, batch_size=4)


def net(hidden: int = 4, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    """A function that makes a small network with one hidden layer."""
    return lambda: nn.Sequential(
        nn.Linear(N_FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, N_CLASSES)
    ).to(dtype)


def norm_net() -> nn.Module:
    """Two linear layers with a BatchNorm between: floating buffers and a counter."""
    return nn.Sequential(
        nn.Linear(N_FEATURES, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, N_CLASSES)
    )


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=draw(seed), dtype=torch.float64).to(dtype)


def make_client(
    name: str, n_train: int, *, kind: int = 0, targets: int = 0, shape: Sequence[int] = ()
) -> Client:
    """A client whose labels follow one of two linear rules; `targets` > 0 gives regression."""
    g = draw(sum(map(ord, name)) + 1000 * kind)
    shape = tuple(shape) or (N_FEATURES,)
    rule = torch.randn(math.prod(shape), 8, generator=draw(7 + kind))

    def split(n: int) -> Split:
        x = torch.randn(n, *shape, generator=g)
        score = x.flatten(1) @ rule
        return Split(x, score[:, :targets].clone() if targets else score[:, :3].argmax(1))

    return Client(name, split(n_train), split(6), split(6), kind=f"rule {kind}")


def make_clients(m: int = 6, **options: Any) -> list[Client]:
    """m clients of unequal size (6 to 15 training examples), of two kinds in turn."""
    return [make_client(f"c{i:02d}", 6 + i * 7 % 10, kind=i % 2, **options) for i in range(m)]


def simulate(
    method: str | Algorithm,
    clients: Sequence[Client] | None = None,
    model: ModelSource | None = None,
    **options: Any,
) -> Simulation:
    """A short simulation of `method` (4 rounds unless said otherwise)."""
    algorithm = make_method(method) if isinstance(method, str) else method
    return Simulation(
        algorithm,
        make_clients() if clients is None else clients,
        net() if model is None else model,
        **{"training": TRAINING, "rounds": 4, **options},
    )


def run(*args: Any, **options: Any) -> Simulation:
    """As `simulate`, with all rounds run."""
    made = simulate(*args, **options)
    for _ in made.rounds():
        pass
    return made


def plain(logs: Sequence[RoundLog]) -> list[dict[str, Any]]:
    """Logs without their seconds, which differ from run to run."""
    return [{k: v for k, v in log.to_json().items() if k != "seconds"} for log in logs]


def soup_tensors(soup: Soup) -> dict[str, Tensor]:
    """All numbers of a server: shared state and rows."""
    return soup.state()[0]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_updates(sent: Sent, delta: Tensor, **changes: Any) -> Updates:
    """Updates for `sent` with these deltas (k, P), n_examples 10, 11, ..., 5 steps of 0.1."""
    k = len(sent.tickets)
    values: dict[str, Any] = {
        "tickets": sent.tickets,
        "delta": delta,
        "n_examples": torch.arange(10, 10 + k),
        "steps": torch.full((k,), 5),
        "lr": torch.full((k,), 0.1, dtype=torch.float64),
    }
    return Updates(**{**values, **changes})


def made_delta(soup: Soup, k: int, seed: int) -> Tensor:
    """Made-up updates (k, P) of a plausible size; buffers positive."""
    layout = soup.setup.layout
    delta = 0.1 * normal(seed, k, layout.size, dtype=layout.dtype)
    delta[:, layout.n_params :] = delta[:, layout.n_params :].abs() + 1
    return delta


def play(soup: Soup, cohorts: Sequence[Sequence[str]], seed: int = 0) -> None:
    """Rounds with made-up updates for `cohorts`."""
    for t, cohort in enumerate(cohorts):
        sent = soup.send(cohort)
        soup.fold(make_updates(sent, made_delta(soup, len(cohort), seed + t)))
        soup.commit()
