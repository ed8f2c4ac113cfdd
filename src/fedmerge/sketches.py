"""Long rows kept in few numbers: count-sketches, and whole multiples of a unit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .rng import numpy_generator

COLUMNS = 4096
"""Columns worked on at a time."""
HUGE = 1e38
"""As good as infinity, with some room for rounding below the largest float32."""


@dataclass(frozen=True)
class Sketch:
    """Count-sketch of each block into `size` numbers: inner products are kept without bias.

    A block's columns are cut into chunks of `size`; each is turned round by a number of places,
    given signs, and added to the others. Places and signs are drawn from the run's seed. Any two
    numbers of a chunk have different places, and two of different chunks the same one with chance
    1 / size, as in Charikar, Chen and Farach-Colton (2002), where every number has a place of its
    own: so the error is no larger, and memory is read in order. A block no longer than `size` keeps
    every number, so it is exact.
    """

    size: int
    spans: tuple[tuple[int, int], ...]
    turn: tuple[Tensor, ...]  # per block (chunks,) int64, from 0 to size - 1
    sign: tuple[Tensor, ...]  # per block (columns,) int8: -1 or 1

    @staticmethod
    @lru_cache(maxsize=8)
    def of(spans: tuple[tuple[int, int], ...], size: int, seed: int) -> Sketch:
        """Draw the turns and signs for blocks at `spans`."""
        turn, sign = [], []
        for block, (start, stop) in enumerate(spans):
            draw = numpy_generator(seed, "sketch", block)
            turn.append(torch.from_numpy(draw.integers(0, size, -(-(stop - start) // size))))
            coins = draw.integers(0, 2, stop - start, dtype=np.int8)
            sign.append(torch.from_numpy(2 * coins - 1))
        return Sketch(size, spans, tuple(turn), tuple(sign))

    def __call__(self, delta: Tensor) -> Tensor:
        """Sketch delta (k, P) to (k, b, size), in its dtype but float32 at least."""
        # Sums of half-precision numbers would overflow and lose digits.
        dtype = torch.promote_types(delta.dtype, torch.float32)
        k = len(delta)
        made = torch.zeros(len(self.spans), k, self.size, dtype=dtype)
        fast = kernels.loops(delta.shape[1], delta.dtype)
        if fast is not None:
            delta = delta.contiguous()
        # Whole chunks of a piece that stays in cache.
        most = max(1, COLUMNS // self.size) * self.size
        for block, (start, stop) in enumerate(self.spans):
            turn, sign = self.turn[block], self.sign[block]
            if fast is not None:
                kernels.call(fast.sketch, delta, sign, turn, start, self.size, made[block])
                continue
            for first in range(0, stop - start, most):
                last = min(first + most, stop - start)
                signed = delta[:, start + first : start + last].to(dtype) * sign[first:last]
                there = turn[first // self.size : -(-last // self.size), None]
                padded = torch.nn.functional.pad(
                    signed, (0, there.numel() * self.size - last + first)
                )
                source = (torch.arange(self.size) - there) % self.size
                chunks = padded.view(k, -1, self.size)
                made[block] += chunks.gather(2, source.expand(k, -1, -1)).sum(1)
        return made.transpose(0, 1).contiguous()


def in_units(values: Tensor, kept: torch.dtype = torch.int16) -> tuple[Tensor, Tensor]:
    """Numbers (..., n) as whole multiples, of dtype `kept`, of a unit (...), one for each row.

    Each is off by half a unit at most: 1 / 65534 of the largest in its row with 16 bits, 1 / 254
    with 8. Infinity becomes a large number.
    """
    largest = values.abs().amax(-1)
    if not bool((largest < HUGE).all()):
        values = values.nan_to_num().clamp(-HUGE, HUGE)
        largest = values.abs().amax(-1)
    unit = largest / torch.iinfo(kept).max
    scaled = values / torch.where(unit > 0, unit, 1.0)[..., None]
    return scaled.round_().to(kept), unit


def from_units(whole: Tensor, unit: Tensor) -> Tensor:
    """What `in_units` was given, in the unit's dtype."""
    return whole * unit[..., None]
