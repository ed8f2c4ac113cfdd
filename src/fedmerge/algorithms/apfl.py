"""APFL: a client's model is a mixture a v + (1 - a) w of a personal model v and the global one w.

Deng, Kamani and Mahdavi, "Adaptive personalized federated learning", 2020 (arXiv 2003.13461),
algorithm 1, and the gradient step of the mixing weight, once in a round as in the authors' code.
That code also shrinks the weight (it adds 0.02 a to the slope); the paper does not, nor does this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import Algorithm, Cost, Local, Setup, Tensors
from .trainer import Trainer


@dataclass(frozen=True)
class APFL(Algorithm):
    """APFL.

    Local steps are plain SGD at the run's learning rate, without its momentum, decay or clipping.

    Attributes:
        alpha: share of the personal model in a client's mixture; where it starts, if adaptive.
        adaptive: whether each client's share is learned, in [0, 1]. On a client's own training data
            the personal model is always the better one, so shares go to 1 within some rounds.
    """

    name: ClassVar[str] = "apfl"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"alpha": 0.1}, {"alpha": 0.5}, {"lr": 0.5}, {"lr": 0.1}, {"alpha": 0.75},
        {"alpha": 0.1, "lr": 0.5}, {"adaptive": True}, {"adaptive": True, "lr": 0.03},
    )  # fmt: skip
    alpha: float = 0.25
    adaptive: bool = False

    def __post_init__(self) -> None:
        self._need()
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"{self.name}: alpha = {self.alpha}: wanted 0 to 1")

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        return Cost(client=1 + 1 / setup.layout.size, passes=2)

    def memory(self, setup: Setup, k: int) -> Tensors:
        first = setup.initial(0)
        return {"model": first.repeat(k, 1), "alpha": first.new_full((k, 1), self.alpha)}

    def _mixed(self, setup: Setup, memory: Tensors, received: Tensor) -> Tensor:
        """(k, P) a v + (1 - a) w; buffers, which are no parameters to be mixed, are those of v."""
        mixed = memory["model"].clone()
        n = setup.layout.n_params
        mixed[:, :n] = torch.lerp(received[:, :n], mixed[:, :n], memory["alpha"])
        return mixed

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        return self._mixed(setup, memory, message[:, 0])

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        n, lr = setup.layout.n_params, trainer.lr
        own, alpha = memory["model"].clone(), memory["alpha"]
        received = message[:, 0].clone()
        count = torch.zeros(len(own), dtype=torch.int64)
        for step in trainer.steps():
            mixed = self._mixed(setup, {"model": own, "alpha": alpha}, received)
            at_mixed = step.gradient(mixed)
            slope = None
            if self.adaptive and not count.any():
                slope = ((own - received)[:, :n] * at_mixed).sum(1, keepdim=True)
            step.descend(received, lr)
            own[:, :n].addcmul_(at_mixed, lr * alpha, value=-1)
            own[:, n:] = mixed[:, n:]
            if slope is not None:
                alpha = (alpha - lr * slope).clamp(0.0, 1.0)
            count += step.active
        kept = {"model": own, "alpha": alpha}
        mixture = self._mixed(setup, kept, received)
        return Local(setup.layout.update(message[:, 0], received), count, kept, mixture)
