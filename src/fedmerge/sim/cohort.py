"""Which clients a round is about: who is sampled, who fails to reply, whose models are evaluated.

Drawn from (seed, round) and client ids alone, so neither the order of the clients nor the past of
a run matters; what happens to those drawn is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..rng import numpy_generator


@dataclass(frozen=True)
class Draws:
    """The draws of a run; clients are given by their places in `ids`.

    Attributes:
        participation, evaluate_on: share of the clients in a cohort, and in an evaluation; at least
            one client, for an evaluation two (one has no spread).
        dropout: chance that a client of the cohort never replies.
    """

    ids: tuple[str, ...]
    seed: int
    participation: float = 1.0
    dropout: float = 0.0
    evaluate_on: float = 1.0

    @cached_property
    def _by_id(self) -> list[int]:
        return sorted(range(len(self.ids)), key=self.ids.__getitem__)

    @property
    def size(self) -> int:
        """Clients in a cohort."""
        return max(1, round(self.participation * len(self.ids)))

    def cohort(self, number: int) -> list[int]:
        """The clients sampled for round `number`."""
        return self._some("cohort", number, self.size)

    def drops(self, number: int, place: int) -> bool:
        """Whether a client of the cohort of round `number` fails to reply."""
        if not self.dropout:
            return False
        draw = numpy_generator(self.seed, "dropout", number, self.ids[place])
        return draw.random() < self.dropout

    def evaluated(self, number: int) -> Sequence[int]:
        """The clients evaluated after round `number`."""
        m = len(self.ids)
        return self._some("evaluate", number, min(m, max(2, round(self.evaluate_on * m))))

    def _some(self, purpose: str, number: int, k: int) -> list[int]:
        m = len(self.ids)
        if k == m:
            return self._by_id
        drawn = numpy_generator(self.seed, purpose, number).choice(m, k, replace=False)
        return [self._by_id[i] for i in np.sort(drawn)]
