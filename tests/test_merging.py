"""Merging, row steps and the sketch as mathematics: properties, closed forms, literal formulas.

The published rule's golden numbers are in `test_parity`; whole rounds are in other files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core_fixture import equal, made_delta, make_updates, net, norm_net, normal, run, soup_tensors
from fedmerge import Simulation, Training, make_model
from fedmerge.algorithms import FedMerge, make_method
from fedmerge.config import load_config
from fedmerge.errors import ModelError
from fedmerge.merging import (
    FLOOR,
    block_scores,
    eg_row_step,
    merge,
    merge_weighted,
    merging_weights,
    row_gradient,
)
from fedmerge.params import Layout
from fedmerge.sketches import HUGE, Sketch, from_units, in_units
from fedmerge.soup import Soup
from fedmerge.sums import ModelSum
from rule_by_hand import RuleByHand

F64 = torch.float64
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 6)
SEGMENTS = ((0, 3, 0), (3, 8, 1), (8, 10, 0))


def f64(seed: int, *shape: int) -> Tensor:
    return normal(seed, *shape, dtype=F64)


def near(a: Tensor, b: Tensor, tol: float = 1e-12) -> bool:
    scale = float(b.abs().max()) if b.numel() else 1.0
    return a.shape == b.shape and bool(((a - b).abs() <= tol * max(scale, 1e-300)).all())


# -- merging --------------------------------------------------------------------------------------


@given(seeds, sizes, sizes)
def test_a_one_hot_row_returns_that_model(seed: int, k: int, d: int) -> None:
    models = normal(seed, d, 7)
    choice = torch.arange(k) % d
    one_hot = torch.nn.functional.one_hot(choice, d)
    assert torch.equal(merge_weighted(models, one_hot), models[choice])
    logits = torch.where(one_hot.bool(), 0.0, -torch.inf)
    assert torch.equal(merge(models, logits), models[choice])


@given(seeds, sizes, sizes, st.floats(0, 300))
def test_rows_sum_to_one_and_are_not_negative(seed: int, k: int, d: int, spread: float) -> None:
    weights = merging_weights(spread * f64(seed, k, 2, d))
    assert near(weights.sum(-1), torch.ones(k, 2, dtype=F64))
    assert bool((weights >= 0).all())


@given(seeds, sizes, sizes)
def test_permuting_the_models_permutes_the_columns(seed: int, k: int, d: int) -> None:
    models, logits = f64(seed, d, 10), f64(seed + 1, k, 2, d)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(d))
    mixed = merge(models[order], logits[..., order], SEGMENTS)
    assert near(mixed, merge(models, logits, SEGMENTS))


@given(seeds, sizes, sizes)
def test_merging_with_blocks_is_merging_each_block_by_hand(seed: int, k: int, d: int) -> None:
    models, logits = f64(seed, d, 10), f64(seed + 1, k, 2, d)
    merged = merge(models, logits, SEGMENTS)
    weights = torch.softmax(logits, -1)
    for start, stop, block in SEGMENTS:
        for i in range(k):
            by_hand = sum(weights[i, block, j] * models[j, start:stop] for j in range(d))
            assert near(merged[i, start:stop], by_hand)
    same = logits[:, :1].expand(-1, 2, -1)
    assert near(merge(models, same, SEGMENTS), merge(models, logits[:, 0]))
    assert torch.equal(merge(models, logits[:, :1]), merge(models, logits[:, 0]))


def test_merged_rows_keep_the_dtype_of_the_models() -> None:
    assert merge(normal(0, 2, 4), f64(1, 3, 2)).dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused() -> None:
    models = normal(0, 3, 10)
    with pytest.raises(ModelError, match=r"models \(3, 10\) and rows \(2, 4\) do not fit"):
        merge(models, normal(1, 2, 4))
    with pytest.raises(ModelError, match="need segments"):
        merge(models, normal(1, 2, 2, 3))


@pytest.mark.parametrize(
    ("segments", "told"),
    [
        (((0, 10, 2),), "segments name block 2: the rows have 2, from 0"),
        (((0, 4, 0), (4, 10, -1)), "segments name block -1: the rows have 2, from 0"),
        ((), "segments cover 0 of 10 columns"),
        (SEGMENTS[:2], "segments cover 8 of 10 columns"),
        (((0, 12, 0),), "segments cover 12 of 10 columns"),
        (((0, 5, 0), (0, 5, 1)), "segment 0 to 5 where column 5 is next: wanted each"),
        (((0, 6, 0), (4, 8, 1)), "segment 4 to 8 where column 6 is next"),
        (((0, 4, 0), (6, 12, 1)), "segment 6 to 12 where column 4 is next"),
        (((0, 5, 0), (5, 3, 1), (3, 10, 0)), "segment 3 to 10 where column 5 is next"),
        (((-2, 8, 0),), "segment -2 to 8 where column 0 is next"),
    ],
)
def test_segments_that_are_not_one_for_each_column_are_refused(segments: Any, told: str) -> None:
    with pytest.raises(ModelError, match=f"^{told}"):
        merge(normal(0, 3, 10), normal(1, 2, 2, 3), segments)


def test_segments_may_come_in_any_order_and_be_empty() -> None:
    models, logits = normal(0, 3, 10), normal(1, 2, 2, 3)
    mixed = (*SEGMENTS[::-1], (3, 3, 1), (10, 10, 0))
    merged = merge(models, logits, SEGMENTS)
    assert torch.equal(merge(models, logits, mixed), merged)
    assert torch.equal(merge(models, logits, np.array(mixed)), merged)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_floating_numbers_are_merged(dtype: torch.dtype) -> None:
    models, logits = normal(0, 2, 3), normal(1, 3, 2)
    with pytest.raises(ModelError, match=f"^models of dtype {dtype}: wanted a floating one"):
        merge(models.to(dtype), logits)
    with pytest.raises(ModelError, match=f"^logits of dtype {dtype}: wanted a floating one"):
        merge(models, logits.to(dtype))


# -- gradients ------------------------------------------------------------------------------------


@given(seeds, sizes, sizes)
def test_the_row_gradient_is_that_of_autograd(seed: int, k: int, d: int) -> None:
    """The loss sum_i n_i <delta_i, softmax(logits_i) @ models> has gradient delta_i at merged_i."""
    models, logits = f64(seed, d, 9).requires_grad_(), f64(seed + 1, k, d).requires_grad_()
    delta, n = f64(seed + 2, k, 9), 1 + f64(seed + 3, k).abs()
    (n[:, None] * delta * merge(models, logits)).sum().backward()
    weights = merging_weights(logits.detach())
    scores = delta @ models.detach().T
    closed = n[:, None] * weights * row_gradient(weights, scores)
    assert near(closed, logits.grad, 1e-10) or float(logits.grad.abs().max()) < 1e-12
    assert near((weights * n[:, None]).T @ delta, models.grad, 1e-10)
    # And the step of the models is that gradient, each model's divided by its mass.
    total = ModelSum.of(d, 1, ((0, 9, 0),), 9)
    total.add((weights * n[:, None])[:, None], delta)
    moved = models.detach() - total.step(models.detach())
    assert near(moved * total.mass[0][:, None], models.grad, 1e-9)


@given(seeds, sizes)
def test_block_scores_are_inner_products_over_each_block(seed: int, d: int) -> None:
    delta, models = f64(seed, 3, 10), f64(seed + 1, d, 10)
    scores = block_scores(delta, models, ((0, 4), (4, 9)))
    assert scores.shape == (3, 2, d)
    assert near(scores[:, 1], delta[:, 4:9] @ models[:, 4:9].T)
    assert near(scores[:, 0], delta[:, :4] @ models[:, :4].T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scores_of_huge_numbers_do_not_overflow(dtype: torch.dtype) -> None:
    big = torch.full((1, 4), float(torch.finfo(dtype).max) / 2, dtype=dtype)
    assert bool(block_scores(big, big, ((0, 4),)).isfinite().all())


# -- the default rule's row step ------------------------------------------------------------------


def numpy_row_step(
    logits: Tensor, scores: Tensor, length: Tensor, pace: Tensor, cap: float
) -> np.ndarray:
    """The formulas, one row after another."""
    made = np.empty(logits.shape)
    for i, b in np.ndindex(*logits.shape[:2]):
        w = np.exp(logits[i, b].numpy() - logits[i, b].max().item())
        w /= w.sum()
        score = scores[i, b].numpy()
        s = (score - (w * score).sum()) / float(length[i])
        if np.abs(s).max() > cap:
            s = s / np.abs(s).max() * cap
        raised = np.log(np.maximum(w, 1e-6)) - s * float(pace[i])
        made[i, b] = raised - np.log(np.exp(raised).sum())
    return made


@given(seeds, sizes, sizes, st.floats(0.01, 100), st.floats(0.01, 2))
def test_the_row_step_is_its_formula(seed: int, k: int, d: int, spread: float, cap: float) -> None:
    logits, scores = 10 * f64(seed, k, 2, d), spread * f64(seed + 1, k, 2, d)
    length, pace = 0.1 + f64(seed + 2, k).abs(), 5 * f64(seed + 3, k).abs()
    step = eg_row_step(logits, scores, length, pace, cap=cap)
    by_hand = numpy_row_step(logits, scores, length, pace, cap)
    np.testing.assert_allclose(step.numpy(), by_hand, rtol=1e-10, atol=1e-10)
    assert near(step.exp().sum(-1), torch.ones(k, 2, dtype=F64))


def one_step(scores: list[float], *, pace: float = 1.0, cap: float = 0.1) -> Tensor:
    """Change of the log-weights of a uniform row, up to its normalisation: (d,)."""
    d = len(scores)
    logits = eg_row_step(
        torch.zeros(1, 1, d, dtype=F64),
        torch.tensor([[scores]], dtype=F64),
        torch.ones(1, dtype=F64),
        torch.tensor([pace], dtype=F64),
        cap=cap,
    )[0, 0]
    return logits - logits.mean()


def test_a_model_that_would_lower_the_loss_gains_weight() -> None:
    # delta = start - end points uphill: a model that lies along it is a worse one.
    change = one_step([0.02, 0.0, -0.02])
    assert near(change, torch.tensor([-0.02, 0.0, 0.02], dtype=F64))


def test_the_cap_keeps_the_direction_and_pace_comes_after_it() -> None:
    assert near(one_step([40.0, 0.0, -20.0, -20.0]), torch.tensor([-0.1, 0, 0.05, 0.05], dtype=F64))
    small = one_step([0.04, 0.0, -0.04])
    assert near(one_step([0.04, 0.0, -0.04], pace=3), 3 * small)
    assert near(one_step([40.0, 0.0, -40.0], pace=3), torch.tensor([-0.3, 0, 0.3], dtype=F64))


def test_an_unused_model_can_come_back() -> None:
    logits = torch.tensor([[[0.0, -200.0]]], dtype=F64)
    one = torch.ones(1, dtype=F64)
    step = eg_row_step(logits, torch.zeros(1, 1, 2, dtype=F64), one, one, cap=0.1)
    assert step.exp()[0, 0, 1] == pytest.approx(FLOOR, rel=1e-5)


def test_a_least_length_stretches_short_steps_and_no_others() -> None:
    long, short = [40.0, 0.0, -20.0, -20.0], [0.02, 0.0, -0.02, 0.0]
    scores = torch.tensor([[long], [short], [short], [[0.0] * 4]], dtype=F64)
    logits, one = torch.zeros(4, 1, 4, dtype=F64), torch.ones(4, dtype=F64)
    least = torch.tensor([0.05, 0.05, 0.0, 0.05], dtype=F64)
    step = eg_row_step(logits, scores, one, one, cap=0.1, least=least)[:, 0]
    step -= step.mean(-1, keepdim=True)
    wanted = torch.tensor(
        [[-0.1, 0, 0.05, 0.05], [-0.05, 0, 0.05, 0], [-0.02, 0, 0.02, 0], [0, 0, 0, 0]], dtype=F64
    )
    assert near(step, wanted)


# -- how far the models go ------------------------------------------------------------------------


# -- the sum over a round -------------------------------------------------------------------------


@given(seeds, st.integers(1, 7), st.integers(1, 4), st.lists(st.integers(1, 6), max_size=4))
def test_order_and_chunking_of_a_sum_do_not_matter(
    seed: int, k: int, d: int, cuts: list[int]
) -> None:
    coef, delta, models = f64(seed, k, 2, d).abs(), normal(seed + 1, k, 10), normal(seed + 2, d, 10)
    whole = ModelSum.of(d, 2, SEGMENTS, 10)
    whole.add(coef, delta)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(k))
    parts = ModelSum.of(d, 2, SEGMENTS, 10)
    for chunk in torch.tensor_split(order, [c for c in sorted(cuts) if c < k]):
        if len(chunk):
            parts.add(coef[chunk], delta[chunk])
    assert near(parts.total, whole.total, 1e-14 * k)
    assert near(parts.mass, whole.mass, 1e-14 * k)
    by_hand = torch.stack(
        [
            sum(coef[i, [0] * 3 + [1] * 5 + [0] * 2, j] * delta[i].double() for i in range(k))
            for j in range(d)
        ]
    )
    assert near(whole.total, by_hand, 1e-13)
    mass = coef.sum(0)[[0] * 3 + [1] * 5 + [0] * 2].T
    assert near(whole.step(models.double()), models.double() - by_hand / mass, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_returns_new_models_and_an_unused_one_stays(dtype: torch.dtype) -> None:
    models = normal(0, 3, 10, dtype=dtype)
    before = models.clone()
    total = ModelSum.of(3, 1, ((0, 10, 0),), 8)
    total.add(torch.tensor([[[1.0, 0.0, 0.5]]], dtype=F64), normal(1, 1, 10, dtype=dtype))
    moved = total.step(models)
    assert torch.equal(models, before)
    assert moved.dtype == dtype
    assert torch.equal(moved[1], models[1])
    assert not (moved[[0, 2]] == models[[0, 2]]).any()


def test_statistics_become_convex_combinations_and_counters_the_largest() -> None:
    layout = Layout.of(norm_net().double())
    d, k = 3, 4
    total = ModelSum.for_layout(layout, d)
    coef = f64(0, k, 3, d).abs()
    coef[:, :, 2] = 0  # nobody uses the last model
    end = f64(1, k, layout.size).abs()  # variances far below the models' own
    end[:, layout.counters] = torch.tensor([[3.0], [9.0], [4.0], [1.0]], dtype=F64)
    models = 50 + f64(2, d, layout.size).abs()
    models[:, layout.counters] = 5
    total.add(coef[:2], end[:2])
    total.add(coef[2:], end[2:])
    made = layout.views(total.step(models))
    sent = layout.views(end)
    for name in ("1.running_mean", "1.running_var"):
        for j in (0, 1):
            share = coef[:, 1, j] / coef[:, 1, j].sum()
            assert near(made[name][j], share @ sent[name])
        assert torch.equal(made[name][2], layout.views(models)[name][2])
        assert bool((made[name] > 0).all())
    assert total.step(models)[:, layout.counters].flatten().tolist() == [9, 9, 9]


def test_a_pace_is_for_parameters_not_for_statistics() -> None:
    layout = Layout.of(norm_net().double())
    d, k, n = 3, 4, layout.n_params
    total = ModelSum.for_layout(layout, d)
    total.add(f64(0, k, 3, d).abs(), f64(1, k, layout.size).abs())
    models = f64(2, d, layout.size)
    whole = total.step(models)
    total.pace = torch.rand(3, d, generator=torch.Generator().manual_seed(3), dtype=F64)
    paced = total.step(models)
    assert torch.equal(paced[:, n:], whole[:, n:])
    for start, stop, block in layout.segments:
        part = slice(start, min(stop, n))
        step = (models - whole)[:, part] * total.pace[block][:, None]
        assert near(models[:, part] - paced[:, part], step)


def test_a_negative_whole_number_in_a_buffer_is_kept() -> None:
    total = ModelSum.of(1, 1, ((0, 3, 0),), 2, counters=1)
    total.add(torch.ones(2, 1, 1, dtype=F64), torch.tensor([[0.0, 0, -7], [0, 0, -7]]))
    assert float(total.step(torch.tensor([[1.0, 1, -7]]))[0, 2]) == -7


# -- the sketch -----------------------------------------------------------------------------------


def test_a_sketch_at_least_as_long_as_a_block_is_exact() -> None:
    spans = ((0, 30), (30, 37))
    a, b = f64(0, 2, 37), f64(1, 2, 37)
    sketch = Sketch.of(spans, 30, 5)
    inner = (sketch(a) * sketch(b)).sum(-1)
    exact = torch.stack([(a * b)[:, s:e].sum(-1) for s, e in spans], 1)
    assert near(inner, exact)


def test_a_sketch_keeps_inner_products_without_bias() -> None:
    n, size, draws = 200, 16, 600
    # Not centred at zero: signs that are not fair would show.
    a, b = f64(0, 1, n) + 0.5, f64(1, 1, n) + 0.5
    found = torch.stack(
        [(s(a) * s(b)).sum() for s in (Sketch.of(((0, n),), size, i) for i in range(draws))]
    )
    true = float((a * b).sum())
    error = float(found.std()) / draws**0.5
    assert float(found.std()) > 10  # these sketches are not exact, and
    assert abs(float(found.mean()) - true) < 4 * error
    # the spread is what the theory says: (|a|^2 |b|^2 + <a, b>^2 - 2 sum a^2 b^2) / size.
    variance = (a.square().sum() * b.square().sum() + true**2 - 2 * (a * b).square().sum()) / size
    assert float(found.var()) == pytest.approx(float(variance), rel=0.25)


def test_a_sketch_is_fixed_by_its_seed_and_linear() -> None:
    spans = ((0, 50),)
    a, b = f64(0, 3, 50), f64(1, 3, 50)
    sketch = Sketch.of(spans, 8, 1)
    assert near(sketch(a - 2 * b), sketch(a) - 2 * sketch(b))
    Sketch.of.cache_clear()
    assert torch.equal(Sketch.of(spans, 8, 1)(a), sketch(a))
    assert not torch.equal(Sketch.of(spans, 8, 2)(a), sketch(a))
    assert sketch(a.half()).dtype == torch.float32


# -- whole rounds ---------------------------------------------------------------------------------


def test_one_model_is_fedavg_to_the_bit() -> None:
    options = {"rounds": 5, "participation": 0.7}
    merged, averaged = run("fedmerge:d=1", **options), run("fedavg", **options)
    assert torch.equal(merged.soup.shared["models"], averaged.soup.shared["models"])
    for a, b in zip(merged.history, averaged.history, strict=True):
        assert a.metrics == b.metrics


COHORTS = (
    ("a", "b", "c", "d", "g"),
    ("b", "d"),
    ("a", "b", "e"),
    ("c", "d", "e"),
    ("b", "c"),
    ("a", "b", "c", "d", "e"),
    ("f", "a"),
    ("d",),
    ("d", "b", "a", "e", "f", "c", "g"),
)
"""Clients that come late, that miss seven rounds, and that take part beyond the horizon."""


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_the_default_rule_is_its_literal_transcription(leave_one_out: bool) -> None:
    method = FedMerge(d=4, cap=0.5, horizon=3, init_noise=2, sketch=64, leave_one_out=leave_one_out)
    # What clients have put into the models is kept in 16 bits.
    rtol = 1e-4 if leave_one_out else 1e-5
    weights = beside_the_rule_by_hand(method, COHORTS, rtol=rtol)
    # It was not a test of rows that stay as they were.
    assert float((weights - 0.25).abs().max()) > 0.1
    # Training helps a lot at first, then less than nothing.
    helped = {c: 0.3 - 0.05 * i for i, c in enumerate("abcdefg")}
    further = beside_the_rule_by_hand(method, COHORTS, helped, rtol=rtol)
    assert float((further - weights).abs().max()) > 0.01


def test_so_it_is_where_each_client_may_have_a_model_of_its_own() -> None:
    every, most, some, few = ("a", "b", "c", "d"), ("a", "b", "c"), ("c", "a"), ("d",)
    cohorts = (*[every] * 3, *[most] * 12, every, few, every, some, some, every, every)
    # Of one whom training helps much and one it harms; d seldom takes part.
    helped = {"a": 0.9, "b": -0.4, "c": 0.15, "d": 0.6}
    method = FedMerge(cap=0.5, init_noise=2, sketch=64).resolve(4)
    weights = beside_the_rule_by_hand(method, cohorts, helped, rtol=1e-5)
    a, _, c, d = weights.amax(-1).mean(-1).tolist()
    assert a > 0.95
    assert d > c > 0.4
    assert weights[0].argmax(-1).tolist() != weights[3].argmax(-1).tolist()
    still = beside_the_rule_by_hand(replace(method, settle=0), cohorts, helped, rtol=1e-5)
    assert float(still[0].amax(-1).max()) < 0.7


def beside_the_rule_by_hand(
    method: FedMerge,
    cohorts: Sequence[Sequence[str]],
    helped: dict[str, float] | None = None,
    *,
    rtol: float,
) -> Tensor:
    """Compare rounds of made-up updates with `RuleByHand`; return the last weights."""
    soup = Soup(method, net(dtype=F64), seed=3)
    layout = soup.setup.layout
    assert all(stop - start <= 64 for start, stop in layout.spans)
    hand = RuleByHand(
        soup.shared["models"].numpy().copy(),
        layout.spans,
        cap=method.cap,
        horizon=method.horizon,
        leave_one_out=bool(method.leave_one_out),
        settle=method.settle,
        extrapolate=method.extrapolate,
    )
    near: dict[str, float] = {"rtol": rtol, "atol": 1e-5}
    for t, cohort in enumerate(cohorts):
        sent = soup.send(cohort)
        for i, client in enumerate(cohort):
            np.testing.assert_allclose(sent.message[i, 0], hand.merged(client), **near)
        used = soup.used(soup.clients)[:, 0]
        wanted = np.stack([hand.used(client) for client in soup.clients])
        np.testing.assert_allclose(used, wanted, **near)
        # Some steps below the cap, some above it.
        delta = (0.02 if t % 2 else 2.0) * made_delta(soup, len(cohort), 50 + t)
        said = {c: helped[c] + 0.1 * (t % 3 - 1) for c in cohort} if helped else None
        updates = make_updates(
            sent,
            delta,
            lr=torch.linspace(0.1, 0.4, len(cohort), dtype=F64),
            extra={"help": torch.tensor([said[c] for c in cohort], dtype=F64)} if said else {},
        )
        assert soup.fold(updates) == []
        soup.commit()
        length = updates.lr * updates.steps
        hand.step(
            {c: delta[i].numpy() for i, c in enumerate(cohort)},
            {c: int(updates.n_examples[i]) for i, c in enumerate(cohort)},
            {c: float(length[i]) for i, c in enumerate(cohort)},
            said,
        )
        weights = soup.weights(list(hand.weights))
        assert weights is not None
        np.testing.assert_allclose(weights, np.stack(list(hand.weights.values())), **near)
        np.testing.assert_allclose(soup.shared["models"], hand.models, **near)
    return weights


def alone(method: FedMerge, rounds: int) -> Soup:
    """Rounds of one client each, a new one every time but in the last two."""
    soup = Soup(method, net(dtype=F64), seed=3)
    for t in range(rounds):
        sent = soup.send([f"c{t if t < rounds - 2 else t - rounds + 2}"])
        soup.fold(make_updates(sent, made_delta(soup, 1, t)))
        soup.commit()
    return soup


def test_models_come_apart_even_if_every_round_is_one_clients() -> None:
    def apart(soup: Soup) -> Tensor:
        models = soup.shared["models"]
        return models[1:] - models[:1]

    start = apart(Soup(FedMerge(d=3), net(dtype=F64), seed=3))
    # A client's update goes to all models alike if nobody else is known to use them more.
    assert near(apart(alone(FedMerge(d=3, peers=0), 8)), start, 1e-9)
    moved = apart(alone(FedMerge(d=3), 8)) - start
    assert float(moved.abs().max()) > 0.02


def test_merging_pays_in_rounds_of_one_client() -> None:
    """Eight clients of digits whose labels are permuted in four ways: no model serves them all."""
    reached = {}
    for method in ("fedmerge", "fedavg"):
        settings = {"data": "digits", "setting": "concept", "clients": 8, "seed": 400}
        config = load_config(None, {**settings, "method": method, "rounds": 60})
        federation = config.federation()
        size = federation.input_shape, federation.n_outputs
        model = make_model(config.model, *size, hidden=config.hidden)
        training = Training(config.lr, epochs=config.epochs, batch_size=config.batch_size)
        options = {"rounds": 60, "participation": 1 / 8, "seed": 400, "evaluate_every": 60}
        simulation = Simulation(
            make_method(method), federation, model, training=training, **options
        )
        logs = list(simulation.rounds())
        reached[method] = logs[-1].metrics["merged"]["test"]["accuracy"].mean
    assert reached["fedmerge"] > 1.5 * reached["fedavg"]


@pytest.mark.parametrize("peers", [0, 256])
def test_a_first_step_is_the_longer_the_later_it_is(peers: int) -> None:
    method = FedMerge(d=2, cap=0.05, pull=0, peers=peers)
    rounds = 14
    soup = alone(method, rounds)
    weights = soup.weights([f"c{t}" for t in range(2, rounds - 2)])
    assert weights is not None
    length = (weights[..., 0].log() - weights[..., 1].log()).abs() / 2  # of two models, each half
    late = torch.arange(2.0, rounds - 2, dtype=F64).clamp(max=10)[:, None] ** 2
    late *= 0.005 * bool(peers)
    assert bool((length >= late - 1e-9).all())
    assert near(length[4:], late[4:].expand(-1, 2)) == bool(peers)
    if not peers:
        assert float(length.max()) <= 0.05 + 1e-9
    for version in (0, 3, 99):
        rows = method.rows(soup.setup, 1)
        first = 0.05 * max(1, min(version, 10) ** 2 / 10 * bool(peers))
        assert method.reach(rows, version).tolist() == pytest.approx([first])


def test_a_round_does_not_change_the_state_before_it() -> None:
    soup = Soup(FedMerge(d=3), net(dtype=F64))
    sent = soup.send(["a", "b"])
    before = soup_tensors(soup)
    shared = soup.shared
    kept = {name: value.clone() for name, value in shared.items()}
    soup.fold(make_updates(sent, made_delta(soup, 2, 0)))
    soup.commit()
    assert equal(shared, kept)
    assert not equal(before, soup_tensors(soup))


@pytest.mark.parametrize(("kept", "steps"), [(torch.int16, 65534), (torch.int8, 254)])
def test_numbers_in_units_are_off_by_half_a_unit_at_most(kept: torch.dtype, steps: int) -> None:
    values = normal(4, 3, 2, 50) * torch.tensor([1e-20, 1.0, 1e30])[:, None, None]
    values[1, 1] = 0
    values[2, 0, 7] = torch.inf
    whole, unit = in_units(values, kept)
    assert (whole.dtype, unit.shape) == (kept, (3, 2))
    found = from_units(whole, unit)
    assert found.dtype == values.dtype
    assert bool(found.isfinite().all())
    assert not found[1, 1].any()
    wanted = values.clamp(-HUGE, HUGE)
    off = (found - wanted).abs() / wanted.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    assert float(off.max()) <= 1 / steps + 1e-6
    assert bool((found[0] != values[0]).any())
