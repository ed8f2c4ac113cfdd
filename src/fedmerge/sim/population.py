"""All clients of a simulation and their examples, in memory or in their files.

It hands out examples group by group; what is done with them is decided elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch

from ..data.clients import Client, Split
from ..data.stored import StoredSplit
from ..local import Examples
from .log import SPLITS


@dataclass(frozen=True)
class Population:
    """All clients.

    Attributes:
        ids: in the order in which the simulation was given the clients.
        splits: the examples of all clients in one pool, by split; without the examples if they stay
            in their files.
        stored: three splits for each client in that case.
    """

    ids: tuple[str, ...]
    splits: dict[str, Examples]
    stored: tuple[tuple[Split, ...], ...] | None = None

    @classmethod
    def of(cls, clients: Sequence[Client]) -> Population:
        """Pool the clients' data, which are copied once: each client's splits side by side.

        If some are in files, nothing is pooled: a group's data are read when they are used.
        """
        return cls._of(
            tuple(c.id for c in clients), [tuple(split for _, split in c.splits()) for c in clients]
        )

    @classmethod
    def _of(cls, ids: tuple[str, ...], parts: Sequence[tuple[Split, ...]]) -> Population:
        if not any(isinstance(split, StoredSplit) for split in chain(*parts)):
            return cls(ids, _by_split([(s.x, s.y) for s in chain(*parts)], len(SPLITS)))
        count = np.array([[len(split) for split in own] for own in parts], dtype=np.int64)
        none = torch.empty(0)
        splits = {
            name: Examples(none, none, np.zeros_like(count[:, i]), count[:, i])
            for i, name in enumerate(SPLITS)
        }
        return cls(ids, splits, tuple(parts))

    def take(self, places: Sequence[int]) -> Population:
        """Some of the clients alone, with a copy of their data."""
        ids = tuple(self.ids[i] for i in places)
        if self.stored is not None:
            return self._of(ids, [self.stored[i] for i in places])
        data = [
            (split.x[start : start + count], split.y[start : start + count])
            for i in places
            for split in self.splits.values()
            for start, count in [(split.start[i], split.count[i])]
        ]
        return Population(ids, _by_split(data, len(SPLITS)))

    def examples(self, places: Sequence[int], *names: str) -> list[Examples]:
        """Splits of the clients at `places`, all in one pool."""
        if self.stored is None:
            at = np.array(places, dtype=np.int64)
            return [self.splits[name].take(at) for name in names]
        own = [self.stored[i][SPLITS.index(name)] for i in places for name in names]
        return list(_by_split([(s.x, s.y) for s in own], len(names)).values())

    @cached_property
    def digest(self) -> str:
        """A digest of all numbers, the same wherever they are."""
        made = hashlib.blake2b(digest_size=8)
        if self.stored is None:
            pool = self.splits["train"]
            parts = iter((pool.x, pool.y))
        else:
            splits = [*chain(*self.stored)]
            parts = chain((s.x for s in splits), (s.y for s in splits))
        for part in parts:
            made.update(part.contiguous().view(torch.uint8).numpy().data)
        return made.hexdigest()

    def summary(self) -> dict[str, Any] | None:
        """What tells these clients from others, as plain JSON: a digest of who has how many and
        which labels, and sums of inputs and targets, which processors may round otherwise. None
        where examples stay in their files, all of which would have to be read for it."""
        if self.stored is not None:
            return None
        pool = self.splits["train"]
        made = hashlib.blake2b("\n".join(self.ids).encode(), digest_size=8)
        for split in self.splits.values():
            made.update(split.count.astype("<i8").tobytes())
        values = [pool.x]
        if pool.y.is_floating_point():
            values.append(pool.y)
        else:
            made.update(pool.y.numpy().astype("<i8").tobytes())
        sums = [float(part.sum(dtype=torch.float64)) for part in values]
        sizes = [float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in values]
        return {"digest": made.hexdigest(), "sums": sums, "sizes": sizes}

    def groups(self, places: Sequence[int], most: int) -> Iterator[list[int]]:
        """Divide clients into groups of at most `most` that are of similar size, the same whatever
        order they come in.

        All groups have the same number of clients, or one less: workers share them evenly.
        """
        count = self.splits["train"].count
        ordered = sorted(places, key=lambda i: (-count[i], self.ids[i]))
        n_groups = -(-len(ordered) // most)  # none of no clients: a shard may have nothing to do
        bounds = [len(ordered) * i // max(n_groups, 1) for i in range(n_groups + 1)]
        for first, last in pairwise(bounds):
            yield ordered[first:last]


def _by_split(data: Sequence[tuple[torch.Tensor, torch.Tensor]], each: int) -> dict[str, Examples]:
    """One pool of `each` splits of one client after the other, seen split by split."""
    pooled = Examples.of(data)
    return {
        name: Examples(pooled.x, pooled.y, pooled.start[i::each], pooled.count[i::each])
        for i, name in enumerate(SPLITS[:each])
    }
