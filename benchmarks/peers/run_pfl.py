"""A workload in pfl-research: its simulated backend with federated averaging, in one process.

Run in an environment with `pfl[pytorch]`; see `turns` for who calls it.
"""

from __future__ import annotations

from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from .turns import Turns

turns = Turns()
task = turns.task


class Net(nn.Module):
    """The network with the two methods that pfl asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.body = task.make()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch."""
        self.train()
        turns.steps += 1
        return nn.functional.cross_entropy(self.body(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Asked for in the first round only."""
        return {"examples": Weighted(len(y), len(y))}


class Turn(TrainingProcessCallback):
    """Hands over after each round."""

    def on_train_begin(self, *, model: Any) -> Metrics:
        """Wait for the first round."""
        turns.next()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Wait for the next one."""
        turns.next()
        return False, Metrics()


net = Net()
users = {str(i): PyTorchTensorDataset((x, y), user_id=str(i)) for i, (x, y) in enumerate(task.data)}
data = FederatedDataset(users.__getitem__, get_user_sampler("minimize_reuse", list(users)))
FederatedAveraging().run(
    NNAlgorithmParams(
        central_num_iterations=turns.rounds,
        evaluation_frequency=10**9,
        train_cohort_size=len(users),
        val_cohort_size=0,
    ),
    SimulatedBackend(training_data=data, val_data=data),
    PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0)),
    NNTrainHyperParams(
        local_batch_size=task.batch_size,
        local_num_epochs=task.epochs,
        local_learning_rate=task.lr,
    ),
    callbacks=[Turn()],
    send_metrics_to_platform=False,
)
