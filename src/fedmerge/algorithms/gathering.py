"""Methods whose server needs all updates of a round at once, not only their sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Algorithm, Fold, Setup, Tensors, Updates


@dataclass(frozen=True)
class Gathering(Algorithm):
    """Base of methods that keep of each update what `gather` returns, and `renew` from all of it.

    What is kept is put in the order in which the clients joined, so that nothing depends on whose
    update came first. A method with rows of its own keeps the table "place" among them.
    """

    def rows(self, setup: Setup, k: int) -> Tensors:
        return {"place": torch.zeros(k, dtype=torch.int64)}

    def gather(self, setup: Setup, shared: Tensors, rows: Tensors, updates: Updates) -> Tensors:
        """What to keep of k updates until the round ends, each (k, ...)."""
        raise NotImplementedError

    def renew(
        self, setup: Setup, shared: Tensors, seen: Tensors, version: int
    ) -> tuple[Tensors, Tensors]:
        """End the round: new shared state, and new rows of the clients in `seen`, which is what
        was gathered, and their "place"."""
        raise NotImplementedError

    def fold(
        self,
        setup: Setup,
        shared: Tensors,
        rows: Tensors,
        updates: Updates,
        fold: Fold,
        version: int,
    ) -> None:
        fold.parts.append({"place": rows["place"], **self.gather(setup, shared, rows, updates)})

    def commit(
        self, setup: Setup, shared: Tensors, fold: Fold, version: int
    ) -> tuple[Tensors, Tensors]:
        if not fold.parts:
            return shared, {}
        order = fold.gathered("place").argsort()
        seen = {name: fold.gathered(name)[order] for name in fold.parts[0]}
        shared, rows = self.renew(setup, shared, seen, version)
        back = order.argsort()
        return shared, {name: values[back] for name, values in rows.items()}
