"""How the models move: by the sum of a round's updates.

As in `merging`, which says what the letters mean, everything is about matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from . import kernels
from .kernels import Segments
from .params import Layout

COLUMNS = 4096
"""Columns worked on at a time."""

_WORD = 0xFFFFFFFF


def chunks(segments: Segments) -> Iterator[tuple[int, int, int]]:
    """The segments in pieces of so few columns that a piece of all matrices stays in cache."""
    for start, stop, block in segments:
        for first in range(start, stop, COLUMNS):
            yield first, min(first + COLUMNS, stop), block


@dataclass
class ModelSum:
    """sum_i coef_ibj delta_i and sum_i coef_ibj over a round, in float64: the model step's parts.

    An accumulator of one round: `add` changes it in place. Any chunking and order of `add` gives
    the same sums to float64 rounding. Memory O(d P), whatever the number of clients.
    """

    total: Tensor  # (d, P) float64
    mass: Tensor  # (b, d) float64
    counters: Tensor  # (c,) largest value of each integer counter
    segments: Segments
    n_params: int
    out: Callable[[], Tensor] | None = None  # makes what the step is written to
    pace: Tensor | None = None  # (b, d) factors on the steps of the models' parameters
    salt: int | None = None  # rounds the step to bfloat16 by chance; None: to nearest

    @classmethod
    def of(
        cls,
        d: int,
        blocks: int,
        segments: Segments,
        n_params: int,
        counters: int = 0,
        total: Tensor | None = None,
    ) -> Self:
        """An empty sum for d models over `segments` in `blocks` blocks; `total` holds zeros."""
        size = segments[-1][1]
        return cls(
            kernels.empty((d, size), torch.float64).zero_() if total is None else total,
            torch.zeros(blocks, d, dtype=torch.float64),
            torch.full((counters,), -torch.inf, dtype=torch.float64),
            segments,
            n_params,
        )

    @classmethod
    def for_layout(cls, layout: Layout, d: int, total: Tensor | None = None) -> Self:
        """An empty sum of d rows of `layout`."""
        n_counters = layout.counters.stop - layout.counters.start
        return cls.of(d, len(layout.blocks), layout.segments, layout.n_params, n_counters, total)

    def add(self, coef: Tensor, delta: Tensor) -> None:
        """Add clients: coef (k, b, d) or (k, 1, d) float64, not negative; delta (k, P)."""
        coef = coef.expand(-1, len(self.mass), -1)
        fast = kernels.loops(self.total.shape[1], delta.dtype)
        if fast is not None:
            cuts = kernels.table(self.segments)
            kernels.call(fast.add, coef.contiguous(), delta.contiguous(), cuts, self.total)
        for start, stop, block in () if fast else chunks(self.segments):
            self.total[:, start:stop].addmm_(coef[:, block].T, delta[:, start:stop].double())
        self.mass += coef.sum(0)
        if len(self.counters):
            last = delta[:, -len(self.counters) :].double()
            self.counters = torch.maximum(self.counters, last.amax(0))

    def join(self, other: Self) -> None:
        """Add what another sum of the same round, over other clients, has gathered."""
        self.total += other.total
        self.mass += other.mass
        self.counters = torch.maximum(self.counters, other.counters)

    def step(self, models: Tensor) -> Tensor:
        """Return models (d, P) moved by minus the weighted mean of delta; unused models stay.

        Buffers become the weighted mean of the clients' end values, counters their largest value.
        """
        moved = kernels.empty(models.shape, models.dtype) if self.out is None else self.out()
        fast = kernels.loops(models.shape[1], models.dtype)
        if fast is not None:
            # No segment may hold both parameters and buffers, which have masses of their own.
            n, size, b = self.n_params, models.shape[1], len(self.mass)
            tail = [
                (n + s, n + e, b + block) for s, e, block in kernels.cut(self.segments, n, size)
            ]
            cuts = kernels.table([*kernels.cut(self.segments, 0, n), *tail])
            paced = self.mass if self.pace is None else self.mass / self.pace
            own = models.contiguous()
            kernels.call(fast.step, own, self.total, torch.cat([paced, self.mass]), cuts, n, moved)
        for start, stop, block in () if fast else chunks(self.segments):
            mass = self.mass[block][:, None]
            used = mass > 0
            values = self.total[:, start:stop] / torch.where(used, mass, 1.0)
            own = models[:, start:stop]
            n = max(0, min(stop, self.n_params) - start)  # of these columns, parameters
            if self.pace is not None:
                values[:, :n] *= self.pace[block][:, None]
            torch.sub(own[:, :n], values[:, :n], out=values[:, :n])
            if not used.all():
                values = torch.where(used, values, own.double())
            if self.salt is not None and models.dtype == torch.bfloat16:
                moved[:, start:stop] = by_chance(values, start, self.salt)
            else:
                moved[:, start:stop] = values.to(models.dtype)
        if len(self.counters):
            own = models[:, -len(self.counters) :].double()
            moved[:, -len(self.counters) :] = torch.maximum(own, self.counters).to(models.dtype)
        return moved


def by_chance(values: Tensor, first: int, salt: int) -> Tensor:
    """Round (d, n) to bfloat16, up or down with the chances that keep the mean.

    The chances are a hash of the value, its place (row, `first` + column) and `salt`.
    """
    narrow = values.float()
    bits = narrow.view(torch.int32).long() & _WORD
    d, n = bits.shape
    mixed = bits * 0x9E3779B1 + torch.arange(first, first + n) * 0x85EBCA77
    mixed = mixed + ((torch.arange(d) + 1) * 0xC2B2AE3D + salt)[:, None] & _WORD
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        mixed = (mixed ^ mixed >> shift) * factor & _WORD
    # A bfloat16 is the upper half of a float32.
    up = (bits + (mixed & 0xFFFF)) & 0xFFFF0000
    rounded = torch.where(up < 2**31, up, up - 2**32).to(torch.int32).view(torch.float32)
    return torch.where(narrow.isfinite(), rounded, narrow).to(torch.bfloat16)
