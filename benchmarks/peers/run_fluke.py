"""A workload in fluke: its own client, server and federated averaging, in one process.

Run in an environment with `fluke-fl`; see `turns` for who calls it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

try:
    importlib.import_module("torchvision")
except RuntimeError:
    # Built for another torch: its operators are missing. fluke wants its networks and data sets,
    # of which nothing is used here, so that it is enough to declare the operators it looks for.
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.client import Client
from fluke.config import OptimizerConfigurator
from fluke.data import FastDataLoader
from fluke.server import Server
from fluke.utils import FederationObserver

from .turns import Turns

turns = Turns()
task = turns.task


class CountingLoss(nn.CrossEntropyLoss):
    """Cross-entropy; it is called once in every step."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss of a batch."""
        turns.steps += 1
        return super().forward(output, target)


class Turn(FederationObserver):
    """Hands over after each round."""

    def end_round(self, round: int) -> None:  # noqa: A002
        """Wait for the next round."""
        turns.next()


environment = FlukeENV()
environment.set_seed(0)
environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
optimiser = OptimizerConfigurator(DDict(name="SGD", lr=task.lr))


def client(i: int, x: Tensor, y: Tensor) -> Any:
    """One client; batches of a single example are not left out, as elsewhere."""
    loader = FastDataLoader(
        x,
        y,
        num_labels=task.n_classes,
        batch_size=task.batch_size,
        shuffle=True,
        skip_singleton=False,
    )
    return Client(i, loader, None, optimiser, CountingLoss(), local_epochs=task.epochs)


clients = [client(i, x, y) for i, (x, y) in enumerate(task.data)]
server = Server(task.make(), None, clients, weighted=True)
federation = FedAVG(len(clients), None, DDict(), clients=clients, server=server)
federation.set_callbacks([Turn()])
turns.next()
federation.run(turns.rounds, 1.0, finalize=False)
