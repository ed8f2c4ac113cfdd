"""MoE: a gated mixture of experts; the d experts are shared, the gate is the client's own.

Jacobs, Jordan, Nowlan and Hinton, "Adaptive mixtures of local experts", Neural Computation 3, 1991,
with their likelihood -log sum_j g_j(x) p_j(y | x), here with federated experts: averaged over the
clients by numbers of examples as in FedAvg. The gate is a softmax of a linear function of the input
and never leaves the client, so that clients with conflicting labels can use other experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..local import Mixture
from .base import Cost, Local, Setup, Tensors
from .components import Components
from .trainer import Duty, Trainer


@dataclass(frozen=True)
class MoE(Components):
    """A mixture of `d` experts.

    Attributes:
        gate_lr: step of the gate in units of the run's learning rate.
    """

    name: ClassVar[str] = "moe"
    usual: ClassVar[int] = 4
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 1.0, "gate_lr": 0.02}, {"lr": 0.1}, {"lr": 1.0}, {"gate_lr": 0.02},
        {"d": 8, "lr": 1.0}, {"d": 2, "lr": 1.0}, {"gate_lr": 1.0},
    )  # fmt: skip
    gate_lr: float = 0.1

    def __post_init__(self) -> None:
        self._need(d=1, gate_lr=0)

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        d = self.n_models
        gate = d * (setup.n_inputs + 1)
        return Cost(down=d, up=d, client=gate / setup.layout.size, server=d, passes=d)

    def memory(self, setup: Setup, k: int) -> Tensors:
        if not setup.n_inputs:
            raise ConfigError(f"{self.name}: the size of the inputs is not known: pass n_inputs")
        gate = torch.zeros(k, self.n_models, setup.n_inputs + 1, dtype=setup.layout.dtype)
        return {"gate": gate}

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        model = Mixture(message.clone(), gate=memory["gate"].clone())
        gate = model.gate if model.gate is not None else message
        steps = torch.zeros(len(message), dtype=torch.int64)
        for step in trainer.steps():
            steps += step.active
            inputs, real = step.inputs, step.real
            shares = model.log_shares(inputs).transpose(1, 2)
            duty = Duty(shares)
            step.descend(model.rows, trainer.lr, duty)
            excess = torch.where(real[:, None], shares.exp() - duty.made, 0.0)
            rate = self.gate_lr * trainer.lr / real.sum(1).clamp_min(1)
            excess *= rate[:, None, None]
            gate[..., :-1] -= torch.bmm(excess, inputs.flatten(2).to(gate.dtype))
            gate[..., -1] -= excess.sum(2)
        delta = setup.layout.update(message, model.rows)
        return Local(delta, steps, {"gate": gate}, model)

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Mixture:
        return Mixture(message, gate=memory["gate"])
