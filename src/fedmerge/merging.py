"""Merging and learning the merge: pure functions over rows of numbers.

Everything here is about matrices: models (d, P), logits and weights (m, d) or (m, b, d), updates
(k, P). It knows no clients, no rounds and no network.

Signs and units: `delta` = start - end of local training, in parameter units (a pseudo-gradient, so
the models move by minus delta); `scores[i, j]` = <delta_i, models_j>, all that a row's gradient
needs, since <delta_i, models_j - merged_i> = scores_ij - sum_j weights_ij scores_ij.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .errors import ModelError
from .kernels import Segments
from .params import Layout
from .rng import numpy_generator

COLUMNS = 4096
"""Columns worked on at a time."""

_WORD = 0xFFFFFFFF
HUGE = 1e38
"""As good as infinity, with some room for rounding below the largest float32."""

FLOOR = 1e-6
"""Least weight that a row's step starts from, so that an unused model can come back."""


def merging_weights(logits: Tensor) -> Tensor:
    """Softmax over the models: logits (..., d) to weights (..., d), each row summing to 1."""
    return torch.softmax(logits, dim=-1)


def merge(models: Tensor, logits: Tensor, segments: Segments | None = None) -> Tensor:
    """Merge one model for each row: softmax(logits) @ models.

    Args:
        models: (d, P), the global models.
        logits: (k, d), one row per client, unnormalised; or (k, b, d), one per client and block.
        segments: (start, stop, block) triples that cover the P columns; needed with blocks
            (`Layout.segments`).

    Returns:
        (k, P) in the dtype of `models`.

    Raises:
        ModelError: shapes that do not fit.
    """
    return merge_weighted(models, merging_weights(logits), segments)


def merge_weighted(
    models: Tensor,
    weights: Tensor,
    segments: Segments | None = None,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `merge`, from weights (k, d) or (k, b, d) that sum to 1 already.

    Args:
        dtype: of the result, if it is not that of `models`; the sums are made in the wider one.
        out: (k, P) of that dtype, to be written to; saves the time for fresh memory.
    """
    if models.ndim != 2 or weights.ndim not in (2, 3) or weights.shape[-1] != models.shape[0]:
        raise ModelError(
            f"models {tuple(models.shape)} and rows {tuple(weights.shape)} do not fit: "
            "wanted (d, P) and (k, d) or (k, b, d)"
        )
    dtype = dtype or models.dtype
    weights = weights.to(torch.promote_types(dtype, models.dtype))
    if weights.ndim == 2 or weights.shape[1] == 1:
        weights, segments = weights.reshape(-1, 1, models.shape[0]), ((0, models.shape[1], 0),)
    if segments is None:
        raise ModelError("rows with blocks need segments: pass segments=layout.segments")
    if max(block for _, _, block in segments) >= weights.shape[1]:
        raise ModelError(f"segments name more blocks than the rows have ({weights.shape[1]})")
    covered = sum(stop - start for start, stop, _ in segments)
    if covered != models.shape[1]:
        raise ModelError(
            f"segments cover {covered} of {models.shape[1]} columns; pass segments=layout.segments"
        )
    shape = (len(weights), models.shape[1])
    if out is not None and (out.shape != shape or out.dtype != dtype):
        raise ModelError(f"out is {tuple(out.shape)} of {out.dtype}: wanted {shape} of {dtype}")
    merged = kernels.empty(shape, dtype) if out is None else out
    fast = kernels.loops(models.shape[1], weights.dtype, dtype)
    graph = torch.is_grad_enabled() and (models.requires_grad or weights.requires_grad)
    if fast is not None and weights.dtype == dtype and not graph:
        for at, own, cuts in kernels.parts(models, dtype, segments):
            part = merged[:, at].contiguous()
            kernels.call(fast.merge, own, weights.contiguous(), cuts, part)
            if part.data_ptr() != merged[:, at].data_ptr():
                merged[:, at] = part
        return merged
    for start, stop, block in _chunks(segments):
        own = models[:, start:stop].to(weights.dtype)
        if graph or weights.dtype != dtype:
            merged[:, start:stop] = weights[:, block] @ own
        else:
            torch.mm(weights[:, block], own, out=merged[:, start:stop])
    return merged


def merge_rows(
    models: Tensor, weights: Tensor, layout: Layout, out: Tensor | None = None
) -> Tensor:
    """As `merge_weighted`, for a layout's rows, whose counters are whole: the largest is taken."""
    merged = merge_weighted(models, weights, layout.segments, dtype=layout.dtype, out=out)
    if layout.counters.start < layout.counters.stop:
        merged[:, layout.counters] = models[:, layout.counters].amax(0).to(merged.dtype)
    return merged


def _chunks(segments: Segments) -> Iterator[tuple[int, int, int]]:
    """The segments in pieces of so few columns that a piece of all matrices stays in cache."""
    for start, stop, block in segments:
        for first in range(start, stop, COLUMNS):
            yield first, min(first + COLUMNS, stop), block


def block_scores(delta: Tensor, models: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """<delta_i, models_j> over each block of columns: (k, P), (d, P) to (k, b, d), float64."""
    # In float64: an overflow would turn one client's huge update into NaN rows, and those into NaN
    # models for all.
    scores = torch.zeros(len(delta), len(spans), len(models), dtype=torch.float64)
    segments = [(start, stop, block) for block, (start, stop) in enumerate(spans)]
    fast = kernels.loops(models.shape[1], delta.dtype)
    if fast is not None:
        delta = delta.contiguous()
        for at, own, cuts in kernels.parts(models, delta.dtype, segments):
            kernels.call(fast.scores, delta[:, at].contiguous(), own, cuts, scores)
        return scores
    for start, stop, block in _chunks(segments):
        scores[:, block] += delta[:, start:stop].double() @ models[:, start:stop].double().T
    return scores


def finite_rows(delta: Tensor) -> list[bool]:
    """Whether each of k updates (k, ...) is finite in all its numbers."""
    delta = delta.flatten(1)
    fast = kernels.loops(delta.shape[1], delta.dtype)
    if fast is not None:
        found = torch.empty(len(delta), dtype=torch.bool)
        kernels.call(fast.finite, delta.contiguous(), found)
        return [bool(ok) for ok in found]
    # A sum is finite only if every number is, save for overflow: look closer only then.
    sums = torch.isfinite(delta.sum(-1))  # in its own dtype: converted numbers are summed slowly
    return [
        ok or bool(torch.isfinite(row).all()) for ok, row in zip(sums.tolist(), delta, strict=True)
    ]


def row_gradient(weights: Tensor, scores: Tensor) -> Tensor:
    """<delta_i, models_j - merged_i> from scores; both (..., d)."""
    return scores - (weights * scores).sum(-1, keepdim=True)


def eg_row_step(
    logits: Tensor,
    scores: Tensor,
    length: Tensor,
    pace: Tensor,
    *,
    cap: float,
    least: Tensor | None = None,
) -> Tensor:
    """Exponentiated-gradient step of the rows, with a cap on how far a row moves.

    Args:
        logits: (k, b, d), rows before the step.
        scores: (k, b, d), <delta_i, models_j>, best with i's own past taken out of the models.
        length: (k,), how far local training went: learning rate times number of steps.
        pace: (k,), a factor on the capped step: above 1 for rows that were long unseen, below 1 for
            rows that have taken part often.
        cap: largest change of a log-weight before `pace`, in nats.
        least: (k,), least largest change, however flat the gradient, in nats; None for none.

    Returns:
        (k, b, d) normalised log-weights, float64.
    """
    weights = merging_weights(logits.double())
    step = row_gradient(weights, scores) / length[:, None, None]
    largest = step.abs().amax(-1, keepdim=True)
    # Division, not clamping: the direction of the step is kept.
    step = step * (cap / largest.clamp_min(cap)) * pace[:, None, None]
    if least is not None and bool((least > 0).any()):
        largest = step.abs().amax(-1, keepdim=True)
        # Without a gradient there is no direction to go in.
        step = step * (least[:, None, None] / largest.clamp_min(1e-300)).clamp_min(1.0)
    return torch.log_softmax(weights.clamp_min(FLOOR).log() - step, dim=-1)


def model_pace(cohort: Tensor, others: Tensor) -> Tensor:
    """How far each model goes towards what a round's clients would have it be, (b, d).

    A model that they use less than all clients do is moved by few, and not by those it is for: it
    goes the root of that share of the way. Then all paces are scaled so that the clients of the
    round see their models move as far as without. 1 if nobody else is known.

    Args:
        cohort: (k, b, d) merging weights of the round's clients. others: (n, b, d) of the rest.
    """
    used = cohort.mean(0)
    if not len(others):
        return torch.ones_like(used)
    by_all = (cohort.sum(0) + others.sum(0)) / (len(cohort) + len(others))
    pace = (used / by_all.clamp_min(1e-300)).clamp(max=1.0).sqrt()
    return pace / (pace * used).sum(-1, keepdim=True).clamp_min(1e-300)


def paper_row_step(
    logits: Tensor, scores: Tensor, n_examples: Tensor, *, logit_step: float
) -> Tensor:
    """Row step of the authors' published code: the whole cohort is scaled together.

    The gradient, normalised by its sum of magnitudes over the cohort, is stepped in multiples of
    0.01 n_i / n until some logit has moved by more than `logit_step`. With one model, or all
    gradients zero, nothing moves (the published code divides zero by zero).

    Args:
        logits: (k, d). scores: (k, d). n_examples: (k,).
    """
    weights = merging_weights(logits)
    gradient = weights * row_gradient(weights, scores.to(logits.dtype))
    total = gradient.abs().sum()
    if not total > 0:
        return logits.clone()
    share = (n_examples / n_examples.sum()).to(logits.dtype)
    step = 0.01 * share[:, None] * gradient / total
    repeats = torch.floor(logit_step / step.abs().max()) + 1
    return logits - repeats.clamp(max=10001) * step


def paper_server_step(
    models: Tensor,
    logits: Tensor,
    delta: Tensor,
    n_examples: Tensor,
    *,
    logit_step: float,
    head_start: int,
) -> tuple[Tensor, Tensor]:
    """One server step of the reference rule (method of the FedMerge paper, as its code does it).

    Rows move first, judged by the last layer only; then the models, by the new rows.

    Args:
        models: (d, P). logits: (k, d). delta: (k, P), start - end. n_examples: (k,).
        logit_step: how far the fastest logit moves at least, if the step limit allows.
        head_start: column where the last linear layer begins.

    Returns:
        (models, logits), new tensors of the same shapes and dtypes.
    """
    scores = block_scores(delta, models, [(head_start, models.shape[1])])[:, 0]
    logits = paper_row_step(logits, scores, n_examples, logit_step=logit_step)
    total = ModelSum.of(models.shape[0], 1, ((0, models.shape[1], 0),), models.shape[1])
    share = n_examples.double()[:, None, None] / n_examples.sum()
    total.add(share * merging_weights(logits.double())[:, None], delta)
    return total.step(models), logits


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
        for start, stop, block in () if fast else _chunks(self.segments):
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
        for start, stop, block in () if fast else _chunks(self.segments):
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
