"""FedFomo: a client is sent others' models and moves towards those that do well on its own data.

Zhang, Sapra, Fidler, Yeung and Alvarez, "Personalized federated learning with first order model
optimization", ICLR 2021. With theta the client's model before its last local training, a model
theta_n weighs w_n = (L(theta) - L(theta_n)) / ||theta_n - theta||, L on validation data; the
client moves to theta + sum_n max(w_n, 0) (theta_n - theta) / sum_n max(w_n, 0), and then trains.
The server adds the w_n up in an affinity matrix and sends each client the models of largest
affinity, now and then a random one instead (epsilon-greedy).

Deviations: the client's own trained model always counts among the theta_n and is not sent back to
it; a client without validation data uses its training data; models of clients that have never taken
part are sent only where there are no others. The server keeps all clients' models: O(m P).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..rng import numpy_generators
from .base import Cost, Local, Setup, Tensors, Updates
from .gathering import Gathering
from .trainer import Trainer


@dataclass(frozen=True)
class FedFomo(Gathering):
    """FedFomo.

    Attributes:
        others: models of others that a client is sent; None: 5, or as many as there are.
        epsilon: chance that a random model is sent in place of one of high affinity.
        decay: by how much epsilon falls in a round, to 0.
    """

    name: ClassVar[str] = "fedfomo"
    grid: ClassVar[Sequence[Mapping[str, object]]] = (
        {"others": 10}, {"lr": 0.1}, {"lr": 0.5}, {"decay": 0.0}, {"others": 10, "decay": 0.0},
        {"others": 2},
    )  # fmt: skip
    others: int | None = None
    epsilon: float = 0.3
    decay: float = 0.05

    def __post_init__(self) -> None:
        self._need(others=0, epsilon=0, decay=0)
        if self.epsilon > 1:
            raise ConfigError(f"{self.name}: epsilon = {self.epsilon}: wanted 1 or less")

    def resolve(self, n_clients: int | None) -> Self:
        most = 5 if self.others is None else self.others
        return replace(self, others=most if n_clients is None else min(most, n_clients - 1))

    def cost(self, setup: Setup, n_clients: int, epochs: int) -> Cost:
        per_client = 1 + n_clients / setup.layout.size
        return Cost(down=self.others or 0, client=2, server=1, server_per_client=per_client)

    def shared(self, setup: Setup) -> Tensors:
        return {
            "initial": setup.initial(0)[None],
            "models": setup.initial(0)[:0].reshape(0, setup.layout.size),
            "affinity": torch.zeros(0, 0),
            "seen": torch.zeros(0, dtype=torch.bool),
            "round": torch.zeros(1, dtype=torch.int64),
        }

    def memory(self, setup: Setup, k: int) -> Tensors:
        return {name: setup.initial(0).repeat(k, 1) for name in ("before", "trained")}

    def _chosen(self, setup: Setup, shared: Tensors, rows: Tensors) -> Tensor:
        """(k, others) places of those whose models are sent; -1 where there is nobody."""
        seen, number = shared["seen"].numpy(), int(shared["round"])
        most = self.others or 0
        epsilon = max(0.0, self.epsilon - self.decay * number)
        chosen = np.full((len(rows["place"]), most), -1)
        places = rows["place"].tolist()
        draws = numpy_generators(setup.seed, (("others", number, place) for place in places))
        known, affinity = np.flatnonzero(seen), shared["affinity"].numpy()
        for i, (place, draw) in enumerate(zip(places, draws, strict=True)):
            there = draw.permutation(known[known != place])
            if place < len(seen):
                # Stable: of equal affinity, those first in the permutation.
                there = there[np.argsort(-affinity[place, there], kind="stable")]
            best, rest = there[:most].copy(), there[most:]
            explored = np.flatnonzero(draw.random(len(best)) < epsilon)[: len(rest)]
            if len(explored):
                best[explored] = draw.permutation(rest)[: len(explored)]
            chosen[i, : len(best)] = best
        return torch.from_numpy(chosen)

    def send(self, setup: Setup, shared: Tensors, rows: Tensors, k: int) -> Tensor:
        every = torch.cat([shared["models"], shared["initial"]])
        chosen = self._chosen(setup, shared, rows) % len(every)  # -1, nobody: the initial model
        return every.index_select(0, chosen.flatten()).view(*chosen.shape, every.shape[1])

    def _moved(
        self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer
    ) -> tuple[Tensor, Tensor]:
        """The client's new model (k, P), and w (k, others + 1), own trained model last."""
        layout = setup.layout
        before = memory["before"]
        models = torch.cat([message, memory["trained"][:, None]], dim=1)
        losses = [_loss(one, trainer) for one in (before, *models.unbind(1))]
        gain = losses[0][:, None] - torch.stack(losses[1:], dim=1)
        apart = (models - before[:, None])[..., : layout.n_params].norm(dim=2).double()
        # A model that has diverged gains nothing; one that is the client's own is no direction.
        w = torch.where(gain.isfinite() & (apart > 0), gain / apart.clamp_min(1e-12), 0.0)
        share = w.clamp_min(0)
        total = share.sum(1, keepdim=True)
        share = (share / torch.where(total > 0, total, 1.0)).to(before.dtype)
        stay = (1 - share.sum(1, keepdim=True)).clamp_min(0)
        moved = torch.einsum("kr,krp->kp", share, models) + stay * before
        counters = layout.counters
        moved[:, counters] = memory["trained"][:, counters]
        return moved, w

    def local(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Local:
        start, w = self._moved(setup, message, memory, trainer)
        end, steps = trainer.fit(start)
        # The server does not know where the client started from: the whole model is sent.
        delta = setup.layout.update(torch.zeros_like(end), end)
        return Local(delta, steps, {"before": start, "trained": end}, end, {"gain": w[:, :-1]})

    def personal(self, setup: Setup, message: Tensor, memory: Tensors, trainer: Trainer) -> Tensor:
        return self._moved(setup, message, memory, trainer)[0]

    def fits(self, shared: Tensors, extra: Tensors) -> bool:
        gain = extra.get("gain")
        if gain is None or gain.shape != (self.others or 0,):
            return False
        return gain.dtype == torch.float64 and bool(gain.isfinite().all())

    def gather(self, setup: Setup, shared: Tensors, rows: Tensors, updates: Updates) -> Tensors:
        return {
            "end": setup.layout.end(torch.zeros_like(updates.delta), updates.delta),
            "chosen": self._chosen(setup, shared, rows),
            "gain": updates.extra["gain"],
        }

    def renew(
        self, setup: Setup, shared: Tensors, seen: Tensors, version: int
    ) -> tuple[Tensors, Tensors]:
        place, chosen = seen["place"], seen["chosen"]
        m = max(len(shared["models"]), int(place.max()) + 1)
        models = shared["initial"].repeat(m, 1)
        models[: len(shared["models"])] = shared["models"]
        models[place] = seen["end"]
        affinity = torch.zeros(m, m)
        old = len(shared["affinity"])
        affinity[:old, :old] = shared["affinity"]
        known = chosen >= 0
        gain = seen["gain"][known].float()
        affinity[place[:, None].expand_as(chosen)[known], chosen[known]] += gain
        met = torch.zeros(m, dtype=torch.bool)
        met[:old] = shared["seen"]
        met[place] = True
        made = {"models": models, "affinity": affinity, "seen": met}
        return {**shared, **made, "round": shared["round"] + 1}, {}


def _loss(rows: Tensor, trainer: Trainer) -> Tensor:
    found = trainer.loss(rows, split="validation")
    return torch.where(found.isnan(), trainer.loss(rows), found) if found.isnan().any() else found
