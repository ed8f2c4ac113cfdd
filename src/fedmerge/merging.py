"""Merging and learning the merge: pure functions over rows of numbers.

Everything here is about matrices: models (d, P), logits and weights (m, d) or (m, b, d), updates
(k, P). It knows no clients, no rounds and no network.

Signs and units: `delta` = start - end of local training, in parameter units (a pseudo-gradient, so
the models move by minus delta); `scores[i, j]` = <delta_i, models_j>, all that a row's gradient
needs, since <delta_i, models_j - merged_i> = scores_ij - sum_j weights_ij scores_ij.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from . import kernels
from .errors import ModelError
from .kernels import Segments
from .params import Layout
from .sums import ModelSum, chunks

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
        ModelError: shapes, dtypes or segments that do not fit.
    """
    for name, rows in (("models", models), ("logits", logits)):
        if not rows.is_floating_point():
            raise ModelError(
                f"{name} of dtype {rows.dtype}: wanted a floating one, e.g. {name}.float()"
            )
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
    _check_segments(segments, models.shape[1], weights.shape[1])
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
    for start, stop, block in chunks(segments):
        own = models[:, start:stop].to(weights.dtype)
        if graph or weights.dtype != dtype:
            merged[:, start:stop] = weights[:, block] @ own
        else:
            torch.mm(weights[:, block], own, out=merged[:, start:stop])
    return merged


def _check_segments(segments: Segments, size: int, blocks: int) -> None:
    """Raise ModelError unless each of `size` columns is in one segment, of one of the blocks."""
    end = 0
    for start, stop, block in sorted(segments, key=itemgetter(0, 1)):
        if not 0 <= block < blocks:
            raise ModelError(f"segments name block {block}: the rows have {blocks}, from 0")
        if start != end or stop < start:
            raise ModelError(
                f"segment {start} to {stop} where column {end} is next: wanted each column once; "
                "pass segments=layout.segments"
            )
        end = stop
    if end != size:
        raise ModelError(f"segments cover {end} of {size} columns; pass segments=layout.segments")


def merge_rows(
    models: Tensor, weights: Tensor, layout: Layout, out: Tensor | None = None
) -> Tensor:
    """As `merge_weighted`, for a layout's rows, whose counters are whole: the largest is taken."""
    merged = merge_weighted(models, weights, layout.segments, dtype=layout.dtype, out=out)
    if layout.counters.start < layout.counters.stop:
        merged[:, layout.counters] = models[:, layout.counters].amax(0).to(merged.dtype)
    return merged


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
    for start, stop, block in chunks(segments):
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
