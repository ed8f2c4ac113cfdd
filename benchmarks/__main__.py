"""Seconds of a round of local training, as ratios to a bare loop in the same run.

The bare loop does the same SGD steps, one client after another, with nothing federated around it.
Runs alternate, since a machine's speed drifts; figures are medians. `python -m benchmarks`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fedmerge import Client, FedAvg, FedMerge, Simulation, Split, Training, load_digits
from fedmerge.data import partition_dirichlet
from fedmerge.merging import ModelSum, block_scores, merge

Round = Callable[[], None]


def bare_loop(clients: list[Client], make: Callable[[], nn.Module], training: Training) -> Round:
    """The reference: a plain PyTorch loop over clients."""
    start = make()
    loss_of = nn.CrossEntropyLoss()

    def one_round() -> None:
        for client in clients:
            model = copy.deepcopy(start)
            optimiser = torch.optim.SGD(model.parameters(), lr=training.lr)
            x, y = client.train.x, client.train.y
            for _ in range(training.epochs):
                for batch in torch.randperm(len(y)).split(training.batch_size):
                    optimiser.zero_grad()
                    loss_of(model(x[batch]), y[batch]).backward()
                    optimiser.step()

    return one_round


def simulated(
    clients: list[Client], make: Callable[[], nn.Module], training: Training, **options: object
) -> Round:
    """One round of the simulator, evaluation left out by never being due."""
    method = options.pop("method", None) or FedAvg()
    simulation = Simulation(
        method, clients, make, training=training, rounds=10**6, evaluate_every=10**6, **options
    )
    rounds = simulation.rounds()

    def one_round() -> None:
        next(rounds)

    return one_round


def w1() -> tuple[list[Client], Callable[[], nn.Module], Training]:
    """Digits, 50 clients by Dirichlet(0.1), an MLP 64-128-64-10, 2 epochs, batches of 32."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    clients = partition_dirichlet(load_digits(), 50, seed=0)
    return list(clients), make, Training(lr=0.05, epochs=2, batch_size=32)


def w2() -> tuple[list[Client], Callable[[], nn.Module], Training]:
    """50 clients of 200 random images 3 x 32 x 32, 100 classes, a CNN of 122k parameters."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(800, 108),
            nn.ReLU(),
            nn.Linear(108, 100),
        )

    draw = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        x = torch.randn(n, 3, 32, 32, generator=draw)
        return Split(x, torch.randint(0, 100, (n,), generator=draw))

    clients = [Client(f"c{i:02d}", split(200), split(2), split(2)) for i in range(50)]
    return clients, make, Training(lr=0.05, epochs=2, batch_size=32)


def alternate(rounds: dict[str, Round], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, after a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in rounds}
    for repeat in range(repeats + 1):
        for name, one_round in rounds.items():
            began = time.perf_counter()
            one_round()
            if repeat:
                taken[name].append(time.perf_counter() - began)
    return taken


def server_step(d: int = 5, k: int = 50, n: int = 6_620_000) -> dict[str, Round]:
    """The server's part of a round at the size of a ResNet-9."""
    draw = torch.Generator().manual_seed(0)
    models = torch.randn(d, n, generator=draw)
    delta = torch.randn(k, n, generator=draw)
    logits = torch.randn(k, d, generator=draw)
    coef = torch.softmax(logits, 1).double()[:, None]

    def update() -> None:
        # In chunks of clients, as a server folds them.
        total = ModelSum.of(d, 1, ((0, n, 0),), n)
        for first in range(0, k, 10):
            total.add(coef[first : first + 10], delta[first : first + 10])
        total.step(models)

    def scores() -> None:
        block_scores(delta, models, ((0, n),))

    def merged() -> None:
        merge(models, logits)

    return {"merge": merged, "scores": scores, "update": update}


def main() -> None:
    """Measure, print a table and write one JSON line per figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    table = Table("workload", "what", "seconds (median)", "of the bare loop", title="one thread")
    lines = []
    for name, workload in (("W1", w1), ("W2", w2)):
        clients, make, training = workload()
        rounds = {
            "bare loop": bare_loop(clients, make, training),
            "sequential": simulated(clients, make, training, execution="sequential"),
            "auto": simulated(clients, make, training),
            "auto, fedmerge": simulated(clients, make, training, method=FedMerge()),
        }
        repeats = arguments.repeats if name == "W1" else max(2, arguments.repeats // 3)
        taken = alternate(rounds, repeats)
        for what, seconds in taken.items():
            pairs = np.array(seconds) / np.array(taken["bare loop"])
            lines.append(
                {
                    "workload": name,
                    "what": what,
                    "seconds": statistics.median(seconds),
                    "ratio": float(np.median(pairs)),
                }
            )
    for what, seconds in alternate(server_step(), arguments.repeats).items():
        lines.append({"workload": "server", "what": what, "seconds": statistics.median(seconds)})
    for line in lines:
        ratio = f"{line['ratio']:.2f}" if "ratio" in line else ""
        table.add_row(str(line["workload"]), str(line["what"]), f"{line['seconds']:.4f}", ratio)
    console.print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
